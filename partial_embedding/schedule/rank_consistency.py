"""Processes that train one model together stop together where they would train different rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from partial_embedding.errors import InputError
from partial_embedding.rows.fingerprint import fingerprint_of
from partial_embedding.rows.vocabulary import Ids
from partial_embedding.schedule.schedule import StageState

Metrics = Mapping[str, float]


class RankView(NamedTuple):
    """What one process trains, small enough to be sent to all others."""

    metrics: Metrics | None  # of what was just measured, if anything was
    stage_states: Mapping[str, StageState]  # after what was just measured
    rows: Mapping[str, str]  # as `digest` writes them


def digest(ids: Ids) -> str:
    """Rows in a few characters, which differ where the rows do.

    Example:
        >>> digest(np.array([2, 5]))
        '2 rows (5f4dd592)'
    """
    return f"{len(ids):,} rows ({fingerprint_of(ids) % 2**32:08x})"


def check_ranks(views: Sequence[RankView]) -> None:
    """Refuse processes that differ; all of them raise the same.

    All of them must call this at the same points: one that differs would otherwise go on alone, and
    the others wait for it without end.
    """
    first = views[0]
    for rank, other in enumerate(views):
        same_states = first.stage_states == other.stage_states
        measured = first.metrics is not None
        if not _are_close(first.metrics, other.metrics) or (measured and not same_states):
            raise InputError(
                f"all processes see the same metrics. Received: {first.metrics} in process 0 and "
                f"{other.metrics} in process {rank}. Log them with sync_dist=True."
            )
        for name, rows in first.rows.items():
            if rows != other.rows[name]:
                raise InputError(
                    f"all processes train the same rows of {name!r}. Received: {rows} in process 0 "
                    f"and {other.rows[name]} in process {rank}. Build the same vocabulary and "
                    "schedule in each."
                )
        if not same_states:
            raise InputError(
                "all processes are at the same place of a schedule. Received: "
                f"{dict(first.stage_states)} in process 0 and {dict(other.stage_states)} in "
                f"process {rank}. Give each as many steps."
            )


def _are_close(a: Metrics | None, b: Metrics | None) -> bool:
    if a is None or b is None or a.keys() != b.keys():
        return a == b
    # Reductions may differ in their last bits.
    return all(np.isclose(a[key], b[key], rtol=1e-6, atol=0, equal_nan=True) for key in a)
