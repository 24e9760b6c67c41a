"""Cases of Hugging Face's Trainer in one process and in two, for `test_two_processes.py`.

Each runs as anyone would, with no call of this library but `add_tokens`, and returns the model
before and after. Several processes shard the models of the cases `SHARDED` by FSDP2, and go on from
a checkpoint once more.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import state
from accelerate.utils import DistributedType
from tiny_language_models import (
    NEW,
    NEW_ROWS,
    inputs,
    language_model,
    tokenizer,
    training_arguments,
)
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from partial_embedding import InputError
from partial_embedding.callbacks.transformers import RowUnfreezing
from partial_embedding.torch import add_tokens
from partial_embedding.torch.row_gradient import RowGradient
from partial_embedding.torch.shards import is_sharded

TEXTS = ("the numbat sat on quokkas", "a dog ran and quokkas", "numbat quokkas on the mat") * 4
# Global batches are the same whoever shares them.
GLOBAL_BATCH = 4
CASES = {
    f"{optimizer}-{order}-{'tied' if tied else 'untied'}": (optimizer, order, tied)
    for optimizer in ("sgd", "adamw_torch")
    for order in ("no_lora", "lora_after")
    for tied in (True, False)
}


SHARDED = {"sharded-tied": True, "sharded-untied": False}
SAVED_AT, SHARDED_STEPS = 3, 5
SCHEDULE = {
    "stages": [{"step": 0, "rows": NEW_ROWS[:1]}, {"step": 2, "rows": [1, *NEW_ROWS]}],
}


class LikeTables(TorchDispatchMode):
    """Finds tensors of the shape of a table with memory of their own, while steps are made."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.shape = model.get_input_embeddings().weight.shape
        self.own: set[int] = set()
        self.found: list[str] = []

    def begin(self) -> None:
        """Begin, now that the model is where it trains."""
        self.own = {parameter.data_ptr() for parameter in self.model.parameters()}
        self.found.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if not isinstance(one, torch.Tensor) or isinstance(one, RowGradient):
                continue
            is_dense = one.layout == torch.strided and one.shape == self.shape
            if is_dense and one.data_ptr() not in self.own:
                self.found.append(str(func))
        return result


class BeforeSteps(transformers.TrainerCallback):
    """Calls something when training begins."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def on_train_begin(self, *args: Any, **given: Any) -> None:
        self.call()


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
    like_tables = LikeTables(model)
    begin = BeforeSteps(like_tables.begin)
    trainer = transformers.Trainer(model, arguments, train_dataset=examples, callbacks=[begin])
    with like_tables:
        trainer.train()
    after = {name: value.detach().clone() for name, value in model.named_parameters()}
    ignored = sorted(getattr(trainer.model_wrapped, "parameters_to_ignore", ()))
    return {
        "before": before,
        "after": after,
        "ignored": ignored,
        "like_tables": like_tables.found,
    }


def let_fsdp_have_the_cpu() -> None:
    """Accelerate takes FSDP for a GPU's alone; on CPUs it leaves out to say which engine it is."""
    real = state.AcceleratorState.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        if options.get("fsdp_plugin") is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = options["fsdp_plugin"]

    state.AcceleratorState.__init__ = init


def run_sharded(folder: Path, tied: bool, processes: int, resumed: Path | None = None) -> Any:
    """A run in which FSDP2 shards the model, where there are several processes."""
    model, words = language_model("Llama", tied), tokenizer()
    add_tokens(model, words, NEW)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    examples = [{n: v[0] for n, v in inputs(words, text).items()} for text in TEXTS]
    sharding: dict[str, Any] = {
        "fsdp": True,
        "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"},
    }
    arguments = training_arguments(
        folder,
        learning_rate=0.05,
        weight_decay=0.1,
        max_steps=SHARDED_STEPS,
        per_device_train_batch_size=GLOBAL_BATCH // processes,
        bf16=False,
        save_strategy="steps",
        save_steps=SAVED_AT,
        lr_scheduler_type="constant",
        **(sharding if processes > 1 else {}),
    )
    state.AcceleratorState._reset_state()
    schedules = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    callback = RowUnfreezing(dict.fromkeys(schedules, SCHEDULE), audit=1)
    trainer = transformers.Trainer(model, arguments, train_dataset=examples, callbacks=[callback])
    if resumed is not None:
        callback.resume(model, resumed)
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    held = dict(trainer.model.named_parameters())
    return {
        "before": before,
        "after": {name: whole(value).detach().clone() for name, value in held.items()},
        "sharded": [name for name, value in held.items() if is_sharded(value)],
    }


def whole(value: Any) -> Any:
    return value.full_tensor() if is_sharded(value) else value


def refused(folder: Path) -> str:
    """What is said of checkpoints of rows where FSDP2 shards the model."""
    model = language_model("Llama")
    add_tokens(model, tokenizer(), NEW)
    examples = [{n: v[0] for n, v in inputs(tokenizer(), TEXTS[0]).items()}] * 4
    state.AcceleratorState._reset_state()
    trainer = transformers.Trainer(
        model,
        training_arguments(folder, max_steps=1, fsdp=True, fsdp_config={"version": 2}),
        train_dataset=examples,
        callbacks=[RowUnfreezing(SCHEDULE, checkpoint="rows")],
    )
    try:
        trainer.train()
    except InputError as error:
        return str(error)
    return "nothing was refused"


def sharded(folder: Path, tied: bool, processes: int) -> dict[str, Any]:
    found = run_sharded(folder, tied, processes)
    if processes > 1:
        saved = folder / f"checkpoint-{SAVED_AT}"
        again = folder.with_name(f"{folder.name}-again")
        found["again"] = run_sharded(again, tied, processes, saved)
    return found


def cases(processes: int, folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    if processes == 1:
        dist.destroy_process_group()
    else:  # where accelerate looks, which then finds that the group is there
        rank, size = str(dist.get_rank()), str(processes)
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    for name, case in CASES.items():
        yield name, partial(run, folder, *case, processes)
    if processes > 1:
        let_fsdp_have_the_cpu()
    for name, tied in SHARDED.items():
        yield name, partial(sharded, folder / f"{name}-{processes}", tied, processes)
    if processes > 1:
        yield "refused", partial(refused, folder)
        dist.barrier()
