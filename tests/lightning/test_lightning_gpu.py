"""The callbacks in a trainer on a GPU: `make test-gpu`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import same_bits
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import CSVLogger
from small_runs import EPOCHS, NEVER_TRAINED, SCHEDULE, Net, Witness, data, loader

from partial_embedding.callbacks.lightning import RowMonitor, RowUnfreezing

if not torch.cuda.is_available():
    pytest.skip("these tests need a GPU", allow_module_level=True)


def fit(folder: Path, witness: Witness, **options: Any) -> Net:
    """A run in which each word is looked up once a step, since sums have no order on a GPU."""
    net = Net().build()
    options = {"max_epochs": EPOCHS, "accelerator": "gpu", "devices": 1, **options}
    Trainer(
        callbacks=[RowUnfreezing(SCHEDULE, audit=1), RowMonitor(every_n_steps=2), witness],
        logger=CSVLogger(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    ).fit(net, loader(data(duplicates=False)))
    return net


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_frozen_rows_keep_their_bits_and_the_others_move(precision: Any, tmp_path: Path) -> None:
    witness = Witness()
    net = fit(tmp_path, witness, precision=precision)
    first, last = Net().build().words.weight, net.words.weight
    moved = [row for row in range(len(first)) if not same_bits(first[row], last[row])]
    assert moved == [row for row in range(len(first)) if row not in NEVER_TRAINED]
    for state in witness.seen:
        assert same_bits(state["words.weight"][list(NEVER_TRAINED)], first[list(NEVER_TRAINED)])


def test_the_gpu_follows_the_cpu(tmp_path: Path) -> None:
    runs = []
    for accelerator in ("cpu", "gpu"):
        witness = Witness()
        fit(tmp_path / accelerator, witness, accelerator=accelerator)
        runs.append([state["words.weight"].cpu() for state in witness.seen])
    for here, there in zip(*runs, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-4)
