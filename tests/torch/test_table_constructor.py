"""The table is made as a plain embedding is, and shown as one."""

from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_same_bits
from small_tables import IDS, ROWS, D, V, table_of, vectors
from torch import nn

from partial_embedding.errors import InputError
from partial_embedding.torch import PartialEmbedding, PartialEmbeddingBag
from partial_embedding.torch.row_gradient import RowGradient

CONSTRUCTOR_OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "padding_idx": {"padding_idx": 2},
    "padding_idx_from_the_end": {"padding_idx": -1},
    "max_norm": {"max_norm": 0.5},
    "max_norm_norm_type": {"max_norm": 0.5, "norm_type": 1.0},
    "scale_grad_by_freq": {"scale_grad_by_freq": True},
    "everything": {"padding_idx": 2, "max_norm": 0.5, "norm_type": 1.0, "scale_grad_by_freq": True},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "device": {"device": "cpu"},
    "_weight": {"_weight": torch.full((V, D), 0.5)},
    "_freeze": {"_weight": torch.full((V, D), 0.5), "_freeze": True},
}


def compare_with_plain(table: nn.Module, plain: nn.Module) -> None:
    ids = IDS
    assert_same_bits(table.weight, plain.weight, "the weight")
    assert table.weight.requires_grad == plain.weight.requires_grad
    assert_same_bits(table(ids), plain(ids), "the output")
    assert_same_bits(table.weight, plain.weight, "the weight after a lookup")
    for name in type(plain).__constants__:
        assert getattr(table, name) == getattr(plain, name), name
    if plain.weight.requires_grad:
        up = torch.randn(plain(ids).shape, generator=torch.Generator().manual_seed(2))
        for module in (table, plain):
            module.weight.grad = None
            module(ids).backward(up.to(module.weight.dtype))
        assert isinstance(table.weight.grad, RowGradient) == plain.weight.grad.is_sparse
        ours, theirs = table.weight.grad.to_dense(), plain.weight.grad.to_dense()
        assert_same_bits(ours, theirs, "the gradient")


@pytest.mark.parametrize("name", CONSTRUCTOR_OPTIONS)
def test_constructor_takes_the_arguments_of_a_plain_embedding(name: str) -> None:
    made = []
    for kind in (PartialEmbedding, nn.Embedding):
        torch.manual_seed(1)
        made.append(kind(V, D, **{"sparse": False, **CONSTRUCTOR_OPTIONS[name]}))
    compare_with_plain(*made)


def test_constructor_takes_positional_arguments_in_the_parent_order() -> None:
    torch.manual_seed(1)
    table = PartialEmbedding(V, D, 2, 0.5, 1.0, True, False)
    torch.manual_seed(1)
    compare_with_plain(table, nn.Embedding(V, D, 2, 0.5, 1.0, True, False))


def test_sparse_gradients_are_the_default() -> None:
    assert PartialEmbedding(V, D).sparse
    assert PartialEmbedding.from_pretrained(vectors()).sparse
    assert PartialEmbeddingBag(V, D).sparse
    assert PartialEmbeddingBag.from_pretrained(vectors()).sparse


FROM_PRETRAINED_OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {"freeze": False},
    "freeze": {"freeze": True},
    "padding_idx": {"freeze": False, "padding_idx": 2},
    "max_norm": {"freeze": False, "max_norm": 0.5},
    "norm_type": {"freeze": False, "max_norm": 0.5, "norm_type": 1.0},
    "scale_grad_by_freq": {"freeze": False, "scale_grad_by_freq": True},
    "sparse": {"freeze": False, "sparse": True},
    "everything": {
        "freeze": True,
        "padding_idx": 1,
        "max_norm": 9.0,
        "norm_type": 1.0,
        "scale_grad_by_freq": True,
    },
}


OF_BAGS: dict[str, dict[str, Any]] = {
    "sum": {"freeze": False, "mode": "sum"},
    "max": {"freeze": False, "mode": "max"},
    "include_last_offset": {"freeze": False, "include_last_offset": True},
}
OF_EACH = [
    *((PartialEmbedding, nn.Embedding, name) for name in FROM_PRETRAINED_OPTIONS),
    *((PartialEmbeddingBag, nn.EmbeddingBag, name) for name in FROM_PRETRAINED_OPTIONS | OF_BAGS),
]


@pytest.mark.parametrize(("ours", "theirs", "name"), OF_EACH)
def test_from_pretrained_takes_the_options_of_the_plain_module(
    ours: Any, theirs: Any, name: str
) -> None:
    options = {"sparse": False, **(FROM_PRETRAINED_OPTIONS | OF_BAGS)[name]}
    compare_with_plain(*(kind.from_pretrained(vectors(), **options) for kind in (ours, theirs)))


def test_from_pretrained_trains_by_default_and_shares_memory() -> None:
    start = vectors()
    table = PartialEmbedding.from_pretrained(start, trainable_rows=ROWS)
    assert table.weight.requires_grad
    assert table.weight.data_ptr() == start.data_ptr()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_from_pretrained_takes_integers_that_are_frozen(dtype: torch.dtype) -> None:
    start = torch.arange(V * D).view(V, D).to(dtype)
    table = PartialEmbedding.from_pretrained(start, freeze=True)
    assert table(IDS).tolist() == start[IDS].tolist()


@pytest.mark.parametrize("kind", [PartialEmbedding, PartialEmbeddingBag])
def test_from_pretrained_refuses_what_is_no_tensor(kind: Any) -> None:
    with pytest.raises(InputError, match=r"tensor. Received a ndarray. Pass torch.as_tensor"):
        kind.from_pretrained(np.ones((3, 2), np.float32))
    assert kind.from_pretrained(torch.as_tensor(np.ones((3, 2), np.float32))).weight.shape == (3, 2)


@pytest.mark.parametrize("kind", [PartialEmbedding, PartialEmbeddingBag])
def test_from_pretrained_refuses_what_is_not_a_matrix(kind: Any) -> None:
    with pytest.raises(InputError, match=r"matrix.*\(2, 3, 4\)"):
        kind.from_pretrained(torch.zeros(2, 3, 4))


def test_repr_is_that_of_the_plain_module_and_the_number_of_rows() -> None:
    for kind, plain in ((PartialEmbedding, nn.Embedding), (PartialEmbeddingBag, nn.EmbeddingBag)):
        expected = "Partial" + repr(plain(V, D, padding_idx=0, sparse=True))
        made = repr(kind(V, D, padding_idx=0, trainable_rows=ROWS))
        assert made == expected.removesuffix(")") + ", trainable_rows=2)"
    assert repr(table_of("all")).endswith(", trainable_rows=7)")
    assert repr(table_of("all", padding_idx=0)).endswith(", trainable_rows=6)")
