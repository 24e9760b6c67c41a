"""A small model around a table, and the batches that it is trained with."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from cases import Case
from oracle import Oracle, assert_same_bits
from torch import Tensor, nn

from partial_embedding.torch import PartialEmbedding, rowwise

V, D, CLASSES = 12, 5, 3

# Rows that no scenario trains. The first three are looked up, the last one is not: it holds NaN.
NEVER_TRAINED = (0, 5, 10, 11)
# Rows that train in tests of something else than which rows do.
ROWS = (1, 4, 6, 9)
FROZEN = [row for row in range(V) if row not in ROWS]


def starting_table(rows: int = V, dim: int = D, dtype: torch.dtype = torch.float32) -> Tensor:
    """A table with values in its frozen rows that careless arithmetic would change.

    Adding zero turns -0.0 into 0.0, multiplying by zero turns an infinity into NaN, and NaN times
    anything loses its payload.
    """
    table = torch.randn(rows, dim, generator=torch.Generator().manual_seed(7)).to(dtype)
    if rows == V:
        table[10, :3] = torch.tensor([-0.0, 1e-40, 0.0]).to(dtype)
        table[11, :4] = torch.tensor([float("nan"), -0.0, float("inf"), -float("inf")]).to(dtype)
        if dtype == torch.float32:
            table.view(torch.int32)[11, 4] = 0x7FC00123  # a NaN with a payload
    return table


class Model(nn.Module):
    """A layer before the table in the list of parameters, the table, and a layer after it."""

    def __init__(self, table: nn.Module, *, bias: bool = True, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        if sparse:
            self.first: nn.Module = nn.Embedding(V, table.embedding_dim, sparse=True)
            self.table = table
            self.last: nn.Module = nn.Embedding(V, table.embedding_dim, sparse=True)
        else:
            self.first = nn.Linear(table.embedding_dim, table.embedding_dim, bias=bias)
            self.table = table
            self.last = nn.Linear(table.embedding_dim, CLASSES, bias=bias)

    @property
    def companions(self) -> nn.ModuleList:
        """The other two layers, as the loss takes them."""
        return nn.ModuleList([self.first, self.last])


@dataclass(frozen=True)
class Batch:
    """Ids to look up (none: the table gets no gradient) and what the loss compares with."""

    ids: Tensor | None
    seed: int

    def loss_of(self, companions: nn.ModuleList, looked_up: Tensor | None) -> Tensor:
        first, last = companions
        noise = torch.Generator().manual_seed(self.seed)
        if looked_up is None:
            looked_up = torch.randn(2, 9, D, generator=noise)
        if isinstance(first, nn.Embedding):
            ids = torch.arange(looked_up.shape[:-1].numel()).view(looked_up.shape[:-1]) % V
            out = torch.tanh(looked_up * (1 + first(ids))) + last(ids)
        else:
            out = last(torch.tanh(first(looked_up)))
        return (out - torch.randn(out.shape, generator=noise)).square().sum()

    def loss(self, model: Model) -> Tensor:
        looked_up = None if self.ids is None else model.table(self.ids)
        return self.loss_of(model.companions, looked_up)


def batches(count: int = 8, *, quiet: int = 5) -> list[Batch]:
    """Batches with many duplicates and with ids of frozen rows.

    Every row but the last, which holds NaN, is in each ordinary batch. The one of step 3 holds rows
    that are never trained and no others, and one (`quiet`) does not use the table.
    """
    generator = torch.Generator().manual_seed(11)
    made = []
    for step in range(count):
        weights = torch.tensor([1, 6, 1, 1, 6, 1, 2, 1, 1, 3, 1], dtype=torch.float)
        some = torch.multinomial(weights, 19, replacement=True, generator=generator)
        ids = torch.cat([torch.arange(V - 1), some])
        ids = ids[torch.randperm(len(ids), generator=generator)].view(2, 15)
        if step == 3:
            ids = torch.tensor([[0, 5, 10], [5, 5, 0]])
        made.append(Batch(None if step == quiet else ids, seed=step))
    return made


def quiet_at(*steps: int) -> list[Batch]:
    return [Batch(None if i in steps else b.ids, b.seed) for i, b in enumerate(batches(quiet=-1))]


def train(
    case: Case,
    model: Model,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    with_closure: bool = False,
) -> Tensor:
    """One step as users write it, with a closure where the optimizer needs one."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = batch.loss(model)
        loss.backward()
        return loss

    if case.one_history or with_closure:
        return optimizer.step(closure)
    loss = closure()
    optimizer.step()
    return loss


def oracle_of(case: Case, model: Model, rows: Iterable[int], **options: Any) -> Oracle:
    """The oracle for a model as it is now."""
    return Oracle(
        case.make,
        model.table.weight,
        rows,
        list(model.companions),
        table_at=1,
        one_history=case.one_history,
        **{"slicing": case.fused or not case.element_wise, "sparse": case.sparse_only} | options,
    )


def partial_table(
    rows: Any = ROWS, start: Tensor | None = None, **options: Any
) -> PartialEmbedding:
    start = starting_table() if start is None else start
    rows = "none" if isinstance(rows, tuple) and not rows else rows
    table = PartialEmbedding(*start.shape, dtype=start.dtype, trainable_rows=rows, **options)
    with torch.no_grad():
        table.weight.copy_(start)
    return table


def model_of(case: Case, table: nn.Module) -> Model:
    return Model(table, bias=not case.matrices_only, sparse=case.sparse_only)


def prepared(
    case: Case, table: PartialEmbedding, **options: Any
) -> tuple[Model, torch.optim.Optimizer, Oracle]:
    """A model, its optimizer and its oracle."""
    model = model_of(case, table)
    optimizer = case.make(model.parameters())
    assert rowwise(optimizer, model) is optimizer
    return model, optimizer, oracle_of(case, model, table.trainable_rows.tolist(), **options)


def assert_same_model(model: Model, oracle: Oracle, when: str) -> None:
    """Fail unless every parameter has the oracle's bits."""
    assert_same_bits(model.table.weight, oracle.table, f"the table {when}")
    expected = dict(oracle.companions.named_parameters())
    for name, companion in model.companions.named_parameters():
        assert_same_bits(companion, expected[name], f"companion {name} {when}")


def follow(
    case: Case,
    model: Model,
    optimizer: torch.optim.Optimizer,
    oracle: Oracle,
    steps: Iterable[Batch],
    stages: Mapping[int, Iterable[int]] | None = None,
) -> None:
    """Train a model and its oracle side by side and compare them bit for bit at each step.

    `stages` says which rows are trainable from which step on.
    """
    for step, batch in enumerate(steps):
        if stages and step in stages:
            model.table.set_trainable_rows(tuple(stages[step]) or "none")
            oracle.set_rows(stages[step])
        train(case, model, optimizer, batch)
        oracle.step(batch.ids, batch.loss_of)
        assert_same_model(model, oracle, f"after step {step}")
