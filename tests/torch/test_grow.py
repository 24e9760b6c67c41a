"""Tables that grow: old rows and their optimizer state stay, new rows begin."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_alike, same_bits, unchanged
from torch import Tensor, nn

from partial_embedding import InputError, Rows
from partial_embedding.torch import (
    PartialEmbedding,
    PartialLinear,
    grow_table,
    replace_embedding,
    rowwise,
)
from partial_embedding.torch.grow import replace_rows
from partial_embedding.torch.table_files import rows_saved_alone

V, D, NEW = 12, 4, 3
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "SGD-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


class Scorer(nn.Module):
    """Items, and scores of items, tied or not."""

    def __init__(self, rows: object = (1, 5), tied: bool = False, num_rows: int = V) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items = PartialEmbedding(num_rows, D, trainable_rows=rows)
        self.scores = PartialLinear(D, num_rows, trainable_rows=rows)
        if tied:
            self.scores.weight = self.items.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.scores(self.items(ids))


BOTH = ["items", "scores"]


def train(model: Scorer, optimizer: torch.optim.Optimizer, num_items: int | None = None) -> Tensor:
    """Two steps on a loss over all items, or over the first ones alone."""
    items = num_items or len(model.items.weight)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(torch.arange(items))[:, :items].pow(2).mean()
        loss.backward()
        optimizer.step()
    return loss  # whoever keeps it keeps the graph, as loops do


@pytest.mark.parametrize("tied", [False, True], ids=["two_tables", "tied"])
def test_everything_that_has_a_row_for_each_item_grows(tied: bool) -> None:
    model = Scorer(tied=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = [id(parameter) for parameter in model.parameters()]
    assert grow_table(model, "items" if tied else BOTH, NEW) == [12, 13, 14]
    assert [id(parameter) for parameter in model.parameters()] == weights
    assert (model.items.num_embeddings, model.scores.out_features) == (15, 15)
    for name, value in model.state_dict().items():
        assert len(value) == V + NEW, name
        assert same_bits(value[:V], before[name]), name
        assert torch.allclose(value[V:], before[name].mean(0).expand(value[V:].shape)), name
    assert model(torch.tensor([14])).shape == (1, 15)
    for table in (model.items, model.scores):
        assert table.trainable_rows.tolist() == [1, 5, 12, 13, 14]


@pytest.mark.parametrize("rows", [(1, 5), "all", "none"], ids=str)
@pytest.mark.parametrize("prepared", [True, False], ids=["rowwise", "plain"])
@pytest.mark.parametrize("tied", [False, True], ids=["two_tables", "tied"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_old_rows_go_on_and_new_ones_begin_bit_for_bit(
    make: Callable[..., torch.optim.Optimizer], tied: bool, prepared: bool, rows: object
) -> None:
    # The same run over tables that had all rows from the start, of which the last joined late.
    grown, whole = Scorer(rows, tied), Scorer(rows, tied, V + NEW)
    late = [] if rows == "none" else list(range(V) if rows == "all" else rows)  # type: ignore[call-overload]
    for module, other in ((whole.items, grown.items), (whole.scores, grown.scores)):
        module.set_trainable_rows(late or "none")
        for attribute in module.row_parameters:
            parameter, small = getattr(module, attribute), getattr(other, attribute)
            mean = small.detach().mean(0, keepdim=True)
            parameter.data = torch.cat([small.detach(), mean.expand(NEW, *small.shape[1:])])
    if tied:
        whole.scores.weight = whole.items.weight
    optimizers = [make(model.parameters()) for model in (grown, whole)]
    if prepared:
        for model, optimizer in zip((grown, whole), optimizers, strict=True):
            rowwise(optimizer, model)
    # A loss over the old items alone, which is the same for both.
    held = [
        train(model, optimizer, V)
        for model, optimizer in zip((grown, whole), optimizers, strict=True)
    ]
    assert same_bits(held[0], held[1])
    begun = grow_table(grown, "items" if tied else BOTH, NEW)
    # New rows begin at the mean of what training made of the old ones.
    with torch.no_grad():
        for module, other in ((whole.items, grown.items), (whole.scores, grown.scores)):
            for attribute in module.row_parameters:
                getattr(module, attribute)[V:] = getattr(other, attribute)[V:]
    whole.items.set_trainable_rows([*late, *begun])
    whole.scores.set_trainable_rows([*late, *begun])
    for model, optimizer in zip((grown, whole), optimizers, strict=True):
        train(model, optimizer)
    assert_alike(grown, whole)


def test_new_rows_may_stay_as_they_begin() -> None:
    model = Scorer()
    optimizer = rowwise(torch.optim.AdamW(model.parameters()), model)
    train(model, optimizer)
    grow_table(model, BOTH, NEW, trainable=False)
    begun = model.items.weight[V:].detach().clone()
    train(model, optimizer)
    assert same_bits(model.items.weight[V:], begun)
    model.items.unfreeze_rows("new")
    train(model, optimizer)
    assert not torch.isclose(model.items.weight[V:], begun).any()


@pytest.mark.parametrize("prepared", [True, False], ids=["rowwise", "plain"])
@pytest.mark.parametrize("rows", [(1, 5), "all"], ids=str)
@pytest.mark.parametrize("alone", [True, False], ids=["rows", "whole"])
def test_a_checkpoint_from_before_loads_into_the_grown_model(
    alone: bool, rows: object, prepared: bool
) -> None:
    old = Scorer(rows)
    for table in (old.items, old.scores):
        table.remember_origin()
    optimizer = torch.optim.AdamW(old.parameters(), lr=0.1)
    if prepared:
        rowwise(optimizer, old)
    train(old, optimizer)
    with rows_saved_alone([old.items, old.scores] if alone else []):
        saved = copy.deepcopy((old.state_dict(), optimizer.state_dict()))
    # The same steps, in another order: grow and load, load and grow.
    grown = Scorer(rows)
    again = torch.optim.AdamW(grown.parameters(), lr=0.1)
    if prepared:
        rowwise(again, grown)
    grow_table(grown, BOTH, NEW, init=torch.ones(NEW, D))
    ends = {name: value[V:].clone() for name, value in grown.state_dict().items()}
    grown.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for name, value in grown.state_dict().items():
        assert same_bits(value[:V], old.state_dict()[name]), name
        assert same_bits(value[V:], ends[name]), name
    grow_table(old, BOTH, NEW)
    for name, parameter in old.named_parameters():
        parameter.data[V:] = ends[name]
    train(old, optimizer)
    train(grown, again)
    assert_alike(grown, old)


def test_rows_saved_alone_hold_those_by_which_the_table_grew() -> None:
    model = Scorer()
    model.items.remember_origin()
    grow_table(model, BOTH, NEW, init=torch.full((NEW, D), 2.0), trainable=False)
    with rows_saved_alone([model.items]):
        saved = model.items.state_dict()
    assert saved["weight.ids"].tolist() == [1, 5, 12, 13, 14]
    again = Scorer()
    grow_table(again, BOTH, NEW)
    again.items.load_state_dict(saved)
    assert same_bits(again.items.weight, model.items.weight)
    with pytest.raises(InputError, match="grow_table"):
        Scorer().items.load_state_dict(saved)


def test_a_table_of_another_size_is_still_refused() -> None:
    model = Scorer()
    grow_table(model, BOTH, NEW)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(Scorer(num_rows=V + 1).state_dict())


def test_new_names_the_rows_by_which_a_table_grew_last() -> None:
    model = Scorer()
    with pytest.raises(InputError, match="grow_table"):
        model.items.set_trainable_rows("new")
    grow_table(model, BOTH, NEW)
    grow_table(model, BOTH, 2)
    model.items.set_trainable_rows("new")
    assert model.items.trainable_rows.tolist() == [15, 16]
    model.items.set_trainable_rows(~Rows.parse({"union": ["new", {"ids": [0]}]}))
    assert model.items.trainable_rows.tolist() == list(range(1, 15))
    twin = copy.deepcopy(model)
    twin.scores.set_trainable_rows("new")
    assert twin.scores.trainable_rows.tolist() == [15, 16]


def test_new_rows_begin_from_what_is_given() -> None:
    model = Scorer()
    grow_table(model, "items", 2, init=torch.eye(2, D))
    assert same_bits(model.items.weight[V:], torch.eye(2, D))
    grow_table(model, model.items, 2, init=nn.init.zeros_)
    assert not model.items.weight[V + 2 :].any()


def test_a_padding_row_stays_out_of_training() -> None:
    model = nn.Sequential(PartialEmbedding(V, D, padding_idx=0))
    grow_table(model, None, NEW)
    assert model[0].trainable_rows.tolist() == list(range(1, V + NEW))


def test_a_parameter_grows_while_an_earlier_graph_lives() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    loss = parameter.sum()
    loss.backward()
    replace_rows(parameter, torch.ones(4, 3))
    assert parameter.grad is None
    parameter.sum().backward()
    assert parameter.grad.shape == (4, 3)
    assert loss.requires_grad


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rows": 0}, "from 1 up"),
        ({"rows": True}, "from 1 up"),
        ({"init": "zeros"}, "init is 'mean'"),
        ({"init": torch.ones(NEW, D + 1)}, "a vector for each new row"),
        ({"name": "plain"}, "replace_embedding"),
        ({"name": ["items", "other"]}, "as many rows"),
        ({"name": "nothing"}, "is meant"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_grow_is_refused_and_stays(change: dict[str, Any], reason: str) -> None:
    model = Scorer()
    model.plain = nn.Embedding(V, D)
    model.other = PartialEmbedding(V + 1, D)
    arguments: dict[str, Any] = {"name": BOTH, "rows": NEW, **change}
    with unchanged(model), pytest.raises(InputError, match=reason):
        grow_table(model, **arguments)
    # The remedy, followed.
    replace_embedding(model, "plain")
    assert grow_table(model, "plain", NEW) == [12, 13, 14]


def test_a_plain_head_that_is_tied_and_has_a_bias_is_refused() -> None:
    model = nn.Module()
    model.items, model.scores = PartialEmbedding(V, D), nn.Linear(D, V)
    model.scores.weight = model.items.weight
    with pytest.raises(InputError, match=r"replace_embedding\(model, 'scores'\)"):
        grow_table(model, "items", NEW)
    replace_embedding(model, "scores")
    grow_table(model, "items", NEW)
    assert len(model.scores.bias) == V + NEW


def test_new_ids_of_a_table_without_any_are_none() -> None:
    assert Rows.parse("new").resolve(5, new=np.zeros(0, np.int64)).size == 0
    assert Rows.parse("new").to_config() == "new"
