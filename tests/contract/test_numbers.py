"""The same table, ids, gradients, optimizer and schedule give the same rows in every framework.

Every framework is compared with the same plain formulas.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import (
    EPOCHS,
    HISTORIES,
    KINDS,
    MATRIX,
    MEASURED,
    NUM_ROWS,
    OPTIMIZERS,
    SCHEDULES,
    TOLERANCE,
    Array,
    Optimizer,
    Reference,
    Run,
    batches_of,
    ever_trained,
    for_optimizer,
    positions,
    rows_that_differ,
    walk,
    written,
)

from partial_embedding.schedule import RateScale


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


@pytest.mark.parametrize("optimizer", KINDS.values(), ids=KINDS)
def test_the_callback_follows_the_schedule_of_a_file(
    adapter: Any, tmp_path: Path, optimizer: Optimizer
) -> None:
    schedule = HISTORIES["leaving_and_returning"]
    batches = batches_of(0)
    path = written(tmp_path, schedule)
    tables, _ = adapter.fit(MATRIX, path, optimizer, batches, EPOCHS, [1, 2, 4, 6, 7])
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


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *(("AdamW-weight_decay", way) for way in SCHEDULES),
        ("SGD-momentum", "growing_shares"),
        ("SGD", "cycles"),
        ("Adam-lazy", "steps"),
        ("Adam-lazy", "plateau"),
    ],
)
def test_the_callback_moves_rows_at_steps_shares_and_plateaus_and_at_their_rate(
    adapter: Any, tmp_path: Path, name: str, way: str
) -> None:
    optimizer, batches = OPTIMIZERS[name], batches_of(0)
    schedule = for_optimizer(SCHEDULES[way], optimizer)
    path, ever = written(tmp_path, schedule), [1, 2, 4, 5, 6, 7]
    tables, _ = adapter.fit(MATRIX, path, optimizer, batches, EPOCHS, ever, MEASURED)
    reference = Reference(MATRIX, optimizer)
    trained: set[int] = set()
    for position in positions(len(batches)):
        stage_state = schedule.state_at(position)
        rows = schedule.rows_at(stage_state).resolve(NUM_ROWS)
        reference.train(rows, schedule.rate_scale_at(stage_state))
        reference.step(*batches[position.step % len(batches)])
        trained |= set(rows.tolist())
        if (position.step + 1) % len(batches) == 0:
            assert_same_numbers(tables[position.epoch], reference.table)
    assert rows_that_differ(MATRIX, tables[-1]) == sorted(trained) == ever


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "AdamW-weight_decay", "Adam-lazy"])
def test_a_loop_gives_rows_that_join_a_rate(adapter: Any, name: str) -> None:
    training = adapter.Training(MATRIX, "none", OPTIMIZERS[name], "all")
    reference = Reference(MATRIX, OPTIMIZERS[name])
    moves = [
        ([2, 7], RateScale(lr_scale=0.5)),
        ([2, 4, 7], RateScale(lr_scale=0.25, warmup_steps=4)),
        ([4, 5, 7], None),
        ([2, 5, 7], RateScale(warmup_steps=2)),
    ]
    for epoch, (rows, rate_scale) in enumerate(moves):
        training.train(rows, rate_scale)
        reference.train(np.array(rows), rate_scale)
        for batch in batches_of(epoch):
            training.step(*batch)
            reference.step(*batch)
            assert_same_numbers(training.table, reference.table)
