"""Parts for training loops of your own: rewrite sparse gradients, stop them, write rows in place.

Each is the working form of a technique that is still copied from old answers. Where a
`PartialEmbedding` can be the table, prefer it: its frozen rows keep their bits under every
optimizer, while a rewritten gradient alone is no freeze. Momentum, weight decay and moving averages
move rows whose gradient is zero or absent.

What was wrong with the old forms on Keras 3: a layer that holds a bare `tf.Variable` trains
nothing, as Keras does not find it (use `add_weight`); multiplying by a mask makes NaN of infinite
gradients of frozen rows; `tf.compat.v1.scatter_update` does not take a `keras.Variable`; and Keras
does not sum the duplicates of `tf.IndexedSlices`, so most of its optimizers step an id that occurs
twice wrongly.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from partial_embedding.errors import InputError
from partial_embedding.rows import Rows, RowsLike


def cap_values(gradient: Any, limit: float) -> Any:
    """Cap each value of a sparse gradient to [-limit, limit].

    Entries of the same row are capped one by one, before they are summed.

    Args:
        gradient: `tf.IndexedSlices` with values of shape (N, D).
        limit: The largest absolute value that is left as it is.

    Returns:
        `tf.IndexedSlices` with the same indices and dense shape.

    Raises:
        InputError: The gradient is not sparse, or the limit is negative.

    Example:
        >>> slices = tf.IndexedSlices(tf.constant([[3.0, -5.0]]), tf.constant([4]))
        >>> cap_values(slices, 4.0).values.numpy()
        array([[ 3., -4.]], dtype=float32)
    """
    _check_sparse(gradient)
    if not limit >= 0:
        raise InputError(f"a limit is not negative. Received: {limit}. 0 lets no row move.")
    values = tf.clip_by_value(gradient.values, -limit, limit)
    return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)


def keep_rows(gradient: Any, rows: RowsLike, num_rows: int | None = None) -> Any:
    """Drop the entries of a sparse gradient that belong to other rows.

    The number of entries that are left is known only when it runs, so this is not for functions
    compiled by XLA (`jit_compile=True`); there, stop the gradients in the forward pass.

    Args:
        gradient: `tf.IndexedSlices` with values of shape (N, D).
        rows: The rows whose entries are kept, in any form that `Rows.parse` reads.
        num_rows: The number of rows V of the table, where the gradient does not know it.

    Returns:
        `tf.IndexedSlices` with the same dense shape.

    Raises:
        InputError: The gradient is not sparse, or the rows do not lie in the table.

    Example:
        >>> slices = tf.IndexedSlices(tf.ones([2, 1]), tf.constant([4, 7]))
        >>> keep_rows(slices, [7], num_rows=10).indices.numpy()
        array([7], dtype=int32)
    """
    _check_sparse(gradient)
    if num_rows is None:
        shape = None if gradient.dense_shape is None else tf.get_static_value(gradient.dense_shape)
        if shape is None:
            raise InputError(
                "the number of rows is read from the gradient's dense_shape. Received a gradient "
                "without. Pass num_rows=."
            )
        num_rows = int(shape[0])
    kept = tf.gather(_mask(rows, num_rows), gradient.indices)
    return tf.IndexedSlices(
        tf.boolean_mask(gradient.values, kept),
        tf.boolean_mask(gradient.indices, kept),
        gradient.dense_shape,
    )


def stop_gradients(vectors: Any, ids: Any, rows: RowsLike, num_rows: int) -> Any:
    """Stop the gradients of looked-up vectors of all but the given rows.

    The stopped gradient is zero also where the one that arrives is infinite or not a number.

    Args:
        vectors: What was looked up, floating point, shape (*ids.shape, D).
        ids: The ids that were looked up, integers in [0, V).
        rows: The rows whose gradients go on, in any form that `Rows.parse` reads.
        num_rows: The number of rows V of the table.

    Returns:
        A tensor equal to `vectors`.

    Raises:
        InputError: The rows do not lie in the table.

    Example:
        >>> vectors = tf.Variable([[1.0], [2.0]])
        >>> with tf.GradientTape() as tape:
        ...     loss = tf.reduce_sum(stop_gradients(vectors, [4, 7], [7], num_rows=10))
        >>> tape.gradient(loss, vectors).numpy()
        array([[0.],
               [1.]], dtype=float32)
    """
    vectors = tf.convert_to_tensor(vectors)
    goes_on = tf.gather(_mask(rows, num_rows), ids)[..., tf.newaxis]
    return tf.where(goes_on, vectors, tf.stop_gradient(vectors))


def set_rows(variable: Any, rows: RowsLike, values: Any) -> None:
    """Set rows of a table in place; the cost follows their number.

    Args:
        variable: A `keras.Variable` or `tf.Variable` of shape (V, D).
        rows: The rows in any form that `Rows.parse` reads; values belong to them in rising order.
        values: Broadcast to (K, D).

    Raises:
        InputError: It is no such variable, or the rows do not lie in the table.

    Example:
        >>> table = keras.Variable(np.zeros((3, 1), "float32"))
        >>> set_rows(table, [2, 0], [[5.0], [6.0]])
        >>> table.numpy().ravel()
        array([5., 0., 6.], dtype=float32)
    """
    _write(variable, rows, values, "scatter_update")


def add_to_rows(variable: Any, rows: RowsLike, values: Any) -> None:
    """Add to rows of a table in place; arguments and errors are those of `set_rows`.

    Example:
        >>> table = keras.Variable(np.ones((3, 1), "float32"))
        >>> add_to_rows(table, [2], 1.5)
        >>> table.numpy().ravel()
        array([1. , 1. , 2.5], dtype=float32)
    """
    _write(variable, rows, values, "scatter_add")


def _write(variable: Any, rows: RowsLike, values: Any, method: str) -> None:
    native = variable.value if isinstance(variable, keras.Variable) else variable
    if not isinstance(native, tf.Variable) or native.shape.rank != 2:
        raise InputError(
            "rows are written in a keras.Variable or tf.Variable of shape (V, D). Received a "
            f"{type(variable).__name__}. Of a PartialEmbedding, call set_weights."
        )
    num_rows, width = native.shape
    ids = Rows.parse(rows).resolve(num_rows)
    values = tf.broadcast_to(tf.cast(values, native.dtype), (ids.size, width))
    getattr(native, method)(tf.IndexedSlices(values, tf.constant(ids)))


def _mask(rows: RowsLike, num_rows: int) -> Any:
    ids = Rows.parse(rows).resolve(num_rows)
    return tf.constant(np.isin(np.arange(num_rows), ids, assume_unique=True))


def _check_sparse(gradient: Any) -> None:
    if not isinstance(gradient, tf.IndexedSlices):
        raise InputError(
            "a sparse gradient is tf.IndexedSlices, as tf.gather of a variable gives. Received: "
            f"{type(gradient).__name__}. A tied head or a regularizer makes it dense."
        )
