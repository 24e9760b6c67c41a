"""The optimizer state of one table's cohorts, and the compact parameters that stand in for them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from operator import is_

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from partial_embedding.errors import InputError
from partial_embedding.schedule import RateScale
from partial_embedding.torch.inspection import (
    Group,
    State,
    StateLayout,
    first_state,
    untouched_row_state,
)
from partial_embedding.torch.row_gradient import as_tensor, entries_of
from partial_embedding.torch.rowcopy import (
    distinct,
    read_rows,
    run_of,
    sum_rows,
    write_rows,
)
from partial_embedding.torch.rowset import RowSet
from partial_embedding.torch.shards import as_block, is_sharded, local, shard_of
from partial_embedding.torch.table import PartialTable

_FEW = 1000


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
        """The rows' values, shape (k, D), in memory that is kept for the next step.

        Args:
            weight: The table, shape (V, D).
        """
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
        places: Their positions within the cohort, shape (k,), or None for all of it in order.
    """

    cohort: Cohort
    parameter: nn.Parameter
    ids: Tensor
    num_rows: int
    places: Tensor | None = None


class TableState:
    """What one optimizer remembers of one table: nothing but the state of its trainable rows.

    Args:
        name: The table's name in the model, for messages.
        table: The table.
        parameter: What the optimizer holds: the table's weight, the parameter that it is computed
            from, or the bias of a head.
        layout: How the optimizer keeps its state.
        lazy: Step only rows that the batch touched.
        unscaled: Why rows cannot have a learning rate of their own, or None where they can.
        options: The options that the layout follows from.

    Raises:
        InputError: Rows of the table have a rate of their own already, which it cannot keep.
    """

    def __init__(
        self,
        name: str,
        table: PartialTable,
        parameter: nn.Parameter,
        layout: StateLayout,
        lazy: bool,
        unscaled: str | None = None,
        options: Group | None = None,
    ) -> None:
        self.name = name
        self.table = table
        self.parameter = parameter
        self.row_shape = parameter.shape[1:]
        self.lazy = lazy
        self.unscaled = unscaled
        self._set_layout(layout, options or {})
        self.cohorts: dict[int, Cohort] = {}
        self._rows: RowSet | None = None
        self._own_rows: RowSet | None = None  # those of them that this process has
        self._summed: Tensor | None = None  # the last compact gradient, for its memory
        for rate_scale in table.row_set.rate_scales.values():
            self.check_rate_scale(rate_scale)

    def check_rate_scale(self, rate_scale: RateScale) -> None:
        """Refuse a rate_scale that the optimizer cannot keep.

        Args:
            rate_scale: How fast rows would learn.

        Raises:
            InputError: It is not the optimizer's own rate, and the optimizer has one rate for all.
        """
        if self.unscaled is not None and not rate_scale.is_plain:
            raise InputError(
                f"rows of {self.name!r} learn at the rate of their optimizer. Received "
                f"{rate_scale} for {self.unscaled}. Leave out lr_scale and "
                "warmup_steps, or take another optimizer."
            )

    def change_layout(self, layout: StateLayout, options: Group) -> None:
        """Go on under options that were changed; what is remembered already stays.

        Args:
            layout: How the optimizer keeps its state from now on.
            options: The options that it follows from.
        """
        keys, per_row = layout.keys | self.layout.keys, layout.per_row | self.layout.per_row
        self._set_layout(replace(layout, keys=keys, per_row=per_row), options)

    def _set_layout(self, layout: StateLayout, options: Group) -> None:
        self.layout = layout
        # What a step itself changes is no option.
        self._options = {k: v for k, v in options.items() if k not in layout.in_group}

    def has_options_of(self, group: Group) -> bool:
        """Whether the layout follows from the options of a group, as far as can be seen at once.

        Args:
            group: A parameter group.
        """
        return all(map(is_, map(group.get, self._options), self._options.values()))

    def sync(self) -> bool:
        """Take over the table's row set: new cohorts begin, rows that left lose their state.

        Returns:
            Whether any row joined or left.
        """
        rows = self.table.row_set
        if rows is self._rows:
            return False
        shard = shard_of(self.parameter)
        own = rows if shard is None else rows.within(shard)
        before, self.cohorts = self.cohorts, {}
        for number, ids in own.cohorts.items():
            rate_scale = rows.rate_scales.get(number, RateScale())
            self.cohorts[number] = self._restricted(before.get(number), ids, rate_scale)
        changed = self._rows is not None and not (
            before.keys() == self.cohorts.keys()
            and all(len(before[n].ids) == len(cohort.ids) for n, cohort in self.cohorts.items())
        )
        self._rows, self._own_rows = rows, own
        return changed

    @property
    def values(self) -> Tensor:
        """What this process has of the parameter."""
        return local(self.parameter)

    @property
    def rows(self) -> RowSet:
        """The trainable rows that this process has, numbered from its first one."""
        assert self._own_rows is not None, "sync comes first"
        return self._own_rows

    def _restricted(self, old: Cohort | None, ids: Tensor, rate_scale: RateScale) -> Cohort:
        if old is None:
            return Cohort(ids, rate_scale=rate_scale)
        if len(old.ids) == len(ids):
            return replace(old, ids=ids, state=self._moved(old.state, ids))
        # Rows only ever leave a cohort, so each id is found among the old ones.
        stayed = torch.searchsorted(old.ids.to(ids.device), ids)
        state = self._moved(old.state, ids)
        state.update({k: state[k].index_select(0, stayed) for k in self._per_row(state)})
        return replace(old, ids=ids, state=state)

    def _moved(self, state: State, like: Tensor) -> State:
        return {k: v.to(like.device) if k in self.layout.per_row else v for k, v in state.items()}

    def _per_row(self, state: State) -> list[str]:
        return [key for key in state if key in self.layout.per_row]

    # Blocks: what the optimizer's own maths sees instead of the table

    def blocks(self, optimizer: Optimizer, group: Group) -> Iterator[Block]:
        """Make the compact parameters of this step, with their gradients and state.

        Args:
            optimizer: The optimizer.
            group: Its parameter group that holds the table.
        """
        grad = None if self.parameter.grad is None else local(self.parameter.grad)
        if grad is None and not self.layout.flat and not self.layout.in_group:
            return  # without a gradient the optimizer neither moves a parameter nor counts the step
        # In a dense gradient nothing tells an untouched row from one whose gradient is zero.
        entries = None if grad is None else entries_of(grad)
        if entries is not None and (self.lazy or self._rests_where_untouched(entries[0].shape[0])):
            made = self._lazy_blocks(*entries)
        else:
            made = self._whole_blocks(grad, entries)
        for block in made:
            if self.layout.eager and not block.cohort.state:
                whole = self.values.new_empty(len(block.cohort.ids), *self.row_shape)
                block.cohort.state = first_state(optimizer, group, nn.Parameter(whole))
            yield block

    def _rests_where_untouched(self, entries: int) -> bool:
        """Whether stepping touched rows alone gives the same bits, at a lower cost."""
        if not self.layout.rests:
            return False
        # Half precision rounds in another way at the end of a vector register, so by a row's place.
        exact = self.parameter.dtype in (torch.float32, torch.float64)
        # To sort out which rows were touched takes as long as to step some more.
        return exact and entries + _FEW < len(self.rows)

    def _whole_blocks(
        self, grad: Tensor | None, entries: tuple[Tensor, Tensor] | None
    ) -> Iterator[Block]:
        rows, sizes = self.rows, [cohort.ids.shape[0] for cohort in self.cohorts.values()]
        weight = self.values
        compact: Iterable[Tensor | None] = [None] * len(sizes)
        if grad is not None and self.layout.sparse:
            compact = _split_sparse(rows.slots, entries, sizes)
        elif entries is not None:
            compact = torch.split_with_sizes(self._compact(rows, *entries), sizes)
        elif grad is not None:
            dense = as_tensor(grad)
            cohorts = self.cohorts.values()
            compact = [read_rows(dense, cohort.ids, cohort.run) for cohort in cohorts]
        for number, part_grad in zip(self.cohorts, compact, strict=True):
            cohort = self.cohorts[number]
            yield self._block(number, cohort.values_of(weight), part_grad, cohort.ids)

    def _block(
        self,
        number: int,
        values: Tensor,
        grad: Tensor | None,
        ids: Tensor,
        places: Tensor | None = None,
    ) -> Block:
        assert self._rows is not None, "sync comes first"
        num_rows = self._rows.cohorts[number].shape[0]
        parameter = nn.Parameter(self._shared(values, num_rows))
        parameter.grad = None if grad is None else self._shared(grad, num_rows)
        return Block(self.cohorts[number], parameter, ids, num_rows, places)

    def _shared(self, own: Tensor, num_rows: int) -> Tensor:
        """Rows of this process, as a part of those of all that share the table."""
        return as_block(own, self.parameter, num_rows) if is_sharded(self.parameter) else own

    def _compact(self, rows: RowSet, ids: Tensor, values: Tensor) -> Tensor:
        """The gradient of the trainable rows by slot, shape (K, D)."""
        slots = rows.slots.index_select(0, ids)
        self._summed = sum_rows(slots, values, len(rows) + 1, self._summed)
        return self._summed[: len(rows)]

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
        state = dict(block.cohort.state)
        for key in self._per_row(state):
            rows = state[key]
            if block.places is not None:
                rows = rows.index_select(0, block.places)
            state[key] = self._shared(rows, block.num_rows)
        return state

    def check_state(self, state: State, optimizer: Optimizer) -> None:
        """Refuse state that the optimizer did not keep when it was tried.

        Args:
            state: What it keeps of a block.
            optimizer: The optimizer.

        Raises:
            InputError: There is a key of which nothing is known.
        """
        if not self.layout.flat and (unknown := state.keys() - self.layout.keys):
            raise InputError(
                "an optimizer keeps the state that it was tried with. Received "
                f"{sorted(unknown)} from {type(optimizer).__name__}. Where its options changed, "
                "call detach_rowwise and rowwise again."
            )

    def scatter(self, block: Block, state: State, optimizer: Optimizer, group: Group) -> None:
        """Put the values and the state of a block back where they belong.

        Args:
            block: A block that `blocks` made.
            state: The optimizer's state of it.
            optimizer: The optimizer.
            group: Its parameter group that holds the table, with the block's learning rate.
        """
        state = {k: local(v) if is_sharded(v) else v for k, v in state.items()}
        if self._summed is not None and _keeps(state, self._summed):
            self._summed = None
        run = block.cohort.run if block.places is None else None
        write_rows(self.values, block.ids, run, local(block.parameter))
        if block.places is not None and state:
            whole = block.cohort.state
            if not whole:
                row = untouched_row_state(optimizer, self.layout, group, self.values)
                rows = len(block.cohort.ids)
                whole = {k: v.expand(rows, *v.shape[1:]).clone() for k, v in row.items()}
            for key in self._per_row(state):
                write_rows(whole[key], block.places, None, state[key])
                state[key] = whole[key]
        block.cohort.state = state

    # Saving and restoring

    @property
    def shared_state(self) -> State:
        """What is not per row, as the optimizer has it for a parameter."""
        stepped = next((cohort.state for cohort in self.cohorts.values() if cohort.state), {})
        own = {key: value for key, value in stepped.items() if key not in self.layout.per_row}
        return {**self.layout.shared, **own}

    def take_cohorts(self, cohorts: dict[int, Cohort]) -> None:
        """Take over the cohorts of a checkpoint, and with them which rows train.

        Args:
            cohorts: The cohorts by number.
        """
        now = self.table.row_set
        ids = {number: cohort.ids for number, cohort in cohorts.items()}
        scaled = {n: c.rate_scale for n, c in cohorts.items() if not c.rate_scale.is_plain}
        after = max([*ids, now.next_number - 1]) + 1
        saved = RowSet(now.num_rows, ids, after, now.device, scaled)
        self.cohorts, self._rows = self._own_part(cohorts), None
        # Rows may have changed since an optimizer loaded that was not prepared then.
        self.table.row_set = saved.followed_by(now)
        self.sync()

    def _own_part(self, cohorts: dict[int, Cohort]) -> dict[int, Cohort]:
        """What this process has of cohorts."""
        if (shard := shard_of(self.parameter)) is None:
            return cohorts
        own = {}
        for number, cohort in cohorts.items():
            here = shard.has(cohort.ids)
            state = {
                key: value[here] if key in self.layout.per_row else value
                for key, value in cohort.state.items()
            }
            own[number] = replace(cohort, ids=shard.own(cohort.ids), state=state)
        return own

    def adopt_from(self, optimizer: Optimizer, group: Group) -> None:
        """Go on with the state of shape V×D that a plain optimizer has for the whole table.

        Args:
            optimizer: The optimizer, which then has no state of its own for the table.
            group: Its parameter group that holds the table.
        """
        self.sync()
        if self.layout.flat:
            clear_history(optimizer)  # as long as the whole table
            return
        state = optimizer.state.pop(self.parameter, {})
        state = {key: local(v) if is_sharded(v) else v for key, v in state.items()}
        heights = [len(value) for key, value in state.items() if key in self.layout.per_row]
        for cohort in self.cohorts.values():
            if len(cohort.ids) and cohort.ids[0] >= min(heights, default=len(self.values)):
                continue  # by which the table grew since
            cohort.state = {
                key: value.index_select(0, cohort.ids.to(value.device))
                if key in self.layout.per_row
                else value.clone()
                if isinstance(value, Tensor)
                else value
                for key, value in state.items()
            }
            if state:  # a copy, since some optimizers count in place
                counted = self.layout.in_group & group.keys()
                cohort.group_state = {key: copy.deepcopy(group[key]) for key in counted}


def clear_history(optimizer: Optimizer) -> None:
    """Make LBFGS forget its one history of all parameters, and how long it was."""
    optimizer.state.clear()
    vars(optimizer)["_numel_cache"] = None


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
