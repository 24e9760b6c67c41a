"""Promises 1 to 3 where they are easily broken: odd shapes, odd values, and everyday training."""

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from io import BytesIO
from itertools import pairwise
from typing import Any

import optimi
import pytest
import pytorch_optimizer
import schedulefree
import torch
from cases import CASES, DEFAULTS, ELEMENT_WISE, Case, case_of
from models import (
    Batch,
    D,
    Model,
    V,
    assert_same_model,
    batches,
    follow,
    oracle_of,
    starting_table,
    train,
)
from oracle import Oracle, assert_same_bits, same_bits
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers.optimization import Adafactor as TransformersAdafactor

from partial_embedding import InputError
from partial_embedding.torch import (
    PartialEmbedding,
    PartialEmbeddingBag,
    detach_rowwise,
    rowwise,
)

ROWS = (1, 4, 6, 9)
FROZEN = [row for row in range(V) if row not in ROWS]
MANY = [case for case in CASES if case.implementation in ("", "fused")]
FEW = [
    case_of(name)
    for name in (
        "AdamW-weight_decay=0.1-amsgrad",
        "AdamW-weight_decay=0.1-fused",
        "SGD-momentum=0.9-weight_decay=0.1",
        "Adagrad-initial_accumulator_value=0.1-weight_decay=0.1",
    )
]
SPARSE_AND_DENSE = pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])


def by_id(case: Case) -> str:
    return case.id


def partial_table(rows: Any = ROWS, start: Tensor | None = None, **options: Any):
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
    optimizer = rowwise(case.make(model.parameters()), model)
    return model, optimizer, oracle_of(case, model, table.trainable_rows.tolist(), **options)


