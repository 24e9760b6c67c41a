"""Two processes that would train different rows; writes what each of them raised.

Usage: disagree.py FOLDER CASE…
"""

import sys
from pathlib import Path
from typing import Any

from forked import in_processes
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
STARTS = {"stages": [{"epoch": 0, "rows": {"most_frequent": 2}}]}


class Measured(Net):
    """Logs what each process makes of its validation."""

    sync, of_rank = False, 0.0

    def validation_step(self, batch: Any, index: int) -> None:
        value = 1.0 + self.global_rank * self.of_rank
        self.log("val_loss", value, sync_dist=self.sync)
        if self.global_rank or self.of_rank < 9:
            self.log("also", value)


def fit(case: str, rank: int) -> None:
    net = Measured().build()
    counts = range(12)
    schedule: Any = PLATEAU
    if case == "metrics":
        net.of_rank = 0.5
    elif case == "metrics_in_sync":
        net.of_rank, net.sync = 0.5, True
    elif case == "a_metric_of_one":
        net.of_rank = 9.0
        schedule = {"stages": [PLATEAU["stages"][0], {"plateau": "also", "rows": [2]}]}
    elif case == "first_rows":
        schedule, counts = STARTS, range(12) if rank else range(12, 0, -1)
    elif case == "rows_of_a_later_part":
        schedule, counts = GROWTH, range(12) if rank else range(12, 0, -1)
    callback = RowUnfreezing(schedule, vocabulary=Vocabulary("abcdefghijkl", counts=counts))
    strategy = DDPStrategy(process_group_backend="gloo")
    made = trainer(callback, strategy=strategy, devices=2)
    made.fit(net, loader(data(6)), loader(data(2)))


def main(folder: Path, cases: list[str]) -> None:
    def run(case: str, rank: int) -> None:
        said = "nothing"
        try:
            fit(case, rank)
        except InputError as error:
            said = str(error)
        (folder / f"{case}-{rank}").write_text(said)

    for case in cases:
        assert in_processes(2, lambda rank, case=case: run(case, rank)) == [0, 0], case


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
