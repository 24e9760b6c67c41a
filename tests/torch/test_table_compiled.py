"""The table under torch.compile, and its gradient under gradcheck."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_same_bits, rows_that_differ
from small_tables import IDS, ROWS, gradient, moved_rows, table_of, vectors
from torch import Tensor, nn

from partial_embedding.torch import PartialEmbedding, PartialEmbeddingBag

COMPILED: dict[str, Callable[[], nn.Module]] = {
    "sparse": lambda: table_of(sparse=True),
    "dense": lambda: table_of(),
    "all_rows": lambda: table_of("all"),
    "no_row": lambda: table_of("none"),
    "max_norm": lambda: table_of("all", max_norm=0.5),
    "padding_idx": lambda: table_of(padding_idx=4),
    "padding_idx, sparse": lambda: table_of(padding_idx=4, sparse=True),
    "padding_idx, sparse, all_rows": lambda: table_of("all", padding_idx=4, sparse=True),
    "bag_sum": lambda: PartialEmbeddingBag.from_pretrained(
        vectors(), mode="sum", sparse=False, trainable_rows=ROWS
    ),
    "bag_mean": lambda: PartialEmbeddingBag.from_pretrained(
        vectors(), sparse=False, trainable_rows=ROWS
    ),
}


LATELY = ("padding_idx, sparse", "padding_idx, sparse, all_rows")


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_tables_have_no_graph_break(name: str) -> None:
    if name in LATELY and torch.__version__ < (2, 13):
        pytest.skip("torch 2.13 can compile it, and 2.10 cannot")
    torch._dynamo.reset()
    table = COMPILED[name]()
    expected = gradient(COMPILED[name]())
    # The partitioner and autograd run in full; only the machine code is left out.
    compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(IDS), table(IDS), "the output")
    (compiled(IDS).square() + compiled(IDS)).sum().backward()
    grad = table.weight.grad.to_dense()
    torch.testing.assert_close(grad, expected)
    assert moved_rows(grad) == table.trainable_rows.tolist()


def test_compiled_tables_follow_a_change_of_rows_without_compiling_again() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    table = table_of()
    compiled = torch.compile(table, fullgraph=True, backend=counter)
    for rows in ([1, 4], [2], [0, 3, 6]):
        table.set_trainable_rows(rows)
        table.weight.grad = None
        compiled(IDS).square().sum().backward()
        assert moved_rows(table.weight.grad) == rows
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", [PartialEmbedding, PartialEmbeddingBag])
@pytest.mark.parametrize("rows", [ROWS, "all"], ids=["some_rows", "all_rows"])
def test_gradients_of_trainable_rows_pass_gradcheck(kind: Any, rows: Any) -> None:
    start = vectors(dtype=torch.float64)
    table = kind.from_pretrained(start, sparse=False, trainable_rows=rows)
    ids = table.trainable_rows

    def out(trained: Tensor) -> Tensor:
        weight = start.index_copy(0, ids, trained)
        return torch.func.functional_call(table, {"weight": weight}, IDS).pow(3)

    trained = start[ids].clone().requires_grad_()
    assert torch.autograd.gradcheck(out, (trained,))
    if kind is PartialEmbedding:  # torch has no second derivative of bags
        assert torch.autograd.gradgradcheck(out, (trained,))


def test_gradients_of_the_weight_itself_pass_gradcheck() -> None:
    table = table_of("all", dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda weight: table(IDS).pow(3), (table.weight,))
    assert torch.autograd.gradgradcheck(lambda weight: table(IDS).pow(3), (table.weight,))


@pytest.mark.parametrize("bound", [True, False], ids=["step", "a_function_with_a_step"])
def test_an_optimizer_whose_step_is_compiled_is_prepared_too(bound: bool) -> None:
    torch._dynamo.reset()
    table = PartialEmbedding(10, 3, trainable_rows=[1])
    before = table.weight.detach().clone()
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.1, weight_decay=0.5)
    step = torch.compile(optimizer.step if bound else lambda: optimizer.step(), backend="eager")
    for _ in range(3):
        optimizer.zero_grad()
        table(torch.tensor([1, 2])).sum().backward()
        step()
    assert rows_that_differ(before, table.weight) == [1]