def small_batches(rows: int, dim: int, count: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    return [
        Batch(torch.randint(rows, (2, 2 * rows + 3), generator=generator), seed=step)
        for step in range(count)
    ]


# Shapes

# V, D, and the rows that train at first, later, and last.
SHAPES: dict[str, tuple[int, int, dict[int, tuple[int, ...]]]] = {
    "one_row": (12, 5, {0: (4,)}),
    "one_row_then_another": (12, 5, {0: (4,), 2: (7,), 4: (4, 7)}),
    "as_many_rows_as_columns": (12, 5, {0: (1, 4, 6, 7, 9)}),
    "as_many_rows_as_columns_then_fewer": (12, 5, {0: (1, 4, 6, 7, 9), 3: (1, 6, 7)}),
    "one_column": (12, 1, {0: (1, 4, 6), 3: (4, 6, 8)}),
    "one_row_one_column": (12, 1, {0: (4,), 3: (4, 5)}),
    "square_table_all_rows": (5, 5, {0: (0, 1, 2, 3, 4), 3: (0, 1, 2, 4)}),
    "table_of_one_row": (1, 5, {0: (0,)}),
    "table_of_one_row_frozen_and_back": (1, 5, {0: (0,), 2: (), 4: (0,)}),
    "one_row_left_of_many": (12, 5, {0: (1, 4, 6), 3: (6,)}),
}


@pytest.mark.parametrize("case", [case for case in MANY if not case.sparse_only], ids=by_id)
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes_train_as_if_alone(case: Case, shape: str) -> None:
    rows, dim, stages = SHAPES[shape]
    start = torch.randn(rows, dim, generator=torch.Generator().manual_seed(4))
    model, optimizer, oracle = prepared(case, partial_table(stages[0], start))
    follow(case, model, optimizer, oracle, small_batches(rows, dim), stages)
    trained = sorted(set().union(*stages.values()))
    frozen = [row for row in range(rows) if row not in trained]
    assert_same_bits(model.table.weight[frozen], start[frozen], "rows never trained")
    moved = [row for row in trained if not same_bits(model.table.weight[row], start[row])]
    # A full step of LBFGS can throw the small model so far that later gradients vanish.
    assert moved == trained or (case.one_history and moved)


@SPARSE_AND_DENSE
@pytest.mark.parametrize("case", MANY, ids=by_id)
def test_no_trainable_rows_at_all(case: Case, sparse: bool) -> None:
    if case.sparse_only and not sparse:
        pytest.skip("SparseAdam itself raises on dense gradients")
    model, optimizer, oracle = prepared(case, partial_table("none", sparse=sparse))
    follow(case, model, optimizer, oracle, batches(4))
    assert_same_bits(model.table.weight, starting_table(), "a table that is all frozen")
    # And it can begin to train later.
    follow(case, model, optimizer, oracle, batches(4), {0: (2, 3)})
    # LBFGS has by then thrown the rest of the model so far, on some processors, that nothing moves.
    assert case.one_history or not same_bits(model.table.weight[2], starting_table()[2])


def test_a_table_made_without_memory_keeps_its_rows() -> None:
    case = case_of("AdamW")
    with torch.device("meta"):
        table = PartialEmbedding(V, D, trainable_rows=ROWS)
    table = table.to_empty(device="cpu")
    with torch.no_grad():
        table.weight.copy_(starting_table())
    assert table.trainable_rows.tolist() == list(ROWS)
    model, optimizer, oracle = prepared(case, table)
    follow(case, model, optimizer, oracle, batches(4), {2: (1, 7)})


@pytest.mark.parametrize("case", DEFAULTS, ids=by_id)
def test_nothing_but_a_frozen_table_in_the_optimizer(case: Case) -> None:
    table = partial_table("none")
    optimizer = rowwise(case.make(table.parameters()), table)

    def closure() -> Tensor:
        optimizer.zero_grad()
        out = table(torch.tensor([1, 2, 2]))
        out.sum().backward()
        return out.sum()

    for _ in range(3):
        optimizer.step(closure)
    assert_same_bits(table.weight, starting_table(), "a table that is all frozen")


# Options of the layer


@SPARSE_AND_DENSE
@pytest.mark.parametrize("padding", [4, -1])
@pytest.mark.parametrize("case", FEW, ids=by_id)
def test_the_padding_row_never_trains(case: Case, padding: int, sparse: bool) -> None:
    start = starting_table().nan_to_num(0.5, 0.5, 0.5)
    table = partial_table("all", start, padding_idx=padding, sparse=sparse)
    row = padding % V
    assert row not in table.trainable_rows.tolist()
    assert len(table.trainable_rows) == V - 1
    model, optimizer, oracle = prepared(case, table)
    follow(case, model, optimizer, oracle, batches())
    assert_same_bits(table.weight[row], start[row], "the padding row")
    table.unfreeze_rows("all")
    assert row not in table.trainable_rows.tolist()


@pytest.mark.parametrize("case", FEW, ids=by_id)
def test_gradients_scaled_by_frequency(case: Case) -> None:
    table = partial_table(sparse=False, scale_grad_by_freq=True)
    model, optimizer, oracle = prepared(case, table, scale_grad_by_freq=True)
    plain = oracle_of(case, model, ROWS)
    follow(case, model, optimizer, oracle, batches())
    for batch in batches():
        plain.step(batch.ids, batch.loss_of)
    assert not same_bits(plain.table, oracle.table)  # the option matters here


def test_scaling_by_frequency_with_sparse_gradients_is_refused() -> None:
    with pytest.raises(InputError, match="sparse=False"):
        PartialEmbedding(V, D, scale_grad_by_freq=True)


@SPARSE_AND_DENSE
@pytest.mark.parametrize("case", FEW, ids=by_id)
def test_max_norm_leaves_frozen_rows_alone(case: Case, sparse: bool) -> None:
    table = partial_table(max_norm=0.5, sparse=sparse)
    start = starting_table()
    assert (start[FROZEN][:-2].norm(dim=1) > 0.5).all()  # there is something to renormalise
    model = model_of(case, table)
    optimizer = rowwise(case.make(model.parameters()), model)
    for batch in batches():
        if batch.ids is None:
            continue
        with torch.no_grad():
            table(batch.ids)
        assert_same_bits(table.weight[FROZEN], start[FROZEN], "frozen rows after a lookup")
        table.eval()
        table(batch.ids)
        table.train()
        assert_same_bits(table.weight[FROZEN], start[FROZEN], "frozen rows after a lookup in eval")
        looked_up = [row for row in ROWS if row in batch.ids]
        assert (table.weight[looked_up].norm(dim=1) <= 0.5 + 1e-6).all()
        train(case, model, optimizer, batch)
        assert_same_bits(table.weight[FROZEN], start[FROZEN], "frozen rows after a step")
    for row in ROWS:
        assert not same_bits(table.weight[row], start[row])


# Several of everything


@pytest.mark.parametrize("case", [c for c in DEFAULTS + FEW if not c.one_history], ids=by_id)
def test_several_tables_in_one_optimizer(case: Case) -> None:
    rows = {"some": ROWS, "others": (0, 2), "none": (), "all": range(V)}
    start = starting_table().nan_to_num(0.5, 0.5, 0.5)
    models = nn.ModuleDict(
        {name: model_of(case, partial_table(ids, start)) for name, ids in rows.items()}
    )
    optimizer = rowwise(case.make(models.parameters()), models)
    oracles = {name: oracle_of(case, models[name], ids) for name, ids in rows.items()}
    later = {"some": {3: (1, 4)}, "others": {2: (0, 2, 5), 6: (5,)}, "none": {4: (3,)}}
    steps = {name: batches(8, quiet=i + 3) for i, name in enumerate(rows)}

    for step in range(8):
        for name, stages in later.items():
            if step in stages:
                models[name].table.set_trainable_rows(stages[step])
                oracles[name].set_rows(stages[step])
        optimizer.zero_grad()
        sum(steps[name][step].loss(models[name]) for name in rows).backward()
        optimizer.step()
        for name, oracle in oracles.items():
            batch = steps[name][step]
            oracle.step(batch.ids, batch.loss_of)
            assert_same_model(models[name], oracle, f"{name} after step {step}")


@SPARSE_AND_DENSE
@pytest.mark.parametrize("table_last", [False, True], ids=["table_first", "table_last"])
@pytest.mark.parametrize(
    "case",
    [*FEW, case_of("SGD-momentum=0.9-fused"), case_of("Muon"), case_of("Adafactor")],
    ids=by_id,
)
def test_parameter_groups_keep_their_own_options(
    case: Case, table_last: bool, sparse: bool
) -> None:
    own, other = {"lr": 0.05, "weight_decay": 0.3}, {"lr": 0.002, "weight_decay": 0.0}
    model = model_of(case, partial_table(sparse=sparse))
    groups = [
        {"params": [model.table.weight], **own},
        {"params": [*model.companions.parameters()], **other},
    ]
    optimizer = rowwise(case.make(groups[::-1] if table_last else groups), model)
    of_table = Case(case.optimizer, case.options | own, case.implementation)
    of_others = Case(case.optimizer, case.options | other, case.implementation)
    oracle = oracle_of(of_table, model, ROWS, make_others=of_others.make)
    follow(case, model, optimizer, oracle, batches(), {3: (1, 4, 7), 6: (1, 2, 7)})
    assert [group["lr"] for group in optimizer.param_groups] in ([0.05, 0.002], [0.002, 0.05])


# The step


def quiet_at(*steps: int) -> list[Batch]:
    return [Batch(None if i in steps else b.ids, b.seed) for i, b in enumerate(batches(quiet=-1))]


@SPARSE_AND_DENSE
@pytest.mark.parametrize("case", MANY, ids=by_id)
def test_steps_without_a_gradient_are_skipped_as_stock_optimizers_do(
    case: Case, sparse: bool
) -> None:
    if case.sparse_only and not sparse:
        pytest.skip("SparseAdam itself raises on dense gradients")
    model, optimizer, oracle = prepared(case, partial_table(sparse=sparse))
    # A cohort joins when there is no gradient: its life begins with the first one it gets.
    follow(case, model, optimizer, oracle, quiet_at(0, 3, 4), {3: (1, 4, 6, 9, 2), 6: (1, 2, 4)})


@pytest.mark.parametrize("case", DEFAULTS, ids=by_id)
def test_the_closure_runs_with_the_table_in_place(case: Case) -> None:
    model, optimizer, _ = prepared(case, partial_table())
    batch, seen = batches()[0], []

    def closure() -> Tensor:
        optimizer.zero_grad()
        held = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append(any(p is model.table.weight for p in held) and len(held))
        loss = batch.loss(model)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert isinstance(loss, Tensor)
    assert set(seen) == {len(list(model.parameters()))}
    assert len(seen) == 1 or case.one_history
    assert optimizer.step(closure=closure) is not None


@pytest.mark.parametrize("case", [c for c in DEFAULTS + FEW if not c.one_history], ids=by_id)
def test_a_closure_that_raises_leaves_everything_in_place(case: Case) -> None:
    model, optimizer, oracle = prepared(case, partial_table())
    follow(case, model, optimizer, oracle, batches(2))
    before = model.table.weight.detach().clone()

    def broken() -> Tensor:
        optimizer.zero_grad()
        batches()[0].loss(model).backward()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(broken)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert any(p is model.table.weight for p in held)
    assert len(held) == len(list(model.parameters()))
    assert_same_bits(model.table.weight, before, "after a closure that raised")
    follow(case, model, optimizer, oracle, batches(4))


def test_naming_the_same_rows_again_changes_nothing() -> None:
    case = case_of("AdamW")
    model, optimizer, oracle = prepared(case, partial_table())
    for batch in batches():
        model.table.set_trainable_rows(ROWS[::-1])
        model.table.unfreeze_rows([ROWS[0]])
        model.table.freeze_rows([0])
        train(case, model, optimizer, batch)
        oracle.step(batch.ids, batch.loss_of)
        assert_same_model(model, oracle, "when the same rows are named again")


@pytest.mark.parametrize("case", [*DEFAULTS, *FEW], ids=by_id)
def test_a_row_that_leaves_and_returns_between_two_steps_begins_anew(case: Case) -> None:
    model, optimizer, oracle = prepared(case, partial_table())
    follow(case, model, optimizer, oracle, batches(3))
    model.table.freeze_rows([4, 9])
    model.table.unfreeze_rows([4, 9])
    oracle.set_rows({1, 6})
    oracle.set_rows(ROWS)
    follow(case, model, optimizer, oracle, batches(4))


@pytest.mark.parametrize("case", FEW, ids=by_id)
def test_gradients_that_are_zeroed_and_not_dropped_still_make_a_step(case: Case) -> None:
    model, optimizer, oracle = prepared(case, partial_table(sparse=False))
    others = list(model.companions.parameters())
    for number, batch in enumerate(batches(quiet=3)):
        optimizer.zero_grad(set_to_none=False)
        batch.loss(model).backward()
        for parameter in others:
            parameter.grad = None
        optimizer.step()
        if number == 3:
            oracle.step_with_gradient(torch.zeros(V, D))
        else:
            reference = nn.Embedding.from_pretrained(oracle.table.clone(), freeze=False)
            batch.loss_of(model.companions, reference(batch.ids)).backward()
            oracle.step_with_gradient(reference.weight.grad)
        assert_same_bits(model.table.weight, oracle.table, f"after step {number}")


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


@pytest.mark.parametrize("case", MANY, ids=by_id)
def test_double_precision_is_exact(case: Case) -> None:
    if case.sparse_only:
        pytest.skip("the model's other tables would need float64 too; element types are no concern")
    model = model_of(case, partial_table(start=starting_table(dtype=torch.float64))).double()
    optimizer = rowwise(case.make(model.parameters()), model)
    oracle = oracle_of(case, model, ROWS)
    ids = batches()[0].ids

    def loss_of(companions: nn.ModuleList, looked_up: Tensor) -> Tensor:
        return companions[1](torch.tanh(companions[0](looked_up))).square().sum()

    for step in range(5):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model.companions, model.table(ids))
            loss.backward()
            return loss

        optimizer.step(closure)
        oracle.step(ids, loss_of)
        assert_same_model(model, oracle, f"after step {step}")


