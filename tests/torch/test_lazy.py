"""`lazy=True`: only the rows that a batch touched are stepped, by every element-wise optimizer.

For each touched row the parameter and all state of the row's shape take part in the optimizer's own
maths, with the step count that the cohort shares; it advances at every step at which the table has
a gradient. Rows that the batch did not touch keep their bits, and so does their state.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import ELEMENT_WISE, WHOLE_MATRIX, Case, case_of, crossed
from models import D, V, partial_table
from numpy.typing import NDArray
from oracle import assert_same_bits, rows_that_differ, same_bits
from torch import Tensor, nn

from partial_embedding import InputError
from partial_embedding.torch import PartialEmbedding, rowwise

ROWS = (1, 2, 4, 6, 7, 9)
Array = NDArray[np.float64]


def batches(count: int = 40) -> list[tuple[Tensor, Tensor]]:
    """Ids with duplicates, and what arrives at the entries looked up.

    Some batches touch frozen rows alone, and row 9 is touched late for the first time.
    """
    generator = torch.Generator().manual_seed(5)
    made = []
    for step in range(count):
        choice = (
            [0, 3, 5] if step % 7 == 2 else [0, 1, 2, 3, 4, 6, 7, 9] if step > 20 else [1, 4, 5]
        )
        if step % 5 == 4:
            choice = [2, 6, 7]
        picks = torch.randint(len(choice), (6,), generator=generator)
        ids = torch.tensor(choice)[picks].view(2, 3)
        made.append((ids, torch.randn(2, 3, D, generator=generator)))
    assert {frozenset(ids.flatten().tolist()) & set(ROWS) for ids, _ in made} >= {frozenset()}
    return made


def lazily(case: Case, table: PartialEmbedding) -> torch.optim.Optimizer:
    optimizer = case.make(table.parameters())
    assert rowwise(optimizer, table, lazy=True) is optimizer
    return optimizer


def step(table: nn.Embedding, optimizer: torch.optim.Optimizer, ids: Tensor, up: Tensor) -> None:
    optimizer.zero_grad()
    table(ids).backward(up)
    optimizer.step()


def summed(ids: Tensor, up: Tensor, rows: tuple[int, ...] = ROWS) -> tuple[list[int], Tensor]:
    """The slots of the rows touched, and the K x D gradient with duplicates summed."""
    gradient = torch.zeros(len(rows), D)
    touched = set()
    for row, value in zip(ids.flatten().tolist(), up.reshape(-1, D), strict=True):
        if row in rows:
            gradient[rows.index(row)] += value
            touched.add(rows.index(row))
    return sorted(touched), gradient


# Adam against torch's own lazy optimizer


@pytest.mark.parametrize("name", ["Adam", "Adam-foreach", "Adam-forloop", "Adam-fused"])
def test_lazy_adam_equals_sparse_adam_over_each_cohort_from_its_own_first_step(name: str) -> None:
    table, joins = partial_table("none"), {0: (1, 4), 13: (2, 7, 9)}
    optimizer, start = lazily(case_of(name), table), table.weight.detach().clone()
    peers = {}

    for number, (ids, up) in enumerate(batches()):
        if number in joins:
            rows = joins[number]
            table.unfreeze_rows(rows)
            values = table.weight[list(rows)].detach()
            peer = nn.Embedding.from_pretrained(values, freeze=False, sparse=True)
            peers[rows] = (peer, torch.optim.SparseAdam(peer.parameters()))
        step(table, optimizer, ids, up)
        for rows, (peer, peer_optimizer) in peers.items():
            mine = torch.isin(ids, torch.tensor(rows))
            step(peer, peer_optimizer, torch.searchsorted(torch.tensor(rows), ids[mine]), up[mine])
            torch.testing.assert_close(table.weight[list(rows)], peer.weight, rtol=1e-6, atol=1e-6)
    assert rows_that_differ(start, table.weight.detach()) == [1, 2, 4, 7, 9]


# Every element-wise optimizer, against the stock one with untouched rows put back


class PutBack:
    """A stock optimizer over all K rows, after which untouched rows and their state are put back.

    It is not cheap, and it is what lazy means. State that did not exist before the first step is
    put back to what a step from nothing, with no gradient, makes of it.
    """

    def __init__(self, case: Case, values: Tensor) -> None:
        self.weight = nn.Parameter(values.detach().clone())
        self.optimizer = case.make([self.weight])
        self.blank = self._blank_state(case)

    def _blank_state(self, case: Case) -> dict[str, Tensor]:
        nothing = nn.Parameter(torch.zeros_like(self.weight))
        nothing.grad = torch.zeros_like(nothing)
        optimizer = case.make([nothing])
        optimizer.step()
        return dict(optimizer.state[nothing])

    def _row_state(self) -> dict[str, Tensor]:
        state = self.optimizer.state[self.weight] or self.blank
        return {
            name: value.clone()
            for name, value in state.items()
            if isinstance(value, Tensor) and value.shape == self.weight.shape
        }

    def step(self, touched: list[int], gradient: Tensor) -> None:
        before, state = self.weight.detach().clone(), self._row_state()
        untouched = [k for k in range(len(before)) if k not in touched]
        self.weight.grad = gradient
        self.optimizer.step()
        with torch.no_grad():
            self.weight[untouched] = before[untouched]
            for name, value in state.items():
                self.optimizer.state[self.weight][name][untouched] = value[untouched]


LAZY = [case for case in ELEMENT_WISE if not case.sparse_only]


@pytest.mark.parametrize("case", crossed(LAZY))
def test_lazy_steps_equal_full_ones_with_untouched_rows_put_back(
    case: Case, record_property: Callable[[str, object], None]
) -> None:
    table = partial_table(ROWS)
    optimizer = lazily(case, table)
    peer = PutBack(case, table.weight[list(ROWS)])
    moved: set[int] = set()

    for ids, up in batches(28):
        before = table.weight.detach().clone()
        step(table, optimizer, ids, up)
        touched, gradient = summed(ids, up)
        peer.step(touched, gradient)
        untouched = [row for row in range(V) if row not in {ROWS[k] for k in touched}]
        assert_same_bits(table.weight[untouched], before[untouched], "rows that were not touched")
        torch.testing.assert_close(table.weight[list(ROWS)], peer.weight, rtol=1e-5, atol=1e-6)
        moved |= {row for row in ROWS if not same_bits(table.weight[row], before[row])}
    assert moved == set(ROWS)
    record_property("configuration: lazy optimizer with options", case.id)


def test_a_step_without_a_gradient_does_not_count() -> None:
    tables = [partial_table(ROWS), partial_table(ROWS)]
    optimizers = [lazily(case_of("Adam"), table) for table in tables]
    for ids, up in batches(12):
        for table, optimizer in zip(tables, optimizers, strict=True):
            step(table, optimizer, ids, up)
        optimizers[1].zero_grad()
        optimizers[1].step()
    assert_same_bits(tables[0].weight, tables[1].weight, "with idle steps in between")


@pytest.mark.parametrize("name", WHOLE_MATRIX)
def test_optimizers_that_look_at_the_whole_matrix_are_refused(name: str) -> None:
    table = partial_table(ROWS)
    optimizer = case_of(name).make(table.parameters())
    with pytest.raises(InputError, match=name):
        rowwise(optimizer, table, lazy=True)
