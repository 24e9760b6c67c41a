"""What an optimizer saves of a table, at awkward moments and after a plain run in between."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from models import D, V, starting_table
from oracle import assert_alike, assert_same_bits, through_a_file
from plain_optimizers import Plain
from steps import closure_of, take_steps
from torch import nn

from partial_embedding import InputError
from partial_embedding.torch import PartialEmbedding, detach_rowwise, rowwise
from partial_embedding.torch.saved_state import cohorts_of

OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=2),
}


def made(name: str, rows: Any) -> tuple[PartialEmbedding, torch.optim.Optimizer]:
    table = PartialEmbedding.from_pretrained(starting_table(), trainable_rows=rows)
    return table, rowwise(OPTIMIZERS[name](table.parameters()), table)


def steps(table: nn.Embedding, optimizer: torch.optim.Optimizer, count: int) -> None:
    def loss_of(step: int) -> torch.Tensor:
        upstream = torch.randn(4, D, generator=torch.Generator().manual_seed(step))
        return (table(torch.tensor([1, 2, 3, 4])) * upstream).square().sum()

    for step in range(count):
        optimizer.step(closure_of(optimizer, partial(loss_of, step)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_that_changed_since_the_last_step_are_saved_as_they_are_now(name: str) -> None:
    table, optimizer = made(name, [1, 2])
    steps(table, optimizer, 2)
    table.set_trainable_rows([2, 3])
    saved = copy.deepcopy([table.state_dict(), optimizer.state_dict()])
    steps(table, optimizer, 2)

    again, other = made(name, [2, 3])
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    steps(again, other, 2)
    assert_same_bits(again.weight, table.weight, "the table")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plain_run_in_between_makes_the_rows_state_stale(name: str) -> None:
    table, optimizer = made(name, "none")
    if name != "LBFGS":
        table.set_trainable_rows([1, 2], warmup_steps=9)
    else:
        table.set_trainable_rows([1, 2])
    steps(table, optimizer, 2)
    plain = nn.Embedding.from_pretrained(table.weight.detach().clone(), freeze=False)
    plain_optimizer = OPTIMIZERS[name](plain.parameters())
    plain_optimizer.load_state_dict(optimizer.state_dict())
    if name == "Adagrad":
        # torch makes this state in the constructor alone, and loading has thrown it away.
        state = OPTIMIZERS[name]([nn.Parameter(torch.zeros(V, D))]).state
        plain_optimizer.state[plain.weight] = next(iter(state.values()))
    steps(plain, plain_optimizer, 2)
    carried = plain_optimizer.state_dict()

    # Neither are other rows refused, nor is anything of the old entry restored.
    _, other = made(name, [3, 4])
    other.load_state_dict(copy.deepcopy(carried))
    again = other.state_dict()
    entry = (
        again["state"][0]["rowwise"] if again["state"] else again["param_groups"][0]["rowwise"][0]
    )
    (cohort,) = cohorts_of(entry).values()
    assert cohort.ids.tolist() == [3, 4]
    assert cohort.rate_scale.is_plain
    for key, value in cohort.state.items():
        if value.dim():
            assert_same_bits(value, carried["state"][0][key][[3, 4]], key)


def test_a_saved_rate_scale_is_refused_by_an_optimizer_that_cannot_keep_it() -> None:
    table, optimizer = made("AdamW", "none")
    table.set_trainable_rows([1], lr_scale=0.5)
    steps(table, optimizer, 1)
    saved = optimizer.state_dict()
    _, other = made("LBFGS", [1])
    with pytest.raises(InputError, match=r"lr_scale=0\.5.*LBFGS"):
        other.load_state_dict(saved)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_a_model_and_its_optimizer_goes_on_alike(way: str) -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        take_steps(optimizer, lambda: model(torch.tensor([1, 4, 5])).square().sum(), steps)

    torch.manual_seed(0)
    model = nn.Sequential(PartialEmbedding(9, 4, trainable_rows=[1, 4]), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, 3)
    model[0].set_trainable_rows([1, 4, 5])
    train(model, optimizer, 2)
    copied_by = {"deepcopy": copy.deepcopy, "pickle": through_a_file}[way]
    again, its_optimizer = copied_by((model, optimizer))
    train(model, optimizer, 3)
    train(again, its_optimizer, 3)
    assert_alike(again, model)


class MadeAtOnce(Plain):
    """Its constructor makes the state that its steps look for, as older releases of Adagrad do."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["sum"] = torch.ones_like(param)

    def direction(self, param: nn.Parameter, group: dict[str, Any]) -> torch.Tensor:
        grad = super().direction(param, group)
        return grad / self.state[param]["sum"].addcmul_(grad, grad).sqrt()


def test_a_plain_table_begins_afresh_where_the_constructor_makes_the_state() -> None:
    table = PartialEmbedding.from_pretrained(starting_table(), trainable_rows=[1, 2])
    optimizer = MadeAtOnce(table.parameters())
    steps(table, optimizer, 2)
    plain, fresh = (nn.Embedding.from_pretrained(starting_table(), freeze=False) for _ in range(2))
    stock = MadeAtOnce(plain.parameters())
    stock.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(plain, stock, 2)
    steps(fresh, MadeAtOnce(fresh.parameters()), 2)
    assert_same_bits(plain.weight, fresh.weight, "the table")
    # And where it is the same table that all rows of are to train.
    detach_rowwise(optimizer)
    table.set_trainable_rows("all")
    steps(table, optimizer, 1)
    assert optimizer.state[table.weight]["sum"].shape == (V, D)
