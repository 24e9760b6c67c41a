"""A table in the model is enough: any optimizer is prepared when it first steps frozen rows."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_alike, assert_same_bits, rows_that_differ, unchanged
from steps import closure_of, take_steps
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from partial_embedding import InputError
from partial_embedding.torch import (
    PartialEmbedding,
    PartialLinear,
    detach_rowwise,
    masked_gradient_only,
    replace_embedding,
    rowwise,
)
from partial_embedding.torch.optimizer import prepared

V, D = 12, 4
ROWS = [1, 4]
Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "AdamW_fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


def made(make: Make, rows: Any = ROWS) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(PartialEmbedding(V, D, trainable_rows=rows), PartialLinear(D, V))
    model[1].set_trainable_rows(rows)  # type: ignore[operator]
    return model, make(model.parameters())


def step(model: nn.Module, optimizer: torch.optim.Optimizer, closure: bool = True) -> None:
    def loss() -> Tensor:
        value: Tensor = model(torch.arange(V)).square().mean()
        return value

    if closure:
        optimizer.step(closure_of(optimizer, loss))
    else:
        take_steps(optimizer, loss)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("closure", [False, True], ids=["plain", "closure"])
def test_a_step_without_a_call_is_the_step_after_one(name: str, closure: bool) -> None:
    closure = closure or name == "LBFGS"
    models = []
    for calls in (True, False):
        model, optimizer = made(OPTIMIZERS[name])
        start = copy.deepcopy(model.state_dict())
        if calls:
            rowwise(optimizer)
        for i in range(6):
            if i == 3:
                for module in model:
                    module.unfreeze_rows([7])
            step(model, optimizer, closure)
        assert prepared(optimizer) is not None
        for key, value in model.state_dict().items():
            assert rows_that_differ(value, start[key]) == [1, 4, 7], key
        models.append(model)
    assert_alike(*models)


def test_other_rows_than_those_saved_are_refused_before_anything_moves() -> None:
    model, optimizer = made(OPTIMIZERS["AdamW"])
    step(model, optimizer, closure=False)
    other, later = made(OPTIMIZERS["AdamW"], [2, 3])
    later.load_state_dict(optimizer.state_dict())
    rule = "Call set_trainable_rows with the former first"
    with unchanged(other), pytest.raises(InputError, match=rule):
        step(other, later, closure=False)


def test_an_optimizer_with_nothing_frozen_stays_as_it_is() -> None:
    model, optimizer = made(OPTIMIZERS["AdamW"], "all")
    step(model, optimizer, closure=False)
    assert prepared(optimizer) is None
    before = model[0].weight.detach().clone()
    model[0].set_trainable_rows([3])  # type: ignore[operator]
    step(model, optimizer, closure=False)
    assert prepared(optimizer) is not None
    assert rows_that_differ(model[0].weight, before) == [3]


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_table_that_joins_later_is_served(name: str) -> None:
    model, optimizer = made(OPTIMIZERS[name])
    step(model, optimizer, closure=False)
    other = PartialEmbedding(V, D, trainable_rows=[2])
    before = other.weight.detach().clone()
    optimizer.add_param_group({"params": other.parameters()})
    for _ in range(2):
        other(torch.arange(V)).square().sum().backward()
        step(nn.Sequential(model), optimizer, closure=False)
        other(torch.arange(V)).square().sum().backward()
        optimizer.step()
    assert rows_that_differ(other.weight, before) == [2]


class Unserved(torch.optim.SGD):
    """Keeps something outside its state, and would mix up rows."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen = 0

    def step(self, closure: Any = None) -> Any:
        self.seen += 1
        return super().step(closure)


def test_what_cannot_be_served_is_refused_at_its_first_step_with_ways_out_that_work() -> None:
    model, optimizer = made(lambda p: Unserved(p, lr=0.1, weight_decay=0.1))
    before = model[0].weight.detach().clone()
    for _ in range(2):
        rule = r"AdamW.*masked_gradient_only"
        with unchanged(model), pytest.raises(InputError, match=rule):
            step(model, optimizer, closure=False)
    masked_gradient_only(optimizer)
    step(model, optimizer, closure=False)
    assert len(rows_that_differ(model[0].weight, before)) == V  # decay, as was said


