"""What rows mean: the token of each row, how often it occurs, and which rows had no vector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partial_embedding.errors import InputError

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a table's rows, in the order of the rows, and what is known about them.

    Args:
        tokens: One token per row; row `i` of the table belongs to `tokens[i]`.
        counts: How often each token occurs in the training data, shape (V,), integers.
            Needed by `Rows.most_frequent` and its kin.
        missing: Ids of the rows that had no pre-trained vector. Needed by `Rows.missing`.
        vectors: The vector of each token as it was before training, shape (V, D), floating point;
            not copied. Needed by rows that are chosen by their neighbours.

    Raises:
        InputError: A token occurs twice, or `counts`, `missing` or `vectors` do not fit the tokens.

    Example:
        >>> vocabulary = Vocabulary(["<pad>", "the", "zyzzyva"], counts=[0, 9, 1], missing=[2])
        >>> len(vocabulary), vocabulary.index["zyzzyva"]
        (3, 2)
    """

    tokens: tuple[str, ...]
    counts: Ids | None = None
    missing: Ids | None = None
    vectors: NDArray[np.floating] | None = field(default=None, repr=False)

    def __init__(
        self,
        tokens: Iterable[str],
        counts: Iterable[int] | None = None,
        missing: Iterable[int] | None = None,
        vectors: NDArray[np.floating] | None = None,
    ) -> None:
        if isinstance(tokens, set | frozenset):
            raise InputError(
                "tokens stand in the order of their rows. Received a set, which has none. Pass "
                "the list that ids are looked up in."
            )
        set_ = object.__setattr__
        set_(self, "tokens", tuple(tokens))
        if others := [token for token in self.tokens if not isinstance(token, str)]:
            raise InputError(
                f"tokens are text. Received: {others[0]!r}. Pass map(str, …) for numbers."
            )
        set_(self, "counts", None if counts is None else _integers("counts", counts))
        set_(self, "missing", None if missing is None else np.unique(_integers("missing", missing)))
        set_(self, "vectors", None if vectors is None else _matrix(vectors, len(self)))
        if len(self.index) != len(self.tokens):
            twice = next(t for i, t in enumerate(self.tokens) if self.index[t] != i)
            raise InputError(f"each token has one row. Received {twice!r} twice. Drop one of them.")
        if self.counts is not None and self.counts.shape != (len(self),):
            raise InputError(
                f"counts has one entry per token. Received {self.counts.shape} for {len(self)} "
                "tokens. Count over the same vocabulary."
            )
        if self.counts is not None and self.counts.size and self.counts.min() < 0:
            raise InputError(
                f"counts are not negative. Received: {self.counts.min()}. "
                "0 is for tokens that do not occur."
            )
        if self.missing is not None:
            self.missing.setflags(write=False)
            outside = self.missing[(self.missing < 0) | (self.missing >= len(self))]
            if outside.size:
                raise InputError(
                    f"missing rows must lie in [0, {len(self)}). Received: {outside[0]}. "
                    "Was the vocabulary resized?"
                )

    @staticmethod
    def of(source: Any, num_rows: int | None = None) -> Vocabulary:
        """Read a vocabulary from what other libraries have.

        Args:
            source: A mapping from token to row, such as `{"the": 0, "of": 1}`; gensim's
                `KeyedVectors`, whose vectors are taken too, and counts, which gensim makes up from
                the order where a file has none; a tokenizer of transformers; a `TextVectorization`
                or `StringLookup` of Keras; a list of tokens; or a `Vocabulary`.
            num_rows: The rows V of the table, where it has more than there are tokens, as tables of
                language models often do. The others are named `<row 50257>` and so on, occur never
                and have a vector of zeros.

        Raises:
            InputError: It is none of these, names a row twice, or has more tokens than there are
                rows.

        Example:
            >>> Vocabulary.of({"the": 0, "of": 2}, num_rows=4).tokens
            ('the', '<row 1>', 'of', '<row 3>')
        """
        if isinstance(source, Vocabulary):
            return _widened(source, num_rows)
        if hasattr(source, "index_to_key"):
            counts = getattr(source, "expandos", {}).get("count")
            return _widened(Vocabulary(source.index_to_key, counts, None, source.vectors), num_rows)
        if hasattr(source, "get_vocab"):
            source = source.get_vocab()
        elif hasattr(source, "get_vocabulary"):
            # Also the mask and out-of-vocabulary tokens, which have rows of their own.
            source = _told_apart([str(token) for token in source.get_vocabulary()])
        if isinstance(source, Mapping):
            return Vocabulary(_placed(source, num_rows))
        if isinstance(source, str) or not isinstance(source, Iterable):
            raise InputError(
                "a vocabulary is a mapping from token to row, KeyedVectors, a tokenizer, a Keras "
                f"lookup layer or a list of tokens. Received: {type(source).__name__}. "
                "Pass the tokens, one for each row."
            )
        return _widened(Vocabulary(source), num_rows)

    @cached_property
    def index(self) -> Mapping[str, int]:
        """The row of each token."""
        return {token: row for row, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return (
            self.tokens == other.tokens
            and _same(self.counts, other.counts)
            and _same(self.missing, other.missing)
            and _same(self.vectors, other.vectors)
        )

    def __hash__(self) -> int:
        return hash(self.tokens)


def _integers(name: str, values: Iterable[int]) -> Ids:
    try:
        array: NDArray[Any] = np.asarray(values if isinstance(values, np.ndarray) else list(values))
    except ValueError:  # numpy's word for a ragged list
        raise InputError(
            f"{name} is a flat list of integers. Received a ragged one. "
            "Pass a number for each token."
        ) from None
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(
            f"{name} is a list of integers. Received: {array.dtype} of shape {array.shape}. "
            "Pass whole numbers."
        )
    integers = array.astype(np.int64)  # a copy: the caller may go on writing to theirs
    integers.setflags(write=False)
    return integers


def _matrix(values: Any, rows: int) -> NDArray[np.floating]:
    rule = f"vectors are floating point of the shape ({rows}, D), a row for each token."
    try:
        array: NDArray[Any] = np.asarray(values)
    except ValueError:
        raise InputError(f"{rule} Received rows of different lengths. Cut them to one.") from None
    if array.ndim != 2 or len(array) != rows or array.dtype.kind != "f":
        raise InputError(
            f"{rule} Received {array.dtype} of the shape {array.shape}. "
            "Are they of this vocabulary?"
        )
    return array


def _placed(rows: Mapping[str, int], num_rows: int | None) -> list[str]:
    """The token of each row; rows without one are named after their number."""
    token_of: dict[int, str] = {}
    for token, row in rows.items():
        if not isinstance(row, int | np.integer) or row < 0 or row in token_of:
            raise InputError(
                "each token has a row of its own, a whole number from 0 up. Received: "
                f"{token!r} has {row!r}{f', as {token_of[row]!r}' if row in token_of else ''}. "
                "Is it a mapping from token to row?"
            )
        token_of[int(row)] = token
    number = max(token_of, default=-1) + 1
    if num_rows is None:
        num_rows = number
    if number > num_rows:
        raise InputError(
            f"the vocabulary's rows lie in [0, {num_rows}). Received: {number - 1}. Was the "
            "vocabulary resized?"
        )
    return [token_of.get(row, f"<row {row}>") for row in range(num_rows)]


def _widened(known: Vocabulary, num_rows: int | None) -> Vocabulary:
    """The same for a table of more rows than there are tokens."""
    if num_rows is None or num_rows == len(known):
        return known
    tokens = _placed(known.index, num_rows)
    more = (0, num_rows - len(known))
    counts = None if known.counts is None else np.pad(known.counts, more)
    vectors = None if known.vectors is None else np.pad(known.vectors, (more, (0, 0)))
    return Vocabulary(tokens, counts, known.missing, vectors)


def _told_apart(tokens: list[str]) -> list[str]:
    """The same, but for repeated tokens: Keras gives every row for unknown tokens one name."""
    first = {token: row for row, token in reversed([*enumerate(tokens)])}
    return [t if first[t] == row else f"<row {row}>" for row, t in enumerate(tokens)]


def _same(a: NDArray[Any] | None, b: NDArray[Any] | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def covered_share(rows: Ids | NDArray[np.bool_], vocabulary: Vocabulary | None) -> float | None:
    """The share of the training data's tokens that are of some rows, where tokens were counted."""
    counts = None if vocabulary is None else vocabulary.counts
    if counts is None or not (total := counts.sum()):
        return None
    return float(counts[rows].sum() / total)


def find_vocabulary(given: Vocabulary | None, *owners: Any) -> Vocabulary | None:
    """The vocabulary that was given, or the first that one of some objects has as `vocabulary`.

    Example:
        >>> find_vocabulary(None, None, object()) is None
        True
    """
    found = (given, *(getattr(owner, "vocabulary", None) for owner in owners))
    return next((one for one in found if isinstance(one, Vocabulary)), None)