MODES = [("sum", True), ("mean", True), ("sum", False), ("mean", False), ("max", False)]


@pytest.mark.parametrize(("mode", "sparse"), MODES)
@pytest.mark.parametrize("case", FEW, ids=by_id)
def test_bags_train_their_rows(case: Case, mode: str, sparse: bool) -> None:
    start = starting_table()
    bag = PartialEmbeddingBag(V, D, mode=mode, sparse=sparse, trainable_rows=ROWS)
    with torch.no_grad():
        bag.weight.copy_(start)
    optimizer = rowwise(case.make(bag.parameters()), bag)
    oracle = Oracle(case.make, start, ROWS)
    for batch in batches():
        if batch.ids is None:
            continue
        plain = nn.EmbeddingBag.from_pretrained(
            bag.weight.detach().clone(), freeze=False, mode=mode
        )
        for table in (bag, plain):
            table.zero_grad()
            table(batch.ids.flatten(), torch.tensor([0, 2, 3])).square().sum().backward()
        torch.testing.assert_close(
            bag.weight.grad.to_dense()[list(ROWS)], plain.weight.grad[list(ROWS)]
        )
        optimizer.step()
        oracle.step_with_gradient(plain.weight.grad)
        assert_same_bits(bag.weight[FROZEN], start[FROZEN], "frozen rows of a bag")
        torch.testing.assert_close(bag.weight, oracle.table, rtol=1e-5, atol=1e-6, equal_nan=True)
    for row in ROWS:
        assert not same_bits(bag.weight[row], start[row])


