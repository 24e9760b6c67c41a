"""A PyTorch Lightning callback that watches rows: how many train, and how far they went."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from partial_embedding.files import write_atomically
from partial_embedding.monitor.figures import row_picture
from partial_embedding.monitor.record import RECORD, RowRecord, Score, planned_stages, write_record
from partial_embedding.monitor.sampling import TableWatch
from partial_embedding.monitor.track import RowTrack
from partial_embedding.rows.vocabulary import Ids, Vocabulary
from partial_embedding.torch.optimizer import prepared
from partial_embedding.torch.rowset import RowSet
from partial_embedding.torch.table import PartialTable, tables_in


@dataclass
class _Watched:
    """One table, what watches it, and what was caught of the step that is measured."""

    table: PartialTable
    watch: TableWatch
    rows: RowSet | None = None
    # Tokens of the batch whose rows train, and all of them.
    tokens: tuple[int, int] = (0, 0)
    gradients: dict[int, float] = field(default_factory=dict)
    rates: dict[int, float] = field(default_factory=dict)


class RowMonitor(Callback):
    """Logs which rows of the tables train and how far they went, and draws a picture of it.

    The metrics go to every logger of the trainer, as `TABLE/rows_awake` and so on; `TableWatch` in
    `partial_embedding.monitor.sampling` lists all names. When `fit` ends, all that was seen is
    written to the run's log folder as `rows.json`, of which `partial-embedding report` makes a
    page.

    Put it after `RowUnfreezing` in the list of callbacks.

    A measurement reads a bounded sample, at most `sample` rows of each cohort and frequency band,
    and sums the gradient of one batch by cohort, so it costs a few milliseconds whatever the size
    of the table. Between measurements nothing is done. At default settings that, and
    `RowUnfreezing`, cost less than 3 % of a step at V=1e5 and K=1e4 (`benchmarks/overhead.md`).

    Args:
        every_n_steps: Batches between measurements; by default the trainer's `log_every_n_steps`.
            The last batch of an epoch is measured too.
        sample: The most rows of a cohort or frequency band that are measured.
        picture: The format of the picture that is drawn when `fit` ends, as `rows.png` in the run's
            log folder (`rows-NAME.png` where there are several tables); None draws nothing.
        vocabulary: The tokens of the rows and how often they occur; by default the `vocabulary` of
            the datamodule or of the module.

    Raises:
        OSError: The picture or the record cannot be written.

    Example:
        >>> RowMonitor(every_n_steps=50).every_n_steps
        50
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        sample: int = 256,
        picture: Literal["png", "svg", "pdf"] | None = "png",
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.sample = sample
        self.picture = picture
        self.vocabulary = vocabulary
        self.path: Path | None = None
        self.record = RowRecord()
        self._watched: dict[str, _Watched] = {}
        self._restored: dict[str, Any] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._due = False
        self._folder = Path()

    @property
    def tracks(self) -> dict[str, RowTrack]:
        """What was seen so far, by the name of the table."""
        return {name: watched.watch.track for name, watched in self._watched.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the tables, and go on where a checkpoint stood."""
        # Now, since all processes ask for the folder together.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        vocabulary = self._find_vocabulary(trainer, pl_module)
        unit = "step" if trainer.num_training_batches == float("inf") else "epoch"
        self._watched = {}
        for name, table in tables_in(pl_module):
            watch = TableWatch(
                _Reader(table),
                table.weight.shape[0],
                unit,
                self.sample,
                vocabulary,
                getattr(table, "padding_idx", None),
            )
            if (saved := self._restored.get("tables", {}).get(name)) is not None:
                watch.restore(_as_arrays(saved))
            self._watched[name] = _Watched(table, watch)
        self.record = RowRecord(self.tracks)
        if unit == "epoch":
            self.record.length = _epochs(trainer)
            self.record.epoch_steps = trainer.num_training_batches / trainer.accumulate_grad_batches
        self.record.scores = [Score(**score) for score in self._restored.get("scores", [])]
        self._restored = {}

    def _find_vocabulary(self, trainer: Trainer, pl_module: LightningModule) -> Vocabulary | None:
        owners = (self, getattr(trainer, "datamodule", None), pl_module)
        found = (getattr(owner, "vocabulary", None) for owner in owners)
        return next((one for one in found if isinstance(one, Vocabulary)), None)

    # Catching a step that is measured

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note which rows were unfrozen, and listen to a batch that is measured."""
        self._due = trainer.is_global_zero and self._is_due(trainer, batch_idx)
        for watched in self._watched.values():
            rows = watched.table.row_set
            if watched.rows is not rows:
                watched.rows = rows
                place = _place(trainer, watched.watch.track, batch_idx)
                watched.watch.note_rows(rows.mask.cpu().numpy(), place)
            if self._due:
                watched.watch.before_step()
                watched.tokens, watched.gradients = (0, 0), {}
                # Before the step, as a scheduler may change the rate right after it.
                watched.rates = _rates(trainer.optimizers, watched)
                hook = watched.table.register_forward_pre_hook(_TokenCount(watched))
                self._hooks.append(hook)

    def _is_due(self, trainer: Trainer, batch_idx: int) -> bool:
        every = self.every_n_steps or getattr(trainer, "log_every_n_steps", 0) or 1
        return (batch_idx + 1) % every == 0 or batch_idx + 1 == trainer.num_training_batches

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Sum the gradients of a step that is measured, before they are clipped."""
        if not self._due:
            return
        for watched in self._watched.values():
            grad = watched.table.weight.grad
            if grad is not None:
                ids, squares = _row_squares(grad)
                watched.gradients = watched.watch.gradient_norms(ids, squares)

    # Measuring

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure and log."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for name, watched in self._watched.items():
            place = _place(trainer, watched.watch.track, batch_idx + 1)
            watched.watch.track.end = place
            if self._due:
                self._measure(trainer, name, watched, place)
        self._due = False

    def _measure(self, trainer: Trainer, name: str, watched: _Watched, place: float) -> None:
        training, tokens = watched.tokens
        share = training / tokens if tokens else None
        numbers = watched.watch.measure(place, share, watched.gradients, watched.rates)
        metrics = {f"{name}/{key}": value for key, value in numbers.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what a validation measured."""
        if trainer.sanity_checking or not self._watched:
            return
        track = next(iter(self.tracks.values()))
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if value.numel() == 1
        }
        self.record.tables = self.tracks
        self.record.add_score(track.end, metrics)

    # What is left behind

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record and draw the picture, unless there was nothing left to train."""
        if self._watched:
            self._finish(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write what was seen until then."""
        if self._watched:
            self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it
            self._take_over(callback)
        self.record.tables = {name: w.watch.finish() for name, w in self._watched.items()}
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        write_record(folder / RECORD, self.record)
        if self.picture is None:
            return
        for name, track in self.tracks.items():
            which = f"-{name}" if len(self._watched) > 1 else ""
            path = folder / f"rows{which}.{self.picture}"
            with write_atomically(path) as temporary:
                row_picture(track).savefig(temporary)
            self.path = path

    def _take_over(self, callback: Callback) -> None:
        """Keep the plan and the audit of a callback that moves rows along schedules."""
        schedules = getattr(callback, "schedules", None)
        if not schedules:
            return
        for name, watched in self._watched.items():
            if (schedule := schedules.get(name, schedules.get(None))) is not None:
                vocabulary = getattr(callback, "vocabulary", None) or watched.watch.vocabulary
                self.record.plans[name] = planned_stages(
                    schedule,
                    watched.table.weight.shape[0],
                    vocabulary,
                    getattr(watched.table, "padding_idx", None),
                )
        self.record.audit = list(getattr(callback, "reports", []))

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far, and where the sampled rows began."""
        tables = {name: _as_tensors(w.watch.to_state()) for name, w in self._watched.items()}
        return {"tables": tables, "scores": self.record.to_state()["scores"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what was seen until `fit` starts.

        Args:
            state_dict: What `state_dict` gave.
        """
        self._restored = state_dict


