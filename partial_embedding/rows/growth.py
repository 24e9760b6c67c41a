"""How one set of rows grows into another: how many train, and in which order they are unfrozen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from partial_embedding.errors import InputError, did_you_mean
from partial_embedding.rows.kinds import Table, by_frequency, is_whole, rows_of, shown
from partial_embedding.rows.rows import Config, Rows
from partial_embedding.rows.vocabulary import Ids, Vocabulary

# How many rows train after i of n increments, from so many before to so many after.
_SHAPES: Mapping[str, Callable[[int, int, int, int], float]] = {
    "linear": lambda i, n, before, after: before + (after - before) * i / n,
    "cosine": lambda i, n, before, after: (
        before + (after - before) * (1 - math.cos(math.pi * i / n)) / 2
    ),
    "exponential": lambda i, n, before, after: max(before, 1) * (after / max(before, 1)) ** (i / n),
    "doubling": lambda i, n, _, after: math.ldexp(after, i - n),
}
_ORDERS = ("most_frequent", "least_frequent", "random", "ids")


@dataclass(frozen=True)
class Growth:
    """How rows are unfrozen between the start of one stage and the start of the next.

    Args:
        shape: `"linear"`, `"cosine"` (slow at both ends), `"exponential"` (by the same factor each
            time) or `"doubling"` (twice as many each time, and all at the end).
        order: Which rows are unfrozen first: `"most_frequent"`, `"least_frequent"`, `"random"`,
            `"ids"` (in rising order), or a list of ids or of tokens; rows that it leaves out come
            last.
        increments: In how many increments they are unfrozen, each at least one epoch or step long;
            by default one for each epoch between the two stages, or 10 between stages that start at
            steps (as far as there are so many) or at shares of the run. The rows of an increment
            are a cohort.
        seed: Another seed orders differently at random.

    Raises:
        InputError: There is no such shape or order, or a number is out of range.

    Example:
        >>> growth = Growth("doubling")
        >>> [growth.trainable(increment, 4, before=100, after=1000) for increment in range(5)]
        [100, 125, 250, 500, 1000]
    """

    shape: str = "linear"
    order: str | tuple[int, ...] | tuple[str, ...] = "most_frequent"
    increments: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.shape, str) or self.shape not in _SHAPES:
            raise InputError(
                f"rows grow by one of {list(_SHAPES)}. Received: {self.shape!r}."
                f"{did_you_mean(self.shape, _SHAPES, ' Leave it out for linear.')}"
            )
        if not isinstance(self.order, str):
            object.__setattr__(self, "order", _given_order(self.order))
        elif self.order not in _ORDERS:
            raise InputError(
                f"rows are unfrozen in one of the orders {list(_ORDERS)}, or in that of a list of "
                f"ids or tokens. Received: {self.order!r}."
                f"{did_you_mean(self.order, _ORDERS, ' Leave it out for most_frequent.')}"
            )
        if self.increments is not None and not (is_whole(self.increments) and self.increments >= 1):
            raise InputError(
                f"increments are a whole number from 1 up. Received: {self.increments!r}. "
                "Leave it out for one each epoch."
            )
        if not is_whole(self.seed) or self.seed < 0:
            raise InputError(
                f"a seed is a whole number from 0 up. Received: {self.seed!r}. 0 is the default."
            )

    @staticmethod
    def parse(value: object) -> Growth:
        """Read a shape, or a mapping with the keys `shape`, `order`, `increments` and `seed`.

        Args:
            value: A string, a mapping or a `Growth`.

        Raises:
            InputError: It is none of these, or malformed.

        Example:
            >>> Growth.parse("cosine") == Growth.parse({"shape": "cosine"})
            True
        """
        if isinstance(value, Growth):
            return value
        given = {"shape": value} if isinstance(value, str) else value
        keys = sorted(Growth.__dataclass_fields__)
        if not isinstance(given, Mapping) or not set(given) <= set(keys):
            raise InputError(
                f"growth is one of {list(_SHAPES)}, or a mapping with the keys {keys}. "
                f"Received: {value!r}.{did_you_mean(given, keys, ' Write linear, for example.')}"
            )
        return Growth(**given)

    def to_config(self) -> dict[str, Any]:
        """Write the growth as plain YAML values; the inverse of `parse`."""
        config: dict[str, Any] = {"shape": self.shape}
        if self.order != "most_frequent":
            config["order"] = self.order if isinstance(self.order, str) else list(self.order)
        if self.increments is not None:
            config["increments"] = self.increments
        if self.seed:
            config["seed"] = self.seed
        return config

    def trainable(self, increment: int, increments: int, before: int, after: int) -> int:
        """How many rows train after an increment: as before at 0, never fewer, and all at the last.

        Args:
            increment: The increments that have begun, 0 to `increments`.
            increments: In how many increments the rows are unfrozen.
            before: How many trained at first.
            after: How many will train at last.
        """
        if increment in (0, increments):
            return after if increment else before
        number = round(_SHAPES[self.shape](increment, increments, before, after))
        return min(max(number, before), after)

    def arranged(self, ids: Ids, num_rows: int, vocabulary: Vocabulary | None) -> Ids:
        """The rows in the order in which they are unfrozen.

        Args:
            ids: Sorted ids, int64, shape (n,).
            num_rows: All rows V.
            vocabulary: What rows mean, for orders that ask for it.

        Raises:
            InputError: The vocabulary lacks what the order asks for, or a listed id or token is not
                in the table.
        """
        place = np.empty(num_rows, np.int64)
        place[self._all_arranged(num_rows, vocabulary)] = np.arange(num_rows)
        return ids[np.argsort(place[ids])]

    def _all_arranged(self, num_rows: int, vocabulary: Vocabulary | None) -> Ids:
        rising = np.arange(num_rows, dtype=np.int64)
        if self.order == "ids":
            return rising
        if self.order == "random":
            return np.random.default_rng(self.seed).permutation(num_rows)
        if isinstance(self.order, str):
            order = by_frequency(vocabulary)
            return order if self.order == "most_frequent" else order[::-1]
        if isinstance(self.order[0], str):
            first = rows_of(map(str, self.order), vocabulary)
        else:
            if (last := max(map(int, self.order))) >= num_rows:
                raise InputError(
                    f"order: rows must lie in [0, {num_rows}). Received: {last}. "
                    "Was the vocabulary resized?"
                )
            first = np.array(self.order, np.int64)
        return np.concatenate([first, np.setdiff1d(rising, first, assume_unique=True)])


@dataclass(frozen=True, eq=False, repr=False)
class GrownRows(Rows):
    """Rows on their way from one choice to another: those of the first, and some that join.

    A schedule makes them; they are not named in YAML. Of the increments, 0 to all have begun.

    Example:
        >>> before, growth = Rows.parse([9]), Growth(order="ids")
        >>> GrownRows(before, Rows.all(), growth, increment=1, increments=3).resolve(10)
        array([0, 1, 2, 9])
    """

    kind: str = field(default="grown", init=False)
    argument: Any = field(default=None, init=False)
    before: Rows
    after: Rows
    growth: Growth
    increment: int
    increments: int

    def __post_init__(self) -> None:
        increment, increments = self.increment, self.increments
        if not (is_whole(increment) and is_whole(increments) and 0 <= increment <= increments >= 1):
            raise InputError(
                f"an increment is one of 0 to all. Received: {increment!r} of {increments!r}. "
                "Count from 0, which is before the first."
            )

    def _select(self, table: Table) -> Ids:
        """Evaluate the choice for a table that `resolve` has looked at."""
        before, after = self.before._select(table), self.after._select(table)
        joining = np.setdiff1d(after, before, assume_unique=True)
        total = before.size + joining.size
        trainable = self.growth.trainable(self.increment, self.increments, before.size, total)
        order = self.growth.arranged(joining, table.num_rows, table.vocabulary)
        return np.sort(np.concatenate([before, order[: trainable - before.size]]))

    def to_config(self) -> Config:
        """Write the choice as plain values, for messages."""
        return {
            "from": self.before.to_config(),
            "to": self.after.to_config(),
            "growth": self.growth.to_config(),
            "increment": self.increment,
            "increments": self.increments,
        }


def _given_order(order: Any) -> tuple[int, ...] | tuple[str, ...]:
    if isinstance(order, np.ndarray):
        order = order.tolist()
    listed = tuple(order) if isinstance(order, list | tuple) else ()
    whole = all(is_whole(entry) and entry >= 0 for entry in listed)
    if not listed or not (whole or all(isinstance(entry, str) for entry in listed)):
        raise InputError(
            f"an order is one of {list(_ORDERS)}, or a list of ids or tokens. "
            f"Received: {shown(order)}. Write [the, of] or [3, 7] for an order of your own."
        )
    if len(set(listed)) < len(listed):
        twice = next(entry for entry, number in Counter(listed).items() if number > 1)
        raise InputError(
            f"an order names each row once. Received {twice!r} twice in {shown(order)}. Leave out "
            "the second."
        )
    return listed
