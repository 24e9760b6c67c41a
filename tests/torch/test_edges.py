"""Promises 1 to 3 where they are easily broken: odd shapes, options, and everyday training."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    DEFAULTS,
    ELEMENT_WISE,
    FEW,
    GRADIENTS,
    MANY,
    SPARSE_AND_DENSE,
    Case,
    by_id,
    case_of,
    crossed,
)
from models import (
    FROZEN,
    ROWS,
    Batch,
    D,
    V,
    assert_same_model,
    batches,
    follow,
    model_of,
    oracle_of,
    partial_table,
    prepared,
    quiet_at,
    starting_table,
    train,
)
from oracle import assert_same_bits, same_bits
from steps import closure_of, train_save_and_load
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from partial_embedding import InputError
from partial_embedding.torch import PartialEmbedding, rowwise


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


@pytest.mark.parametrize(
    ("case", "shape"), crossed([case for case in MANY if not case.sparse_only], SHAPES)
)
def test_odd_shapes_train_as_if_alone(
    case: Case, shape: tuple[int, int, dict[int, tuple[int, ...]]]
) -> None:
    rows, dim, stages = shape
    start = torch.randn(rows, dim, generator=torch.Generator().manual_seed(4))
    model, optimizer, oracle = prepared(case, partial_table(stages[0], start))
    follow(case, model, optimizer, oracle, small_batches(rows, dim), stages)
    trained = sorted(set().union(*stages.values()))
    frozen = [row for row in range(rows) if row not in trained]
    assert_same_bits(model.table.weight[frozen], start[frozen], "rows never trained")
    moved = [row for row in trained if not same_bits(model.table.weight[row], start[row])]
    # A full step of LBFGS can throw the small model so far that later gradients vanish.
    assert moved == trained or (case.one_history and moved)


@pytest.mark.parametrize(("case", "sparse"), crossed(MANY, GRADIENTS))
def test_no_trainable_rows_at_all(case: Case, sparse: bool) -> None:
    model, optimizer, oracle = prepared(case, partial_table("none", sparse=sparse))
    follow(case, model, optimizer, oracle, batches(4))
    assert_same_bits(model.table.weight, starting_table(), "a table that is all frozen")
    # And it can begin to train later.
    follow(case, model, optimizer, oracle, batches(4), {0: (2, 3)})
    # LBFGS has by then thrown the rest of the model so far, on some processors, that nothing moves.
    assert case.one_history or not same_bits(model.table.weight[2], starting_table()[2])


@pytest.mark.parametrize("case", DEFAULTS, ids=by_id)
def test_nothing_but_a_frozen_table_in_the_optimizer(case: Case) -> None:
    table = partial_table("none")
    optimizer = rowwise(case.make(table.parameters()), table)
    closure = closure_of(optimizer, lambda: table(torch.tensor([1, 2, 2])).sum())
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


@pytest.mark.parametrize(("case", "sparse"), crossed(MANY, GRADIENTS))
def test_steps_without_a_gradient_are_skipped_as_stock_optimizers_do(
    case: Case, sparse: bool
) -> None:
    model, optimizer, oracle = prepared(case, partial_table(sparse=sparse))
    # A cohort joins when there is no gradient: its life begins with the first one it gets.
    follow(case, model, optimizer, oracle, quiet_at(0, 3, 4), {3: (1, 4, 6, 9, 2), 6: (1, 2, 4)})


@pytest.mark.parametrize("case", DEFAULTS, ids=by_id)
def test_the_closure_runs_with_the_table_in_place(case: Case) -> None:
    model, optimizer, _ = prepared(case, partial_table())
    batch, seen = batches()[0], []

    def loss() -> Tensor:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append(any(p is model.table.weight for p in held) and len(held))
        return batch.loss(model)

    closure = closure_of(optimizer, loss)
    assert isinstance(optimizer.step(closure), Tensor)
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


# Without `rowwise`


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


def test_a_default_device_is_for_what_users_make(tmp_path: Path) -> None:
    """What is put on this one is lost, as what is put on a GPU meets what lies on the CPU."""
    table = PartialEmbedding.from_pretrained(torch.randn(V, D), trainable_rows=[3, 4])
    with torch.device("meta"):
        again = train_save_and_load(table, tmp_path)
    assert_same_bits(again.weight, table.weight, "the table")
