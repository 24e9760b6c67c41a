"""Telling sets of rows apart by one number."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from partial_embedding.rows.vocabulary import Ids


def fingerprint_of(ids: Ids) -> int:
    """A number that tells row ids apart, by what they are and by their order.

    It lies in [0, 2^63), so that an int64 of any framework holds it.

    Example:
        >>> one, other = fingerprint_of(np.array([1, 2])), fingerprint_of(np.array([2, 1]))
        >>> one == fingerprint_of(np.array([1, 2], np.int32)), one == other
        (True, False)
    """
    digest = blake2b(np.ascontiguousarray(ids, "<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
