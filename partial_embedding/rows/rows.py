"""Which rows: every way of naming rows of a table, checked once and evaluated against a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from os import PathLike, fspath
from typing import Any, Literal, SupportsIndex, Union

import numpy as np

from partial_embedding.errors import InputError, did_you_mean, refused_at
from partial_embedding.rows.kinds import CHOICES, Choice, Table, flat_array, read_ids, read_tokens
from partial_embedding.rows.vocabulary import Ids, Vocabulary

Config = str | dict[str, Any]
RowsLike = Union[
    "Rows",
    Literal["all", "none", "missing", "new"],
    Iterable[SupportsIndex],  # ids, or a mask; also an array or a tensor of either
    slice,
    Mapping[str, Any],
]
"""What `Rows.parse` reads, for type checkers and editors: a misspelt name is seen there."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A choice of rows, independent of the table that it will be applied to.

    Build one with `Rows.parse` or the named constructors, combine them with `|`, `&`, `-` and `~`,
    and evaluate the result with `resolve`. A choice reads from and writes to plain YAML, `kind` or
    `{kind: argument}`:

    - `all`, `none`;
    - `ids: [3, 7]`, `mask: [true, false, …]`, `range: [start, stop, step]`, and `ids_file: PATH`, a
      `.npy` file of ids or a mask, or text with one id a line;
    - `tokens: [the, of]`, `token_file: PATH` with one token a line, and `matching: "^@"`, a regular
      expression that is searched for in each token;
    - `missing`, the rows that had no pre-trained vector; `new`, those by which the table grew last;
    - `most_frequent: 1000` and `least_frequent: 0.2`, a number or a share of all rows;
      `covering: 0.9`, the fewest rows that make up this share of the training data's tokens;
      `min_count: 5`, those that occur at least so often;
    - `random: 0.1`, or `random: {amount: 0.1, seed: 3}`;
    - `nearest: {tokens: [good], amount: 50}`, by the cosine of `Vocabulary.vectors`, these tokens
      themselves first;
    - `union`, `intersection` and `difference` of a list of choices, `not` of one.

    Files are read when the choice is made.

    Example:
        >>> rows = Rows.missing() | Rows.most_frequent(0.5)
        >>> vocabulary = Vocabulary(["a", "b", "c", "d"], counts=[9, 7, 2, 1], missing=[3])
        >>> rows.resolve(4, vocabulary)
        array([0, 1, 3])
        >>> rows.to_config()
        {'union': ['missing', {'most_frequent': 0.5}]}
        >>> Rows.parse(rows.to_config()) == rows
        True
    """

    kind: str
    argument: Any = None

    @staticmethod
    def parse(value: object) -> Rows:
        """Read rows in any of the forms that are accepted wherever rows are named.

        Args:
            value: `"all"`, `"none"`, `"missing"`; ids (an iterable of integers, or an array, which
                alone may be empty); a boolean mask with one entry per row; a `range` or `slice`; a
                mapping `{kind: argument}`, as listed above; or a `Rows`.

        Raises:
            InputError: The value is none of these, is empty, repeats an id or has a negative one,
                or a file cannot be read.

        Example:
            >>> Rows.parse([7, 2]).resolve(10)
            array([2, 7])
            >>> Rows.parse({"not": {"range": [0, 8]}}).resolve(10)
            array([8, 9])
        """
        if isinstance(value, Rows):
            return value
        if isinstance(value, str):
            return _make(value, None)
        if isinstance(value, Mapping):
            if len(value) != 1:
                raise InputError(
                    "rows are named by one key, such as {most_frequent: 0.2}. Received the keys "
                    f"{list(value)}. Combine choices with 'union' or 'intersection'."
                )
            ((kind, argument),) = value.items()
            return _make(str(kind), argument)
        if isinstance(value, range):
            return _make("range", _ascending(value))
        if isinstance(value, slice):
            return _make("range", [value.start, value.stop, value.step])
        if isinstance(value, np.ndarray) and value.shape == (0,) and value.dtype.kind in "iu":
            return Rows("none")  # computed, unlike a list that was left empty
        if isinstance(value, Iterable):
            array = flat_array(value)
            return _make("mask" if array.dtype == np.bool_ else "ids", array)
        raise InputError(
            "rows are 'all', 'none', ids, a boolean mask, a range, a slice, a mapping or Rows. "
            f"Received: {value!r}. For one row write [3]."
        )

    @staticmethod
    def all() -> Rows:
        """Every row.

        Example:
            >>> Rows.all().resolve(3)
            array([0, 1, 2])
        """
        return Rows("all")

    @staticmethod
    def none() -> Rows:
        """No row.

        Example:
            >>> Rows.none().resolve(3)
            array([], dtype=int64)
        """
        return Rows("none")

    @staticmethod
    def missing() -> Rows:
        """The rows that had no pre-trained vector, as `Vocabulary.missing` lists them.

        Example:
            >>> Rows.missing().resolve(2, Vocabulary(["a", "b"], missing=[1]))
            array([1])
        """
        return Rows("missing")

    @staticmethod
    def most_frequent(amount: int | float) -> Rows:
        """The most frequent rows by `Vocabulary.counts`; among equals, lower ids come first.

        Args:
            amount: A number of rows (`int`), or a share of all rows in (0, 1] (`float`).

        Example:
            >>> Rows.most_frequent(2).resolve(3, Vocabulary("abc", counts=[1, 5, 5]))
            array([1, 2])
        """
        return _make("most_frequent", amount)

    def resolve(
        self, num_rows: int, vocabulary: Vocabulary | None = None, *, new: Ids | None = None
    ) -> Ids:
        """Evaluate the choice for one table.

        Args:
            num_rows: The number of rows V of the table.
            vocabulary: What the rows mean, for choices that ask for it.
            new: The rows by which the table grew last, sorted ids, int64, if it did.

        Returns:
            Sorted ids without duplicates, int64, shape (K,).

        Raises:
            InputError: An id lies outside [0, V), a mask has another length, or the choice needs a
                vocabulary (or its counts or missing rows) that is not there.

        Example:
            >>> Rows.parse([3]).resolve(3)
            Traceback (most recent call last):
                ...
            partial_embedding.errors.InputError: rows must lie in [0, 3). Received: 3. Was the vocabulary resized?
        """  # noqa: E501  # an error message is shown as it is printed
        if vocabulary is not None and len(vocabulary) != num_rows:
            raise InputError(
                f"a vocabulary has one token per row. Received {len(vocabulary)} tokens for "
                f"{num_rows} rows. Build the table from this vocabulary."
            )
        return self._select(Table(num_rows, vocabulary, new))

    def _select(self, table: Table) -> Ids:
        """Evaluate the choice for a table that `resolve` has looked at."""
        return _CHOICES[self.kind].select(self.argument, table)

    def to_config(self) -> Config:
        """Write the choice as plain YAML values; the inverse of `parse`.

        Example:
            >>> (~Rows.parse([0])).to_config()
            {'not': {'ids': [0]}}
        """
        if self.argument is None:
            return self.kind
        if (write := _WRITTEN.get(self.kind)) is not None:
            return {self.kind: write(self.argument)}
        return {self.kind: _plain(self.argument)}

    def __or__(self, other: Rows) -> Rows:
        return Rows("union", (self, other))

    def __and__(self, other: Rows) -> Rows:
        return Rows("intersection", (self, other))

    def __sub__(self, other: Rows) -> Rows:
        return Rows("difference", (self, other))

    def __invert__(self) -> Rows:
        return Rows("not", self)

    def __eq__(self, other: object) -> bool:
        # By what is written: 1 is a number of rows and 1.0 a share, though they are equal.
        return isinstance(other, Rows) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"Rows({self.to_config()!r})"


def _make(kind: str, argument: Any) -> Rows:
    if (read := _READ.get(kind)) is not None:
        return _from_file(argument, *read)
    if kind not in _CHOICES:
        named = sorted([*_CHOICES, *_READ])
        raise InputError(
            f"rows are chosen by one of {named}. Received: {kind!r}."
            f"{did_you_mean(kind, named, ' Write [3, 7] for ids, or {tokens: [the]} for words.')}"
        )
    return Rows(kind, _CHOICES[kind].check(argument))


def _from_file(path: Any, read: Callable[[str], Any], kind: str | None) -> Rows:
    if not isinstance(path, str | PathLike):
        raise InputError(
            f"rows in a file are named by its path. Received: {path!r}. "
            "Write ids without a file as [3, 7]."
        )
    values = read(fspath(path))
    with refused_at(fspath(path)):
        return Rows.parse(values if kind is None else {kind: values})


def _ascending(ids: range) -> list[int]:
    """The ids of a range as a slice: there, a bound below 0 would count from the end."""
    if not ids:
        return [0, 0, 1]
    ids = ids if ids.step > 0 else ids[::-1]
    if ids[0] < 0:
        raise InputError(
            f"row ids are not negative. Received: {ids[0]}. "
            "For the last n rows write slice(-n, None)."
        )
    return [ids[0], ids[-1] + 1, ids.step]


# Choices that are made of others


def _check_choices(argument: Any) -> tuple[Rows, ...]:
    if not isinstance(argument, list | tuple) or not argument:
        raise InputError(
            "'union', 'intersection' and 'difference' take a list of choices. "
            f"Received: {argument!r}. Write [missing, {{most_frequent: 0.2}}]."
        )
    return tuple(Rows.parse(choice) for choice in argument)


def _select_union(choices: tuple[Rows, ...], table: Table) -> Ids:
    mask = np.zeros(table.num_rows, np.bool_)
    for choice in choices:
        mask[choice._select(table)] = True
    return np.flatnonzero(mask)


def _folded(combine: Callable[..., Ids]) -> Callable[..., Ids]:
    def select(choices: tuple[Rows, ...], table: Table) -> Ids:
        sets = (choice._select(table) for choice in choices)
        return reduce(partial(combine, assume_unique=True), sets)

    return select


def _select_not(choice: Rows, table: Table) -> Ids:
    mask = np.ones(table.num_rows, np.bool_)
    mask[choice._select(table)] = False
    return np.flatnonzero(mask)


_CHOICES: Mapping[str, Choice] = {
    **CHOICES,
    "union": Choice(_check_choices, _select_union),
    "intersection": Choice(_check_choices, _folded(np.intersect1d)),
    "difference": Choice(_check_choices, _folded(np.setdiff1d)),
    "not": Choice(Rows.parse, _select_not),
}
# How an argument is written that is no plain list of values.
_WRITTEN: Mapping[str, Callable[[Any], Any]] = {
    "random": lambda pair: {"amount": pair[0], "seed": pair[1]},
    "nearest": lambda pair: {"tokens": list(pair[0]), "amount": pair[1]},
}
# Files, how each is read, and the kind of choice that is in it.
_READ: Mapping[str, tuple[Callable[[str], Any], str | None]] = {
    "ids_file": (read_ids, None),
    "token_file": (read_tokens, "tokens"),
}


def _plain(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        return argument.tolist()
    if isinstance(argument, Rows):
        return argument.to_config()
    return [_plain(part) for part in argument] if isinstance(argument, tuple) else argument
