"""A Keras callback that measures rows: how many train, and how far they went."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.optimizers import MultiOptimizer
from numpy.typing import NDArray

from partial_embedding.errors import InputError
from partial_embedding.monitor.record import (
    RECORD,
    Moving,
    RunRecorder,
    check_amounts,
    write_record,
)
from partial_embedding.monitor.sampling import TableSample
from partial_embedding.monitor.track import RowTrack
from partial_embedding.rows.vocabulary import Ids, Vocabulary, find_vocabulary
from partial_embedding.tensorflow.adapter import innermost
from partial_embedding.tensorflow.embedding import PartialEmbedding
from partial_embedding.tensorflow.models import tables_for
from partial_embedding.tensorflow.optimizer import optimizer_of, optimizers_in
from partial_embedding.tensorflow.row_optimizer import Rowwise


@dataclass
class _Table:
    """One layer, its sample, the rows that trained last, and the rates of cohorts."""

    layer: PartialEmbedding
    sample: TableSample
    rows: Ids | None = None
    # The layer's `times_set` when they were read.
    times_set: int = -1
    rates: dict[int, float] = field(default_factory=dict)


class RowMonitor(keras.callbacks.Callback):
    """Writes for TensorBoard which rows of the tables train and how far they went.

    The metrics are those of the Lightning callback, under the same names, as
    `LAYER/trainable_rows` and so on; `TableSample` in `partial_embedding.monitor.sampling` lists
    them. When `fit` ends, all that was seen is written to the same folder as `rows.json`, of which
    `partial-embedding report` makes a page. A run that is resumed is measured from there on.

    Keras shows callbacks neither batches nor gradients. So there is no `tokens_that_train`, and the
    `gradient_norm` comes from the optimizer where `rowwise` made it: of gradients that are
    unscaled, averaged over accumulated batches and not yet clipped, in the last step of the
    batches that Keras makes at once. A model that `fit` has trained before is traced anew once.

    Put it after `RowUnfreezing` in the list of callbacks.

    A measurement reads a bounded sample, at most `sample` rows of each cohort and frequency band,
    whatever the size of the table, and sums the gradient of one step by row. Between measurements,
    a step asks whether it is measured, and does no more.

    Args:
        log_dir: The folder of the logs.
        every_n_steps: Batches between measurements. The last batch of an epoch is measured too.
        sample: The most rows of a cohort or frequency band that are measured.
        vocabulary: The tokens of the rows and how often they occur, as `Vocabulary.of` reads it; by
            default `model.vocabulary`.
        unfreezing: The `RowUnfreezing` of the run, whose plan and audit the record then holds;
            Keras shows callbacks no others.

    Raises:
        InputError: `every_n_steps` or `sample` is no whole number from 1 up, or `unfreezing` is no
            such callback. When `fit` starts: `log_dir` is a file, or the model has no table.
        OSError: The record cannot be written.

    Example:
        >>> RowMonitor("logs").log_dir
        'logs'
    """

    def __init__(
        self,
        log_dir: str | PathLike[str],
        *,
        every_n_steps: int = 50,
        sample: int = 256,
        vocabulary: Any = None,
        unfreezing: Moving | None = None,
    ) -> None:
        super().__init__()
        check_amounts(every_n_steps=every_n_steps, sample=sample)
        # Its class is in the module that imports this one.
        if unfreezing is not None and not hasattr(unfreezing, "audit_results"):
            raise InputError(
                "unfreezing is the RowUnfreezing of the run. Received a "
                f"{type(unfreezing).__name__}. Pass the callback itself."
            )
        self.log_dir = fspath(log_dir)
        self.every_n_steps = every_n_steps
        self.sample = sample
        self.vocabulary = None if vocabulary is None else Vocabulary.of(vocabulary)
        self.unfreezing = unfreezing
        self._run = RunRecorder()
        self._tables: dict[str, _Table] = {}
        self._writer: Any = None
        self._measuring: list[Rowwise] = []
        self._epoch = 0
        self._due = False

    @property
    def tracks(self) -> dict[str, RowTrack]:
        """What was seen so far, by the name of the layer."""
        return self._run.tracks

    def on_train_begin(self, logs: Any = None) -> None:
        """Look at the tables."""
        if (folder := Path(self.log_dir)).exists() and not folder.is_dir():
            raise InputError(f"log_dir is a folder. Received: {folder}, a file. Name another.")
        tables = tables_for("measuring rows", self.model)
        batches = self.params.get("steps")
        optimizer = innermost(getattr(self.model, "optimizer", None))  # none in a loop of one's own
        accumulated = getattr(optimizer, "gradient_accumulation_steps", None) or 1
        self._run = RunRecorder(
            self.params.get("epochs"),
            None if batches is None else math.ceil(batches / accumulated),
            self.sample,
            find_vocabulary(self.vocabulary, self.model),
        )
        self._writer = tf.summary.create_file_writer(self.log_dir)
        self._tables = {}
        for name, layer in tables.items():
            padding = 0 if layer.freeze_padding else None
            rows = partial(_rows_of, layer)
            sample = self._run.add_table(name, rows, layer.input_dim, padding, layer.new_rows)
            self._tables[name] = _Table(layer, sample)
        if isinstance(optimizer, MultiOptimizer) and self.model.built:
            self.model.optimizer.build(self.model.trainable_variables)  # with those of tables
        self._measuring = [one for one in optimizers_in(self.model) if isinstance(one, Rowwise)]
        # What measures is part of a step that is traced from now on.
        if not all(optimizer.is_measurable for optimizer in self._measuring):
            self.model.make_train_function(force=True)
        self._measure(False)

    def _measure(self, measure: bool) -> None:
        for optimizer in self._measuring:
            optimizer.measure_gradients(measure)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Know where training stands."""
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Note which rows were unfrozen, and what rows hold before a step that is measured."""
        self._due = self._is_due(batch)
        if self._due:
            self._measure(True)
        for one in self._tables.values():
            # Weights that are set from outside may change rows too, which is seen when it is due.
            if self._due or one.times_set != one.layer.times_set:
                self._note_rows(one, self._place(batch))
            if self._due:
                one.sample.before_step()
                optimizer = self._optimizer_of(one)
                one.rates = {} if optimizer is None else _rates(optimizer, one)

    def _note_rows(self, one: _Table, place: float) -> None:
        one.times_set, rows = one.layer.times_set, one.layer.trainable_rows
        if one.rows is None or not np.array_equal(one.rows, rows):
            one.rows = rows
            trainable = np.zeros(one.layer.input_dim, np.bool_)
            trainable[rows] = True
            one.sample.note_rows(trainable, place)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Measure and log."""
        place = self._place(batch + 1)
        for name, one in self._tables.items():
            one.sample.track.end = place
            if self._due:
                numbers = one.sample.measure(place, None, self._gradient_norms(one), one.rates)
                with self._writer.as_default(step=self._steps(one)):
                    for key, value in numbers.items():
                        tf.summary.scalar(f"{name}/{key}", value)
        if self._due:
            self._measure(False)

    def _gradient_norms(self, one: _Table) -> dict[int, float] | None:
        measured = (optimizer.row_squares(one.layer) for optimizer in self._measuring)
        squares = next((found for found in measured if found is not None), None)
        return None if squares is None else one.sample.gradient_norms(*squares)

    def _optimizer_of(self, one: _Table) -> Any:
        """What steps a table; None where one of several will, and none did yet."""
        known = optimizer_of(self.model, one.layer.rows_variable)
        optimizers = list(optimizers_in(self.model))
        return optimizers[0] if known is None and len(optimizers) == 1 else known

    def _steps(self, one: _Table) -> int:
        optimizer = self._optimizer_of(one)
        return 0 if optimizer is None else int(optimizer.iterations.numpy())

    def _is_due(self, batch: int) -> bool:
        """Whether a batch is measured among those that this one begins."""
        end, steps = batch + self.model.steps_per_execution, self.params.get("steps")
        if steps is not None and end >= steps:
            return True
        return bool(end // self.every_n_steps > batch // self.every_n_steps)

    def _place(self, batch: int) -> float:
        if self._run.unit == "step":
            return float(max(map(self._steps, self._tables.values()), default=0))
        return float(self._epoch + batch / self.params["steps"])

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Keep what the epoch measured."""
        self._run.add_score(dict(logs or {}))

    def on_train_end(self, logs: Any = None) -> None:
        """Write the record, and close the log."""
        self._writer.close()
        folder = Path(self.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_record(folder / RECORD, self._run.finished(self.unfreezing))


def _rates(optimizer: Any, one: _Table) -> dict[int, float]:
    """The learning rate with which each cohort makes its next step."""
    # Under a distribution strategy, what Keras gives is no number.
    rate = float(tf.convert_to_tensor(optimizer.learning_rate))
    rows = one.sample.any_row_of()
    state = one.layer.table_state
    if state is None or state.optimizer is None or not rows:
        return dict.fromkeys(rows, rate)
    scales = state.optimizer.row_scales(state.rows)
    slots = np.searchsorted(one.layer.reserved_rows, list(rows.values()))
    joined = scales.joined_at.numpy()[slots]
    # Rows that have made no step yet have not joined.
    ages = np.where(joined >= 0, int(optimizer.iterations.numpy()) - joined, 0)
    rates = scales.rates(rate, ages[:, np.newaxis], slots).numpy()[:, 0]
    return dict(zip(rows, map(float, rates), strict=True))


def _rows_of(layer: PartialEmbedding, ids: Ids) -> NDArray[np.float32]:
    """Rows as float32, at whatever precision they lie."""
    rows: NDArray[np.float32] = tf.cast(layer.rows(ids), tf.float32).numpy()
    return rows
