"""Output heads of which only chosen rows train, alone and tied to an embedding."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import SPARSE_AND_DENSE
from made_tensors import MadeTensors
from oracle import assert_same_bits, rows_that_differ, same_bits, through_a_file
from steps import closure_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from partial_embedding import InputError
from partial_embedding.torch import PartialEmbedding, PartialLinear, detach_rowwise, rowwise
from partial_embedding.torch.row_gradient import RowGradient

V, D = 11, 6
ROWS = [2, 5, 9]
FROZEN = [row for row in range(V) if row not in ROWS]


class Tied(nn.Module):
    """A table and a head of one weight; or the same of plain modules."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(V, D) if plain else PartialEmbedding(V, D, trainable_rows=ROWS)
        self.head = nn.Linear(D, V) if plain else PartialLinear(D, V)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.tanh(self.table(ids)))
        return scores


def pair(bias: bool = True, sparse: bool = True) -> tuple[nn.Linear, PartialLinear]:
    torch.manual_seed(1)
    plain = nn.Linear(D, V, bias=bias)
    head = PartialLinear(D, V, bias=bias, sparse=sparse, trainable_rows=ROWS)
    head.load_state_dict(plain.state_dict())
    return plain, head


def features(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@SPARSE_AND_DENSE
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (2, 3, 4), (0, 3)], ids=str)
def test_scores_and_gradients_are_those_of_a_plain_head(
    shape: tuple[int, ...], bias: bool, sparse: bool, autocast: bool
) -> None:
    plain, head = pair(bias, sparse)
    seen, scores = [], []
    for module in (plain, head):
        x = features(*shape).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            scores.append(module(x))
        scores[-1].backward(torch.ones_like(scores[-1]) * torch.arange(V))
        seen.append(x.grad)
    assert_same_bits(scores[1], scores[0], "scores")
    assert_same_bits(seen[1], seen[0], "the gradient of the features")
    rounding = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-5, "atol": 1e-6}
    for name, parameter in head.named_parameters():
        expected = plain.get_parameter(name).grad
        grad = parameter.grad.to_dense()
        assert grad.dtype == expected.dtype
        torch.testing.assert_close(grad[ROWS], expected[ROWS], **rounding)
        assert not grad[FROZEN].any(), name
    assert isinstance(head.weight.grad, RowGradient) == sparse


def test_a_tied_weight_gets_one_sparse_gradient_from_both() -> None:
    tied, plain = Tied(), Tied(plain=True)
    plain.load_state_dict(tied.state_dict())
    ids = torch.tensor([[1, 2, 2], [5, 0, 10]])
    for model in (tied, plain):
        F.cross_entropy(model(ids).flatten(0, 1), torch.tensor([2, 3, 9, 9, 5, 0])).backward()
    grad = tied.table.weight.grad
    assert isinstance(grad, RowGradient)
    assert set(grad._indices()[0].tolist()) == set(ROWS)
    torch.testing.assert_close(grad.to_dense()[ROWS], plain.table.weight.grad[ROWS])


def test_no_tensor_of_the_size_of_the_weight_is_made() -> None:
    rows, width = 4096, 64
    head = PartialLinear(width, rows, bias=False, trainable_rows=[1, 2, 3])
    with MadeTensors() as made:
        head(torch.randn(5, width)).sum().backward()
    assert 0 < made.largest <= 5 * rows < rows * width


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adafactor", "Adagrad", "LBFGS"])
def test_only_trainable_rows_of_head_and_bias_move(optimizer: str, bias: bool) -> None:
    options = {"SGD": {"momentum": 0.9}, "Adagrad": {}, "LBFGS": {}}.get(optimizer, {})
    if optimizer in ("AdamW", "SGD", "Adafactor"):
        options = {**options, "weight_decay": 0.3}
    _, head = pair(bias)
    before = copy.deepcopy(head.state_dict())
    made = getattr(torch.optim, optimizer)(head.parameters(), lr=0.1, **options)
    rowwise(made, head)
    closure = closure_of(made, lambda: head(features(7)).square().sum())
    for _ in range(3):
        made.step(closure)
    for name, value in head.state_dict().items():
        assert rows_that_differ(before[name], value) == ROWS, name
        assert_same_bits(value[FROZEN], before[name][FROZEN], name)


def test_a_bias_moves_as_a_vector_of_its_own() -> None:
    # Of the K entries: Adafactor would treat a matrix K×1 otherwise.
    for kind in (torch.optim.AdamW, torch.optim.Adafactor):
        _, head = pair()
        alone = nn.Parameter(head.bias.detach()[ROWS].clone())
        optimizers = [
            rowwise(kind(head.parameters(), lr=0.1, weight_decay=0.1), head),
            kind([alone], lr=0.1, weight_decay=0.1),
        ]
        for step in range(4):
            for optimizer in optimizers:
                optimizer.zero_grad()
            head(features(7, seed=step)).square().sum().backward()
            alone.grad = head.bias.grad[ROWS].clone()
            for optimizer in optimizers:
                optimizer.step()
            assert_same_bits(head.bias[ROWS], alone, f"{kind.__name__}, step {step}")


