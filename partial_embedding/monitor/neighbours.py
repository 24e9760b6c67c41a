"""Nearest neighbours among some rows of a table, and how many of them stay."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from partial_embedding.rows.vocabulary import Ids

Vectors = NDArray[np.floating]


def nearest(queries: Vectors, vectors: Vectors, most: int, own: Ids) -> Ids:
    """Find the nearest neighbours of rows by the cosine of the angle between them.

    Args:
        queries: The rows whose neighbours are wanted, shape (q, D).
        vectors: The rows among which they are looked for, shape (n, D).
        most: How many neighbours to find; there are n - 1 at most.
        own: The place of each query among `vectors`, int64, shape (q,); -1 for one that is not
            there. No row is a neighbour of itself.

    Returns:
        Places among `vectors`, the nearest first, int64, shape (q, min(most, n - 1)).

    Example:
        >>> vectors = np.array([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]])
        >>> nearest(vectors[:1], vectors, most=1, own=np.array([0]))
        array([[2]])
    """
    found = max(min(most, len(vectors) - 1), 0)
    cosines = _unit(queries) @ _unit(vectors).T
    inside = np.flatnonzero(own >= 0)
    cosines[inside, own[inside]] = -np.inf
    if found == 0:
        return np.zeros((len(queries), 0), np.int64)
    chosen = np.argpartition(-cosines, found - 1, axis=1)[:, :found]
    order = np.argsort(-np.take_along_axis(cosines, chosen, axis=1), axis=1, kind="stable")
    return np.take_along_axis(chosen, order, axis=1)


def share_kept(before: Ids, after: Ids) -> float:
    """The share of neighbours that stayed, whatever their order.

    Args:
        before: The neighbours of each row, shape (q, n), none of them twice.
        after: The neighbours of the same rows later, the same shape.

    Example:
        >>> share_kept(np.array([[4, 2]]), np.array([[2, 7]]))
        0.5
    """
    if not before.size:
        return 1.0
    return float((before[:, :, None] == after[:, None, :]).any(axis=2).mean())


def _unit(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)
