"""Gradients of another kind, equal to rounding, and values that poison."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import DEFAULTS, FEW, GRADIENTS, MANY, SPARSE_AND_DENSE, Case, by_id, case_of, crossed
from models import (
    FROZEN,
    ROWS,
    Batch,
    D,
    assert_same_model,
    batches,
    model_of,
    oracle_of,
    partial_table,
    prepared,
    starting_table,
)
from oracle import Oracle, assert_same_bits, same_bits
from steps import closure_of
from torch import Tensor, nn

from partial_embedding.torch import PartialEmbedding, rowwise

# Gradients of another kind: equal to rounding


def dense_gradient(table: Tensor, losses: Iterable[Callable[[nn.Module], Tensor]]) -> Tensor:
    """The gradient of a plain table, all rows of it trainable."""
    plain = nn.Embedding.from_pretrained(table.detach().clone(), freeze=False)
    for loss_of in losses:
        loss_of(plain).backward()
    return plain.weight.grad


def check_close(
    case: Case,
    table: PartialEmbedding,
    losses_of_steps: list[list[Callable[[nn.Module], Tensor]]],
    *,
    gradient_tolerance: float = 1e-6,
    tolerance: float = 1e-5,
) -> None:
    """Train a lone table; frozen rows must be exact, the others close to the oracle."""
    optimizer = rowwise(case.make(table.parameters()), table)
    oracle = Oracle(case.make, table.weight, ROWS)
    start = table.weight.detach().clone()
    for losses in losses_of_steps:
        optimizer.zero_grad()
        for loss_of in losses:
            loss_of(table).backward()
        gradient = table.weight.grad.to_dense()
        reference = dense_gradient(table.weight, losses)
        torch.testing.assert_close(
            gradient[list(ROWS)],
            reference[list(ROWS)],
            rtol=gradient_tolerance,
            atol=gradient_tolerance * reference[list(ROWS)].abs().max().item(),
        )
        assert (gradient[FROZEN] == 0).all()
        oracle.step_with_gradient(reference)
        optimizer.step()
        assert_same_bits(table.weight[FROZEN], start[FROZEN], "frozen rows")
        torch.testing.assert_close(
            table.weight[list(ROWS)], oracle.table[list(ROWS)], rtol=tolerance, atol=tolerance
        )
    for row in ROWS:
        assert not same_bits(table.weight[row], start[row])


def squares(ids: Tensor, seed: int) -> Callable[[nn.Module], Tensor]:
    def loss_of(table: nn.Module) -> Tensor:
        out = table(ids)
        target = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
        return (out - target.to(out.dtype)).square().sum()

    return loss_of


def pairs_of_losses() -> list[tuple[Callable[[nn.Module], Tensor], ...]]:
    used = [batch.ids for batch in batches(12) if batch.ids is not None]
    return [(squares(a, i), squares(b, 100 + i)) for i, (a, b) in enumerate(pairwise(used))]


@SPARSE_AND_DENSE
@pytest.mark.parametrize("case", FEW, ids=by_id)
def test_a_table_used_twice_in_one_pass(case: Case, sparse: bool) -> None:
    def both(first: Any, second: Any) -> Callable[[nn.Module], Tensor]:
        return lambda table: first(table) + second(table)

    steps = [[both(*pair)] for pair in pairs_of_losses()]
    check_close(case, partial_table(sparse=sparse), steps)


@SPARSE_AND_DENSE
@pytest.mark.parametrize("case", FEW, ids=by_id)
def test_gradients_accumulated_over_two_passes(case: Case, sparse: bool) -> None:
    check_close(case, partial_table(sparse=sparse), [list(pair) for pair in pairs_of_losses()])


@SPARSE_AND_DENSE
@pytest.mark.parametrize("case", FEW, ids=by_id)
def test_half_precision_weights(case: Case, sparse: bool) -> None:
    table = partial_table(start=starting_table(dtype=torch.bfloat16), sparse=sparse)
    steps = [[first] for first, _ in pairs_of_losses()]
    # One unit in the last place of bfloat16 is 2**-8; duplicates are summed in it.
    check_close(case, table, steps, gradient_tolerance=2e-2, tolerance=6e-2)


# Without SparseAdam, for which the model's other tables would need float64 too.
@pytest.mark.parametrize("case", crossed([case for case in MANY if not case.sparse_only]))
def test_double_precision_is_exact(case: Case) -> None:
    model = model_of(case, partial_table(start=starting_table(dtype=torch.float64))).double()
    optimizer = rowwise(case.make(model.parameters()), model)
    oracle = oracle_of(case, model, ROWS)
    ids = batches()[0].ids

    def loss_of(companions: nn.ModuleList, looked_up: Tensor) -> Tensor:
        return companions[1](torch.tanh(companions[0](looked_up))).square().sum()

    closure = closure_of(optimizer, lambda: loss_of(model.companions, model.table(ids)))
    for step in range(5):
        optimizer.step(closure)
        oracle.step(ids, loss_of)
        assert_same_model(model, oracle, f"after step {step}")


# Values that poison


NOT_FINITE = torch.tensor([float("inf"), -float("inf"), float("nan"), float("inf"), 0.0])


def loss_with(table: PartialEmbedding, batch: Batch, rows: Iterable[int], bad: Tensor) -> Tensor:
    """A closure that sends `bad` to the entries of some rows, and a gradient to all others.

    The others' gradient is that of the loss returned, so that a line search is content with it.
    """
    table.zero_grad()
    if batch.ids is None:
        return torch.tensor(0.0)
    out = table(batch.ids)
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(batch.seed))
    gap = out.detach() - target
    where = torch.isin(batch.ids, torch.tensor(list(rows))).unsqueeze(-1)
    out.backward(torch.where(where, bad, gap))
    return torch.where(where, torch.zeros(D), gap).square().sum() / 2


@pytest.mark.parametrize(("case", "sparse"), crossed(MANY, GRADIENTS))
def test_what_is_not_finite_stays_with_the_frozen_rows(case: Case, sparse: bool) -> None:
    tables = [partial_table(sparse=sparse), partial_table(sparse=sparse)]
    optimizers = [rowwise(case.make(table.parameters()), table) for table in tables]
    start = starting_table()
    for step, batch in enumerate(batches(5)):
        gradients = (NOT_FINITE, torch.zeros(D))
        for table, optimizer, bad in zip(tables, optimizers, gradients, strict=True):
            optimizer.step(partial(loss_with, table, batch, FROZEN, bad))
        assert_same_bits(tables[0].weight, tables[1].weight, f"poisoned or not, step {step}")
        assert_same_bits(tables[0].weight[FROZEN], start[FROZEN], "frozen rows")
    assert not same_bits(tables[0].weight[1], start[1])
    assert tables[0].weight[list(ROWS)].isfinite().all()


@pytest.mark.parametrize(
    ("case", "sparse"), crossed([c for c in MANY if not c.one_history], GRADIENTS)
)
def test_trainable_rows_that_blow_up_do_not_reach_the_frozen_ones(case: Case, sparse: bool) -> None:
    table, start = partial_table(sparse=sparse), starting_table()
    optimizer = rowwise(case.make(table.parameters()), table)
    for batch in batches(4):
        loss_with(table, batch, ROWS, NOT_FINITE)
        optimizer.step()
        assert_same_bits(table.weight[FROZEN], start[FROZEN], "frozen rows")
    if case.name != "Rprop":  # which looks at signs alone
        assert not table.weight[list(ROWS)].isfinite().all()


FUSED = [case_of(f"{name}-fused") for name in ("Adam", "AdamW", "Adagrad", "SGD-momentum=0.9")]
SCALED = [*FEW, *FUSED, *(case for case in DEFAULTS if not case.one_history)]


@pytest.mark.parametrize(("case", "sparse"), crossed(SCALED, GRADIENTS))
def test_a_step_that_the_gradient_scaler_skips(case: Case, sparse: bool) -> None:
    model, optimizer, oracle = prepared(case, partial_table(sparse=sparse))
    # torch's fused SGD keeps a buffer that was never written when its very first step is skipped.
    overflows = (2, 3, 6) if case.name == "SGD" and case.fused else (0, 3, 4)
    # Powers of two, so that scaling and unscaling are exact.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step, batch in enumerate(batches()):
        before = model.table.weight.detach().clone()
        if step == 4:
            model.table.set_trainable_rows((1, 4, 7))
            oracle.set_rows((1, 4, 7))
        optimizer.zero_grad()
        loss = batch.loss(model)
        overflow = step in overflows
        scaler.scale(loss * float("inf") if overflow else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            assert_same_bits(model.table.weight, before, f"after the skipped step {step}")
        else:
            oracle.step(batch.ids, batch.loss_of)
        assert_same_model(model, oracle, f"after step {step}")
        assert any(p is model.table.weight for p in optimizer.param_groups[0]["params"])
    assert scaler.get_scale() == 2.0**5  # three overflows were seen
