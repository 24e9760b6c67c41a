"""Steps as users write them, without a closure and with one."""

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[], Tensor]


def closure_of(optimizer: torch.optim.Optimizer, loss_of: Loss) -> Loss:
    """What makes the gradients of a loss anew."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    return closure


def take_steps(optimizer: torch.optim.Optimizer, loss_of: Loss, count: int = 1) -> None:
    """Make so many steps on the gradients of a loss."""
    closure = closure_of(optimizer, loss_of)
    for _ in range(count):
        closure()
        optimizer.step()
