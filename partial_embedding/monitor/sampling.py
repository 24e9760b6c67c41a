"""A sample of one table's rows: what is measured of it while it trains, and called what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partial_embedding.monitor.track import (
    QUANTILES,
    CohortTrack,
    MovedRow,
    RowTrack,
    frequency_bands,
    sample,
)
from partial_embedding.rows.cosines import cosines_of
from partial_embedding.rows.vocabulary import Ids, Vocabulary, covered_share

Values = NDArray[np.float32]

NEIGHBOURS = 10
_MOST_COHORTS = 16
_QUERIES = 32  # rows of a cohort whose neighbours are followed
_MOST_MOVED = 12
_BANDS_WORTH = 4
_FROZEN, _NOT_FOLLOWED = -1, _MOST_COHORTS
# Of a larger matrix product NumPy's BLAS gives parts to threads of its own, which go on computing
# for a tenth of a second while they wait for another one. This one takes a thousandth.
_PRODUCTS_ALONE = 2**18


@dataclass(eq=False)
class _Sampled:
    """Rows of a cohort, and what they held and which neighbours the first had when it began."""

    ids: Ids
    start: Values
    near: Ids
    # What they held before a step that is measured.
    before: Values | None = None


class TableSample:
    """Measures a sample of a table's rows, the same way for every framework.

    The metrics, after the table's name:

    - `trainable_rows`: how many rows train;
    - `tokens_that_train`: the share of a batch's tokens, without padding, whose rows train;
    - `tokens_covered`: the same of all training data, by the counts of the vocabulary.

    For the rows that were unfrozen together, `cohort_0`, `cohort_1` and so on:

    - `cohort_0/drift_p10`, `drift_p50`, `drift_p90`: quantiles of the distance from where the rows
      were unfrozen, divided by the length of a typical row;
    - `cohort_0/update_ratio`: how far the rows went in one step, divided by their length;
    - `cohort_0/gradient_norm`: the norm of the gradient of the cohort's rows, before clipping;
    - `cohort_0/lr`: the learning rate with which the rows step;
    - `cohort_0/neighbours_kept`: the share of the ten nearest neighbours by cosine, among the
      sampled rows of all kinds, that are those which the rows had when they were unfrozen.

    For the rows that occur about as often, `seen_10_to_99` and so on, where there are counts:

    - `seen_10_to_99/drift_p10`, `drift_p50`, `drift_p90`: distance from where training began,
      trainable or not.

    A measurement reads at most `size` rows of each of the first 16 cohorts and of each of at most 7
    bands, and compares 32 rows of each cohort with the latter, whatever the size of the table. One
    byte a row says to which cohort it belongs; it is touched only when rows change.

    A function reads rows: from sorted ids, int64, shape (n,), to float32, shape (n, D). That of
    padding is not sampled.

    Example:
        >>> table = np.eye(4, dtype=np.float32)
        >>> sample = TableSample(lambda ids: table[ids], 4)
        >>> sample.note_rows(np.array([True, False, False, False]), place=0.0)
        >>> table[0] *= 3
        >>> sample.measure(place=1.0)["cohort_0/drift_p50"]
        2.0
    """

    def __init__(
        self,
        rows: Callable[[Ids], Values],
        num_rows: int,
        size: int = 256,
        vocabulary: Vocabulary | None = None,
        padding: int | None = None,
    ) -> None:
        self.rows = rows
        self.size = size
        self.vocabulary = vocabulary if vocabulary and len(vocabulary) == num_rows else None
        self.cohort_of = np.full(num_rows, _FROZEN, np.int8)
        self._cohorts: dict[int, _Sampled] = {}
        ids = np.arange(num_rows)
        ids = ids[ids != padding]
        counts = None if self.vocabulary is None else self.vocabulary.counts
        bands = {} if counts is None else frequency_bands(counts, ids)
        self._bands = {name: sample(members, size) for name, (_, members) in bands.items()}
        # Without counts as many rows as there are in some bands.
        chosen = [*self._bands.values()] or [sample(ids, _BANDS_WORTH * size)]
        self._pool = np.unique(np.concatenate(chosen))
        self._pool_start = rows(self._pool)
        # Of rows of all kinds: those of the pool are chosen by how often they occur.
        lengths = np.linalg.norm(rows(sample(ids, _BANDS_WORTH * size)), axis=1)
        self.track = RowTrack(
            num_rows,
            float(np.median(lengths)) if lengths.size else 0.0,
            bands={name: band for name, (band, _) in bands.items()},
            sampled=self._pool.size,
        )

    # Which rows train

    def note_rows(self, trainable: NDArray[np.bool_], place: float) -> None:
        """Take in which rows train, shape (V,), each time that this changes."""
        track, count = self.track, int(np.count_nonzero(trainable))
        self.cohort_of[~trainable] = _FROZEN
        for number, cohort in self._cohorts.items():
            stay = self.cohort_of[cohort.ids] == number
            if not stay.all():
                # Those that are left of the first rows are the first of those that are left.
                cohort.near = cohort.near[stay[: len(cohort.near)]]
                cohort.ids, cohort.start = cohort.ids[stay], cohort.start[stay]
        joining = np.flatnonzero(trainable & (self.cohort_of == _FROZEN))
        if not track.trainable or track.trainable[-1][1] != count or joining.size:
            track.trainable.append((place, count))
        if not joining.size:
            return
        number = len(track.cohorts)
        self.cohort_of[joining] = min(number, _NOT_FOLLOWED)
        if number < _MOST_COHORTS:
            ids = sample(joining, self.size)
            near = self._nearest(ids[:_QUERIES], self.rows(self._pool))
            self._cohorts[number] = _Sampled(ids, self.rows(ids), near)
            track.cohorts[number] = CohortTrack(place, joining.size, [(place, 0.0, 0.0, 0.0)])

    def _nearest(self, ids: Ids, pool: Values) -> Ids:
        """The neighbours of rows among the pool, as all of them are now."""
        at = np.searchsorted(self._pool, ids)
        # An id beyond all of them is compared with what is no row.
        is_there = np.append(self._pool, -1)[at] == ids
        return nearest(self.rows(ids), pool, NEIGHBOURS, np.where(is_there, at, -1))

    # Measuring

    def before_step(self) -> None:
        """Keep what the sampled rows hold before a step that is measured."""
        for cohort in self._cohorts.values():
            cohort.before = self.rows(cohort.ids)

    def gradient_norms(self, ids: Ids, squares: NDArray[np.floating]) -> dict[int, float]:
        """The norm of the gradient of each cohort, from the sums of squares of rows, each once."""
        cohorts = self.cohort_of[ids].astype(np.int64)
        kept = cohorts != _FROZEN
        sums = np.bincount(cohorts[kept], weights=squares[kept], minlength=_MOST_COHORTS)
        return {number: float(np.sqrt(sums[number])) for number in self._cohorts}

    def any_row_of(self) -> dict[int, int]:
        """One row of each cohort that has rows left, by which its learning rate is found."""
        return {n: int(cohort.ids[0]) for n, cohort in self._cohorts.items() if cohort.ids.size}

    def measure(
        self,
        place: float,
        token_share: float | None = None,
        gradient_norms: Mapping[int, float] | None = None,
        rates: Mapping[int, float] | None = None,
    ) -> dict[str, float]:
        """Measure once, beside what is known of the batch and its step; give metrics by name."""
        track = self.track
        track.end = place
        trainable = self.cohort_of != _FROZEN
        numbers: dict[str, float] = {"trainable_rows": int(np.count_nonzero(trainable))}
        if token_share is not None:
            numbers["tokens_that_train"] = token_share
            track.token_share.append((place, token_share))
        if (covered := covered_share(trainable, self.vocabulary)) is not None:
            numbers["tokens_covered"] = covered
        pool = self.rows(self._pool)
        for number, cohort in self._cohorts.items():
            if not cohort.ids.size:
                continue
            now = self.rows(cohort.ids)
            followed = track.cohorts[number]
            quantiles = self._quantiles(now - cohort.start)
            followed.drift.append((place, *quantiles))
            near = self._nearest(cohort.ids[: len(cohort.near)], pool)
            measured = {
                "neighbours_kept": share_kept(cohort.near, near) if near.size else None,
                "update_ratio": _ratio(cohort.before, now),
                "gradient_norm": (gradient_norms or {}).get(number),
                "lr": (rates or {}).get(number),
            }
            numbers |= _named(f"cohort_{number}", quantiles)
            for name, value in measured.items():
                if value is not None:
                    followed.numbers.setdefault(name, []).append((place, value))
                    numbers[f"cohort_{number}/{name}"] = value
            cohort.before = None
        moved = pool - self._pool_start
        for name, ids in self._bands.items():
            quantiles = self._quantiles(moved[np.searchsorted(self._pool, ids)])
            track.bands[name].drift.append((place, *quantiles))
            numbers |= _named(name, quantiles)
        track.thin()
        return numbers

    def _quantiles(self, moved: Values) -> tuple[float, float, float]:
        """The `QUANTILES` of how far rows went, in typical lengths."""
        distances = np.linalg.norm(moved, axis=1).astype(np.float64)
        shares = distances / (self.track.typical_length or 1.0)
        low, middle, high = (round(float(q), 12) for q in np.quantile(shares, QUANTILES))
        return low, middle, high

    def finish(self) -> RowTrack:
        """Find the rows of the pool that went farthest, and give all that was seen."""
        pool, start, now = self._pool, self._pool_start, self.rows(self._pool)
        distances = np.linalg.norm(now - start, axis=1)
        farthest = np.argsort(-distances, kind="stable")[:_MOST_MOVED]
        farthest = farthest[distances[farthest] > 0]
        before = nearest(start[farthest], start, NEIGHBOURS, farthest)
        after = nearest(now[farthest], now, NEIGHBOURS, farthest)
        counts = None if self.vocabulary is None else self.vocabulary.counts
        self.track.moved = [
            MovedRow(
                self._token(pool[row]),
                None if counts is None else int(counts[pool[row]]),
                float(distances[row] / (self.track.typical_length or 1.0)),
                [self._token(pool[near]) for near in near_before],
                [self._token(pool[near]) for near in near_after],
            )
            for row, near_before, near_after in zip(farthest, before, after, strict=True)
        ]
        return self.track

    def _token(self, row: int) -> str:
        return f"row {row}" if self.vocabulary is None else self.vocabulary.tokens[row]

    # Checkpoints

    def to_state(self) -> dict[str, Any]:
        """What was seen so far, as plain values and arrays."""
        return {
            "track": self.track.to_state(),
            "cohort_of": self.cohort_of.copy(),
            "pool": (self._pool, self._pool_start),
            "bands": dict(self._bands),
            "cohorts": {n: (c.ids, c.start, c.near) for n, c in self._cohorts.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `to_state` was called."""
        self.track = RowTrack.from_state(state["track"])
        self.cohort_of = np.array(state["cohort_of"])
        self._pool, self._pool_start = state["pool"]
        self._bands = dict(state["bands"])
        self._cohorts = {number: _Sampled(*parts) for number, parts in state["cohorts"].items()}


