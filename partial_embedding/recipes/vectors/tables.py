"""Vectors for a vocabulary: trained on its texts, put into the rows of a table, written from it."""

import contextlib
import hashlib
import json
import os
import re
import reprlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import gensim
import numpy as np
from gensim.models import KeyedVectors, Word2Vec
from numpy.typing import ArrayLike, NDArray

from partial_embedding.errors import InputError
from partial_embedding.files import write_atomically
from partial_embedding.recipes.text import PADDING, count_tokens
from partial_embedding.recipes.vectors.formats import WordVectors
from partial_embedding.recipes.vectors.reading import read_vectors
from partial_embedding.rows.vocabulary import Vocabulary

_WRITTEN_SUFFIXES = (".txt", ".vec", ".bin", ".txt.gz", ".vec.gz", ".bin.gz")


def train_vectors(
    documents: Sequence[Sequence[str]],
    dimension: int = 50,
    min_count: int = 3,
    epochs: int = 20,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
) -> WordVectors:
    """Train word vectors on documents with gensim's Word2Vec.

    Tokens that are rarer than `min_count` get no vector: they are the missing rows of a table
    built from these vectors. The most frequent come first. The same arguments give the same bits on
    the same machine; a folder `cache` keeps them for the next call, where a damaged file is made
    again.

    Raises:
        InputError: No token occurs `min_count` times, or one cannot be written to the cache.

    Example:
        >>> vectors = train_vectors([["a", "b"], ["a", "c"], ["a", "b"]], dimension=4, min_count=2)
        >>> vectors.tokens, vectors.values.shape
        (['a', 'b'], (2, 4))
    """
    count_tokens(documents, min_count)  # refuses what Word2Vec has no good word for
    # Threads would add up their updates in any order.
    settings = {"min_count": min_count, "epochs": epochs, "seed": seed, "workers": 1}
    settings["vector_size"] = dimension
    file = None
    if cache is not None:
        file = Path(cache) / f"{_fingerprint(documents, settings)}.bin.gz"
        with contextlib.suppress(InputError):
            return read_vectors(file, dimension)
        file.parent.mkdir(parents=True, exist_ok=True)
    trained = Word2Vec(documents, **settings).wv
    if file is None:
        return WordVectors(trained.index_to_key, trained.vectors)
    save_vectors(file, trained.index_to_key, trained.vectors)
    return read_vectors(file, dimension)


def build_table(
    vocabulary: Vocabulary, vectors: WordVectors, seed: int = 0, scale: float = 1.0
) -> tuple[NDArray[np.float32], Vocabulary]:
    """Give each row of a vocabulary its vector, and draw those that have none.

    A token that has no vector is tried again in lower case. The rows still missing are drawn
    from a normal distribution with the mean 0 and, in each dimension, the standard deviation of
    the rows that were found (of all their values together when there is one such row). The row of
    `<pad>` is zero, and is not among the `missing` of the vocabulary that is given back.

    Args:
        vocabulary: The tokens of the rows.
        vectors: The pre-trained vectors, of D values each.
        seed: Starts the random numbers.
        scale: The factor on the standard deviation of the rows that are drawn.

    Raises:
        InputError: Not one token has a vector, or the scale is negative.

    Example:
        >>> vectors = WordVectors(["the"], np.array([[1, 2]], np.float32))
        >>> table, vocabulary = build_table(Vocabulary(["<pad>", "zyzzyva", "The"]), vectors)
        >>> table[[0, 2]].tolist(), vocabulary.missing.tolist()
        ([[0.0, 0.0], [1.0, 2.0]], [1])
    """
    if not scale >= 0:
        raise InputError(f"a scale is not negative. Received: {scale}. 1 is that of known rows.")
    index = vectors.index
    found = [index.get(token, index.get(token.lower(), -1)) for token in vocabulary.tokens]
    sources = np.array(found, np.int64)
    padding = vocabulary.index.get(PADDING)
    if padding is not None:
        sources[padding] = -1
    known = np.flatnonzero(sources >= 0)
    if not known.size:
        raise InputError(
            f"at least one token has a vector. Received: {len(vocabulary)} tokens, such as "
            f"{reprlib.repr(list(vocabulary.tokens[-3:]))}, and vectors for others, such as "
            f"{reprlib.repr(list(vectors.tokens[:3]))}. Are they of another language or case?"
        )
    missing = np.flatnonzero(sources < 0)
    missing = missing[missing != padding]
    table = np.zeros((len(vocabulary), vectors.dimension), np.float32)
    table[known] = vectors.values[sources[known]]
    values = table[known].astype(np.float64)
    spread = scale * (values.std(axis=0) if known.size > 1 else values.std())
    size = (missing.size, vectors.dimension)
    table[missing] = np.random.default_rng(seed).normal(0.0, spread, size)
    return table, Vocabulary(vocabulary.tokens, vocabulary.counts, missing)


def _fingerprint(documents: Sequence[Sequence[str]], settings: dict[str, int]) -> str:
    digest = hashlib.sha256(json.dumps([gensim.__version__, settings]).encode())
    for document in documents:
        digest.update(json.dumps(document).encode())
    return digest.hexdigest()


def save_vectors(path: str | os.PathLike[str], tokens: Sequence[str], table: ArrayLike) -> None:
    """Write vectors in word2vec's format, so that `read_vectors` gives the same float32 bits back.

    The file appears in full or not at all. A name that ends in `.txt` or `.vec` is for text, in
    `.bin` for binary; with `.gz` after it, the file is gzipped.

    Raises:
        InputError: The suffix is another one, tokens and table do not fit, a token is empty, twice
            there or holds whitespace, or a value is not finite.

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
            f"Call it {path.stem}.vec, for example."
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