def test_a_bag_of_maxima_with_sparse_gradients_is_refused() -> None:
    with pytest.raises(InputError, match="sparse=False"):
        PartialEmbeddingBag(V, D, mode="max")


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


@SPARSE_AND_DENSE
@pytest.mark.parametrize("case", MANY, ids=by_id)
def test_what_is_not_finite_stays_with_the_frozen_rows(case: Case, sparse: bool) -> None:
    if case.sparse_only and not sparse:
        pytest.skip("SparseAdam itself raises on dense gradients")
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


@SPARSE_AND_DENSE
def test_the_gradient_itself_holds_nothing_of_frozen_rows(sparse: bool) -> None:
    gradients = []
    for bad in (NOT_FINITE, torch.zeros(D)):
        table = partial_table(sparse=sparse)
        loss_with(table, batches()[0], FROZEN, bad)
        gradients.append(table.weight.grad)
    assert gradients[0].is_sparse is sparse
    if sparse:  # dropped, not zeroed
        assert set(gradients[0]._indices()[0].tolist()) == set(ROWS)
    poisoned, plain = (gradient.to_dense() for gradient in gradients)
    assert_same_bits(poisoned, plain, "the gradient")
    assert (poisoned[FROZEN] == 0).all()
    assert (poisoned[list(ROWS)] != 0).all()


