"""The one place where vectors are compared by direction."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.floating]


def cosines_of(queries: Vectors, vectors: Vectors) -> Vectors:
    """The cosines, shape (q, n), of the angles between (q, D) and (n, D) vectors; of zeros, 0.

    Example:
        >>> cosines_of(np.array([[2.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]))
        array([[ 1.,  0., -1.]])
    """
    # The products are divided and not the vectors: no copy of a whole table is made.
    cosines: Vectors = queries @ vectors.T
    cosines /= _lengths(queries)[:, None]
    cosines /= _lengths(vectors)
    return cosines


def _lengths(vectors: Vectors) -> Vectors:
    lengths: Vectors = np.linalg.norm(vectors, axis=1)
    return np.where(lengths > 0, lengths, 1).astype(lengths.dtype, copy=False)
