"""Keras callbacks: which rows train, epoch by epoch."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from partial_embedding.errors import InputError
from partial_embedding.report import StageReport, audit_line, place_text, stage_line, table_line
from partial_embedding.schedule import Position, Schedule, schedules_by_table
from partial_embedding.tensorflow.audit import FrozenRowAudit
from partial_embedding.tensorflow.embedding import PartialEmbedding
from partial_embedding.vocabulary import Ids, Vocabulary

AnySchedule = Schedule | Mapping[str, Any] | str | PathLike[str]


class RowUnfreezing(keras.callbacks.Callback):
    """Trains the rows that a schedule names, and leaves all others as they are, bit for bit.

    Each layer reserves the rows that its schedule will ever train, `schedule_rows(…)`, so that a
    stage that begins traces nothing again. The rows of an epoch depend on the epoch alone: a run
    that `BackupAndRestore` resumes goes on where the schedule stood, in any order of the callbacks.
    Compile the model with `rowwise(optimizer)` for rows that join late to train as if the optimizer
    had just begun.

    Args:
        schedule: A `Schedule`, a mapping, or the path of a YAML file, for all tables of the model;
            or a mapping from the names of layers to these.
        vocabulary: What rows mean, for schedules that ask for it; by default `model.vocabulary`.
        audit: Compare the bits of frozen rows at the end of each stage; a number n compares them
            every n batches too. One comparison reads the frozen part of the table once.

    Raises:
        InputError: The schedule is malformed. When `fit` starts: it does not fit the model.

    Example:
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
    ) -> None:
        super().__init__()
        self.schedules = schedules_by_table(schedule)
        self.vocabulary = vocabulary
        self.audit = audit
        self.reports: list[StageReport] = []
        self._tables: dict[str, PartialEmbedding] = {}
        self._stages: dict[str, int] = {}
        self._audits: dict[str, FrozenRowAudit] = {}

    def on_train_begin(self, logs: Any = None) -> None:
        """Find the tables, and check every stage against them."""
        self._tables = self._scheduled_tables()
        if self.vocabulary is None:
            found = getattr(self.model, "vocabulary", None)
            self.vocabulary = found if isinstance(found, Vocabulary) else None
        self.reports, self._stages, self._audits = [], {}, {}
        for name, layer in self._tables.items():
            for index in range(len(self._schedule(name).stages)):
                self._resolve(name, layer, index)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Apply the rows of this epoch, and say so where a stage begins."""
        is_first = not self._stages
        for name, layer in self._tables.items():
            stage = self._schedule(name).stage_at(Position(epoch))
            if self._stages.get(name) == stage:
                continue
            self._close_stage(name)
            ids = self._resolve(name, layer, stage)
            layer.set_trainable_rows(ids)
            self._stages[name] = stage
            if self.audit:
                self._audits[name] = FrozenRowAudit(layer, name)
            if is_first:
                self._print_table(name, layer)
            place = place_text(self._schedule(name), Position(epoch))
            print(stage_line(name, place, ids, layer.input_dim, self.vocabulary))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Audit where it is due."""
        # `True` is 1 for Python, but asks for no audit between stages.
        if self.audit is not True and self.audit and (batch + 1) % self.audit == 0:
            for audit in self._audits.values():
                audit.check(self._step())

    def on_train_end(self, logs: Any = None) -> None:
        """Close the last stage, and say what the audit found."""
        for name in self._tables:
            self._close_stage(name)
        if self.reports:
            print(audit_line(self.reports))

    def _scheduled_tables(self) -> dict[str, PartialEmbedding]:
        tables = tables_in(self.model)
        if not tables:
            raise InputError(
                "RowUnfreezing needs a PartialEmbedding in the model. Received a "
                f"{type(self.model).__name__} without one. Replace its Embedding, for example by "
                "PartialEmbedding.from_layer."
            )
        if None in self.schedules:
            return tables
        if unknown := [name for name in self.schedules if name not in tables]:
            raise InputError(
                f"schedules are named after the model's tables, {sorted(tables)}. "
                f"Received: {unknown[0]!r}."
            )
        return {name: tables[name] for name in self.schedules if name is not None}

    def _resolve(self, name: str, layer: PartialEmbedding, index: int) -> Ids:
        try:
            rows = self._schedule(name).stages[index].rows
            ids = rows.resolve(layer.input_dim, self.vocabulary)
            return layer.check_trainable_rows(ids)
        except InputError as error:
            raise InputError(f"{name}: stages[{index}].rows: {error}") from None

    def _schedule(self, name: str) -> Schedule:
        return self.schedules[name if name in self.schedules else None]

    def _close_stage(self, name: str) -> None:
        if (audit := self._audits.pop(name, None)) is not None:
            audit.check(self._step())
            self.reports.append(StageReport(name, self._stages[name], audit.frozen.size, 0))

    def _print_table(self, name: str, layer: PartialEmbedding) -> None:
        own = {id(v) for table in self._tables.values() for v in table.trainable_variables}
        elsewhere = sum(
            int(np.prod(v.shape)) for v in self.model.trainable_variables if id(v) not in own
        )
        trainable = layer.trainable_rows.size
        print(table_line(name, trainable, layer.input_dim, layer.output_dim, elsewhere))

    def _step(self) -> int:
        return int(self.model.optimizer.iterations)


class RowMonitor(keras.callbacks.Callback):
    """Writes for TensorBoard how many rows train, and how far they have moved since `fit` began.

    Args:
        log_dir: The folder of the logs.

    Example:
        >>> RowMonitor("logs").log_dir
        'logs'
    """

    def __init__(self, log_dir: str | PathLike[str]) -> None:
        super().__init__()
        self.log_dir = fspath(log_dir)
        self._writer: Any = None
        self._before: dict[str, Any] = {}

    def on_train_begin(self, logs: Any = None) -> None:
        """Remember the rows that may move."""
        self._writer = tf.summary.create_file_writer(self.log_dir)
        self._before = {
            name: layer.rows(layer.reserved_rows) for name, layer in tables_in(self.model).items()
        }

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Write the numbers of this epoch."""
        with self._writer.as_default(step=epoch):
            for name, layer in tables_in(self.model).items():
                moved = tf.cast(layer.rows(layer.reserved_rows) - self._before[name], "float32")
                live = np.isin(layer.reserved_rows, layer.trainable_rows)
                tf.summary.scalar(f"{name}/trainable_rows", live.sum())
                tf.summary.scalar(f"{name}/trainable_share", live.sum() / layer.input_dim)
                if live.any():
                    distance = tf.reduce_mean(tf.norm(moved[live], axis=1))
                    tf.summary.scalar(f"{name}/mean_distance_moved", distance)

    def on_train_end(self, logs: Any = None) -> None:
        """Close the log."""
        self._writer.close()


def tables_in(model: Any) -> dict[str, PartialEmbedding]:
    """The partial tables of a model by the names of their layers, built.

    Args:
        model: A `keras.Model` of any kind and nesting.

    Raises:
        InputError: Two of them have the same name.

    Example:
        >>> list(tables_in(keras.Sequential([PartialEmbedding(3, 2, name="words")])))
        ['words']
    """
    tables: dict[str, PartialEmbedding] = {}
    for layer in model._flatten_layers():
        if not isinstance(layer, PartialEmbedding):
            continue
        if layer.name in tables:
            raise InputError(
                f"each table of a model has a name of its own. Received {layer.name!r} twice. "
                "Pass name= to the layers."
            )
        # Keras builds a model without a fixed input only while it traces the first step.
        layer.build()
        tables[layer.name] = layer
    return tables