def test_rows_of_a_bias_that_join_late_begin_afresh_and_a_run_goes_on_from_its_state() -> None:
    def run(stop: int | None) -> nn.Linear:
        _, head = pair()
        optimizer = rowwise(torch.optim.AdamW(head.parameters(), lr=0.1), head)
        for step in range(6):
            if step == 2:
                head.unfreeze_rows([0])
            if step == stop:
                saved = head.state_dict(), optimizer.state_dict()
                weights, state = through_a_file(saved, weights_only=True)
                _, head = pair()
                head.load_state_dict(weights)
                head.unfreeze_rows([0])
                optimizer = rowwise(torch.optim.AdamW(head.parameters(), lr=0.1), head)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            head(features(7, seed=step)).square().sum().backward()
            optimizer.step()
        return head

    whole = run(None)
    for stop in (3, 5):
        assert_same_bits(run(stop).bias, whole.bias, "the bias")
        assert_same_bits(run(stop).weight, whole.weight, "the weight")


def test_rows_with_a_rate_of_their_own_take_their_bias_along() -> None:
    moved = []
    for lr_scale in (1.0, 0.5):
        _, head = pair()
        before = copy.deepcopy(head.state_dict())
        head.set_trainable_rows("none")
        head.set_trainable_rows(ROWS, lr_scale=lr_scale)
        optimizer = rowwise(torch.optim.SGD(head.parameters(), lr=0.1), head)
        head(features(7)).square().sum().backward()
        optimizer.step()
        moved.append([value - before[name] for name, value in head.state_dict().items()])
    for whole, half in zip(*moved, strict=True):
        assert whole.any()
        torch.testing.assert_close(half, whole / 2)


def test_a_rate_is_refused_through_whichever_module_has_the_weight() -> None:
    tied = Tied()
    optimizer = rowwise(torch.optim.LBFGS(tied.parameters()), tied)
    for module in (tied.table, tied.head):
        with pytest.raises(InputError, match="LBFGS"):
            module.unfreeze_rows([0], lr_scale=0.5)
    detach_rowwise(optimizer)
    tied.head.unfreeze_rows([0], lr_scale=0.5)


def test_head_and_table_that_are_tied_have_the_same_rows() -> None:
    tied = Tied()
    assert tied.head.trainable_rows.tolist() == ROWS
    tied.head.unfreeze_rows([0])
    assert tied.table.trainable_rows.tolist() == [0, *ROWS]
    copied = copy.deepcopy(tied)
    copied.table.set_trainable_rows([1])
    assert copied.head.trainable_rows.tolist() == [1]
    assert tied.head.trainable_rows.tolist() == [0, *ROWS]
    with pytest.raises(InputError, match=r"tied train the same rows.*\(0, 2, 5, 9\).*\(3\)"):
        PartialLinear(D, V, trainable_rows=[3]).weight = tied.table.weight


def test_a_tied_head_does_not_train_the_padding_row() -> None:
    table = PartialEmbedding(V, D, padding_idx=0, trainable_rows=[0, 3])
    head = PartialLinear(D, V)
    head.weight = table.weight
    head.unfreeze_rows([0, 4])
    assert head.trainable_rows.tolist() == table.trainable_rows.tolist() == [3, 4]


@pytest.mark.parametrize("rows", ["all", [0, 3]])
@pytest.mark.parametrize("to_the_head", [True, False], ids=["to_the_head", "to_the_table"])
def test_the_padding_row_never_trains_whichever_was_tied(rows: Any, to_the_head: bool) -> None:
    table = PartialEmbedding(V, D, padding_idx=0)
    head = PartialLinear(D, V, trainable_rows=rows)
    if to_the_head:
        table.weight = head.weight
    else:
        head.weight = table.weight
    assert 0 not in head.trainable_rows
    head.unfreeze_rows([0, 4])
    assert 0 not in head.trainable_rows
    head.set_trainable_rows("all")
    assert head.trainable_rows.tolist() == table.trainable_rows.tolist() == list(range(1, V))


@pytest.mark.parametrize("rows", ["all", [0, 3, 5]])
def test_a_padding_row_that_becomes_another_is_another_for_all_that_is_tied(rows: Any) -> None:
    table = PartialEmbedding(V, D, padding_idx=0, trainable_rows=rows)
    head = PartialLinear(D, V)
    head.weight = table.weight
    table.padding_idx = 5
    assert 5 not in head.trainable_rows
    head.set_trainable_rows("all")
    assert head.trainable_rows.tolist() == [row for row in range(V) if row != 5]
    table.padding_idx = None
    table.set_trainable_rows("all")
    assert head.trainable_rows.tolist() == list(range(V))


def test_with_nothing_frozen_it_is_a_plain_head() -> None:
    plain, _ = pair()
    head = PartialLinear(D, V)
    head.load_state_dict(plain.state_dict())
    for module in (plain, head):
        module(features(3)).square().sum().backward()
    for name, parameter in head.named_parameters():
        assert_same_bits(parameter.grad, plain.get_parameter(name).grad, name)


