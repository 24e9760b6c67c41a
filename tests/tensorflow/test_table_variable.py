"""`layer.embeddings` of a split table is used as the variable of the plain layer is."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from partial_embedding.tensorflow import PartialEmbedding, rowwise

NUM_ROWS, WIDTH = 9, 4
MATRIX = np.random.default_rng(0).normal(size=(NUM_ROWS, WIDTH)).astype(np.float32)
IDS, HIDDEN = np.arange(6).reshape(2, 3), tf.ones((2, WIDTH))


def head(table: Any) -> Any:
    """A model whose head is the table."""
    inputs = keras.Input((WIDTH,))
    return keras.Model(inputs, keras.ops.matmul(inputs, keras.ops.transpose(table)))(HIDDEN)


class Half(keras.layers.Layer):  # type: ignore[misc]
    """A head of half precision, for which Keras converts the variables that it reads."""

    def __init__(self, table: Any) -> None:
        super().__init__(dtype="mixed_float16")
        self.table = table

    def call(self, hidden: Any) -> Any:
        return tf.matmul(hidden, self.table, transpose_b=True)


READS: dict[str, Callable[[Any], Any]] = {
    "convert_to_tensor": tf.convert_to_tensor,
    "convert_to_numpy": keras.ops.convert_to_numpy,
    "array": np.array,
    "gather": lambda table: tf.gather(table, IDS),
    "embedding_lookup": lambda table: tf.nn.embedding_lookup(table, IDS),
    "take": lambda table: keras.ops.take(table, IDS, axis=0),
    "index": lambda table: table[3],
    "matmul": lambda table: tf.matmul(HIDDEN, table, transpose_b=True),
    "operators": lambda table: 2 * table + table / 2 - 1,
    "norm": lambda table: tf.norm(table, axis=1),
    "head of a model": head,
    "function": lambda table: tf.function(lambda: tf.reduce_sum(table, axis=1))(),
    "half precision": lambda table: Half(table)(HIDDEN),
    "XLA": lambda table: tf.function(lambda: table[3:] * 2, jit_compile=True)(),
}


WRITES: dict[str, Callable[[Any], Any]] = {
    "assign": lambda table: table.assign(MATRIX * 2),
    "assign float64": lambda table: table.assign(MATRIX.astype(np.float64) * 2),
    "assign list": lambda table: table.assign((MATRIX * 2).tolist()),
    "assign_add": lambda table: table.assign_add(MATRIX),
    "assign_sub": lambda table: table.assign_sub(MATRIX),
    "function": lambda table: tf.function(lambda: table.assign_add(MATRIX), autograph=False)(),
}


def both() -> tuple[Any, Any]:
    plain = keras.layers.Embedding(NUM_ROWS, WIDTH, weights=[MATRIX])
    plain.build()
    return plain, PartialEmbedding.from_matrix(MATRIX, trainable_rows=[3], reserve_rows=[3, 5])


@pytest.mark.parametrize("use", READS)
def test_what_is_read_of_it_is_what_the_plain_layer_gives(use: str) -> None:
    plain, ours = (np.asarray(READS[use](layer.embeddings)) for layer in both())
    assert ours.dtype == plain.dtype
    assert ours.tobytes() == plain.tobytes()


@pytest.mark.parametrize(
    "use", ["gather", "embedding_lookup", "take", "index", "matmul", "norm", "half precision"]
)
def test_its_gradient_is_that_of_the_plain_layer_where_rows_train(use: str) -> None:
    gradients = []
    for layer in both():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(READS[use](layer.embeddings)))
        gradients.append(tf.convert_to_tensor(tape.gradient(loss, layer.embeddings)).numpy())
    plain, ours = gradients
    np.testing.assert_allclose(ours[3], plain[3], rtol=1e-6)
    assert plain[3].any()
    assert not np.delete(ours, 3, axis=0).any()


@pytest.mark.parametrize("use", WRITES)
def test_what_is_written_to_it_is_in_the_table(use: str) -> None:
    plain, ours = both()
    for layer in (plain, ours):
        WRITES[use](layer.embeddings)
    assert ours.get_weights()[0].tobytes() == plain.get_weights()[0].tobytes()
    assert np.asarray(ours(np.arange(NUM_ROWS))).tobytes() == ours.get_weights()[0].tobytes()


def test_a_table_of_another_shape_is_refused() -> None:
    for layer in both():
        with pytest.raises(ValueError, match="shape"):
            layer.embeddings.assign(MATRIX[:3])
        assert layer.get_weights()[0].tobytes() == MATRIX.tobytes()


@pytest.mark.parametrize(
    "name",
    [
        *("shape", "dtype", "ndim", "name", "regularizer", "constraint", "aggregation"),
        *("synchronization", "overwrite_with_gradient"),
    ],
)
def test_it_says_of_itself_what_the_plain_layers_variable_says(name: str) -> None:
    plain, ours = (getattr(layer.embeddings, name) for layer in both())
    assert ours == plain


def test_it_is_no_variable_that_trains_beside_that_of_the_reserved_rows() -> None:
    _, layer = both()
    assert not layer.embeddings.trainable
    assert [v.shape for v in layer.trainable_variables] == [(2, WIDTH)]


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, rowwise], ids=["plain", "rowwise"])
def test_it_is_excluded_from_weight_decay_as_the_plain_layers_variable_is(wrap: Any) -> None:
    for layer in both():
        layer.build()
        optimizer = keras.optimizers.SGD(0.1, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_list=[layer.embeddings])
        optimizer = optimizer if type(layer) is keras.layers.Embedding else wrap(optimizer)
        (rows,) = layer.trainable_variables
        optimizer.apply([tf.zeros(rows.shape)], [rows])
        assert layer.get_weights()[0].tobytes() == MATRIX.tobytes()
