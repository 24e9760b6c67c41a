"""Keras callbacks: which rows train, from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import keras

from partial_embedding.callbacks.keras_monitor import RowMonitor
from partial_embedding.callbacks.keras_record import Epoch, RunRecord
from partial_embedding.errors import InputError
from partial_embedding.rows.vocabulary import Vocabulary
from partial_embedding.schedule import AnySchedule, Evaluation, Position, schedules_by_table
from partial_embedding.schedule.messages import StageReport
from partial_embedding.tensorflow.adapter import ScheduledTables, innermost

__all__ = ["RowMonitor", "RowUnfreezing"]


class RowUnfreezing(keras.callbacks.Callback):
    """Trains the rows that a schedule names, and leaves all others as they are, bit for bit.

    Each layer reserves the rows that its schedule will ever train, `schedule_rows(…)`, so that a
    stage that begins traces nothing again. Compile the model with `rowwise(optimizer)` for rows
    that join late to train as if the optimizer had just begun, and with `rowwise(optimizer,
    rate_scales=True)` for stages with `lr` or `warmup`.

    A step is one that the optimizer completed since the first epoch of the run began: accumulated
    batches are one step together, and one that a `LossScaleOptimizer` skips is none. Rows are set
    before the first batch whose step is theirs. With `steps_per_execution=n`, Keras calls between n
    batches, so that they are set up to n - 1 batches late. A plateau is of any metric of the logs,
    `val_loss` as well as `loss`, and the stage begins with the next epoch.

    A run that `BackupAndRestore` resumes at the end of an epoch goes on where the schedule stood,
    in any order of the callbacks. Pass its folder as `backup_dir` where a schedule waits for a
    metric: what was measured is kept there, cut to the epoch of the weights. It also says then what
    changed in a schedule since, and refuses one that would not have trained the same rows there.

    Args:
        schedule: A `Schedule`, a mapping, or the path of a YAML file, for all tables of the model;
            or a mapping from the names of layers to these.
        vocabulary: What rows mean, for schedules that ask for it; by default `model.vocabulary`.
        audit: Compare the bits of frozen rows whenever others begin to train; a number n compares
            them every n batches too. One comparison reads the frozen part of the table once.
        backup_dir: The folder of `BackupAndRestore`, for what was measured.

    Raises:
        InputError: The schedule is malformed. When `fit` starts: it does not fit the model, the
            optimizer or the backup. When an epoch ends: a metric that it waits for was not logged.

    Example:
        >>> import numpy as np
        >>> from partial_embedding.tensorflow import PartialEmbedding
        >>> layer = PartialEmbedding(4, 2, trainable_rows=[1], reserve_rows="all")
        >>> model = keras.Sequential([layer])
        >>> model.compile("sgd", "mse")
        >>> unfreezing = RowUnfreezing({"stages": [{"epoch": 0, "rows": [1]}]}, audit=True)
        >>> ids, targets = np.array([[0, 1]]), np.zeros((1, 2, 2))
        >>> _ = model.fit(ids, targets, callbacks=[unfreezing], verbose=0)  # doctest: +ELLIPSIS
        embedding...: 1 of 4 rows train (2 of 8 parameters), 0 parameters elsewhere
        embedding...: stage 0 from epoch 0: 1 rows train, 25.0 % of the table
        audit: embedding...: frozen rows by stage: 3; changed a bit: 0
    """

    def __init__(
        self,
        schedule: AnySchedule | Mapping[str, AnySchedule],
        vocabulary: Vocabulary | None = None,
        audit: bool | int = False,
        backup_dir: str | PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        self.schedules = schedules_by_table(schedule)
        self.vocabulary = vocabulary
        self.audit = audit
        self.backup_dir = backup_dir
        self.position = Position()
        self._tables: ScheduledTables | None = None
        self._record = RunRecord()
        self._epoch: int | None = None
        # Where the optimizer's steps were last read, and the step at which rows may change next.
        self._read_at = (0, 0)
        self._due = 0
        self._audited_batch = 0
        self._logs: dict[str, float] = {}

    @property
    def reports(self) -> list[StageReport]:
        """What the audit found in the stages that ended."""
        return [] if self._tables is None else self._tables.reports

    # Before the first step

    def on_train_begin(self, logs: Any = None) -> None:
        """Find the tables, and check every stage against them."""
        vocabulary = self.vocabulary
        if vocabulary is None:
            found = getattr(self.model, "vocabulary", None)
            vocabulary = found if isinstance(found, Vocabulary) else None
        self._epoch = None
        self._tables = ScheduledTables(
            self.model, self.schedules, vocabulary, bool(self.audit), say=print
        )
        if self._total_steps is None and any("share" in s.units for s in self.schedules.values()):
            raise InputError(
                "a stage that starts at a share of the run needs its length. Received data of "
                "unknown length. Pass steps_per_epoch= to fit, or use epoch or step."
            )

    @property
    def _total_steps(self) -> int | None:
        if self._batches is None:
            return None
        accumulated = innermost(self.model.optimizer).gradient_accumulation_steps or 1
        return int(self.params["epochs"] * self._batches // accumulated)

    @property
    def _batches(self) -> int | None:
        """The batches of an epoch, where their number is known."""
        # Keras leaves out parameters in a loop of one's own.
        return (self.params or {}).get("steps")

    def _begin(self, epoch: int) -> None:
        """Go on from what was measured before the first epoch of this fit."""
        saved = RunRecord.read(self._path) if self.backup_dir is not None else None
        if saved is not None:
            self._record = saved
        elif epoch == 0:
            self._record = RunRecord(begun_at=int(self.model.optimizer.iterations.numpy()))
        before = self._record.until(epoch)
        self._check_measured(epoch, before)
        if saved is not None and before.epochs:
            saved_schedules = before.schedules or {}
            self._scheduled.go_on(saved_schedules, before.last_position, self._total_steps)
        self._record = replace(before, total_steps=self._total_steps, schedules=self.schedules)

    def _check_measured(self, epoch: int, record: RunRecord) -> None:
        waits = self._scheduled.metrics
        last = record.epochs[-1].evaluation.epoch if record.epochs else -1
        if not waits or last == epoch - 1:
            return
        raise InputError(
            f"a schedule that waits for {waits[0]} goes on from what was measured before. "
            f"Received: epoch {epoch} to begin with, and {last + 1} measured ones. Pass backup_dir="
            " the folder of BackupAndRestore, and put that callback behind; or begin at epoch 0."
        )

    @property
    def _path(self) -> Path:
        return Path(self.backup_dir or "") / "rows.json"

    @property
    def _scheduled(self) -> ScheduledTables:
        assert self._tables is not None, "Keras calls on_train_begin first"
        return self._tables

    # Moving with the schedule

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Set the rows of this epoch, and say so where a stage begins."""
        if self._epoch is None:
            self._begin(epoch)
        self._epoch, self._audited_batch = epoch, 0
        step = self._step()
        self._read_at = (step, 0)
        self._move_to(step, batch=0)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Set the rows of this step, where it may have others than the one before."""
        # Batches bound the steps, and are known without waiting for the device.
        step, at = self._read_at
        if step + batch - at < self._due:
            return
        step = self._step()
        self._read_at = (step, batch)
        if step >= self._due:
            self._move_to(step, batch)

    def _move_to(self, step: int, batch: int) -> None:
        assert self._epoch is not None, "Keras begins an epoch first"
        position = Position(self._epoch, step, self._total_steps, self._record.evaluations)
        self._scheduled.move_to(position)
        self.position = position
        left = None if self._batches is None else self._batches - batch
        self._due = self._scheduled.next_change(position, left)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Audit where it is due, and keep what the last batch of an epoch logged."""
        # `True` is 1 for Python, but asks for no audit between stages.
        if self.audit is not True and self.audit and batch + 1 - self._audited_batch >= self.audit:
            self._audited_batch = batch + 1
            self._scheduled.audit_now(self._step())
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
        self._keep(logs)
        validated = any(key.startswith("val_") for key in logs)
        for metric in self._scheduled.metrics:
            # Not every epoch has a validation.
            if metric not in logs and (validated or not metric.startswith("val_")):
                raise self._not_logged(metric)

    def _keep(self, logs: Mapping[str, float]) -> None:
        assert self._epoch is not None, "Keras begins an epoch first"
        metrics = {key: float(value) for key, value in logs.items()}
        epoch = Epoch(Evaluation(self._epoch, self._step(), metrics), self.position.step)
        record = self._record.ended(epoch)
        if record != self._record:
            self._record = record
            if self.backup_dir is not None:
                record.write(self._path)

    def on_train_end(self, logs: Any = None) -> None:
        """Close the last stage, and say what the audit found."""
        self._scheduled.finish(self._step())
        if self._epoch is None:
            return
        self._epoch = None
        for metric in self._scheduled.metrics:
            if not any(metric in seen.metrics for seen in self._record.evaluations):
                raise self._not_logged(metric)

    def _not_logged(self, metric: str) -> InputError:
        logged = sorted({key for seen in self._record.evaluations for key in seen.metrics})
        return InputError(
            f"a stage waits for a metric that an epoch logs, {metric!r}. Received: {logged}. Pass "
            "validation_data= to fit and metrics= to compile, or name another one."
        )

    def _step(self) -> int:
        return int(self.model.optimizer.iterations.numpy()) - self._record.begun_at
