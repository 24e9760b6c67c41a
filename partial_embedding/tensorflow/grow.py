"""Tables that grow: new items, users and words get rows, and all else stays what it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from partial_embedding.errors import InputError
from partial_embedding.tensorflow.embedding import PartialEmbedding
from partial_embedding.tensorflow.models import tables_in


def grow_table(
    model: Any, name: str, rows: int, init: Any = "mean", *, trainable: bool = True
) -> list[int]:
    """Give a table more rows at its end, for items, users or words that are new.

    Heads that read the layer's `embeddings` grow with it; a `Dense` layer with an output for each
    row does not. Old rows keep their values, go on training or not as they did, and keep the state
    that the model's optimizer has of them; with `rowwise`, the new rows begin as if training had
    just started. New rows are among the reserved ones. From here on `"new"` names them wherever
    rows are named, in schedules too, and weights from before the table grew can still be loaded,
    into its old rows.

    Variables of TensorFlow do not change their shape, so those of the layer, and the optimizer of
    a compiled model with its own, are others afterwards. `fit`, `evaluate` and `predict` know it;
    in a loop of your own take `model.optimizer` again, and make your `tf.function`s anew.

    Args:
        model: A built `keras.Model`, compiled or not.
        name: The name of the layer.
        rows: How many rows the table gets, from 1 up.
        init: What they begin from: `"mean"`, the mean of the rows that are there; vectors of shape
            (rows, D); or a Keras initializer, called with that shape.
        trainable: Train the new rows from here on. Otherwise they stay as they begin, until
            `unfreeze_rows` or a schedule trains them.

    Returns:
        The ids of the new rows.

    Raises:
        InputError: There is no such layer, the vectors do not fit, or the new rows of a layer in
            which none can be frozen are not to train. The model is then as it was.

    Example:
        >>> import keras
        >>> layer = PartialEmbedding(10, 4, trainable_rows="none", name="items")
        >>> model = keras.Sequential([keras.Input((1,)), layer])
        >>> grow_table(model, "items", rows=2)
        [10, 11]
        >>> layer.trainable_rows, layer.get_weights()[0].shape
        (array([10, 11]), (12, 4))
    """
    tables = tables_in(model)
    if name not in tables:
        raise InputError(
            f"a table is named as its layer. Received: {name!r}. Name one of {sorted(tables)}."
        )
    if type(rows) is not int or rows < 1:
        raise InputError(
            f"a table grows by a whole number of rows from 1 up. Received: {rows!r}. "
            "Pass at least 1."
        )
    layer = tables[name]
    begun = _begun(layer, rows, init)
    size = layer.input_dim
    layer.grow(begun, trainable)
    if (optimizer := getattr(model, "optimizer", None)) is not None:
        model.optimizer = _grown(optimizer, model.trainable_variables, rows)
    for part in (model, *model._flatten_layers()):
        for made in ("train_function", "test_function", "predict_function"):
            if hasattr(part, made):
                setattr(part, made, None)
    return list(range(size, size + rows))


def _begun(layer: PartialEmbedding, rows: int, init: Any) -> Any:
    shape = (rows, layer.output_dim)
    if isinstance(init, str) and init == "mean":
        (matrix,) = layer.get_weights()
        return np.broadcast_to(matrix.mean(axis=0, dtype=np.float32), shape)
    if callable(init):
        return np.asarray(init(shape))
    if isinstance(init, str) or np.shape(init) != shape:
        received = repr(init) if isinstance(init, str) else np.shape(init)
        raise InputError(
            f"init is 'mean', an initializer, or a vector for each new row, {shape}. Received: "
            f"{received}. 'mean' is the default."
        )
    return np.asarray(init)


def _grown(optimizer: Any, variables: list[Any], rows: int) -> Any:
    """The same optimizer for variables of which some have more rows, with the state that it has."""
    made = type(optimizer).from_config(optimizer.get_config())
    if not optimizer.built:
        return made
    made.build(variables)
    # In the order in which both were built.
    for before, after in zip(optimizer.variables, made.variables, strict=True):
        value = before.value
        if before.shape != after.shape:
            value = tf.concat([value, after.value[-rows:]], axis=0)
        after.assign(value)
    return made
