"""Promises 1 to 3, bit for bit, for every optimizer of torch with every set of its options."""

from collections.abc import Callable

import pytest
import torch
from cases import CASES, GRADIENTS, LEFT_OUT, Case, LeftOut, always_run, can_run, crossed
from models import (
    NEVER_TRAINED,
    Model,
    V,
    assert_same_model,
    batches,
    follow,
    oracle_of,
    partial_table,
    prepared,
    starting_table,
    train,
)
from oracle import assert_same_bits, same_bits

# Which rows are trainable from which step on.
SCENARIOS: dict[str, dict[int, tuple[int, ...]]] = {
    "frozen_from_the_start": {0: (1, 4, 6, 9)},
    "trained_then_frozen": {0: (1, 3, 4, 6, 8, 9), 3: (4, 6, 9)},
    "unfrozen_late": {0: (1, 4, 6, 9), 3: (1, 2, 4, 6, 7, 8, 9)},
    # Part of the first cohort leaves, one row of it comes back with a new one, the rest leaves.
    "frozen_and_unfrozen_again": {0: (1, 4, 6, 9), 2: (1, 6), 4: (1, 4, 6, 7), 7: (4, 7)},
}
# In these steps the optimizer is given a closure; elsewhere gradients are made before the step.
STEPS_WITH_CLOSURE = (2, 6)
CONFIGURATIONS = crossed(CASES, GRADIENTS, SCENARIOS, each_option_with_all=True)


@pytest.mark.parametrize(("case", "sparse", "stages"), CONFIGURATIONS)
def test_frozen_rows_keep_their_bits_and_the_others_train_as_if_alone(
    case: Case,
    sparse: bool,
    stages: dict[int, tuple[int, ...]],
    record_property: Callable[[str, object], None],
) -> None:
    model, optimizer, oracle = prepared(case, partial_table(stages[0], sparse=sparse))
    weight = model.table.weight
    start = weight.detach().clone()
    moved: set[int] = set()

    for step, batch in enumerate(batches()):
        if step in stages:
            model.table.set_trainable_rows(stages[step])
            oracle.set_rows(stages[step])
        trainable = sorted(oracle.trainable)
        assert model.table.trainable_rows.tolist() == trainable
        frozen = [row for row in range(V) if row not in oracle.trainable]
        before = weight.detach().clone()

        loss = train(case, model, optimizer, batch, with_closure=step in STEPS_WITH_CLOSURE)
        expected_loss = oracle.step(batch.ids, batch.loss_of)

        assert model.table.weight is weight
        assert any(weight is p for group in optimizer.param_groups for p in group["params"])
        assert_same_bits(weight[frozen], before[frozen], f"frozen rows after step {step}")
        assert_same_model(model, oracle, f"after step {step}")
        assert_same_bits(loss.detach().view(1), expected_loss.view(1), f"the loss at step {step}")
        moved |= {row for row in trainable if not same_bits(weight[row], before[row])}

    # Nothing above can have passed because nothing happened.
    assert moved == set().union(*stages.values())
    assert_same_bits(weight[list(NEVER_TRAINED)], start[list(NEVER_TRAINED)], "rows never trained")
    for kind in ("optimizer with options, gradient, scenario", "optimizer with options"):
        value = case.id if kind == "optimizer with options" else f"{case.id} {sparse} {stages}"
        record_property(f"configuration: {kind}", value)


def test_the_matrix_holds_every_optimizer_of_torch() -> None:
    known = {
        value
        for value in vars(torch.optim).values()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    } - {torch.optim.Optimizer}
    assert {case.optimizer for case in CASES} == known


def test_the_matrix_does_not_shrink_unseen() -> None:
    print(f"{len(CASES)} optimizers with options, {len(CONFIGURATIONS)} configurations,")
    print(f"{len(LEFT_OUT)} left out because torch itself can't run them on a CPU")
    assert len({case.id for case in CASES}) == len(CASES) >= 250
    assert len(CONFIGURATIONS) >= 2000
    always = always_run(CONFIGURATIONS)
    assert {one.values[0].id for one in always} == {case.id for case in CASES}
    assert len(always) >= 4 * len({Case(case.optimizer, case.options).id for case in CASES})
    assert {one.reason for one in LEFT_OUT} == {
        "capturable needs an accelerator",
        "a differentiable step can't write to a leaf, and a table is one",
    }


@pytest.mark.parametrize("one", LEFT_OUT, ids=lambda one: one.id)
def test_what_is_left_out_cannot_run(one: LeftOut) -> None:
    assert not can_run(one.case, one.extra)


def test_what_is_left_in_can_run() -> None:
    assert [case.id for case in CASES if not can_run(case, {})] == []


def masked_row_moves(case: Case, trains_before: bool) -> bool:
    """Whether a plain optimizer moves a row while its gradient is zero."""
    weight = torch.nn.Parameter(torch.ones(4, 2))
    optimizer = case.make([weight])
    before = weight.detach().clone()
    for step in range(6):
        gradient = torch.full_like(weight, 0.5)
        if step == 3:
            before = weight.detach().clone()
        if step >= 3 or not trains_before:
            gradient[0] = 0

        def closure(gradient: torch.Tensor = gradient) -> torch.Tensor:
            weight.grad = gradient.to_sparse(1) if case.sparse_only else gradient
            return gradient.sum()

        optimizer.step(closure)
    return not same_bits(weight[0], before[0])


def test_a_gradient_of_zero_moves_rows_as_often_as_the_readme_says() -> None:
    cases = [case for case in CASES if not case.implementation]
    assert sum(masked_row_moves(case, False) for case in cases) > len(cases) / 2
    assert sum(masked_row_moves(case, True) for case in cases) > len(cases) * 2 / 3


@pytest.mark.parametrize("case", crossed(CASES))
def test_the_oracle_with_all_rows_equals_a_plain_table(case: Case) -> None:
    """The oracle is worth something only if it agrees with torch where torch has an answer."""
    start = starting_table().nan_to_num(0.5, 0.5, 0.5)
    table = torch.nn.Embedding.from_pretrained(start.clone(), freeze=False, sparse=case.sparse_only)
    model = Model(table, bias=not case.matrices_only, sparse=case.sparse_only)
    optimizer = case.make(model.parameters())
    oracle = oracle_of(case, model, range(V))
    follow(case, model, optimizer, oracle, batches())
    assert not (table.weight == start).all()
