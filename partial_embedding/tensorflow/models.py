"""The partial tables of a model, and its weights as those of the same model with plain ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from partial_embedding.errors import InputError
from partial_embedding.tensorflow.embedding import PartialEmbedding


def tables_in(model: Any) -> dict[str, PartialEmbedding]:
    """The partial tables of a model by the names of their layers, built.

    Raises:
        InputError: Two of them have the same name.
    """
    tables: dict[str, PartialEmbedding] = {}
    for layer in _layers_of(model):
        if not isinstance(layer, PartialEmbedding):
            continue
        if layer.name in tables:
            raise InputError(
                f"each table of a model has a name of its own. Received {layer.name!r} twice. "
                "Pass name= to the layers."
            )
        # Keras builds a model without a fixed input only while it traces the first step.
        layer.build()
        tables[layer.name] = layer
    return tables


def tables_for(purpose: str, model: Any) -> dict[str, PartialEmbedding]:
    """`tables_in` a model, of which there is at least one.

    Raises:
        InputError: There is none, or as for `tables_in`.
    """
    if not (tables := tables_in(model)):
        raise InputError(
            f"{purpose} needs a PartialEmbedding in the model. Received a "
            f"{type(model).__name__} without one. Replace its Embedding, for example by "
            "PartialEmbedding.from_layer, or leave the callback out."
        )
    return tables


def _layers_of(model: Any) -> Iterable[Any]:
    if not isinstance(model, keras.layers.Layer):
        raise InputError(
            f"a model is a keras.Model. Received a {type(model).__name__}. Pass the model itself."
        )
    return model._flatten_layers()  # type: ignore[no-any-return]


def forget_traced(model: Any) -> None:
    """Have a model and those in it trace anew what Keras runs, as variables are others."""
    for part in (model, *_layers_of(model)):
        for traced in ("train_function", "test_function", "predict_function"):
            if hasattr(part, traced):
                setattr(part, traced, None)


def plain_weights(model: Any) -> list[Any]:
    """What `model.get_weights()` would give with `keras.layers.Embedding` for each partial table.

    Args:
        model: A built `keras.Model`.

    Returns:
        Arrays, in the order of the plain model; each table is one of shape (V, D).

    Example:
        >>> import keras
        >>> def model(layer):
        ...     return keras.Sequential([keras.Input((2,)), layer, keras.layers.Dense(1)])
        >>> partial, plain = model(PartialEmbedding(5, 3, trainable_rows=[1])), model(
        ...     keras.layers.Embedding(5, 3)
        ... )
        >>> plain.set_weights(plain_weights(partial))
        >>> set_plain_weights(partial, plain.get_weights())
        >>> [array.shape for array in plain_weights(partial)]
        [(5, 3), (3, 1), (1,)]
    """
    return [
        part.get_weights()[0] if isinstance(part, PartialEmbedding) else part.numpy()
        for part in _parts(model)
    ]


def set_plain_weights(model: Any, weights: Sequence[Any]) -> None:
    """Set the weights of a model with partial tables from those of the same model with plain ones.

    Which rows train stays as it is.

    Args:
        model: A built `keras.Model`.
        weights: Arrays as `plain_weights` gives them.

    Raises:
        InputError: Their number or a shape is another. Nothing is changed then.

    Example:
        >>> import keras
        >>> layer = PartialEmbedding(5, 3, trainable_rows=[1])
        >>> model = keras.Sequential([keras.Input((2,)), layer])
        >>> set_plain_weights(model, [np.ones((5, 3))])
        >>> float(layer.get_weights()[0].sum()), layer.trainable_rows
        (15.0, array([1]))
    """
    parts = list(_parts(model))
    wanted = [
        (p.input_dim, p.output_dim) if isinstance(p, PartialEmbedding) else tuple(p.shape)
        for p in parts
    ]
    received = [np.shape(array) for array in weights]
    if received != wanted:
        raise InputError(
            f"the weights of the plain model have the shapes {wanted}. Received: {received}. Take "
            "them from a model of the same structure, by get_weights or plain_weights."
        )
    for part, array in zip(parts, weights, strict=True):
        if isinstance(part, PartialEmbedding):
            part.set_weights([array])
        else:
            part.assign(array)


def _parts(model: Any) -> Iterator[Any]:
    """The weights of a model, with each split table in the place of its variables."""
    tables = {
        id(variable): layer
        for layer in _layers_of(model)
        if isinstance(layer, PartialEmbedding) and layer.table_state is not None
        for variable in layer.weights
    }
    seen = set()
    for variable in model.weights:
        part = tables.get(id(variable), variable)
        if id(part) not in seen:
            seen.add(id(part))
            yield part
