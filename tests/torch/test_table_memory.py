"""What a table and its training hold in memory."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from small_tables import IDS, ROWS, D, V, gradient
from steps import take_steps
from torch import Tensor, nn

from partial_embedding.torch import PartialEmbedding, rowwise


@contextmanager
def without_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def living_tensors() -> list[Tensor]:
    # By type and not by isinstance, which asks the object itself: weak proxies complain.
    found = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    grads = [t.grad for t in found if t.is_leaf and t.grad is not None]
    return [*found, *grads]


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes by the address of the memory: views of one tensor count once."""
    sizes = {}
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_meta:
            continue
        try:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        except RuntimeError:
            continue  # what the compiler traced with, which has no memory
    return sizes


LARGE, WIDE = 40_000, 16


@pytest.mark.parametrize("lazy", [False, True], ids=["all_rows_of_the_cohorts", "lazy"])
def test_weight_is_the_only_tensor_of_the_size_of_the_vocabulary(lazy: bool) -> None:
    rows = list(range(0, LARGE, 4_000))
    before = storages(living_tensors())
    table = PartialEmbedding(LARGE, WIDE, trainable_rows=rows)
    optimizer = rowwise(torch.optim.AdamW(table.parameters(), weight_decay=0.1), table, lazy=lazy)
    for step in range(3):
        take_steps(optimizer, lambda: table(torch.arange(0, LARGE, 100)).sum())
        if step == 1:
            table.unfreeze_rows([1, 2])
    with without_collection():
        new = storages(living_tensors())
    weight = new.pop(table.weight.untyped_storage().data_ptr())
    assert weight == LARGE * WIDE * 4
    sizes = {key: size for key, size in new.items() if key not in before}
    # Neither a copy of the table, nor a gradient of it, nor moments of it.
    assert max(sizes.values()) < weight / WIDE * 2
    # At most 9 bytes for each row, beside what belongs to the few rows that train.
    of_trainable_rows = 40 * (len(rows) + 2) * WIDE + 4_000
    assert 4 * LARGE <= sum(sizes.values()) <= 9 * LARGE + of_trainable_rows
    assert optimizer.state_dict()["state"][0]["rowwise"]["num_rows"] == LARGE


def test_bookkeeping_takes_at_most_9_bytes_for_each_row() -> None:
    table = PartialEmbedding(LARGE, 1, trainable_rows=slice(None, None, 2))
    for rows in (range(1, 100), range(5_000), slice(None, None, 3)):
        table.set_trainable_rows(rows)
        gradient(table, torch.arange(9))
        owned = [value for value in vars(table.row_set).values() if isinstance(value, Tensor)]
        by_row = storages([tensor for tensor in owned if len(tensor) == LARGE])
        ids = storages([t for t in owned if len(t) != LARGE] + [*table.row_set.cohorts.values()])
        assert by_row
        assert sum(by_row.values()) <= 9 * LARGE
        # Beyond that there are ids: those of the cohorts, in their order, and sorted.
        assert sum(ids.values()) <= 3 * 8 * len(table.row_set)


def test_making_a_table_lists_no_more_rows_than_train(monkeypatch: pytest.MonkeyPatch) -> None:
    # Eight bytes for each row of the table, if only for a moment.
    monkeypatch.setattr(PartialEmbedding, "_all_ids", lambda table: pytest.fail("lists all rows"))
    table = PartialEmbedding(LARGE, 1, trainable_rows=[7, 2])
    gradient(table, torch.arange(9))
    assert table.trainable_rows.tolist() == [2, 7]


def test_a_plain_table_has_no_bookkeeping() -> None:
    table = PartialEmbedding(LARGE, 1)
    assert f"trainable_rows={LARGE}" in repr(table)
    gradient(table, torch.arange(9))
    assert not table.has_frozen_rows
    assert table._row_set is None


def test_a_step_of_training_leaves_no_tensor_behind() -> None:
    table = PartialEmbedding(V, D, trainable_rows=ROWS)
    optimizer = rowwise(torch.optim.AdamW(table.parameters()), table)
    counts = []
    with without_collection():
        for _ in range(5):
            take_steps(optimizer, lambda: table(IDS).sum())
            counts.append(len(living_tensors()))
    assert len(set(counts[1:])) == 1, counts


def test_a_table_that_was_trained_goes_with_its_last_reference() -> None:
    table = PartialEmbedding(V, D, trainable_rows=ROWS)
    gradient(table, IDS)
    held = weakref.ref(table), weakref.ref(table.weight)
    with without_collection():
        del table
        assert [one() for one in held] == [None, None]


def test_memory_of_before_goes_when_a_table_moves() -> None:
    table = PartialEmbedding(V, D, trainable_rows=ROWS)
    gradient(table, IDS)
    before = weakref.ref(table.weight.untyped_storage())
    table.to(torch.float64)
    table.weight.grad = None
    assert before() is None
