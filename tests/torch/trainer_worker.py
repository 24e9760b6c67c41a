"""One rank of runs of Hugging Face's Trainer; a script, started by `test_two_processes.py`.

Usage: trainer_worker.py FOLDER PROCESSES

It runs each case as anyone would, with no call of this library but `add_tokens`, and writes the
model before and after to `{folder}/{case}-{rank}-of-{processes}.pt`.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_language_models import NEW, inputs, language_model, tokenizer, training_arguments

from partial_embedding.torch import add_tokens

TEXTS = ("the numbat sat on quokkas", "a dog ran and quokkas", "numbat quokkas on the mat") * 4
# Global batches are the same whoever shares them.
GLOBAL_BATCH = 4
CASES = {
    f"{optimizer}-{order}-{'tied' if tied else 'untied'}": (optimizer, order, tied)
    for optimizer in ("sgd", "adamw_torch")
    for order in ("no_lora", "lora_after")
    for tied in (True, False)
}


def run(folder: Path, optimizer: str, order: str, tied: bool, processes: int) -> Any:
    model, words = language_model("Llama", tied), tokenizer()
    add_tokens(model, words, NEW)
    if order == "lora_after":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    examples = [{n: v[0] for n, v in inputs(words, text).items()} for text in TEXTS]
    lengths = {len(example["input_ids"]) for example in examples}
    assert len(lengths) == 1, lengths
    arguments = training_arguments(
        folder,
        learning_rate=0.05,
        weight_decay=0.1,
        max_steps=3,
        per_device_train_batch_size=GLOBAL_BATCH // processes,
        optim=optimizer,
        bf16=False,
        **({"ddp_backend": "gloo"} if processes > 1 else {}),
    )
    transformers.Trainer(model, arguments, train_dataset=examples).train()
    after = {name: value.detach().clone() for name, value in model.named_parameters()}
    return {"before": before, "after": after}


def main(folder: Path, processes: int) -> None:
    rank = os.environ.get("RANK", "0")
    for name, (optimizer, order, tied) in CASES.items():
        found = run(folder, optimizer, order, tied, processes)
        torch.save(found, folder / f"{name}-{rank}-of-{processes}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
