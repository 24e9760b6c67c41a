"""What rows of a split table are where: a frozen table, and a variable of the reserved rows.

A `tf.Variable` cannot change shape inside `fit`, and no Keras optimizer can be told to leave rows
of a variable alone. So the rows that may ever train live in a variable of their own. A third
variable says which of them are unfrozen; it is assigned without retracing. All three are weights
of the layer, so that whatever Keras or TensorFlow saves, copies or restores is the whole state.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager.record import could_possibly_record

from partial_embedding.errors import InputError
from partial_embedding.rows import Config
from partial_embedding.rows.vocabulary import Ids
from partial_embedding.schedule import RateScale
from partial_embedding.tensorflow.sparse_update import choose_rows, noted, summed


def state_in(variable: Any) -> TableState | None:
    """The table that a variable is the reserved rows of."""
    return getattr(variable, "table_state", None)


class TableState:
    """Reads and moves rows between a frozen table and the variable of its reserved rows.

    An unfrozen row is the one in `rows`, every other row is the one in `table`. What an optimizer,
    a moving average or code that averages trainable variables does to reserved rows that are not
    unfrozen therefore never reaches the model. They are pinned to their row of the table at each
    step all the same, since some optimizers look across rows.

    Args:
        layer: The layer, which gets the variables; its regularizer and constraint apply to the
            reserved rows.
        table: The frozen table, a Keras variable of shape (V, D).
        reserved: Ids of the reserved rows, sorted, int64, shape (R,).
        unfrozen: Ids of those of them that train.
    """

    def __init__(self, layer: Any, table: Any, reserved: Ids, unfrozen: Ids) -> None:
        self.layer = layer
        self.table = table
        self.reserved = reserved
        # The `Rowwise` that was built last for these rows, and all that were.
        self.optimizer: Any = None
        self.optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
        # What `take_looked_up` gives.
        self._looked_up: Any = None
        # The graph of the last look-up that is differentiated, where no optimizer was known yet.
        self._graph_of_none: Callable[[], Any] = lambda: None
        self._is_freed = False
        with tf.init_scope():
            # int64, as TensorFlow keeps int32 tensors off the GPU.
            self._reserved = tf.constant(reserved, tf.int64)
            # Ids are searched for among all but the last, so that none is found beyond the last.
            self._all_but_last = self._reserved[:-1][tf.newaxis]
        # What each replica computes is the same, and a mean of more than two could round.
        settings = {"autocast": False, "aggregation": "only_first_replica"}
        # The reserved rows in rising order, shape (R, D).
        self.rows = layer.add_weight(
            shape=(reserved.size, layer.output_dim),
            initializer=lambda *_, **__: self.kept(),
            name="embeddings",  # Muon knows an embedding by its name
            regularizer=self.regularize if layer.embeddings_regularizer else None,
            # Optimizers apply a constraint last, after decay and moving averages.
            constraint=self.constrain,
            **settings,
        )
        # Above 0 for those that train, shape (R,).
        self.unfrozen = layer.add_weight(
            shape=(reserved.size,),
            initializer=lambda *_, **__: tf.constant(np.isin(reserved, unfrozen), tf.float32),
            # A number, so that code which averages weights can average it.
            dtype="float32",
            name="unfrozen",
            trainable=False,
            **settings,
        )
        # Where optimizers find it.
        self.rows.table_state = self

    @property
    def trainable_rows(self) -> Ids:
        """Ids of the rows that train now: sorted, int64, shape (K,)."""
        with tf.init_scope():  # also while a graph is traced
            ids: Ids = self.reserved[self.unfrozen.numpy() > 0]
        return ids

    def is_unfrozen(self) -> Any:
        """Which reserved rows train now, a boolean tensor of shape (R,)."""
        return tf.convert_to_tensor(self.unfrozen.value) > 0

    def look_up(self, ids: Any) -> Any:
        """The rows of a dense tensor of ids, of shape (*ids.shape, D)."""
        self._free_with_the_layer()
        flat = tf.reshape(ids, [-1])
        # `tf.gather` of a variable reads the rows only; reading the variable first would copy all
        # of it at every step once a row of it has been assigned.
        frozen = tf.gather(self.table.value, flat)
        slots = self._slots_of(flat)
        sparse = self.optimizer is not None and self.optimizer.lazy
        rows = choose_rows(self.rows.value, slots, frozen, sparse)
        if could_possibly_record():  # private, since nothing public says that a tape records
            self._graph_of_none = lambda: None
            # A lazy optimizer may be built after this look-up, and a dense gradient does not tell a
            # row that was touched by one of zero. A function that steps is traced once more then.
            if self.optimizer is None and tf.executing_eagerly():
                rows = noted(rows, partial(self._note_looked_up, slots))
            elif self.optimizer is None:
                self._graph_of_none = weakref.ref(_outermost_graph())
        return tf.reshape(rows, tf.concat([tf.shape(ids), self.table.shape[1:]], 0))

    def _note_looked_up(self, slots: Any) -> None:
        # Negative slots are in no segment, and an empty segment has the least number.
        looked_up = tf.math.unsorted_segment_max(slots, slots, len(self.reserved)) >= 0
        self._looked_up = looked_up if self._looked_up is None else self._looked_up | looked_up

    def take_looked_up(self) -> Any:
        """Which reserved rows eager gradients since the last step were of, shape (R,); or None."""
        looked_up, self._looked_up = self._looked_up, None
        return looked_up

    def check_dense_gradient(self) -> None:
        """Refuse a dense gradient whose look-ups the lazy optimizer that steps it cannot know."""
        if self._graph_of_none() not in (None, _outermost_graph()):
            raise InputError(
                "lazy=True steps the rows that were looked up, and a dense gradient does not name "
                f"them. Received one for {self.layer.name!r}, of a tf.function that was traced "
                "before the optimizer was built. Call optimizer.build(model.trainable_variables) "
                "first, and make the function anew."
            )

    def _free_with_the_layer(self) -> None:
        """Free the memory of the variables when nothing refers to them any more.

        While an optimizer of Keras reduces dense gradients, TensorFlow registers a gradient
        function for ever. That holds the graph of the step, and the graph a handle to the memory.
        """
        values = [self.table.value, self.rows.value]
        # Keras looks for shapes before it makes variables.
        if self._is_freed or not all(isinstance(value, tf.Variable) for value in values):
            return
        self._is_freed = True
        for value in values:
            for part in getattr(value, "values", (value,)):
                weakref.finalize(part, _empty, part.handle, part.dtype).atexit = False

    def _slots_of(self, ids: Any) -> Any:
        """The place of each id in `rows`, or -1 for one that does not train; both of shape (N,)."""
        ids = tf.cast(ids, tf.int64)
        # `tf.searchsorted` without its work on shapes.
        places = tf.raw_ops.LowerBound(
            sorted_inputs=self._all_but_last, values=tf.expand_dims(ids, 0), out_type=tf.int64
        )
        places = tf.reshape(places, [-1])
        is_reserved = tf.gather(self._reserved, places) == ids
        trains = is_reserved & (tf.gather(self.unfrozen.value, places) > 0)
        return tf.where(trains, places, -1)

    def merged(self) -> Any:
        """The whole table as one tensor of shape (V, D), through which unfrozen rows train."""
        rows = tf.where(self.is_unfrozen()[:, tf.newaxis], self.rows.value, self.kept())
        table = tf.convert_to_tensor(self.table.value)
        return tf.tensor_scatter_nd_update(table, self._reserved[:, tf.newaxis], rows)

    def table_gradient(self, gradient: Any) -> Any:
        """The gradient of the whole table, `tf.IndexedSlices`, from that of the reserved rows."""
        shape = tf.constant(tuple(self.table.shape), tf.int64)
        if isinstance(gradient, tf.IndexedSlices):
            gradient = summed(gradient)
            ids = tf.gather(self._reserved, tf.maximum(gradient.indices, 0))
            return tf.IndexedSlices(gradient.values, ids, shape)
        return tf.IndexedSlices(gradient, self._reserved, shape)

    def pin(self, rows: Any) -> Any:
        """The reserved rows, with those that are not unfrozen as the table keeps them."""
        rows, unfrozen = tf.convert_to_tensor(rows), self.is_unfrozen()
        return tf.cond(
            tf.reduce_all(unfrozen),
            lambda: rows,
            lambda: tf.where(unfrozen[:, tf.newaxis], rows, self.kept()),
        )

    def regularize(self, rows: Any) -> Any:
        """The penalty of the reserved rows, through which unfrozen ones get gradients."""
        return self.layer.embeddings_regularizer(self.pin(rows))

    def constrain(self, rows: Any) -> Any:
        """The reserved rows after a step of an optimizer, constrained and pinned."""
        # Every optimizer comes by here while its first step is traced, but for lazy ones.
        self._check_optimizer()
        self._looked_up = None
        if self.layer.embeddings_constraint is not None:
            rows = self.layer.embeddings_constraint(rows)
        return self.pin(rows)

    def _check_optimizer(self) -> None:
        """Refuse a step by an optimizer that the table was not made ready for."""
        known = self.optimizer
        if known is None or any(one.is_stepping for one in self.optimizers):
            return
        with tf.init_scope():
            is_needed = known.lazy or not known.row_scales(self.rows).are_plain
        if is_needed:
            raise InputError(
                "a table that rowwise was built for with lazy=True, or whose rows have a learning "
                "rate of their own, is stepped rightly by none but rowwise. Received another "
                f"optimizer for {self.layer.name!r}. Wrap it by rowwise too."
            )
        self.optimizer = None

    def assign(self, matrix: Any) -> None:
        """Write a whole table, shape (V, D)."""
        self.table.assign(matrix)
        self.rows.assign(self.kept())

    def write_rows(self, ids: Ids, rows: Any) -> None:
        """Write some rows, shape (n, D)."""
        rows = tf.cast(rows, self.table.dtype)
        self.table.value.scatter_update(tf.IndexedSlices(rows, tf.constant(ids)))
        self.rows.assign(self.kept())

    def move(self, after: Ids, begin: Ids, rate_scale: RateScale) -> None:
        """Make `after` the unfrozen rows, without retracing anything.

        Those of `begin` whose first step is still to come take the rate scale, where an optimizer
        keeps them.
        """
        if not tf.executing_eagerly():
            raise InputError(
                "rows are frozen and unfrozen outside of tf.function, where it costs no retracing. "
                "Received a call while a graph is traced. Call from a callback or between steps."
            )
        before = self.trainable_rows
        leaving = np.setdiff1d(before, after, assume_unique=True)
        self.write_back(leaving)
        if (joining := np.setdiff1d(after, before, assume_unique=True)).size:
            # Assigned as a whole: a scatter would make every later read of the variable a copy.
            joins = np.isin(self.reserved, joining, assume_unique=True)[:, np.newaxis]
            self.rows.assign(tf.where(joins, self.kept(), self.rows.value))
        self.unfrozen.assign(np.isin(self.reserved, after, assume_unique=True).astype(np.float32))
        for optimizer in self.optimizers:
            scales = optimizer.row_scales(self.rows)
            # Now, as they may join again before any step.
            scales.leave(np.searchsorted(self.reserved, leaving))
            scales.begin(np.searchsorted(self.reserved, begin), rate_scale)

    def write_back(self, ids: Ids) -> None:
        """Write unfrozen rows into the table."""
        if ids.size:
            rows = tf.gather(self.rows.value, np.searchsorted(self.reserved, ids))
            self.table.value.scatter_update(tf.IndexedSlices(rows, tf.constant(ids)))

    def kept(self) -> Any:
        """What the table holds of the reserved rows, shape (R, D)."""
        return tf.gather(self.table.value, self._reserved)


def _outermost_graph() -> Any:
    """The graph of the function that is traced now, not those of its branches and loops."""
    graph = tf.compat.v1.get_default_graph()
    while isinstance(getattr(graph, "outer_graph", None), tf.__internal__.FuncGraph):
        graph = graph.outer_graph
    return graph


def free(variable: Any) -> None:
    """Free the memory of a Keras variable, so that what was traced with it fails."""
    for part in getattr(variable.value, "values", (variable.value,)):  # one for each replica
        _empty(part.handle, part.dtype)


def _empty(handle: Any, dtype: Any) -> None:
    # Garbage is found at any time: while a file is loaded, too, which builds a graph that
    # `tf.init_scope` does not leave.
    with tf.__internal__.eager_context.eager_mode():
        nothing = tf.zeros([0], dtype)
        tf.raw_ops.AssignVariableOp(resource=handle, value=nothing, validate_shape=False)


def over_ids(rows: Callable[[Any], Any], inputs: Any, num_rows: int) -> Any:
    """Look up dense, ragged or sparse ids of any shape as `keras.layers.Embedding` does.

    Negative ones count from the end, absent ones of a sparse tensor are 0. `rows` maps a dense
    tensor of ids in [0, V) to their rows.
    """
    if isinstance(inputs, tf.RaggedTensor):
        return tf.ragged.map_flat_values(lambda ids: over_ids(rows, ids, num_rows), inputs)
    if isinstance(inputs, tf.SparseTensor):
        inputs = tf.sparse.to_dense(inputs)
    return rows(tf.where(inputs < 0, inputs + tf.cast(num_rows, inputs.dtype), inputs))


def compact(ids: Ids, num_rows: int) -> Config:
    """Sorted rows as `Rows.parse` reads them, and short: configs of layers are stored as JSON.

    Example:
        >>> compact(np.array([2, 3]), 5), compact(np.array([1, 3]), 5), compact(np.arange(5), 5)
        ({'range': [2, 4]}, {'ids': [1, 3]}, 'all')
    """
    if ids.size in (0, num_rows):
        return "all" if ids.size else "none"
    if ids[-1] - ids[0] + 1 == ids.size:
        return {"range": [int(ids[0]), int(ids[-1]) + 1]}
    return {"ids": ids.tolist()}
