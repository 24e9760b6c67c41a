"""Files that hold the reserved rows of a table, and know that the others are those of its base.

Rows that are not reserved never train, so a file of the reserved ones makes the table whole again
where it is loaded into a table that is otherwise the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import tensorflow as tf

from partial_embedding.errors import InputError
from partial_embedding.tensorflow.fingerprint import fingerprint_without

KEYS = ("ids", "others", "rows")


@contextmanager
def rows_saved_alone(layers: Iterable[Any]) -> Iterator[None]:
    """Within it, files hold of each table its reserved rows, and a fingerprint of the others.

    Args:
        layers: `PartialEmbedding`s. Of a plain one a file holds all rows, as always.

    Example:
        >>> import h5py, keras, tempfile
        >>> from partial_embedding.tensorflow import PartialEmbedding
        >>> matrix = np.random.default_rng(0).normal(size=(1000, 4))
        >>> def model():
        ...     layer = PartialEmbedding.from_matrix(matrix, trainable_rows=[7], name="words")
        ...     return keras.Sequential([keras.Input((1,)), layer])
        >>> trained = model()
        >>> with tempfile.TemporaryDirectory() as folder, rows_saved_alone(trained.layers):
        ...     trained.save_weights(f"{folder}/rows.weights.h5")
        ...     model().load_weights(f"{folder}/rows.weights.h5")
        ...     with h5py.File(f"{folder}/rows.weights.h5") as file:
        ...         sorted(file["layers/embedding/vars"])
        ['ids', 'others', 'rows']
    """
    with ExitStack() as undo:
        for layer in layers:
            undo.callback(setattr, layer, "saves_rows", layer.saves_rows)
            layer.saves_rows = True
        yield


def save_rows(layer: Any, store: Any) -> None:
    """Write the reserved rows of a split layer, their ids, and a fingerprint of all others."""
    ids = layer.reserved_rows
    store["ids"] = ids
    store["rows"] = layer.rows(tf.constant(ids)).numpy()
    store["others"] = np.array([layer.input_dim, fingerprint_without(layer, ids, layer.input_dim)])


def load_rows(layer: Any, store: Any) -> None:
    """Write the rows of a file into a layer, split or plain.

    Raises:
        InputError: The rows are those of another table. The layer is then as it was.
    """
    ids, rows = np.asarray(store["ids"]), np.asarray(store["rows"])
    num_rows, others = np.asarray(store["others"]).tolist()
    if num_rows not in (layer.input_dim, *layer.earlier_sizes) or rows.shape[1] != layer.output_dim:
        raise InputError(
            "rows that trained are loaded into their own table. Received those of a table of the "
            f"shape {(num_rows, rows.shape[1])} for {layer.name!r} of the shape "
            f"{(layer.input_dim, layer.output_dim)}. Make the model as it was; where it grew "
            "since, load first, and then call grow_table."
        )
    if fingerprint_without(layer, ids, num_rows) != others:
        raise InputError(
            "rows that trained are loaded into the table that they are from. Received, for "
            f"{layer.name!r}, a file of {len(ids)} rows and a table whose other rows are not those "
            "of then. Make the model from the same matrix, or with the same seed."
        )
    layer.write_rows(ids, rows)
