"""Rows that are to train and that no optimizer holds: said before anything moves, or no fault."""

import copy
import warnings

import pytest
import torch
from oracle import assert_same_bits, rows_that_differ, unchanged
from torch import Tensor, nn
from torch.optim import SGD

from partial_embedding import InputError
from partial_embedding.torch import (
    PartialEmbedding,
    PartialLinear,
    detach_rowwise,
    replace_embedding,
    restore_embedding,
)

IDS = torch.tensor([1, 2, 3])


def model_with_rows() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(PartialEmbedding(6, 4, trainable_rows=[2]), nn.Linear(4, 2))


def gradients(model: nn.Module) -> None:
    model.zero_grad()
    loss: Tensor = model(IDS).square().sum()
    loss.backward()


def begun(model: nn.Module) -> SGD:
    """An optimizer of all parameters that has made a step."""
    optimizer = SGD(model.parameters(), 0.1)
    gradients(model)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_frozen_weight_is_refused_and_learns_by_the_remedy(mode: bool) -> None:
    model = model_with_rows().train(mode)
    model[0].requires_grad_(False)
    before = model[0].weight.detach().clone()
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):  # each time
        gradients(model)
        rule = r"belong to an optimizer.*'0' with 1 such rows.*True"
        with unchanged(model), pytest.raises(InputError, match=rule):
            optimizer.step()
    # The remedy.
    model[0].weight.requires_grad_(True)
    begun(model)
    assert rows_that_differ(before, model[0].weight) == [2]


def test_a_model_in_which_nothing_is_left_to_train_is_refused() -> None:
    """Trainers make an optimizer without parameters, and have inputs take gradients."""
    model = model_with_rows().requires_grad_(False)
    optimizer = SGD([{"params": []}], 0.1)
    model(IDS).requires_grad_().sum().backward()
    with pytest.raises(InputError, match=r"'0' with 1 such rows.*while SGD steps nothing\. Call"):
        optimizer.step()


def test_a_weight_that_is_left_out_of_the_optimizer_is_warned_of_once() -> None:
    for remedy in ("another", "none"):
        model = model_with_rows()
        before = model[0].weight.detach().clone()
        optimizer = SGD(model[1].parameters(), 0.1)
        gradients(model)
        with pytest.warns(UserWarning, match=r"Make the optimizer of.*set_trainable_rows"):
            optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
            if remedy == "another":
                optimizer = SGD(model.parameters(), 0.1)
            else:
                model[0].set_trainable_rows("none")
            optimizer.step()
        moved = rows_that_differ(before, model[0].weight)
        assert moved == ([2] if remedy == "another" else [])


def test_rows_that_are_to_train_later_are_seen_when_they_are_set() -> None:
    model = model_with_rows()
    model[0].set_trainable_rows("none")
    optimizer = SGD(model[1].parameters(), 0.1)
    gradients(model)
    optimizer.step()
    model[0].set_trainable_rows([3])
    with pytest.warns(UserWarning, match="belong to an optimizer"):
        optimizer.step()


def test_tables_that_have_an_optimizer_or_are_of_no_concern_are_left_alone() -> None:
    model = model_with_rows()
    its_own = SGD(model[0].parameters(), 0.1)
    frozen = model_with_rows().eval()  # a reference, within a model that trains
    frozen.requires_grad_(False)
    whole = nn.ModuleDict({"policy": model, "reference": frozen})
    whole["reference"].eval()
    strange = model_with_rows()  # of which someone only wanted gradients
    gradients(strange)
    others = SGD(model[1].parameters(), 0.1)
    gradients(model)
    model[0].requires_grad_(False)  # as a Lightning module with two optimizers switches it
    others.step()
    model[0].requires_grad_(True)
    its_own.step()
    assert rows_that_differ(model_with_rows()[0].weight, model[0].weight) == [2]


def test_a_table_that_is_plain_again_is_none() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 2))
    replace_embedding(model, trainable_rows=[2])
    restore_embedding(model)
    gradients(model)
    SGD(model[1].parameters(), 0.1).step()


