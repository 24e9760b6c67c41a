"""The compact parameters that stand in for rows of a table while an optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from partial_embedding.errors import InputError
from partial_embedding.schedule import RateScale
from partial_embedding.torch.dry_run import Group, State
from partial_embedding.torch.inspection import StateLayout, first_state, state_of_one_row
from partial_embedding.torch.row_gradient import as_tensor, entries_of
from partial_embedding.torch.rowcopy import distinct, read_rows, run_of, sum_rows, write_rows
from partial_embedding.torch.rowset import RowSet
from partial_embedding.torch.shards import is_sharded, local, sharded_like

# What takes as long to step as to sort out which rows were touched: rows on a CPU, and numbers on a
# GPU, which waits for calls and hardly for memory.
_FEW, _FEW_ON_GPU = 1000, 2**25
# As many numbers of a tensor as an optimizer can go over several times within the cache of a CPU;
# fewer at once cost more calls than they save memory's time.
_IN_CACHE = 2**19


@dataclass(eq=False)
class Cohort:
    """Rows that began to train together, and what the optimizer remembers of them.

    Args:
        ids: The rows, sorted, int64, shape (k,).
        state: The optimizer's state; tensors that are per row have k rows.
        group_state: What the optimizer keeps in its parameter group, if anything.
        rate_scale: How fast the rows learn.
        steps: The steps that they made; counted only where the rate_scale is not plain.
    """

    ids: Tensor
    state: State = field(default_factory=dict)
    group_state: State = field(default_factory=dict)
    rate_scale: RateScale = field(default_factory=RateScale)
    steps: int = 0
    _values: Tensor | None = field(default=None, init=False)

    @property
    def is_new(self) -> bool:
        """Whether the cohort has not been stepped yet."""
        return not self.state and not self.group_state

    @cached_property
    def run(self) -> slice | None:
        """The rows as a slice, if they lie side by side: their block is then a view."""
        return run_of(self.ids)

    def values_of(self, weight: Tensor) -> Tensor:
        """The rows' values, shape (k, D), in memory that is kept for the next step."""
        values = read_rows(weight, self.ids, self.run, self._values)
        self._values = values if self.run is None else None  # what may be the table's own memory
        return values


@dataclass(eq=False)
class Block:
    """A compact parameter that stands in for rows of the table during one step.

    Args:
        cohort: The cohort that the rows belong to.
        parameter: The rows' values and gradient, shape (k, D).
        ids: Their rows in the table, or in what this process has of it, shape (k,).
        num_rows: How many rows of the cohort all processes have that share the table.
        places: Their positions within the cohort, shape (k,) or a slice; None for all, in order.
        run: Their rows as a slice, if they lie side by side.
    """

    cohort: Cohort
    parameter: nn.Parameter
    ids: Tensor
    num_rows: int
    places: Tensor | slice | None = None
    run: slice | None = None


