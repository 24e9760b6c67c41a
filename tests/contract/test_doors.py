"""Ways by which a table's weights go out and come in, the same in every framework."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import (
    HISTORIES,
    MATRIX,
    NUM_ROWS,
    OPTIMIZERS,
    TOLERANCE,
    Reference,
    Run,
    batches_of,
    ever_trained,
    rows_that_differ,
    walk,
    written,
)

from partial_embedding import InputError

BATCHES = [*batches_of(0), *batches_of(1)]
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@each_optimizer
def test_weights_go_to_a_plain_layer_and_come_back(adapter: Any, name: str) -> None:
    training = adapter.Training(MATRIX, [2, 7], OPTIMIZERS[name])
    training.step(*BATCHES[0])
    training.freeze([2])
    training.step(*BATCHES[1])
    table = training.table
    assert training.plain().tobytes() == table.tobytes()
    other = adapter.Training(MATRIX, [4], OPTIMIZERS[name])
    other.take_plain(table)
    assert other.table.tobytes() == table.tobytes()
    assert other.trainable_rows == [4]
    other.step(*BATCHES[0])
    assert rows_that_differ(table, other.table) == [4]


@each_optimizer
def test_best_weights_are_restored_after_rows_froze_again(adapter: Any, name: str) -> None:
    training = adapter.Training(MATRIX, [2, 7], OPTIMIZERS[name])
    for batch in BATCHES:
        training.step(*batch)
    best, kept = training.table, training.keep()
    for rows in ([7, 4], [5], [4, 5]):
        training.train(rows)
        for batch in BATCHES:
            training.step(*batch)
    assert rows_that_differ(best, training.table) == [4, 5, 7]
    training.restore(kept)
    assert training.table.tobytes() == best.tobytes()
    ids = np.arange(NUM_ROWS)[np.newaxis]
    assert training.look_up(ids)[0].tobytes() == best.tobytes()


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("name", ["AdamW-weight_decay", "Adam-lazy"])
def test_a_loop_that_is_resumed_before_every_step_ends_in_the_same_bits(
    adapter: Any, run_along: Callable[[Any, str, str], Run], name: str, history: str, tmp_path: Path
) -> None:
    tables = run_along(adapter, name, history).tables
    schedule, optimizer = HISTORIES[history], OPTIMIZERS[name]
    ever, trained = ever_trained(schedule), schedule.trainable_rows(0).resolve(NUM_ROWS)
    training = adapter.Training(MATRIX, trained, optimizer, ever)
    for (rows, batch), before, after in zip(walk(schedule), tables, tables[1:], strict=False):
        training.save(tmp_path)
        # Whoever resumes knows which rows trained, and nothing else.
        trained = np.array(training.trainable_rows)
        training = adapter.Training(MATRIX, trained if trained.size else "none", optimizer, ever)
        training.load(tmp_path)
        assert training.table.tobytes() == before.tobytes()
        training.train(rows if rows.size else "none")
        training.step(*batch)
        assert training.table.tobytes() == after.tobytes()


@each_optimizer
def test_averaged_weights_have_the_bits_of_frozen_rows(adapter: Any, name: str) -> None:
    # Row 9 holds what sums do not keep: NaN, an infinity and -0.0.
    matrix = MATRIX.copy()
    matrix[9] = MATRIX[8]
    training = adapter.Training(matrix, [2, 7], OPTIMIZERS[name], [2, 4, 5, 7])
    average = training.average(BATCHES)
    assert rows_that_differ(matrix, average) == [2, 7]
    reference, tables = Reference(matrix, OPTIMIZERS[name]), []
    reference.train(np.array([2, 7]))
    for batch in BATCHES:
        reference.step(*batch)
        tables.append(reference.table[[2, 7]].copy())
    np.testing.assert_allclose(average[[2, 7]], np.mean(tables, axis=0), rtol=0, atol=TOLERANCE)


def test_a_weight_that_may_not_train_is_refused_under_a_schedule(
    adapter: Any, tmp_path: Path
) -> None:
    schedule = written(tmp_path, {"stages": [{"epoch": 0, "rows": [2]}]})
    arguments = MATRIX, schedule, OPTIMIZERS["SGD"], batches_of(0), 1, [2]
    with pytest.raises(InputError, match=r"rows train .*Received .*words"):
        adapter.fit(*arguments, trains=False)
    tables, _ = adapter.fit(*arguments)
    assert rows_that_differ(MATRIX, tables[-1]) == [2]
