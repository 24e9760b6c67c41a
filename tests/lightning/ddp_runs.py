"""Runs under DDP of modules and options of many kinds, each in both of two processes."""

import importlib
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from launch import of_all, shared_folder
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy
from small_runs import SCHEDULE, STAGES, D, Net, Scored, Witness, data, known_rank, loader, trainer
from torch import Tensor

from partial_embedding.callbacks.lightning import RowMonitor, RowUnfreezing
from partial_embedding.torch import ddp as ddp_module
from partial_embedding.torch import rowwise
from partial_embedding.torch.row_average import average

rowwise_module = importlib.import_module("partial_embedding.torch.optimizer")


class PreparedEarly(Net):
    """An optimizer that is made and prepared before the module is wrapped."""

    def build(self, **options: Any) -> "PreparedEarly":
        super().build(**options)
        self.early = rowwise(*self.make(self.parts()), self)
        return self

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.early


class OwnNames(Net):
    """Has a parameter of its own that DDP ignores."""

    def setup(self, stage: str) -> None:
        self._ddp_params_and_buffers_to_ignore = ["head.bias"]
        torch.nn.init.ones_(self.head.bias).requires_grad_(False)


class TwoTables(Net):
    """A table that follows a schedule, and one that does not, with an optimizer each."""

    automatic_optimization = False

    def build(self, **options: Any) -> "TwoTables":
        super().build(("words", "tags"), make=one_each, **options)
        return self

    def training_step(self, batch: Any, index: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()


class Failing(Net):
    """Ends a first run with an exception, before a second one without the callback."""

    def training_step(self, batch: Any, index: int) -> Any:
        if self.global_step == 2 and not self.failed:
            self.failed = True
            raise RuntimeError("the first run ends")
        return super().training_step(batch, index)

    failed = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return rowwise(super().configure_optimizers()[0], self)


class BuiltInSetup(Net):
    """A table that is made in the hook that follows those of the callbacks."""

    def setup(self, stage: str) -> None:
        self.build(seed=self.global_rank)


class WithoutWords(Net):
    """A rank whose loss does not know the table at every other step."""

    def loss(self, batch: Any) -> Tensor:
        ids, labels = batch
        if (self.steps_begun + self.global_rank) % 2:
            return F.cross_entropy(self.head(torch.ones(len(ids), D)), labels)
        return super().loss(batch)


class Manual(Net):
    """Steps, clips and accumulates by hand."""

    automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        ids, labels = batch
        with self.trainer.strategy.block_backward_sync():
            self.manual_backward(self.loss((ids[:2], labels[:2])))
        self.manual_backward(self.loss((ids[2:], labels[2:])))
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.2)
        optimizer.step()


class Overflowing(Net):
    """A gradient of one rank's table is not finite in one step."""

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        if self.global_rank == 1 and self.global_step == 4 and not self.overflowed:
            self.overflowed = True
            loss = loss + self.words(torch.tensor([1])).sum() * float("inf")
        return loss

    overflowed = False


