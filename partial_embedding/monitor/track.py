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
# Where in training, and the `QUANTILES` of how far rows went, in lengths of a typical row.
Drift = list[tuple[float, float, float, float]]
# Where in training, and a number.
Series = list[tuple[float, float]]


@dataclass
class CohortTrack:
    """What became of the rows that were unfrozen together, at one place in training."""

    unfrozen_at: float
    size: int
    drift: Drift = field(default_factory=list)  # from where they were unfrozen
    # The other measurements by name, as `TableSample` lists them.
    numbers: dict[str, Series] = field(default_factory=dict)


@dataclass
class BandTrack:
    """What became of the rows that occur in the training data so often at least and at most."""

    low: int
    high: int | None  # no limit
    size: int
    drift: Drift = field(default_factory=list)  # from where training began


@dataclass
class MovedRow:
    """A row that went far, by its token or number; how often it occurs, if that is known.

    Its neighbours among the rows that are sampled, the nearest first, are those when training began
    and those now.
    """

    token: str
    count: int | None
    distance: float
    before: list[str]
    after: list[str]


@dataclass
class RowTrack:
    """What was seen of one table in training, of which `end` is where it stands."""

    num_rows: int
    typical_length: float  # the median when training began
    # Where in training, and how many rows trained from there on.
    trainable: list[tuple[float, int]] = field(default_factory=list)
    # The same, and the share of the batch's tokens whose rows trained.
    token_share: Series = field(default_factory=list)
    cohorts: dict[int, CohortTrack] = field(default_factory=dict)
    bands: dict[str, BandTrack] = field(default_factory=dict)
    moved: list[MovedRow] = field(default_factory=list)  # the farthest first
    sampled: int = 0  # of so many
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
