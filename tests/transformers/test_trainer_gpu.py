"""New tokens and a schedule in Hugging Face's Trainer on a GPU: `make test-gpu`."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import rows_that_differ
from tiny_language_models import training_arguments

from partial_embedding.callbacks.transformers import RowUnfreezing
from partial_embedding.torch import replace_embedding

if not torch.cuda.is_available():
    pytest.skip("these tests need a GPU", allow_module_level=True)

SCHEDULE = {"stages": [{"epoch": 0, "rows": [3, 4]}, {"epoch": 1, "rows": {"range": [0, 10]}}]}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "mixed", [{}, {"fp16": True}, {"bf16": True}], ids=["full", "fp16", "bf16"]
)
@pytest.mark.parametrize("kind", ["adamw_torch", "adamw_torch_fused"])
def test_only_scheduled_rows_move(kind: str, mixed: Any, tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=tied
    )
    model = transformers.GPT2LMHeadModel(config)
    replace_embedding(model, "wte", trainable_rows="all")
    before = model.transformer.wte.weight.detach().clone()
    arguments = training_arguments(
        tmp_path, use_cpu=False, num_train_epochs=2, per_device_train_batch_size=8, optim=kind,
        weight_decay=0.1, learning_rate=1e-2, **mixed,
    )  # fmt: skip
    examples = [torch.arange(i, i + 8) % 50 for i in range(32)]
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in examples],
        callbacks=[RowUnfreezing(SCHEDULE, audit=2)],
    )
    trainer.train()
    assert model.transformer.wte.weight.is_cuda
    assert rows_that_differ(before, model.transformer.wte.weight) == list(range(10))
