"""A PyTorch Lightning callback that measures rows: how many train, and how far they went."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from partial_embedding.callbacks.lightning_base import Callback
from partial_embedding.errors import InputError
from partial_embedding.monitor.record import (
    RECORD,
    RunRecorder,
    check_amounts,
    write_record,
)
from partial_embedding.monitor.sampling import TableSample
from partial_embedding.monitor.track import RowTrack
from partial_embedding.rows.vocabulary import Ids, Vocabulary, find_vocabulary
from partial_embedding.torch.optimizer import prepared
from partial_embedding.torch.row_gradient import as_tensor, entries_of
from partial_embedding.torch.rowcopy import distinct, sum_rows
from partial_embedding.torch.rowset import RowSet
from partial_embedding.torch.shards import gathered, local, shard_of
from partial_embedding.torch.table import PartialTable, tables_in


@dataclass
class _Table:
    """One table, its sample, and what was caught of the step that is measured."""

    table: PartialTable
    sample: TableSample
    rows: RowSet | None = None
    # Tokens of the batch whose rows train, and all of them.
    tokens: tuple[int, int] = (0, 0)
    gradients: dict[int, float] = field(default_factory=dict)
    rates: dict[int, float] = field(default_factory=dict)


class RowMonitor(Callback):
    """Logs which rows of the tables train and how far they went, and keeps a record of it.

    The metrics go to every logger of the trainer, as `TABLE/trainable_rows` and so on;
    `TableSample` in `partial_embedding.monitor.sampling` lists all names. When `fit` ends, all that
    was seen is written to the run's log folder as `rows.json`, of which `partial-embedding report`
    makes a page.

    Put it after `RowUnfreezing` in the list of callbacks.

    A measurement reads a bounded sample, at most `sample` rows of each cohort and frequency band,
    and sums the gradient of one batch by cohort, so it costs a few milliseconds whatever the size
    of the table. Between measurements nothing is done. At default settings that, and
    `RowUnfreezing`, cost a few per cent of a step at V=1e5 and K=1e4 (`benchmarks/overhead.md`).

    Args:
        every_n_steps: Batches between measurements; by default the trainer's `log_every_n_steps`.
            The last batch of an epoch is measured too.
        sample: The most rows of a cohort or frequency band that are measured.
        vocabulary: The tokens of the rows and how often they occur, as `Vocabulary.of` reads it; by
            default the `vocabulary` of the datamodule or of the module.

    Raises:
        InputError: `every_n_steps` or `sample` is no whole number from 1 up. When `fit` starts:
            the module has no table.
        OSError: The record cannot be written.

    Example:
        >>> RowMonitor(every_n_steps=50).every_n_steps
        50
    """

    def __init__(
        self, *, every_n_steps: int | None = None, sample: int = 256, vocabulary: Any = None
    ) -> None:
        # None is the trainer's own number.
        check_amounts(every_n_steps=1 if every_n_steps is None else every_n_steps, sample=sample)
        self.every_n_steps = every_n_steps
        self.sample = sample
        self.vocabulary = None if vocabulary is None else Vocabulary.of(vocabulary)
        self.path: Path | None = None
        self._run = RunRecorder()
        self._tables: dict[str, _Table] = {}
        self._restored: dict[str, Any] | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._due = False
        self._folder = Path()

    @property
    def tracks(self) -> dict[str, RowTrack]:
        """What was seen so far, by the name of the table."""
        return self._run.tracks

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module that has nothing to measure."""
        if not any(tables_in(pl_module)):
            raise InputError(
                "measuring rows needs a PartialEmbedding in the model. Received a "
                f"{type(pl_module).__name__} without one. Take it for nn.Embedding, or leave out "
                "RowMonitor."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the tables, and go on where a checkpoint stood."""
        # Now, since all processes ask for the folder together.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        batches = trainer.num_training_batches
        self._run = RunRecorder(
            # -1 is Lightning's word for no end.
            None if trainer.max_epochs == -1 else trainer.max_epochs,
            None
            if batches == float("inf")
            else math.ceil(batches / trainer.accumulate_grad_batches),
            self.sample,
            find_vocabulary(self.vocabulary, getattr(trainer, "datamodule", None), pl_module),
            tree_map_only(Tensor, lambda tensor: tensor.cpu().numpy(), self._restored),
        )
        self._restored = None
        self._tables = {}
        for name, table in tables_in(pl_module):
            padding = getattr(table, "padding_idx", None)
            num_rows, new = table.leaf_weight.shape[0], table.new_rows
            sample = self._run.add_table(name, partial(_rows_of, table), num_rows, padding, new)
            self._tables[name] = _Table(table, sample)

    # Catching a step that is measured

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note which rows were unfrozen, and catch what a measured batch looks up."""
        self._due = self._looks(trainer) and self._is_due(trainer, batch_idx)
        for one in self._tables.values():
            rows = one.table.row_set
            if one.rows is not rows:
                one.rows = rows
                one.sample.note_rows(rows.mask.cpu().numpy(), self._place(trainer, batch_idx))
            if self._due:
                one.sample.before_step()
                one.tokens, one.gradients = (0, 0), {}
                # Before the step, as a scheduler may change the rate right after it.
                one.rates = _rates(trainer.optimizers, one)
                self._hooks.append(one.table.register_forward_pre_hook(partial(_count_tokens, one)))

    def _looks(self, trainer: Trainer) -> bool:
        return trainer.is_global_zero or self._share_rows()

    def _share_rows(self) -> bool:
        return any(one.table.is_sharded for one in self._tables.values())

    def _place(self, trainer: Trainer, batch: int) -> float:
        if self._run.unit == "step":
            return float(trainer.global_step)
        return trainer.current_epoch + batch / trainer.num_training_batches

    def _is_due(self, trainer: Trainer, batch_idx: int) -> bool:
        every = self.every_n_steps or getattr(trainer, "log_every_n_steps", 0) or 1
        return (batch_idx + 1) % every == 0 or batch_idx + 1 == trainer.num_training_batches

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Sum the gradients of a step that is measured, before they are clipped."""
        if not self._due:
            return
        for one in self._tables.values():
            weight = one.table.leaf_weight
            if weight.grad is not None:
                ids, squares = _row_squares(local(weight.grad))
                parts = gathered((ids + shard_of(weight).start, squares), weight)
                ids, squares = (np.concatenate(part) for part in zip(*parts, strict=True))
                one.gradients = one.sample.gradient_norms(ids, squares)

    # Measuring

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure and log."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        place = self._place(trainer, batch_idx + 1)
        numbers: dict[str, float] = {}
        for name, one in self._tables.items():
            one.sample.track.end = place
            if self._due:
                training, tokens = one.tokens
                share = training / tokens if tokens else None
                measured = one.sample.measure(place, share, one.gradients, one.rates)
                numbers |= {f"{name}/{key}": value for key, value in measured.items()}
        if numbers:
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)
        self._due = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what a validation measured."""
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics.items()
            self._run.add_score({name: float(v) for name, v in metrics if v.numel() == 1})

    # What is left behind

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record, unless there was nothing left to train."""
        if not (self._tables and self._looks(trainer)):
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it
        moving = next((one for one in callbacks if getattr(one, "schedules", None)), None)
        record = self._run.finished(moving)
        if trainer.is_global_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.path = self._folder / RECORD
            write_record(self.path, record)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write what was seen until then, unless processes share rows."""
        # Reading these takes all processes, of which others may go on.
        if not self._share_rows():
            self.on_fit_end(trainer, pl_module)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far, and where the sampled rows began."""
        # Tensors are loaded without trust in whoever wrote them, and arrays are not.
        state: dict[str, Any] = tree_map_only(np.ndarray, torch.from_numpy, self._run.to_state())
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what was seen until `fit` starts."""
        self._restored = state_dict


def _rows_of(table: PartialTable, ids: Ids) -> NDArray[np.float32]:
    """Rows as float32, wherever and at whatever precision they lie."""
    weight = table.leaf_weight
    chosen = torch.from_numpy(ids).to(weight.device)
    shard = shard_of(weight)
    read = local(weight).index_select(0, shard.own(chosen)).float().cpu().numpy()
    rows = np.zeros((len(ids), *weight.shape[1:]), np.float32)
    for there, values in gathered((shard.has(chosen).cpu().numpy(), read), weight):
        rows[there] = values
    return rows


def _count_tokens(caught: _Table, table: PartialTable, args: tuple[Tensor, ...]) -> None:
    """A hook on a table's lookups: its tokens without padding, and those whose rows train."""
    ids = args[0]
    if ids.is_floating_point():
        return  # a head is given features and no tokens
    ids = local(ids)  # of which tensor parallelism makes a copy for each process
    if table.padding_idx is not None:
        ids = ids[ids != table.padding_idx]
    training, tokens = caught.tokens
    caught.tokens = training + int(table.row_set.is_trainable(ids).sum()), tokens + ids.numel()


def _row_squares(grad: Tensor) -> tuple[Ids, NDArray[np.float64]]:
    """The rows of a gradient, each once, and the sums of their squares."""
    if (entries := entries_of(grad)) is None:
        ids, summed = torch.arange(len(grad), device="cpu"), as_tensor(grad).detach()
    else:
        ids, places = distinct(entries[0], len(grad))
        summed = sum_rows(places, entries[1].detach(), len(ids))
    return ids.cpu().numpy(), summed.double().square().sum(1).cpu().numpy()


def _rates(optimizers: list[Optimizer], caught: _Table) -> dict[int, float]:
    """The learning rate with which each cohort makes its next step."""
    weight, rows = caught.table.leaf_weight, caught.table.row_set
    for optimizer in optimizers:
        group = next(
            (g for g in optimizer.param_groups if any(p is weight for p in g["params"])), None
        )
        if group is None or "lr" not in group:
            continue
        handle = prepared(optimizer)
        served = None if handle is None else handle.tables.get(id(weight))
        rates = {}
        for number, row in caught.sample.any_row_of().items():
            theirs = next(n for n, ids in rows.cohorts.items() if bool((ids == row).any()))
            steps = served.cohorts[theirs].steps if served and theirs in served.cohorts else 0
            rate_scale = rows.rate_scales.get(theirs)
            rates[number] = float(group["lr"]) * (
                1.0 if rate_scale is None else rate_scale.factor(steps)
            )
        return rates
    return {}
