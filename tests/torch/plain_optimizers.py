"""The least that an optimizer is, to which tests add one oddity each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Plain(Optimizer):
    """Moves parameters by their gradients."""

    rate = "lr"

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {self.rate: lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.before_closure()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.count(group)
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(group[self.rate] * self.direction(param, group))
        return loss

    def before_closure(self) -> None:
        pass

    def count(self, group: dict[str, Any]) -> None:
        pass

    def direction(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        assert param.grad is not None
        return param.grad.to_dense()


class CountsInItsGroup(Plain):
    """Counts its steps in the group, also those in which a parameter has no gradient."""

    def count(self, group: dict[str, Any]) -> None:
        group["count"] = group.get("count", 0) + 1

    def direction(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        return super().direction(param, group) / group["count"]
