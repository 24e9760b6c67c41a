"""Other tensors in the place of the weight, and vocabularies that change."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import SPARSE_AND_DENSE
from oracle import assert_same_bits, same_bits
from small_tables import (
    FROZEN,
    IDS,
    ROWS,
    D,
    V,
    assert_is_masked_past_the_module,
    assert_is_partial,
    gradient,
    moved_rows,
    table_of,
    vectors,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from partial_embedding.errors import InputError
from partial_embedding.torch import PartialEmbedding, PartialEmbeddingBag, rowwise
from partial_embedding.torch.row_gradient import RowGradient

# Other tensors in the place of the weight


@SPARSE_AND_DENSE
def test_functional_call_with_all_rows_trainable_equals_a_plain_embedding(sparse: bool) -> None:
    grads = []
    for module in (table_of("all", sparse=sparse), nn.Embedding(V, D, sparse=sparse)):
        weight = vectors().requires_grad_()
        torch.func.functional_call(module, {"weight": weight}, IDS).square().sum().backward()
        grads.append(weight.grad)
    assert isinstance(grads[0], RowGradient) == grads[1].is_sparse
    assert_same_bits(grads[0].to_dense(), grads[1].to_dense(), "the gradient")


@pytest.mark.parametrize("kind", [PartialEmbedding, PartialEmbeddingBag])
def test_functional_gradients_are_zero_in_frozen_rows(kind: Any) -> None:
    table = kind.from_pretrained(vectors(), sparse=False, trainable_rows=ROWS)
    plain = kind.from_pretrained(vectors(), sparse=False)

    def loss(weight: Tensor, module: nn.Module) -> Tensor:
        out = torch.func.functional_call(module, {"weight": weight}, IDS)
        return out.square().sum()

    grad = torch.func.grad(loss)(vectors(), table)
    expected = torch.func.grad(loss)(vectors(), plain)
    expected[FROZEN] = 0.0
    assert_same_bits(grad, expected, "the gradient")


def test_functional_gradients_work_under_vmap() -> None:
    table = table_of()
    stack = torch.stack([vectors(), vectors() * 3])

    def loss(weight: Tensor) -> Tensor:
        return torch.func.functional_call(table, {"weight": weight}, IDS).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss))(stack)
    assert [moved_rows(grad) for grad in grads] == [ROWS, ROWS]


def test_functional_call_between_forward_and_backward_does_no_harm() -> None:
    # A teacher with averaged weights runs through the student's module.
    table = table_of()
    loss = table(IDS).square().sum()
    teacher = nn.Parameter(vectors())
    for _ in range(2):
        torch.func.functional_call(table, {"weight": teacher}, IDS)
    loss.backward()
    assert moved_rows(table.weight.grad) == ROWS
    assert_is_partial(table)
    assert len(table.weight._backward_hooks) == len(teacher._backward_hooks) == 1


@SPARSE_AND_DENSE
@pytest.mark.parametrize("create_graph", [False, True], ids=["first", "second"])
def test_functional_call_leaves_the_model_alone_whose_parameter_it_takes(
    sparse: bool, create_graph: bool
) -> None:
    table, other = table_of(sparse=sparse), nn.Embedding(V, D)
    for _ in range(2):
        loss = torch.func.functional_call(table, {"weight": other.weight}, IDS).pow(3).sum()
        (grad,) = torch.autograd.grad(loss, other.weight, create_graph=create_graph)
        assert moved_rows(grad) == ROWS
        if create_graph:
            grad.square().sum().backward()
            assert moved_rows(other.weight.grad) == ROWS
    other.zero_grad()
    other(torch.arange(V)).sum().backward()
    assert moved_rows(other.weight.grad) == list(range(V))
    assert_is_partial(table)


def by_setattr(table: nn.Module, weight: nn.Parameter) -> None:
    table.weight = weight


def by_setattr_from_outside(table: nn.Module, weight: nn.Parameter) -> None:
    setattr(nn.Sequential(table)[0], "weight", weight)  # noqa: B010  # as transformers writes it


def by_register_parameter(table: nn.Module, weight: nn.Parameter) -> None:
    table.register_parameter("weight", weight)


def by_parameters_dict(table: nn.Module, weight: nn.Parameter) -> None:
    table._parameters["weight"] = weight


def by_assigned_state_dict(table: nn.Module, weight: nn.Parameter) -> None:
    table.load_state_dict({"weight": weight}, assign=True)


def by_deleting_first(table: nn.Module, weight: nn.Parameter) -> None:
    del table.weight
    table.weight = weight


REPLACEMENTS = [
    by_setattr,
    by_setattr_from_outside,
    by_register_parameter,
    by_parameters_dict,
    by_assigned_state_dict,
    by_deleting_first,
]


@SPARSE_AND_DENSE
@pytest.mark.parametrize("replace", REPLACEMENTS)
def test_a_replaced_weight_is_hooked_again(
    replace: Callable[[nn.Module, nn.Parameter], None], sparse: bool
) -> None:
    table = table_of(sparse=sparse)
    for factor in (2, 3):  # twice, since the first may have worn something out
        replace(table, nn.Parameter(vectors() * factor))
        assert_same_bits(table.weight, vectors() * factor, "the weight")
        if replace is not by_parameters_dict:  # behind the module's back: forward finds it out
            assert_is_masked_past_the_module(table)
        assert_is_partial(table)
        assert len(table.weight._backward_hooks) == 1


@SPARSE_AND_DENSE
def test_a_weight_put_there_behind_the_module_s_back_is_the_table_s_once_it_is_stepped(
    sparse: bool,
) -> None:
    table = table_of(sparse=sparse)
    by_parameters_dict(table, nn.Parameter(vectors()))
    optimizer = torch.optim.AdamW(table.parameters(), 0.1, weight_decay=0.1)
    for _ in range(2):
        gradient(table)
        optimizer.step()
        assert moved_rows(table.weight.detach() - vectors()) == ROWS
    assert table.is_attached_to(table.weight)  # or a dense one would be masked in each lookup
    assert isinstance(table.weight.grad, RowGradient) == sparse
    assert_is_masked_past_the_module(table)


@SPARSE_AND_DENSE
def test_a_weight_frozen_as_a_whole_and_back_keeps_its_hook(sparse: bool) -> None:
    table = table_of(sparse=sparse)
    table.weight.requires_grad_(False)
    assert not table(IDS).requires_grad
    table.weight.requires_grad_(True)
    assert_is_partial(table)


def test_a_weight_that_never_required_gradients_can_begin_to() -> None:
    table = table_of(freeze=True)
    assert not table(IDS).requires_grad
    table.weight.requires_grad_(True)
    assert_is_partial(table)


def test_a_frozen_replacement_stays_frozen_until_asked() -> None:
    table = table_of()
    table.weight = nn.Parameter(vectors(), requires_grad=False)
    assert not table.weight.requires_grad
    table.weight.requires_grad_(True)
    assert_is_partial(table)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not_reentrant", "reentrant"])
@SPARSE_AND_DENSE
def test_gradient_checkpointing_gives_the_same_gradient(sparse: bool, reentrant: bool) -> None:
    table = table_of(sparse=sparse)
    head = nn.Linear(D, D)

    def block(ids: Tensor, anchor: Tensor) -> Tensor:
        return head(table(ids)) * anchor

    anchor = torch.ones(1, requires_grad=True)  # reentrant checkpoints need an input to follow
    block(IDS, anchor).square().sum().backward()
    expected = table.weight.grad
    table.weight.grad = None
    checkpoint(block, IDS, anchor, use_reentrant=reentrant).square().sum().backward()
    assert moved_rows(table.weight.grad.to_dense()) == ROWS
    assert_same_bits(table.weight.grad.to_dense(), expected.to_dense(), "the gradient")


# Vocabularies that change


def resize(table: nn.Module, rows: int) -> None:
    """As transformers does: on the old object, and on its tensor alone."""
    old, new = table.weight.data, vectors(rows) * 2
    kept = min(len(old), rows)
    new[:kept] = old[:kept]
    table.weight.data = new
    table.num_embeddings = rows


@SPARSE_AND_DENSE
def test_new_rows_of_a_larger_vocabulary_are_frozen(sparse: bool) -> None:
    table = table_of(sparse=sparse)
    resize(table, 10)
    ids = torch.arange(10)
    assert moved_rows(gradient(table, ids)) == ROWS
    assert table.trainable_rows.tolist() == ROWS
    table.unfreeze_rows(range(7, 10))
    assert moved_rows(gradient(table, ids)) == [1, 4, 7, 8, 9]


@SPARSE_AND_DENSE
def test_rows_beyond_a_smaller_vocabulary_are_forgotten(sparse: bool) -> None:
    table = table_of(sparse=sparse)
    resize(table, 3)
    ids = torch.arange(3)
    assert moved_rows(gradient(table, ids)) == [1]
    assert table.trainable_rows.tolist() == [1]
    with pytest.raises(InputError, match=r"\[0, 3\)"):
        table.unfreeze_rows([4])
    resize(table, 10)
    assert table.trainable_rows.tolist() == [1]


@pytest.mark.parametrize("used", [False, True], ids=["never_asked", "asked_before"])
@pytest.mark.parametrize("rows", [3, 10])
def test_a_table_without_frozen_rows_has_none_after_a_resize(rows: int, used: bool) -> None:
    table = table_of("all")
    if used:
        assert len(table.trainable_rows) == V
    resize(table, rows)
    assert moved_rows(gradient(table, torch.arange(rows))) == list(range(rows))
    assert not table.has_frozen_rows
    assert len(table.trainable_rows) == rows


def test_a_resized_table_is_shown_and_copied_as_it_is() -> None:
    table = table_of()
    resize(table, 9)
    assert repr(table) == f"PartialEmbedding(9, {D}, trainable_rows=2)"
    assert copy.deepcopy(table).trainable_rows.tolist() == ROWS


@SPARSE_AND_DENSE
@pytest.mark.parametrize("rows", [5, 10])
def test_rows_do_not_notice_a_resize_in_the_midst_of_training(rows: int, sparse: bool) -> None:
    def trained(resized: bool) -> Tensor:
        table = table_of(sparse=sparse)
        optimizer = rowwise(torch.optim.AdamW(table.parameters(), lr=0.1, weight_decay=0.1), table)
        for step in range(4):
            if step == 2 and resized:
                optimizer.zero_grad()
                resize(table, rows)
            gradient(table, torch.tensor([0, 1, 4, 4, step]))
            optimizer.step()
        weight: Tensor = table.weight.detach()
        return weight

    expected, weight = trained(resized=False), trained(resized=True)
    assert len(weight) == rows
    assert_same_bits(weight[:5], expected[:5], "the rows that there were all along")
    assert_same_bits(weight[[0, 2, 3]], vectors()[[0, 2, 3]], "frozen rows")
    assert not same_bits(weight[ROWS], vectors()[ROWS])


@pytest.fixture
def swapping() -> Iterator[None]:
    """As torch is to move and to load parameters one day: by swapping what they hold."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.double(),
        lambda table: table.load_state_dict(table_of().double().state_dict()),
    ],
    ids=["conversion", "load_state_dict"],
)
@pytest.mark.usefixtures("swapping")
def test_rows_stay_frozen_after_torch_has_swapped_the_insides_of_the_weight(
    change: Callable[[nn.Module], object], sparse: bool
) -> None:
    table, tied = table_of(sparse=sparse), table_of(sparse=sparse)
    tied.weight = table.weight
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(4):
        gradient(table)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            change(table)
            assert tied.weight is table.weight
    assert_same_bits(table.weight[FROZEN], vectors().to(table.weight.dtype)[FROZEN], "frozen rows")
    assert_is_partial(table)
    assert_is_partial(tied)
