"""Tokens and the vector of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class WordVectors:
    """Tokens and the vector of each, which may lie in a file and not in memory.

    Args:
        tokens: V different tokens.
        values: The vectors, shape (V, D), float32.
        notes: What is to be said of the file: what was left out of it, and why.

    Example:
        >>> vectors = WordVectors(["the", "of"], np.array([[1, 2], [3, 4]], np.float32))
        >>> vectors["of"].tolist(), vectors.dimension
        ([3.0, 4.0], 2)
    """

    tokens: Sequence[str]
    values: NDArray[np.float32] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def dimension(self) -> int:
        """The values D of each vector."""
        return int(self.values.shape[1])

    @cached_property
    def index(self) -> Mapping[str, int]:
        """The row of each token."""
        return {token: row for row, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, token: str) -> NDArray[np.float32]:
        vector: NDArray[np.float32] = self.values[self.index[token]]
        return vector