def test_keys_copies_and_files_are_those_of_a_plain_head() -> None:
    plain, head = pair()
    assert list(head.state_dict()) == list(plain.state_dict())
    for copied in (copy.deepcopy(head), through_a_file(head)):
        assert copied.trainable_rows.tolist() == ROWS
        copied(features(3)).sum().backward()
        assert set(copied.weight.grad._indices()[0].tolist()) == set(ROWS)
    assert "trainable_rows=3" in repr(head)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    grads = []
    for use in (False, True):
        _, head = pair()
        x = features(3, 4).requires_grad_()
        scores = checkpoint(head, x, use_reentrant=reentrant) if use else head(x)
        scores.square().sum().backward()
        grads.append((x.grad, head.weight.grad.to_dense(), head.bias.grad))
    for plain, checkpointed in zip(*grads, strict=True):
        assert_same_bits(checkpointed, plain, "a gradient")


@SPARSE_AND_DENSE
def test_a_compiled_head_has_no_graph_break_and_follows_its_rows(sparse: bool) -> None:
    torch._dynamo.reset()
    _, head = pair(sparse=sparse)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    for rows in (ROWS, [1, 4]):
        head.set_trainable_rows(rows)
        head.zero_grad()
        assert_same_bits(compiled(features(3, 4)), head(features(3, 4)), "scores")
        compiled(features(3, 4)).square().sum().backward()
        assert rows_that_differ(torch.zeros(V, D), head.weight.grad.to_dense()) == rows
        assert head.bias.grad.nonzero().flatten().tolist() == rows


@pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="torch 2.13 can compile it, and 2.10 cannot"
)
@pytest.mark.filterwarnings("error:a PartialLinear computes")
def test_a_tied_model_is_compiled_whole_and_steps_as_it_does_without() -> None:
    torch._dynamo.reset()
    tied, compiled = Tied(), Tied()
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.1) for m in (tied, run)]
    for step in range(3):
        ids = torch.randint(V, (4 + step,), generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((tied, run), optimizers, strict=True):
            optimizer.zero_grad()
            model(ids).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(compiled.table.weight, tied.table.weight)
    assert rows_that_differ(Tied().table.weight, compiled.table.weight) == ROWS


def test_scores_can_be_changed_in_place_as_those_of_a_plain_head() -> None:
    plain, head = pair()
    for module in (plain, head):
        module(features(2, 3)).div_(2).square().sum().backward()
    torch.testing.assert_close(head.bias.grad[ROWS], plain.bias.grad[ROWS])


def test_functional_calls_give_frozen_rows_no_gradient() -> None:
    _, head = pair()
    parameters = {name: p.detach().clone() for name, p in head.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(head, parameters, (features(3),)).square().sum()

    for name, grad in torch.func.grad(loss)(parameters).items():
        assert rows_that_differ(torch.zeros_like(grad), grad) == ROWS, name


def test_second_derivatives_are_those_of_a_plain_head() -> None:
    seen = []
    for module in pair(sparse=False):
        x = features(3).requires_grad_()
        (grad,) = torch.autograd.grad(module(x).pow(3).sum(), module.weight, create_graph=True)
        grad[ROWS].square().sum().backward()
        seen.append(x.grad)
    torch.testing.assert_close(seen[1], seen[0])


def test_a_frozen_head_learns_nothing() -> None:
    _, head = pair()
    head.requires_grad_(False)
    x = features(3).requires_grad_()
    head(x).sum().backward()
    assert x.grad is not None
    assert head.weight.grad is None
    head.requires_grad_(True).set_trainable_rows("none")
    before = head.weight.detach().clone()
    optimizer = rowwise(torch.optim.AdamW(head.parameters(), weight_decay=0.5), head)
    head(x).sum().backward()
    optimizer.step()
    assert same_bits(head.weight, before)


def test_what_multiplies_by_the_weight_itself_is_told_once_what_it_costs() -> None:
    tied = Tied()
    with pytest.warns(UserWarning, match=r"×6 numbers.*the loss of what the module gives"):
        torch.nn.functional.linear(features(3), tied.head.weight).sum().backward()
    assert tied.head.weight.grad[ROWS].all()
    assert not tied.head.weight.grad[FROZEN].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.nn.functional.linear(features(3), tied.head.weight).sum().backward()
        dense, calm = pair(sparse=False)[1], Tied()
        torch.nn.functional.linear(features(3), dense.weight).sum().backward()
        calm(torch.tensor([2, 3])).sum().backward()
        calm.table.sparse = False  # which makes a dense gradient as it was told to
        calm(torch.tensor([2, 3])).sum().backward()


def test_scores_are_no_view_of_a_tensor() -> None:
    """FSDP2 puts hooks on what a module gives, and warns of views."""
    for shape in ((3,), (2, 3), ()):
        assert pair()[1](features(*shape))._base is None
