"""A small table of which two rows train, and what its gradient says of them."""

from typing import Any

import torch
from torch import Tensor, nn

from partial_embedding.torch import PartialEmbedding

V, D = 7, 3
ROWS = [1, 4]
FROZEN = [0, 2, 3, 5, 6]
# Every row at least once, with duplicates.
IDS = torch.tensor([[0, 1, 2, 3, 4], [4, 4, 5, 6, 0]])


def vectors(rows: int = V, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(5)).to(dtype)


def table_of(rows: Any = ROWS, sparse: bool = False, **options: Any) -> PartialEmbedding:
    start = vectors(dtype=options.pop("dtype", torch.float32))
    return PartialEmbedding.from_pretrained(start, sparse=sparse, trainable_rows=rows, **options)


def gradient(table: nn.Module, ids: Tensor = IDS) -> Tensor:
    """The gradient of `weight` for a loss under which no row's gradient is zero, dense."""
    table.weight.grad = None
    out = table(ids)
    (out.square() + out).sum().backward()
    grad: Tensor = table.weight.grad
    return grad.to_dense()


def moved_rows(grad: Tensor) -> list[int]:
    return grad.ne(0).any(1).nonzero().flatten().tolist()


def assert_is_partial(table: nn.Module, rows: list[int] = ROWS) -> None:
    """Exactly `rows` train: the table says so, and its gradient too."""
    assert table.trainable_rows.tolist() == rows
    assert moved_rows(gradient(table)) == rows


def assert_is_masked_past_the_module(table: nn.Module) -> None:
    """As PEFT does it: the weight is looked up, and `forward` has no chance to mend anything."""
    table.weight.grad = None
    torch.nn.functional.embedding(IDS, table.weight).square().sum().backward()
    assert moved_rows(table.weight.grad) == ROWS