@SPARSE_AND_DENSE
@pytest.mark.parametrize("case", FEW, ids=by_id)
def test_the_gradient_scaler_sees_no_overflow_of_frozen_rows(case: Case, sparse: bool) -> None:
    table = partial_table(sparse=sparse)
    optimizer = rowwise(case.make(table.parameters()), table)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for batch in batches(3):
        before = table.weight.detach().clone()
        scaler.scale(torch.ones(()))  # as any loss would
        loss_with(table, batch, FROZEN, NOT_FINITE)
        scaler.step(optimizer)
        scaler.update()
        assert not (table.weight[list(ROWS)] == before[list(ROWS)]).all(dim=1).any()
        assert_same_bits(table.weight[FROZEN], before[FROZEN], "frozen rows")
    assert scaler.get_scale() == 2.0**8


@SPARSE_AND_DENSE
@pytest.mark.parametrize("case", [c for c in MANY if not c.one_history], ids=by_id)
def test_trainable_rows_that_blow_up_do_not_reach_the_frozen_ones(case: Case, sparse: bool) -> None:
    if case.sparse_only and not sparse:
        pytest.skip("SparseAdam itself raises on dense gradients")
    table, start = partial_table(sparse=sparse), starting_table()
    optimizer = rowwise(case.make(table.parameters()), table)
    for batch in batches(4):
        loss_with(table, batch, ROWS, NOT_FINITE)
        optimizer.step()
        assert_same_bits(table.weight[FROZEN], start[FROZEN], "frozen rows")
    if case.name != "Rprop":  # which looks at signs alone
        assert not table.weight[list(ROWS)].isfinite().all()


@SPARSE_AND_DENSE
@pytest.mark.parametrize(
    "case",
    [
        *FEW,
        *(case_of(f"{name}-fused") for name in ("Adam", "AdamW", "Adagrad", "SGD-momentum=0.9")),
        *(case for case in DEFAULTS if not case.one_history),
    ],
    ids=by_id,
)
def test_a_step_that_the_gradient_scaler_skips(case: Case, sparse: bool) -> None:
    if case.sparse_only and not sparse:
        pytest.skip("SparseAdam itself raises on dense gradients")
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


# Schedules

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    # It cycles momentum or betas too.
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=8),
}


