"""What a torch optimizer keeps for a parameter, found out by running a copy of it."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.utils._pytree import tree_leaves

from partial_embedding.errors import InputError
from partial_embedding.torch.dry_run import LISTS, TORCHS_OWN, DryRun, Group, State
from partial_embedding.torch.engines import refuse_zero_redundancy

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

# What a checkpoint of ours has in a parameter group, and in the state of a table.
KEY = "rowwise"
# The rate may start at zero, and is none of what decides which state there is.
_NO_OPTIONS = {*LISTS, KEY, "lr", "initial_lr", "max_lr", "min_lr"}

# A dry run of the options of a group, from the values of a parameter.
DryRunOf = Callable[[Group, Tensor], DryRun]


@dataclass(frozen=True)
class StateLayout:
    """How an optimizer keeps what it remembers of one parameter.

    Args:
        keys: All keys of the state. Others that turn up later are refused.
        per_row: Keys whose first axis is rows; the others belong to the cohort as a whole.
        shared: The others, with values that they once had.
        in_group: Keys of the parameter group that a step changes, such as a step count kept there.
        begun: What these keys are before the first step, where they exist then.
        eager: State is made by the constructor and not by the first step.
        elementwise: Each row moves as if no other row existed, and its first state does not depend
            on its values.
        rests: With a gradient of zero a row, and what is remembered of it, keep their bits.
        flat: There is one history for all parameters together.
        sparse: Only sparse gradients are accepted.
        closes: A closure that `step` is given is called; where it is not, it changes nothing.
        alone: What is in a group of its own, after the user's, is stepped as it is in theirs.
    """

    keys: frozenset[str] = frozenset()
    per_row: frozenset[str] = frozenset()
    shared: State = field(default_factory=dict)
    in_group: frozenset[str] = frozenset()
    begun: State = field(default_factory=dict)
    eager: bool = False
    elementwise: bool = False
    rests: bool = False
    flat: bool = False
    sparse: bool = False
    closes: bool = True
    alone: bool = True


def inspect_optimizer(optimizer: Optimizer, group: Group, weight: Tensor) -> StateLayout:
    """Find out how an optimizer keeps its state of a weight, without touching either.

    Raises:
        InputError: Frozen rows, or late ones, could not be kept exact under this optimizer.
    """
    name = type(optimizer).__name__
    _refuse_by_sight(name, optimizer)
    if isinstance(optimizer, LBFGS):
        return StateLayout(flat=True)
    devices = [weight.device] if weight.is_cuda else []
    try:
        # An optimizer may draw noise; a user's random numbers must not depend on this library.
        with torch.random.fork_rng(devices):
            return _inspected(name, optimizer, group, weight)
    except InputError:
        raise
    except Exception as error:  # whatever a foreign optimizer raises is its own way of refusing
        raise _refusal(name, f"a dry run raised {type(error).__name__}: {error}") from error


def kind_of(group: Group) -> tuple[Any, ...]:
    """What of a group's options can change how state is kept: which are on, and not how large.

    A momentum that a scheduler turns on makes state that was not there, one that it changes does
    not.
    """
    return tuple((key, _kind(value)) for key, value in options_of(group).items())


def options_of(group: Group) -> Group:
    """What of a group can change how state is kept."""
    return {key: value for key, value in group.items() if key not in _NO_OPTIONS}


def _kind(value: Any) -> Any:
    if isinstance(value, int | float):
        return value != 0
    if isinstance(value, tuple | list):
        return tuple(map(_kind, value))
    return value if isinstance(value, str) else type(value)


def first_state(optimizer: Optimizer, group: Group, block: nn.Parameter) -> State:
    """The state that an optimizer's constructor makes for a parameter."""
    return dict(_constructed(optimizer, group, block).state.get(block, {}))


def state_of_one_row(
    optimizer: Optimizer, layout: StateLayout, group: Group, weight: Tensor
) -> State:
    """The state of a parameter of one row that was stepped once, with a gradient of zero."""
    row = weight.new_zeros(1, *weight.shape[1:])
    dry_run = _dry_run_of(optimizer, layout.sparse, layout.eager, group, row)
    # A zero row with a zero gradient stays what the optimizer starts from.
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        dry_run.step(torch.zeros_like(row))
    return dry_run.state


def _refuse_by_sight(name: str, optimizer: Optimizer) -> None:
    if reason := _REFUSED.get(type(optimizer).__module__.partition(".")[0]):
        raise _refusal(name, reason)
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise _refusal(name, "it has train() and eval(), which swap weights outside step()")
    if not getattr(type(optimizer).step, "hooked", False):
        raise _refusal(name, "its step() runs no hooks, as Optimizer.__init__ was not called")
    refuse_zero_redundancy(optimizer)
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    kept = (value for key, value in vars(optimizer).items() if key not in TORCHS_OWN)
    if not isinstance(optimizer, LBFGS) and any(
        id(leaf) in own for leaf in tree_leaves(list(kept))
    ):
        raise _refusal(name, "it keeps parameters outside its groups, and may step them there")
    if any(isinstance(value, Optimizer) for value in vars(optimizer).values()):
        raise _refusal(name, "it wraps another optimizer, whose state is out of reach")


