"""One rank of runs on two that would train different rows, for `test_ddp.py`.

What it raised is written to `{folder}/{case}-{rank}`.
"""

import os
from pathlib import Path
from typing import Any

from pytorch_lightning.strategies import DDPStrategy
from small_runs import Net, data, loader, trainer

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


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "metrics": (PLATEAU, {"of_rank": 0.5}),
    "metrics_in_sync": (PLATEAU, {"of_rank": 0.5, "sync": True}),
    "a_metric_of_one": (OF_ONE, {"of_rank": 9.0}),
    "first_rows": (STARTS, {}),
    "rows_of_a_later_part": (GROWTH, {}),
}


def fit(case: str, rank: int) -> None:
    schedule, settings = CASES[case]
    net = Measured().build()
    vars(net).update(settings)
    # What is most frequent differs, for those that ask for it.
    vocabulary = Vocabulary("abcdefghijkl", counts=range(12) if rank else range(12, 0, -1))
    callback = RowUnfreezing(schedule, vocabulary=vocabulary)
    strategy = DDPStrategy(process_group_backend="gloo")
    made = trainer(callback, strategy=strategy, devices=2)
    made.fit(net, loader(data(6)), loader(data(2)))


def main(folder: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    for case in CASES:
        said = "nothing"
        try:
            fit(case, rank)
        except InputError as error:
            said = str(error)
        (folder / f"{case}-{rank}").write_text(said)
