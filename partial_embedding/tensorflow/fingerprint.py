"""Numbers that differ when a bit of a row, or of a table, does."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from partial_embedding.rows.vocabulary import Ids

# Rows are read in chunks of about this many bytes, which bounds the extra memory.
_CHUNK = 1 << 22
# The widest words that a sum of 64 bits has room for: a product of two wide ones would lose the
# highest bits of both, and with them a change of two signs.
_WORDS = (np.int32, np.int16, np.uint8)


def fingerprints(layer: Any, ids: Ids) -> Ids:
    """A number for each row that differs when any bit of the row does.

    The row's words of 32 bits, or fewer where it is no whole number of them, are summed with fixed
    odd factors modulo 2⁶⁴, so that a change of one word is always seen, and one of several words
    but for a rare chance.
    """
    width = layer.output_dim * tf.as_dtype(layer.variable_dtype).size
    word = next(word for word in _WORDS if width % np.dtype(word).itemsize == 0)
    random = np.random.default_rng(0x5EED)
    factors = random.integers(-(2**62), 2**62, width // np.dtype(word).itemsize, np.int64) * 2 + 1
    prints, step = np.empty(ids.size, np.int64), max(1, _CHUNK // max(1, width))
    for start in range(0, ids.size, step):
        chunk = ids[start : start + step]
        # What the model reads, whichever variable it is in.
        rows = np.ascontiguousarray(layer.rows(tf.constant(chunk)).numpy())
        words = rows.view(np.uint8).reshape(chunk.size, -1).view(word)
        prints[start : start + step] = words.astype(np.int64) @ factors
    return prints


def fingerprint_without(layer: Any, ids: Ids, num_rows: int) -> int:
    """A number of 64 bits that differs when any bit of the first rows does, but for these rows."""
    total = 0
    for start in range(0, num_rows, _CHUNK):
        part = np.arange(start, min(start + _CHUNK, num_rows))
        others = np.setdiff1d(part, ids, assume_unique=True)
        # An odd factor for each place, so that rows which change places change the sum.
        total += int((fingerprints(layer, others) * (2 * others + 1)).sum())
    return (total + 2**63) % 2**64 - 2**63
