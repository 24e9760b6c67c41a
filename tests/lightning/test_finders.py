"""Finders of learning rates and batch sizes: they train the first rows, and leave no trace."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder
from pytorch_lightning.tuner import Tuner
from small_runs import BATCH, SCHEDULE, STAGES, Net, Witness, assert_same_run, data, trainer
from torch.utils.data import DataLoader

from partial_embedding.callbacks.lightning import RowUnfreezing

SEARCHED = {"num_training": 9, "update_attr": False}
TRIED = {"steps_per_trial": 2, "max_trials": 2}


class Searched(Net):
    """Has the attributes that finders look for, and notes the rows of each step."""

    def build(self, *arguments: Any, **options: Any) -> Any:
        self.lr, self.batch_size = 0.1, BATCH
        self.rows: list[list[int]] = []
        return super().build(*arguments, **options)

    def training_step(self, batch: Any, index: int) -> Any:
        self.rows.append(self.words.trainable_rows.tolist())
        return super().training_step(batch, index)

    def train_dataloader(self) -> Any:
        return DataLoader(data(), batch_size=self.batch_size)


def run(
    folder: Path, *more: pl.Callback, search: Any = None, **options: Any
) -> tuple[Any, Witness, Any]:
    net, witness = Searched().build(), Witness()
    unfreezing = RowUnfreezing(SCHEDULE, audit=True)
    made = trainer(unfreezing, witness, *more, default_root_dir=folder, **options)
    if search is not None:
        search(Tuner(made), net)
    net.batch_size = BATCH
    made.fit(net)
    return net, witness, unfreezing


BEFORE: dict[str, Callable[[Any, Any], Any]] = {
    "rate": lambda tuner, net: tuner.lr_find(net, **SEARCHED),
    "batch": lambda tuner, net: tuner.scale_batch_size(net, **TRIED),
}
WITHIN: dict[str, Callable[[], pl.Callback]] = {
    "rate": lambda: LearningRateFinder(num_training_steps=9, update_attr=False),
    "batch": lambda: BatchSizeFinder(**TRIED),
}


def check(found: tuple[Any, Witness, Any], alone: tuple[Any, Witness, Any]) -> None:
    net, witness, unfreezing = found
    assert_same_run(witness, alone[1].seen)
    assert unfreezing.audit_results == alone[2].audit_results
    searched = len(net.rows) - len(alone[0].rows)
    assert searched > 2
    assert net.rows[searched:] == alone[0].rows
    # What was found is right for the rows that will train, and costs no state of others.
    assert net.rows[:searched] == searched * [list(STAGES[0])]


@pytest.mark.parametrize(
    ("search", "clip"), [(BEFORE["rate"], 0.15), (BEFORE["batch"], None)], ids=BEFORE
)
def test_a_search_before_fit_leaves_no_trace(
    search: Any, clip: float | None, tmp_path: Path
) -> None:
    found = run(tmp_path, search=search, gradient_clip_val=clip)
    check(found, run(tmp_path, gradient_clip_val=clip))


@pytest.mark.parametrize("finder", WITHIN.values(), ids=WITHIN)
def test_a_search_within_fit_leaves_no_trace(finder: Any, tmp_path: Path) -> None:
    alone = run(tmp_path)
    found = run(tmp_path, finder())
    assert found[0].batch_size == BATCH
    check(found, alone)


@pytest.mark.parametrize("search", BEFORE.values(), ids=BEFORE)
def test_a_callback_that_was_in_a_run_begins_anew_after_a_search(
    search: Any, tmp_path: Path
) -> None:
    alone = run(tmp_path)
    _, _, unfreezing = used = run(tmp_path)
    assert used[2].audit_results
    net, witness = Searched().build(), Witness()
    made = trainer(unfreezing, witness, default_root_dir=tmp_path)
    search(Tuner(made), net)
    net.batch_size = BATCH
    made.fit(net)
    check((net, witness, unfreezing), alone)
