"""What the text classifiers of both frameworks train on: texts, their vocabulary, its vectors."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
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
    split,
    stdlib_docstrings,
    tokenize,
)
from partial_embedding.recipes.vectors import build_table, read_vectors, train_vectors
from partial_embedding.rows.token_text import printable
from partial_embedding.rows.vocabulary import Vocabulary

# What takes a line to print.
Say = Callable[[str], object]

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

    Raises:
        InputError: A number is out of its range.
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

    def read_labelled(
        self, path: str, least_classes: int = 2, say: Say | None = None
    ) -> LabelledTexts:
        """Read texts with labels from the columns of these settings; see `read_labelled`."""
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


def read_sides(
    settings: TextSettings, say: Say | None = None
) -> tuple[LabelledTexts, LabelledTexts]:
    """Read the texts to train on and those to validate on.

    Raises:
        InputError: Files are missing or malformed, or a class is on the validation side alone.
    """
    if settings.path is None:
        examples = stdlib_docstrings()
    else:
        examples = settings.read_labelled(settings.path, say=say)
    if settings.validation_path is None:
        return split(examples, settings.validation_share, settings.seed)
    return examples, read_known(settings.validation_path, settings, examples.names, say)


def read_known(
    path: str, settings: TextSettings, names: Sequence[str], say: Say | None = None
) -> LabelledTexts:
    """Read texts whose classes are known.

    Raises:
        InputError: The file is refused, or has a class that is not among them.
    """
    texts = settings.read_labelled(path, least_classes=1, say=say)
    return with_names(texts, names, path)


def with_names(
    texts: LabelledTexts, names: Sequence[str], path: str = "the texts"
) -> LabelledTexts:
    """The same texts, with labels that count in other names.

    Raises:
        InputError: The texts have a class that is not among them; the message names `path`.
    """
    if unknown := [name for name in texts.names if name not in names]:
        count = sum(texts.names[label] in unknown for label in texts.labels)
        raise InputError(
            f"texts to measure are of the classes of training. Received: {path}, where {count:,} "
            f"of {len(texts):,} are of {_listed(list(map(repr, unknown)))}, which training lacks. "
            "Correct these labels, or drop the texts."
        )
    index = np.array([names.index(name) for name in texts.names], np.int64)
    return LabelledTexts(texts.texts, index[texts.labels], tuple(names))


def prepare_texts(settings: TextSettings, say: Say | None = None) -> PreparedTexts:
    """Read, split and count texts, and find their vectors.

    Args:
        settings: What is read, and how.
        say: Called with each line that there is to say: classes and their sizes, and what was
            passed over or mended.

    Raises:
        InputError: Files are missing, malformed or do not fit.

    Example:
        >>> texts = prepare_texts(TextSettings(dimension=8, cache=""))
        >>> texts.vocabulary.tokens[:2], texts.table.shape == (len(texts.vocabulary), 8)
        (('<pad>', '<unk>'), True)
    """
    training, validation = read_sides(settings, say)
    if say is not None:
        say(classes_text(training, validation))
    documents = [tokenize(text, settings.lowercase) for text in training.texts]
    vocabulary = count_tokens(documents, settings.min_count)
    cache, seed = settings.cache_folder, settings.seed
    found = (
        read_vectors(settings.vectors, settings.dimension, cache)
        if settings.vectors
        else train_vectors(
            documents, settings.dimension or _TRAINED_DIMENSION, seed=seed, cache=cache
        )
    )
    if say is not None:
        for note in found.notes:
            say(f"{settings.vectors}: {note}")
    table, vocabulary = build_table(vocabulary, found, seed, scale=settings.missing_scale)
    return PreparedTexts(vocabulary, table, training, validation)


def classes_text(training: LabelledTexts, validation: LabelledTexts) -> str:
    """The classes and how many texts each has, as a line to print.

    Example:
        >>> one = LabelledTexts(("a joy", "a bore"), np.array([1, 0]), ("neg", "pos"))
        >>> classes_text(one, one)
        'texts: 2 to train on, 2 to validate on; of 2 classes: neg 1 + 1, pos 1 + 1'
    """
    counts = [
        np.bincount(side.labels, minlength=len(side.names)) for side in (training, validation)
    ]
    each = [
        f"{printable(n)} {a:,} + {b:,}" for n, a, b in zip(training.names, *counts, strict=True)
    ]
    return (
        f"texts: {len(training):,} to train on, {len(validation):,} to validate on; "
        f"of {len(each):,} classes: {_listed(each, 12)}"
    )


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