@SPARSE_AND_DENSE
@pytest.mark.parametrize("after", [False, True], ids=["before_rowwise", "after_rowwise"])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("case", FEW, ids=by_id)
def test_schedulers_reach_the_rows(case: Case, name: str, after: bool, sparse: bool) -> None:
    if name == "OneCycleLR" and case.name == "Adagrad":
        pytest.skip("OneCycleLR cycles momentum or betas, and Adagrad has neither")
    model = model_of(case, partial_table(sparse=sparse))
    optimizer = case.make(model.parameters())
    if after:
        rowwise(optimizer, model)
    with warnings.catch_warnings():
        # A scheduler looks for its own mark on `step` and warns when the order seems wrong.
        warnings.simplefilter("error")
        scheduler = SCHEDULERS[name](optimizer)
        if not after:
            rowwise(optimizer, model)
        oracle = oracle_of(case, model, ROWS)
        bystander = nn.Parameter(torch.zeros(1))
        twin = case.make([bystander])
        twin_scheduler = SCHEDULERS[name](twin)
        rates = set()
        for step, batch in enumerate(batches()):
            if step == 3:
                model.table.unfreeze_rows([2, 7])
                oracle.set_rows((*ROWS, 2, 7))
            oracle.group = {k: v for k, v in twin.param_groups[0].items() if k != "params"}
            rates.add(float(oracle.group["lr"]))
            train(case, model, optimizer, batch)
            oracle.step(batch.ids, batch.loss_of)
            assert_same_model(model, oracle, f"after step {step}")
            twin.step()
            scheduler.step()
            twin_scheduler.step()
        assert len(rates) == len(batches())
        assert scheduler.get_last_lr() == twin_scheduler.get_last_lr()


# State: its size, and stopping and going on


def tensors_in(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for part in value.values() for t in tensors_in(part)]
    if isinstance(value, list | tuple):
        return [t for part in value for t in tensors_in(part)]
    return []


@SPARSE_AND_DENSE
@pytest.mark.parametrize("case", MANY, ids=by_id)
def test_state_is_as_large_as_the_trainable_rows(case: Case, sparse: bool) -> None:
    if case.sparse_only and not sparse:
        pytest.skip("SparseAdam itself raises on dense gradients")
    table = PartialEmbedding(5000, D, trainable_rows=ROWS, sparse=sparse)
    optimizer = rowwise(case.make(table.parameters()), table)
    largest = 100 * len(ROWS) * D if case.one_history else 2 * len(ROWS) * D

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = table(torch.tensor([1, 4, 4, 77, 6, 9])).square().sum()
        loss.backward()
        return loss

    for step in range(3):
        if step == 2:
            table.unfreeze_rows([77])
        optimizer.step(closure)
        for where in (dict(optimizer.state), optimizer.state_dict()):
            assert all(t.numel() <= largest for t in tensors_in(where))
    held = tensors_in(optimizer.state_dict())
    assert sum(t.numel() for t in held) <= max(largest, 8 * (len(ROWS) + 1) * (D + 3))


