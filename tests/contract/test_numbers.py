"""The same table, ids, gradients, optimizer and schedule give the same rows in every framework.

Every framework is compared with the same plain formulas.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from reference import (
    EPOCHS,
    HISTORIES,
    MATRIX,
    NUM_ROWS,
    OPTIMIZERS,
    TOLERANCE,
    Array,
    Optimizer,
    Reference,
    Run,
    batches_of,
    ever_trained,
    rows_that_differ,
    walk,
)


def assert_same_numbers(table: Array, reference: Array) -> None:
    np.testing.assert_allclose(table, reference, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rows_follow_the_formulas(
    adapter: Any, run_along: Callable[[Any, str, str], Run], optimizer: str, history: str
) -> None:
    tables = run_along(adapter, optimizer, history).tables
    reference = Reference(MATRIX, OPTIMIZERS[optimizer])
    for table, (rows, batch) in zip(tables[1:], walk(HISTORIES[history]), strict=True):
        reference.train(rows)
        reference.step(*batch)
        assert_same_numbers(table, reference.table)
    # The numbers would agree too if nothing had happened.
    moved = np.abs(reference.table - MATRIX)[ever_trained(HISTORIES[history])]
    assert moved.max(axis=1).min() > 1000 * TOLERANCE


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_callback_follows_the_schedule_of_a_file(
    adapter: Any, tmp_path: Path, optimizer: Optimizer
) -> None:
    schedule = HISTORIES["leaving_and_returning"]
    (tmp_path / "schedule.yaml").write_text(yaml.safe_dump(schedule.to_config()))
    batches = batches_of(0)
    tables = adapter.fit(
        MATRIX, tmp_path / "schedule.yaml", optimizer, batches, EPOCHS, [1, 2, 4, 6, 7]
    )
    assert len(tables) == EPOCHS
    reference, before = Reference(MATRIX, optimizer), MATRIX
    for epoch, table in enumerate(tables):
        rows = schedule.trainable_rows(epoch).resolve(NUM_ROWS)
        reference.train(rows)
        for ids, upstream in batches:
            reference.step(ids, upstream)
        assert rows_that_differ(before, table) == rows.tolist()
        assert_same_numbers(table, reference.table)
        before = table