@pytest.mark.parametrize("of_all", [True, False], ids=["of_all", "of_the_student"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "not_frozen"])
@pytest.mark.filterwarnings("error")
def test_a_teacher_that_is_a_copy_needs_nothing(of_all: bool, frozen: bool) -> None:
    student = model_with_rows()
    whole = nn.ModuleDict({"student": student, "teacher": copy.deepcopy(student)})
    whole["teacher"].requires_grad_(not frozen)
    optimizer = SGD((whole if of_all else student).parameters(), 0.1)
    for _ in range(2):
        gradients(student)
        optimizer.step()
    assert rows_that_differ(whole["teacher"][0].weight, student[0].weight) == [2]
    assert_same_bits(whole["teacher"][0].weight, model_with_rows()[0].weight, "the teacher")


def test_a_copy_whose_rows_are_set_is_a_table_like_any_other() -> None:
    model = copy.deepcopy(model_with_rows())
    model[0].set_trainable_rows([3])
    model[0].requires_grad_(False)
    gradients(model)
    with pytest.raises(InputError, match="belong to an optimizer"):
        SGD(model[1].parameters(), 0.1).step()


def test_a_table_that_nothing_can_step_disturbs_no_other() -> None:
    split = PartialEmbedding(6, 4, trainable_rows=[2])
    nn.utils.parametrizations.weight_norm(split)
    model = model_with_rows()
    gradients(model)
    SGD(model.parameters(), 0.1).step()
    with pytest.raises(InputError, match="weight_norm"):
        split(IDS)


@pytest.mark.parametrize("rows", ["before", "while"])
def test_a_weight_that_is_frozen_in_mid_run_is_refused_and_learns_on_by_the_remedy(
    rows: str,
) -> None:
    model = model_with_rows()
    optimizer = SGD(model.parameters(), 0.1)
    if rows == "while":
        model[0].set_trainable_rows("none")
    gradients(model)
    optimizer.step()
    model[0].requires_grad_(False)
    if rows == "while":
        model[0].set_trainable_rows([2])
    before = copy.deepcopy(model.state_dict())
    gradients(model)
    with pytest.raises(InputError, match=r"rows train whose weight requires gradients.*freeze\(\)"):
        optimizer.step()
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name], name)
    model[0].weight.requires_grad_(True)
    gradients(model)
    optimizer.step()
    assert rows_that_differ(before["0.weight"], model[0].weight) == [2]


@pytest.mark.parametrize("how", ["assigned", "loaded"])
def test_a_weight_that_was_replaced_after_the_first_step_is_refused(how: str) -> None:
    model = model_with_rows()
    optimizer = begun(model)
    if how == "assigned":
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    else:
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    before = model[0].weight.detach().clone()
    gradients(model)
    with pytest.raises(InputError, match=r"no longer has.*Make the optimizer after that"):
        optimizer.step()
    assert_same_bits(model[0].weight, before, "the rows")
    optimizer = SGD(model.parameters(), 0.1)
    optimizer.step()
    assert rows_that_differ(before, model[0].weight) == [2]


def test_a_table_that_was_made_plain_after_the_first_step_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 2))
    replace_embedding(model, "0", [2])
    optimizer = begun(model)
    restore_embedding(model)
    before = model[0].weight.detach().clone()
    gradients(model)
    with pytest.raises(InputError, match=r"is a plain one now.*call detach_rowwise"):
        optimizer.step()
    assert_same_bits(model[0].weight, before, "the rows")
    detach_rowwise(optimizer)
    optimizer.step()
    assert rows_that_differ(before, model[0].weight) == IDS.tolist()


def test_a_head_may_be_tied_after_the_first_step() -> None:
    model = nn.Sequential(
        PartialEmbedding(6, 4, trainable_rows=[2]), PartialLinear(4, 6, trainable_rows=[2])
    )
    optimizer = begun(model)
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    gradients(model)
    optimizer.step()
    assert rows_that_differ(before, model[0].weight) == [2]