def test_a_masked_gradient_alone_is_no_way_for_an_optimizer_that_is_prepared() -> None:
    model, optimizer = made(OPTIMIZERS["AdamW"])
    step(model, optimizer, closure=False)
    with pytest.raises(InputError, match="detach_rowwise"):
        masked_gradient_only(optimizer)
    detach_rowwise(optimizer)
    assert masked_gradient_only(optimizer) is optimizer


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("where", ["hook", "maths"])
def test_an_exception_in_a_step_leaves_the_tables_in_their_place(
    set_to_none: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    model, optimizer = made(OPTIMIZERS["AdamW"])
    twin, other = made(OPTIMIZERS["AdamW"])
    for one, its in ((model, optimizer), (twin, other)):
        step(one, its, closure=False)
    model(torch.arange(V)).sum().backward()
    if where == "hook":
        hook = optimizer.register_step_pre_hook(fail)
    else:
        monkeypatch.setattr(sys.modules["torch.optim.adam"], "adam", fail)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == list(map(id, model.parameters()))
    optimizer.zero_grad(set_to_none=set_to_none)
    if where == "hook":
        hook.remove()
    monkeypatch.undo()
    optimizer.state_dict()
    step(model, optimizer, closure=False)
    step(twin, other, closure=False)
    assert_same_bits(model[0].weight, twin[0].weight, "the table")


def test_an_option_that_a_scheduler_turns_on_later_is_served() -> None:
    table = PartialEmbedding(V, D, trainable_rows=ROWS)
    small = nn.Embedding.from_pretrained(table.weight.detach()[ROWS].clone(), freeze=False)
    optimizers = []
    for module, ids in ((table, torch.tensor(ROWS)), (small, torch.arange(2))):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        optimizers.append(optimizer)
        if module is table:
            rowwise(optimizer)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
        for _ in range(5):
            optimizer.zero_grad()
            module(ids).square().sum().backward()
            optimizer.step()
            scheduler.step()
    assert_same_bits(table.weight[ROWS], small.weight, "the rows")


def test_tables_that_an_engine_took_out_are_refused_by_name() -> None:
    model, optimizer = made(OPTIMIZERS["AdamW"])
    rowwise(optimizer, model)
    flat = nn.Parameter(model[0].weight.detach().flatten())
    optimizer.param_groups[0]["params"][0] = flat
    flat.grad = torch.ones_like(flat)
    with pytest.raises(InputError, match=r"without '0'.*FSDP.*detach_rowwise"):
        optimizer.step()


@pytest.mark.parametrize("calls", [True, False])
def test_rows_whose_weight_requires_no_gradient_are_refused(calls: bool) -> None:
    model, _ = made(OPTIMIZERS["AdamW"])
    model.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(InputError, match=r"requires_grad=False: from_pretrained\(.*PEFT"):
        rowwise(optimizer) if calls else optimizer.step()
    for module in model:
        module.weight.requires_grad_(True)
    step(model, optimizer, closure=False)
    for module in model:
        module.set_trainable_rows("none")
        module.weight.requires_grad_(False)
    rowwise(torch.optim.AdamW(model.parameters()))


COMPUTED: dict[str, Callable[[nn.Module], object]] = {
    "pruned": lambda table: prune.l1_unstructured(table, "weight", 0.2),
    "spectral_norm": lambda table: parametrizations.spectral_norm(table),
    "old_spectral_norm": lambda table: nn.utils.spectral_norm(table),
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*")
@pytest.mark.parametrize(
    ("name", "when"),
    [
        (name, when)
        for name in COMPUTED
        for when in ("before", "in_the_midst", "in_a_copy")
        if (name, when) != ("pruned", "in_a_copy")  # torch itself copies no pruned module
    ],
)
def test_a_weight_that_is_computed_trains_by_its_parameter(name: str, when: str) -> None:
    table = PartialEmbedding(V, D, trainable_rows=ROWS)
    if when != "in_the_midst":
        COMPUTED[name](table)
    if when == "in_a_copy":
        table = copy.deepcopy(table)
    optimizer = torch.optim.AdamW(table.parameters(), lr=0.1, weight_decay=0.1)
    for i in range(4):
        if i == 2 and when == "in_the_midst":
            COMPUTED[name](table)
        before = table.leaf_weight.detach().clone()
        table(torch.arange(V)).pow(3).sum().backward()
        optimizer.step()
        moved = rows_that_differ(table.leaf_weight, before)
        assert moved == ROWS, i
        optimizer.zero_grad()


def test_a_weight_that_is_split_is_refused() -> None:
    table = PartialEmbedding(V, D, trainable_rows=ROWS)
    parametrizations.weight_norm(table)
    with pytest.raises(InputError, match="weight_norm"):
        table(torch.arange(3))


@pytest.mark.parametrize("calls", [True, False], ids=["called", "not_called"])
def test_a_parameter_that_becomes_a_table_s_is_served_from_then_on(calls: bool) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Embedding(V, D), "b": nn.Embedding(V, D)})
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)

    def loss() -> Tensor:
        return sum(one(torch.arange(V)).square().sum() for one in model.values())

    replace_embedding(model, "a", trainable_rows=ROWS)
    if calls:
        rowwise(optimizer)
    take_steps(optimizer, loss)
    replace_embedding(model, "b", trainable_rows=ROWS)
    before = model["b"].weight.detach().clone()
    take_steps(optimizer, loss)
    assert rows_that_differ(before, model["b"].weight) == ROWS


def test_hooks_of_others_come_before_the_gradients_are_read_and_after_rows_are_written() -> None:
    table = PartialEmbedding(V, D, trainable_rows=ROWS)
    optimizer = torch.optim.SGD(table.parameters(), lr=10.0)

    def clamp(*_: Any) -> None:
        table.weight.data.clamp_(-9, 9)

    def zero(*_: Any) -> None:
        table.weight.grad.zero_()

    optimizer.register_step_post_hook(clamp)
    frozen = [row for row in range(V) if row not in ROWS]
    before = table.weight.detach().clone().clamp(-9, 9)
    for last in (False, True):
        if last:
            optimizer.register_step_pre_hook(zero)
            before = table.weight.detach().clone()
        optimizer.zero_grad()
        table(torch.arange(V)).sum().backward()
        optimizer.step()
        assert table.weight.abs().max() <= 9
        assert_same_bits(table.weight[frozen], before[frozen], "frozen rows")
    assert_same_bits(table.weight, before, "a table whose gradient was made zero")


SCRIPT = """
import torch
from partial_embedding.torch import PartialEmbedding

table = PartialEmbedding(12, 4, trainable_rows=[1, 4])
before = table.weight.detach().clone()
optimizer = torch.optim.AdamW(table.parameters(), lr=0.1, weight_decay=0.1)
for _ in range(3):
    optimizer.zero_grad()
    table(torch.arange(12)).square().sum().backward()
    optimizer.step()
print((table.weight != before).any(1).nonzero().flatten().tolist())
"""


def test_a_fresh_process_moves_the_asked_rows_alone() -> None:
    """Whatever it imports; libraries around a loop are in `docs/any-trainer.md`, which runs too."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "[1, 4]\n"
