"""A state_dict of the rows that trained alone, and the table that it is loaded into."""

import copy
from typing import Any

import pytest
import torch
from oracle import assert_alike, same_bits, unchanged
from steps import take_steps
from torch import nn

from partial_embedding import InputError
from partial_embedding.torch import PartialEmbedding, PartialLinear, rowwise
from partial_embedding.torch.table import tables_in
from partial_embedding.torch.table_files import rows_saved_alone

V, D = 40, 3


def model_of(seed: int = 0, rows: object = (5, 7), tied: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(PartialEmbedding(V, D, trainable_rows=rows), nn.Linear(D, D))
    if tied:
        model.append(PartialLinear(D, V))
        model[2].weight = model[0].weight
    return model


def train(model: nn.Sequential, steps: int = 3) -> None:
    optimizer = rowwise(torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1), model)
    take_steps(optimizer, lambda: model(torch.arange(V)).pow(2).sum(), steps)


def remember_origins(model: nn.Module) -> None:
    for _, table in tables_in(model):
        table.remember_origin()


def trained(**options: Any) -> nn.Sequential:
    """A model that knows what its rows were before they trained."""
    model = model_of(**options)
    remember_origins(model)
    train(model)
    return model


def saved_rows_of(model: nn.Module) -> dict[str, Any]:
    """The state_dict as it comes back from a file."""
    with rows_saved_alone(table for _, table in tables_in(model)):
        return copy.deepcopy(dict(model.state_dict()))


@pytest.mark.parametrize("tied", [False, True], ids=["alone", "tied"])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_rows_that_trained_make_a_new_table_what_the_old_one_was(tied: bool, assign: bool) -> None:
    model = trained(tied=tied)
    model[0].set_trainable_rows([7, 11])
    train(model)
    saved = saved_rows_of(model)
    assert saved["0.weight.ids"].tolist() == [5, 7, 11]
    assert "0.weight" not in saved
    again = model_of(tied=tied)
    again.load_state_dict(saved, assign=assign)
    assert_alike(model, again)
    if tied:
        assert again[2].weight is again[0].weight
    # Which is saved as the old one is.
    one, other = saved_rows_of(model), saved_rows_of(again)
    assert one.keys() == other.keys()
    assert all(same_bits(one[key], other[key]) for key in one)


def test_outside_of_the_block_the_whole_table_is_saved() -> None:
    model = model_of()
    remember_origins(model)
    before = list(model_of().state_dict())
    saved_rows_of(model)
    assert list(model.state_dict()) == before


def test_an_earlier_file_takes_back_what_trained_since() -> None:
    model = trained()
    early, whole = saved_rows_of(model), copy.deepcopy(model.state_dict())
    model[0].set_trainable_rows("all")
    train(model)
    assert not same_bits(model[0].weight, whole["0.weight"])
    model.load_state_dict(early)
    assert same_bits(model[0].weight, whole["0.weight"])


def test_rows_of_another_base_are_refused_by_name_and_change_nothing() -> None:
    model = trained()
    saved = saved_rows_of(model)
    other = model_of()
    with torch.no_grad():
        other[0].weight[20, 1] += 1e-6
    with unchanged(other), pytest.raises(InputError, match=r"'0\.weight'.*same vectors"):
        other.load_state_dict(saved)
    # The remedy, followed.
    model_of().load_state_dict(saved)


def test_two_rows_that_changed_places_are_another_base() -> None:
    model = model_of()
    remember_origins(model)
    other = model_of()
    with torch.no_grad():
        other[0].weight[[20, 21]] = other[0].weight[[21, 20]]
    with pytest.raises(InputError, match="same vectors"):
        other.load_state_dict(saved_rows_of(model))


def test_rows_that_train_may_differ_before_they_are_loaded() -> None:
    model = trained()
    other = model_of()
    with torch.no_grad():
        other[0].weight[5] = 9.0
    other.load_state_dict(saved_rows_of(model))
    assert_alike(model, other)


@pytest.mark.parametrize("shape", [(V + 1, D), (V, D + 1)])
def test_rows_of_a_table_of_another_shape_are_refused(shape: tuple[int, int]) -> None:
    model = model_of()
    remember_origins(model)
    with pytest.raises(InputError, match="of the shape"):
        PartialEmbedding(*shape).load_state_dict(
            {k.removeprefix("0."): v for k, v in saved_rows_of(model).items() if k[0] == "0"}
        )


def test_a_whole_table_that_is_loaded_is_saved_whole() -> None:
    # What rows held before belongs to the table that was.
    model = trained()
    model.load_state_dict(model_of(seed=1).state_dict())
    assert "0.weight" in saved_rows_of(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_of_a_model_that_was_cast_fit_the_table_as_it_is_made(dtype: torch.dtype) -> None:
    # As Lightning does with precision="bf16-true": it loads, and then casts.
    model = model_of().to(dtype)
    remember_origins(model)
    train(model)
    again = model_of()
    again.load_state_dict(saved_rows_of(model))
    assert_alike(model, again.to(dtype))
    saved_again = saved_rows_of(again)
    assert (
        saved_again["0.weight.others"].tolist() == saved_rows_of(model)["0.weight.others"].tolist()
    )


def test_a_copy_remembers_what_the_original_does() -> None:
    model = trained()
    twin = copy.deepcopy(model)
    train(twin)
    again = model_of()
    again.load_state_dict(saved_rows_of(twin))
    assert_alike(twin, again)
    assert not same_bits(twin[0].weight, model[0].weight)


def test_what_is_saved_follows_the_rows_that_trained() -> None:
    table = PartialEmbedding(10_000, 8, trainable_rows=range(10))
    table.remember_origin()
    table.set_trainable_rows(range(100, 130))
    with rows_saved_alone([table]):
        sizes = [value.numel() * value.element_size() for value in table.state_dict().values()]
    assert sum(sizes) == 40 * (8 + 4 * 8) + 3 * 8


def test_tied_tables_are_saved_once() -> None:
    model = model_of(tied=True)
    remember_origins(model)
    with rows_saved_alone([model[0]]):
        saved = model.state_dict()
    for entry in ("ids", "rows", "others"):
        assert saved[f"0.weight.{entry}"] is saved[f"2.weight.{entry}"]
