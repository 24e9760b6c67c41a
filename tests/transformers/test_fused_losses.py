"""Losses of TRL's own, which multiply by a head's weight: gradients of its trainable rows alone."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("trl")

import torch  # after the packages that may be missing
from made_tensors import MadeTensors
from oracle import assert_same_bits
from torch import Tensor, nn
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from partial_embedding import InputError
from partial_embedding.torch import PartialEmbedding, PartialLinear, fused_losses
from partial_embedding.torch.row_gradient import RowGradient

V, D, TOKENS = 4096, 64, 7
ROWS = [3, 700, 4095]
Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    targets = torch.tensor([3, 5, 700, 0, 4095, 3, 1])
    found = ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, 0.7, 500, 30.0, 1.3, ("entropy",)
    )
    return found[0].square().sum() + found[1].sum()


def divergence(beta: float) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        teacher = drawn(TOKENS, D, seed=5), drawn(V, D, seed=6), None
        found = ChunkedDivergenceFunction.apply(hidden, weight, bias, *teacher, beta)
        return found[0].square().sum()

    return loss


LOSSES: dict[str, Loss] = {
    "log_probs": log_probs,
    **{f"divergence_{beta}": divergence(beta) for beta in (0.0, 0.5, 1.0)},
}


def heads(bias: bool = True, **options: Any) -> tuple[nn.Linear, PartialLinear]:
    torch.manual_seed(0)
    plain = nn.Linear(D, V, bias=bias)
    head = PartialLinear(D, V, bias=bias, **{"trainable_rows": ROWS, **options})
    head.load_state_dict(plain.state_dict())
    head.train()
    return plain, head


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_a_plain_head_and_of_the_trainable_rows_alone(
    loss: str, bias: bool, autocast: bool
) -> None:
    seen = []
    for head in heads(bias):
        hidden = drawn(TOKENS, D, seed=1).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            LOSSES[loss](hidden, head.weight, head.bias).backward()
        seen.append((hidden.grad, head.weight.grad, head.bias.grad if bias else None))
    (of_plain, plain, plain_bias), (of_features, rows, rows_bias) = seen
    assert_same_bits(of_features, of_plain, "the gradient of the features")
    assert isinstance(rows, RowGradient)
    assert rows.indices()[0].tolist() == ROWS
    torch.testing.assert_close(rows.values(), plain[ROWS])
    if bias:
        torch.testing.assert_close(rows_bias[ROWS], plain_bias[ROWS])
        assert rows_bias.count_nonzero() <= len(ROWS)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_tensor_of_the_size_of_the_weight_is_made(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl.kernels.chunked_divergence.VOCAB_CHUNK_SIZE", 500)
    made = []
    for head in heads():
        out = LOSSES[loss](drawn(TOKENS, D, seed=1).requires_grad_(), head.weight, head.bias)
        with MadeTensors() as mode:
            out.backward()
        made.append(mode.largest)
    assert made[0] >= V * D > 4 * made[1] > 0


def test_a_tied_weight_gets_one_gradient_of_rows() -> None:
    _, head = heads(bias=False)
    table = PartialEmbedding(V, D, trainable_rows=ROWS)
    table.weight = head.weight
    plain = nn.Parameter(head.weight.detach().clone())
    ids = torch.tensor([3, 3, 4095, 1, 2, 9, 700])
    for hidden, weight in ((table(ids), head.weight), (plain[ids], plain)):
        log_probs(hidden, weight, None).backward()
    assert isinstance(head.weight.grad, RowGradient)
    assert head.weight.grad.indices()[0].tolist() == ROWS
    torch.testing.assert_close(head.weight.grad.to_dense()[ROWS], plain.grad[ROWS])


def test_a_head_gets_a_whole_gradient_where_that_is_asked_for() -> None:
    hidden = drawn(TOKENS, D, seed=1)
    for options in ({"sparse": False}, {"trainable_rows": "all"}):
        _, head = heads(**options)
        log_probs(hidden, head.weight, head.bias).backward()
        assert type(head.weight.grad) is Tensor
    _, head = heads()
    head.weight.requires_grad_(False)
    log_probs(hidden, head.weight, head.bias).backward()
    assert head.weight.grad is None
    assert head.bias.grad.count_nonzero() == len(ROWS)


def test_a_frozen_head_whose_rows_are_to_train_is_refused() -> None:
    _, head = heads(bias=False)
    model = nn.Sequential(nn.Linear(D, D), head)
    head.requires_grad_(False)
    optimizer = torch.optim.SGD(model[0].parameters(), 0.1)
    log_probs(model[0](drawn(TOKENS, D)), head.weight, None).backward()
    with pytest.raises(InputError, match=r"'1' with 3 such rows, which none holds"):
        optimizer.step()


def test_a_function_that_saves_something_else_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Other:
        @staticmethod
        def forward(ctx: Any, weight: Tensor, hidden: Tensor) -> None: ...

        @staticmethod
        def backward(ctx: Any) -> None: ...

    backward = Other.backward
    monkeypatch.setattr("trl.kernels.chunked_logprob.ChunkedLogProbFunction", Other)
    fused_losses.serve_fused_losses()
    assert Other.backward is backward
