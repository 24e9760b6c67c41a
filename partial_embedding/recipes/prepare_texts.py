"""What the text classifiers of both frameworks train on: texts, their vocabulary, its vectors."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from partial_embedding.recipes.text import (
    LabelledTexts,
    count_tokens,
    read_labelled,
    split,
    stdlib_docstrings,
    tokenize,
)
from partial_embedding.recipes.vectors import build_table, read_vectors, train_vectors
from partial_embedding.rows.vocabulary import Vocabulary

PADDING_ID = 0
# Of the convolutions over words.
WIDTHS = (3, 4, 5)
_TRAINED_DIMENSION = 50


@dataclass(frozen=True, eq=False)
class PreparedTexts:
    """Labelled texts on two sides, and a table of word vectors for the training side.

    Args:
        vocabulary: The tokens of the rows, their counts and which were missing from the vectors.
        table: The vectors, shape (V, D), float32.
        training: The texts to train on.
        validation: Those that were held out.
    """

    vocabulary: Vocabulary
    table: NDArray[np.float32]
    training: LabelledTexts = field(repr=False)
    validation: LabelledTexts = field(repr=False)


def prepare_texts(
    path: str | None = None,
    text_column: str = "text",
    label_column: str = "label",
    vectors: str | None = None,
    dimension: int | None = None,
    lowercase: bool = True,
    missing_scale: float = 1.0,
    min_count: int = 1,
    validation_share: float = 0.15,
    seed: int = 0,
    cache: str | None = None,
) -> PreparedTexts:
    """Read, split and count texts, and find their vectors.

    Args:
        path: A file or folder as `partial_embedding.recipes.text.read_labelled` reads it; by
            default the docstrings of the standard library.
        text_column: The column or key that holds the text.
        label_column: The column or key that holds the name of the class.
        vectors: A file as `partial_embedding.recipes.vectors.read_vectors` reads it; by default
            gensim trains vectors on the training side.
        dimension: The values per vector that a file must have, or that trained vectors get (50).
        lowercase: Whether to lower-case texts, as most word vectors need.
        missing_scale: How far rows without a vector are drawn from zero, as a share of the scale
            of those with one.
        min_count: Tokens that are rarer in the training side become the unknown token.
        validation_share: The share of texts held out, chosen by a hash of each text.
        seed: Divides and draws; another seed does so differently.
        cache: The folder that keeps trained vectors, by default `partial_embedding` in the user's
            cache folder; an empty string keeps nothing.

    Raises:
        InputError: Files are missing, malformed or do not fit.

    Example:
        >>> texts = prepare_texts(dimension=8, cache="")
        >>> texts.vocabulary.tokens[:2], texts.table.shape == (len(texts.vocabulary), 8)
        (('<pad>', '<unk>'), True)
    """
    examples = read_labelled(path, text_column, label_column) if path else stdlib_docstrings()
    training, validation = split(examples, validation_share, seed)
    documents = [tokenize(text, lowercase) for text in training.texts]
    vocabulary = count_tokens(documents, min_count)
    cache = _user_cache() if cache is None else cache
    found = (
        read_vectors(vectors, dimension)
        if vectors
        else train_vectors(
            documents, dimension or _TRAINED_DIMENSION, seed=seed, cache=cache or None
        )
    )
    table, vocabulary = build_table(vocabulary, found, seed, scale=missing_scale)
    return PreparedTexts(vocabulary, table, training, validation)


def _user_cache() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(base) / "partial_embedding")
