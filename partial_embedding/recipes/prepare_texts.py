"""What the text classifiers of both frameworks train on: texts, their vocabulary, its vectors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from partial_embedding.errors import InputError
from partial_embedding.recipes.settings import check_range
from partial_embedding.recipes.text import (
    UNKNOWN,
    LabelledTexts,
    count_tokens,
    read_labelled,
    read_texts,
    split,
    stdlib_docstrings,
    tokenize,
)
from partial_embedding.recipes.text.reading import Say
from partial_embedding.recipes.vectors import build_table, read_vectors, train_vectors
from partial_embedding.rows.token_text import printable
from partial_embedding.rows.vocabulary import Vocabulary

PADDING_ID = 0
# Of the convolutions over words.
WIDTHS = (3, 4, 5)
_TRAINED_DIMENSION = 50


@dataclass(frozen=True)
class TextSettings:
    """Which texts are read, how they become rows of a table, and what is in its rows.

    Args:
        path: A file or folder as `partial_embedding.recipes.text.read_labelled` reads it; by
            default the docstrings of the standard library.
        validation_path: Texts to validate on; by default a share of those in `path` is held out.
        test_path: Texts for `test` and `predict`; by default the validation side.
        text_column: The column or key that holds the text.
        label_column: The column or key that holds the name of the class.
        vectors: A file as `partial_embedding.recipes.vectors.read_vectors` reads it; by default
            gensim trains vectors on the training side.
        dimension: The values per vector that a file must have, or that trained vectors get (50).
        lowercase: Whether to lower-case texts, as most word vectors need.
        missing_scale: How far rows without a vector are drawn from zero, as a share of the scale
            of those with one.
        min_count: Tokens that are rarer in the training side become the unknown token.
        max_length: Texts are cut after this many tokens.
        validation_share: The share of texts held out, chosen by a hash of each text.
        batch_size: Texts per batch.
        seed: Divides, shuffles and draws; another seed does so differently.
        cache: The folder that keeps trained and converted vectors, by default `partial_embedding`
            in the user's cache folder; an empty string keeps nothing.
    """

    path: str | None = None
    validation_path: str | None = None
    test_path: str | None = None
    text_column: str | int = "text"
    label_column: str | int = "label"
    vectors: str | None = None
    dimension: int | None = None
    lowercase: bool = True
    missing_scale: float = 1.0
    min_count: int = 1
    max_length: int = 100
    validation_share: float = 0.15
    batch_size: int = 50
    seed: int = 0
    cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length", "min_count", "dimension"):
            if (value := getattr(self, name)) is not None:
                check_range(name, value, 1)
        check_range("seed", self.seed, 0)

    @property
    def cache_folder(self) -> Path | None:
        """Where vectors are kept, if anywhere."""
        if self.cache is not None:
            return Path(self.cache) if self.cache else None
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(base) / "partial_embedding"

    def read_labelled(self, path: str, least_classes: int, say: Say) -> LabelledTexts:
        """Read texts with labels from the columns of these settings."""
        return read_labelled(path, self.text_column, self.label_column, least_classes, say)

    def encode(self, texts: Sequence[str], vocabulary: Vocabulary) -> list[list[int]]:
        """The rows of each text; tokens without one have that of `<unk>`."""
        index, unknown = vocabulary.index, vocabulary.index[UNKNOWN]
        return [
            [index.get(t, unknown) for t in tokenize(text, self.lowercase)[: self.max_length]]
            for text in texts
        ]


def padded(rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """A batch of texts, shape (B, L), filled up at least to the widest convolution.

    Example:
        >>> padded([[5, 6, 7], [8]]).tolist()
        [[5, 6, 7, 0, 0], [8, 0, 0, 0, 0]]
    """
    ids = np.full((len(rows), max(*WIDTHS, *map(len, rows))), PADDING_ID, np.int64)
    for row, given in zip(ids, rows, strict=True):
        row[: len(given)] = given
    return ids


@dataclass(frozen=True, eq=False)
class PreparedTexts:
    """Labelled texts on two sides, and a table of word vectors, (V, D), for the training side."""

    vocabulary: Vocabulary
    table: NDArray[np.float32]
    training: LabelledTexts = field(repr=False)
    validation: LabelledTexts = field(repr=False)


def _read_sides(settings: TextSettings, say: Say) -> tuple[LabelledTexts, LabelledTexts]:
    if settings.path is None:
        examples = stdlib_docstrings()
    else:
        examples = settings.read_labelled(settings.path, 2, say)
    if settings.validation_path is None:
        return split(examples, settings.validation_share, settings.seed)
    validation = settings.read_labelled(settings.validation_path, 1, say)
    return examples, _with_names(validation, examples.names, settings.validation_path)


def texts_to_validate(
    settings: TextSettings, names: Sequence[str], say: Say, known: PreparedTexts | None = None
) -> LabelledTexts:
    """The validation side in the classes of a model, read anew where it is not known."""
    validation = known.validation if known else _read_sides(settings, say)[1]
    return _with_names(validation, names, settings.validation_path or "the texts")


def texts_to_test(
    settings: TextSettings, names: Sequence[str], say: Say, known: PreparedTexts | None = None
) -> LabelledTexts:
    """The texts of `test_path`, or else those of `texts_to_validate`."""
    if (path := settings.test_path) is None:
        return texts_to_validate(settings, names, say, known)
    return _with_names(settings.read_labelled(path, 1, say), names, path)


def texts_to_predict(
    settings: TextSettings, names: Sequence[str], say: Say, known: PreparedTexts | None = None
) -> Sequence[str]:
    """The texts of `test_path`, with labels or without, or else those of `texts_to_validate`."""
    if (path := settings.test_path) is None:
        return texts_to_validate(settings, names, say, known).texts
    return read_texts(path, settings.text_column, say)


def _with_names(texts: LabelledTexts, names: Sequence[str], path: str) -> LabelledTexts:
    """The same texts, with labels that count in other names."""
    if unknown := [name for name in texts.names if name not in names]:
        count = sum(texts.names[label] in unknown for label in texts.labels)
        raise InputError(
            f"texts to measure are of the classes of training. Received: {path}, where {count:,} "
            f"of {len(texts):,} are of {_listed(list(map(repr, unknown)))}, which training lacks. "
            "Correct these labels, or drop the texts."
        )
    index = np.array([names.index(name) for name in texts.names], np.int64)
    return LabelledTexts(texts.texts, index[texts.labels], tuple(names))


def prepare_texts(settings: TextSettings, say: Say = lambda line: None) -> PreparedTexts:
    """Read, split and count texts, and find their vectors; `say` takes each line about them.

    Example:
        >>> texts = prepare_texts(TextSettings(dimension=8, cache=""))
        >>> texts.vocabulary.tokens[:2], texts.table.shape == (len(texts.vocabulary), 8)
        (('<pad>', '<unk>'), True)
    """
    training, validation = _read_sides(settings, say)
    say(classes_text(training, validation))
    documents = [tokenize(text, settings.lowercase) for text in training.texts]
    vocabulary = count_tokens(documents, settings.min_count)
    cache, seed = settings.cache_folder, settings.seed
    if settings.vectors:
        found = read_vectors(settings.vectors, settings.dimension, cache)
    else:
        dimension = settings.dimension or _TRAINED_DIMENSION
        found = train_vectors(documents, dimension, seed=seed, cache=cache)
    for note in found.notes:
        say(f"{settings.vectors}: {note}")
    table, vocabulary = build_table(vocabulary, found, seed, scale=settings.missing_scale)
    return PreparedTexts(vocabulary, table, training, validation)


def classes_text(training: LabelledTexts, validation: LabelledTexts) -> str:
    """The classes and how many texts each has, as a line to print."""
    sides, names = (training, validation), training.names
    counts = [np.bincount(side.labels, minlength=len(names)) for side in sides]
    each = [f"{printable(n)} {a:,} + {b:,}" for n, a, b in zip(names, *counts, strict=True)]
    return (
        f"texts: {len(training):,} to train on, {len(validation):,} to validate on; "
        f"of {len(each):,} classes: {_listed(each, 12)}"
    )


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
