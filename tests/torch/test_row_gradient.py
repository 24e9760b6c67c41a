"""A gradient that holds rows alone is to every tool what the dense one of a plain layer is."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_same_bits, through_a_file
from torch import Tensor, nn

from partial_embedding.torch import PartialEmbedding, PartialEmbeddingBag, PartialLinear
from partial_embedding.torch.row_gradient import RowGradient

V, D = 20, 4
IDS = torch.tensor([3, 7, 3, 1, 19, 7, 7])


def pair(rows: object = "all", passes: int = 1, **options: Any) -> tuple[Any, nn.Embedding]:
    """A table, and a plain one with a dense gradient, after the same backward passes."""
    table = PartialEmbedding(V, D, trainable_rows=rows, **options)
    plain = nn.Embedding(V, D, **options)
    plain.load_state_dict(table.state_dict())
    generator = torch.Generator().manual_seed(1)
    for i in range(passes):
        ids = (IDS + 3 * i) % V
        up = torch.randn(len(ids), D, generator=generator)
        for module in (table, plain):
            module(ids).backward(up.to(module.weight.dtype))
    return table, plain


def rows_of(*gradients: Tensor | None) -> bool:
    return all(isinstance(grad, RowGradient) and grad.entries() is not None for grad in gradients)


@pytest.mark.parametrize("passes", [1, 2, 5])
def test_it_is_the_dense_gradient_bit_for_bit(passes: int) -> None:
    table, plain = pair(passes=passes)
    assert rows_of(table.weight.grad)
    assert_same_bits(table.weight.grad.to_dense(), plain.weight.grad, "the gradient")


# What is done to a gradient in place, by the rows that it holds.
BY_ROW: dict[str, Callable[[Tensor], object]] = {
    "mul_": lambda grad: grad.mul_(0.3),
    "mul_by_a_tensor": lambda grad: grad.mul_(torch.tensor(0.3)),
    "div_": lambda grad: grad.div_(3.0),
    "neg_": lambda grad: grad.neg_(),
    "clamp_": lambda grad: grad.clamp_(-0.2, 0.1),
    "zero_": lambda grad: grad.zero_(),
    "add_itself": lambda grad: grad.add_(grad.clone()),
    "foreach_mul_": lambda grad: torch._foreach_mul_([grad], 0.3),
    "foreach_div_": lambda grad: torch._foreach_div_([grad], 3.0),
    "foreach_zero_": lambda grad: torch._foreach_zero_([grad]),
    "through_a_detached": lambda grad: grad.detach().mul_(0.3),
    "through_data": lambda grad: grad.data.mul_(0.3),
    "share_memory_": lambda grad: grad.share_memory_(),
    "values": lambda grad: (grad.values() if isinstance(grad, RowGradient) else grad).mul_(0.3),
}
# What needs all rows, and what only the dense tensor can say.
ON_DENSE: dict[str, Callable[[Tensor], object]] = {
    "add_a_number": lambda grad: grad.add_(1.0),
    "set_a_row": lambda grad: grad.__setitem__(5, 7.0),
    "through_a_view": lambda grad: grad.view(-1)[10:20].fill_(2.0),
    "mul_by_infinity": lambda grad: grad.mul_(float("inf")),
    "div_by_zero": lambda grad: grad.div_(0.0),
    "div_by_itself": lambda grad: grad.div_(grad.clone()),
    "clamp_above_zero": lambda grad: grad.clamp_(min=0.1),
    "add_noise": lambda grad: grad.add_(torch.ones(V, D)),
    "copy_": lambda grad: grad.copy_(torch.ones(V, D)),
    "mul_by_a_matrix": lambda grad: grad.mul_(torch.full((V, D), 0.5)),
    "sign_": lambda grad: grad.sign_(),
    # Past torch's functions, to memory that a gradient of rows does not have.
    "apply_": lambda grad: grad.apply_(lambda x: x + 1),
    "through_numpy": lambda grad: grad.numpy().__setitem__(5, 7.0),
    "through_dlpack": lambda grad: torch.from_dlpack(grad).fill_(2.0),
}


@pytest.mark.parametrize("name", [*BY_ROW, *ON_DENSE])
@pytest.mark.parametrize("passes", [1, 2])
def test_what_writes_into_it_does_what_it_does_to_the_dense_one(name: str, passes: int) -> None:
    table, plain = pair(passes=passes)
    for module in (table, plain):
        (BY_ROW | ON_DENSE)[name](module.weight.grad)
    assert rows_of(table.weight.grad) == (name in BY_ROW)
    # Not by bits: a negated zero differs.
    torch.testing.assert_close(
        table.weight.grad.to_dense(), plain.weight.grad, rtol=0, atol=0, equal_nan=True
    )


READ: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda grad: grad.sum(),
    "norm": lambda grad: grad.norm(),
    "norm_of_rows": lambda grad: grad.norm(dim=1),
    "smallest_norm": lambda grad: torch.linalg.vector_norm(grad, -float("inf")),
    "isfinite": lambda grad: torch.isfinite(grad).all(),
    "isnan": lambda grad: grad.isnan(),
    "row": lambda grad: grad[3],
    "matrix_product": lambda grad: grad @ torch.ones(D, 2),
    "times_two": lambda grad: 2 * grad,
    "divides": lambda grad: torch.ones(V, D) / grad,
    "equal": lambda grad: grad == 0,
    "half": lambda grad: grad.half(),
    "to": lambda grad: grad.to(torch.float64),
    "clone": lambda grad: grad.clone(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda grad: pickle.loads(pickle.dumps(grad)),
    "added": lambda grad: grad + torch.ones(V, D),
    "numpy": lambda grad: torch.from_numpy(grad.numpy()),
    "tolist": lambda grad: torch.tensor(grad.tolist()),
    "sparse": lambda grad: grad.to_sparse(),
    "zeros_like": torch.zeros_like,
    "histogram": lambda grad: torch.histc(grad, 5),
}


@pytest.mark.parametrize("name", READ)
def test_what_reads_it_reads_the_dense_one(name: str) -> None:
    table, plain = pair(passes=2)
    answers = [READ[name](module.weight.grad) for module in (table, plain)]
    ours, theirs = (answer.to_dense() for answer in answers)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)


def test_a_model_with_gradients_moves_to_memory_that_processes_share() -> None:
    table, plain = pair(passes=2)
    table.share_memory()
    assert table.weight.is_shared()
    assert table.weight.grad.is_shared()
    assert rows_of(table.weight.grad)
    assert_same_bits(table.weight.grad.to_dense(), plain.weight.grad, "the gradient")


def test_copies_are_gradients_of_rows_and_share_nothing() -> None:
    table, plain = pair(passes=2)
    grad = table.weight.grad
    for made in (grad.clone(), copy.deepcopy(grad), grad.to(torch.float64)):
        assert rows_of(made)
        made.mul_(0)
    assert_same_bits(grad.to_dense(), plain.weight.grad, "the gradient")
    assert repr(grad) == "RowGradient(8 of 20 rows, 4 columns)"


def test_it_is_saved_and_loaded_with_weights_alone() -> None:
    table, plain = pair()
    loaded = through_a_file({"grad": table.weight.grad}, weights_only=True)["grad"]
    assert_same_bits(loaded.to_dense(), plain.weight.grad, "the gradient")


def test_code_for_sparse_gradients_gets_its_answers() -> None:
    table, plain = pair()
    grad, dense = table.weight.grad, plain.weight.grad
    assert not grad.is_sparse
    assert grad.indices().tolist() == [[1, 3, 7, 19]]
    assert_same_bits(grad.values(), dense[[1, 3, 7, 19]], "the values")
    assert grad.coalesce().is_coalesced()
    assert_same_bits(grad.coalesce().to_dense(), dense, "the gradient")
    assert grad._nnz() == 4


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("order", [2.0, 1.0, float("inf"), 0.5])
def test_torch_clips_it_by_norm(foreach: bool | None, order: float) -> None:
    table, plain = pair(passes=2)
    norms = [
        nn.utils.clip_grad_norm_([module.weight], 0.5, order, foreach=foreach)
        for module in (table, plain)
    ]
    torch.testing.assert_close(*norms)
    assert rows_of(table.weight.grad)
    torch.testing.assert_close(table.weight.grad.to_dense(), plain.weight.grad)


def test_the_norm_of_touched_rows_is_that_of_their_table_bit_for_bit() -> None:
    rows = [1, 3, 7, 19]
    table = PartialEmbedding(V, D, trainable_rows=rows)
    small = nn.Embedding.from_pretrained(table.weight.detach()[rows].clone(), freeze=False)
    up = torch.randn(len(IDS), D, generator=torch.Generator().manual_seed(3))
    table(IDS).backward(up)
    small(torch.searchsorted(torch.tensor(rows), IDS)).backward(up)
    norms = [nn.utils.clip_grad_norm_(module.weight, 0.5) for module in (table, small)]
    assert torch.equal(*norms)
    assert_same_bits(table.weight.grad[rows], small.weight.grad, "the clipped gradient")


@pytest.mark.parametrize("order", [2.0, float("inf")])
def test_a_batch_without_a_trainable_row_has_a_norm(order: float) -> None:
    table = PartialEmbedding(V, D, trainable_rows=[2])
    table(IDS).sum().backward()
    assert rows_of(table.weight.grad)
    assert nn.utils.clip_grad_norm_(table.weight, 1.0, order) == 0
    assert nn.utils.get_total_norm([table.weight.grad], order) == 0


@pytest.mark.parametrize("rows", ["all", range(1, V - 1)], ids=["all", "some"])
@pytest.mark.parametrize("partial_head", [False, True])
def test_the_padding_row_counts_in_no_norm(rows: object, partial_head: bool) -> None:
    table = PartialEmbedding(V, D, padding_idx=0, trainable_rows=rows)
    head = PartialLinear(D, V, bias=False) if partial_head else nn.Linear(D, V, bias=False)
    head.weight = table.weight
    scores = head(table(torch.tensor([3, 7])))
    (scores * torch.cat([torch.full((1,), 100.0), torch.ones(V - 1)])).sum().backward()
    grad = table.weight.grad.to_dense().clone()
    assert not grad[0].any()
    assert grad[3].any()
    torch.testing.assert_close(nn.utils.clip_grad_norm_(table.weight, 1.0), grad.norm())


@pytest.mark.parametrize("to_none", [True, False])
def test_zeroing_it_leaves_what_it_leaves_of_a_dense_one(to_none: bool) -> None:
    table, plain = pair()
    for module in (table, plain):
        torch.optim.AdamW(module.parameters()).zero_grad(set_to_none=to_none)
    if to_none:
        assert table.weight.grad is None
        return
    assert not table.weight.grad.to_dense().any()
    for module in (table, plain):
        module(IDS).sum().backward()
    assert rows_of(table.weight.grad)
    assert_same_bits(table.weight.grad.to_dense(), plain.weight.grad, "the gradient")


def test_casting_the_module_casts_it() -> None:
    table, plain = pair()
    for module in (table, plain):
        module.to(torch.float64)
    assert table.weight.grad.dtype == torch.float64
    assert_same_bits(table.weight.grad.to_dense(), plain.weight.grad, "the gradient")


def test_a_dense_gradient_may_follow_and_precede() -> None:
    table, plain = pair()
    for module in (table, plain):
        (module.weight * 2).sum().backward()
        module(IDS).sum().backward()
    assert_same_bits(table.weight.grad.to_dense(), plain.weight.grad, "the gradient")


@pytest.mark.parametrize("kind", ["table", "bag", "head"])
def test_autograd_grad_gives_rows_to_code_for_dense_gradients(kind: str) -> None:
    make = {
        "table": lambda: (PartialEmbedding(V, D, trainable_rows=[1, 3]), IDS),
        "bag": lambda: (PartialEmbeddingBag(V, D, trainable_rows=[1, 3]), IDS.view(1, -1)),
        "head": lambda: (PartialLinear(D, V, bias=False, trainable_rows=[1, 3]), torch.ones(2, D)),
    }[kind]
    module, given = make()
    plain = {"table": nn.Embedding, "bag": nn.EmbeddingBag, "head": nn.Linear}[kind](
        *((D, V, False) if kind == "head" else (V, D))
    )
    plain.load_state_dict(module.state_dict())
    (grad,) = torch.autograd.grad(module(given).pow(3).sum(), module.weight)
    (expected,) = torch.autograd.grad(plain(given).pow(3).sum(), plain.weight)
    assert isinstance(grad, RowGradient)
    frozen = [row for row in range(V) if row not in (1, 3)]
    expected[frozen] = 0
    flat = torch.cat([grad.flatten(), grad.view(-1), (grad * 2).reshape(-1)])
    wanted = torch.cat([expected.flatten(), expected.view(-1), (expected * 2).reshape(-1)])
    assert_same_bits(flat, wanted, "what is made of the gradient")
    assert torch.dot(grad.flatten(), expected.flatten()) > 0
    assert_same_bits(module.weight - 0.1 * grad, plain.weight - 0.1 * expected, "an inner step")


def by_an_inner_step(module: Any, loss: Tensor) -> Tensor:
    (first,) = torch.autograd.grad(loss, module.weight, create_graph=True)
    (module.weight - 0.1 * first)[IDS].pow(2).sum().backward()
    return first


def by_a_gradient_s_gradient(module: Any, loss: Tensor) -> Tensor:
    (first,) = torch.autograd.grad(loss, module.weight, create_graph=True)
    first.to_dense().pow(2).sum().backward()
    return first


def by_backward_twice(module: Any, loss: Tensor) -> Tensor:
    loss.backward(create_graph=True)
    first, module.weight.grad = module.weight.grad, None
    first.pow(2).sum().backward()
    return first


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("options", [{}, {"sparse": False}], ids=["sparse", "dense"])
@pytest.mark.parametrize("way", [by_an_inner_step, by_a_gradient_s_gradient, by_backward_twice])
def test_second_derivatives_are_those_of_a_plain_layer(
    way: Callable[..., Tensor], options: dict[str, Any]
) -> None:
    table, plain = pair(rows=[1, 3], **options)
    derivatives = []
    for module in (table, plain):
        module.weight.grad = None
        first = way(module, module(IDS).pow(3).sum())
        derivatives.append([first.to_dense(), module.weight.grad.to_dense()])
    for ours, theirs in zip(*derivatives, strict=True):
        torch.testing.assert_close(ours[[1, 3]], theirs[[1, 3]])
        assert not ours[[0, 7, 19]].any()


IMPLEMENTATIONS: list[dict[str, bool]] = [
    {},
    {"foreach": False},
    {"foreach": True},
    {"fused": True},
]
STOCK: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "SGD_momentum": lambda p, **o: torch.optim.SGD(p, momentum=0.9, **o),
    "SGD_decay": lambda p, **o: torch.optim.SGD(p, weight_decay=0.1, **o),
    "AdamW": torch.optim.AdamW,
    "Adagrad": torch.optim.Adagrad,
    "RMSprop": torch.optim.RMSprop,
    "NAdam": torch.optim.NAdam,
    "Rprop": torch.optim.Rprop,
    "Adafactor": torch.optim.Adafactor,
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("closure", [False, True], ids=["plain", "closure"])
def test_a_stock_optimizer_steps_on_it_as_on_the_dense_one(
    name: str, implementation: dict[str, bool], closure: bool
) -> None:
    table, plain = pair()
    try:
        optimizers = [
            STOCK[name](module.parameters(), lr=0.1, **implementation) for module in (table, plain)
        ]
    except (TypeError, RuntimeError):
        pytest.skip("the optimizer has no such implementation")
    generator = torch.Generator().manual_seed(2)
    for step in range(5):
        ids = torch.randint(V, (2, 9), generator=generator)
        up = torch.randn(2, 9, D, generator=generator)
        for module, optimizer in zip((table, plain), optimizers, strict=True):

            def loss(module: Any = module, optimizer: Any = optimizer, step: int = step) -> Tensor:
                optimizer.zero_grad(set_to_none=step % 2 == 0)
                for one, its in zip(ids, up, strict=True):  # noqa: B023
                    (module(one) * its).sum().backward()
                if step > 1:
                    nn.utils.clip_grad_value_(module.weight, 0.5)
                    module.weight.grad.mul_(0.7)
                return torch.zeros(())

            if closure:
                optimizer.step(loss)
            else:
                loss()
                optimizer.step()
        assert_same_bits(table.weight, plain.weight, f"the table after step {step}")
    assert "_rowwise" not in vars(optimizers[0])


def test_torch_compile_runs_beside_a_gradient_of_rows() -> None:
    table, plain = pair(rows=[1, 3, 7])
    compiled = torch.compile(table, backend="aot_eager", fullgraph=True)
    for ids in (IDS, IDS[:3], torch.arange(V)):  # the last ones compile anew, beside a gradient
        compiled(ids).sum().backward()
        plain(ids).sum().backward()
    rows = torch.tensor([1, 3, 7])
    assert rows_of(table.weight.grad)
    assert_same_bits(table.weight.grad.to_dense()[rows], plain.weight.grad[rows], "the gradient")


def test_gradients_of_two_dtypes_add_up_as_dense_ones() -> None:
    (one, plain), (other, other_plain) = pair(), pair(dtype=torch.float64)
    total, expected = (
        one.weight.grad + other.weight.grad,
        plain.weight.grad + other_plain.weight.grad,
    )
    assert total.dtype == expected.dtype
    torch.testing.assert_close(total.to_dense(), expected)
    one.weight.grad.add_(other.weight.grad)
    plain.weight.grad.add_(other_plain.weight.grad)
    assert one.weight.grad.dtype == one.weight.grad.to_dense().dtype == torch.float32
    torch.testing.assert_close(one.weight.grad.to_dense(), plain.weight.grad)
    torch.optim.AdamW(one.parameters()).step()
