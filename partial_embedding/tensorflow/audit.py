"""Proof that frozen rows keep their bits: a fingerprint of each, compared later."""

from __future__ import annotations

import numpy as np

from partial_embedding.errors import FrozenRowsMoved, InputError
from partial_embedding.rows.vocabulary import Ids
from partial_embedding.schedule.messages import moved_text
from partial_embedding.tensorflow.embedding import PartialEmbedding
from partial_embedding.tensorflow.fingerprint import fingerprints


class FrozenRowAudit:
    """Fingerprints of a table's frozen rows.

    A check reads the whole frozen part of the table once, and the fingerprints take 8 bytes per
    frozen row.

    Args:
        layer: The layer, whose rows that are frozen now are watched. It is built, if it is not.
        name: Its name in messages.

    Raises:
        InputError: It is no `PartialEmbedding`, or is quantized.

    Example:
        >>> layer = PartialEmbedding(4, 2, trainable_rows=[3])
        >>> audit = FrozenRowAudit(layer, "words")
        >>> audit.check()
        >>> layer.set_weights([np.ones((4, 2))])
        >>> audit.changed()
        array([0, 1, 2])
    """

    def __init__(self, layer: PartialEmbedding, name: str = "table") -> None:
        if not isinstance(layer, PartialEmbedding) or layer.quantization_mode:
            raise InputError(
                "an audit is of the rows of a PartialEmbedding, not quantized. Received: "
                f"{layer!r}. Pass the layer, as model.get_layer(name) gives it."
            )
        layer.build()
        self.layer = layer
        self.name = name
        self.frozen: Ids = np.setdiff1d(np.arange(layer.input_dim), layer.trainable_rows)
        self._prints = fingerprints(layer, self.frozen)

    @property
    def num_frozen(self) -> int:
        """How many rows are watched."""
        return len(self.frozen)

    def changed(self) -> Ids:
        """The watched rows that are not what they were, int64, shape (n,).

        A watched row that trains now is not watched any more.
        """
        changed = self.frozen[fingerprints(self.layer, self.frozen) != self._prints]
        return np.setdiff1d(changed, self.layer.trainable_rows, assume_unique=True)

    def check(self, step: int | None = None) -> None:
        """Raise when a frozen row moved.

        Args:
            step: The optimizer step, for the message.

        Raises:
            FrozenRowsMoved: At least one bit of a watched row is not what it was.
        """
        changed = self.changed().tolist()
        if changed:
            suspect = (
                "a write into the table from outside (set_weights, load_weights, code of your own)"
            )
            raise FrozenRowsMoved(moved_text(self.name, changed, step, suspect), changed)
