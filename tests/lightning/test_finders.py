"""Lightning's finders of learning rates and batch sizes: they see the first rows, and leave no trace."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pytorch_lightning", reason="these tests run in the Lightning environment")

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder
from pytorch_lightning.tuner import Tuner
from small_runs import SCHEDULE, Net, Witness, assert_same_run, data, loader, trainer

from partial_embedding.callbacks.lightning import RowUnfreezing


class Searched(Net):
    """Has the attributes that finders look for, and notes the rows of each step."""

    def build(self, *arguments: Any, **options: Any) -> Any:
        self.lr, self.batch_size = 0.1, 4
        self.rows: list[list[int]] = []
        return super().build(*arguments, **options)

    def training_step(self, batch: Any, index: int) -> Any:
        self.rows.append(self.words.trainable_rows.tolist())
        return super().training_step(batch, index)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(data(), batch_size=self.batch_size)


def search_rate(made: Any, net: Any) -> None:
    Tuner(made).lr_find(net, num_training=9, update_attr=False)


def search_batch(made: Any, net: Any) -> None:
    Tuner(made).scale_batch_size(net, steps_per_trial=2, max_trials=2)


class KeepsRate(LearningRateFinder):
    """Searches when `fit` starts, and leaves the rate as it was."""

    def __init__(self) -> None:
        super().__init__(num_training_steps=9, update_attr=False)


BEFORE: dict[str, Callable[[Any, Any], None]] = {"rate": search_rate, "batch": search_batch}
WITHIN: dict[str, Callable[[], pl.Callback]] = {
    "rate": KeepsRate,
    "batch": lambda: BatchSizeFinder(steps_per_trial=2, max_trials=2),
}


def run(
    folder: Path, *callbacks: Any, search: Any = None, ours: bool = True
) -> tuple[Any, Witness]:
    net, witness = Searched().build(sparse=ours, plain=not ours), Witness()
    unfreezing = [RowUnfreezing(SCHEDULE, audit=True)] if ours else []
    made = trainer(*unfreezing, witness, *callbacks, default_root_dir=folder)
    if search is not None:
        search(made, net)
    searched = len(getattr(net, "rows", []))
    net.batch_size = 4
    made.fit(net)
    return net, witness, searched
