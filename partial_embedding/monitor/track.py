"""What is measured of a table's rows while it trains, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np

from partial_embedding.rows.vocabulary import Ids

# The share of rows that went less far than each number of a measurement.
QUANTILES = (0.1, 0.5, 0.9)
# A track that grows longer than this loses every second point.
_MOST_POINTS = 1000

Point = TypeVar("Point")
# Where in training, and the `QUANTILES` of how far rows went.
Drift = list[tuple[float, float, float, float]]
# Where in training, and a number.
Series = list[tuple[float, float]]


@dataclass
class CohortTrack:
    """What became of the rows that were unfrozen together.

    Args:
        unfrozen_at: Where in training they were unfrozen, in the unit of the whole track.
        size: How many rows they are.
        drift: How far they went from where they were unfrozen, divided by the length of a typical
            row.
        numbers: The other measurements by name, as `TableSample` lists them.
    """

    unfrozen_at: float
    size: int
    drift: Drift = field(default_factory=list)
    numbers: dict[str, Series] = field(default_factory=dict)


@dataclass
class BandTrack:
    """What became of the rows that occur about as often in the training data.

    Args:
        low: How often a row of the band occurs at least.
        high: How often it occurs at most; None where there is no limit.
        size: How many rows they are.
        drift: How far they went from where training began, divided by the length of a typical row.
    """

    low: int
    high: int | None
    size: int
    drift: Drift = field(default_factory=list)


@dataclass
class MovedRow:
    """A row that went far, and its nearest neighbours among the rows that are sampled.

    Args:
        token: What the row means, or its number.
        count: How often it occurs in the training data, where that is known.
        distance: How far it went, divided by the length of a typical row.
        before: Its neighbours when training began, the nearest first.
        after: Its neighbours now.
    """

    token: str
    count: int | None
    distance: float
    before: list[str]
    after: list[str]


@dataclass
class RowTrack:
    """What was seen of one table in training.

    Args:
        num_rows: The rows V of the table.
        typical_length: The median length of its rows when training began.
        unit: The unit of every place in training, `"epoch"` or `"step"`.
        trainable: Where in training, and how many rows trained from there on.
        token_share: Where in training, and the share of the batch's tokens whose rows trained.
        cohorts: The rows that were unfrozen together, by number.
        bands: The rows by how often they occur, by name.
        moved: The rows that went farthest, the farthest first.
        sampled: How many rows were compared to find these.
        end: Where training stands.
    """

    num_rows: int
    typical_length: float
    unit: str = "epoch"
    trainable: list[tuple[float, int]] = field(default_factory=list)
    token_share: Series = field(default_factory=list)
    cohorts: dict[int, CohortTrack] = field(default_factory=dict)
    bands: dict[str, BandTrack] = field(default_factory=dict)
    moved: list[MovedRow] = field(default_factory=list)
    sampled: int = 0
    end: float = 0.0

    @property
    def count(self) -> int:
        """How many rows train where training stands."""
        return self.trainable[-1][1] if self.trainable else 0

    def thin(self) -> None:
        """Drop every second point where there are very many."""
        self.trainable = thinned(self.trainable)
        self.token_share = thinned(self.token_share)
        for cohort in self.cohorts.values():
            cohort.drift = thinned(cohort.drift)
            cohort.numbers = {name: thinned(series) for name, series in cohort.numbers.items()}
        for band in self.bands.values():
            band.drift = thinned(band.drift)

    def to_state(self) -> dict[str, Any]:
        """Plain values for a checkpoint or a JSON file."""
        return asdict(self)

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> RowTrack:
        """The inverse of `to_state`, also of what JSON made of it."""
        plain = _with_points(state)
        cohorts = {int(number): CohortTrack(**one) for number, one in plain["cohorts"].items()}
        bands = {name: BandTrack(**band) for name, band in plain["bands"].items()}
        moved = [MovedRow(**row) for row in plain["moved"]]
        return RowTrack(**{**plain, "cohorts": cohorts, "bands": bands, "moved": moved})


def sample(ids: Ids, most: int) -> Ids:
    """Choose so many of some sorted ids to measure, always the same ones of the same ids.

    Example:
        >>> sample(np.arange(3), most=5)
        array([0, 1, 2])
    """
    if len(ids) <= most:
        return ids
    return np.sort(np.random.default_rng(0).choice(ids, most, replace=False))


def frequency_bands(counts: Ids, ids: Ids) -> dict[str, tuple[BandTrack, Ids]]:
    """Divide rows by how often they occur: never, 1 to 9 times, 10 to 99 times and so on.

    Args:
        counts: How often each row occurs, int64, shape (V,).
        ids: The rows to divide, sorted, int64.

    Example:
        >>> bands = frequency_bands(np.array([3, 0, 12, 5]), np.arange(4))
        >>> {name: members.tolist() for name, (_, members) in bands.items()}
        {'seen_0': [1], 'seen_1_to_9': [0, 3], 'seen_10_to_99': [2]}
    """
    lows = [0, *(10**power for power in range(6))]
    highs = [0, *(10 * low - 1 for low in lows[1:-1]), None]
    band_of = np.searchsorted(lows, counts[ids], side="right") - 1
    bands = {}
    for band, (low, high) in enumerate(zip(lows, highs, strict=True)):
        members = ids[band_of == band]
        last = "or_more" if high is None else f"to_{high}"
        name = f"seen_{low}_{last}" if low else "seen_0"
        if members.size:
            bands[name] = (BandTrack(low, high, members.size), members)
    return bands


def _with_points(state: Any) -> Any:
    """The same with tuples for lists within lists, which JSON made of points."""
    if isinstance(state, Mapping):
        return {key: _with_points(value) for key, value in state.items()}
    if isinstance(state, list):
        return [tuple(value) if isinstance(value, list) else value for value in state]
    return state


def thinned(points: list[Point]) -> list[Point]:
    """Drop every second point, but the last, until there are no longer very many.

    Example:
        >>> len(thinned(list(range(5000)))), thinned([1, 2])
        (626, [1, 2])
    """
    while len(points) > _MOST_POINTS:
        points = [*points[:-1:2], points[-1]]
    return points
