"""What a torch optimizer keeps for a parameter, found out by running it on a scratch one."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam

from partial_embedding.errors import InputError

Group = dict[str, Any]
State = dict[str, Any]

# Refused by the package that they come from, since no probe on a small tensor shows what is wrong.
_REFUSED = {
    "schedulefree": "it swaps weights outside step()",
    "bitsandbytes": "its 8-bit state is shared by blocks that cross rows",
}
# Large enough that state kept in blocks of elements differs from state kept by row, and different
# enough from each other and from the width to tell the axis of rows.
_HEIGHTS = (1024, 2048)
_WIDTH = 8


@dataclass(frozen=True)
class Anatomy:
    """How an optimizer keeps what it remembers of one parameter.

    Args:
        per_row: Keys of the state whose first axis is rows; all others belong to the cohort.
        in_group: Keys of the parameter group that a step changes, such as a step count kept there.
        eager: State is made by the constructor and not by the first step.
        elementwise: Each row moves as if no other row existed.
        flat: There is one history for all parameters together.
        sparse: Only sparse gradients are accepted.
    """

    per_row: frozenset[str] = frozenset()
    in_group: frozenset[str] = frozenset()
    eager: bool = False
    elementwise: bool = False
    flat: bool = False
    sparse: bool = False


def examine(optimizer: Optimizer, group: Group, device: torch.device) -> Anatomy:
    """Find out how an optimizer keeps its state, without touching it.

    Args:
        optimizer: The optimizer, stepped or not.
        group: The parameter group that holds the table.
        device: Where the table lies.

    Raises:
        InputError: Frozen rows, or late ones, could not be kept exact under this optimizer.
    """
    name = type(optimizer).__name__
    package = type(optimizer).__module__.partition(".")[0]
    if reason := _REFUSED.get(package):
        raise _refusal(name, reason)
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise _refusal(name, "it has train() and eval(), which swap weights outside step()")
    if isinstance(optimizer, LBFGS):
        return Anatomy(flat=True)
    sparse = isinstance(optimizer, SparseAdam)
    try:
        eager = _is_eager(optimizer, group, device, sparse)
        states, changed = [], frozenset[str]()
        for height in _HEIGHTS:
            trial = _Trial(optimizer, group, _scratch(height, device), sparse, eager)
            trial.step()
            states.append(trial.state)
            changed = trial.changed_group_keys()
            if trial.remembers_elsewhere():
                raise _refusal(name, "it remembers parameters outside its `state`")
        per_row = _keys_by_row(name, states)
        elementwise = _is_elementwise(optimizer, group, device, sparse, eager)
    except InputError:
        raise
    except Exception as error:  # whatever a foreign optimizer raises is its own way of refusing
        raise _refusal(name, f"a trial step raised {type(error).__name__}: {error}") from error
    return Anatomy(per_row, changed, eager, elementwise, sparse=sparse)


def first_state(optimizer: Optimizer, group: Group, block: nn.Parameter) -> State:
    """The state that the optimizer's constructor makes for a parameter.

    Args:
        optimizer: An optimizer whose anatomy is eager.
        group: The parameter group whose options count.
        block: The parameter.
    """
    options = {key: value for key, value in group.items() if key in optimizer.defaults}
    fresh = type(optimizer)([{"params": [block], **options}], **optimizer.defaults)
    return dict(fresh.state.get(block, {}))


def untouched_row_state(
    optimizer: Optimizer, anatomy: Anatomy, group: Group, like: Tensor
) -> dict[str, Tensor]:
    """The state of a row that training has not touched yet.

    Args:
        optimizer: The optimizer.
        anatomy: What `examine` found.
        group: The parameter group whose options count.
        like: The table, for device, dtype and width.

    Returns:
        One row, of shape (1, …), for each key of `anatomy.per_row`.
    """
    block = nn.Parameter(like.new_zeros(1, like.shape[1]))
    trial = _Trial(optimizer, group, block, anatomy.sparse, anatomy.eager)
    # A zero row with a zero gradient stays what the optimizer starts from.
    trial.step(torch.zeros_like(block))
    return {key: trial.state[key] for key in anatomy.per_row}


class _Trial:
    """A step of a copy of the optimizer on one scratch parameter."""

    def __init__(
        self,
        optimizer: Optimizer,
        group: Group,
        block: nn.Parameter,
        sparse: bool,
        eager: bool,
    ) -> None:
        self.block = block
        self.before = {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
        self.group: Group = {**copy.deepcopy(self.before), "params": [block]}
        self.sparse = sparse
        # Not `copy.copy`, which keeps only what torch's own optimizers have.
        self.clone = object.__new__(type(optimizer))
        self.extras = {
            key: copy.copy(value)
            for key, value in vars(optimizer).items()
            if isinstance(value, dict | list | set)
            and key not in ("state", "param_groups")
            and not key.startswith("_optimizer_")
            and key != "defaults"
        }
        self.sizes = {key: len(value) for key, value in self.extras.items()}
        vars(self.clone).update(vars(optimizer), **self.extras)
        # A scheduler puts a step of its own on the instance, bound to the real optimizer.
        vars(self.clone).pop("step", None)
        self.clone.state = defaultdict(dict)
        self.clone.param_groups = [self.group]
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            vars(self.clone)[hooks] = OrderedDict()
        if eager:
            self.clone.state[block] = first_state(optimizer, group, block)

    def step(self, grad: Tensor | None = None) -> None:
        if grad is None:
            grad = torch.cos(self.block.detach() * 7)
        self.block.grad = grad.to_sparse(1) if self.sparse else grad
        type(self.clone).step(self.clone)

    @property
    def state(self) -> State:
        return dict(self.clone.state[self.block])

    def changed_group_keys(self) -> frozenset[str]:
        after = {key: value for key, value in self.group.items() if key != "params"}
        return frozenset(
            k for k, v in after.items() if k not in self.before or _differ(v, self.before[k])
        )

    def remembers_elsewhere(self) -> bool:
        others = [key for key in self.clone.state if key is not self.block]
        return bool(others) or any(
            len(self.extras[key]) != size for key, size in self.sizes.items()
        )


def _is_eager(optimizer: Optimizer, group: Group, device: torch.device, sparse: bool) -> bool:
    try:
        _Trial(optimizer, group, _scratch(2, device), sparse, eager=False).step()
    except KeyError:  # the step looks for state that the constructor should have made
        return True
    return False


def _keys_by_row(name: str, states: list[State]) -> frozenset[str]:
    small, large = states
    per_row = set()
    for key in small.keys() | large.keys():
        values = small.get(key), large.get(key)
        if all(value is None or isinstance(value, bool | int | float) for value in values):
            continue
        if not all(type(value) is Tensor for value in values):
            raise _refusal(name, f"its state {key!r} is a {type(values[0]).__name__}")
        shapes = [tuple(value.shape) for value in values]  # type: ignore[union-attr]  # tensors
        if shapes[0] == shapes[1]:
            continue
        if tuple(s[0] for s in shapes) != _HEIGHTS or shapes[0][1:] != shapes[1][1:]:
            raise _refusal(name, f"its state {key!r} is neither per row nor shared by all rows")
        per_row.add(key)
    return frozenset(per_row)


def _is_elementwise(
    optimizer: Optimizer, group: Group, device: torch.device, sparse: bool, eager: bool
) -> bool:
    scales = torch.tensor([[1.0], [10.0], [0.1], [3.0]], device=device)
    values = _scratch(4, device).detach() * scales

    def moved(rows: Tensor) -> Tensor:
        trial = _Trial(optimizer, group, nn.Parameter(rows.clone()), sparse, eager)
        for _ in range(2):
            trial.step(torch.cos(trial.block.detach() * 7) * rows)
        return trial.block.detach()

    alone = torch.cat([moved(row) for row in values.split(1)])
    # Vector instructions may round differently by position; rows that look at each other differ
    # by far more.
    return torch.allclose(moved(values), alone, rtol=1e-5, atol=1e-7)


def _scratch(height: int, device: torch.device) -> nn.Parameter:
    # Made of no random numbers: a user's random state must not depend on this library.
    values = torch.arange(height * _WIDTH, dtype=torch.float32).add_(1).sin_()
    return nn.Parameter(values.view(height, _WIDTH).to(device))


def _differ(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return not torch.equal(a, b)
    return bool(a != b)


def _refusal(name: str, reason: str) -> InputError:
    return InputError(
        f"rowwise serves optimizers whose state is per row or shared by all rows, and that move "
        f"weights only in step(). Received {name}: {reason}. Use one of torch.optim, such as AdamW."
    )
