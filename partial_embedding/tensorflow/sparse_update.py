"""Stepping some rows of a variable with the own maths of a Keras optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
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
    # Copies, for a gradient of this gradient: what a graph gives back is its own.
    return None, _entries(upstream, tf.identity(slots), tf.identity(shape)), None, None


def _is_compiled() -> bool:
    """Whether what is traced now is for XLA, which needs to know how many entries there are."""
    # There is no public name for it; here stands what TensorFlow keeps for Keras.
    return tf.__internal__.get_enclosing_xla_context() is not None


def _entries(upstream: Any, slots: Any, shape: Any) -> Any:
    """`tf.IndexedSlices` of what arrives at rows with a slot.

    For XLA the others stay, as zeros for a row -1: its scatters leave that out.
    """
    if _is_compiled():
        values = tf.where((slots >= 0)[:, tf.newaxis], upstream, tf.zeros((), upstream.dtype))
        return tf.IndexedSlices(values, slots, shape)
    kept = tf.reshape(tf.where(slots >= 0), [-1])
    return tf.IndexedSlices(tf.gather(upstream, kept), tf.gather(slots, kept), shape)


def choose_rows(variable: Any, slots: Any, others: Any, sparse: bool) -> Any:
    """Gather rows of a variable, and take others where there is none.

    Args:
        variable: A `tf.Variable` of shape (R, D).
        slots: Its rows, or -1, int64, shape (N,).
        others: What to take at -1, shape (N, D); it gets no gradient.
        sparse: Make the gradient of the variable `tf.IndexedSlices`, for `summed`, rather than a
            dense one.
    """
    # It takes whole rows, which `tf.where` does one element at a time.
    choose = partial(tf.raw_ops.Select, condition=slots >= 0, y=others)
    # Where there are replicas and none of them asks, nothing steps: Keras looks for shapes.
    if not sparse or tf.distribute.in_cross_replica_context():
        # Keras never sums the duplicates of IndexedSlices, which makes most of its optimizers wrong
        # for an id that occurs twice. The gradient of a reshape is dense, and so sums them, without
        # those of negative slots.
        rows, places = tf.reshape(variable, variable.shape), tf.expand_dims(slots, 1)
        return choose(x=tf.gather_nd(rows, places, bad_indices_policy="IGNORE"))
    rows = choose(x=tf.stop_gradient(tf.gather(variable, tf.maximum(slots, 0))))
    if tf.executing_eagerly():
        return _carry_eagerly(tf.convert_to_tensor(variable), rows, slots)
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
def _carry_eagerly(weights: Any, rows: Any, slots: Any) -> tuple[Any, Any]:
    def gradient(upstream: Any) -> tuple[Any, None, None]:
        return _entries(upstream, slots, tf.shape(weights)), None, None

    return tf.identity(rows), gradient


def noted(rows: Any, note: Callable[[], None]) -> Any:
    """The same rows, of which every gradient that is computed eagerly calls a function."""

    @tf.custom_gradient  # registers nothing in eager mode
    def carry(rows: Any) -> tuple[Any, Any]:
        def gradient(upstream: Any) -> Any:
            note()
            return upstream

        return tf.identity(rows), gradient

    return carry(rows)


def summed(slices: Any) -> Any:
    """The same `tf.IndexedSlices` with one entry for each row; entries of row -1 are void.

    There is a whole number of a processor's vectors of entries, so that the last are void: behind
    the last full one TensorFlow's float32 `pow` rounds otherwise.
    """
    if _is_compiled():
        # `tf.unique` gives wrong numbers under XLA. Of equal ones the earlier comes first.
        indices, order = tf.math.top_k(slices.indices, tf.size(slices.indices))
        is_last = indices != tf.roll(indices, -1, axis=0)
        segments = tf.cumsum(tf.cast(is_last, tf.int32), exclusive=True)
        number = -(-tf.size(indices) // _LANES) * _LANES
        rows = tf.math.unsorted_segment_max(indices, segments, number)
        values = tf.math.unsorted_segment_sum(tf.gather(slices.values, order), segments, number)
        return tf.IndexedSlices(values, rows, slices.dense_shape)
    rows, segments = tf.unique(slices.indices)
    number = -(-tf.size(rows) // _LANES) * _LANES
    rows = tf.pad(rows, [[0, number - tf.size(rows)]], constant_values=-1)
    values = tf.math.unsorted_segment_sum(slices.values, segments, number)
    return tf.IndexedSlices(values, rows, slices.dense_shape)


def write_rows(variable: Any, rows: Any, values: Any) -> None:
    """Write rows of a `tf.Variable`, but those at negative places."""
    tf.raw_ops.ResourceScatterNdUpdate(
        ref=variable.handle,
        indices=tf.expand_dims(rows, 1),
        updates=values,
        bad_indices_policy="IGNORE",
    )


def row_squares(gradient: Any, num_rows: int) -> Any:
    """The sum of squares of each row of a gradient, dense or as `summed` makes it; shape (R,)."""
    is_sparse = isinstance(gradient, tf.IndexedSlices)
    values = tf.cast(gradient.values if is_sparse else gradient, tf.float32)
    squares = tf.reduce_sum(tf.square(values), axis=1)
    if not is_sparse:
        return squares
    return tf.math.unsorted_segment_sum(squares, gradient.indices, num_rows)


class HeldRows:
    """Rows of a variable that an optimizer, which knows it by an id, may take for the variable."""

    def __init__(self, rows: Any, unique_id: str) -> None:
        self.value = tf.convert_to_tensor(rows)
        self._unique_id = unique_id

    # `tf.convert_to_tensor`, and so all of `keras.ops`, asks for it.
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


def worker(optimizer: Any, steps: Any, states: Iterable[tuple[Any, Any]] = ()) -> Any:
    """A built Keras optimizer that counts steps in its own way and may hold rows for its state.

    Args:
        optimizer: The optimizer, which stays as it is.
        steps: What the other takes for its `iterations`; broadcast over the rows.
        states: Pairs of a variable of its state and what it takes for it.
    """
    held = {id(state): stand_in for state, stand_in in states}
    # Past Keras's constructor and attributes: these would make and track variables.
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
    is_averaged = isinstance(optimizer, keras.optimizers.ScheduleFreeAdamW)
    if is_averaged and state.name.endswith("_momentum"):
        return tf.convert_to_tensor(weights)
    return tf.constant(0, state.dtype)
