"""What a torch optimizer keeps for a parameter, found out by running a copy of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam

from partial_embedding.errors import InputError
from partial_embedding.torch.trial import Group, State, Trial

# Refused by the package that they come from, since no probe on a small tensor shows what is wrong.
_REFUSED = {
    "schedulefree": "it swaps weights outside step()",
    "bitsandbytes": "its 8-bit state is shared by blocks that cross rows",
}
# Large enough that state kept in blocks of elements differs from state kept by row, and different
# enough from each other and from the width to tell the axis of rows.
_HEIGHTS = (1024, 2048)
_WIDTH = 8
# Enough for what appears late, such as slow weights, and for gradients to change their signs.
_STEPS = 8

TrialOf = Callable[[Tensor], Trial]


@dataclass(frozen=True)
class Anatomy:
    """How an optimizer keeps what it remembers of one parameter.

    Args:
        keys: All keys of the state. Others that turn up later are refused.
        per_row: Keys whose first axis is rows; the others belong to the cohort as a whole.
        in_group: Keys of the parameter group that a step changes, such as a step count kept there.
        begun: What these keys are before the first step, where they exist then.
        eager: State is made by the constructor and not by the first step.
        elementwise: Each row moves as if no other row existed, and its first state does not depend
            on its values.
        flat: There is one history for all parameters together.
        sparse: Only sparse gradients are accepted.
    """

    keys: frozenset[str] = frozenset()
    per_row: frozenset[str] = frozenset()
    in_group: frozenset[str] = frozenset()
    begun: State = field(default_factory=dict)
    eager: bool = False
    elementwise: bool = False
    flat: bool = False
    sparse: bool = False


def examine(optimizer: Optimizer, group: Group, weight: Tensor) -> Anatomy:
    """Find out how an optimizer keeps its state, without touching it.

    Args:
        optimizer: The optimizer, stepped or not.
        group: The options of the parameter group that holds the table.
        weight: The table, for its device and dtype.

    Raises:
        InputError: Frozen rows, or late ones, could not be kept exact under this optimizer.
    """
    name = type(optimizer).__name__
    _refuse_by_sight(name, optimizer)
    if isinstance(optimizer, LBFGS):
        return Anatomy(flat=True)
    devices = [weight.device] if weight.is_cuda else []
    try:
        # An optimizer may draw noise; a user's random numbers must not depend on this library.
        with torch.random.fork_rng(devices):
            return _examined(name, optimizer, group, weight)
    except InputError:
        raise
    except Exception as error:  # whatever a foreign optimizer raises is its own way of refusing
        raise _refusal(name, f"a trial step raised {type(error).__name__}: {error}") from error


def first_state(optimizer: Optimizer, group: Group, block: nn.Parameter) -> State:
    """The state that the optimizer's constructor makes for a parameter.

    Args:
        optimizer: An optimizer whose anatomy is eager.
        group: The parameter group whose options count.
        block: The parameter.
    """
    return dict(_constructed(optimizer, group, block).state.get(block, {}))


def untouched_row_state(
    optimizer: Optimizer, anatomy: Anatomy, group: Group, weight: Tensor
) -> dict[str, Tensor]:
    """The state of a row that training has not touched yet.

    Args:
        optimizer: The optimizer.
        anatomy: What `examine` found.
        group: The parameter group whose options count.
        weight: The table, for device, dtype and width.

    Returns:
        One row, of shape (1, …), for each key of `anatomy.per_row`.
    """
    block = nn.Parameter(weight.new_zeros(1, *weight.shape[1:]))
    state = first_state(optimizer, group, block) if anatomy.eager else None
    trial = Trial(optimizer, group, block, anatomy.sparse, state)
    # A zero row with a zero gradient stays what the optimizer starts from.
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        trial.step(torch.zeros_like(block))
    return {key: trial.state[key] for key in anatomy.per_row}


def _refuse_by_sight(name: str, optimizer: Optimizer) -> None:
    if reason := _REFUSED.get(type(optimizer).__module__.partition(".")[0]):
        raise _refusal(name, reason)
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise _refusal(name, "it has train() and eval(), which swap weights outside step()")
    if not getattr(type(optimizer).step, "hooked", False):
        raise _refusal(name, "its step() runs no hooks, as Optimizer.__init__ was not called")
    if any(isinstance(value, Optimizer) for value in vars(optimizer).values()):
        raise _refusal(name, "it wraps another optimizer, whose state is out of reach")


def _examined(name: str, optimizer: Optimizer, group: Group, weight: Tensor) -> Anatomy:
    sparse = isinstance(optimizer, SparseAdam)
    eager = _is_eager(optimizer, group, weight, sparse)
    trial_of = partial(_trial_of, optimizer, group, sparse, eager)
    states = []
    for height in _HEIGHTS:
        # In the table's own dtype: some optimizers keep more for a half-precision parameter.
        trial = trial_of(_scratch(height, weight).to(weight.dtype))
        for _ in range(_STEPS):
            trial.step()
        if trial.changed_attributes():
            raise _refusal(name, "it remembers something outside its state and groups")
        states.append(trial.state)
    per_row = _keys_by_row(name, *states)
    _check_closure(name, trial_of(_scratch(2, weight)))
    counted = trial.changed_options()
    # A count in the group is the same for every row; anything else there came from all of them.
    counts_alone = all(_is_count(trial.group[key]) for key in counted)
    return Anatomy(
        keys=frozenset(states[0].keys() | states[1].keys()),
        per_row=per_row,
        in_group=counted,
        begun=_begun(optimizer, trial.block, counted),
        eager=eager,
        elementwise=counts_alone and _is_elementwise(optimizer, group, weight, sparse, eager),
        sparse=sparse,
    )


def _trial_of(
    optimizer: Optimizer, group: Group, sparse: bool, eager: bool, values: Tensor
) -> Trial:
    block = nn.Parameter(values.clone())
    state = first_state(optimizer, group, block) if eager else None
    return Trial(optimizer, group, block, sparse, state)


def _is_eager(optimizer: Optimizer, group: Group, weight: Tensor, sparse: bool) -> bool:
    try:
        _trial_of(optimizer, group, sparse, False, _scratch(2, weight)).step()
    except KeyError:  # the step looks for state that the constructor should have made
        return True
    return False


def _constructed(optimizer: Optimizer, group: Group, block: nn.Parameter) -> Optimizer:
    options = {key: value for key, value in group.items() if key in optimizer.defaults}
    return type(optimizer)([{"params": [block], **options}], **optimizer.defaults)


def _begun(optimizer: Optimizer, block: nn.Parameter, counted: frozenset[str]) -> State:
    if not counted:
        return {}
    try:
        fresh = _constructed(optimizer, {}, block).param_groups[0]
    except TypeError:  # its defaults are not what its constructor takes
        fresh = optimizer.defaults
    return {key: fresh[key] for key in counted & fresh.keys()}


def _keys_by_row(name: str, small: State, large: State) -> frozenset[str]:
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


def _is_count(value: object) -> bool:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return isinstance(value, int | float) and float(value).is_integer()


def _check_closure(name: str, trial: Trial) -> None:
    """Refuse an optimizer that looks at parameters before its closure, where the table still is."""
    table = nn.Parameter(trial.block.detach().clone())
    table.grad = trial.as_gradient(torch.ones_like(table))
    before = table.detach().clone()
    trial.group["params"][:] = [table]

    def closure() -> Tensor:
        trial.group["params"][:] = [trial.block]
        trial.block.grad = trial.as_gradient(trial.gradient())
        return trial.block.new_zeros(())

    trial.run(closure)
    if not torch.equal(table, before) or trial.clone.state.get(table):
        raise _refusal(name, "it touches parameters before its closure runs")


def _is_elementwise(
    optimizer: Optimizer, group: Group, weight: Tensor, sparse: bool, eager: bool
) -> bool:
    # A warm-up that begins at a learning rate of zero would hide everything.
    if "lr" in group:
        lr = group["lr"]
        group = {**group, "lr": torch.full_like(lr, 0.01) if isinstance(lr, Tensor) else 0.01}
    if not _begins_alike(optimizer, group, weight, sparse, eager):
        return False
    scales = torch.tensor([[1.0], [10.0], [0.1], [3.0]], device=weight.device)
    values = (_scratch(4, weight).view(4, -1) * scales).view_as(_scratch(4, weight))

    def moved(rows: Tensor) -> Tensor:
        trial = _trial_of(optimizer, group, sparse, eager, rows)
        for _ in range(_STEPS):
            trial.step(trial.gradient() * rows)
        return trial.block.detach()

    alone = torch.cat([moved(row) for row in values.split(1)])
    # Vector instructions may round differently by position; rows that look at each other differ
    # by far more.
    return torch.allclose(moved(values), alone, rtol=1e-5, atol=1e-7)


def _begins_alike(
    optimizer: Optimizer, group: Group, weight: Tensor, sparse: bool, eager: bool
) -> bool:
    """Whether a row's first state is the same whatever its values; slow weights are not."""
    # With decay, a step without a gradient would not leave the row where it is.
    still = {k: 0.0 if "decay" in k and type(v) is float else v for k, v in group.items()}
    blocks = []
    for value in (0.0, 1.0):
        start = torch.full_like(_scratch(2, weight), value)
        trial = _trial_of(optimizer, still, sparse, eager, start)
        trial.step(torch.zeros_like(start))
        first = trial.state.keys()
        trial.block.data.fill_(1.0)
        for _ in range(_STEPS):
            trial.step()
        if trial.state.keys() != first:
            return False  # state that appears late would have only the rows touched just then
        blocks.append(trial.block.detach())
    return torch.allclose(blocks[0], blocks[1], rtol=1e-5, atol=1e-7)


def _scratch(height: int, weight: Tensor) -> Tensor:
    """Values of as many axes as the weight has: some optimizers treat a vector as no matrix."""
    width = [_WIDTH] * (weight.dim() - 1)
    values = torch.arange(height * math.prod(width), dtype=torch.float32).add_(1).sin_()
    return values.view(height, *width).to(weight.device)


def _refusal(name: str, reason: str) -> InputError:
    return InputError(
        "rowwise serves optimizers whose state is per row or shared by all rows, and that move "
        f"weights only in step(). Received {name}: {reason}. "
        "All of torch.optim are served, such as AdamW."
    )