def _inspected(name: str, optimizer: Optimizer, group: Group, weight: Tensor) -> StateLayout:
    sparse = isinstance(optimizer, SparseAdam)
    eager = is_eager(optimizer, group, weight)
    dry_run_of = partial(_dry_run_of, optimizer, sparse, eager)
    states = []
    for height in _HEIGHTS:
        # In the table's own dtype: some optimizers keep more for a half-precision parameter.
        dry_run = dry_run_of(group, _scratch(height, weight).to(weight.dtype))
        for _ in range(_STEPS):
            dry_run.step()
        if dry_run.changed_attributes():
            raise _refusal(name, "it remembers something outside its state and groups")
        states.append(dry_run.state)
    per_row = _keys_by_row(name, *states)
    closes = _calls_closure(name, dry_run_of(group, _scratch(2, weight)))
    counted = dry_run.changed_options()
    for key in counted:
        if not isinstance(_number_of(dry_run.group[key]), int | float | None):
            raise _refusal(name, f"what it keeps in a parameter group, {key!r}, is no number")
    # A count in the group is the same for every row; anything else there came from all of them.
    counts_alone = all(_is_count(dry_run.group[key]) for key in counted)
    group = _without_warm_up(group)
    others = len(optimizer.param_groups)
    alone = _steps_groups_after(others, *(dry_run_of(group, _scratch(2, weight)) for _ in "ab"))
    if counted and not alone:
        raise _refusal(name, "it keeps something of each parameter group outside the group")
    elementwise = counts_alone and _is_elementwise(dry_run_of, group, weight)
    return StateLayout(
        keys=frozenset(states[0].keys() | states[1].keys()),
        per_row=per_row,
        shared={key: value for key, value in states[1].items() if key not in per_row},
        in_group=counted,
        begun=_begun(optimizer, dry_run.block, counted),
        eager=eager,
        elementwise=elementwise,
        rests=elementwise and not sparse and _rests(dry_run_of, group, weight, per_row),
        sparse=sparse,
        closes=closes,
        alone=alone,
    )


def _dry_run_of(
    optimizer: Optimizer, sparse: bool, eager: bool, group: Group, values: Tensor
) -> DryRun:
    block = nn.Parameter(values.clone())
    state = first_state(optimizer, group, block) if eager else None
    return DryRun(optimizer, group, block, sparse, state)


def is_eager(optimizer: Optimizer, group: Group, weight: Tensor) -> bool:
    """Whether an optimizer's constructor makes state, which its step looks for."""
    sparse = isinstance(optimizer, SparseAdam)
    try:
        _dry_run_of(optimizer, sparse, False, group, _scratch(2, weight)).step()
    except KeyError:  # the step looks for state that the constructor should have made
        return True
    return False


def _constructed(optimizer: Optimizer, group: Group, block: nn.Parameter) -> Optimizer:
    options = {key: value for key, value in group.items() if key in optimizer.defaults}
    taken = inspect.signature(type(optimizer)).parameters
    # Where one has loaded something, torch adds to its defaults what its constructor may not take.
    defaults = {key: value for key, value in optimizer.defaults.items() if key in taken}
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values()):
        defaults = optimizer.defaults
    return type(optimizer)([{"params": [block], **options}], **defaults)


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


def _number_of(value: object) -> object:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _is_count(value: object) -> bool:
    number = _number_of(value)
    return isinstance(number, int | float) and float(number).is_integer()


def _calls_closure(name: str, dry_run: DryRun) -> bool:
    """Whether an optimizer calls its closure; refuses one that looks at parameters before that."""
    table = nn.Parameter(dry_run.block.detach().clone())
    table.grad = dry_run.as_gradient(torch.ones_like(table))
    before = table.detach().clone()
    dry_run.group["params"][:] = [table]
    called = []

    def closure() -> Tensor:
        called.append(True)
        dry_run.group["params"][:] = [dry_run.block]
        dry_run.block.grad = dry_run.as_gradient(dry_run.gradient())
        return dry_run.block.new_zeros(())

    try:
        dry_run.run(closure)
    except Exception:  # a step that ran without a closure takes something else, or nothing
        if called:
            raise
    if called and (not torch.equal(table, before) or dry_run.clone.state.get(table)):
        raise _refusal(name, "it touches parameters before its closure runs")
    return bool(called)


