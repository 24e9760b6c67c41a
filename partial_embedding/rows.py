"""Which rows: every way of naming rows of a table, checked once and evaluated against a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from partial_embedding.errors import InputError
from partial_embedding.vocabulary import Ids, Vocabulary

Config = str | dict[str, Any]


@dataclass(frozen=True, eq=False)
class Rows:
    """A choice of rows, independent of the table that it will be applied to.

    Build one with `Rows.parse` or the named constructors, combine them with `|`, `&`, `-` and `~`,
    and evaluate the result with `resolve`. A choice reads from and writes to plain YAML: `kind`, or
    `{kind: argument}`.

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
                mapping `{kind: argument}` as `to_config` writes it; or a `Rows`.

        Raises:
            InputError: The value is none of these, is empty, repeats an id or has a negative one.

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
            array = _array(value)
            return _make("mask" if array.dtype == np.bool_ else "ids", array)
        raise InputError(
            "rows are 'all', 'none', ids, a boolean mask, a range, a slice, a mapping or Rows. "
            f"Received: {value!r}."
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

    def resolve(self, num_rows: int, vocabulary: Vocabulary | None = None) -> Ids:
        """Evaluate the choice for one table.

        Args:
            num_rows: The number of rows V of the table.
            vocabulary: What the rows mean, for choices that ask for it.

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
        return _KINDS[self.kind].select(self.argument, num_rows, vocabulary)

    def to_config(self) -> Config:
        """Write the choice as plain YAML values; the inverse of `parse`.

        Example:
            >>> (~Rows.parse([0])).to_config()
            {'not': {'ids': [0]}}
        """
        return self.kind if self.argument is None else {self.kind: _plain(self.argument)}

    def __or__(self, other: Rows) -> Rows:
        return Rows("union", (self, other))

    def __and__(self, other: Rows) -> Rows:
        return Rows("intersection", (self, other))

    def __sub__(self, other: Rows) -> Rows:
        return self & ~other

    def __invert__(self) -> Rows:
        return Rows("not", self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and self.to_config() == other.to_config()

    def __hash__(self) -> int:
        return hash(repr(self.to_config()))

    def __repr__(self) -> str:
        return f"Rows({self.to_config()!r})"


class _Kind(NamedTuple):
    """How one kind of choice checks its argument when it is made, and selects ids from a table."""

    check: Callable[[Any], Any]
    select: Callable[[Any, int, Vocabulary | None], Ids]


def _make(kind: str, argument: Any) -> Rows:
    if kind not in _KINDS:
        raise InputError(f"rows are chosen by one of {sorted(_KINDS)}. Received: {kind!r}.")
    return Rows(kind, _KINDS[kind].check(argument))


# Checks: each takes the argument as written and returns it normalised.


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


def _no_argument(argument: Any) -> None:
    if argument is not None:
        raise InputError(
            f"'all', 'none' and 'missing' take no argument. Received: {argument!r}. "
            "Write the word alone."
        )


def _check_ids(argument: Any) -> Ids:
    array = _array(argument)
    if array.dtype.kind not in "iu":
        raise InputError(f"row ids are integers. Received: {_shown(argument)}.")
    # Sorting is skipped for ids that come in order, as those of a large table usually do.
    ids = array.astype(np.int64)
    if ids.size > 1 and not (ids[1:] > ids[:-1]).all():
        ids = np.sort(ids)
        if (repeated := ids[1:][ids[1:] == ids[:-1]]).size:
            raise InputError(f"each row is named once. Received {repeated[0]} twice. Remove one.")
    if ids[0] < 0:
        raise InputError(
            f"row ids are not negative. Received: {ids[0]}. "
            "For the last n rows write slice(-n, None)."
        )
    ids.setflags(write=False)
    return ids


def _check_mask(argument: Any) -> np.ndarray[Any, np.dtype[np.bool_]]:
    array = _array(argument)
    if array.dtype != np.bool_:
        raise InputError(f"a mask is made of true and false. Received: {_shown(argument)}.")
    mask = array.astype(np.bool_)  # a copy: the caller may go on writing to theirs
    mask.setflags(write=False)
    return mask


def _check_range(argument: Any) -> tuple[int | None, ...]:
    parts = list(argument) if isinstance(argument, list | tuple) else [argument]
    integers = all(p is None or (isinstance(p, int) and not isinstance(p, bool)) for p in parts)
    if not (2 <= len(parts) <= 3 and integers) or 0 in parts[2:]:
        raise InputError(
            "a range is [start, stop] or [start, stop, step], integers or null, with a step other "
            f"than 0. Received: {argument!r}."
        )
    return (*parts, None)[:3]


def _check_amount(argument: Any) -> int | float:
    is_number = isinstance(argument, int | float) and not isinstance(argument, bool)
    if not is_number or not (argument >= 1 if isinstance(argument, int) else 0 < argument <= 1):
        raise InputError(
            "an amount is a whole number of rows from 1 up, or a share in (0, 1] with a decimal "
            f"point. Received: {argument!r}."
        )
    return argument  # type: ignore[no-any-return]  # checked above


def _check_choices(argument: Any) -> tuple[Rows, ...]:
    if not isinstance(argument, list | tuple) or not argument:
        raise InputError(
            f"'union' and 'intersection' take a list of choices. Received: {argument!r}."
        )
    return tuple(Rows.parse(choice) for choice in argument)


# Selections: each takes a checked argument and returns sorted ids without duplicates.


def _select_ids(ids: Ids, num_rows: int, _: Vocabulary | None) -> Ids:
    if ids[-1] >= num_rows:
        raise InputError(
            f"rows must lie in [0, {num_rows}). Received: {ids[-1]}. Was the vocabulary resized?"
        )
    return ids


def _select_mask(mask: Any, num_rows: int, _: Vocabulary | None) -> Ids:
    if mask.shape != (num_rows,):
        raise InputError(
            f"a mask has one entry for each of the {num_rows} rows. Received: {mask.size}. "
            "Was the vocabulary resized?"
        )
    return np.flatnonzero(mask)


def _select_range(parts: tuple[int | None, ...], num_rows: int, _: Vocabulary | None) -> Ids:
    for part in parts[:2]:
        if part is not None and abs(part) > num_rows:
            raise InputError(
                f"a range lies within the table's {num_rows} rows. Received: {list(parts)}. "
                "Was the vocabulary resized?"
            )
    return np.unique(np.arange(num_rows, dtype=np.int64)[slice(*parts)])


def _select_missing(_: None, num_rows: int, vocabulary: Vocabulary | None) -> Ids:
    return _known("missing", vocabulary)


def _select_most_frequent(amount: int | float, num_rows: int, vocabulary: Vocabulary | None) -> Ids:
    counts = _known("counts", vocabulary)
    number = amount if isinstance(amount, int) else round(amount * num_rows)
    if number > num_rows:
        raise InputError(
            f"the table has {num_rows} rows. Received a wish for the {number} most frequent. "
            "Write 'all'."
        )
    # A stable sort keeps lower ids first among equals, so that the choice is a function of counts.
    return np.sort(np.argsort(-counts, kind="stable")[:number])


def _select_union(choices: tuple[Rows, ...], num_rows: int, v: Vocabulary | None) -> Ids:
    return np.unique(np.concatenate([choice.resolve(num_rows, v) for choice in choices]))


def _select_intersection(choices: tuple[Rows, ...], num_rows: int, v: Vocabulary | None) -> Ids:
    ids = choices[0].resolve(num_rows, v)
    for choice in choices[1:]:
        ids = np.intersect1d(ids, choice.resolve(num_rows, v), assume_unique=True)
    return ids


def _select_not(choice: Rows, num_rows: int, vocabulary: Vocabulary | None) -> Ids:
    mask = np.ones(num_rows, np.bool_)
    mask[choice.resolve(num_rows, vocabulary)] = False
    return np.flatnonzero(mask)


_KINDS: Mapping[str, _Kind] = {
    "all": _Kind(_no_argument, lambda _, num_rows, __: np.arange(num_rows, dtype=np.int64)),
    "none": _Kind(_no_argument, lambda _, __, ___: np.zeros(0, np.int64)),
    "ids": _Kind(_check_ids, _select_ids),
    "mask": _Kind(_check_mask, _select_mask),
    "range": _Kind(_check_range, _select_range),
    "missing": _Kind(_no_argument, _select_missing),
    "most_frequent": _Kind(_check_amount, _select_most_frequent),
    "union": _Kind(_check_choices, _select_union),
    "intersection": _Kind(_check_choices, _select_intersection),
    "not": _Kind(Rows.parse, _select_not),
}


def _known(what: str, vocabulary: Vocabulary | None) -> Ids:
    if vocabulary is None:
        raise InputError(
            f"these rows are chosen by the vocabulary's {what}. Received no vocabulary. "
            "Pass vocabulary=."
        )
    values: Ids | None = getattr(vocabulary, what)
    if values is None:
        raise InputError(
            f"these rows are chosen by the vocabulary's {what}. Received a vocabulary without. "
            f"Build it with Vocabulary(tokens, {what}=…)."
        )
    return values


def _array(values: Any) -> np.ndarray[Any, Any]:
    """A flat array of what was given; numpy reads tensors of every framework on the CPU."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise InputError(f"rows are listed as [3, 7, …]. Received: {values!r}.")
    try:
        array = np.asarray(values if hasattr(values, "__array__") else list(values))
    except ValueError:  # numpy's word for a ragged list
        raise InputError(f"rows are a flat list. Received: {_shown(values)}.") from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "biuf"):
        raise InputError(f"rows are a flat list of integers. Received: {_shown(values)}.")
    if array.size == 0:
        raise InputError("a list of rows is not empty. Received: []. For no row write 'none'.")
    return array


def _plain(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        return argument.tolist()
    if isinstance(argument, Rows):
        return argument.to_config()
    return [_plain(part) for part in argument] if isinstance(argument, tuple) else argument


def _shown(values: Any, most: int = 80) -> str:
    text = " ".join(repr(values).split())
    return text if len(text) <= most else text[:most] + "…"
