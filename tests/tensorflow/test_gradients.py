"""The techniques for loops of one's own, in eager mode and in graphs."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from partial_embedding import InputError
from partial_embedding.tensorflow import PartialEmbedding, gradients

MATRIX = np.arange(12, dtype=np.float32).reshape(6, 2)
IDS = np.array([[1, 4], [4, 5]])


def _sparse_gradient(table: Any, scale: float = 1.0) -> Any:
    with tf.GradientTape() as tape:
        loss = scale * tf.reduce_sum(tf.gather(table.value, IDS))
    return tape.gradient(loss, table.value)


@pytest.mark.parametrize("in_graph", [False, True])
def test_a_gradient_that_keeps_some_rows_moves_no_other_under_sgd(in_graph: bool) -> None:
    table, optimizer = keras.Variable(MATRIX), keras.optimizers.SGD(1.0)
    optimizer.build([table])

    def step() -> None:
        gradient = gradients.keep_rows(_sparse_gradient(table), [0, 4])
        optimizer.apply_gradients([(gradient, table)])

    (tf.function(step) if in_graph else step)()
    expected = MATRIX.copy()
    expected[4] -= 2  # it occurs twice
    np.testing.assert_array_equal(table, expected)


def test_capped_values_keep_indices_and_dense_shape() -> None:
    gradient = _sparse_gradient(keras.Variable(MATRIX), scale=-3.0)
    capped = gradients.cap_values(gradient, 2.0)
    np.testing.assert_array_equal(capped.values, np.full((4, 2), -2.0))
    np.testing.assert_array_equal(capped.indices, gradient.indices)
    np.testing.assert_array_equal(capped.dense_shape, [6, 2])
    np.testing.assert_array_equal(gradients.keep_rows(gradient, [1]).dense_shape, [6, 2])


@pytest.mark.parametrize("jit", [False, True])
def test_stopped_gradients_are_zero_also_where_they_are_not_finite(jit: bool) -> None:
    table = tf.Variable(MATRIX)
    upstream = np.where(IDS == 4, np.inf, 1.0).astype(np.float32)[..., np.newaxis]

    @tf.function(jit_compile=jit)
    def gradient() -> Any:
        with tf.GradientTape() as tape:
            vectors = gradients.stop_gradients(tf.gather(table, IDS), IDS, [1, 2], 6)
            loss = tf.reduce_sum(vectors * upstream)
        return tf.convert_to_tensor(tape.gradient(loss, table))

    expected = np.zeros_like(MATRIX)
    expected[1] = 1
    np.testing.assert_array_equal(gradient(), expected)


@pytest.mark.parametrize("kind", [keras.Variable, tf.Variable])
def test_rows_are_written_in_place_also_in_a_graph(kind: Any) -> None:
    table = kind(MATRIX)

    @tf.function
    def write() -> None:
        gradients.set_rows(table, [3], [[7.0, 8.0]])
        gradients.add_to_rows(table, [0, 1], 1.0)
        gradients.add_to_rows(table, range(4, 6), [[-1.0, -2.0]])

    write()
    expected = MATRIX.copy()
    expected[3] = [7, 8]
    expected[:2] += 1
    expected[4:] -= [1, 2]
    np.testing.assert_array_equal(table.numpy(), expected)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(InputError, match=r"tf\.IndexedSlices"):
        gradients.keep_rows(tf.ones((6, 2)), [1])
    with pytest.raises(InputError, match="not negative"):
        gradients.cap_values(_sparse_gradient(keras.Variable(MATRIX)), -1.0)
    with pytest.raises(InputError, match="Pass num_rows"):
        gradients.keep_rows(tf.IndexedSlices(tf.ones((1, 2)), [1]), [1])
    with pytest.raises(InputError, match=r"must lie in \[0, 6\)"):
        gradients.set_rows(keras.Variable(MATRIX), [6], 0.0)
    split = PartialEmbedding.from_matrix(MATRIX, trainable_rows=[1]).embeddings
    for table in (None, "words", MATRIX, split, tf.Variable(MATRIX[0])):
        with pytest.raises(InputError, match=r"tf\.Variable of shape \(V, D\)\. Received a "):
            gradients.add_to_rows(table, [1], 0.0)
