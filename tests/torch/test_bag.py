"""Bags: frozen rows keep their bits, the others train as a plain bag over them alone."""

from typing import Any

import pytest
import torch
from cases import SPARSE_AND_DENSE
from oracle import assert_same_bits, rows_that_differ, same_bits
from steps import take_steps
from torch import Tensor, nn

from partial_embedding.errors import InputError
from partial_embedding.torch import PartialEmbeddingBag, rowwise
from partial_embedding.torch.row_gradient import RowGradient

V, D = 9, 4
ROWS = [1, 2, 5, 8]
FROZEN = [0, 3, 4, 6, 7]
STEPS = 4


def vectors(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(V, D, generator=torch.Generator().manual_seed(5)).to(dtype)


def bags_of(rows: Any = ROWS, **options: Any) -> PartialEmbeddingBag:
    bags = PartialEmbeddingBag(V, D, trainable_rows=rows, **options)
    with torch.no_grad():
        bags.weight.copy_(vectors(bags.weight.dtype))
    return bags


def flat_ids(seed: int, rows: list[int]) -> Tensor:
    """Ten ids for three bags, with a duplicate in a bag and one across bags."""
    chosen = torch.randint(len(rows), (10,), generator=torch.Generator().manual_seed(seed))
    chosen[1] = chosen[0]
    chosen[9] = chosen[0]
    return torch.tensor(rows)[chosen]


OFFSETS = torch.tensor([0, 4, 7])

# How bags are given: `forward`'s arguments for ten ids.
SHAPES = {
    "matrix": lambda ids: {"input": ids[:9].view(3, 3)},
    "offsets": lambda ids: {"input": ids, "offsets": OFFSETS},
    "offsets_with_an_empty_bag": lambda ids: {"input": ids, "offsets": torch.tensor([0, 4, 4])},
    "int32": lambda ids: {"input": ids.int(), "offsets": OFFSETS.int()},
    "include_last_offset": lambda ids: {"input": ids, "offsets": torch.tensor([0, 4, 7, 10])},
    "per_sample_weights": lambda ids: {
        "input": ids,
        "offsets": OFFSETS,
        "per_sample_weights": torch.linspace(-1, 2, 10),
    },
    "per_sample_weights_matrix": lambda ids: {
        "input": ids[:9].view(3, 3),
        "per_sample_weights": torch.linspace(-1, 2, 9).view(3, 3),
    },
}


def cases() -> list[Any]:
    made = []
    for mode in ("sum", "mean", "max"):
        for sparse in (True, False):
            for shape in SHAPES:
                if sparse and mode == "max":
                    continue  # torch has no such gradient; refusing it is tested below
                if shape.startswith("per_sample_weights") and mode != "sum":
                    continue  # torch takes weights for sums alone
                layout = "sparse" if sparse else "dense"
                made.append(pytest.param(mode, sparse, shape, id=f"{mode}-{layout}-{shape}"))
    return made


def options_of(mode: str, sparse: bool, shape: str) -> dict[str, Any]:
    last = shape == "include_last_offset"
    return {"mode": mode, "sparse": sparse, "include_last_offset": last}


def loss_of(bags: nn.Module, arguments: dict[str, Tensor], seed: int) -> Tensor:
    out = bags(**arguments)
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    return (out - noise).square().sum()


def backward(bags: nn.Module, arguments: dict[str, Tensor], seed: int) -> None:
    """Give a plain bag its gradient, which is made dense since stock AdamW takes no sparse one.

    The reference must be asked for the same layout, as torch itself rounds the gradient of a mean
    or of weighted ids differently in the two.
    """
    loss_of(bags, arguments, seed).backward()
    if not isinstance(bags, PartialEmbeddingBag):
        bags.weight.grad = bags.weight.grad.to_dense()


def adamw(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.3)


@pytest.mark.parametrize(("mode", "sparse", "shape"), cases())
def test_bags_with_frozen_rows_in_them_train_as_a_plain_bag_that_is_put_back(
    mode: str, sparse: bool, shape: str
) -> None:
    """Trainable and frozen rows share bags, so the reference holds all rows.

    A plain bag over the whole table, whose frozen rows are put back after each step: exact for
    AdamW, under which no row feels another one.
    """
    options = options_of(mode, sparse, shape)
    bags = bags_of(**options)
    optimizer = rowwise(adamw(bags), bags)
    plain = nn.EmbeddingBag.from_pretrained(vectors(), freeze=False, **options)
    reference = adamw(plain)
    everything = list(range(V))
    for step in range(STEPS):
        for module, stepped in ((bags, optimizer), (plain, reference)):
            stepped.zero_grad()
            backward(module, SHAPES[shape](flat_ids(step, everything)), step)
            stepped.step()
        with torch.no_grad():
            plain.weight[FROZEN] = vectors()[FROZEN]
        assert_same_bits(bags.weight[FROZEN], vectors()[FROZEN], f"frozen rows, step {step}")
        assert_same_bits(bags.weight[ROWS], plain.weight[ROWS], f"trainable rows, step {step}")
    assert not same_bits(bags.weight[ROWS], vectors()[ROWS])


@pytest.mark.parametrize("mode", ["sum", "mean"])
@SPARSE_AND_DENSE
@pytest.mark.parametrize("padding", [2, -1])
def test_padding_row_stays_out_of_bags_and_training(mode: str, sparse: bool, padding: int) -> None:
    bags = bags_of("all", mode=mode, sparse=sparse, padding_idx=padding)
    row = padding % V
    optimizer = rowwise(adamw(bags), bags)
    ids = torch.tensor([[row, 0, 1], [row, row, 3]])
    alone = vectors()[[0, 1]]
    expected = alone.sum(0) if mode == "sum" else alone.mean(0)
    torch.testing.assert_close(bags(ids)[0], expected)
    take_steps(optimizer, lambda: bags(ids).square().sum(), STEPS)
    assert row not in bags.trainable_rows.tolist()
    assert_same_bits(bags.weight[row], vectors()[row], "the padding row")
    for touched in (0, 1, 3):
        assert not same_bits(bags.weight[touched], vectors()[touched])


def norms(weight: Tensor, norm_type: float) -> Tensor:
    return torch.linalg.vector_norm(weight.detach(), norm_type, dim=1)


@pytest.mark.parametrize("norm_type", [1.0, 2.0], ids=["norm_1", "norm_2"])
@SPARSE_AND_DENSE
def test_max_norm_scales_trainable_rows_alone(sparse: bool, norm_type: float) -> None:
    limit = 0.5
    assert norms(vectors(), norm_type).min() > limit
    bags = bags_of(mode="sum", sparse=sparse, max_norm=limit, norm_type=norm_type)
    plain = nn.EmbeddingBag.from_pretrained(
        vectors(), mode="sum", max_norm=limit, norm_type=norm_type
    )
    ids = torch.tensor([[0, 1, 2], [3, 5, 5]])
    looked_up = [1, 2, 5]
    with torch.no_grad():
        out = bags.eval()(ids)
        plain(ids)
    assert_same_bits(bags.weight[FROZEN], vectors()[FROZEN], "frozen rows")
    assert_same_bits(bags.weight[looked_up], plain.weight[looked_up], "rows looked up")
    assert_same_bits(bags.weight[8], vectors()[8], "a trainable row not looked up")
    assert norms(bags.weight[looked_up], norm_type).max() <= limit * (1 + 1e-5)
    torch.testing.assert_close(out, bags.weight[ids].sum(1))


@pytest.mark.parametrize(("mode", "sparse", "shape"), cases())
@pytest.mark.parametrize("padding", [None, 2], ids=["no_padding", "padding"])
def test_max_norm_with_other_options_equals_a_plain_bag(
    mode: str, sparse: bool, shape: str, padding: int | None
) -> None:
    # With it the lookup is ours, where without it it is the parent's.
    options = {**options_of(mode, sparse, shape), "max_norm": 0.5, "padding_idx": padding}
    start = vectors()
    if padding is not None:
        start[padding] = 0.0
    modules = [
        kind.from_pretrained(start.clone(), freeze=False, **options)
        for kind in (PartialEmbeddingBag, nn.EmbeddingBag)
    ]
    arguments = SHAPES[shape](flat_ids(1, list(range(V))))
    outs = [module(**arguments) for module in modules]
    assert_same_bits(outs[0], outs[1], "the output")
    for module in modules:
        loss_of(module, arguments, 2).backward()
    grads = [module.weight.grad.to_dense() for module in modules]
    assert isinstance(modules[0].weight.grad, RowGradient) == modules[1].weight.grad.is_sparse
    assert_same_bits(grads[0], grads[1], "the gradient")
    assert_same_bits(modules[0].weight, modules[1].weight, "the weight after a lookup")


@pytest.mark.parametrize(("mode", "sparse", "shape"), cases())
def test_functional_calls_of_bags_equal_those_of_a_plain_bag(
    mode: str, sparse: bool, shape: str
) -> None:
    options = options_of(mode, sparse, shape)
    arguments = SHAPES[shape](flat_ids(1, list(range(V))))
    outs, grads = [], []
    for kind in (PartialEmbeddingBag, nn.EmbeddingBag):
        module = kind.from_pretrained(torch.zeros(V, D), freeze=False, **options)
        if kind is PartialEmbeddingBag:
            module.set_trainable_rows(ROWS)
        weight = vectors().requires_grad_()
        out = torch.func.functional_call(module, {"weight": weight}, (), arguments)
        out.square().sum().backward()
        outs.append(out)
        grads.append(weight.grad.to_dense())
    assert_same_bits(outs[0], outs[1], "the output")
    # Ours is dense here, and torch rounds the two layouts differently.
    torch.testing.assert_close(grads[0][ROWS], grads[1][ROWS])
    assert not grads[0][FROZEN].any()
    assert grads[1][FROZEN].any()


def test_max_norm_under_training_equals_a_plain_bag_over_the_trainable_rows() -> None:
    bags = bags_of(mode="sum", max_norm=0.5)
    optimizer = rowwise(adamw(bags), bags)
    alone = nn.EmbeddingBag(len(ROWS), D, mode="sum", max_norm=0.5)
    with torch.no_grad():
        alone.weight.copy_(vectors()[ROWS])
    reference = adamw(alone)
    positions = torch.tensor([[0, 1, 1], [2, 3, 0]])
    for step in range(STEPS):
        for module, stepped, ids in (
            (bags, optimizer, torch.tensor(ROWS)[positions]),
            (alone, reference, positions),
        ):
            stepped.zero_grad()
            loss_of(module, {"input": ids}, step).backward()
            stepped.step()
        assert_same_bits(bags.weight[ROWS], alone.weight, f"trainable rows, step {step}")
    assert_same_bits(bags.weight[FROZEN], vectors()[FROZEN], "frozen rows")


def test_gradients_of_per_sample_weights_arrive() -> None:
    weights = torch.linspace(-1, 2, 6).view(2, 3)
    ids = torch.tensor([[0, 1, 2], [3, 5, 5]])
    grads = []
    for bags in (
        bags_of(mode="sum"),
        nn.EmbeddingBag.from_pretrained(vectors(), freeze=False, mode="sum"),
    ):
        own = weights.clone().requires_grad_()
        bags(ids, per_sample_weights=own).square().sum().backward()
        grads.append(own.grad)
    assert_same_bits(grads[0], grads[1], "the gradient of the weights")


def test_gradients_scaled_by_frequency_equal_those_of_a_plain_bag() -> None:
    ids = torch.tensor([[1, 1, 1], [2, 0, 5]])
    bags = bags_of(mode="sum", sparse=False, scale_grad_by_freq=True)
    plain = nn.EmbeddingBag.from_pretrained(
        vectors(), freeze=False, mode="sum", scale_grad_by_freq=True
    )
    for module in (bags, plain):
        module(ids).square().sum().backward()
    assert_same_bits(bags.weight.grad[ROWS], plain.weight.grad[ROWS], "trainable rows")
    assert not bags.weight.grad[FROZEN].any()


def test_bags_train_few_or_no_or_all_rows_which_join_and_leave() -> None:
    bags = bags_of([2])
    optimizer = rowwise(adamw(bags), bags)
    for rows in ([2], [1, 2], [1], "none", "all"):
        bags.set_trainable_rows(rows)
        before = bags.weight.detach().clone()
        take_steps(optimizer, lambda: bags(torch.arange(V).view(3, 3)).square().sum())
        assert rows_that_differ(before, bags.weight) == bags.trainable_rows.tolist()


REFUSED: dict[str, dict[str, Any]] = {
    "max": {"mode": "max"},
    "scale_grad_by_freq": {"mode": "sum", "scale_grad_by_freq": True},
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_need_dense_gradients_are_refused_with_sparse_ones(name: str) -> None:
    for make in (
        lambda **options: PartialEmbeddingBag(V, D, **options),
        lambda **options: PartialEmbeddingBag.from_pretrained(vectors(), **options),
    ):
        with pytest.raises(InputError, match=rf"{name}.*sparse=False"):
            make(**REFUSED[name])
        assert not make(**REFUSED[name], sparse=False).sparse