class _Reader:
    """Reads rows of a table as float32 arrays, wherever and at whatever precision they lie."""

    def __init__(self, table: PartialTable) -> None:
        self.table = table

    def __call__(self, ids: Ids) -> NDArray[np.float32]:
        weight = self.table.weight.detach()
        chosen = torch.from_numpy(ids).to(weight.device)
        rows: NDArray[np.float32] = weight.index_select(0, chosen).float().cpu().numpy()
        return rows


class _TokenCount:
    """A hook on a table's lookups: its tokens without padding, and those whose rows train."""

    def __init__(self, watched: _Watched) -> None:
        self.watched = watched

    def __call__(self, table: PartialTable, args: tuple[Tensor, ...]) -> None:
        ids = args[0]
        if ids.is_floating_point():
            return  # a head is given features and no tokens
        if table.padding_idx is not None:
            ids = ids[ids != table.padding_idx]
        training, tokens = self.watched.tokens
        training += int(table.row_set.is_trainable(ids).sum())
        self.watched.tokens = training, tokens + ids.numel()


def _epochs(trainer: Trainer) -> int | None:
    """The epochs that the trainer means to run, if it knows."""
    known = trainer.max_epochs is not None and trainer.max_epochs >= 0
    return trainer.max_epochs if known else None


def _place(trainer: Trainer, track: RowTrack, batch: int) -> float:
    if track.unit == "step":
        return float(trainer.global_step)
    return trainer.current_epoch + batch / trainer.num_training_batches


