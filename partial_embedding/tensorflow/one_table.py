"""A layer that shows its table as one, wherever it keeps the rows."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from partial_embedding.errors import InputError
from partial_embedding.rows.vocabulary import Ids
from partial_embedding.tensorflow.row_files import KEYS, load_rows, save_rows
from partial_embedding.tensorflow.table_state import TableState


class OneTable(keras.layers.Embedding):
    """An Embedding whose table and weights are those of the plain layer, whether split or not."""

    # What rows are where; None for a table of one variable.
    table_state: TableState | None = None
    # How many rows there were each time before the table grew.
    earlier_sizes: tuple[int, ...] = ()
    # Whether files hold the reserved rows in the place of all.
    saves_rows: bool = False

    @property
    def embeddings(self) -> Any:
        """The table of shape (V, D): the variable of a plain table, one view of a split one.

        The view is read, assigned and differentiated like a variable; each reads or writes the
        whole table. A head tied to it, `x @ transpose(layer.embeddings)`, trains the trainable rows
        where it reads it in the `call` of a layer or model.
        """
        if self.table_state is None:
            return super().embeddings
        return TableVariable(self.table_state, f"{self.path}/embeddings")

    def get_weights(self) -> list[Any]:
        """The table as one array of shape (V, D) in a list, as the plain layer gives it."""
        if self.table_state is None:
            return super().get_weights()  # type: ignore[no-any-return]
        return [self.embeddings.numpy()]

    def set_weights(self, weights: list[Any]) -> None:
        """Write the table, one array of shape (V, D) in a list, as the plain layer takes it."""
        weights = [self._with_new_rows(matrix) for matrix in weights]
        if self.table_state is None:
            super().set_weights(weights)
            return
        if len(weights) != 1 or np.shape(weights[0]) != (self.input_dim, self.output_dim):
            raise InputError(
                f"the weights are one table of shape {(self.input_dim, self.output_dim)}. "
                f"Received the shapes {[np.shape(w) for w in weights]}. Was the vocabulary resized?"
            )
        self.embeddings.assign(weights[0])

    def _with_new_rows(self, matrix: Any) -> Any:
        """A table from before this one grew, with the rows of now that it did not have."""
        if np.ndim(matrix) != 2 or len(matrix) not in self.earlier_sizes:
            return matrix
        (now,) = self.get_weights()
        return np.concatenate([matrix, now[len(matrix) :]])

    @property
    def trainable_weights(self) -> list[Any]:
        """The variable of the reserved rows, or none where the layer does not train."""
        return WeightList(super().trainable_weights, self)

    @property
    def non_trainable_weights(self) -> list[Any]:
        """The other variables."""
        return WeightList(super().non_trainable_weights, self)

    def count_params(self) -> int:
        """The size of the table, V * D."""
        split = self.table_state is not None
        return int(self.input_dim * self.output_dim if split else super().count_params())

    def write_rows(self, ids: Ids, rows: Any) -> None:
        """Write some rows, whichever variable they are in.

        Args:
            ids: Their ids, sorted, int64, shape (n,).
            rows: What they will be, shape (n, D).
        """
        if self.table_state is not None:
            self.table_state.write_rows(ids, rows)
            return
        (matrix,) = self.get_weights()
        matrix[ids] = rows
        self.set_weights([matrix])

    def save_own_variables(self, store: Any) -> None:
        """Write one matrix, as the plain layer does, or the reserved rows alone."""
        if self.table_state is None:
            super().save_own_variables(store)
        elif self.saves_rows:
            save_rows(self, store)
        else:
            store["0"] = self.embeddings.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Read one matrix, as the plain layer does, or reserved rows alone."""
        if sorted(store.keys()) == list(KEYS):
            load_rows(self, store)
            return
        if self.table_state is None and not self.earlier_sizes:
            super().load_own_variables(store)
            return
        if list(store.keys()) != ["0"]:
            raise InputError(
                f"a file holds one table for the layer {self.name!r}. Received "
                f"{len(store.keys())} arrays. Was it saved from a model of another structure?"
            )
        self.set_weights([store["0"]])


class TableVariable(keras.Variable):
    """A view of shape (V, D) on the variables of a split table, used as a Keras variable is.

    It holds nothing itself: it is read from the frozen table and the reserved rows, and assigned to
    both. Its gradient is that of the reserved rows, as `tf.IndexedSlices`.

    Args:
        state: What rows are where.
        path: The variable's path in the model.

    Example:
        >>> from partial_embedding.tensorflow import PartialEmbedding
        >>> layer = PartialEmbedding(3, 2, trainable_rows=[1])
        >>> layer.build()
        >>> layer.embeddings.assign_add([[0, 0], [1, 1], [0, 0]]).shape
        TensorShape([3, 2])
    """

    # Not the parent's constructor, which would make a variable.
    def __init__(self, state: TableState, path: str) -> None:
        table = state.table
        self._state = state
        self._path, self._name = path, path.rsplit("/", 1)[-1]
        self._shape, self._ndim, self._dtype = tuple(table.shape), 2, table.dtype
        # So that no layer or optimizer that is given the view takes it for a weight to train.
        self._trainable = self._autocast = self._overwrite_with_gradient = False
        self._aggregation = self._synchronization = "none"
        self._regularizer = self._constraint = self._layout = self._initializer = None

    @property
    def value(self) -> Any:
        """The whole table as a tensor."""
        return self._state.merged()

    def _direct_assign(self, value: Any) -> None:
        self._state.assign(tf.cast(value, self.dtype))

    @property
    def handle(self) -> Any:
        """What tapes take for the variable."""
        return _GradientSource(self._state)


class _GradientSource(tf.__internal__.CompositeTensor):
    """Stands for a table where tapes ask what it is made of."""

    def __init__(self, state: TableState) -> None:
        self.state = state
        self.__composite_gradient__ = self

    @property
    def _type_spec(self) -> Any:
        raise NotImplementedError("tapes ask for the two methods below alone")

    def get_gradient_components(self, value: Any) -> Any:
        """The variable that is differentiated."""
        return self.state.rows.value.handle

    def replace_gradient_components(self, value: Any, gradient: Any) -> Any:
        """The gradient of the table, of that of the reserved rows."""
        return None if gradient is None else self.state.table_gradient(gradient)


class WeightList(list[Any]):
    """The weights of a layer that train, or the others.

    The sum of both, in which Keras's older `.h5` files hold a layer, is that of the plain layer:
    one table. This way either loads the other's.

    Args:
        weights: The variables.
        layer: The `PartialEmbedding`.
    """

    def __init__(self, weights: list[Any], layer: Any) -> None:
        super().__init__(weights)
        self.layer = layer

    def __add__(self, other: Any) -> Any:
        is_whole = isinstance(other, WeightList) and other.layer is self.layer
        if is_whole and self.layer.table_state is not None:
            return [self.layer.embeddings]
        return super().__add__(other)
