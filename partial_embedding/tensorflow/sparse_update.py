"""Stepping some rows of a variable with the own maths of a Keras optimizer."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf


def summed(slices: Any, num_rows: int) -> Any:
    """`tf.IndexedSlices` with one entry for each row, and void entries behind them.

    XLA needs static shapes, so the number of entries stays. Void entries come in as -0.0 for any
    row, and go out as zeros for the row `num_rows`, which there is not.

    Args:
        slices: Entries of shape (N, D) for rows that may occur several times, and void ones.
        num_rows: The number of rows.
    """
    # Comparisons take -0.0 for 0.
    is_void = tf.reduce_all((slices.values == 0) & (1 / slices.values < 0), axis=1)
    beyond = tf.cast(num_rows, slices.indices.dtype)
    indices = tf.where(is_void, beyond, slices.indices)
    order = tf.argsort(indices, stable=True)
    indices = tf.gather(indices, order)
    is_first = tf.concat([tf.ones_like(indices[:1]), indices[1:] - indices[:-1]], 0) > 0
    segments = tf.cumsum(tf.cast(is_first, tf.int32)) - 1
    number = tf.size(indices)
    values = tf.math.unsorted_segment_sum(tf.gather(slices.values, order), segments, number)
    rows = tf.math.unsorted_segment_max(indices, segments, number)
    # The largest of no entries is the least number that there is.
    return tf.IndexedSlices(values, tf.where(rows < 0, beyond, rows), slices.dense_shape)


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

    @property
    def shape(self) -> Any:
        """The shape (N, D)."""
        return self.value.shape

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

    def __truediv__(self, other: Any) -> Any:
        return self.value / other

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
    """The variables that a Keras optimizer keeps for the variables it was built with.

    Args:
        optimizer: A built Keras optimizer.
    """
    shared = {id(optimizer._iterations), id(optimizer._learning_rate)}
    return [variable for variable in optimizer.variables if id(variable) not in shared]


def first_value(optimizer: Any, state: Any, weights: Any) -> Any:
    """What a state variable holds before the first step.

    Args:
        optimizer: The Keras optimizer.
        state: One of `state_of(optimizer)`.
        weights: The variable that it belongs to.
    """
    if state.name.endswith("_accumulator") and hasattr(optimizer, "initial_accumulator_value"):
        return tf.constant(optimizer.initial_accumulator_value, state.dtype)
    if isinstance(optimizer, keras.optimizers.ScheduleFreeAdamW) and state.name.endswith(
        "_momentum"
    ):
        return tf.convert_to_tensor(weights)
    return tf.constant(0, state.dtype)
