"""`rowwise`: Keras optimizers that begin afresh for rows which begin to train."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from partial_embedding.errors import check_flags
from partial_embedding.tensorflow.row_optimizer import Rowwise
from partial_embedding.tensorflow.table_state import state_in


def rowwise(optimizer: Any, lazy: bool = False) -> Any:
    """Make a Keras optimizer begin afresh for rows of a `PartialEmbedding` that begin to train.

    Keras counts steps once for the whole optimizer. With Adam, rows that join after many steps
    would move by several learning rates at first, since their young moments are not corrected. Here
    each row's steps count from the one that it joined at, and its state begins there. Clipping,
    weight decay, moving averages and accumulation are those of the optimizer. So are learning rates
    of rows that joined with an `lr_scale` or `warmup_steps`, times their factor, and with them the
    weight decay of these rows. Momentum is Keras's, which holds what was learned at the rate of its
    time.

    Args:
        optimizer: A Keras optimizer that moves each element by itself, not yet built, or its name.
            It is left as it is. Of a `LossScaleOptimizer` the inner one is wrapped, and of a
            `MultiOptimizer` those that step tables.
        lazy: Step only the rows that the batch touched, as TensorFlow Addons' LazyAdam did, so that
            the cost does not depend on how many rows train. Moments and weight decay of a row stand
            still while no batch touches it. Of a table that is read whole too, as by a tied head,
            or in a loop of TensorFlow, these are the rows whose gradient is not zero.

    Returns:
        A Keras optimizer, for `compile` or a loop of your own.

    Raises:
        InputError: The optimizer looks across rows, keeps other state, or is built; or `lazy` is
            asked for with an option that needs every row at every step.

    Example:
        >>> optimizer = rowwise(keras.optimizers.Adam(0.1, weight_decay=0.01), lazy=True)
        >>> float(optimizer.learning_rate), optimizer.weight_decay
        (0.10000000149011612, 0.01)
        >>> type(rowwise("adam")).__name__
        'Rowwise'
    """
    optimizer = keras.optimizers.get(optimizer)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return keras.optimizers.LossScaleOptimizer(
            rowwise(optimizer.inner_optimizer, lazy),
            optimizer.initial_scale,
            optimizer.dynamic_growth_steps,
        )
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        tables = TableOptimizers(optimizer._optimizer_map, lazy)
        return keras.optimizers.MultiOptimizer(tables, optimizer.loss_scale_factor)
    return Rowwise(optimizer, lazy)


@keras.saving.register_keras_serializable("partial_embedding.tensorflow")
class TableOptimizers:
    """Chooses the optimizer of a variable for a `MultiOptimizer`, wrapped where it is of a table.

    It asks a `keras.optimizers.OptimizerMap`, or a function of the variable.
    """

    def __init__(self, choose: Any, lazy: bool = False) -> None:
        check_flags(lazy=lazy)
        self.choose = choose
        self.lazy = lazy
        self._wrapped: list[tuple[Any, Any]] = []

    def __call__(self, variable: Any) -> Any:
        """The optimizer of a variable."""
        optimizer = self.choose(variable)
        if state_in(variable) is None:
            return optimizer
        for own, wrapped in self._wrapped:
            if own is optimizer:
                return wrapped
        with tf.init_scope():  # Keras asks while it traces the first step
            self._wrapped.append((optimizer, Rowwise(optimizer, self.lazy)))
        return self._wrapped[-1][1]

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"choose": keras.saving.serialize_keras_object(self.choose), "lazy": self.lazy}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TableOptimizers:
        """Make what `get_config` was taken from."""
        return cls(keras.saving.deserialize_keras_object(config["choose"]), config["lazy"])


def optimizer_of(model: Any, variable: Any) -> Any:
    """The optimizer that was built to step a variable, and so counts its steps; None without."""
    for optimizer in optimizers_in(model):
        if any(v is variable for v in optimizer._trainable_variables):
            return optimizer
    return None


def optimizers_in(model: Any) -> Iterator[Any]:
    """The optimizers among a model's attributes that step variables, not those that hold others."""
    for value in vars(model).values():
        if isinstance(value, keras.optimizers.Optimizer):
            yield from steppers(value)


def steppers(optimizer: Any) -> Iterator[Any]:
    """The optimizer itself, or those that it holds and that step variables in its place."""
    held = [getattr(optimizer, "inner_optimizer", None), *getattr(optimizer, "optimizers", ())]
    if held := [one for one in held if one is not None]:
        for one in held:
            yield from steppers(one)
    elif not isinstance(optimizer, keras.optimizers.MultiOptimizer):  # not built yet
        yield optimizer
