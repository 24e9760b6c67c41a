"""What is measured of a table's rows while it trains: how many are awake, and how far they went."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from partial_embedding.vocabulary import Ids

# The share of rows that went less far than each number of a measurement.
QUANTILES = (0.1, 0.5, 0.9)
# A track that grows longer than this loses every second point.
_MOST_POINTS = 1000

Point = TypeVar("Point")


@dataclass
class GroupTrack:
    """How far the rows went that woke together.

    Args:
        woke: Where in training they woke, in the unit of the whole track.
        size: How many rows they are.
        drift: Measurements: where in training, and the `QUANTILES` of the distance of rows from
            where they woke, divided by the length of a typical row.
    """

    woke: float
    size: int
    drift: list[tuple[float, float, float, float]] = field(default_factory=list)


@dataclass
class RowTrack:
    """What was seen of one table in training.

    Args:
        num_rows: The rows V of the table.
        typical_length: The median length of its rows when training began.
        unit: The unit of every place in training, `"epoch"` or `"step"`.
        awake: Where in training, and how many rows were awake from there on.
        token_share: Where in training, and the share of the batch's tokens whose rows trained.
        groups: The rows that woke together, by number.
        end: Where training stands.

    Example:
        >>> track = RowTrack(100, 1.0, awake=[(0, 10)], groups={0: GroupTrack(0, 10)})
        >>> RowTrack.from_state(track.to_state()) == track
        True
    """

    num_rows: int
    typical_length: float
    unit: str = "epoch"
    awake: list[tuple[float, int]] = field(default_factory=list)
    token_share: list[tuple[float, float]] = field(default_factory=list)
    groups: dict[int, GroupTrack] = field(default_factory=dict)
    end: float = 0.0

    def thin(self) -> None:
        """Drop every second point where there are very many."""
        self.token_share = _thinned(self.token_share)
        for group in self.groups.values():
            group.drift = _thinned(group.drift)

    def to_state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @staticmethod
    def from_state(state: dict[str, Any]) -> RowTrack:
        """The inverse of `to_state`.

        Args:
            state: What `to_state` gave.
        """
        groups = {number: GroupTrack(**group) for number, group in state["groups"].items()}
        return RowTrack(**{**state, "groups": groups})


def sample(ids: Ids, most: int) -> Ids:
    """Choose rows to measure, always the same ones of the same ids.

    Args:
        ids: Sorted ids, int64, shape (n,).
        most: How many to choose at most.

    Returns:
        Sorted ids, int64, shape (min(n, most),).

    Example:
        >>> sample(np.arange(3), most=5)
        array([0, 1, 2])
    """
    if len(ids) <= most:
        return ids
    return np.sort(np.random.default_rng(0).choice(ids, most, replace=False))


def drift_quantiles(distances: NDArray[np.floating], typical_length: float) -> list[float]:
    """Summarise how far rows went.

    Args:
        distances: The distance of each row from where it woke, shape (n,), n ≥ 1.
        typical_length: What they are divided by.

    Returns:
        One number for each of `QUANTILES`.

    Example:
        >>> drift_quantiles(np.array([0.0, 1.0, 2.0]), typical_length=2.0)
        [0.1, 0.5, 0.9]
    """
    shares = np.asarray(distances, np.float64) / (typical_length or 1.0)
    return [round(float(q), 12) for q in np.quantile(shares, QUANTILES)]


def _thinned(points: list[Point]) -> list[Point]:
    return points if len(points) <= _MOST_POINTS else points[::2]
