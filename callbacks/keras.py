"""Keras callbacks: which rows train, from step to step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import keras

from partial_embedding.callbacks.keras_checkpoint import RowCheckpoint
from partial_embedding.callbacks.keras_monitor import RowMonitor
from partial_embedding.errors import InputError
from partial_embedding.files import write_atomically
from partial_embedding.rows.vocabulary import Vocabulary, find_vocabulary
from partial_embedding.schedule import AnySchedule, Position, schedules_by_table
from partial_embedding.schedule.messages import AuditResult
from partial_embedding.schedule.runner import Runner
from partial_embedding.tensorflow.adapter import KerasTables

__all__ = ["RowCheckpoint", "RowMonitor", "RowUnfreezing"]


class RowUnfreezing(keras.callbacks.Callback):
    """Trains the rows that a schedule names, and leaves all others as they are, bit for bit.

    Each layer that was not told which rows to reserve reserves those that its schedule will ever
    train, before the first step, so that a stage that begins traces nothing again. Compile the
    model with `rowwise(optimizer)` for rows that join late to train as if the optimizer had just
    begun, and for stages with `lr_scale` or `warmup_steps`.

    A step is one that the optimizer completed since the first epoch of the run began: accumulated
    batches are one step together, and one that a `LossScaleOptimizer` skips is none. Rows are set
    before the first batch whose step is theirs. With `steps_per_execution=n`, Keras calls between n
    batches, so that they are set up to n - 1 batches late. A plateau is of any metric of the logs,
    `val_loss` as well as `loss`, and the stage begins with the next epoch.

    A run that `BackupAndRestore` resumes at the end of an epoch goes on where the schedule stood,
    in any order of the callbacks. Pass its folder as `backup_dir` where a schedule waits for a
    metric: what was measured is kept there. It also says then what changed in a schedule since, and
    refuses one that would not have trained the same rows there.

    Keras tells callbacks nothing of each other: an `EarlyStopping` counts on from stage to stage,
    and so may end a run whose stages wait for the same metric. Put this callback
    after a `SwapEMAWeights` that swaps at epochs: rows that leave before it swapped back keep their
    averages. When `fit` ends, a line names the stages that it did not come to.

    Args:
        schedule: A `Schedule`, a mapping, or the path of a YAML file, for all tables of the model;
            or a mapping from the names of layers to these.
        vocabulary: What rows mean, for schedules that ask for it, as `Vocabulary.of` reads it: a
            list of tokens, for example. By default `model.vocabulary`.
        audit: Compare the bits of frozen rows at the end of each stage; a number n compares them
            every n optimizer steps of the run too. One comparison reads the frozen part of the
            table once.
        backup_dir: The folder of `BackupAndRestore`, for what was measured.

    Raises:
        InputError: The schedule is malformed. When `fit` starts: it does not fit the model, the
            optimizer or the backup. When an epoch ends: a metric that it waits for was not logged.

    Example:
        >>> import numpy as np
        >>> from partial_embedding.tensorflow import PartialEmbedding
        >>> model = keras.Sequential([PartialEmbedding(4, 2)])
        >>> model.compile("sgd", "mse")
        >>> unfreezing = RowUnfreezing({"stages": [{"epoch": 0, "rows": [1]}]}, audit=True)
        >>> ids, targets = np.array([[0, 1]]), np.zeros((1, 2, 2))
        >>> _ = model.fit(ids, targets, callbacks=[unfreezing], verbose=0)  # doctest: +ELLIPSIS
        embedding...: 1 of 4 rows train (2 of 8 parameters)
        embedding...: stage 0 from epoch 0: 1 rows train, 25.0 % of the table
        audit: embedding...: frozen rows by stage: 3; changed a bit: 0
    """

    # Keras hands in the model before all else.
    _tables: KerasTables

    def __init__(
        self,
        schedule: AnySchedule | Mapping[str, AnySchedule],
        *,
        vocabulary: Any = None,
        audit: bool | int = False,
        backup_dir: str | PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        self.schedules = schedules_by_table(schedule)
        self.vocabulary = None if vocabulary is None else Vocabulary.of(vocabulary)
        self.audit = audit
        self.backup_dir = backup_dir
        self._runner: Runner | None = None
        self._epoch: int | None = None
        # The steps that the optimizer had made when the first epoch of the run began.
        self._begun_at = 0
        # Where the optimizer's steps were last read, and the step at which rows may change next.
        self._read_at = (0, 0)
        self._due = 0
        # What an earlier `fit` left, for one that goes on with a later epoch.
        self._before: dict[str, Any] | None = None
        self._logs: dict[str, float] = {}

    @property
    def audit_results(self) -> list[AuditResult]:
        """What the audit found in the stages that ended."""
        return [] if self._runner is None else self._runner.audit_results

    @property
    def position(self) -> Position:
        """Where training stood when rows were set last."""
        return Position() if self._runner is None else self._runner.position

    # Before the first step

    def set_model(self, model: Any) -> None:
        """Find the tables, check every stage against them, and reserve their rows."""
        super().set_model(model)
        before, self._epoch = self._runner, None
        self._tables = KerasTables(model)
        vocabulary = find_vocabulary(self.vocabulary, model)
        self._runner = Runner(self._tables, self.schedules, vocabulary, self.audit, say=print)
        # Before any callback begins: BackupAndRestore then builds the optimizer.
        self._tables.reserve()
        self._before = None if before is None else before.state()

    def on_train_begin(self, logs: Any = None) -> None:
        """Refuse what the optimizer cannot do."""
        self._active.check_rate_scales()
        counts = any(schedule.moves_within_epochs for schedule in self.schedules.values())
        if counts and self._tables.optimizer is None:
            raise InputError(
                "stages that start at steps need the table's optimizer, which counts them. "
                "Received a model that has none. Compile it, or make the optimizer an attribute."
            )

    def _begin(self, epoch: int) -> None:
        """Go on from what was measured before the first epoch of this fit."""
        # Weights and record are two files, and a run may be stopped between writing one and the
        # other: what the record has of this epoch and later ones, the weights know nothing of.
        if self.backup_dir is not None and self._path.exists():
            self._read(epoch)
        elif epoch == 0:
            self._begun_at = self._tables.steps
        elif self._before is not None:
            self._active.restore(self._before, epoch)
        measured = self._active.evaluations
        last = measured[-1].epoch if measured else -1
        if self._active.metrics and last != epoch - 1:
            raise InputError(
                f"a schedule that waits for {self._active.metrics[0]} goes on from what was "
                f"measured before. Received: epoch {epoch} to begin with, and {last + 1} measured "
                "ones. Pass backup_dir= the folder of BackupAndRestore, and put that callback "
                "behind; or begin at epoch 0."
            )
        self._active.start(self._total_steps)

    @property
    def _total_steps(self) -> float:
        if self._batches is None:
            return math.inf
        return int(self.params["epochs"] * self._batches // self._tables.batches_of_a_step)

    @property
    def _batches(self) -> int | None:
        """The batches of an epoch, where their number is known."""
        # Keras leaves out parameters in a loop of one's own.
        return (self.params or {}).get("steps")

    @property
    def _active(self) -> Runner:
        assert self._runner is not None, "Keras calls set_model first"
        return self._runner

    # Moving with the schedule

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Set the rows of this epoch, and say so where a stage begins."""
        if self._epoch is None:
            self._begin(epoch)
        self._epoch = epoch
        self._advance(batch=0)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Set the rows of this step, where it may have others than the one before."""
        if self._most(batch) >= self._due:
            self._advance(batch)

    @property
    def _steps(self) -> int:
        """The steps of the run; waits for them."""
        return self._tables.steps - self._begun_at

    def _most(self, batches: int) -> int:
        """The most steps that so many batches make; reading them would wait for the device."""
        step, at = self._read_at
        return step + batches - at

    def _read_step(self, batches: int) -> int:
        self._read_at = (self._steps, batches)
        return self._read_at[0]

    def _advance(self, batch: int) -> None:
        assert self._epoch is not None, "Keras begins an epoch first"
        step = self._read_step(batch)
        if batch == 0 or step >= self._due:
            self._active.advance(self._epoch, step)
            self._due = self._active.next_change(
                None if self._batches is None else self._batches - batch
            )

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Audit where it is due, and keep what the last batch of an epoch logged."""
        if self._active.is_audit_due(self._most(batch + 1)):
            self._active.after_step(self._read_step(batch + 1))
        self._logs = logs or {}
        # Before another callback backs up the weights of this epoch, in any order of the two.
        if batch + 1 == self._batches:
            self._keep(self._logs)

    def on_test_end(self, logs: Any = None) -> None:
        """Keep what a validation within `fit` measured."""
        if self._epoch is not None:
            self._keep({**self._logs, **{f"val_{k}": v for k, v in (logs or {}).items()}})

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Keep what this epoch measured, and refuse to wait for a metric that is not logged."""
        logs = logs or {}
        validated = any(key.startswith("val_") for key in logs)
        # Not every epoch has a validation.
        metrics = self._active.metrics
        self._keep(logs, [m for m in metrics if validated or not m.startswith("val_")])

    def _keep(self, logs: Mapping[str, float], expected: Iterable[str] = ()) -> None:
        assert self._epoch is not None, "Keras begins an epoch first"
        before = self._active.evaluations
        self._active.observe(self._epoch, self._steps, logs, expected)
        if self.backup_dir is not None and self._active.evaluations != before:
            self._write()

    def on_train_end(self, logs: Any = None) -> None:
        """Close the last stage, and say what the audit found."""
        self._active.finish(self._steps)
        if self._epoch is None:
            return
        self._epoch = None
        for metric in self._active.metrics:
            if not any(metric in one.metrics for one in self._active.evaluations):
                self._active.refuse_unmeasured(metric, self._logs)

    # The record beside the weights of a backup

    @property
    def _path(self) -> Path:
        named = sorted(name for name in self.schedules if name is not None)
        return Path(self.backup_dir or "") / f"{'-'.join(['row_unfreezing', *named])}.json"

    def _write(self) -> None:
        """Write the record, in full or not at all."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(self._path) as temporary:
            record = {"begun_at": self._begun_at, "runner": self._active.state()}
            temporary.write_text(json.dumps(record), encoding="utf-8")

    def _read(self, epoch: int) -> None:
        """Go on from the record with an epoch."""
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            self._begun_at = kept["begun_at"]
            if epoch > 0:
                self._active.restore(kept["runner"], epoch)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self._path}: the record of a run is the JSON that RowUnfreezing writes. "
                f"Received: {' '.join(str(error).split())}. Remove the backup to begin again."
            ) from None
