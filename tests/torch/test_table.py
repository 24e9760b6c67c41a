"""The table as a module: its hook, its copies and casts, and everything torch does to modules."""

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from oracle import assert_same_bits, same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from partial_embedding.errors import InputError
from partial_embedding.torch import PartialEmbedding, PartialEmbeddingBag, rowwise

V, D = 7, 3
ROWS = [1, 4]
FROZEN = [0, 2, 3, 5, 6]
# Every row at least once, with duplicates.
IDS = torch.tensor([[0, 1, 2, 3, 4], [4, 4, 5, 6, 0]])

SPARSE_AND_DENSE = pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])


def vectors(rows: int = V, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(5)).to(dtype)


def table_of(rows: Any = ROWS, sparse: bool = False, **options: Any) -> PartialEmbedding:
    start = vectors(dtype=options.pop("dtype", torch.float32))
    return PartialEmbedding.from_pretrained(start, sparse=sparse, trainable_rows=rows, **options)


def gradient(table: nn.Module, ids: Tensor = IDS) -> Tensor:
    """The gradient of `weight` for a loss under which no row's gradient is zero, dense."""
    table.weight.grad = None
    out = table(ids)
    (out.square() + out).sum().backward()
    grad: Tensor = table.weight.grad
    return grad.to_dense()


def moved_rows(grad: Tensor) -> list[int]:
    return grad.ne(0).any(1).nonzero().flatten().tolist()


def assert_is_partial(table: nn.Module, rows: list[int] = ROWS) -> None:
    """Exactly `rows` train: the table says so, and its gradient too."""
    assert table.trainable_rows.tolist() == rows
    assert moved_rows(gradient(table)) == rows


def assert_is_masked_past_the_module(table: nn.Module) -> None:
    """As PEFT does it: the weight is looked up, and `forward` has no chance to mend anything."""
    table.weight.grad = None
    torch.nn.functional.embedding(IDS, table.weight).square().sum().backward()
    assert moved_rows(table.weight.grad) == ROWS


# The gradient hook


def test_hook_drops_frozen_ids_from_a_sparse_gradient() -> None:
    table = table_of(sparse=True)
    table(IDS).sum().backward()
    grad = table.weight.grad
    assert grad.layout == torch.sparse_coo
    # Nothing is left of frozen rows, not even zeros, and duplicates are not summed yet.
    assert grad._indices().tolist() == [[1, 4, 4, 4]]
    assert grad._values().tolist() == [[1.0] * D] * 4
    assert grad.shape == (V, D)


def test_hook_leaves_an_empty_sparse_gradient_where_no_looked_up_row_trains() -> None:
    table = table_of(sparse=True)
    table(torch.tensor([0, 2])).sum().backward()
    assert table.weight.grad._nnz() == 0
    assert table.weight.grad.shape == (V, D)


def test_hook_zeroes_frozen_rows_of_a_dense_gradient() -> None:
    table, plain = table_of(), nn.Embedding.from_pretrained(vectors(), freeze=False)
    expected = gradient(plain)
    expected[FROZEN] = 0.0  # selected, so that the sign of zero is known too
    assert_same_bits(gradient(table), expected, "the gradient")


@SPARSE_AND_DENSE
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_hook_keeps_values_that_are_not_finite_out_of_frozen_rows(
    sparse: bool, value: float
) -> None:
    table = table_of(sparse=sparse)
    up = torch.ones(*IDS.shape, D)
    up[0, 2] = value  # row 2 is frozen
    up[0, 1] = value  # row 1 trains, and is told the truth
    table(IDS).backward(up)
    grad = table.weight.grad.to_dense()
    assert_same_bits(grad[FROZEN], torch.zeros(len(FROZEN), D), "frozen rows of the gradient")
    assert not grad[1].isfinite().any()
    assert grad[4].tolist() == [3.0] * D


@SPARSE_AND_DENSE
def test_hook_is_idle_while_every_row_trains(sparse: bool) -> None:
    table = table_of("all", sparse=sparse)
    plain = nn.Embedding.from_pretrained(vectors(), freeze=False, sparse=sparse)
    table(IDS).sum().backward()
    plain(IDS).sum().backward()
    assert table.weight.grad.layout == plain.weight.grad.layout
    assert_same_bits(table.weight.grad.to_dense(), plain.weight.grad.to_dense(), "the gradient")
    assert table._row_set is None  # no bookkeeping at all