def saved_and_loaded(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    buffer = BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@SPARSE_AND_DENSE
@pytest.mark.parametrize("case", [c for c in CASES if c.implementation != "forloop"], ids=by_id)
def test_a_run_that_is_resumed_goes_on_exactly(
    case: Case, sparse: bool, record_property: Callable[[str, object], None]
) -> None:
    if case.sparse_only and not sparse:
        pytest.skip("SparseAdam itself raises on dense gradients")
    model, optimizer, oracle = prepared(case, partial_table(sparse=sparse))
    # Two cohorts, one of which has lost a row.
    follow(case, model, optimizer, oracle, batches(5), {2: (1, 4, 6, 9, 2, 7), 4: (1, 4, 9, 2, 7)})
    state = saved_and_loaded(optimizer)

    fresh = model_of(case, partial_table(model.table.trainable_rows, sparse=sparse))
    fresh.load_state_dict(model.state_dict())
    resumed = rowwise(case.make(fresh.parameters()), fresh)
    resumed.load_state_dict(state)
    for step, batch in enumerate(batches(7, quiet=1)):
        if step in (3, 5):
            for one in (model.table.set_trainable_rows, fresh.table.set_trainable_rows):
                one((1, 2, 9) if step == 3 else (1, 2, 4, 9))
            oracle.set_rows((1, 2, 9) if step == 3 else (1, 2, 4, 9))
        train(case, model, optimizer, batch)
        train(case, fresh, resumed, batch)
        oracle.step(batch.ids, batch.loss_of)
        assert_same_model(model, oracle, f"{step} after saving")
        for name, parameter in model.named_parameters():
            assert_same_bits(fresh.get_parameter(name), parameter, f"{name}, {step} after resuming")
    record_property("configuration: resumed exactly", case.id)


@pytest.mark.parametrize("case", FEW, ids=by_id)
@pytest.mark.parametrize(("rows", "dim"), [(400, 5), (2**24 + 10, 1)], ids=["V=400", "V=2**24+10"])
def test_row_ids_survive_a_resume_in_half_precision(case: Case, rows: int, dim: int) -> None:
    """Row ids cast to the dtype of the weight would come back as other rows."""
    trainable = [3, 255, 257, 301, rows - 1, rows - 2, rows - 7]

    def make() -> tuple[PartialEmbedding, torch.optim.Optimizer]:
        table = partial_table(trainable, torch.full((rows, dim), 2**-7, dtype=torch.bfloat16))
        return table, rowwise(case.make(table.parameters()), table)

    def step(table: PartialEmbedding, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        up = torch.randn(8, dim, generator=torch.Generator().manual_seed(seed)).bfloat16()
        table(torch.tensor([*trainable, 0])).backward(up)
        optimizer.step()

    table, optimizer = make()
    for seed in range(3):
        step(table, optimizer, seed)
    other, resumed = make()
    other.load_state_dict(table.state_dict())
    resumed.load_state_dict(saved_and_loaded(optimizer))
    for seed in range(3, 6):
        step(table, optimizer, seed)
        step(other, resumed, seed)
        assert_same_bits(other.weight, table.weight, "after a resume")
    assert resumed.state_dict().keys() == optimizer.state_dict().keys()
    changed = (table.weight != 2**-7).any(dim=1).nonzero().flatten().tolist()
    assert changed == sorted(trainable)


@pytest.mark.parametrize("case", DEFAULTS, ids=by_id)
def test_state_of_other_rows_is_refused(case: Case) -> None:
    model, optimizer, _ = prepared(case, partial_table())
    train(case, model, optimizer, batches()[0])
    state = optimizer.state_dict()
    for rows in ((1, 4, 6), (1, 4, 6, 8), (1, 4, 6, 8, 9), ()):
        fresh, other, _ = prepared(case, partial_table(rows))
        with pytest.raises(InputError):
            other.load_state_dict(state)
        assert fresh.table.trainable_rows.tolist() == list(rows)


@pytest.mark.parametrize("case", [c for c in DEFAULTS + FEW if not c.one_history], ids=by_id)
def test_saved_state_loads_into_a_stock_optimizer(case: Case) -> None:
    model, optimizer, oracle = prepared(case, partial_table())
    follow(case, model, optimizer, oracle, batches(3))
    table = nn.Embedding(V, D, sparse=case.sparse_only)
    plain = model_of(case, table)
    plain.load_state_dict(model.state_dict())
    stock = case.make(plain.parameters())
    stock.load_state_dict(saved_and_loaded(optimizer))
    with torch.no_grad():
        table.weight.nan_to_num_(0.5, 0.5, 0.5)
    companions = [p for name, p in plain.named_parameters() if name != "table.weight"]
    before = [p.detach().clone() for p in (*companions, table.weight)]

    # The companions go on where they were, with their state.
    for batch in quiet_at(0, 1)[:2]:
        train(case, plain, stock, batch)
        train(case, model, optimizer, batch)
    for name, parameter in plain.companions.named_parameters():
        expected = model.companions.get_parameter(name)
        assert_same_bits(parameter, expected, f"companion {name} in the stock optimizer")
    for batch in batches(2):
        train(case, plain, stock, batch)
    for old, now in zip(before, (*companions, table.weight), strict=True):
        assert not same_bits(old, now)
        assert now.isfinite().all()


@pytest.mark.parametrize("case", [c for c in DEFAULTS + FEW if not c.one_history], ids=by_id)
def test_detaching_leaves_a_stock_optimizer(case: Case) -> None:
    start = starting_table().nan_to_num(0.5, 0.5, 0.5)
    model, optimizer, oracle = prepared(case, partial_table(ROWS, start, sparse=case.sparse_only))
    follow(case, model, optimizer, oracle, batches(3))
    detach_rowwise(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in model.parameters()]

    # From here on it is what a stock optimizer with the companions' state is.
    model.table.set_trainable_rows("all")
    plain = model_of(case, nn.Embedding(V, D, sparse=case.sparse_only))
    plain.load_state_dict(model.state_dict())
    stock = case.make(plain.parameters())
    order = [name for name, _ in model.named_parameters()]
    for name, parameter in plain.named_parameters():
        if name != "table.weight":
            stock.state[parameter] = {
                key: value.clone() if isinstance(value, Tensor) else value
                for key, value in optimizer.state[model.get_parameter(name)].items()
            }
    for batch in batches(4):
        train(case, model, optimizer, batch)
        train(case, plain, stock, batch)
        for name in order:
            assert_same_bits(model.get_parameter(name), plain.get_parameter(name), name)
    # And it can be attached again.
    rowwise(optimizer, model)
    train(case, model, optimizer, batches()[0])


# Optimizers that are not torch's own


FROM_ELSEWHERE = {
    "transformers.Adafactor": Case(TransformersAdafactor),
    "transformers.Adafactor-beta1": Case(TransformersAdafactor, {"beta1": 0.9}),
    "optimi.AdamW": Case(optimi.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "optimi.Lion": Case(optimi.Lion, {"lr": 0.01, "weight_decay": 0.1}),
    "pytorch_optimizer.Lion": Case(pytorch_optimizer.Lion, {"lr": 0.01, "weight_decay": 0.1}),
}
STAGES = {
    "frozen_from_the_start": {},
    "trained_then_frozen": {3: (4, 9)},
    "unfrozen_late": {3: (1, 2, 4, 6, 7, 9)},
    "frozen_and_unfrozen_again": {2: (1, 6), 4: (1, 4, 6, 7), 7: (4, 7)},
}


@SPARSE_AND_DENSE
@pytest.mark.parametrize("scenario", STAGES)
@pytest.mark.parametrize("name", FROM_ELSEWHERE)
def test_optimizers_from_elsewhere_are_served_exactly(
    name: str, scenario: str, sparse: bool
) -> None:
    case = FROM_ELSEWHERE[name]
    model, optimizer, oracle = prepared(case, partial_table(sparse=sparse))
    follow(case, model, optimizer, oracle, batches(quiet=-1), STAGES[scenario])
    assert not same_bits(model.table.weight[4], starting_table()[4])
    assert_same_bits(model.table.weight[[0, 5, 11]], starting_table()[[0, 5, 11]], "frozen rows")


@pytest.mark.parametrize("name", FROM_ELSEWHERE)
def test_a_step_without_a_gradient_counts_where_the_stock_optimizer_counts_it(name: str) -> None:
    """optimi counts steps in the parameter group, whether or not there was a gradient."""
    case = FROM_ELSEWHERE[name]
    model, optimizer, oracle = prepared(case, partial_table())
    follow(case, model, optimizer, oracle, batches(quiet=2), {4: (1, 4, 7)})


def test_schedule_free_optimizers_are_refused_by_name() -> None:
    table = partial_table()
    optimizer = schedulefree.AdamWScheduleFree(table.parameters())
    with pytest.raises(InputError, match="AdamWScheduleFree"):
        rowwise(optimizer, table)
    assert not optimizer._optimizer_step_pre_hooks
    assert_same_bits(table.weight, starting_table(), "after a refusal")


class BlockwiseAdam(torch.optim.Optimizer):
    """Keeps one scale for 16 elements, as 8-bit optimizers do: neither per row nor per table."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, blocks = self.state[p], -(-p.numel() // 16)
                if not state:
                    state["absmax"] = torch.zeros(blocks)
                padded = torch.zeros(blocks * 16)
                padded[: p.numel()] = p.grad.flatten()
                state["absmax"] = torch.maximum(
                    0.9 * state["absmax"], padded.view(blocks, 16).abs().amax(1)
                )
                scale = state["absmax"].clamp(min=1e-8).repeat_interleave(16)[: p.numel()]
                p.sub_(group["lr"] * p.grad / scale.view_as(p))


def test_state_in_blocks_of_elements_is_refused_by_name() -> None:
    table = partial_table()
    with pytest.raises(InputError, match="BlockwiseAdam"):
        rowwise(BlockwiseAdam(table.parameters()), table)


# Without `rowwise`


def test_a_stock_optimizer_over_frozen_rows_warns_once() -> None:
    table = partial_table(sparse=False)
    optimizer = torch.optim.AdamW(table.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            table(torch.tensor([1, 2])).sum().backward()
            optimizer.step()
    (message,) = [str(w.message) for w in caught]
    assert "rowwise" in message


def test_a_table_that_is_dropped_during_a_step_disturbs_no_other_optimizer() -> None:
    tables = []
    watch = register_optimizer_step_pre_hook(lambda *_: tables.clear())
    try:
        tables.append(partial_table())
        weight = nn.Parameter(torch.ones(3))
        weight.grad = torch.ones(3)
        torch.optim.SGD([weight], lr=0.5).step()
    finally:
        watch.remove()
    assert not tables
    assert weight.tolist() == [0.5, 0.5, 0.5]


def test_counts_of_cases_do_not_shrink_unseen() -> None:
    assert len(MANY) >= 110
    assert len(ELEMENT_WISE) >= 240
    assert len(DEFAULTS) == 15
