"""The ways of naming rows: each checks its argument once, and selects ids from a table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from partial_embedding.errors import InputError
from partial_embedding.files import read_lines, refuse_no_file
from partial_embedding.rows.cosines import cosines_of
from partial_embedding.rows.vocabulary import Ids, Vocabulary


class Table(NamedTuple):
    """What is known of a table where a choice is evaluated for it."""

    num_rows: int
    vocabulary: Vocabulary | None
    new: Ids | None  # the rows by which it grew last


class Choice(NamedTuple):
    """One kind of choice: `check` normalizes its argument, `select` gives sorted ids of a table."""

    check: Callable[[Any], Any]
    select: Callable[[Any, Table], Ids]  # from what `check` gave


# Checks


def _no_argument(argument: Any) -> None:
    if argument is not None:
        raise InputError(
            f"'all', 'none', 'missing' and 'new' take no argument. Received: {argument!r}. "
            "Write the word alone."
        )


def _check_ids(argument: Any) -> Ids:
    array = flat_array(argument)
    if array.dtype.kind not in "iu":
        raise InputError(
            f"row ids are integers. Received: {shown(argument)}. Convert them to int64."
        )
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
    array = flat_array(argument)
    if array.dtype != np.bool_:
        raise InputError(
            f"a mask is made of true and false. Received: {shown(argument)}. For ids write a list."
        )
    mask = array.astype(np.bool_)  # a copy: the caller may go on writing to theirs
    mask.setflags(write=False)
    return mask


def _check_range(argument: Any) -> tuple[int | None, ...]:
    parts = list(argument) if isinstance(argument, list | tuple) else [argument]
    integers = all(part is None or is_whole(part) for part in parts)
    if not (2 <= len(parts) <= 3 and integers) or 0 in parts[2:]:
        raise InputError(
            "a range is [start, stop] or [start, stop, step], integers or null, with a step other "
            f"than 0. Received: {argument!r}. [10, 20] is rows 10 to 19."
        )
    return (*parts, None)[:3]


def _check_amount(argument: Any) -> int | float:
    """A number of rows, or a share of all."""
    if is_whole(argument) and argument >= 1:
        return int(argument)
    return _check_share(argument, "an amount is a whole number of rows from 1 up, or ")


def _check_share(argument: Any, rule: str = "") -> float:
    if not isinstance(argument, float) or not 0 < argument <= 1:
        raise InputError(
            f"{rule}a share in (0, 1] with a decimal point. Received: {argument!r}. 0.2 is a fifth."
        )
    return float(argument)  # numpy's are floats too, but not to YAML


def _check_covered(argument: Any) -> float:
    return _check_share(argument, "the part of all tokens that rows cover is ")


def _check_count(argument: Any) -> int:
    if not is_whole(argument) or argument < 1:
        raise InputError(
            f"min_count is a whole number of occurrences from 1 up. Received: {argument!r}. "
            "5 leaves out what is rarer."
        )
    return int(argument)


def _check_tokens(argument: Any) -> tuple[str, ...]:
    tokens = [argument] if isinstance(argument, str) else argument
    if (
        not isinstance(tokens, Iterable)
        or isinstance(tokens, Mapping)
        or not (tokens := list(tokens))
        or not all(isinstance(token, str) for token in tokens)
    ):
        raise InputError(
            f"tokens are listed as [the, of, …]. Received: {shown(argument)}. "
            "Put those in quotes that YAML reads as numbers or as true and false."
        )
    twice = [token for token, number in Counter(tokens).items() if number > 1]
    if twice:
        raise InputError(f"each token is named once. Received {twice[0]!r} twice. Remove one.")
    return tuple(map(str, tokens))


def _check_pattern(argument: Any) -> str:
    # A compiled pattern would lose its flags in YAML, where (?i) keeps them.
    if not isinstance(argument, str):
        raise InputError(
            "tokens are matched by a regular expression of Python's, as text. Received: "
            f"{argument!r}. Write flags as in '(?i)the'."
        )
    try:
        re.compile(argument)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(
            "tokens are matched by a regular expression of Python's. Received: "
            f"{shown(argument)}: {error}. Write a backslash before what is meant as it stands."
        ) from None
    return str(argument)


def _check_random(argument: Any) -> tuple[int | float, int]:
    given = dict(argument) if isinstance(argument, Mapping) else {"amount": argument}
    amount, seed = given.pop("amount", None), given.pop("seed", 0)
    if given or not is_whole(seed) or seed < 0:
        raise InputError(
            "a random choice is an amount, or {amount: …, seed: …} with a seed from 0 up. "
            f"Received: {argument!r}. 0.1 is a tenth of the rows."
        )
    return _check_amount(amount), seed


def _check_nearest(argument: Any) -> tuple[tuple[str, ...], int | float]:
    if not isinstance(argument, Mapping) or argument.keys() != {"tokens", "amount"}:
        raise InputError(
            f"nearest rows are {{tokens: […], amount: …}}. Received: {argument!r}. Write both keys."
        )
    return _check_tokens(argument["tokens"]), _check_amount(argument["amount"])


# Selections


def _select_ids(ids: Ids, table: Table) -> Ids:
    if ids[-1] >= table.num_rows:
        raise InputError(
            f"rows must lie in [0, {table.num_rows}). Received: {ids[-1]}. "
            "Was the vocabulary resized?"
        )
    return ids.copy()  # a choice that was unpickled would let itself be written to


def _select_mask(mask: Any, table: Table) -> Ids:
    if mask.shape != (table.num_rows,):
        raise InputError(
            f"a mask has one entry for each of the {table.num_rows} rows. Received: {mask.size}. "
            "Was the vocabulary resized?"
        )
    return np.flatnonzero(mask)


def _select_range(parts: tuple[int | None, ...], table: Table) -> Ids:
    num_rows = table.num_rows
    for part in parts[:2]:
        if part is not None and abs(part) > num_rows:
            raise InputError(
                f"a range lies within the table's {num_rows} rows. Received: {list(parts)}. "
                "Was the vocabulary resized?"
            )
    ids = np.arange(num_rows, dtype=np.int64)[slice(*parts)]
    start, stop, _step = slice(*parts).indices(num_rows)
    if not len(ids) and start != stop:
        raise InputError(
            f"a range has rows, from its start up to its stop. Received {list(parts)}, which has "
            f"none of a table of {num_rows}. [2, 5] is rows 2 to 4; for no rows write none."
        )
    return ids if (parts[2] or 1) > 0 else ids[::-1]


def _select_missing(_: None, table: Table) -> Ids:
    ids: Ids = _known("missing", table.vocabulary)
    return ids.copy()


def _select_new(_: None, table: Table) -> Ids:
    if table.new is None:
        raise InputError(
            "new rows are those by which a table grew. Received a table that did not. Call "
            "grow_table first, or name the rows otherwise, as {range: [-20, null]} names the last "
            "twenty."
        )
    return _select_ids(table.new, table) if table.new.size else table.new.copy()


def _select_most_frequent(amount: int | float, table: Table) -> Ids:
    return np.sort(by_frequency(table.vocabulary)[: _number_of_rows(amount, table.num_rows)])


def _select_least_frequent(amount: int | float, table: Table) -> Ids:
    number = _number_of_rows(amount, table.num_rows)
    return np.sort(by_frequency(table.vocabulary)[table.num_rows - number :])


def _select_covering(share: float, table: Table) -> Ids:
    order = by_frequency(table.vocabulary)
    covered = np.cumsum(_known("counts", table.vocabulary)[order])
    if not covered.size or not covered[-1]:
        raise InputError(
            "rows cover a share of the tokens that occur. Received counts that are all 0. "
            "Count the tokens of the training data."
        )
    # The fewest rows that reach the share. Dividing rounds as the share was rounded when it was
    # written; 0.07 times 100 is a little more than 7.
    return np.sort(order[: np.searchsorted(covered / covered[-1], share) + 1])


def _select_min_count(count: int, table: Table) -> Ids:
    return np.flatnonzero(_known("counts", table.vocabulary) >= count)


def _select_random(argument: tuple[int | float, int], table: Table) -> Ids:
    amount, seed = argument
    # A larger amount of the same seed has all rows of a smaller one.
    order = np.random.default_rng(seed).permutation(table.num_rows)
    return np.sort(order[: _number_of_rows(amount, table.num_rows)])


def _select_tokens(tokens: tuple[str, ...], table: Table) -> Ids:
    return np.sort(rows_of(tokens, table.vocabulary))


def _select_matching(pattern: str, table: Table) -> Ids:
    matches = re.compile(pattern).search
    tokens = _known("tokens", table.vocabulary)
    return np.array([row for row, token in enumerate(tokens) if matches(token)], np.int64)


def _select_nearest(argument: tuple[tuple[str, ...], int | float], table: Table) -> Ids:
    tokens, amount = argument
    vectors = _known("vectors", table.vocabulary).astype(np.float32, copy=False)
    own = rows_of(tokens, table.vocabulary)
    lengths = np.linalg.norm(vectors, axis=1)
    # A vector of zeros has no direction: among the given it would be nearer than an opposite one.
    given = own[lengths[own] > 0]
    cosines = cosines_of(vectors, vectors[given])
    closeness = cosines.max(axis=1, initial=-np.inf if given.size else 0)
    closeness[lengths == 0] = -np.inf  # padding is near to nothing
    closeness[own] = np.inf
    order = np.argsort(-closeness, kind="stable")
    return np.sort(order[: _number_of_rows(amount, table.num_rows)])


# The leaves; `rows` adds the choices that are made of others.
CHOICES: Mapping[str, Choice] = {
    "all": Choice(_no_argument, lambda _, table: np.arange(table.num_rows, dtype=np.int64)),
    "none": Choice(_no_argument, lambda _, __: np.zeros(0, np.int64)),
    "ids": Choice(_check_ids, _select_ids),
    "mask": Choice(_check_mask, _select_mask),
    "range": Choice(_check_range, _select_range),
    "tokens": Choice(_check_tokens, _select_tokens),
    "matching": Choice(_check_pattern, _select_matching),
    "missing": Choice(_no_argument, _select_missing),
    "new": Choice(_no_argument, _select_new),
    "most_frequent": Choice(_check_amount, _select_most_frequent),
    "least_frequent": Choice(_check_amount, _select_least_frequent),
    "covering": Choice(_check_covered, _select_covering),
    "min_count": Choice(_check_count, _select_min_count),
    "random": Choice(_check_random, _select_random),
    "nearest": Choice(_check_nearest, _select_nearest),
}


# What selections share with orders of growth


def by_frequency(vocabulary: Vocabulary | None) -> Ids:
    """All rows, the most frequent first; among equals, lower ids come first."""
    # A stable sort, so that the order is a function of the counts.
    return np.argsort(-_known("counts", vocabulary), kind="stable")


def rows_of(tokens: Iterable[str], vocabulary: Vocabulary | None) -> Ids:
    """The row of each token, in the order of the tokens."""
    _known("tokens", vocabulary)
    index = vocabulary.index  # type: ignore[union-attr]  # checked just now
    tokens = list(tokens)
    if unknown := [token for token in tokens if token not in index]:
        raise InputError(
            f"tokens are among the vocabulary's {len(index)}. Received: {unknown[0]!r}"
            f"{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''}. "
            "Is it split or lower-cased there?"
        )
    return np.array([index[token] for token in tokens], np.int64)


def _number_of_rows(amount: int | float, num_rows: int) -> int:
    number = amount if isinstance(amount, int) else round(amount * num_rows)
    if number > num_rows:
        raise InputError(
            f"the table has {num_rows} rows. Received a wish for {number} of them. Write 'all'."
        )
    return number


def _known(what: str, vocabulary: Vocabulary | None) -> Any:
    values = getattr(vocabulary, what, None)
    if values is None:
        received = "no vocabulary" if vocabulary is None else "a vocabulary without"
        made = "tokens" if what == "tokens" else f"tokens, {what}=…"
        raise InputError(
            f"these rows are chosen by the vocabulary's {what}. Received {received}. "
            f"Pass vocabulary=Vocabulary({made}) to the callback, or ids."
        )
    return values


# Files


def read_ids(path: str | Path) -> Any:
    """Read ids or a mask from a `.npy` file, or ids from a text of one a line."""
    path = Path(path)
    refuse_no_file(path, "row ids are in a file")
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:  # np.load would also take archives
                return np.lib.format.read_array(file, allow_pickle=False)
        return [int(line) for line in path.read_text(encoding="utf-8-sig").split()]
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{path}: row ids are a .npy file, or text with one whole number a line. "
            f"Received: {reason}. Check the path, or write one id a line."
        ) from None


def read_tokens(path: str | Path) -> list[str]:
    """Read tokens from a text file, one a line; empty lines are left out."""
    lines = read_lines(path, "tokens are text in UTF-8, one a line")
    return [token for line in lines if (token := line.strip())]


# Small parts


def is_whole(value: Any) -> bool:
    """Whether a value is an integer, which booleans are only to Python."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_added(rows: Any) -> int:
    """How many rows a table grows by."""
    # Whoever counts new items does so with NumPy, too.
    if isinstance(rows, bool) or not isinstance(rows, int | np.integer) or rows < 1:
        raise InputError(
            f"a table grows by a whole number of rows from 1 up. Received: {rows!r}. "
            "Pass at least 1."
        )
    return int(rows)


def is_number(value: Any) -> bool:
    """Whether a value is a number, which booleans are only to Python."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def flat_array(values: Any) -> np.ndarray[Any, Any]:
    """A flat array, not empty, of what was given, also of a tensor of any framework on the CPU."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise InputError(f"rows are listed as [3, 7, …]. Received: {values!r}. Write [3] for one.")
    try:
        array = np.asarray(values if hasattr(values, "__array__") else list(values))
    except ValueError:  # numpy's word for a ragged list
        array = np.empty((0, 0))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "biuf"):
        raise InputError(
            f"rows are a flat list of integers. Received: {shown(values)}. "
            "Write all ids in one list."
        )
    if array.size == 0:
        raise InputError("a list of rows is not empty. Received: []. For no row write 'none'.")
    return array


def shown(values: Any, most: int = 80) -> str:
    """What was received, short enough for a message."""
    text = " ".join(repr(values).split())
    return text if len(text) <= most else text[:most] + "…"
