"""Tables as files of word vectors."""

import os
import re
import reprlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from gensim.models import KeyedVectors
from numpy.typing import ArrayLike

from partial_embedding.errors import InputError
from partial_embedding.files import write_atomically

_WRITTEN_SUFFIXES = (".txt", ".vec", ".bin", ".txt.gz", ".vec.gz", ".bin.gz")


def save_vectors(path: str | os.PathLike[str], tokens: Sequence[str], table: ArrayLike) -> None:
    """Write vectors in word2vec's format, so that `read_vectors` gives the same bits back.

    The file appears in full or not at all.

    Args:
        path: A name that ends in `.txt` or `.vec` for text, in `.bin` for binary; with `.gz` after
            it, the file is gzipped.
        tokens: The token of each row, V different ones without whitespace.
        table: The vectors, shape (V, D), stored as float32.

    Raises:
        InputError: The suffix is another one, tokens and table do not fit, a token is empty, twice
            there or holds whitespace, or a value is not finite.
        OSError: The file cannot be written.

    Example:
        >>> from partial_embedding.recipes.vectors import read_vectors
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "table.vec.gz"
        ...     save_vectors(file, ["the", "of"], np.array([[0.1], [0.2]]))
        ...     read_vectors(file).tokens
        ['the', 'of']
    """
    path = Path(path)
    if not path.name.endswith(_WRITTEN_SUFFIXES):
        raise InputError(
            f"the name of a vector file ends in {', '.join(_WRITTEN_SUFFIXES)}. Received: {path}. "
            "Choose one of these."
        )
    tokens = list(tokens)
    twice = [token for token, count in Counter(tokens).items() if count > 1]
    # The formats end a token at a space and a row at a line feed; other whitespace at a token's
    # edge is lost to most readers.
    bad = twice or [t for t in tokens if not t or re.search(r"[ \t\n\r\v\f\ud800-\udfff]", t)]
    if bad:
        raise InputError(
            "a token in a file of vectors is not empty, occurs once, and holds neither whitespace "
            f"nor half a surrogate pair. Received: {reprlib.repr(bad[0])}"
            f"{' twice' if twice else ''}. Rename or drop it."
        )
    with np.errstate(over="ignore"):
        values = np.asarray(table).astype(np.float32)
    if values.ndim != 2 or values.shape[0] != len(tokens) or not values.size:
        raise InputError(
            f"a table has one row of values per token. Received: shape {values.shape} for "
            f"{len(tokens)} tokens. Pass both in the same order."
        )
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values).all(axis=1)))
        raise InputError(
            f"values are finite in float32. Received: {reprlib.repr(values[row].tolist())} for "
            f"{reprlib.repr(tokens[row])}. Look for the step where training diverged."
        )
    vectors = KeyedVectors(values.shape[1])
    vectors.add_vectors(tokens, values)
    # gensim writes by falling count.
    for row, token in enumerate(tokens):
        vectors.set_vecattr(token, "count", len(tokens) - row)
    with write_atomically(path) as temporary:
        vectors.save_word2vec_format(str(temporary), binary=path.name.endswith((".bin", ".bin.gz")))
