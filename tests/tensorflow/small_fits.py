"""A model of one small table, and a run of it that is over in a moment."""

from typing import Any

import keras
import numpy as np

from partial_embedding import Vocabulary
from partial_embedding.tensorflow import PartialEmbedding

NUM_ROWS, WIDTH = 8, 2
IDS = np.arange(NUM_ROWS).reshape(4, 2)
TARGETS = np.ones((4, 2, 1))
VOCABULARY = Vocabulary("abcdefgh", counts=[8, 7, 6, 5, 1, 1, 1, 1])


def small_model(optimizer: Any = "adam", traced: bool = False, **settings: Any) -> Any:
    """A model of a table with these settings, compiled."""
    layer = PartialEmbedding(NUM_ROWS, WIDTH, name="words", **settings)
    model = keras.Sequential([keras.Input((2,), dtype="int64"), layer, keras.layers.Dense(1)])
    # Tracing takes longer than these runs do.
    model.compile(optimizer, "mse", run_eagerly=not traced)
    return model


def fit(model: Any, *callbacks: Any, **settings: Any) -> list[int]:
    """Train on two batches an epoch, and give the rows that moved."""
    before = model.layers[0].get_weights()[0]
    settings = {"epochs": 4, "batch_size": 2, "verbose": 0, **settings}
    model.fit(IDS, TARGETS, callbacks=list(callbacks), **settings)
    moved = (model.layers[0].get_weights()[0] != before).any(axis=1)
    return [int(row) for row in np.flatnonzero(moved)]


class Watch(keras.callbacks.Callback):  # type: ignore[misc]
    """Keeps which rows train before each batch that Keras calls for."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[int]] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        (layer,) = [one for one in self.model.layers if isinstance(one, PartialEmbedding)]
        self.rows.append(layer.trainable_rows.tolist())