def _steps_groups_after(others: int, dry_run: DryRun, own: DryRun) -> bool:
    """Whether a group that comes after those of the user is stepped as well as they are."""
    own.clone.param_groups[:0] = [
        {**copy.deepcopy(own.options), "params": []} for _ in range(others)
    ]
    devices = [own.block.device] if own.block.is_cuda else []
    try:
        for run in (dry_run, own):
            with torch.random.fork_rng(devices):  # one that draws noise draws the same
                for _ in range(_STEPS):
                    run.step()
    except Exception:  # whatever it raises that looks for what it keeps of a group
        return False
    return torch.allclose(dry_run.block, own.block, rtol=1e-5, atol=1e-7)


def _is_elementwise(dry_run_of: DryRunOf, group: Group, weight: Tensor) -> bool:
    if not _begins_alike(dry_run_of, group, weight):
        return False
    scales = torch.tensor([1.0, 10.0, 0.1, 3.0], device=weight.device)
    values = _scratch(4, weight) * scales.view(4, *[1] * (weight.dim() - 1))

    def moved(rows: Tensor) -> Tensor:
        dry_run = dry_run_of(group, rows)
        for _ in range(_STEPS):
            dry_run.step(dry_run.gradient() * rows)
        return dry_run.block.detach()

    alone = torch.cat([moved(row) for row in values.split(1)])
    # Vector instructions may round differently by position; rows that look at each other differ
    # by far more.
    return torch.allclose(moved(values), alone, rtol=1e-5, atol=1e-7)


def _without_warm_up(group: Group) -> Group:
    """The options with a learning rate: one that begins at zero would hide everything."""
    if "lr" not in group:
        return group
    lr = group["lr"]
    return {**group, "lr": torch.full_like(lr, 0.01) if isinstance(lr, Tensor) else 0.01}


def _rests(dry_run_of: DryRunOf, group: Group, weight: Tensor, per_row: frozenset[str]) -> bool:
    """Whether a gradient of zero leaves rows, and the state of each, as they are to the bit."""
    values = _scratch(4, weight).to(weight.dtype)
    values[2], values[3] = 0.0, -0.0
    # A small decay may round to nothing here, and a scheduler may change how large an option is.
    loud = {k: 0.5 if type(v) is float and v else v for k, v in group.items()}
    try:
        return all(
            _rests_after(dry_run_of(options, values), steps, per_row)
            for options in (group, loud)
            for steps in (0, _STEPS)  # from the first step on, and after others
        )
    except Exception:  # options that the user did not choose may be none; then all rows are stepped
        return False


def _rests_after(dry_run: DryRun, steps: int, per_row: frozenset[str]) -> bool:
    for _ in range(steps):
        dry_run.step()
    before = [dry_run.block.detach().clone()]
    before += [dry_run.state[key].clone() for key in sorted(per_row) if steps]
    for _ in range(2):
        dry_run.step(torch.zeros_like(dry_run.block))
    after = [dry_run.block, *(dry_run.state[key] for key in sorted(per_row) if steps)]
    return all(map(_same_bits, before, after))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    # By value zero equals minus zero, and no number that is none equals itself.
    return torch.equal(one.detach().view(torch.uint8), other.detach().view(torch.uint8))


def _begins_alike(dry_run_of: DryRunOf, group: Group, weight: Tensor) -> bool:
    """Whether a row's first state is the same whatever its values; slow weights are not."""
    # With decay, a step without a gradient would not leave the row where it is.
    still = {k: 0.0 if "decay" in k and type(v) is float else v for k, v in group.items()}
    blocks = []
    for value in (0.0, 1.0):
        start = torch.full_like(_scratch(2, weight), value)
        dry_run = dry_run_of(still, start)
        dry_run.step(torch.zeros_like(start))
        first = dry_run.state.keys()
        dry_run.block.data.fill_(1.0)
        for _ in range(_STEPS):
            dry_run.step()
        if dry_run.state.keys() != first:
            return False  # state that appears late would have only the rows touched just then
        blocks.append(dry_run.block.detach())
    return torch.allclose(blocks[0], blocks[1], rtol=1e-5, atol=1e-7)


def _scratch(height: int, weight: Tensor) -> Tensor:
    """Values of as many axes as the weight has: some optimizers treat a vector as no matrix."""
    width = [_WIDTH] * (weight.dim() - 1)
    count = height * math.prod(width)
    values = torch.arange(1, count + 1, dtype=torch.float32, device="cpu").sin_()
    return values.view(height, *width).to(weight.device)


def _refusal(name: str, reason: str) -> InputError:
    return InputError(
        "rowwise serves optimizers whose state is per row or shared by all rows, and that move "
        f"weights only in step(). Received {name}: {reason}. All of torch.optim are served, such "
        "as AdamW. Or call masked_gradient_only(optimizer): frozen rows then get no gradient, and "
        "what else moves a weight, such as decay and momentum, moves them."
    )
