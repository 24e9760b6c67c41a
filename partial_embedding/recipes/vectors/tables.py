"""Vectors for a vocabulary: trained on its texts, and put into the rows of a table."""

import hashlib
import json
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path

import gensim
import numpy as np
from gensim.models import Word2Vec
from numpy.typing import NDArray

from partial_embedding.errors import InputError
from partial_embedding.recipes.text import PADDING, count_tokens
from partial_embedding.recipes.vectors.reading import read_vectors
from partial_embedding.recipes.vectors.word_vectors import WordVectors
from partial_embedding.recipes.vectors.writing import save_vectors
from partial_embedding.rows.vocabulary import Vocabulary


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
    built from these vectors. The same arguments give the same bits on the same machine.

    Args:
        documents: The tokens of each document; pass the training side of a split.
        dimension: The number of values of each vector.
        min_count: Leave out tokens that occur fewer times than this.
        epochs: The number of passes over the documents.
        seed: Starts the random numbers.
        cache: A folder that keeps the result for the next call with the same arguments; None
            keeps nothing. A file that is damaged there is made again.

    Returns:
        The vectors, float32, the most frequent tokens first.

    Raises:
        InputError: No token occurs `min_count` times, or one cannot be written to the cache.

    Example:
        >>> vectors = train_vectors([["a", "b"], ["a", "c"], ["a", "b"]], dimension=4, min_count=2)
        >>> vectors.tokens, vectors.values.shape
        (['a', 'b'], (2, 4))
    """
    count_tokens(documents, min_count)  # refuses what Word2Vec has no good word for
    settings = {
        "vector_size": dimension,
        "min_count": min_count,
        "epochs": epochs,
        "seed": seed,
        "workers": 1,  # Threads would add up their updates in any order.
    }
    if cache is None:
        return _train(documents, settings)
    file = Path(cache) / f"{_fingerprint(documents, settings)}.bin.gz"
    try:
        return read_vectors(file, dimension)
    except InputError:
        vectors = _train(documents, settings)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_vectors(file, vectors.tokens, vectors.values)
        return read_vectors(file, dimension)


def build_table(
    vocabulary: Vocabulary, vectors: WordVectors, seed: int = 0, scale: float = 1.0
) -> tuple[NDArray[np.float32], Vocabulary]:
    """Give each row of a vocabulary its vector, and draw those that have none.

    A token that has no vector is tried again in lower case. The rows still missing are drawn
    from a normal distribution with the mean 0 and, in each dimension, the standard deviation of
    the rows that were found (of all their values together when there is one such row). The row of
    `<pad>` is zero.

    Args:
        vocabulary: The tokens of the rows.
        vectors: The pre-trained vectors, of D values each.
        seed: Starts the random numbers.
        scale: The factor on the standard deviation of the rows that are drawn.

    Returns:
        The table, shape (V, D), float32, and the vocabulary with `missing` set to the ids of the
        rows without a vector, the padding row excluded.

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
    sources = np.array(
        [
            -1 if token == PADDING else index.get(token, index.get(token.lower(), -1))
            for token in vocabulary.tokens
        ],
        np.int64,
    )
    known = np.flatnonzero(sources >= 0)
    if not known.size:
        raise InputError(
            f"at least one token has a vector. Received: {len(vocabulary)} tokens, such as "
            f"{reprlib.repr(list(vocabulary.tokens[-3:]))}, and vectors for others, such as "
            f"{reprlib.repr(list(vectors.tokens[:3]))}. Are they of another language or case?"
        )
    missing = np.flatnonzero(sources < 0)
    missing = missing[missing != vocabulary.index.get(PADDING)]
    table = np.zeros((len(vocabulary), vectors.dimension), np.float32)
    table[known] = vectors.values[sources[known]]
    found = table[known].astype(np.float64)
    spread = found.std(axis=0) if known.size > 1 else found.std()
    table[missing] = np.random.default_rng(seed).normal(
        0.0, scale * spread, size=(missing.size, table.shape[1])
    )
    return table, Vocabulary(vocabulary.tokens, vocabulary.counts, missing)


def _train(documents: Sequence[Sequence[str]], settings: dict[str, int]) -> WordVectors:
    vectors = Word2Vec(documents, **settings).wv
    return WordVectors(vectors.index_to_key, vectors.vectors)


def _fingerprint(documents: Sequence[Sequence[str]], settings: dict[str, int]) -> str:
    digest = hashlib.sha256(json.dumps([gensim.__version__, settings]).encode())
    for document in documents:
        digest.update(json.dumps(document).encode())
    return digest.hexdigest()
