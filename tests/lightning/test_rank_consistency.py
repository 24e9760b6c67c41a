"""Two processes that would train different rows stop together, and say what differs."""

import re
from typing import Any

import pytest
from launch import in_processes, of_all
from pytorch_lightning.strategies import DDPStrategy
from small_runs import Net, data, known_rank, loader, trainer

from partial_embedding import InputError, Vocabulary
from partial_embedding.callbacks.lightning import RowUnfreezing

PLATEAU = {
    "stages": [
        {"epoch": 0, "rows": [1]},
        {"plateau": {"monitor": "val_loss", "patience": 2}, "rows": [2]},
    ]
}
GROWTH = {
    "stages": [
        {"step": 0, "rows": [1]},
        {"step": 4, "rows": "all", "grow": {"order": "most_frequent", "increments": 2}},
    ]
}
OF_ONE = {"stages": [PLATEAU["stages"][0], {"plateau": "also", "rows": [2]}]}
STARTS = {"stages": [{"epoch": 0, "rows": {"most_frequent": 2}}]}


class Measured(Net):
    """Logs what each process makes of its validation."""

    sync, of_rank = False, 0.0

    def validation_step(self, batch: Any, index: int) -> None:
        value = 1.0 + self.global_rank * self.of_rank
        self.log("val_loss", value, sync_dist=self.sync)
        if self.global_rank or self.of_rank < 9:
            self.log("also", value)


# A schedule, what the modules of the two processes measure, and what is said of the difference.
CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "metrics": (
        PLATEAU,
        {"of_rank": 0.5},
        r"same metrics\. Received: \{'val_loss': 1\.0\} .*\{'val_loss': 1\.5\}.*sync_dist",
    ),
    "metrics_in_sync": (PLATEAU, {"of_rank": 0.5, "sync": True}, "nothing"),
    "a_metric_of_one": (
        OF_ONE,
        {"of_rank": 9.0},
        r"same metrics\. Received: \{\} in process 0 and \{'also': 10\.0\}",
    ),
    "first_rows": (
        STARTS,
        {},
        r"same rows of 'words'\. Received: 2 rows \(\w+\) .* 2 rows \(\w+\).*vocabulary",
    ),
    "rows_of_a_later_part": (GROWTH, {}, r"same rows of 'words'\. Received: 6 rows .* 6 rows"),
}


@pytest.mark.parametrize("case", CASES)
@in_processes(2)
def test_processes_that_would_train_different_rows_stop_together(case: str) -> None:
    schedule, settings, rule = CASES[case]
    net = Measured().build()
    vars(net).update(settings)
    # What is most frequent differs, for those that ask for it.
    counts = range(12) if known_rank() else range(12, 0, -1)
    callback = RowUnfreezing(schedule, vocabulary=Vocabulary("abcdefghijkl", counts=counts))
    made = trainer(callback, strategy=DDPStrategy(process_group_backend="gloo"), devices=2)
    said = "nothing"
    try:
        made.fit(net, loader(data(6)), loader(data(2)))
    except InputError as error:
        said = str(error)
    zero, one = of_all(said)
    assert zero == one
    assert re.fullmatch(f".*{rule}.*", zero)