def _row_squares(grad: Tensor) -> tuple[Ids, NDArray[np.float64]]:
    """The rows of a gradient, each once, and the sums of their squares."""
    values = grad.detach()
    if grad.layout == torch.sparse_coo:
        # Summed here, as coalescing would sort the ids of a gradient that others still use.
        ids, place = torch.unique(values._indices()[0], return_inverse=True)
        summed = values._values().new_zeros(len(ids), values.shape[1])
        summed.index_add_(0, place, values._values())
    else:
        ids, summed = torch.arange(len(values)), values
    return ids.cpu().numpy(), summed.double().square().sum(1).cpu().numpy()


def _rates(optimizers: list[Optimizer], watched: _Watched) -> dict[int, float]:
    """The learning rate with which each cohort makes its next step."""
    weight, rows = watched.table.weight, watched.table.row_set
    for optimizer in optimizers:
        group = next(
            (g for g in optimizer.param_groups if any(p is weight for p in g["params"])), None
        )
        if group is None or "lr" not in group:
            continue
        handle = prepared(optimizer)
        served = None if handle is None else handle.tables.get(id(weight))
        rates = {}
        for number, row in watched.watch.any_row_of().items():
            theirs = next(n for n, ids in rows.cohorts.items() if bool((ids == row).any()))
            steps = served.cohorts[theirs].steps if served and theirs in served.cohorts else 0
            rate_scale = rows.rate_scales.get(theirs)
            rates[number] = float(group["lr"]) * (
                1.0 if rate_scale is None else rate_scale.factor(steps)
            )
        return rates
    return {}


def _as_tensors(state: Any) -> Any:
    """The same with tensors for arrays, which checkpoints load without trusting their writer."""
    return _converted(state, np.ndarray, torch.from_numpy)


def _as_arrays(state: Any) -> Any:
    return _converted(state, Tensor, lambda tensor: tensor.cpu().numpy())


def _converted(state: Any, kind: type, convert: Any) -> Any:
    if isinstance(state, kind):
        return convert(state)
    if isinstance(state, dict):
        return {key: _converted(value, kind, convert) for key, value in state.items()}
    if isinstance(state, tuple):
        return tuple(_converted(value, kind, convert) for value in state)
    return state