def test_hook_sees_rows_as_they_are_when_the_gradient_comes() -> None:
    table = table_of()
    loss = table(IDS).sum()
    table.set_trainable_rows([2])
    loss.backward()
    assert moved_rows(table.weight.grad) == [2]


def test_hook_works_under_grad_of_grad() -> None:
    table = table_of()
    (grad,) = torch.autograd.grad(table(IDS).pow(3).sum(), table.weight, create_graph=True)
    assert moved_rows(grad) == ROWS
    grad.square().sum().backward()
    assert moved_rows(table.weight.grad) == ROWS


@pytest.mark.parametrize("kind", [PartialEmbedding, PartialEmbeddingBag])
def test_module_and_hook_are_freed_together(kind: type[nn.Module]) -> None:
    table = kind(V, D, trainable_rows=ROWS, sparse=False)
    weight = table.weight
    owner = next(iter(weight._backward_hooks.values())).table
    assert owner() is table
    gc.disable()
    try:
        del table
        assert owner() is None  # by reference count alone: there is no cycle
    finally:
        gc.enable()
    # What is left on a weight that outlives its module does nothing.
    (weight * 2).sum().backward()
    assert weight.grad.tolist() == [[2.0] * D] * V


def test_replaced_weight_keeps_no_hook_of_its_old_table() -> None:
    table = table_of()
    old = table.weight
    table.weight = nn.Parameter(vectors())
    (old * 2).sum().backward()
    assert moved_rows(old.grad) == list(range(V))


# Constructor, from_pretrained, repr


CONSTRUCTOR_OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "padding_idx": {"padding_idx": 2},
    "padding_idx_from_the_end": {"padding_idx": -1},
    "max_norm": {"max_norm": 0.5},
    "max_norm_norm_type": {"max_norm": 0.5, "norm_type": 1.0},
    "scale_grad_by_freq": {"scale_grad_by_freq": True},
    "everything": {
        "padding_idx": 2,
        "max_norm": 0.5,
        "norm_type": 1.0,
        "scale_grad_by_freq": True,
    },
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
    names = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "sparse")
    for name in (*names, "scale_grad_by_freq"):
        assert getattr(table, name) == getattr(plain, name), name
    if plain.weight.requires_grad:
        up = torch.randn(*ids.shape, D, generator=torch.Generator().manual_seed(2))
        for module in (table, plain):
            module.weight.grad = None
            module(ids).backward(up.to(module.weight.dtype))
        assert table.weight.grad.layout == plain.weight.grad.layout
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


@pytest.mark.parametrize("name", FROM_PRETRAINED_OPTIONS)
def test_from_pretrained_takes_the_options_of_a_plain_embedding(name: str) -> None:
    made = [
        kind.from_pretrained(vectors(), **{"sparse": False, **FROM_PRETRAINED_OPTIONS[name]})
        for kind in (PartialEmbedding, nn.Embedding)
    ]
    compare_with_plain(*made)


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
def test_from_pretrained_refuses_what_is_not_a_matrix(kind: Any) -> None:
    with pytest.raises(InputError, match=r"matrix.*\(2, 3, 4\)"):
        kind.from_pretrained(torch.zeros(2, 3, 4))


def test_repr_is_that_of_a_plain_embedding_and_the_number_of_rows() -> None:
    table = table_of(padding_idx=0)
    plain = nn.Embedding.from_pretrained(vectors(), padding_idx=0)
    expected = repr(plain).replace("Embedding(", "PartialEmbedding(")
    assert repr(table) == expected.removesuffix(")") + ", trainable_rows=2)"
    assert repr(table_of("all")).endswith(", trainable_rows=7)")
    assert repr(table_of("all", padding_idx=0)).endswith(", trainable_rows=6)")


def test_repr_makes_no_bookkeeping() -> None:
    table = table_of("all")
    repr(table)
    assert table._row_set is None


# Choosing rows


NAMES_OF_ROWS: dict[str, tuple[Any, list[int]]] = {
    "all": ("all", [0, 1, 2, 3, 4, 5, 6]),
    "none": ("none", []),
    "list_out_of_order": ([4, 1], [1, 4]),
    "tensor": (torch.tensor([4, 1]), [1, 4]),
    "int32_tensor": (torch.tensor([1], dtype=torch.int32), [1]),
    "mask_tensor": (torch.arange(V) % 2 == 1, [1, 3, 5]),
    "mask_list": ([False, True, False, False, True, False, False], [1, 4]),
    "range": (range(2, 5), [2, 3, 4]),
    "slice_from_the_end": (slice(-2, None), [5, 6]),
    "generator": ((i for i in (3, 2)), [2, 3]),
}


