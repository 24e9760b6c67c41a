"""Rows with a learning rate of their own, bit for bit, for every optimizer of torch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, DEFAULTS, GRADIENTS, Case, by_id, case_of, crossed
from models import (
    Model,
    assert_same_model,
    batches,
    model_of,
    oracle_of,
    partial_table,
    starting_table,
    train,
)
from oracle import assert_same_bits, differences, rows_that_differ
from plain_optimizers import CountsInItsGroup, Plain
from torch import nn

from partial_embedding import InputError
from partial_embedding.schedule import RateScale
from partial_embedding.torch import PartialEmbedding, detach_rowwise, rowwise
from partial_embedding.torch.saved_state import cohorts_of

# A cohort that warms up, a plain one that joins it, and one that is faster than both. Some rows of
# the first leave in the middle of its warm-up, and come back with the third.
STAGES: dict[int, tuple[tuple[int, ...], RateScale | None]] = {
    0: ((1, 4, 6, 9), RateScale(lr_scale=0.5, warmup_steps=4)),
    2: ((1, 2, 4, 9), None),
    4: ((1, 2, 4, 6, 7, 8, 9), RateScale(lr_scale=3.0)),
}
WITH_RATES = [case for case in CASES if not case.one_history]


def factor_of(rate_scale: RateScale | None) -> Callable[[int], float] | None:
    """What a rate_scale promises, written a second time."""
    if rate_scale is None:
        return None
    return lambda steps: (
        rate_scale.lr_scale * min(1.0, (steps + 1) / rate_scale.warmup_steps)
        if rate_scale.warmup_steps
        else rate_scale.lr_scale
    )


def options_of(rate_scale: RateScale | None) -> dict[str, Any]:
    """What a user writes for a rate."""
    if rate_scale is None:
        return {}
    return {"lr_scale": rate_scale.lr_scale, "warmup_steps": rate_scale.warmup_steps}


def build(case: Case, sparse: bool = True, **options: Any) -> tuple[Model, torch.optim.Optimizer]:
    model = model_of(case, partial_table("none", sparse=sparse))
    return model, rowwise(case.make(model.parameters()), model, **options)


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.7**step)


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)


def follow_rates(
    case: Case,
    model: Model,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    stages: dict[int, tuple[tuple[int, ...], RateScale | None]] = STAGES,
) -> None:
    """Train along the stages beside cohorts that are parameters of their own."""
    oracle = oracle_of(case, model, ())
    for step, batch in enumerate(batches()):
        if step in stages:
            rows, rate_scale = stages[step]
            model.table.set_trainable_rows(rows, **options_of(rate_scale))
            oracle.set_rows(rows, factor_of(rate_scale))
        (group,) = optimizer.param_groups
        oracle.group = {k: v for k, v in group.items() if k in ("lr", "betas", "momentum")}
        train(case, model, optimizer, batch, with_closure=step in (1, 6))
        oracle.step(batch.ids, batch.loss_of)
        assert_same_model(model, oracle, f"after step {step}")
        assert len(optimizer.param_groups) == 1
        scheduler.step()


@pytest.mark.parametrize(("case", "sparse"), crossed(WITH_RATES, GRADIENTS))
def test_rows_with_a_rate_train_as_a_parameter_at_that_rate(case: Case, sparse: bool) -> None:
    model, optimizer = build(case, sparse)
    start = model.table.weight.detach().clone()
    follow_rates(case, model, optimizer, halving(optimizer))
    assert rows_that_differ(start, model.table.weight) == [1, 2, 4, 6, 7, 8, 9]


# A scheduler looks for its own mark on `step` and warns when the order seems wrong.
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["SGD-momentum=0.9", "Adam", "AdamW", "AdamW-fused"])
def test_every_learning_rate_scheduler_sees_the_users_groups_alone(name: str) -> None:
    case = Case(torch.optim.SGD, {"momentum": 0.9}) if "SGD" in name else case_of(name)
    model, optimizer = build(case)
    follow_rates(case, model, optimizer, one_cycle(optimizer))


@pytest.mark.parametrize("case", [c for c in DEFAULTS if not c.one_history], ids=by_id)
def test_rows_of_a_table_alone_in_its_group_may_have_a_rate_of_their_own(case: Case) -> None:
    table = PartialEmbedding.from_pretrained(starting_table(), freeze=False, trainable_rows="none")
    other = nn.Parameter(torch.ones(3, 3))
    optimizer = rowwise(
        case.make([{"params": [other]}, {"params": [table.weight], "lr": 0.02}]), table
    )
    table.set_trainable_rows([1, 4], lr_scale=0.5)
    alone = nn.Parameter(starting_table()[[1, 4]])
    reference = case.make([{"params": [alone], "lr": 0.02 * 0.5}])
    for step in range(4):
        upstream = torch.randn(3, 5, generator=torch.Generator().manual_seed(step))
        for param in (other, table.weight, alone):
            param.grad = None
        table(torch.tensor([4, 1, 4])).backward(upstream)
        compact = torch.zeros(2, 5).index_add_(0, torch.tensor([1, 0, 1]), upstream)
        alone.grad = compact.to_sparse(1) if case.sparse_only else compact
        optimizer.step()
        reference.step()
        assert_same_bits(table.weight[[1, 4]], alone.detach(), f"step {step}")


def test_steps_are_counted_only_where_rows_warm_up_and_only_when_made() -> None:
    model, optimizer = build(case_of("AdamW"))
    model.table.set_trainable_rows([1], warmup_steps=5)
    model.table.unfreeze_rows([2])
    made = batches()

    def steps() -> list[int]:
        states = optimizer.state_dict()["state"].values()
        (saved,) = (cohorts_of(state["rowwise"]) for state in states if "rowwise" in state)
        return [-1 if c.rate_scale.is_plain else c.steps for c in saved.values()]

    train(case_of("AdamW"), model, optimizer, made[0])
    assert steps() == [1, -1]
    train(case_of("AdamW"), model, optimizer, made[5])  # does not look up the table
    assert steps() == [1, -1]
    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step(lambda: (_ for _ in ()).throw(RuntimeError("no loss")))
    assert steps() == [1, -1]


def test_a_count_in_the_group_goes_on_without_a_gradient_and_the_warm_up_does_not() -> None:
    table = PartialEmbedding.from_pretrained(starting_table(), trainable_rows="none")
    optimizer = rowwise(CountsInItsGroup(table.parameters()), table)
    table.set_trainable_rows([1], lr_scale=0.5, warmup_steps=4)
    expected = starting_table()[1]
    for step, factor in enumerate((0.125, None, 0.25)):
        optimizer.zero_grad()
        if factor is not None:
            table(torch.tensor([1])).sum().backward()
            expected -= 0.1 * factor / (1 + step)
        optimizer.step()
    torch.testing.assert_close(table.weight[1].detach(), expected)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_not_counted(fused: bool) -> None:
    table = PartialEmbedding(6, 4, trainable_rows="none")
    optimizer = rowwise(torch.optim.AdamW(table.parameters(), lr=0.1, fused=fused), table)
    table.set_trainable_rows([1, 2], warmup_steps=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    counted = []
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(table(torch.tensor([1, 2])).sum() * factor).backward()
        if not fused:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        states = optimizer.state_dict()["state"].values()
        (saved,) = (cohorts_of(state["rowwise"]) for state in states if "rowwise" in state)
        counted.append(next(iter(saved.values())).steps)
    assert counted == [1, 1, 2]


@pytest.mark.parametrize("lazy", [False, True], ids=["all_rows", "lazy"])
@pytest.mark.parametrize("cut", range(1, 8))
@pytest.mark.parametrize("name", ["AdamW", "SGD-momentum=0.9-weight_decay=0.1", "Rprop"])
def test_a_restored_warm_up_goes_on_where_it_stood(name: str, cut: int, lazy: bool) -> None:
    case = (
        Case(torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1})
        if name.startswith("SGD")
        else case_of(name)
    )

    def go(model: Model, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            if step in STAGES:
                model.table.set_trainable_rows(STAGES[step][0], **options_of(STAGES[step][1]))
            train(case, model, optimizer, batches()[step])

    whole, optimizer = build(case, lazy=lazy)
    go(whole, optimizer, range(cut))
    saved = copy.deepcopy([whole.state_dict(), optimizer.state_dict()])
    rows = whole.table.trainable_rows
    go(whole, optimizer, range(cut, 8))

    again, other = build(case, lazy=lazy)
    again.table.set_trainable_rows(rows)  # the rate_scales come with the optimizer's state
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    go(again, other, range(cut, 8))
    assert_same_bits(again.table.weight, whole.table.weight, "the table")
    assert differences(other.state_dict(), optimizer.state_dict()) == []


@pytest.mark.parametrize("name", ["AdamW", "RMSprop", "Rprop"])
def test_lazy_rows_have_a_rate_of_their_own_too(name: str) -> None:
    """When every batch holds all rows, lazy steps are those of all rows."""
    case = case_of(name)
    made = [batch for i, batch in enumerate(batches()) if i not in (3, 5)]
    tables = []
    for lazy in (False, True):
        model, optimizer = build(case, lazy=lazy)
        for step, batch in enumerate(made):
            if step in STAGES:
                model.table.set_trainable_rows(STAGES[step][0], **options_of(STAGES[step][1]))
            train(case, model, optimizer, batch)
        tables.append(model.table.weight.detach())
    assert_same_bits(*tables, "the table")


def test_a_lazy_row_that_is_touched_late_begins_as_its_cohort_did() -> None:
    table = PartialEmbedding.from_pretrained(starting_table(), trainable_rows="none")
    optimizer = rowwise(torch.optim.Rprop(table.parameters(), lr=0.1), table, lazy=True)
    table.set_trainable_rows([1, 2], lr_scale=0.5, warmup_steps=2)
    for touched in (1, 2):
        optimizer.zero_grad()
        table(torch.tensor([touched])).sum().backward()
        optimizer.step()
    # The length of Rprop's first step is the learning rate at which the cohort began.
    moved = starting_table() - table.weight.detach()
    torch.testing.assert_close(moved[[1, 2]], torch.full((2, 5), 0.1 * 0.5 / 2))


# What is refused


class NoRate(Plain):
    """Has no learning rate in its groups."""

    rate = "speed"


@pytest.mark.parametrize("make", [torch.optim.LBFGS, NoRate])
def test_an_optimizer_without_a_rate_in_its_groups_refuses_those_of_rows(
    make: type[torch.optim.Optimizer],
) -> None:
    name = make.__name__
    scaled = PartialEmbedding(6, 4, trainable_rows="none")
    scaled.set_trainable_rows([1], lr_scale=0.5)
    with pytest.raises(InputError, match=rf"lr_scale=0\.5.*{name}"):
        rowwise(make(scaled.parameters()), scaled)

    table = PartialEmbedding(6, 4, trainable_rows="none")
    optimizer = rowwise(make(table.parameters()), table)
    for change in (table.set_trainable_rows, table.unfreeze_rows):
        with pytest.raises(InputError, match=rf"warmup_steps=3.*{name}"):
            change([2], warmup_steps=3)
    assert not len(table.trainable_rows)
    table.set_trainable_rows([1])
    # Another optimizer may follow, and a copy has none yet.
    copy.deepcopy(table).unfreeze_rows([2], lr_scale=0.5)
    detach_rowwise(optimizer)
    table.unfreeze_rows([2], lr_scale=0.5)


def test_a_rate_that_is_none_is_refused() -> None:
    table = PartialEmbedding(6, 4)
    with pytest.raises(InputError, match=r"Received: -0\.5"):
        table.set_trainable_rows([1], lr_scale=-0.5)
    assert len(table.trainable_rows) == 6


def test_a_rate_of_rows_that_stay_is_kept() -> None:
    table = PartialEmbedding(6, 4, trainable_rows=[1])
    table.set_trainable_rows([1, 2], lr_scale=0.5)
    table.set_trainable_rows([1, 2, 3], lr_scale=4.0)
    table.freeze_rows([1])
    assert [rate_scale.lr_scale for rate_scale in table.row_set.rate_scales.values()] == [0.5, 4.0]
    table.weight.data = torch.zeros(3, 4)  # a smaller vocabulary: row 3 is gone
    assert [rate_scale.lr_scale for rate_scale in table.row_set.rate_scales.values()] == [0.5]
