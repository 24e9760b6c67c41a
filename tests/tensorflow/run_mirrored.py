"""Trains one model on two logical CPU devices and on one, and compares; run by a test.

Arguments: the names of optimizers, by default all, and what else replicas share.
"""

import os
import sys
import tempfile
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras  # after the setting above
import numpy as np
import pytest
import tensorflow as tf

from partial_embedding import InputError
from partial_embedding.callbacks.keras import RowMonitor, RowUnfreezing
from partial_embedding.tensorflow import PartialEmbedding, grow_table, rowwise

MATRIX = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
IDS = np.random.default_rng(1).integers(0, 12, (16, 3))
TARGETS = np.random.default_rng(2).normal(size=(16, 1)).astype(np.float32)
STAGES = [[3, 5], [1, 7], [1, 3, 5, 7], [5]]


OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
    "Lamb": lambda: keras.optimizers.Lamb(0.1),
    "rowwise AdamW": lambda: rowwise(keras.optimizers.AdamW(0.1)),
    "lazy Adam": lambda: rowwise(keras.optimizers.Adam(0.1), lazy=True),
}


def train(strategy: Any, make: Any) -> Any:
    with strategy.scope():
        layer = PartialEmbedding.from_matrix(
            MATRIX, trainable_rows=STAGES[0], reserve_rows=[1, 3, 5, 7]
        )
        model = keras.Sequential(
            [
                keras.Input((3,), dtype="int64"),
                layer,
                keras.layers.Flatten(),
                keras.layers.Dense(1, kernel_initializer="ones"),
            ]
        )
        model.compile(make(), "mse", run_eagerly=strategy is not mirrored)
        model.optimizer.build(model.trainable_variables)
    for rows in STAGES:
        before = layer.get_weights()[0]
        layer.set_trainable_rows(rows)
        model.fit(IDS, TARGETS, epochs=2, batch_size=8, shuffle=False, verbose=0)
        changed = (layer.get_weights()[0] != before).any(axis=1)
        assert np.flatnonzero(changed).tolist() == rows
        check_replicas(model.variables)
    return layer.get_weights()[0]


def check_callbacks(strategy: Any, folder: str) -> None:
    with strategy.scope():
        layer = PartialEmbedding.from_matrix(
            MATRIX, trainable_rows=[3], reserve_rows=[1, 3], name="words"
        )
        model = keras.Sequential([keras.Input((3,), dtype="int64"), layer, keras.layers.Flatten()])
        model.compile("sgd", "mse")
    schedule = {"stages": [{"epoch": 0, "rows": [3]}, {"epoch": 1, "rows": [1, 3]}]}
    unfreezing, monitor = RowUnfreezing(schedule, audit=True), RowMonitor(folder)
    targets, callbacks = np.zeros((16, 12)), [unfreezing, monitor]
    model.fit(IDS, targets, epochs=2, batch_size=8, verbose=0, callbacks=callbacks)
    assert [result.changed for result in unfreezing.audit_results] == [0, 0]
    track = monitor.tracks["words"]
    assert track.trainable == [(0.0, 1), (1.0, 2)]
    # What one replica hears is not what all of them look up.
    assert track.token_share == []
    assert set(track.cohorts[0].numbers) == {"update_ratio", "lr", "neighbours_kept"}
    check_replicas(model.variables)
    # Outside of the strategy's scope.
    (new,) = grow_table(model, "words", 1)
    before = layer.get_weights()[0]
    model.fit(np.full_like(IDS, new), targets, batch_size=8, verbose=0)
    assert np.flatnonzero((layer.get_weights()[0] != before).any(axis=1)).tolist() == [new]
    check_replicas(model.variables)


def check_replicas(variables: list[Any]) -> None:
    for variable in variables:
        copies = getattr(getattr(variable, "value", variable), "values", [])
        for copy in list(copies)[1:]:
            assert copy.numpy().tobytes() == copies[0].numpy().tobytes(), variable.name


# Less to wait for.
tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
cpus = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)
# One for all runs: strategies made one after the other mix up each other's collective operations.
mirrored = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
for name in sys.argv[1:] or OPTIMIZERS:
    two = train(mirrored, OPTIMIZERS[name])
    one = train(tf.distribute.get_strategy(), OPTIMIZERS[name])
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6, err_msg=name)
if not sys.argv[1:]:
    with tempfile.TemporaryDirectory() as folder:
        check_callbacks(mirrored, folder)
with mirrored.scope():
    late, variable = rowwise(keras.optimizers.SGD(), lazy=True), keras.Variable([1.0])
with pytest.raises(InputError, match="built before the first step"):
    mirrored.run(lambda: late.build([variable]))
print("replicas agree")
