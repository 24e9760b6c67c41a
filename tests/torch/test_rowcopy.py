"""Rows are read, summed and written back with the bits that the simplest code would give."""

from typing import Any

import pytest
import torch
from cases import SPARSE_AND_DENSE
from oracle import assert_same_bits, rows_that_differ, same_bits
from steps import take_steps
from torch import Tensor, nn

from partial_embedding.torch import PartialEmbedding, rowcopy, rowwise
from partial_embedding.torch.rowcopy import distinct, read_rows, run_of, sum_rows, write_rows

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
WIDTHS = (1, 2, 3, 4, 6, 8, 64)
SCATTERED = torch.tensor([1, 4, 5, 9])
TOGETHER = torch.tensor([3, 4, 5, 6])


def any_bits(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Every byte at random, so that there are many kinds of NaN."""
    generator = torch.Generator().manual_seed(rows)
    size = (rows, width * dtype.itemsize)
    return torch.randint(256, size, generator=generator, dtype=torch.uint8).view(dtype)


@pytest.fixture(autouse=True, params=[0, rowcopy._MANY], ids=["many", "few"])
def as_many(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are written in one way where there are few numbers, and in another where many."""
    monkeypatch.setattr(rowcopy, "_MANY", request.param)


@pytest.mark.parametrize("ids", [SCATTERED, TOGETHER], ids=["scattered", "together"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_read_and_written_bit_by_bit(dtype: torch.dtype, width: int, ids: Tensor) -> None:
    run, table, values = run_of(ids), any_bits(12, width, dtype), any_bits(4, width, dtype)
    assert_same_bits(read_rows(table, ids, run), table.index_select(0, ids), "read")
    memory = torch.zeros_like(values)
    again = read_rows(table, ids, run, memory)
    assert_same_bits(again, table.index_select(0, ids), "read into memory used before")
    expected = table.clone()
    # Through bytes, as a copy of floating-point values may change what kind of NaN they are.
    expected.view(torch.uint8)[ids] = values.view(torch.uint8)
    write_rows(table, ids, run, values)
    assert_same_bits(table, expected, "written")


@pytest.mark.parametrize("ids", [SCATTERED, TOGETHER], ids=["scattered", "together"])
@pytest.mark.parametrize("odd", ["transposed", "column", "shifted"])
def test_tables_of_odd_layout_are_read_and_written(odd: str, ids: Tensor) -> None:
    table = {
        "transposed": torch.randn(4, 12).t(),
        "column": torch.randn(12, 9)[:, :4],
        "shifted": torch.randn(49)[1:].view(12, 4),  # not at a multiple of 16 bytes
    }[odd]
    run, values, expected = run_of(ids), torch.randn(4, 4), table.clone()
    assert_same_bits(read_rows(table, ids, run), table[ids], "read")
    assert read_rows(table, ids, run).is_contiguous()
    expected[ids] = values
    write_rows(table, ids, run, values)
    assert_same_bits(table.contiguous(), expected.contiguous(), "written")


def test_a_table_that_begins_anywhere_in_memory_is_written() -> None:
    # As weights do that are mapped from a file: wide elements there would end the process.
    memory = bytearray(2 * (1 + 10 * 8) + 16)
    begin = 2 + (-torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 16)
    table = torch.frombuffer(memory, dtype=torch.bfloat16, offset=begin, count=80).view(10, 8)
    assert table.data_ptr() % 16 == 2
    ids, values = torch.tensor([1, 4, 8]), torch.ones(3, 8, dtype=torch.bfloat16)
    write_rows(table, ids, None, values)
    assert_same_bits(table[ids], values, "rows written")
    assert not table[[0, 2, 3, 5, 6, 7, 9]].any()


def test_rows_of_one_number_are_written_one_by_one() -> None:
    target, values = torch.zeros(8), torch.arange(1.0, 5.0)
    write_rows(target, SCATTERED[:3], None, values[:3])
    assert target.tolist() == [0, 1, 0, 0, 2, 3, 0, 0]
    with pytest.raises(RuntimeError, match="dtype"):
        write_rows(torch.zeros(8, 4), SCATTERED[:3], None, torch.zeros(3, 4, dtype=torch.int32))


def test_autograd_knows_that_rows_were_written() -> None:
    table = nn.Parameter(torch.ones(6, 4))
    loss = table.square().sum()
    write_rows(table.detach(), torch.tensor([1, 4]), None, torch.zeros(2, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        made = torch.ones(6, 4)
        write_rows(made, torch.tensor([1, 4]), None, torch.zeros(2, 4))
        assert made.sum() == 16


@pytest.mark.parametrize("lazy", [False, True])
def test_frozen_rows_in_a_gradient_made_by_hand_stay_as_they_are(lazy: bool) -> None:
    table = PartialEmbedding(12, 4, trainable_rows=SCATTERED)
    before = table.weight.detach().clone()
    optimizer = rowwise(torch.optim.AdamW(table.parameters()), table, lazy=lazy)
    every = torch.arange(12).unsqueeze(0)
    table.weight.grad = torch.sparse_coo_tensor(
        every, torch.ones(12, 4), (12, 4), check_invariants=False
    )
    optimizer.step()
    assert rows_that_differ(before, table.weight) == SCATTERED.tolist()


@pytest.mark.parametrize("size", [(7, 30, 3), (2000, 5000, 64), (300, 70_000, 16)], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_rows_are_summed_in_the_order_of_a_dense_backward_pass(
    size: tuple[int, int, int], index_dtype: torch.dtype
) -> None:
    height, count, width = size  # torch has other kernels for large sums
    generator = torch.Generator().manual_seed(0)
    slots = torch.randint(height, (count,), generator=generator)
    values = torch.randn(count, width, generator=generator)
    dense = nn.Embedding(height, width)
    dense(slots).backward(values)
    found = sum_rows(slots.to(index_dtype), values, height)
    assert_same_bits(found, dense.weight.grad, "the sum")
    again = sum_rows(slots.to(index_dtype), values, height, found)
    assert again is found
    assert_same_bits(again, dense.weight.grad, "the sum in memory used before")


@pytest.mark.parametrize("count", [0, 1, 5, 4000])
@pytest.mark.parametrize("height", [1, 7, 1000, 100_000])
def test_distinct_slots_are_found_in_order(height: int, count: int) -> None:
    slots = torch.randint(height, (count,), generator=torch.Generator().manual_seed(0))
    found, places = distinct(slots, height)
    expected, inverse = torch.unique(slots, return_inverse=True)
    assert torch.equal(found, expected)
    assert torch.equal(places, inverse)


class Watched(torch.optim.SGD):
    """Remembers where the parameter and its gradient lie, and steps as a test asks."""

    def __init__(self, params: Any, way: str = "plain") -> None:
        super().__init__(params, lr=0.1)
        self.param_groups[0]["way"] = way

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step."""
        if closure is not None:
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                last = state.get("last", torch.zeros_like(p))
                if group["way"] == "replaces":
                    p.data = p.data - 0.1 * (p.grad + last)
                else:
                    p.sub_(0.1 * (p.grad + last))
                state["last"] = p.grad if group["way"] == "keeps" else p.grad.clone()
                places.append((p.data_ptr(), p.grad.data_ptr()))


places: list[tuple[int, int]] = []


def trained(way: str, rows: Tensor, sparse: bool) -> tuple[Tensor, Tensor]:
    """The rows of a partial table, and those of a table of their own, after some steps."""
    start = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    table = PartialEmbedding.from_pretrained(start.clone(), sparse=sparse, trainable_rows=rows)
    alone = nn.Embedding.from_pretrained(start[rows], freeze=False)
    ours, theirs = (
        rowwise(Watched(table.parameters(), way), table),
        Watched(alone.parameters(), way),
    )
    slots = torch.tensor([0, 3, 3, 1])
    for step in range(4):
        for module, optimizer, ids in ((alone, theirs, slots), (table, ours, rows[slots])):
            optimizer.zero_grad()
            places.clear()
            (module(ids) * (step + 1)).square().sum().backward()
            optimizer.step()
    frozen = [row for row in range(12) if row not in rows]
    assert same_bits(table.weight[frozen], start[frozen])
    assert not same_bits(table.weight[rows], start[rows])
    return table.weight, alone.weight


@SPARSE_AND_DENSE
@pytest.mark.parametrize("rows", [SCATTERED, TOGETHER], ids=["scattered", "together"])
@pytest.mark.parametrize("way", ["plain", "keeps", "replaces"])
def test_memory_that_is_shared_or_used_again_changes_no_bit(
    way: str, rows: Tensor, sparse: bool
) -> None:
    table, alone = trained(way, rows, sparse)
    assert_same_bits(table[rows], alone, way)


def test_rows_that_lie_side_by_side_are_stepped_where_they_are() -> None:
    table, _ = trained("plain", TOGETHER, sparse=True)
    assert places[-1][0] == table[3].data_ptr()
    table, _ = trained("plain", SCATTERED, sparse=True)
    assert not table.data_ptr() <= places[-1][0] < table.data_ptr() + 12 * 4 * 4


def test_memory_is_used_again_from_step_to_step() -> None:
    table = PartialEmbedding(12, 4, trainable_rows=SCATTERED)
    optimizer = rowwise(Watched(table.parameters()), table)
    places.clear()
    take_steps(optimizer, lambda: table(SCATTERED).sum(), 3)
    assert len(set(places)) == 1
