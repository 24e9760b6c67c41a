"""What a partial table promises in every framework, in its own bits."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from reference import (
    HISTORIES,
    MATRIX,
    NUM_ROWS,
    OPTIMIZERS,
    WIDTH,
    Array,
    Optimizer,
    Run,
    batches_of,
    ever_trained,
    rows_that_differ,
    same_bits,
    walk,
)

from partial_embedding.schedule import RateScale

each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)

BATCHES = [*batches_of(0), *batches_of(1)]
SINGLE = np.array([[4]])


def upstream_of(*values: float) -> Array:
    """The same gradient for each column of each id, shape (1, N, D)."""
    return np.repeat(np.array(values, np.float32), WIDTH).reshape(1, -1, WIDTH)


@pytest.mark.parametrize("installed", [[], ["torch", "tensorflow"]], ids=["none", "both"])
def test_another_number_of_frameworks_than_one_fails(
    choose: Callable[[Sequence[str]], str], installed: list[str]
) -> None:
    with pytest.raises(pytest.fail.Exception, match="one of"):
        choose(installed)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_rows_keep_their_bits(
    adapter: Any, run_along: Callable[[Any, str, str], Run], optimizer: str, history: str
) -> None:
    run = run_along(adapter, optimizer, history)
    moved: set[int] = set()
    for step, (rows, (ids, _)) in enumerate(walk(HISTORIES[history])):
        before, changed, after = run.tables[step], run.changed[step], run.tables[step + 1]
        assert run.trained[step] == rows.tolist()
        assert same_bits(before, changed, range(NUM_ROWS))
        differ = set(rows_that_differ(before, after))
        assert differ <= set(rows.tolist())
        assert differ >= set(rows.tolist()) & set(ids.flatten().tolist())
        moved |= differ
    assert moved == set(ever_trained(HISTORIES[history]).tolist())


@each_optimizer
def test_look_ups_give_the_rows_of_the_table(adapter: Any, optimizer: Optimizer) -> None:
    training = adapter.Training(MATRIX, [2, 5], optimizer)
    ids = np.array([[9, 2], [5, 2]])
    assert training.look_up(ids).tobytes() == MATRIX[ids].tobytes()
    training.step(*BATCHES[0])
    training.freeze([2])
    assert rows_that_differ(MATRIX, training.table) == [2, 5]
    assert training.look_up(ids).tobytes() == training.table[ids].tobytes()


def test_rows_are_set_unfrozen_and_frozen(adapter: Any) -> None:
    training = adapter.Training(MATRIX, [7, 2], OPTIMIZERS["SGD"])
    assert training.trainable_rows == [2, 7]
    training.unfreeze(range(6, 8))
    assert training.trainable_rows == [2, 6, 7]
    training.freeze([2, 3])
    assert training.trainable_rows == [6, 7]
    training.train(np.arange(NUM_ROWS) == 4)
    assert training.trainable_rows == [4]
    training.freeze("all")
    assert training.trainable_rows == []
    training.step(*BATCHES[0])
    assert rows_that_differ(MATRIX, training.table) == []


@each_optimizer
def test_duplicates_of_an_id_count_as_their_sum(adapter: Any, optimizer: Optimizer) -> None:
    twice, summed, once = (adapter.Training(MATRIX, [2, 4], optimizer) for _ in range(3))
    for first, second in [(0.25, -1.0), (-1.0, 0.125), (0.75, 0.75)]:
        ids = np.array([[4, 2, 0, 4]])
        twice.step(ids, upstream_of(first, 1.0, 1.0, second))
        summed.step(ids[:, :3], upstream_of(first + second, 1.0, 1.0))
        once.step(ids[:, :3], upstream_of(first, 1.0, 1.0))
    assert same_bits(twice.table, summed.table, range(NUM_ROWS))
    assert rows_that_differ(twice.table, once.table) == [4]


@each_optimizer
def test_late_rows_begin_as_if_training_had_just_started(
    adapter: Any, optimizer: Optimizer
) -> None:
    late = adapter.Training(MATRIX, [2, 7], optimizer)
    for batch in BATCHES:
        late.step(*batch)
    late.unfreeze([4, 5])
    fresh = adapter.Training(late.table, [4, 5], optimizer)
    for batch in BATCHES:
        late.step(*batch)
        fresh.step(*batch)
        assert same_bits(late.table, fresh.table, [4, 5])
    assert rows_that_differ(MATRIX, fresh.table) == [2, 4, 5, 7]


@pytest.mark.parametrize("steps", [0, 1], ids=["at once", "after a step"])
@each_optimizer
def test_rows_that_return_begin_as_if_training_had_just_started(
    adapter: Any, optimizer: Optimizer, steps: int
) -> None:
    back = adapter.Training(MATRIX, [2, 4], optimizer)
    for batch in BATCHES:
        back.step(*batch)
    back.freeze([4])
    for batch in BATCHES[:steps]:
        back.step(*batch)
    back.unfreeze([4])
    fresh = adapter.Training(back.table, [4], optimizer)
    for batch in BATCHES:
        back.step(*batch)
        fresh.step(*batch)
        assert same_bits(back.table, fresh.table, [4])


@each_optimizer
def test_rows_already_training_do_not_notice_others_that_come_and_go(
    adapter: Any, optimizer: Optimizer
) -> None:
    busy, quiet = (adapter.Training(MATRIX, [2, 7], optimizer) for _ in range(2))
    changes = [lambda: None, lambda: busy.unfreeze([1, 4]), lambda: busy.freeze([1])]
    for change in changes:
        change()
        for batch in BATCHES:
            busy.step(*batch)
            quiet.step(*batch)
            assert same_bits(busy.table, quiet.table, [2, 7])
    assert {1, 4} <= set(rows_that_differ(busy.table, quiet.table))


@pytest.mark.parametrize("name", ["SGD-momentum", "Adam", "AdamW-weight_decay"])
def test_rows_that_no_batch_touches_go_on_moving(adapter: Any, name: str) -> None:
    training = adapter.Training(MATRIX, [2, 4], OPTIMIZERS[name])
    training.step(*BATCHES[0])
    before = training.table
    training.step(SINGLE, upstream_of(1.0))
    assert rows_that_differ(before, training.table) == [2, 4]


def test_a_lazy_optimizer_leaves_rows_that_no_batch_touches(adapter: Any) -> None:
    training = adapter.Training(MATRIX, [2, 4], OPTIMIZERS["Adam-lazy"])
    training.step(*BATCHES[0])
    before = training.table
    training.step(SINGLE, upstream_of(1.0))
    assert rows_that_differ(before, training.table) == [4]


@pytest.mark.parametrize("row", [2, 7])
def test_a_lazy_optimizer_moves_a_touched_row_whose_gradient_is_zero(
    adapter: Any, row: int
) -> None:
    training = adapter.Training(MATRIX, [2, 7], OPTIMIZERS["Adam-lazy"], [2, 7])
    training.step(*BATCHES[0])
    before = training.table
    training.step(np.array([[row]]), upstream_of(0.0))
    assert rows_that_differ(before, training.table) == [row]


@each_optimizer
def test_the_padding_row_keeps_its_bits_when_it_is_among_the_rows(
    adapter: Any, optimizer: Optimizer
) -> None:
    every = list(range(1, NUM_ROWS))
    training = adapter.Training(MATRIX[:9], "all", optimizer, padded=True)
    assert training.trainable_rows == every[:-1]
    training.step(*_within(BATCHES[0]))
    assert rows_that_differ(MATRIX[:9], training.table) == every[:-1]
    training.freeze("all")
    training.unfreeze([0, 3])
    assert training.trainable_rows == [3]
    before = training.table
    training.step(*_within(BATCHES[0]))
    assert rows_that_differ(before, training.table) == [3]


def _within(batch: tuple[Array, Array]) -> tuple[Array, Array]:
    """A batch without row 9, whose NaN cannot be told to have moved."""
    ids, upstream = batch
    assert 0 in ids
    keep = ids[0] != 9
    return ids[:, keep], upstream[:, keep]


@each_optimizer
def test_a_rate_of_its_own_that_is_the_optimizers_changes_no_bit(
    adapter: Any, optimizer: Optimizer
) -> None:
    with_rate, without = (adapter.Training(MATRIX, [2, 7], optimizer) for _ in range(2))
    for batch in BATCHES:
        with_rate.step(*batch)
        without.step(*batch)
    with_rate.unfreeze([4, 5], RateScale(warmup_steps=1))  # which is over at once
    without.unfreeze([4, 5])
    for batch in BATCHES:
        with_rate.step(*batch)
        without.step(*batch)
    assert with_rate.table.tobytes() == without.table.tobytes()
    assert {4, 5} <= set(rows_that_differ(MATRIX, without.table))
