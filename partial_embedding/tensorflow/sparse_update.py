"""Stepping some rows of a variable with the own maths of a Keras optimizer."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

# The most float32 that a processor's vectors hold, AVX-512's.
_LANES = 16


@tf.RegisterGradient("PartialEmbeddingRows")
def _gradient_of_rows(operation: Any, upstream: Any, *others: Any) -> tuple[Any, ...]:
    if operation is None:
        # A SavedModel keeps gradients without operations, and so without slots. TensorFlow refuses
        # to take this one there.
        return None, None, None, None
    _, _, slots, shape = operation.inputs
    return None, _marked(upstream, slots, shape), None, None


def _marked(upstream: Any, slots: Any, shape: Any) -> Any:
    """`tf.IndexedSlices` with a void entry for the first row where a slot is negative.

    XLA needs their number and Keras needs rows that there are, so these entries stay. They are
    -0.0, which no other entry is: that adds nothing to a sum or a norm, and stays what it is when a
    gradient is scaled.
    """
    # Keras asks of one entry of each row whether it is finite, which a void one must not hide.
    first = tf.where((slots == 0)[:, tf.newaxis], upstream, tf.zeros_like(upstream))
    total = tf.reduce_sum(first, axis=0)
    # No constant: eager TensorFlow keeps the scalars that it made, and gives 0.0 for -0.0 then.
    void = tf.where(tf.math.is_finite(total), -tf.zeros((), upstream.dtype), total)
    unsigned = tf.where(upstream == 0, tf.zeros_like(upstream), upstream)
    values = tf.where((slots < 0)[:, tf.newaxis], void, unsigned)
    return tf.IndexedSlices(values, tf.maximum(slots, 0), shape)


def _are_void(values: Any) -> Any:
    # By its bits, as -0.0 == 0.0.
    integer = {2: tf.int16, 4: tf.int32, 8: tf.int64}[values.dtype.size]
    return tf.reduce_all(tf.bitcast(values, integer) == integer.min, axis=1)


def gather_rows(variable: Any, slots: Any, sparse: bool) -> Any:
    """Gather rows of a variable; rows with a negative slot are unspecified and get no gradient.

    Args:
        variable: A `tf.Variable` of shape (R, D).
        slots: Its rows, or -1, int64, shape (N,).
        sparse: Make the gradient of the variable `tf.IndexedSlices`, for `summed`, rather than a
            dense one. What is done to rows with a negative slot must stop their gradients then, as
            `tf.where` does.

    Returns:
        A tensor of shape (N, D).
    """
    # Where there are replicas and none of them asks, nothing steps: Keras looks for shapes.
    if not sparse or tf.distribute.in_cross_replica_context():
        # Keras never sums the duplicates of IndexedSlices, which makes most of its optimizers wrong
        # for an id that occurs twice. The gradient of a reshape is dense, and so sums them, without
        # those of negative slots.
        rows, slots = tf.reshape(variable, variable.shape), slots[:, tf.newaxis]
        return tf.gather_nd(rows, slots, bad_indices_policy="IGNORE")
    if tf.executing_eagerly():
        return _gather_eagerly(tf.convert_to_tensor(variable), slots)
    rows = tf.stop_gradient(tf.gather(variable, tf.maximum(slots, 0)))
    return _carrier(variable)(rows, variable.handle, slots)


def _carrier(variable: Any) -> Any:
    """A function that gives back rows, and whose gradient is that of the variable.

    `tf.custom_gradient` would register a function at each trace, which TensorFlow never frees, and
    with it the table. The gradient here is registered once, and names no variable. It has to be
    looked up by a function's own backward pass, as tapes do not ask for registered gradients.
    """
    shape, dtype = tuple(variable.shape), variable.dtype

    def carry(rows: Any, handle: Any, slots: Any) -> Any:
        graph = tf.compat.v1.get_default_graph()
        with graph.gradient_override_map({"IdentityN": "PartialEmbeddingRows"}):
            return tf.identity_n([rows, handle, slots, tf.constant(shape, tf.int64)])[0]

    return tf.function(carry, autograph=False).get_concrete_function(
        tf.TensorSpec([None, shape[1]], dtype),
        tf.TensorSpec([], tf.resource),
        tf.TensorSpec([None], tf.int64),
    )


@tf.custom_gradient  # registers nothing in eager mode
def _gather_eagerly(weights: Any, slots: Any) -> tuple[Any, Any]:
    def gradient(upstream: Any) -> tuple[Any, None]:
        return _marked(upstream, slots, tf.shape(weights)), None

    return tf.gather(weights, tf.maximum(slots, 0)), gradient


def summed(slices: Any, num_rows: int) -> Any:
    """`tf.IndexedSlices` with one entry for each row, and void entries behind them.

    XLA needs static shapes, so the number of entries stays, but that it becomes a whole number of a
    processor's vectors: behind the last full one TensorFlow's float32 `pow` rounds otherwise. Void
    entries come in as -0.0 for any row, and go out as zeros for the row `num_rows`, which there is
    not.

    Args:
        slices: Entries of shape (N, D) for rows that may occur several times, and void ones.
        num_rows: The number of rows.
    """
    beyond = tf.cast(num_rows, slices.indices.dtype)
    indices = tf.where(_are_void(slices.values), beyond, slices.indices)
    size = tf.size(indices)
    # Of equal ones the earlier comes first.
    falling, order = tf.math.top_k(-indices, size)
    is_last = falling != tf.roll(falling, -1, axis=0)
    segments = tf.cumsum(tf.cast(is_last, tf.int32), exclusive=True)
    number = -(-size // _LANES) * _LANES
    values = tf.math.unsorted_segment_sum(tf.gather(slices.values, order), segments, number)
    # The largest of no entries is the least number that there is.
    rows = -tf.maximum(tf.math.unsorted_segment_max(falling, segments, number), -beyond)
    return tf.IndexedSlices(values, rows, slices.dense_shape)


def row_squares(gradient: Any, num_rows: int) -> Any:
    """The sum of squares of each row of a gradient, dense or as `summed` makes it; shape (R,)."""
    is_sparse = isinstance(gradient, tf.IndexedSlices)
    values = tf.cast(gradient.values if is_sparse else gradient, tf.float32)
    squares = tf.reduce_sum(tf.square(values), axis=1)
    if not is_sparse:
        return squares
    slots = tf.where(gradient.indices < num_rows, gradient.indices, -1)
    return tf.math.unsorted_segment_sum(squares, slots, num_rows)


class HeldRows:
    """Rows of a variable that an optimizer may take for the variable.

    Args:
        rows: The rows, shape (N, D).
        unique_id: The id by which a Keras optimizer knows the variable.
    """

    def __init__(self, rows: Any, unique_id: str) -> None:
        self.value = tf.convert_to_tensor(rows)
        self._unique_id = unique_id

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Any:
        return self.value if dtype is None else tf.cast(self.value, dtype)

    @property
    def dtype(self) -> Any:
        """The dtype of the rows."""
        return self.value.dtype

    def assign(self, value: Any) -> None:
        """Replace the rows."""
        self.value = value

    def assign_add(self, value: Any) -> None:
        """Add to the rows."""
        self.value = self.value + value

    def assign_sub(self, value: Any) -> None:
        """Subtract from the rows."""
        self.value = self.value - value

    def __mul__(self, other: Any) -> Any:
        return self.value * other

    __rmul__ = __mul__


# `tf.convert_to_tensor`, and so all of `keras.ops`, accepts registered classes.
tf.register_tensor_conversion_function(
    HeldRows, lambda held, dtype=None, name=None, as_ref=False: held.__tf_tensor__(dtype, name)
)


def worker(optimizer: Any, steps: Any, states: list[tuple[Any, Any]] | None = None) -> Any:
    """An optimizer that counts steps in its own way and may hold rows for its state.

    Args:
        optimizer: A built Keras optimizer, which stays as it is.
        steps: What it takes for its `iterations`; broadcast over the rows.
        states: Pairs of a variable of its state and what it takes for it.
    """
    held = {id(state): stand_in for state, stand_in in states or []}
    made = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if isinstance(value, list) and any(id(entry) in held for entry in value):
            if name == "_variables":
                continue
            value = [held.get(id(entry), entry) for entry in value]
        made.__dict__[name] = value
    made.__dict__["_iterations"] = steps
    return made


def state_of(optimizer: Any) -> list[Any]:
    """The variables that a Keras optimizer keeps for the variables it was built with."""
    shared = {id(optimizer._iterations), id(optimizer._learning_rate)}
    return [variable for variable in optimizer.variables if id(variable) not in shared]


def first_value(optimizer: Any, state: Any, weights: Any) -> Any:
    """What one of `state_of(optimizer)` holds before the first step of the weights."""
    if state.name.endswith("_accumulator") and hasattr(optimizer, "initial_accumulator_value"):
        return tf.constant(optimizer.initial_accumulator_value, state.dtype)
    if isinstance(optimizer, keras.optimizers.ScheduleFreeAdamW) and state.name.endswith(
        "_momentum"
    ):
        return tf.convert_to_tensor(weights)
    return tf.constant(0, state.dtype)
