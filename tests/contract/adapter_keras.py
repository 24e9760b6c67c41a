"""The contract's verbs in Keras on TensorFlow; `adapter_torch.py` says what each of them does."""

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from reference import OPTIMIZERS, Array, Batch, Optimizer, TrainsRows

from partial_embedding.callbacks.keras import RowUnfreezing
from partial_embedding.tensorflow import PartialEmbedding, rowwise

FRAMEWORK = "tensorflow"


class Training(TrainsRows):
    def __init__(
        self,
        matrix: Array,
        rows: object,
        optimizer: Optimizer,
        ever: object = "all",
        padded: bool = False,
    ) -> None:
        self.layer = PartialEmbedding.from_matrix(
            matrix, trainable_rows=rows, reserve_rows=ever, mask_zero=padded, freeze_padding=padded
        )
        self._optimizer = rowwise(_made(optimizer), lazy=optimizer.lazy)
        self._optimizer.build(self.layer.trainable_variables)

    @property
    def table(self) -> Array:
        return np.array(self.layer.get_weights()[0])

    def look_up(self, ids: Array) -> Array:
        return np.array(self.layer(ids))

    def step(self, ids: Array, upstream: Array) -> None:
        variables = self.layer.trainable_variables
        with tf.GradientTape() as tape:
            rows = self.layer(ids)
        gradients = tape.gradient(rows, [v.value for v in variables], output_gradients=upstream)
        self._optimizer.apply(gradients, variables)

    # Doors

    def plain(self) -> Array:
        plain = keras.layers.Embedding(self.layer.input_dim, self.layer.output_dim)
        plain.build()
        plain.set_weights(self.layer.get_weights())
        return np.array(plain.get_weights()[0])

    def take_plain(self, table: Array) -> None:
        plain = keras.layers.Embedding(*table.shape, weights=[table])
        self.layer.set_weights(plain.get_weights())

    def keep(self) -> Any:
        return keras.Sequential([self.layer]).get_weights()

    def restore(self, kept: Any) -> None:
        keras.Sequential([self.layer]).set_weights(kept)

    def save(self, folder: Path) -> None:
        self._checkpoint.write(folder / "state")

    def load(self, folder: Path) -> None:
        self._checkpoint.read(folder / "state").assert_consumed()

    @property
    def _checkpoint(self) -> Any:
        return tf.train.Checkpoint(model=self.layer, optimizer=self._optimizer)

    def average(self, batches: Sequence[Batch]) -> Array:
        variables = self.layer.trainable_variables
        averages = [np.zeros(v.shape, np.float32) for v in variables]
        for count, batch in enumerate(batches, 1):
            self.step(*batch)
            for average, variable in zip(averages, variables, strict=True):
                average += (variable.numpy() - average) / count
        for average, variable in zip(averages, variables, strict=True):
            variable.assign(average)
        return self.table


def fit(
    matrix: Array,
    schedule: str | PathLike[str],
    optimizer: Optimizer,
    batches: Sequence[Batch],
    epochs: int,
    ever: object,
    measured: Sequence[float] = (),
    audit: bool | int = True,
    write: tuple[int, int] | None = None,
    folder: Path | None = None,
    trains: bool = True,
) -> tuple[list[Array], Any]:
    layer = PartialEmbedding.from_matrix(
        matrix, reserve_rows=ever, trainable_rows=ever, name="words", trainable=trains
    )
    model = keras.Sequential([keras.Input((None,), dtype="int64"), layer])
    metric = _Measured(measured)
    model.compile(
        rowwise(_made(optimizer), lazy=optimizer.lazy),
        loss=_product,
        metrics=[metric],
        # Tracing takes longer than a run does. Plain SGD is what runs are kept and told of with;
        # numbers are those of other optimizers, too.
        run_eagerly=optimizer == OPTIMIZERS["SGD"],
    )
    tables: list[Array] = []
    callbacks = [
        keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: metric.begin(epoch)),
        RowUnfreezing(schedule, audit=audit, backup_dir=folder),
        keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: tables.append(np.array(layer.get_weights()[0]))
        ),
    ]
    if write is not None:
        callbacks.append(_Writes(*write))
    if folder is not None:
        callbacks.append(keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False))
    model.fit(
        _Batches(batches),
        epochs=epochs,
        shuffle=False,
        verbose=0,
        validation_data=_Batches(batches[:1]) if measured else None,
        callbacks=callbacks,
    )
    if folder is None:
        return tables, None
    kept = json.loads((folder / "row_unfreezing.json").read_text(encoding="utf-8"))
    return tables, kept["runner"]


class _Writes(keras.callbacks.Callback):
    def __init__(self, step: int, row: int) -> None:
        super().__init__()
        self.step, self.row = step, row

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if int(self.model.optimizer.iterations) == self.step:
            (matrix,) = self.model.layers[0].get_weights()
            matrix[self.row] += 1
            self.model.layers[0].set_weights([matrix])


class _Measured(keras.metrics.Metric):
    """Says for each epoch what it is told to."""

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__(name="measured")
        self.values = values
        self.value = self.add_variable((), "zeros")

    def begin(self, epoch: int) -> None:
        if self.values:
            self.value.assign(self.values[epoch])

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        pass

    def result(self) -> Any:
        return tf.convert_to_tensor(self.value)

    def reset_state(self) -> None:
        pass


class _Batches(keras.utils.PyDataset):
    def __init__(self, batches: Sequence[Batch]) -> None:
        super().__init__()
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index]


def _product(upstream: Any, rows: Any) -> Any:
    return tf.reduce_sum(upstream * rows)


def _made(optimizer: Optimizer) -> Any:
    kind = getattr(keras.optimizers, optimizer.name)
    return kind(optimizer.learning_rate, **optimizer.options)
