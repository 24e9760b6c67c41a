"""The optimizer that begins afresh for rows which begin to train: its state and its step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from partial_embedding.errors import InputError
from partial_embedding.rows.vocabulary import Ids
from partial_embedding.tensorflow.lr_scale import RowScales
from partial_embedding.tensorflow.served import PIPELINE, check_served, settings_of
from partial_embedding.tensorflow.sparse_update import (
    HeldRows,
    first_value,
    row_squares,
    state_of,
    summed,
    worker,
    write_rows,
)
from partial_embedding.tensorflow.table_state import TableState, state_in


@dataclass
class _Table:
    """A partial table, and the optimizer of its rows."""

    state: TableState
    optimizer: Any
    scales: RowScales
    # The sum of squares of each row's last gradient, float32, shape (R,), where it is measured.
    squares: Any = None


@dataclass
class _Hidden:
    """What Keras would track as state, or refuse to change, were it an attribute of its own."""

    # The optimizers behind the wrapper, whose variables are its own: of all variables that are no
    # table, and one entry for each variable, None for one of these.
    rest: Any = None
    tables: list[_Table | None] = field(default_factory=list)
    # What is known of a step while it is traced.
    is_stepping: bool = False
    variables: list[Any] = field(default_factory=list)
    # A variable; None where nothing ever measures.
    is_measured: Any = None


@keras.saving.register_keras_serializable("partial_embedding.tensorflow")
class Rowwise(keras.optimizers.Optimizer):
    """The optimizer that `rowwise` makes.

    Args:
        optimizer: As for `rowwise`, but no optimizer of optimizers.
        lazy: As for `rowwise`.

    Raises:
        InputError: As for `rowwise`.

    Example:
        >>> from partial_embedding.tensorflow import PartialEmbedding
        >>> layer = PartialEmbedding(9, 2, trainable_rows=[3], reserve_rows=[3, 5])
        >>> layer.build()
        >>> optimizer = Rowwise(keras.optimizers.Adam())
        >>> optimizer.build(layer.trainable_variables)
        >>> [tuple(v.shape) for v in optimizer.variables if v.name.endswith("_momentum")]
        [(2, 2)]
    """

    def __init__(self, optimizer: Any, lazy: bool = False) -> None:
        check_served(optimizer, lazy)
        rate = optimizer._learning_rate
        super().__init__(
            learning_rate=float(rate.numpy()) if isinstance(rate, keras.Variable) else rate,
            **{key: getattr(optimizer, key) for key in PIPELINE},
        )
        self.lazy = lazy
        # The wrapper averages, accumulates and knows the learning rate; the copies hold state and
        # do the maths of a step.
        off = {"use_ema": False, "gradient_accumulation_steps": None}
        kind: Any = type(optimizer)
        self._copy = partial(kind, **{**settings_of(optimizer), **off})
        for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"):
            if name in vars(optimizer):
                self.__dict__[name] = vars(optimizer)[name]
        self._hidden = _Hidden()

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
        states = list(map(state_in, variables))
        for state in states:
            if self.lazy and state is not None and state.layer.embeddings_constraint is not None:
                raise InputError(
                    "lazy=True steps touched rows only, a constraint looks at all. Received a "
                    "PartialEmbedding with embeddings_constraint. Use one of the two."
                )
        super().build(variables)
        rest = self._copy()
        rest.build([v for v, state in zip(variables, states, strict=True) if state is None])
        self._hidden.rest = rest
        self._hidden.tables = [None if state is None else self._table(state) for state in states]
        for optimizer in (*(table.optimizer for table in self._tables), rest):
            for variable in state_of(optimizer):
                # As a variable of its own: whatever saves, restores or counts an optimizer's
                # variables finds all of them in the one list that every Keras optimizer has.
                self._track_variable(variable)

    def _table(self, state: TableState) -> _Table:
        rows, optimizer = state.rows, self._copy()
        optimizer.build([rows])
        shape, name = (rows.shape[0],), rows.path.replace("/", "_")
        never = keras.initializers.Constant(-1)
        joined_at = self.add_variable(shape, never, "int64", name=f"{name}_joined_at")
        scale = self.add_variable(shape, "ones", "float32", name=f"{name}_lr_scale")
        warmup = self.add_variable(shape, "ones", "int64", name=f"{name}_warmup_steps")
        state.optimizer = self
        state.optimizers.add(self)
        return _Table(state, optimizer, RowScales(joined_at, scale, warmup))

    @property
    def _tables(self) -> list[_Table]:
        return [table for table in self._hidden.tables if table]

    @property
    def is_stepping(self) -> bool:
        """Whether a step of this optimizer is being traced or made."""
        return self._hidden.is_stepping

    def row_scales(self, rows: Any) -> RowScales:
        """What factors the learning rates of the rows of a table that this was built with have."""
        table = self._table_of(rows)
        assert table is not None, "asked for variables of tables alone"
        return table.scales

    # The pipeline of an optimizer step, in the order in which Keras goes through it

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Step, as every Keras optimizer does."""
        if not self.built and trainable_variables is not None:
            self.build(list(trainable_variables))
        variables = (
            self._trainable_variables if trainable_variables is None else trainable_variables
        )
        grads = [
            g if g is None else self._entered(g, self._table_of(v))
            for g, v in zip(grads, variables, strict=True)
        ]
        with self._stepping():
            super().apply(grads, trainable_variables)

    def _entered(self, gradient: Any, table: _Table | None) -> Any:
        """A gradient as it goes through the pipeline."""
        if table is not None and isinstance(gradient, tf.IndexedSlices):
            # With one entry for each row, the norm of the entries is that of the gradient.
            return summed(gradient)
        if table is not None and self.lazy:
            table.state.check_dense_gradient()
        return gradient

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """Make the tables known as stepped by this optimizer, and lazily without pinning.

        Pinning reads all reserved rows, while lazily no other row than unfrozen ones move. Keras
        asks for constraints while it traces the step, so nothing remains changed.
        """
        pinned = [table.state.rows for table in self._tables if self.lazy]
        constraints = [rows.constraint for rows in pinned]
        self._hidden.is_stepping = True
        for rows in pinned:
            rows.constraint = None
        try:
            yield
        finally:
            self._hidden.is_stepping = False
            for rows, constraint in zip(pinned, constraints, strict=True):
                rows.constraint = constraint

    def _backend_apply_gradients(self, grads: list[Any], variables: list[Any]) -> None:
        self._hidden.variables = variables
        super()._backend_apply_gradients(grads, variables)

    def _clip_gradients(self, grads: list[Any]) -> list[Any]:
        # Unscaled, averaged over accumulated batches, and only in steps that are made.
        self._measure(grads)
        values = [g.values if isinstance(g, tf.IndexedSlices) else g for g in grads]
        return [
            tf.IndexedSlices(v, g.indices, g.dense_shape) if isinstance(g, tf.IndexedSlices) else v
            for g, v in zip(grads, super()._clip_gradients(values), strict=True)
        ]

    def _apply_weight_decay(self, variables: list[Any]) -> None:
        # The last call before the maths: state that begins at the weights begins before they decay.
        self._each(variables, self._welcome)
        super()._apply_weight_decay([v for v in variables if self._table_of(v) is None])
        if self.weight_decay is not None and not self.lazy:
            self._each(variables, self._decay)

    def _all_reduce_sum_gradients(self, grads_and_vars: list[Any]) -> list[Any]:
        # Of one replica there is nothing to sum, and TensorFlow never frees the graph of a function
        # in which dense gradients were reduced.
        if self._distribution_strategy.num_replicas_in_sync == 1:
            return grads_and_vars
        reduced: list[Any] = super()._all_reduce_sum_gradients(grads_and_vars)
        return reduced

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Step one variable."""
        table = self._table_of(variable)
        if table is None:
            rest = worker(self._hidden.rest, self.iterations)
            rest.update_step(gradient, variable, learning_rate)
        elif self.lazy:
            if not isinstance(gradient, tf.IndexedSlices):
                # Of a head tied to the table, or of the step in which this was built.
                every = tf.range(variable.shape[0], dtype=tf.int64)
                moves, seen = tf.reduce_any(gradient != 0, axis=1), table.state.take_looked_up()
                rows = tf.where(moves if seen is None else moves | seen, every, -1)
                gradient = summed(tf.IndexedSlices(gradient, rows))
            elif self._distribution_strategy.num_replicas_in_sync > 1:
                # Again, as replicas have put theirs side by side.
                gradient = summed(gradient)
            self._step_some(table, gradient, variable, learning_rate)
        else:
            if isinstance(gradient, tf.IndexedSlices):  # as an optimizer built later is lazy
                gradient = tf.math.unsorted_segment_sum(
                    gradient.values, gradient.indices, variable.shape[0]
                )
            ages = self._ages(table)
            rates = table.scales.rates(learning_rate, ages)
            worker(table.optimizer, ages).update_step(gradient, variable, rates)

    def _update_model_variables_moving_average(self, variables: list[Any]) -> None:
        averages = self._model_variables_moving_average
        for variable, average, table in zip(variables, averages, self._hidden.tables, strict=True):
            steps = self.iterations if table is None else self._ages(table)
            kept = tf.cast(steps != 0, average.dtype) * self.ema_momentum
            average.assign(kept * average + (1 - kept) * variable)

    # Gradients by row, for what watches a run

    def measure_gradients(self, measure: bool) -> None:
        """Keep the squares of each row's gradient in the steps to come, or no longer.

        What keeps them is part of a step that is traced after the first call; later calls trace
        nothing again.
        """
        if self._hidden.is_measured is None:
            self._hidden.is_measured = tf.Variable(measure, trainable=False)
        self._hidden.is_measured.assign(measure)

    @property
    def is_measurable(self) -> bool:
        """Whether steps that are traced now can be measured."""
        return self._hidden.is_measured is not None

    def row_squares(self, layer: Any) -> tuple[Ids, NDArray[np.float32]] | None:
        """The rows of a layer whose last measured gradient is not zero, and the sums of squares.

        They are sorted ids, int64, and float32, both of shape (n,); None if none was measured.
        """
        for table in self._tables:
            if table.squares is not None and table.state is layer.table_state:
                squares = table.squares.numpy()
                slots = np.flatnonzero(squares)
                return table.state.reserved[slots], squares[slots]
        return None

    def _measure(self, grads: list[Any]) -> None:
        if not self.is_measurable:
            return
        pairs = [
            (table, gradient)
            for gradient, variable in zip(grads, self._hidden.variables, strict=True)
            if (table := self._table_of(variable)) is not None
        ]
        for table, _ in pairs:
            if table.squares is None:
                with tf.init_scope():
                    table.squares = tf.Variable(
                        tf.zeros_like(table.state.unfrozen), trainable=False
                    )

        def note() -> None:
            for table, gradient in pairs:
                table.squares.assign(row_squares(gradient, len(table.state.reserved)))

        tf.cond(self._hidden.is_measured, note, lambda: None)

    # Rows

    def _table_of(self, variable: Any) -> _Table | None:
        index: int = self._get_variable_index(variable)
        return self._hidden.tables[index]

    def _ages(self, table: _Table, slots: Any = None) -> Any:
        """The steps that rows have made, or those in some slots; 0 for rows that do not train."""
        kept = table.scales.joined_at
        joined_at = tf.convert_to_tensor(kept) if slots is None else tf.gather(kept.value, slots)
        now = tf.cast(self.iterations, tf.int64)
        return tf.where(joined_at >= 0, now - joined_at, 0)[:, tf.newaxis]

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
        # As Keras does around its own steps: one replica's trace may not update variables of all.
        tf.__internal__.distribute.interim.maybe_merge_call(
            update, self._distribution_strategy, values
        )

    def _welcome(self, table: _Table, weights: Any) -> None:
        """Begin afresh for rows that train since the last step."""
        trains, kept = table.state.is_unfrozen(), table.scales.joined_at
        joined_at, now = tf.convert_to_tensor(kept), tf.cast(self.iterations, tf.int64)

        def begin() -> None:
            joins = trains & (joined_at < 0)
            for state in state_of(table.optimizer):
                first = first_value(table.optimizer, state, weights)
                state.assign(tf.where(joins[:, tf.newaxis], first, state))
            # Where the count of steps was set back, rows count on from there, as Keras does: no row
            # is younger than 0, at which Adam's correction would be the root of a negative number.
            since = tf.where(joins, now, tf.minimum(joined_at, now))
            kept.assign(tf.where(trains, since, -1))

        # From the two variables alone, so that it is right after either of them was restored.
        counts = (joined_at >= 0) & (joined_at <= now)
        tf.cond(tf.reduce_any(trains != counts), begin, lambda: None)

    def _decay(self, table: _Table, weights: Any) -> None:
        """Decay weights as Keras does, at the learning rate of each row."""
        if not self._use_weight_decay(weights):
            return
        rates = table.scales.rates(self.learning_rate, self._ages(table))
        decay = tf.cast(self.weight_decay, weights.dtype)
        weights.assign_sub(weights * decay * tf.cast(rates, weights.dtype))

    def _step_some(self, table: _Table, gradient: Any, variable: Any, rate: Any) -> None:
        """Step the rows of a table that a gradient has an entry for."""
        states = [state.value for state in state_of(table.optimizer)]
        # What is computed for void entries is not written.
        slots = tf.maximum(gradient.indices, 0)
        key = self._var_key(variable)
        weights, *held = (HeldRows(tf.gather(v, slots), key) for v in (variable, *states))
        ages = self._ages(table, slots)
        rate = table.scales.rates(rate, ages, slots)
        if self.weight_decay is not None and self._use_weight_decay(variable):
            decay = tf.cast(self.weight_decay, weights.dtype)
            weights.assign_sub(weights * decay * tf.cast(rate, weights.dtype))
        pairs = zip(state_of(table.optimizer), held, strict=True)
        worker(table.optimizer, ages, pairs).update_step(gradient.values, weights, rate)
        for target, new in zip((variable, *states), (weights, *held), strict=True):
            write_rows(target, gradient.indices, new.value)

    def get_config(self) -> dict[str, Any]:
        """The wrapped optimizer, at the learning rate of now."""
        wrapped = keras.saving.serialize_keras_object(self._copy())
        own = {key: getattr(self, key) for key in PIPELINE}
        rate = super().get_config()["learning_rate"]
        wrapped["config"].update({**own, "learning_rate": rate})
        return {"optimizer": wrapped, "lazy": self.lazy}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Rowwise:
        """Make the optimizer of `get_config`."""
        optimizer = keras.saving.deserialize_keras_object(
            config["optimizer"], custom_objects=custom_objects
        )
        return cls(optimizer, config["lazy"])