@pytest.mark.parametrize("name", NAMES_OF_ROWS)
def test_rows_are_named_in_every_way(name: str) -> None:
    named, rows = NAMES_OF_ROWS[name]
    table = table_of([0])
    table.set_trainable_rows(named)
    assert table.trainable_rows.dtype == torch.int64
    assert_is_partial(table, rows)


def test_rows_are_unfrozen_and_frozen() -> None:
    table = table_of([1])
    table.unfreeze_rows([4, 1])
    assert_is_partial(table, [1, 4])
    table.unfreeze_rows(range(3))
    assert_is_partial(table, [0, 1, 2, 4])
    table.freeze_rows([1, 3])
    assert_is_partial(table, [0, 2, 4])
    table.freeze_rows("all")
    assert_is_partial(table, [])
    table.unfreeze_rows("all")
    assert_is_partial(table, list(range(V)))
    table.set_trainable_rows([6])
    assert_is_partial(table, [6])


def test_rows_that_join_together_are_a_cohort() -> None:
    table = table_of([1, 4])
    table.unfreeze_rows([2, 4])
    table.set_trainable_rows([0, 1, 2])
    cohorts = [ids.tolist() for ids in table.row_set.cohorts.values()]
    assert cohorts == [[1], [2], [0]]
    assert table.row_set.order.tolist() == [1, 2, 0]
    assert table.row_set.ids.tolist() == [0, 1, 2]


def test_what_is_handed_out_cannot_change_the_rows() -> None:
    table = table_of()
    table.trainable_rows.fill_(0)
    assert_is_partial(table)


@pytest.mark.parametrize("rows", ["all", [2], "none"], ids=str)
@pytest.mark.parametrize("padding", [2, -1])
def test_padding_row_never_trains(rows: Any, padding: int) -> None:
    table = table_of("none", padding_idx=padding)
    row = padding % V
    table.set_trainable_rows(rows)
    table.unfreeze_rows([row, 1])
    assert row not in table.trainable_rows.tolist()
    assert 1 in table.trainable_rows.tolist()
    assert_is_partial(table, table.trainable_rows.tolist())


WRONG_ROWS: dict[str, tuple[Any, str]] = {
    "too_large": ([7], r"\[0, 7\).*7"),
    "negative": ([-1], "-1"),
    "short_mask": (torch.ones(6, dtype=torch.bool), "7.*6"),
    "floats": ([0.5], "integers"),
    "twice": ([3, 3], "3 twice"),
    "a_number": (3, "3"),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_rows_that_do_not_fit_are_refused(name: str) -> None:
    rows, message = WRONG_ROWS[name]
    table = table_of()
    for method in (table.set_trainable_rows, table.unfreeze_rows, table.freeze_rows):
        with pytest.raises(InputError, match=message):
            method(rows)
    with pytest.raises(InputError, match=message):
        PartialEmbedding(V, D, trainable_rows=rows)
    assert_is_partial(table)


# state_dict


@pytest.mark.parametrize("kind", [PartialEmbedding, PartialEmbeddingBag])
def test_state_dict_has_the_keys_of_the_plain_module(kind: type[nn.Module]) -> None:
    table = kind(V, D, trainable_rows=ROWS)
    assert list(table.state_dict()) == ["weight"]
    assert [name for name, _ in table.named_parameters()] == ["weight"]
    assert list(table.named_buffers()) == []
    assert list(table.children()) == []


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_state_dict_loads_strictly_both_ways(assign: bool) -> None:
    plain = nn.Embedding(V, D)
    table = table_of()
    table.load_state_dict(plain.state_dict(), strict=True, assign=assign)
    assert_same_bits(table.weight, plain.weight, "loaded from a plain module")
    assert_is_partial(table)
    other = nn.Embedding(V, D)
    other.load_state_dict(table_of().state_dict(), strict=True, assign=assign)
    assert_same_bits(other.weight, vectors(), "loaded into a plain module")
    assert moved_rows(gradient(other)) == list(range(V))


def test_state_dict_of_a_model_round_trips_through_a_file() -> None:
    model = nn.Sequential(table_of(), nn.Linear(D, 2))
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(model.state_dict(), file)
    file.seek(0)
    plain = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, 2))
    plain.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_same_bits(plain[0].weight, vectors(), "the weight")


