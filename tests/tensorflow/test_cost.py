"""The cost of a step follows the reserved rows, not the vocabulary."""

import time
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from partial_embedding.tensorflow import PartialEmbedding  # noqa: E402  # after the skip


def _seconds_per_step(num_rows: int, width: int = 32) -> float:
    layer = PartialEmbedding(
        num_rows, width, trainable_rows=range(50), embeddings_initializer="zeros"
    )
    layer.build()
    optimizer = keras.optimizers.Adam()
    optimizer.build(layer.trainable_variables)
    # Rows that were trained and frozen again: TensorFlow copies a variable at every reading once
    # single rows of it have been written.
    layer.freeze_rows(range(10))
    ids = tf.constant(np.arange(100).reshape(10, 10))

    @tf.function
    def step() -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(ids) ** 2)
        weights = layer.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))

    times = []
    for _ in range(20):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)


def test_a_step_takes_no_longer_with_a_vocabulary_that_is_a_thousand_times_larger() -> None:
    # Copying a table of 1e6 x 32 takes tens of milliseconds, the step well under one.
    assert _seconds_per_step(1_000_000) < 5 * _seconds_per_step(1000) + 1e-3


def test_a_step_keeps_no_state_larger_than_the_reserved_rows() -> None:
    layer = PartialEmbedding(1000, 8, trainable_rows=range(5))
    layer.build()
    optimizer = keras.optimizers.Adam()
    optimizer.build(layer.trainable_variables)
    assert max(np.prod(v.shape) for v in optimizer.variables) == 5 * 8
