"""A copy of an optimizer that steps one parameter: what it does there, nobody else sees."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# A parameter group of an optimizer, and what it remembers of a parameter.
Group = dict[str, Any]
State = dict[str, Any]

# Marks the copy that is stepped.
_DRY = "_is_dry_run"
# What every torch optimizer has; anything else an optimizer made for itself.
TORCHS_OWN = {"state", "param_groups", "defaults", "step"}
# What is compared by its value.
_PLAIN = (int, float, str, set)
# What a group has one of for each parameter, and which are no options.
LISTS = {"params", "param_names"}


def is_dry_run(optimizer: Optimizer) -> bool:
    """Whether an optimizer is the copy that a dry run steps."""
    return _DRY in vars(optimizer)


class DryRun:
    """A copy of an optimizer, stepped or not, over one parameter with the options of a group."""

    def __init__(
        self,
        optimizer: Optimizer,
        group: Group,
        block: nn.Parameter,
        sparse: bool,
        state: State | None,
    ) -> None:
        self.block = block
        self.sparse = sparse
        self.steps = 0
        self.options = {k: copy.deepcopy(v) for k, v in group.items() if k not in LISTS}
        self.group: Group = {**copy.deepcopy(self.options), "params": [block]}
        if "param_names" in group:
            self.group["param_names"] = ["weight"]
        # Not `copy.copy`, which keeps only what torch's own optimizers have.
        self.clone = object.__new__(type(optimizer))
        own = {k: v for k, v in vars(optimizer).items() if k not in TORCHS_OWN}
        vars(self.clone).update({key: _copied(value) for key, value in own.items()})
        # What begins with an underscore is torch's or a scheduler's, such as a mark of a call.
        self._attributes = {k: _copied(v) for k, v in own.items() if not k.startswith("_")}
        self.clone.defaults = optimizer.defaults
        vars(self.clone)[_DRY] = True
        self.clone.param_groups = [self.group]
        self.clone.state = defaultdict(dict)
        if state:
            self.clone.state[block] = state
        # Those of users are for real steps, and ours would look for tables.
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            vars(self.clone)[hooks] = OrderedDict()

    def step(self, grad: Tensor | None = None) -> None:
        """Step with a gradient, by default one that depends on values and changes its signs."""
        self.block.grad = self.as_gradient(self.gradient() if grad is None else grad)
        self.steps += 1
        self.run()

    def run(self, *args: Callable[[], Tensor]) -> None:
        """The optimizer's own maths, by the class: a scheduler binds `step` to the original."""
        step: Callable[..., Any] = type(self.clone).step
        step(self.clone, *args)

    def gradient(self) -> Tensor:
        """A gradient made of no random numbers, of the shape of the block."""
        return torch.cos(self.block.detach() * 7 + 2 * self.steps)

    def as_gradient(self, grad: Tensor) -> Tensor:
        """A gradient in the layout that the optimizer takes."""
        return grad.to_sparse(1) if self.sparse else grad

    @property
    def state(self) -> State:
        """What the optimizer remembers of the block."""
        return dict(self.clone.state[self.block])

    def changed_options(self) -> frozenset[str]:
        """The keys of the parameter group that steps have changed or added."""
        after = {key: value for key, value in self.group.items() if key not in LISTS}
        before = self.options
        return frozenset(k for k, v in after.items() if k not in before or differ(v, before[k]))

    def changed_attributes(self) -> bool:
        """Whether steps changed what lies neither in the block's state nor in the group."""
        if any(key is not self.block for key in self.clone.state):
            return True
        now = vars(self.clone)
        return any(differ(now.get(key), value) for key, value in self._attributes.items())


def differ(a: Any, b: Any) -> bool:
    """Whether two values of a state differ; what is no number or collection does by identity."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape != b.shape or not torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) != len(b) or any(differ(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() != b.keys() or any(differ(a[key], b[key]) for key in a)
    by_value = isinstance(a, _PLAIN) and isinstance(b, _PLAIN)
    return a != b if by_value else a is not b


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return copy.copy(value) if isinstance(value, dict | list | set) else value
