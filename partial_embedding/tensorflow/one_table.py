"""A layer that shows its table as one, wherever it keeps the rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from partial_embedding.errors import InputError
from partial_embedding.rows.vocabulary import Ids
from partial_embedding.tensorflow.row_files import KEYS, load_rows, save_rows
from partial_embedding.tensorflow.table_state import TableState, free
from partial_embedding.tensorflow.table_variable import TableVariable, WeightList


class OneTable(keras.layers.Embedding):
    """An Embedding whose table and weights are those of the plain layer, whether split or not."""

    # Keras publishes no types.
    built: bool
    input_dim: int
    embeddings_initializer: Any
    _embeddings: Any

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
        """Write the rows of some sorted ids, shape (n, D), whichever variable they are in."""
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

    # Where the rows are kept

    def _build_of(self, weights: list[Any]) -> None:
        """Build with a table as the first value: drawn ones would be as much memory again."""
        if len(weights) == 1 and np.shape(weights[0]) == (self.input_dim, self.output_dim):
            configured = self.embeddings_initializer
            self.embeddings_initializer = partial(_first_value, weights[0])
            self.build()
            self.embeddings_initializer = configured
        else:
            self.build()
            self.set_weights(weights)  # which says what is wrong with them

    def _split(self, reserved: Ids, unfrozen: Ids) -> None:
        """Give rows variables of their own; the table may be split already, by other rows."""
        if (state := self.table_state) is not None:
            state.write_back(state.trainable_rows)
            self._drop(state.rows, state.unfrozen)
        else:
            whole = [self._embeddings] if self.built else []
            self._embeddings = self.add_weight(
                shape=(self.input_dim, self.output_dim),
                # Of a table that is there already, the memory becomes this one's.
                initializer=partial(_first_value, whole[0].value)
                if whole
                else self.embeddings_initializer,
                name="frozen_embeddings",
                trainable=False,
                # Under an outer layer's autocast, reading it would convert all of it.
                autocast=False,
            )
            self._drop(*whole)
        self.table_state = None
        if reserved.size:
            self.table_state = TableState(self, self._embeddings, reserved, unfrozen)
            # As attributes, where `tf.train.Checkpoint` finds them.
            self._rows, self._unfrozen = self.table_state.rows, self.table_state.unfrozen

    def _drop(self, *variables: Any) -> None:
        """Let go of variables in whose place others are.

        What was traced with them fails from then on: it would read and train rows, frozen ones
        too, that are the layer's no longer.
        """
        for variable in variables:
            self._untrack_variable(variable)
            free(variable)

    def _merge(self) -> None:
        """Keep the table in one variable again."""
        (matrix,) = self.get_weights()
        self.table_state = None
        del self._embeddings, self._rows, self._unfrozen
        self._embeddings = self.add_weight(
            shape=matrix.shape, initializer="zeros", name="embeddings"
        )
        self._embeddings.assign(matrix)


def _first_value(matrix: Any, shape: Any, dtype: Any = None) -> Any:
    """A given table as an initializer."""
    return tf.cast(tf.convert_to_tensor(matrix), dtype)
