"""The table as a module: its hook, its rows, and tables that share a weight."""

import gc
import weakref
from typing import Any

import pytest
import torch
from cases import SPARSE_AND_DENSE
from oracle import assert_same_bits
from small_tables import (
    FROZEN,
    IDS,
    ROWS,
    D,
    V,
    assert_is_partial,
    gradient,
    moved_rows,
    table_of,
    vectors,
)
from torch import nn

from partial_embedding.errors import InputError
from partial_embedding.torch import PartialEmbedding, PartialEmbeddingBag
from partial_embedding.torch.row_gradient import RowGradient

# The gradient hook


def test_hook_drops_frozen_ids_from_a_sparse_gradient() -> None:
    table = table_of(sparse=True)
    table(IDS).sum().backward()
    grad = table.weight.grad
    assert isinstance(grad, RowGradient)
    # Nothing is left of frozen rows, not even zeros, and duplicates are not summed yet.
    ids, values = grad.entries()
    assert ids.tolist() == [1, 4, 4, 4]
    assert values.tolist() == [[1.0] * D] * 4
    assert grad.shape == (V, D)


@SPARSE_AND_DENSE
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_hook_keeps_values_that_are_not_finite_out_of_frozen_rows(
    sparse: bool, value: float
) -> None:
    table = table_of(sparse=sparse)
    up = torch.ones(*IDS.shape, D)
    up[0, 2] = value  # row 2 is frozen
    up[0, 1] = value  # row 1 trains, and is told the truth
    table(IDS).backward(up)
    grad = table.weight.grad.to_dense()
    assert_same_bits(grad[FROZEN], torch.zeros(len(FROZEN), D), "frozen rows of the gradient")
    assert not grad[1].isfinite().any()
    assert grad[4].tolist() == [3.0] * D


def test_hook_sees_rows_as_they_are_when_the_gradient_comes() -> None:
    table = table_of()
    loss = table(IDS).sum()
    table.set_trainable_rows([2])
    loss.backward()
    assert moved_rows(table.weight.grad) == [2]


@pytest.mark.parametrize("kind", [PartialEmbedding, PartialEmbeddingBag])
def test_module_and_hook_are_freed_together(kind: type[nn.Module]) -> None:
    table = kind(V, D, trainable_rows=ROWS, sparse=False)
    weight = table.weight
    owner = weakref.ref(table)
    gc.disable()
    try:
        del table
        assert owner() is None  # by reference count alone: there is no cycle
    finally:
        gc.enable()
    # What is left on a weight that outlives its module does nothing.
    (weight * 2).sum().backward()
    assert weight.grad.tolist() == [[2.0] * D] * V


def test_replaced_weight_keeps_no_hook_of_its_old_table() -> None:
    table = table_of()
    old = table.weight
    table.weight = nn.Parameter(vectors())
    (old * 2).sum().backward()
    assert moved_rows(old.grad) == list(range(V))


# Choosing rows


NAMES_OF_ROWS: dict[str, tuple[Any, list[int]]] = {
    "all": ("all", [0, 1, 2, 3, 4, 5, 6]),
    "none": ("none", []),
    "tensor": (torch.tensor([4, 1]), [1, 4]),
    "int32_tensor": (torch.tensor([1], dtype=torch.int32), [1]),
    "mask_tensor": (torch.arange(V) % 2 == 1, [1, 3, 5]),
}


@pytest.mark.parametrize("name", NAMES_OF_ROWS)
def test_rows_are_named_by_tensors_too(name: str) -> None:
    named, rows = NAMES_OF_ROWS[name]
    table = table_of([0])
    table.set_trainable_rows(named)
    assert table.trainable_rows.dtype == torch.int64
    assert_is_partial(table, rows)


def test_rows_that_join_together_are_a_cohort() -> None:
    table = table_of([1, 4])
    table.unfreeze_rows([2, 4])
    table.set_trainable_rows([0, 1, 2])
    cohorts = [ids.tolist() for ids in table.row_set.cohorts.values()]
    assert cohorts == [[1], [2], [0]]
    assert table.row_set.order.tolist() == [1, 2, 0]
    assert table.row_set.ids.tolist() == [0, 1, 2]


def test_what_is_handed_out_cannot_change_the_rows() -> None:
    table = table_of()
    table.trainable_rows.fill_(0)
    assert_is_partial(table)


# Two tables, one weight


@SPARSE_AND_DENSE
def test_tables_that_share_a_weight_have_the_same_rows(sparse: bool) -> None:
    first, second = table_of([1, 4], sparse=sparse), table_of("all", sparse=sparse)
    second.weight = first.weight
    for table in (first, second):
        assert moved_rows(gradient(table)) == [1, 4]
    second.set_trainable_rows([4, 5])
    for table in (first, second):
        assert_is_partial(table, [4, 5])


def test_rows_that_were_frozen_stay_so_whichever_table_gives_the_weight() -> None:
    first, second = table_of("all"), table_of([1, 4])
    second.weight = first.weight
    assert_is_partial(first, [1, 4])


def test_tables_of_different_rows_are_not_tied() -> None:
    first, second = table_of([1, 4]), table_of([4, 5])
    before = second.weight
    with pytest.raises(InputError, match=r"trains \(1, 4\) and .* trains \(4, 5\)"):
        second.weight = first.weight
    assert second.weight is before
    assert_is_partial(first, [1, 4])
    assert_is_partial(second, [4, 5])


def test_a_table_that_is_untied_keeps_its_rows_and_no_longer_follows() -> None:
    first, second = table_of([1, 4]), table_of()
    second.set_trainable_rows([1, 4])
    second.weight = first.weight
    second.weight = nn.Parameter(vectors())
    first.set_trainable_rows([5])
    assert_is_partial(first, [5])
    assert_is_partial(second, [1, 4])


@pytest.mark.parametrize("dropped", [0, 1])
def test_a_table_that_goes_away_leaves_the_shared_weight_to_the_other(dropped: int) -> None:
    tables = [table_of([1, 4]), table_of([1, 4])]
    tables[1].weight = tables[0].weight
    del tables[dropped]
    assert_is_partial(tables[0], [1, 4])


def test_a_plain_embedding_that_shares_the_weight_is_masked_too() -> None:
    table, plain = table_of(), nn.Embedding(V, D)
    plain.weight = table.weight
    assert moved_rows(gradient(plain)) == ROWS
