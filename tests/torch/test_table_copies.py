"""The table in checkpoints, copies, casts and moves."""

import copy
import pickle
import warnings
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from cases import SPARSE_AND_DENSE
from oracle import assert_same_bits, through_a_file
from small_tables import (
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
from torch import nn

from partial_embedding.torch import PartialEmbedding, PartialEmbeddingBag

# state_dict


@pytest.mark.parametrize("kind", [PartialEmbedding, PartialEmbeddingBag])
def test_state_dict_has_the_keys_of_the_plain_module(kind: type[nn.Module]) -> None:
    table = kind(V, D, trainable_rows=ROWS)
    assert list(table.state_dict()) == ["weight"]
    assert [name for name, _ in table.named_parameters()] == ["weight"]
    assert list(table.named_buffers()) == []
    assert list(table.children()) == []


# Copies: the hook does not travel with a tensor, so each of these must put it back


def by_pickle(table: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(table))
    return copied


def by_deepcopy_in_a_model(table: nn.Module) -> nn.Module:
    copied: nn.Module = copy.deepcopy(nn.Sequential(table))[0]
    return copied


COPIES = [copy.deepcopy, by_pickle, through_a_file, by_deepcopy_in_a_model]


@SPARSE_AND_DENSE
@pytest.mark.parametrize("copied_by", COPIES)
def test_copies_train_the_same_rows_and_their_own_afterwards(
    copied_by: Callable[[nn.Module], nn.Module], sparse: bool
) -> None:
    table = table_of([1], sparse=sparse, padding_idx=0)
    table.unfreeze_rows([4])
    gradient(table)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied = copied_by(table)
    assert copied.weight is not table.weight
    assert copied.weight.data_ptr() != table.weight.data_ptr()
    assert_same_bits(copied.weight, table.weight, "the weight")
    assert repr(copied) == repr(table)
    assert_is_masked_past_the_module(copied)  # before its first lookup
    assert [c.tolist() for c in copied.row_set.cohorts.values()] == [[1], [4]]
    assert_is_partial(copied)
    copied.set_trainable_rows([2])
    assert_is_partial(copied, [2])
    assert_is_partial(table)
    # One hook each: a second one would belong to the other table.
    assert len(copied.weight._backward_hooks) == 1
    assert len(table.weight._backward_hooks) == 1


@pytest.mark.filterwarnings("error")
def test_what_goes_to_another_process_keeps_its_rows() -> None:
    table = table_of(ROWS, sparse=True)
    sent = ForkingPickler.dumps(table)  # as `multiprocessing` sends it; the weight is shared
    assert_is_partial(pickle.loads(sent))


def test_copies_do_not_carry_a_weight_that_was_there_for_one_call() -> None:
    table = table_of()
    table(IDS)
    size = len(pickle.dumps(table))
    other = nn.Parameter(vectors() * 3)
    torch.func.functional_call(table, {"weight": other}, IDS)
    assert len(pickle.dumps(table)) == size
    assert_is_partial(copy.deepcopy(table))


def test_deepcopy_follows_a_later_replacement_of_the_weight() -> None:
    copied = copy.deepcopy(table_of())
    copied.weight = nn.Parameter(vectors())
    assert_is_partial(copied)


# Casts, moves, memory


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to_float64": lambda table: table.to(torch.float64),
    "to_bfloat16": lambda table: table.to(dtype=torch.bfloat16),
    "half": lambda table: table.half(),
    "double": lambda table: table.double(),
    "to_device": lambda table: table.to("cpu"),
    "to_device_and_dtype": lambda table: table.to("cpu", torch.float64),
    "share_memory": lambda table: table.share_memory(),
    "train_eval": lambda table: table.eval().train(),
    "zero_grad": lambda table: table.zero_grad() or table,
    "requires_grad": lambda table: table.requires_grad_(False).requires_grad_(True),
}


@SPARSE_AND_DENSE
@pytest.mark.parametrize("name", CASTS)
def test_casts_and_moves_keep_the_rows(name: str, sparse: bool) -> None:
    table = table_of(sparse=sparse)
    plain = nn.Embedding.from_pretrained(vectors(), freeze=False, sparse=sparse)
    cast = CASTS[name](table)
    CASTS[name](plain)
    assert cast is table
    assert_same_bits(table.weight, plain.weight, "the weight")
    assert_is_partial(table)
    assert len(table.weight._backward_hooks) == 1


def test_casts_that_make_a_new_parameter_keep_the_rows() -> None:
    table = table_of()
    old = table.weight
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        table.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert table.weight is not old
    assert table.weight.dtype == torch.float64
    assert_is_masked_past_the_module(table)
    assert_is_partial(table)


@pytest.mark.parametrize("rows", [ROWS, "all"], ids=["some_rows", "all_rows"])
@pytest.mark.parametrize("how", ["argument", "context", "moved"])
def test_meta_device_keeps_the_rows_until_there_is_a_weight(how: str, rows: Any) -> None:
    if how == "argument":
        table = PartialEmbedding(V, D, device="meta", sparse=False, trainable_rows=rows)
    elif how == "context":
        with torch.device("meta"):
            table = PartialEmbedding(V, D, sparse=False, trainable_rows=rows)
    else:
        table = table_of(rows).to("meta")
    assert table.weight.is_meta
    assert table(torch.zeros(2, 2, dtype=torch.int64, device="meta")).shape == (2, 2, D)
    assert f"trainable_rows={2 if rows == ROWS else 7})" in repr(table)
    table.to_empty(device="cpu")
    with torch.no_grad():
        table.weight.copy_(vectors())
    if rows == ROWS:
        assert_is_masked_past_the_module(table)
    assert_is_partial(table, ROWS if rows == ROWS else list(range(V)))


@pytest.mark.parametrize("kind", [PartialEmbedding, PartialEmbeddingBag])
def test_meta_table_takes_a_checkpoint_by_assignment(kind: type[nn.Module]) -> None:
    with torch.device("meta"):
        table = kind(V, D, sparse=False, trainable_rows=ROWS)
    table.load_state_dict({"weight": vectors()}, strict=True, assign=True)
    assert not table.weight.is_meta
    assert_is_masked_past_the_module(table)
    assert_is_partial(table)


def test_meta_gradient_has_the_shape_of_the_weight() -> None:
    table = PartialEmbedding(V, D, device="meta", sparse=False, trainable_rows=ROWS)
    table(torch.zeros(2, dtype=torch.int64, device="meta")).sum().backward()
    assert table.weight.grad.is_meta
    assert table.weight.grad.shape == (V, D)


def test_rows_chosen_in_inference_mode_train_outside_of_it() -> None:
    table = table_of([0])
    with torch.inference_mode():
        table.set_trainable_rows(ROWS)
        table(IDS)
    assert_is_partial(table)
    weight = vectors().requires_grad_()
    torch.func.functional_call(table, {"weight": weight}, IDS).square().sum().backward()
    assert moved_rows(weight.grad) == ROWS
