"""A Keras optimizer that begins afresh for rows which begin to train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from partial_embedding.errors import InputError
from partial_embedding.tensorflow.lr_scale import RowRates
from partial_embedding.tensorflow.sparse_update import (
    HeldRows,
    first_value,
    state_of,
    summed,
    worker,
)
from partial_embedding.tensorflow.table_state import Split

# They move each element by itself, with no state but one value per element and a count of steps.
_SERVED = (
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Ftrl",
    "Lion",
    "RMSprop",
    "SGD",
    "ScheduleFreeAdamW",
)
# The most float32 that a processor's vectors hold, AVX-512's.
_LANES = 16
_PIPELINE = (
    "name",
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
)


def rowwise(optimizer: Any, lazy: bool = False, rate_scales: bool = False) -> Rowwise:
    """Make a Keras optimizer begin afresh for rows of a `PartialEmbedding` that begin to train.

    Keras counts steps once for the whole optimizer. With Adam, rows that join after many steps
    would move by several learning rates at first, since their young moments are not corrected. Here
    each row's steps count from the one that it joined at, and its state begins there. Clipping,
    weight decay, moving averages and accumulation are those of the optimizer.

    Args:
        optimizer: A Keras optimizer that moves each element by itself, not yet built. It is left
            as it is.
        lazy: Step only the rows that the batch touched, as TensorFlow Addons' LazyAdam did, so that
            the cost does not depend on how many rows train. Moments and weight decay of a row stand
            still while no batch touches it.
        rate_scales: Keep a `RateScale` for each reserved row, so that rows which join later may
            learn more slowly or warm up: the learning rate of a row, and with it its weight decay,
            is the optimizer's times the factor of its rate_scale. Momentum is Keras's, which holds
            what was learned at the rate of its time.

    Returns:
        A Keras optimizer, for `compile`, `LossScaleOptimizer` or a loop of your own.

    Raises:
        InputError: The optimizer looks across rows, keeps other state, or is built; or `lazy` is
            asked for with an option that needs every row at every step.

    Example:
        >>> optimizer = rowwise(keras.optimizers.Adam(0.1, weight_decay=0.01), lazy=True)
        >>> float(optimizer.learning_rate), optimizer.weight_decay
        (0.10000000149011612, 0.01)
    """
    return Rowwise(optimizer, lazy, rate_scales)


@dataclass
class _Table:
    """A partial table, and the optimizer of its rows."""

    split: Split
    weights: Any
    optimizer: Any
    # The optimizer step at which each reserved row joined, or -1; shape (R,).
    joined_at: Any
    # The signature of the rows that trained at the last step.
    seen: Any
    rate_scales: RowRates | None


@dataclass
class _Parts:
    """The optimizers behind the wrapper, where Keras does not look: it would save them twice."""

    rest: Any
    # One entry for each variable; None for one that is no table.
    tables: list[_Table | None]


@keras.saving.register_keras_serializable("partial_embedding")
class Rowwise(keras.optimizers.Optimizer):
    """The optimizer that `rowwise` makes.

    Args:
        optimizer: As for `rowwise`.
        lazy: As for `rowwise`.
        rate_scales: As for `rowwise`.

    Raises:
        InputError: As for `rowwise`.
    """

    def __init__(self, optimizer: Any, lazy: bool = False, rate_scales: bool = False) -> None:
        _check(optimizer, lazy)
        rate = optimizer._learning_rate
        super().__init__(
            learning_rate=float(rate.numpy()) if isinstance(rate, keras.Variable) else rate,
            **{key: getattr(optimizer, key) for key in _PIPELINE},
        )
        self.wrapped = optimizer
        self.lazy = lazy
        self.rate_scales = rate_scales
        # The wrapper averages and accumulates; the copies hold state and do the maths of a step.
        # Read now, since Keras may build optimizers while it traces, where nothing can be read.
        config = {
            **optimizer.get_config(),
            "use_ema": False,
            "gradient_accumulation_steps": None,
        }
        self._copy = partial(type(optimizer).from_config, config)
        self._parts: _Parts | None = None

    def build(self, variables: list[Any]) -> None:
        """Make the state of each table and of all other variables."""
        if self.built:
            return
        context = tf.distribute.get_replica_context()
        if self.lazy and context is not None and context.num_replicas_in_sync > 1:
            # One replica's lookups would already be traced for a dense gradient.
            raise InputError(
                "lazy=True on several replicas needs an optimizer that is built before the first "
                "step. Received one that is not. Call optimizer.build(model.trainable_variables)."
            )
        super().build(variables)
        others = [v for v in variables if not hasattr(v, "partial_rows")]
        rest = self._copy()
        rest.build(others)
        tables = [self._table(v) if hasattr(v, "partial_rows") else None for v in variables]
        self._parts = _Parts(rest, tables)

    def _table(self, weights: Any) -> _Table:
        optimizer = self._copy()
        optimizer.build([weights])
        split = weights.partial_rows
        split.sparse_gradient = self.lazy
        if self.lazy and split.constrained:
            raise InputError(
                "lazy=True steps touched rows only, a constraint looks at all. Received a "
                "PartialEmbedding with embeddings_constraint. Use one of the two."
            )
        never = keras.initializers.Constant(-1)
        shape = (weights.shape[0],)
        count = self.add_variable(shape, never, "int64", name="joined_at")
        seen = self.add_variable((), "zeros", "int64", name="seen")
        split.rate_scales = None
        if self.rate_scales:
            lr = self.add_variable(shape, "ones", "float32", name="lr_factor")
            warmup = self.add_variable(shape, "ones", "int64", name="warmup")
            split.rate_scales = RowRates(count, lr, warmup)
        return _Table(split, weights, optimizer, count, seen, split.rate_scales)

    @property
    def _tables(self) -> list[_Table]:
        return [table for table in self._parts.tables if table] if self._parts else []

    @property
    def variables(self) -> list[Any]:
        """The wrapper's variables, then the state of the tables, then that of the others."""
        optimizers = [table.optimizer for table in self._tables]
        if self._parts is not None:
            optimizers.append(self._parts.rest)
        return [*super().variables, *(v for one in optimizers for v in state_of(one))]

    # The pipeline of an optimizer step, in the order in which Keras goes through it

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Step, as every Keras optimizer does."""
        if not self.built and trainable_variables is not None:
            self.build(list(trainable_variables))
        variables = (
            self._trainable_variables if trainable_variables is None else trainable_variables
        )
        # With one entry for each row, the norm of the entries is that of the gradient.
        grads = [
            summed(g, v.shape[0]) if self._is_lazy(v) and isinstance(g, tf.IndexedSlices) else g
            for g, v in zip(grads, variables, strict=True)
        ]
        with self._stepping():
            super().apply(grads, trainable_variables)

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """Make the tables known as stepped by this optimizer, and lazily without pinning.

        Pinning reads all reserved rows, while lazily no other row than live ones move. Keras asks
        for constraints while it traces the step, so nothing remains changed.
        """
        constraints = [table.weights.constraint for table in self._tables]
        for table in self._tables:
            table.split.is_stepped_rowwise = True
            if self.lazy:
                table.weights.constraint = None
        try:
            yield
        finally:
            for table, constraint in zip(self._tables, constraints, strict=True):
                table.split.is_stepped_rowwise = False
                table.weights.constraint = constraint

    def _clip_gradients(self, grads: list[Any]) -> list[Any]:
        values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in grads]
        return [
            tf.IndexedSlices(v, g.indices, g.dense_shape) if isinstance(g, tf.IndexedSlices) else v
            for g, v in zip(grads, super()._clip_gradients(values), strict=True)
        ]

    def _apply_weight_decay(self, variables: list[Any]) -> None:
        # The last call before the maths: state that begins at the weights begins before they decay.
        self._each(variables, self._welcome)
        dense = [v for v in variables if not self._is_lazy(v)]
        super()._apply_weight_decay([v for v in dense if not self._is_scaled(v)])
        if self.weight_decay is not None:
            self._each([v for v in dense if self._is_scaled(v)], self._decay)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Exclude variables from weight decay, as every Keras optimizer does."""
        self.wrapped.exclude_from_weight_decay(var_list, var_names)

    def _use_weight_decay(self, variable: Any) -> bool:
        return bool(self.wrapped._use_weight_decay(variable))

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Step one variable."""
        table = self._table_of(variable)
        if table is None:
            helper = worker(self._built.rest, self.iterations)
            helper.update_step(gradient, variable, learning_rate)
        elif isinstance(gradient, tf.IndexedSlices):
            # Again, as replicas have put theirs side by side.
            gradient = summed(gradient, variable.shape[0])
            self._step_some(table, gradient, variable, learning_rate)
        elif self.lazy:
            # Of a head tied to the table, or of a step that was traced before this was built.
            number = variable.shape[0]
            rows = tf.where(tf.reduce_any(gradient != 0, axis=1), tf.range(number), number)
            self._step_some(table, tf.IndexedSlices(gradient, rows), variable, learning_rate)
        else:
            ages = self._ages(table.joined_at)[:, tf.newaxis]
            if table.rate_scales is not None:
                learning_rate = table.rate_scales.rates(learning_rate, ages)
            worker(table.optimizer, ages).update_step(gradient, variable, learning_rate)

    def _update_model_variables_moving_average(self, variables: list[Any]) -> None:
        if not self.use_ema:
            return
        averages = self._model_variables_moving_average
        for variable, average, table in zip(variables, averages, self._built.tables, strict=True):
            steps = self.iterations if table is None else self._ages(table.joined_at)[:, tf.newaxis]
            kept = tf.cast(steps != 0, average.dtype) * self.ema_momentum
            average.assign(kept * average + (1 - kept) * variable)

    # Rows

    def _is_lazy(self, variable: Any) -> bool:
        return self.lazy and self._table_of(variable) is not None

    def _is_scaled(self, variable: Any) -> bool:
        return self.rate_scales and self._table_of(variable) is not None

    def _table_of(self, variable: Any) -> _Table | None:
        index: int = self._get_variable_index(variable)
        return self._built.tables[index]

    @property
    def _built(self) -> _Parts:
        assert self._parts is not None  # Keras builds before it steps
        return self._parts

    def _ages(self, joined_at: Any) -> Any:
        """The steps that each row has made; 0 for rows that do not train."""
        joined_at = tf.convert_to_tensor(joined_at)
        now = tf.cast(self.iterations, tf.int64)
        return tf.where(joined_at >= 0, now - joined_at, 0)

    def _each(self, variables: list[Any], step: Any) -> None:
        """Call `step` for the table of each variable, on every replica."""

        def update(distribution: Any, variables: list[Any]) -> None:
            for variable in variables:
                table = self._table_of(variable)
                if table is not None:
                    distribution.extended.update(
                        variable, lambda v, table=table: step(table, v), group=False
                    )

        values = [v.value if isinstance(v, keras.Variable) else v for v in variables]
        tf.__internal__.distribute.interim.maybe_merge_call(
            update, self._distribution_strategy, values
        )

    def _welcome(self, table: _Table, weights: Any) -> None:
        """Begin afresh for rows that train since the last step."""

        def begin() -> None:
            live = table.split.live()
            joins = live & (table.joined_at < 0)
            for state in state_of(table.optimizer):
                first = first_value(table.optimizer, state, weights)
                state.assign(tf.where(joins[:, tf.newaxis], first, state))
            now = tf.cast(self.iterations, tf.int64)
            since = tf.where(joins, now, table.joined_at)
            table.joined_at.assign(tf.where(live, since, -1))
            table.seen.assign(table.split.signature)

        tf.cond(tf.equal(table.seen, table.split.signature), lambda: None, begin)

    def _decay(self, table: _Table, weights: Any) -> None:
        """Decay weights as Keras does, at the learning rate of each row."""
        if not self._use_weight_decay(weights) or table.rate_scales is None:
            return
        rates = table.rate_scales.rates(
            self.learning_rate, self._ages(table.joined_at)[:, tf.newaxis]
        )
        decay = tf.cast(self.weight_decay, weights.dtype)
        weights.assign_sub(weights * decay * tf.cast(rates, weights.dtype))

    def _step_some(self, table: _Table, gradient: Any, variable: Any, rate: Any) -> None:
        """Step the rows of a table that a gradient has an entry for.

        Void entries repeat the first one, so that writing them all writes each row's one value. If
        the first is void too, no entry is for row 0, which is written as it was.
        """
        states, is_void = state_of(table.optimizer), gradient.indices == variable.shape[0]
        entries = tf.where(is_void, 0, tf.range(tf.size(is_void)))
        # TensorFlow's float32 `pow` rounds otherwise behind the last full vector of the processor.
        entries = tf.pad(entries, [[0, -tf.size(entries) % _LANES]])
        is_void, indices, values = (
            tf.gather(x, entries) for x in (is_void, gradient.indices, gradient.values)
        )
        slots = tf.where(is_void, tf.zeros_like(indices), indices)
        before = [tf.gather(v, slots) for v in (variable, *(s.value for s in states))]
        ages = self._ages(tf.gather(table.joined_at.value, slots))[:, tf.newaxis]
        if table.rate_scales is not None:
            rate = table.rate_scales.rates(rate, ages, slots)
        key = self._var_key(variable)
        weights, *held = (HeldRows(rows, key) for rows in before)
        if self.weight_decay is not None and self._use_weight_decay(variable):
            decay = tf.cast(self.weight_decay, weights.dtype)
            weights.assign_sub(weights * decay * tf.cast(rate, weights.dtype))
        pairs = list(zip(states, held, strict=True))
        worker(table.optimizer, ages, pairs).update_step(values, weights, rate)
        targets = (variable, *(s.value for s in states))
        for target, old, new in zip(targets, before, (weights, *held), strict=True):
            rows = tf.where(is_void[:, tf.newaxis], old, new.value)
            target.scatter_update(tf.IndexedSlices(rows, slots))

    def get_config(self) -> dict[str, Any]:
        """The wrapped optimizer, at the learning rate of now."""
        wrapped = keras.saving.serialize_keras_object(self.wrapped)
        wrapped["config"]["learning_rate"] = super().get_config()["learning_rate"]
        return {"optimizer": wrapped, "lazy": self.lazy, "rate_scales": self.rate_scales}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Rowwise:
        """Make the optimizer of `get_config`."""
        optimizer = keras.saving.deserialize_keras_object(
            config["optimizer"], custom_objects=custom_objects
        )
        return cls(optimizer, config["lazy"], config.get("rate_scales", False))


def _check(optimizer: Any, lazy: bool) -> None:
    name = type(optimizer).__name__
    if type(optimizer) is not getattr(keras.optimizers, name, None) or name not in _SERVED:
        raise InputError(
            f"rowwise serves {', '.join(_SERVED)}, which move each row by itself. Received: {name}."
            " Compile with it as it is: frozen rows keep their bits all the same. A"
            " LossScaleOptimizer goes around rowwise."
        )
    if optimizer.built:
        raise InputError(
            "rowwise wraps an optimizer before its first step. Received one that is built. Make a "
            "new one."
        )
    if optimizer.use_ema and optimizer.gradient_accumulation_steps:
        raise InputError(
            "an average of rows that join between two steps has no beginning. Received use_ema "
            "with gradient_accumulation_steps. Use one of the two."
        )
    if lazy and name == "ScheduleFreeAdamW":
        raise InputError(
            "lazy=True lets a row stand still. Received ScheduleFreeAdamW, which averages each row "
            "over every step. Leave lazy=False."
        )
    needs_all = ("use_ema", "gradient_accumulation_steps", "loss_scale_factor")
    if lazy and (given := [key for key in needs_all if getattr(optimizer, key)]):
        raise InputError(
            f"lazy=True steps touched rows only. Received {given[0]}, which needs every row. Leave "
            "it out; for half precision, put a LossScaleOptimizer around."
        )