# Copies: the hook does not travel with a tensor, so each of these must put it back


def by_deepcopy(table: nn.Module) -> nn.Module:
    return copy.deepcopy(table)


def by_pickle(table: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(table))
    return copied


def by_file(table: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(table, file)
    file.seek(0)
    copied: nn.Module = torch.load(file, weights_only=False)
    return copied


def by_deepcopy_in_a_model(table: nn.Module) -> nn.Module:
    copied: nn.Module = copy.deepcopy(nn.Sequential(table))[0]
    return copied


COPIES = [by_deepcopy, by_pickle, by_file, by_deepcopy_in_a_model]


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
    assert [c.tolist() for c in copied.row_set.cohorts.values()] == [[1], [4]]
    assert_is_partial(copied)
    copied.set_trainable_rows([2])
    assert_is_partial(copied, [2])
    assert_is_partial(table)
    # One hook each: a second one would belong to the other table.
    assert len(copied.weight._backward_hooks) == 1
    assert len(table.weight._backward_hooks) == 1


@pytest.mark.parametrize("copied_by", COPIES)
def test_copies_are_masked_before_their_first_lookup(
    copied_by: Callable[[nn.Module], nn.Module],
) -> None:
    assert_is_masked_past_the_module(copied_by(table_of()))


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


def test_copying_an_optimizer_and_its_model_keeps_the_rows() -> None:
    table = table_of()
    copied = copy.deepcopy({"model": table, "optimizer": torch.optim.AdamW(table.parameters())})
    assert copied["optimizer"].param_groups[0]["params"][0] is copied["model"].weight
    assert_is_partial(copied["model"])


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


def test_shared_memory_holds_the_weight() -> None:
    table = table_of().share_memory()
    assert table.weight.is_shared()
    copied = pickle.loads(pickle.dumps(table))
    assert_is_partial(copied)


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


# Other tensors in the place of the weight


def test_functional_call_with_a_plain_tensor_masks_its_gradient() -> None:
    table = table_of()
    weight = (vectors() * 2).requires_grad_()
    out = torch.func.functional_call(table, {"weight": weight}, IDS)
    assert_same_bits(out, weight[IDS], "the output")
    out.square().sum().backward()
    assert moved_rows(weight.grad) == ROWS
    assert table.weight.grad is None


@SPARSE_AND_DENSE
def test_functional_call_with_all_rows_trainable_equals_a_plain_embedding(sparse: bool) -> None:
    grads = []
    for module in (table_of("all", sparse=sparse), nn.Embedding(V, D, sparse=sparse)):
        weight = vectors().requires_grad_()
        torch.func.functional_call(module, {"weight": weight}, IDS).square().sum().backward()
        grads.append(weight.grad)
    assert grads[0].layout == grads[1].layout
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


def test_functional_call_with_another_parameter_masks_that_one_too() -> None:
    table = table_of()
    other = nn.Parameter(vectors())
    torch.func.functional_call(table, {"weight": other}, IDS).square().sum().backward()
    assert moved_rows(other.grad) == ROWS
    assert_is_partial(table)


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


def test_a_lookup_past_the_module_is_masked_too() -> None:
    # PEFT and tied heads use the weight and never call `forward`.
    table = table_of()
    assert_is_masked_past_the_module(table)
    table.weight.grad = None
    torch.nn.functional.linear(vectors(), table.weight).square().sum().backward()
    assert moved_rows(table.weight.grad) == ROWS


def test_a_parametrized_weight_is_masked_at_the_table() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    table = table_of()
    torch.nn.utils.parametrize.register_parametrization(table, "weight", Doubled())
    table(IDS).square().sum().backward()
    assert moved_rows(table.parametrizations.weight.original.grad) == ROWS


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


# Two tables, one weight


@SPARSE_AND_DENSE
def test_tables_that_share_a_weight_have_the_same_rows(sparse: bool) -> None:
    first, second = table_of([1, 4], sparse=sparse), table_of("all", sparse=sparse)
    second.weight = first.weight
    for table in (first, second):
        assert moved_rows(gradient(table)) == [1, 4]
    second.set_trainable_rows([4, 5])
    for table in (first, second):
        assert_is_partial(table, [4, 5])


def test_rows_that_were_frozen_stay_so_whichever_table_gives_the_weight() -> None:
    first, second = table_of("all"), table_of([1, 4])
    second.weight = first.weight
    assert_is_partial(first, [1, 4])


def test_tables_of_different_rows_are_not_tied() -> None:
    first, second = table_of([1, 4]), table_of([4, 5])
    before = second.weight
    with pytest.raises(InputError, match=r"trains \(1, 4\) and .* trains \(4, 5\)"):
        second.weight = first.weight
    assert second.weight is before
    assert_is_partial(first, [1, 4])
    assert_is_partial(second, [4, 5])


def test_a_table_that_is_untied_keeps_its_rows_and_no_longer_follows() -> None:
    first, second = table_of([1, 4]), table_of()
    second.set_trainable_rows([1, 4])
    second.weight = first.weight
    second.weight = nn.Parameter(vectors())
    first.set_trainable_rows([5])
    assert_is_partial(first, [5])
    assert_is_partial(second, [1, 4])


@pytest.mark.parametrize("dropped", [0, 1])
def test_a_table_that_goes_away_leaves_the_shared_weight_to_the_other(dropped: int) -> None:
    tables = [table_of([1, 4]), table_of([1, 4])]
    tables[1].weight = tables[0].weight
    del tables[dropped]
    assert_is_partial(tables[0], [1, 4])


def test_a_plain_embedding_that_shares_the_weight_is_masked_too() -> None:
    table, plain = table_of(), nn.Embedding(V, D)
    plain.weight = table.weight
    assert moved_rows(gradient(plain)) == ROWS


def test_shared_weights_stay_shared_in_a_deepcopy() -> None:
    first, second = table_of(), table_of()
    second.weight = first.weight
    copied = copy.deepcopy(nn.ModuleList([first, second]))
    assert copied[0].weight is copied[1].weight
    assert copied[0].weight is not first.weight
    copied[0].set_trainable_rows([4, 6])
    assert moved_rows(gradient(copied[1])) == [4, 6]
    assert_is_partial(first)


# torch.compile, gradcheck


COMPILED: dict[str, Callable[[], nn.Module]] = {
    "sparse": lambda: table_of(sparse=True),
    "dense": lambda: table_of(),
    "all_rows": lambda: table_of("all"),
    "no_row": lambda: table_of("none"),
    "max_norm": lambda: table_of("all", max_norm=0.5),
    "padding_idx": lambda: table_of(padding_idx=4),
    "bag_sum": lambda: PartialEmbeddingBag.from_pretrained(
        vectors(), mode="sum", sparse=False, trainable_rows=ROWS
    ),
    "bag_mean": lambda: PartialEmbeddingBag.from_pretrained(
        vectors(), sparse=False, trainable_rows=ROWS
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_tables_have_no_graph_break(name: str) -> None:
    torch._dynamo.reset()
    table = COMPILED[name]()
    expected = gradient(COMPILED[name]())
    # The partitioner and autograd run in full; only the machine code is left out.
    compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(IDS), table(IDS), "the output")
    (compiled(IDS).square() + compiled(IDS)).sum().backward()
    grad = table.weight.grad.to_dense()
    torch.testing.assert_close(grad, expected)
    assert moved_rows(grad) == table.trainable_rows.tolist()


def test_compiled_tables_follow_a_change_of_rows_without_compiling_again() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    table = table_of()
    compiled = torch.compile(table, fullgraph=True, backend=counter)
    for rows in ([1, 4], [2], [0, 3, 6]):
        table.set_trainable_rows(rows)
        table.weight.grad = None
        compiled(IDS).square().sum().backward()
        assert moved_rows(table.weight.grad) == rows
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", [PartialEmbedding, PartialEmbeddingBag])
@pytest.mark.parametrize("rows", [ROWS, "all"], ids=["some_rows", "all_rows"])
def test_gradients_of_trainable_rows_pass_gradcheck(kind: Any, rows: Any) -> None:
    start = vectors(dtype=torch.float64)
    table = kind.from_pretrained(start, sparse=False, trainable_rows=rows)
    ids = table.trainable_rows

    def out(trained: Tensor) -> Tensor:
        weight = start.index_copy(0, ids, trained)
        return torch.func.functional_call(table, {"weight": weight}, IDS).pow(3)

    trained = start[ids].clone().requires_grad_()
    assert torch.autograd.gradcheck(out, (trained,))
    if kind is PartialEmbedding:  # torch has no second derivative of bags
        assert torch.autograd.gradgradcheck(out, (trained,))


def test_gradients_of_the_weight_itself_pass_gradcheck() -> None:
    table = table_of("all", dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda weight: table(IDS).pow(3), (table.weight,))
    assert torch.autograd.gradgradcheck(lambda weight: table(IDS).pow(3), (table.weight,))


# Memory


@contextmanager
def without_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def living_tensors() -> list[Tensor]:
    # By type and not by isinstance, which asks the object itself: weak proxies complain.
    found = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    grads = [t.grad for t in found if t.is_leaf and t.grad is not None]
    return [*found, *grads]


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes by the address of the memory: views of one tensor count once."""
    sizes = {}
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_meta:
            continue
        try:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        except RuntimeError:
            continue  # what the compiler traced with, which has no memory
    return sizes


LARGE, WIDE = 40_000, 16


@pytest.mark.parametrize("lazy", [False, True], ids=["all_rows_of_the_cohorts", "lazy"])
def test_weight_is_the_only_tensor_of_the_size_of_the_vocabulary(lazy: bool) -> None:
    rows = list(range(0, LARGE, 4_000))
    before = storages(living_tensors())
    table = PartialEmbedding(LARGE, WIDE, trainable_rows=rows)
    optimizer = rowwise(torch.optim.AdamW(table.parameters(), weight_decay=0.1), table, lazy=lazy)
    for step in range(3):
        optimizer.zero_grad()
        table(torch.arange(0, LARGE, 100)).sum().backward()
        optimizer.step()
        if step == 1:
            table.unfreeze_rows([1, 2])
    with without_collection():
        new = storages(living_tensors())
    weight = new.pop(table.weight.untyped_storage().data_ptr())
    assert weight == LARGE * WIDE * 4
    sizes = {key: size for key, size in new.items() if key not in before}
    # Neither a copy of the table, nor a gradient of it, nor moments of it.
    assert max(sizes.values()) < weight / WIDE * 2
    # At most 9 bytes for each row, beside what belongs to the few rows that train.
    of_trainable_rows = 40 * (len(rows) + 2) * WIDE + 4_000
    assert 4 * LARGE <= sum(sizes.values()) <= 9 * LARGE + of_trainable_rows
    assert optimizer.state_dict()["param_groups"][0]["rowwise"][0]["num_rows"] == LARGE


def test_bookkeeping_takes_at_most_9_bytes_for_each_row() -> None:
    table = PartialEmbedding(LARGE, 1, trainable_rows=slice(None, None, 2))
    for rows in (range(1, 100), range(5_000), slice(None, None, 3)):
        table.set_trainable_rows(rows)
        gradient(table, torch.arange(9))
        owned = [value for value in vars(table.row_set).values() if isinstance(value, Tensor)]
        by_row = storages([tensor for tensor in owned if len(tensor) == LARGE])
        ids = storages([t for t in owned if len(t) != LARGE] + [*table.row_set.cohorts.values()])
        assert by_row
        assert sum(by_row.values()) <= 9 * LARGE
        # Beyond that there are ids: those of the cohorts, in their order, and sorted.
        assert sum(ids.values()) <= 3 * 8 * len(table.row_set)


def test_a_plain_table_has_no_bookkeeping() -> None:
    table = PartialEmbedding(LARGE, 1)
    gradient(table, torch.arange(9))
    assert not table.has_frozen_rows
    assert table._row_set is None


def test_a_step_of_training_leaves_no_tensor_behind() -> None:
    table = PartialEmbedding(V, D, trainable_rows=ROWS)
    optimizer = rowwise(torch.optim.AdamW(table.parameters()), table)

    def step() -> None:
        optimizer.zero_grad()
        table(IDS).sum().backward()
        optimizer.step()

    counts = []
    with without_collection():
        for _ in range(5):
            step()
            counts.append(len(living_tensors()))
    assert len(set(counts[1:])) == 1, counts


def test_the_frozen_rows_of_a_trained_table_are_untouched() -> None:
    # The whole of it once, as a user would write it; the matrices of cases are elsewhere.
    table = table_of(sparse=True)
    optimizer = rowwise(torch.optim.AdamW(table.parameters(), lr=0.1, weight_decay=0.1), table)
    for _ in range(3):
        optimizer.zero_grad()
        table(IDS).square().sum().backward()
        optimizer.step()
    assert_same_bits(table.weight[FROZEN], vectors()[FROZEN], "frozen rows")
    for row in ROWS:
        assert not same_bits(table.weight[row], vectors()[row])
