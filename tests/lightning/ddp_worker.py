"""One rank of a run on two processes; a script, started by `test_ddp.py`.

The process needs LOCAL_RANK, MASTER_ADDR and MASTER_PORT. It writes what it saw, batch by batch, to
`{folder}/{case}-{rank}.pt`.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.strategies import DDPStrategy
from small_runs import SCHEDULE, Net, Witness, data, loader, trainer
from torch import Tensor

from partial_embedding.callbacks.lightning import RowUnfreezing
from partial_embedding.torch import PartialLinear


class Tied(Net):
    """A head whose weight is the table's, so that the gradient of the table is dense."""

    def loss(self, batch: Any) -> Tensor:
        ids, labels = batch
        logits = F.linear(self.words(ids).mean(1) + self.head.bias.sum(), self.words.weight)
        return F.cross_entropy(logits, labels) + self.head(self.words(ids).mean(1)).square().mean()


class TiedHead(Net):
    """A head that is partly trainable too, so that the gradient stays sparse."""

    def build(self, **options: Any) -> "TiedHead":
        super().build(**options)
        rows, width = self.words.weight.shape
        self.scores = PartialLinear(width, rows, bias=False)
        self.scores.weight = self.words.weight
        return self

    def loss(self, batch: Any) -> Tensor:
        ids, labels = batch
        hidden = self.words(ids).mean(1)
        return F.cross_entropy(self.scores(hidden), labels) + self.head(hidden).square().mean()


class Batches(pl.Callback):
    """Keeps the batches of this rank."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.seen.append(batch)


# All rows frozen at first, then a step of a rank whose batch holds none that train.
NONE_FIRST = {"stages": [{"epoch": 0, "rows": "none"}, {"epoch": 1, "rows": [5]}]}

CASES: dict[str, dict[str, Any]] = {
    "sparse": {},
    "accumulate": {"trainer": {"accumulate_grad_batches": 2}},
    "clipped": {"trainer": {"gradient_clip_val": 0.15}},
    "lazy": {"callback": {"lazy": True}},
    "dense": {"build": {"sparse": False}},
    "tied": {"build": {"sparse": False}, "kind": Tied},
    "tied_accumulate": {
        "build": {"sparse": False},
        "kind": Tied,
        "trainer": {"accumulate_grad_batches": 2},
    },
    "tied_head": {"kind": TiedHead},
    "none_first": {"schedule": NONE_FIRST},
}


def run(name: str, folder: Path) -> None:
    case = CASES[name]
    net = case.get("kind", Net)().build(**case.get("build", {}))
    callback = RowUnfreezing(case.get("schedule", SCHEDULE), audit=1, **case.get("callback", {}))
    witness, batches = Witness(), Batches()
    options = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2}
    made = trainer(callback, witness, batches, **options, **case.get("trainer", {}))
    made.fit(net, loader(data(6)))
    (optimizer,) = made.optimizers
    kept = {
        "weights": witness.seen,
        "epochs": witness.epochs,
        "batches": batches.seen,
        "optimizer": optimizer.state_dict(),
        "reports": [(report.frozen, report.changed) for report in callback.reports],
    }
    torch.save(kept, folder / f"{name}-{made.global_rank}.pt")


if __name__ == "__main__":
    assert "LOCAL_RANK" in os.environ
    for case_name in CASES:
        run(case_name, Path(sys.argv[1]))
