"""Finding the partial tables of a model."""

from __future__ import annotations

from typing import Any

from partial_embedding.errors import InputError
from partial_embedding.tensorflow.embedding import PartialEmbedding


def tables_in(model: Any) -> dict[str, PartialEmbedding]:
    """The partial tables of a model by the names of their layers, built.

    Args:
        model: A `keras.Model` of any kind and nesting.

    Raises:
        InputError: Two of them have the same name.

    Example:
        >>> import keras
        >>> list(tables_in(keras.Sequential([PartialEmbedding(3, 2, name="words")])))
        ['words']
    """
    tables: dict[str, PartialEmbedding] = {}
    for layer in model._flatten_layers():
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
