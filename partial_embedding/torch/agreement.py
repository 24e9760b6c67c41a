"""Processes that train one model together stop together where they would train different rows."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
from torch import distributed as dist

from partial_embedding.errors import InputError
from partial_embedding.schedule import StageState
from partial_embedding.torch.table import PartialTable

Metrics = Mapping[str, float]


def check_agreement(
    tables: Mapping[str, PartialTable],
    stage_states: Mapping[str, StageState],
    metrics: Metrics | None = None,
) -> None:
    """Compare what all processes train, and stop each of them where that differs.

    All of them must call this at the same points: one that differs would otherwise go on alone, and
    the others wait for it without end. Nothing is done where there is one process.

    Args:
        tables: The tables by name.
        stage_states: Where each of them is in its schedule, or will be after what was just
            measured.
        metrics: What was just measured, if anything was.

    Raises:
        InputError: Processes differ; all raise the same.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    rows = {name: _digest(table) for name, table in tables.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        everyone, (metrics, {n: tuple(m) for n, m in stage_states.items()}, rows)
    )
    first_metrics, first_moments, first_rows = everyone[0]
    for rank, (other_metrics, other_moments, other_rows) in enumerate(everyone):
        same_moments = first_moments == other_moments
        if not _are_close(first_metrics, other_metrics) or not (same_moments or metrics is None):
            raise InputError(
                f"all processes see the same metrics. Received: {first_metrics} in process 0 and "
                f"{other_metrics} in process {rank}. Log them with sync_dist=True."
            )
        for name in rows:
            if first_rows[name] != other_rows[name]:
                raise InputError(
                    f"all processes train the same rows of {name!r}. Received: {first_rows[name]} "
                    f"in process 0 and {other_rows[name]} in process {rank}. Build the same "
                    "vocabulary and schedule in each."
                )
        if not same_moments:
            raise InputError(
                f"all processes are at the same place of a schedule. Received: {first_moments} in "
                f"process 0 and {other_moments} in process {rank}. Give each as many steps."
            )


def _digest(table: PartialTable) -> str:
    ids = table.row_set.ids.cpu().numpy()
    return f"{len(ids):,} rows ({blake2b(ids.tobytes(), digest_size=4).hexdigest()})"


def _are_close(a: Metrics | None, b: Metrics | None) -> bool:
    if a is None or b is None or a.keys() != b.keys():
        return a == b
    # Reductions may differ in their last bits.
    return all(np.isclose(a[key], b[key], rtol=1e-6, atol=0, equal_nan=True) for key in a)
