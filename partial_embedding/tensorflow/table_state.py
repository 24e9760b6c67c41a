"""Split storage: a frozen table, and a smaller variable with the rows that may ever train.

A `tf.Variable` cannot change shape inside `fit`, and no Keras optimizer can be told to leave rows
of a variable alone. So the rows that train live in a variable of their own, and a map from row to
place in it, which is assigned without retracing, says which ones train now.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from partial_embedding.errors import InputError
from partial_embedding.rows.vocabulary import Ids
from partial_embedding.schedule import RateScale
from partial_embedding.tensorflow.lr_scale import RowRates


class Split(tf.Module):
    """Reads and moves rows between a frozen table and the variable of its reserved rows.

    A live row is the one in `weights`; every other row is the one in `table`. What an optimizer
    does to reserved rows that are not live therefore never reaches the model. They are pinned to
    their row of the table all the same, since some optimizers look across rows.

    Args:
        table: The frozen table, a variable of shape (V, D).
        weights: The reserved rows in rising order, a variable of shape (R, D).
        reserved: Ids of the reserved rows, sorted, shape (R,).
        live: Ids of the reserved rows that train, sorted.
    """

    def __init__(self, table: Any, weights: Any, reserved: Ids, live: Ids) -> None:
        super().__init__(name="split")
        self.table = table
        self.weights = weights
        # An optimizer wrapper that steps touched rows only asks for the gradient as IndexedSlices.
        self.sparse_gradient = False
        # How fast each row learns, where an optimizer wrapper keeps that.
        self.rate_scales: RowRates | None = None
        # Whether that wrapper makes the step that is being traced.
        self.is_stepped_rowwise = False
        # Whether rows are constrained beyond being pinned.
        self.constrained = False
        with tf.init_scope():
            # int64, as TensorFlow keeps int32 variables off the GPU.
            self.reserved = tf.constant(reserved, tf.int64)
            self.slots = tf.Variable(
                _slots(table.shape[0], reserved, live), trainable=False, name="slots"
            )
            # A number that tells sets of live rows apart, for what follows them inside a graph.
            self.signature = tf.Variable(_signature(live), trainable=False, name="signature")

    def live(self) -> Any:
        """Which reserved rows train now, a boolean tensor of shape (R,)."""
        return tf.gather(self.slots, self.reserved) >= 0

    def look_up(self, ids: Any) -> Any:
        """The rows of a dense tensor of ids, of shape (*ids.shape, D)."""
        slots = tf.gather(self.slots, ids)
        # `tf.gather` of a variable reads the rows only; reading the variable first would copy all
        # of it at every step once a row of it has been assigned.
        frozen = tf.gather(self.table.value, ids)
        gather = _touched_rows if self.sparse_gradient else _live_rows
        live = gather(self.weights.value, slots)
        return tf.where((slots >= 0)[..., tf.newaxis], live, frozen)

    def merged(self) -> Any:
        """The whole table as one tensor of shape (V, D), through which live rows get gradients."""
        rows = tf.where(self.live()[:, tf.newaxis], self.weights.value, self._pins())
        table = tf.convert_to_tensor(self.table.value)
        return tf.tensor_scatter_nd_update(table, self.reserved[:, tf.newaxis], rows)

    def pin(self, weights: Any) -> Any:
        """The reserved rows, with those that are not live at their value in the table."""
        weights, live = tf.convert_to_tensor(weights), self.live()
        return tf.cond(
            tf.reduce_all(live),
            lambda: weights,
            lambda: tf.where(live[:, tf.newaxis], weights, self._pins()),
        )

    def stop_frozen(self, weights: Any) -> Any:
        """The reserved rows, with no gradient through those that are not live."""
        weights = tf.convert_to_tensor(weights)
        return tf.where(self.live()[:, tf.newaxis], weights, tf.stop_gradient(weights))

    def assign(self, matrix: Any) -> None:
        """Write a whole table, shape (V, D)."""
        self.table.assign(matrix)
        self.weights.assign(self._pins())

    def move(self, before: Ids, after: Ids, begin: Ids, rate_scale: RateScale) -> None:
        """Make `after` the live rows instead of `before`, without retracing anything.

        Those of `begin` whose first step is still to come take the rate_scale, where rate_scales
        are kept.
        """
        if not tf.executing_eagerly():
            raise InputError(
                "rows are frozen and unfrozen outside of tf.function, where it costs no retracing. "
                "Received a call while a graph is traced. Call from a callback or between steps."
            )
        reserved = self.reserved.numpy()
        if (leaving := np.setdiff1d(before, after, assume_unique=True)).size:
            rows = tf.gather(self.weights.value, np.searchsorted(reserved, leaving))
            self.table.value.scatter_update(tf.IndexedSlices(rows, tf.constant(leaving)))
        if (joining := np.setdiff1d(after, before, assume_unique=True)).size:
            # Assigned as a whole: a scatter would make every later read of the variable a copy.
            joins = np.isin(reserved, joining, assume_unique=True)[:, np.newaxis]
            self.weights.assign(tf.where(joins, self._pins(), self.weights.value))
        self.slots.assign(_slots(self.table.shape[0], reserved, after))
        self.signature.assign(_signature(after))
        if self.rate_scales is not None:
            self.rate_scales.begin(np.searchsorted(reserved, begin), rate_scale)

    def check_optimizer(self, table: str) -> None:
        """Refuse a step by an optimizer that this was not made ready for.

        Args:
            table: The table's name.

        Raises:
            InputError: It is none that `rowwise` made.
        """
        if self.sparse_gradient or (self.rate_scales is not None and not self.is_stepped_rowwise):
            raise InputError(
                "a table that rowwise was built for with lazy=True or rate_scales=True is stepped "
                "rightly"
                f" by none but rowwise. Received another optimizer for {table!r}. Wrap it by "
                "rowwise too."
            )

    def _pins(self) -> Any:
        return tf.gather(self.table.value, self.reserved)


def over_ids(rows: Callable[[Any], Any], inputs: Any, num_rows: int) -> Any:
    """Look up dense, ragged or sparse ids as `keras.layers.Embedding` does.

    Args:
        rows: Maps a dense tensor of ids in [0, V) to their rows.
        inputs: Ids of any shape; negative ones count from the end, absent ones of a sparse tensor
            are 0.
        num_rows: The number of rows V.
    """
    if isinstance(inputs, tf.RaggedTensor):
        return tf.ragged.map_flat_values(lambda ids: over_ids(rows, ids, num_rows), inputs)
    if isinstance(inputs, tf.SparseTensor):
        inputs = tf.sparse.to_dense(inputs)
    return rows(tf.where(inputs < 0, inputs + tf.cast(num_rows, inputs.dtype), inputs))


def _live_rows(weights: Any, slots: Any) -> Any:
    """Gather rows of `weights`; rows with a negative slot are unspecified and get no gradient."""

    @tf.custom_gradient
    def gather(weights: Any) -> tuple[Any, Callable[[Any], Any]]:
        def gradient(upstream: Any) -> Any:
            values = tf.reshape(upstream, [-1, weights.shape[-1]])
            # Keras never sums the duplicates of IndexedSlices, which makes most of its optimizers
            # wrong for an id that occurs twice. Negative slots are dropped here.
            return tf.math.unsorted_segment_sum(values, tf.reshape(slots, [-1]), weights.shape[0])

        return tf.gather(weights, tf.maximum(slots, 0)), gradient

    return gather(tf.convert_to_tensor(weights))


def _touched_rows(weights: Any, slots: Any) -> Any:
    """The same with a gradient of IndexedSlices, of valid slots and static shape.

    XLA needs the shape and Keras the slots, so frozen tokens stay in the gradient, as void entries
    for the first row. They are -0.0, which no other entry is: that adds nothing to a sum or a norm,
    and stays what it is when a gradient is scaled.
    """

    @tf.custom_gradient
    def mark(rows: Any) -> tuple[Any, Callable[[Any], Any]]:
        def gradient(upstream: Any) -> Any:
            unsigned = tf.where(upstream == 0, tf.zeros_like(upstream), upstream)
            return tf.where((slots >= 0)[..., tf.newaxis], unsigned, -tf.zeros_like(upstream))

        return tf.identity(rows), gradient

    return mark(tf.gather(weights, tf.maximum(slots, 0)))


def _signature(live: Ids) -> Any:
    digest = hashlib.blake2b(live.tobytes(), digest_size=8, salt=b"live").digest()
    return np.frombuffer(digest, np.int64)[0]


def _slots(num_rows: int, reserved: Ids, live: Ids) -> Ids:
    slots = np.full(num_rows, -1, np.int64)
    slots[live] = np.searchsorted(reserved, live)
    return slots
