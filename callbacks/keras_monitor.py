"""A Keras callback that watches rows: how many train, and how far they went."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from partial_embedding.monitor.record import RECORD, RowRecord, planned_stages, write_record
from partial_embedding.monitor.sampling import TableWatch
from partial_embedding.monitor.track import RowTrack
from partial_embedding.rows.vocabulary import Ids, Vocabulary
from partial_embedding.tensorflow.adapter import innermost
from partial_embedding.tensorflow.embedding import PartialEmbedding
from partial_embedding.tensorflow.models import tables_in
from partial_embedding.tensorflow.row_optimizer import Rowwise

if TYPE_CHECKING:
    from partial_embedding.callbacks.keras import RowUnfreezing


@dataclass
class _Watched:
    """One layer, what watches it, the rows that trained last, the rates of cohorts."""

    layer: PartialEmbedding
    watch: TableWatch
    rows: Ids | None = None
    rates: dict[int, float] = field(default_factory=dict)


class RowMonitor(keras.callbacks.Callback):
    """Writes for TensorBoard which rows of the tables train and how far they went.

    The metrics are those of the Lightning callback, under the same names, as `LAYER/rows_awake` and
    so on; `TableWatch` in `partial_embedding.monitor.sampling` lists them. When `fit` ends, all
    that was seen is written to the same folder as `rows.json`, of which `python -m
    partial_embedding.recipes.report_command` makes a page, where matplotlib is installed. A run
    that is resumed is watched from there on.

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
        vocabulary: The tokens of the rows and how often they occur; by default `model.vocabulary`.
        unfreezing: The `RowUnfreezing` of the run, whose plan and audit the record then holds;
            Keras shows callbacks no others.

    Raises:
        OSError: The record cannot be written.

    Example:
        >>> RowMonitor("logs").log_dir
        'logs'
    """

    def __init__(
        self,
        log_dir: str | PathLike[str],
        every_n_steps: int = 50,
        sample: int = 256,
        vocabulary: Vocabulary | None = None,
        unfreezing: RowUnfreezing | None = None,
    ) -> None:
        super().__init__()
        self.log_dir = fspath(log_dir)
        self.every_n_steps = every_n_steps
        self.sample = sample
        self.vocabulary = vocabulary
        self.unfreezing = unfreezing
        self.record = RowRecord()
        self._writer: Any = None
        self._watched: dict[str, _Watched] = {}
        self._optimizer: Rowwise | None = None
        self._epoch = 0
        self._due = False

    @property
    def tracks(self) -> dict[str, RowTrack]:
        """What was seen so far, by the name of the layer."""
        return {name: watched.watch.track for name, watched in self._watched.items()}

    def on_train_begin(self, logs: Any = None) -> None:
        """Look at the tables."""
        vocabulary = self.vocabulary or getattr(self.model, "vocabulary", None)
        self._writer = tf.summary.create_file_writer(self.log_dir)
        self._watched = {}
        for name, layer in tables_in(self.model).items():
            watch = TableWatch(
                _Reader(layer),
                layer.input_dim,
                "epoch" if self.params.get("steps") else "step",
                self.sample,
                vocabulary if isinstance(vocabulary, Vocabulary) else None,
                _padding(layer),
            )
            self._watched[name] = _Watched(layer, watch)
        self.record = RowRecord(self.tracks)
        self.record.length = self.params.get("epochs")
        self.record.epoch_steps = self.params.get("steps")
        optimizer = innermost(self.model.optimizer)
        if isinstance(optimizer, Rowwise):
            self._optimizer = optimizer
            if not optimizer.is_measurable:
                # What measures is part of a step that is traced from now on.
                self.model.make_train_function(force=True)
            optimizer.measure_gradients(False)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Know where training stands."""
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Note which rows were unfrozen, and what rows hold before a step that is measured."""
        self._due = self._is_due(batch)
        if self._optimizer is not None and self._due:
            self._optimizer.measure_gradients(True)
        for watched in self._watched.values():
            rows = watched.layer.trainable_rows
            if watched.rows is None or not np.array_equal(watched.rows, rows):
                watched.rows = rows
                trainable = np.zeros(watched.layer.input_dim, np.bool_)
                trainable[rows] = True
                watched.watch.note_rows(trainable, self._place(watched.watch.track, batch))
            if self._due:
                watched.watch.before_step()
                watched.rates = _rates(self.model.optimizer, watched)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Measure and log."""
        for name, watched in self._watched.items():
            place = self._place(watched.watch.track, batch + 1)
            watched.watch.track.end = place
            if self._due:
                self._measure(name, watched, place)
        if self._optimizer is not None and self._due:
            self._optimizer.measure_gradients(False)

    def _is_due(self, batch: int) -> bool:
        """Whether a batch is measured among those that this one begins."""
        end, steps = batch + self.model.steps_per_execution, self.params.get("steps")
        if steps is not None and end >= steps:
            return True
        return bool(end // self.every_n_steps > batch // self.every_n_steps)

    def _place(self, track: RowTrack, batch: int) -> float:
        if track.unit == "step":
            return float(self.model.optimizer.iterations.numpy())
        return float(self._epoch + batch / self.params["steps"])

    def _measure(self, name: str, watched: _Watched, place: float) -> None:
        watch, optimizer = watched.watch, self._optimizer
        squares = None if optimizer is None else optimizer.row_squares(watched.layer)
        gradients = None if squares is None else watch.gradient_norms(*squares)
        numbers = watch.measure(place, None, gradients, watched.rates)
        with self._writer.as_default(step=int(self.model.optimizer.iterations.numpy())):
            for key, value in numbers.items():
                tf.summary.scalar(f"{name}/{key}", value)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Keep what the epoch measured."""
        if self._watched:
            place = next(iter(self.tracks.values())).end
            self.record.add_score(place, dict(logs or {}))

    def on_train_end(self, logs: Any = None) -> None:
        """Write the record, and close the log."""
        self._writer.close()
        if self.unfreezing is not None:
            self._take_over(self.unfreezing)
        self.record.tables = {name: w.watch.finish() for name, w in self._watched.items()}
        folder = Path(self.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_record(folder / RECORD, self.record)

    def _take_over(self, unfreezing: RowUnfreezing) -> None:
        """Keep the plan and the audit of the callback that moves the rows."""
        for name, watched in self._watched.items():
            schedules = unfreezing.schedules
            if (schedule := schedules.get(name, schedules.get(None))) is not None:
                vocabulary = unfreezing.vocabulary or watched.watch.vocabulary
                self.record.plans[name] = planned_stages(
                    schedule, watched.layer.input_dim, vocabulary, _padding(watched.layer)
                )
        self.record.audit = list(unfreezing.reports)


def _rates(optimizer: Any, watched: _Watched) -> dict[int, float]:
    """The learning rate with which each cohort makes its next step."""
    # Under a distribution strategy, what Keras gives is no number.
    rate = float(tf.convert_to_tensor(optimizer.learning_rate))
    rows = watched.watch.any_row_of()
    state = watched.layer.table_state
    if state is None or state.optimizer is None or not rows:
        return dict.fromkeys(rows, rate)
    scales = state.optimizer.row_scales(state.rows)
    slots = np.searchsorted(watched.layer.reserved_rows, list(rows.values()))
    joined = scales.joined_at.numpy()[slots]
    # Rows that have made no step yet have not joined.
    ages = np.where(joined >= 0, int(optimizer.iterations.numpy()) - joined, 0)
    rates = scales.rates(rate, ages[:, np.newaxis], slots).numpy()[:, 0]
    return dict(zip(rows, map(float, rates), strict=True))


def _padding(layer: PartialEmbedding) -> int | None:
    return 0 if layer.freeze_padding else None


class _Reader:
    """Reads rows of a layer as float32 arrays."""

    def __init__(self, layer: PartialEmbedding) -> None:
        self.layer = layer

    def __call__(self, ids: Ids) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = tf.cast(self.layer.rows(ids), tf.float32).numpy()
        return rows
