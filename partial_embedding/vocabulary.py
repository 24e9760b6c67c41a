"""What rows mean: the token of each row, how often it occurs, and which rows had no vector."""

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

    Raises:
        InputError: A token occurs twice, or `counts` or `missing` do not fit the tokens.

    Example:
        >>> vocabulary = Vocabulary(["<pad>", "the", "zyzzyva"], counts=[0, 9, 1], missing=[2])
        >>> len(vocabulary), vocabulary.index["zyzzyva"]
        (3, 2)
    """

    tokens: tuple[str, ...]
    counts: Ids | None = None
    missing: Ids | None = field(default=None)

    def __init__(
        self,
        tokens: Iterable[str],
        counts: Iterable[int] | None = None,
        missing: Iterable[int] | None = None,
    ) -> None:
        set_ = object.__setattr__
        set_(self, "tokens", tuple(tokens))
        set_(self, "counts", None if counts is None else _integers("counts", counts))
        set_(self, "missing", None if missing is None else np.unique(_integers("missing", missing)))
        if len(self.index) != len(self.tokens):
            twice = next(t for i, t in enumerate(self.tokens) if self.index[t] != i)
            raise InputError(f"each token has one row. Received {twice!r} twice. Drop one of them.")
        if self.counts is not None and self.counts.shape != (len(self),):
            raise InputError(
                f"counts has one entry per token. Received {self.counts.shape} for {len(self)} "
                "tokens. Count over the same vocabulary."
            )
        if self.counts is not None and self.counts.size and self.counts.min() < 0:
            raise InputError(f"counts are not negative. Received: {self.counts.min()}.")
        if self.missing is not None:
            self.missing.setflags(write=False)
            outside = self.missing[(self.missing < 0) | (self.missing >= len(self))]
            if outside.size:
                raise InputError(
                    f"missing rows must lie in [0, {len(self)}). Received: {outside[0]}. "
                    "Was the vocabulary resized?"
                )

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
        )

    def __hash__(self) -> int:
        return hash(self.tokens)


def _integers(name: str, values: Iterable[int]) -> Ids:
    try:
        array: NDArray[Any] = np.asarray(values if isinstance(values, np.ndarray) else list(values))
    except ValueError:  # numpy's word for a ragged list
        raise InputError(f"{name} is a flat list of integers. Received a ragged one.") from None
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(
            f"{name} is a list of integers. Received: {array.dtype} of shape {array.shape}."
        )
    integers = array.astype(np.int64)  # a copy: the caller may go on writing to theirs
    integers.setflags(write=False)
    return integers


def _same(a: Ids | None, b: Ids | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))