def nearest(queries: Values, vectors: Values, most: int, own: Ids) -> Ids:
    """Find the nearest neighbours of rows by the cosine of the angle between them, nearest first.

    Those of queries, shape (q, D), are looked for among vectors, shape (n, D), and are n - 1 at
    most. No row is a neighbour of itself: `own`, shape (q,), is the place of each there, or -1.

    Example:
        >>> vectors = np.array([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]], np.float32)
        >>> nearest(vectors[:1], vectors, most=1, own=np.array([0]))
        array([[2]])
    """
    found = max(min(most, len(vectors) - 1), 0)
    step = max(1, _PRODUCTS_ALONE // max(1, queries.size))
    parts = np.split(vectors, range(step, len(vectors), step))
    cosines = np.concatenate([cosines_of(queries, part) for part in parts], axis=1)
    inside = np.flatnonzero(own >= 0)
    cosines[inside, own[inside]] = -np.inf
    if found == 0:
        return np.zeros((len(queries), 0), np.int64)
    chosen = np.argpartition(-cosines, found - 1, axis=1)[:, :found]
    order = np.argsort(-np.take_along_axis(cosines, chosen, axis=1), axis=1, kind="stable")
    return np.take_along_axis(chosen, order, axis=1)


def share_kept(before: Ids, after: Ids) -> float:
    """The share of neighbours, shape (q, n), none of them twice, that stayed in whatever order."""
    if not before.size:
        return 1.0
    return float((before[:, :, None] == after[:, None, :]).any(axis=2).mean())


def _named(name: str, quantiles: tuple[float, float, float]) -> dict[str, float]:
    low, middle, high = quantiles
    return {f"{name}/drift_p10": low, f"{name}/drift_p50": middle, f"{name}/drift_p90": high}


def _ratio(before: Values | None, now: Values) -> float | None:
    """The length of an update divided by that of what it changed."""
    if before is None or before.shape != now.shape:
        return None
    return float(np.linalg.norm(now - before) / (np.linalg.norm(before) or 1.0))