class Blocks:
    """What makes the blocks of one step, and puts them back: the working half of `TableState`."""

    def __init__(self, parameter: nn.Parameter, layout: StateLayout, lazy: bool) -> None:
        self.parameter = parameter
        self.row_shape = parameter.shape[1:]
        self.row_size = max(1, math.prod(self.row_shape))
        self.layout = layout
        self.lazy = lazy
        self.cohorts: dict[int, Cohort] = {}
        self._rows: RowSet | None = None
        self._own_rows: RowSet | None = None  # those of them that this process has
        self._summed: Tensor | None = None  # the last compact gradient, for its memory

    @property
    def values(self) -> Tensor:
        """What this process has of the parameter."""
        return local(self.parameter)

    @property
    def rows(self) -> RowSet:
        """The trainable rows that this process has, numbered from its first one."""
        assert self._own_rows is not None, "sync comes first"
        return self._own_rows

    def blocks(self, optimizer: Optimizer, group: Group) -> Iterator[Block]:
        """Make the compact parameters of this step, with their gradients and state."""
        grad = None if self.parameter.grad is None else local(self.parameter.grad)
        if grad is None and not self.layout.flat and not self.layout.in_group:
            # Without one an optimizer neither moves a parameter nor counts its step; but LBFGS
            # flattens all of its parameters, and a count in the group goes on.
            return
        # In a dense gradient nothing tells an untouched row from one whose gradient is zero.
        entries = None if grad is None else entries_of(grad)
        if entries is not None and (self.lazy or self._rests_where_untouched(entries[0].shape[0])):
            made = self._lazy_blocks(*entries)
        else:
            made = self._whole_blocks(grad, entries, self._height(group))
        for block in made:
            if self.layout.eager and not block.cohort.state:
                whole = self.values.new_empty(len(block.cohort.ids), *self.row_shape)
                block.cohort.state = first_state(optimizer, group, nn.Parameter(whole))
            yield block

    def _rests_where_untouched(self, entries: int) -> bool:
        """Whether stepping touched rows alone gives the same bits, at a lower cost."""
        if not self.layout.rests:
            return False
        few = _FEW if self.parameter.is_cpu else _FEW_ON_GPU // self.row_size
        return self._is_exact_by_row and entries + few < len(self.rows)

    @property
    def _is_exact_by_row(self) -> bool:
        """Whether rows move by the same bits whichever others they are stepped with."""
        # Half precision rounds in another way at the end of a vector register, so by a row's place.
        exact = self.parameter.dtype in (torch.float32, torch.float64)
        return exact and self.layout.elementwise

    def _height(self, group: Group) -> int:
        """How many rows make a block: all, or as many as a CPU steps without waiting for memory."""
        every = self.parameter.shape[0]
        if len(self.rows) * self.row_size < 2 * _IN_CACHE or is_sharded(self.parameter):
            return every
        at_once = group.get("fused") or group.get("foreach") or self.layout.in_group
        if at_once or self.layout.sparse or not (self.parameter.is_cpu and self._is_exact_by_row):
            return every
        return max(1, _IN_CACHE * torch.get_num_threads() // self.row_size)

    def _whole_blocks(
        self, grad: Tensor | None, entries: tuple[Tensor, Tensor] | None, height: int
    ) -> Iterator[Block]:
        rows, sizes = self.rows, [cohort.ids.shape[0] for cohort in self.cohorts.values()]
        weight = self.values
        compact: Iterable[Tensor | None] = [None] * len(sizes)
        if grad is not None and self.layout.sparse:
            compact = _split_sparse(rows.slots, entries, sizes)
        elif entries is not None:
            # By slot, of which the last is that of frozen rows.
            slots = rows.slots.index_select(0, entries[0])
            self._summed = sum_rows(slots, entries[1], len(rows) + 1, self._summed)
            compact = self._summed[: len(rows)].split_with_sizes(sizes)
        elif grad is not None:
            dense = as_tensor(grad)
            cohorts = self.cohorts.values()
            compact = [read_rows(dense, cohort.ids, cohort.run) for cohort in cohorts]
        for number, part_grad in zip(self.cohorts, compact, strict=True):
            cohort = self.cohorts[number]
            values, ids, run = cohort.values_of(weight), cohort.ids, cohort.run
            # What has a group of its own has one of each count in it.
            if part_grad is None or ids.shape[0] < 2 * height or not cohort.rate_scale.is_plain:
                yield self._block(number, values, part_grad, ids, run=run)
                continue
            for start in range(0, ids.shape[0], height):
                at = slice(start, min(start + height, ids.shape[0]))
                there = None if run is None else slice(run.start + at.start, run.start + at.stop)
                yield self._block(number, values[at], part_grad[at], ids[at], at, there)

    def _block(
        self,
        number: int,
        values: Tensor,
        grad: Tensor | None,
        ids: Tensor,
        places: Tensor | slice | None = None,
        run: slice | None = None,
    ) -> Block:
        assert self._rows is not None, "sync comes first"
        num_rows = self._rows.cohorts[number].shape[0]
        parameter = nn.Parameter(self._shared(values, num_rows))
        parameter.grad = None if grad is None else self._shared(grad, num_rows)
        return Block(self.cohorts[number], parameter, ids, num_rows, places, run)

    def _shared(self, own: Tensor, num_rows: int) -> Tensor:
        """Rows of this process, as a part of those of all that share the table."""
        return sharded_like(own, self.parameter, num_rows) if is_sharded(self.parameter) else own

    def _lazy_blocks(self, ids_given: Tensor, values_given: Tensor) -> Iterator[Block]:
        rows, sizes = self.rows, [cohort.ids.shape[0] for cohort in self.cohorts.values()]
        slots = rows.slots.index_select(0, ids_given).long()
        stepped, position = distinct(slots, len(rows) + 1)
        summed = sum_rows(position, values_given, len(stepped))
        starts = list(accumulate(sizes, initial=0))
        bounds = torch.searchsorted(stepped, stepped.new_tensor(starts)).tolist()
        for i, (number, cohort) in enumerate(self.cohorts.items()):
            places = stepped[bounds[i] : bounds[i + 1]] - starts[i]
            ids = cohort.ids.index_select(0, places)
            part_grad = summed[bounds[i] : bounds[i + 1]]
            if self.layout.sparse:
                part_grad = _sparse(torch.arange(len(ids), device=ids.device), part_grad, len(ids))
            values = self.values.index_select(0, ids)
            yield self._block(number, values, part_grad, ids, places)

    def gather_state(self, block: Block) -> State:
        """The state to give the optimizer for a block."""
        state, places = dict(block.cohort.state), block.places
        for key, value in state.items():
            if key in self.layout.per_row:
                if isinstance(places, slice):
                    value = value[places]
                elif places is not None:
                    value = value.index_select(0, places)
                state[key] = self._shared(value, block.num_rows)
            elif isinstance(places, slice) and isinstance(value, Tensor):
                state[key] = value.clone()  # some optimizers count in place
        return state

    def check_state(self, state: State, optimizer: Optimizer) -> None:
        """Refuse state that the optimizer did not keep when it was tried."""
        # A set, since torch.compile of older releases cannot take keys from a view of keys.
        if not self.layout.flat and (unknown := set(state) - self.layout.keys):
            raise InputError(
                "an optimizer keeps the state that it was tried with. Received "
                f"{sorted(unknown)} from {type(optimizer).__name__}. Where its options changed, "
                "call detach_rowwise and rowwise again."
            )

    def scatter(self, block: Block, state: State, optimizer: Optimizer, group: Group) -> None:
        """Put the values and the state of a block, stepped with the options of `group`, back."""
        state = {k: local(v) if is_sharded(v) else v for k, v in state.items()}
        if self._summed is not None and _keeps(state, self._summed):
            self._summed = None  # as a momentum that begins as the gradient itself
        write_rows(self.values, block.ids, block.run, local(block.parameter))
        if block.places is not None and state:
            whole = block.cohort.state
            if not whole:
                row = state_of_one_row(optimizer, self.layout, group, self.values)
                rows = len(block.cohort.ids)
                whole = {
                    k: row[k].expand(rows, *row[k].shape[1:]).clone() for k in self._per_row(row)
                }
            for key in self._per_row(state):
                if isinstance(block.places, slice):
                    whole[key][block.places] = state[key]  # mostly the same memory
                else:
                    write_rows(whole[key], block.places, None, state[key])
                state[key] = whole[key]
        block.cohort.state = state

    def _per_row(self, state: State) -> list[str]:
        return [key for key in state if key in self.layout.per_row]


def _split_sparse(
    slots: Tensor, entries: tuple[Tensor, Tensor] | None, sizes: list[int]
) -> Iterator[Tensor]:
    """A sparse gradient for each cohort, as `SparseAdam` wants."""
    if entries is None:
        raise InputError(
            "SparseAdam takes sparse gradients. Received a dense one. Make the table with "
            "sparse=True, and do not tie its weight to a head."
        )
    of_id, values, start = slots[entries[0]].long(), entries[1], 0
    for size in sizes:
        mine = (of_id >= start) & (of_id < start + size)
        yield _sparse(of_id[mine] - start, values[mine], size)
        start += size


def _sparse(ids: Tensor, values: Tensor, height: int) -> Tensor:
    return torch.sparse_coo_tensor(
        ids.unsqueeze(0), values, (height, *values.shape[1:]), check_invariants=False
    )


def _keeps(state: State, tensor: Tensor) -> bool:
    """Whether an optimizer remembers a tensor itself, and not a copy of it."""
    memory = tensor.untyped_storage().data_ptr()
    tensors = (value for value in state.values() if isinstance(value, Tensor))
    return any(value.untyped_storage().data_ptr() == memory for value in tensors)