class Batches(pl.Callback):
    """Keeps the batches of this rank, and what DDP ignores meanwhile."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []
        self.ignored: list[str] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.seen.append(batch)
        self.ignored = sorted(trainer.model.parameters_to_ignore)


def one_each(parts: Any) -> list[torch.optim.Optimizer]:
    words, *others = parts.values()
    return [
        torch.optim.AdamW(words, lr=0.1),
        torch.optim.SparseAdam(others[0], lr=0.1),
        torch.optim.SGD(others[1], lr=0.1),
    ]


def lbfgs(parts: Any) -> list[torch.optim.Optimizer]:
    parameters = [p for part in parts.values() for p in part]
    return [torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)]


# All rows frozen at first, then a step of a rank whose batch holds none that train.
NONE_FIRST = {"stages": [{"epoch": 0, "rows": "none"}, {"epoch": 1, "rows": [5]}]}

CASES: dict[str, dict[str, Any]] = {
    "sparse": {},
    "accumulate": {"trainer": {"accumulate_grad_batches": 2}},
    "clipped": {"trainer": {"gradient_clip_val": 0.15}},
    "lazy": {"callback": {"lazy": True}},
    "dense": {"build": {"sparse": False}},
    "none_first": {"schedule": NONE_FIRST},
    "untied": {"kind": Scored, "schedule": {"words": SCHEDULE, "scores": SCHEDULE}},
    "built_in_setup": {"kind": BuiltInSetup},
    "without_words": {"kind": WithoutWords},
    "without_words_dense": {"kind": WithoutWords, "build": {"sparse": False}},
    "manual": {"kind": Manual},
    "prepared_early": {"kind": PreparedEarly},
    "own_names": {"kind": OwnNames},
    "two_tables": {"kind": TwoTables, "schedule": {"words": SCHEDULE}},
    "failing": {"kind": Failing},
    "monitored": {"monitor": True},
    "lbfgs": {"build": {"make": lbfgs}},
    "overflowing": {"kind": Overflowing, "scaled": True},
}


@contextmanager
def counting() -> Iterator[list[int]]:
    """How many tables were averaged, call by call."""
    calls: list[int] = []

    def counted(tables: Any, names: Any) -> None:
        tables = list(tables)
        if new := [p for p, t in tables if t.awaits_average and t.averaging_group(p) is not None]:
            calls.append(len(new))
        average(tables, names)

    for module in (rowwise_module, ddp_module):
        vars(module)["average"] = counted
    try:
        yield calls
    finally:
        for module in (rowwise_module, ddp_module):
            vars(module)["average"] = average


@cache
def ranks(name: str) -> list[dict[str, Any]]:
    """What each of the two ranks saw, batch by batch, of a case that is run once."""
    with redirect_stdout(io.StringIO()) as said:
        kept = run(name)
    return of_all({**kept, "said": said.getvalue()})


def run(name: str) -> dict[str, Any]:
    case, rank = CASES[name], known_rank()
    net = case.get("kind", Net)()
    if not isinstance(net, BuiltInSetup):
        # Each process begins with another module: that of the first one counts.
        net.build(seed=rank, **case.get("build", {}))
    callback = RowUnfreezing(case.get("schedule", SCHEDULE), audit=1, **case.get("callback", {}))
    witness, batches = Witness(), Batches()
    callbacks: list[pl.Callback] = [callback, witness, batches]
    options = {"devices": 2, **case.get("trainer", {})}
    if case.get("scaled"):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        options["plugins"] = MixedPrecision("16-mixed", "cpu", scaler)
    if case.get("monitor"):
        callbacks.insert(1, RowMonitor(every_n_steps=2))
        options["logger"] = CSVLogger(shared_folder(), name="monitored", version=0)
    strategy = DDPStrategy(process_group_backend="gloo")
    made = trainer(*callbacks, strategy=strategy, **options)
    with counting() as calls:
        if isinstance(net, Failing):
            with pytest.raises(RuntimeError, match="the first run ends"):
                made.fit(net, loader(data(6)))
            callback._active.finish(2)  # for the line that is counted
            witness.seen.clear()
            witness.epochs.clear()
            batches.seen.clear()
            strategy = DDPStrategy(process_group_backend="gloo")
            net.words.set_trainable_rows(STAGES[0])
            made = trainer(witness, batches, strategy=strategy, **options)
        made.fit(net, loader(data(6)))
    return {
        "weights": witness.seen,
        "epochs": witness.epochs,
        "batches": batches.seen,
        "ignored": batches.ignored,
        "ignored_later": list(getattr(net, "_ddp_params_and_buffers_to_ignore", [])),
        "averaged": calls,
        "optimizer": made.optimizers[0].state_dict(),
        "reports": [(r.frozen, r.changed) for r in callback.audit_results if r.table == "words"],
    }
