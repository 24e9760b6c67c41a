"""Optimizers built unlike torch's: served exactly, or refused by name before the first step."""

from typing import Any

import optimi
import pytest
import pytorch_optimizer
import torch
from oracle import rows_that_differ, same_bits
from plain_optimizers import CountsInItsGroup, Plain
from steps import closure_of, take_steps
from torch import Tensor, nn
from torch.optim import Optimizer

from partial_embedding import InputError
from partial_embedding.torch import (
    PartialEmbedding,
    average_gradients,
    detach_rowwise,
    masked_gradient_only,
    rowwise,
)
from partial_embedding.torch.saved_state import cohorts_of

NUM_ROWS, WIDTH = 12, 5


class CountsInAnAttribute(Plain):
    total = 0

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.total = 0

    def count(self, group: dict[str, Any]) -> None:
        self.total += 1


class CountsInATensor(Plain):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.total = torch.zeros(())

    def count(self, group: dict[str, Any]) -> None:
        self.total.add_(1)


class CountsInItsGroupFromTheStart(CountsInItsGroup):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group["count"] = 10


class DecaysBeforeTheClosure(Plain):
    @torch.no_grad()
    def before_closure(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.mul_(0.9)


class KeepsRatesOfGroups(Plain):
    """As AdaBound does: a list with an item for each group that there was in the beginning."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.first_rates = [group["lr"] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, first in zip(self.param_groups, self.first_rates, strict=False):
            for param in group["params"]:
                param.sub_(group["lr"] ** 2 / first * self.direction(param, group))


class KeepsMomentsInItsGroup(Plain):
    def count(self, group: dict[str, Any]) -> None:
        group.setdefault("moments", [torch.zeros_like(param) for param in group["params"]])


class Wraps(Plain):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        params = list(params)
        super().__init__(params, lr)
        self.inner = torch.optim.SGD(params)


class WasNotInitialised(Optimizer):
    def __init__(self, params: Any) -> None:
        self.param_groups = [{"params": list(params), "lr": 0.1}]
        self.state: Any = {}
        self.defaults = {"lr": 0.1}

    def step(self, closure: Any = None) -> Any:
        pass


class DrawsNoise(Plain):
    def direction(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        return super().direction(param, group) + torch.randn_like(param)


class DrawsNoiseAndCounts(CountsInItsGroup, DrawsNoise):
    pass


class KeepsSlowWeights(Plain):
    """State that depends on the values of the rows when they first step."""

    def direction(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        slow = self.state[param].setdefault("slow", param.clone())
        slow.lerp_(param, 0.5)
        return super().direction(param, group) + param - slow


class RemembersFromTheThirdStepOn(Plain):
    def direction(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[param]
        state["step"] = state.get("step", 0) + 1
        grad = super().direction(param, group)
        if state["step"] >= 3:
            grad = grad + state.setdefault("late", torch.zeros_like(param)).add_(grad)
        return grad


class CautiousByTheMean(Plain):
    """Rows look at each other through a mean that differs from 1 only where signs disagree."""

    def direction(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        grad = super().direction(param, group)
        moment = self.state[param].setdefault("moment", torch.zeros_like(param))
        moment.lerp_(grad, 0.5)
        agrees = (moment * grad > 0).float()
        return moment * agrees / agrees.mean().clamp(min=0.1)


def table_of(rows: object = (2, 7), dtype: torch.dtype = torch.float32) -> PartialEmbedding:
    torch.manual_seed(0)
    return PartialEmbedding(NUM_ROWS, WIDTH, trainable_rows=rows, dtype=dtype)


def step(table: nn.Embedding, optimizer: Optimizer, seed: int) -> None:
    ids = torch.randint(NUM_ROWS, (9,), generator=torch.Generator().manual_seed(seed))
    ids[:3] = torch.tensor([2, 7, 4])
    take_steps(optimizer, lambda: (table(ids) * torch.linspace(-1, 2, WIDTH)).pow(2).sum())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (CountsInAnAttribute, "outside its state and groups"),
        (CountsInATensor, "outside its state and groups"),
        (DecaysBeforeTheClosure, "before its closure"),
        (KeepsMomentsInItsGroup, "'moments', is no number"),
        (pytorch_optimizer.AdaBound, "of each parameter group outside the group"),
        (Wraps, "wraps another optimizer"),
        (WasNotInitialised, "runs no hooks"),
    ],
)
def test_what_cannot_be_kept_exact_is_refused(kind: type[Optimizer], reason: str) -> None:
    table = table_of()
    with pytest.raises(InputError, match=f"Received {kind.__name__}: .*{reason}"):
        rowwise(kind(table.parameters()), table)


def test_rows_have_no_rate_of_their_own_where_a_group_of_theirs_would_not_be_stepped() -> None:
    table = table_of("none")
    optimizer = rowwise(KeepsRatesOfGroups(table.parameters()), table)
    with pytest.raises(InputError, match="KeepsRatesOfGroups, which keeps something of each"):
        table.unfreeze_rows([4], lr_scale=0.5)
    table.unfreeze_rows([4])  # the remedy
    before = table.weight.detach().clone()
    step(table, optimizer, 0)
    assert rows_that_differ(before, table.weight) == [4]


class TakesNothing(Plain):
    def step(self) -> None:  # type: ignore[override]
        super().step()


class TakesAScale(Plain):
    def step(self, scale: float = 1.0) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["lr"] = 0.1 * scale
        super().step()


class DropsItsClosure(Plain):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()


@pytest.mark.parametrize("rows", [(2, 7), "all"])
@pytest.mark.parametrize(
    ("kind", "given"), [(TakesNothing, []), (TakesAScale, [0.5]), (DropsItsClosure, [lambda: 0.0])]
)
def test_a_step_that_calls_no_closure_is_served(kind: Any, given: list[Any], rows: Any) -> None:
    table = table_of(rows)
    plain = nn.Embedding.from_pretrained(table.weight.detach().clone(), freeze=False)
    before, trained = table.weight.detach().clone(), table.trainable_rows
    for one in (table, plain):
        optimizer = kind(one.parameters())
        for seed in range(3):
            ids = trained[
                torch.randperm(len(trained), generator=torch.Generator().manual_seed(seed))
            ]
            optimizer.zero_grad()
            one(ids).pow(2).sum().backward()
            optimizer.step(*given)
    assert torch.equal(table.weight[trained], plain.weight[trained])
    assert rows_that_differ(before, table.weight) == trained.tolist()


@pytest.mark.parametrize("call", [rowwise, detach_rowwise, masked_gradient_only, average_gradients])
def test_what_is_no_optimizer_is_refused(call: Any) -> None:
    with pytest.raises(InputError, match=r"Received a PartialEmbedding\. Pass the optimizer first"):
        call(table_of())


@pytest.mark.parametrize("kind", [KeepsSlowWeights, RemembersFromTheThirdStepOn, CautiousByTheMean])
def test_a_first_state_that_depends_on_rows_is_refused_lazily_alone(kind: type[Plain]) -> None:
    table = table_of()
    with pytest.raises(InputError, match=f"Received {kind.__name__}"):
        rowwise(kind(table.parameters()), table, lazy=True)
    rowwise(kind(table.parameters()), table)


class EstimatesItsRate(Plain):
    """A rate in the group that every row has a part in, too small to see in a few steps."""

    def direction(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        grad = super().direction(param, group)
        group["rate"] = group.get("rate", 1.0) + 1e-9 * float(grad.norm())
        return grad * group["rate"]


@pytest.mark.parametrize(
    "kind", [EstimatesItsRate, pytorch_optimizer.DAdaptSGD, pytorch_optimizer.Prodigy]
)
def test_a_rate_that_is_estimated_from_all_rows_is_refused_lazily(kind: Any) -> None:
    table = table_of()
    with pytest.raises(InputError, match="lazy=True"):
        rowwise(kind(table.parameters()), table, lazy=True)


@pytest.mark.parametrize("kind", [torch.optim.Muon, torch.optim.Adafactor])
def test_a_warm_up_from_zero_hides_nothing(kind: type[Optimizer]) -> None:
    table = table_of()
    optimizer = kind(table.parameters())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: s / 10)
    with pytest.raises(InputError, match="lazy=True"):
        rowwise(optimizer, table, lazy=True)


@pytest.mark.parametrize(
    "kind",
    [
        CountsInItsGroup,
        CountsInItsGroupFromTheStart,
        RemembersFromTheThirdStepOn,
        KeepsSlowWeights,
        CautiousByTheMean,
    ],
)
def test_a_late_cohort_begins_afresh(kind: type[Plain]) -> None:
    table = table_of()
    optimizer = rowwise(kind(table.parameters()), table)
    for seed in range(5):
        step(table, optimizer, seed)
    table.unfreeze_rows([4])
    frozen = [row for row in range(NUM_ROWS) if row not in (2, 4, 7)]
    before = table.weight.detach().clone()
    alone = nn.Embedding.from_pretrained(before[[4]], freeze=False)
    fresh = kind(alone.parameters())
    for seed in range(5, 10):
        step(table, optimizer, seed)
        assert table.weight.grad is not None
        alone.weight.grad = table.weight.grad.to_dense()[[4]]
        fresh.step()
        assert same_bits(table.weight[4], alone.weight[0])
    assert same_bits(table.weight[frozen], before[frozen])


def test_the_optimizer_and_the_random_numbers_are_left_alone() -> None:
    table = table_of()
    counting = CountsInATensor(table.parameters())
    state = torch.get_rng_state()
    with pytest.raises(InputError):
        rowwise(counting, table)
    for kind in (DrawsNoise, DrawsNoiseAndCounts):
        detach_rowwise(rowwise(kind(table.parameters()), table))
    assert counting.total == 0
    assert same_bits(torch.get_rng_state(), state)


@pytest.mark.parametrize("lazy", [False, True])
def test_state_that_an_option_adds_later_is_kept(lazy: bool) -> None:
    table = table_of()
    optimizer = rowwise(torch.optim.SGD(table.parameters(), lr=0.1), table, lazy=lazy)
    step(table, optimizer, 0)
    optimizer.param_groups[0]["momentum"] = 0.9
    before = table.weight.detach().clone()
    step(table, optimizer, 1)
    (cohort,) = cohorts_of(optimizer.state_dict()["state"][0]["rowwise"]).values()
    assert cohort.state.keys() == {"momentum_buffer"}
    optimizer.param_groups[0]["momentum"] = 0
    step(table, optimizer, 1)
    assert not same_bits(table.weight, before)


@pytest.mark.parametrize("kind", [optimi.AdamW, optimi.Lion, torch.optim.AdamW])
def test_an_optimizer_that_has_stepped_goes_on(kind: Any) -> None:
    plain, ours = table_of("all"), table_of("all")
    ours.load_state_dict(plain.state_dict())
    plain.sparse = ours.sparse = False
    stock, prepared = (kind(t.parameters(), lr=0.1) for t in (plain, ours))
    for seed in range(8):
        if seed == 4:
            rowwise(prepared, ours)
        step(plain, stock, seed)
        step(ours, prepared, seed)
        assert same_bits(plain.weight, ours.weight), seed


def test_cohorts_that_go_on_from_a_plain_optimizer_count_each_by_itself() -> None:
    table = table_of("all")
    optimizer = torch.optim.AdamW(table.parameters())
    step(table, optimizer, 0)
    table.set_trainable_rows([2, 4])
    table.unfreeze_rows([7])
    step(table, optimizer, 1)
    cohorts = cohorts_of(optimizer.state_dict()["state"][0]["rowwise"]).values()
    assert [int(cohort.state["step"]) for cohort in cohorts] == [2, 2]


def test_state_that_only_half_precision_needs_follows_its_rows() -> None:
    table = table_of((2, 4, 7), torch.bfloat16)
    optimizer = rowwise(optimi.AdamW(table.parameters(), lr=0.1, kahan_sum=True), table)
    step(table, optimizer, 0)
    table.freeze_rows([4])
    before = table.weight.detach().clone()
    step(table, optimizer, 1)
    assert rows_that_differ(before, table.weight) == [2, 7]


def test_names_of_parameters_stay_beside_them() -> None:
    class Naming(Plain):
        def count(self, group: dict[str, Any]) -> None:
            assert len(group["param_names"]) == len(group["params"])
            for name, param in zip(group["param_names"], group["params"], strict=True):
                assert (param.dim() == 2) == (name != "1.bias")

    model = nn.Sequential(table_of(), nn.Linear(WIDTH, 1))
    optimizer = rowwise(Naming(model.named_parameters()), model)
    names = list(optimizer.param_groups[0]["param_names"])
    for rows in ([4], [5]):
        model[0].unfreeze_rows(rows)  # type: ignore[operator]
        model(torch.arange(NUM_ROWS)).sum().backward()
        optimizer.step()
    assert optimizer.param_groups[0]["param_names"] == names


def test_an_optimizer_with_a_list_of_parameters_of_its_own_is_refused_and_moves_nothing() -> None:
    class Own(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1})
            self.every = {"flat": [p for group in self.param_groups for p in group["params"]]}

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for parameter in self.every["flat"]:
                parameter.mul_(0.5)

    table = PartialEmbedding(9, 4, trainable_rows=[1])
    before = table.weight.detach().clone()
    with pytest.raises(InputError, match="keeps parameters outside its groups"):
        rowwise(Own(table.parameters()))
    assert same_bits(table.weight, before)


def test_rows_that_change_within_a_closure_of_lbfgs_are_refused() -> None:
    table = PartialEmbedding(9, 4, trainable_rows=[1, 2])
    optimizer = torch.optim.LBFGS(table.parameters())

    def closure(rows: list[int]) -> Any:
        def loss() -> Tensor:
            table.set_trainable_rows(rows)
            return table(torch.arange(9)).square().sum()  # type: ignore[no-any-return]

        return closure_of(optimizer, loss)

    optimizer.step(closure([1, 2]))
    for rows in ([1, 3], [1, 2, 3]):
        table.set_trainable_rows([1, 2])
        with pytest.raises(InputError, match=r"in a closure of LBFGS\. Call set_trainable_rows"):
            optimizer.step(closure(rows))
    table.set_trainable_rows([1, 3])  # the remedy
    optimizer.step(closure([1, 3]))
