"""The optimizer state of one table's cohorts, and what becomes of it when rows change."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from operator import is_

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from partial_embedding.errors import InputError
from partial_embedding.schedule import RateScale
from partial_embedding.torch.blocks import Blocks, Cohort
from partial_embedding.torch.dry_run import Group, State
from partial_embedding.torch.inspection import StateLayout
from partial_embedding.torch.rowset import RowSet
from partial_embedding.torch.shards import is_sharded, local, shard_of
from partial_embedding.torch.table import PartialTable


class TableState(Blocks):
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
        unscaled: str | None,
        options: Group,
    ) -> None:
        super().__init__(parameter, layout, lazy)
        self.name = name
        self.table = table
        self.unscaled = unscaled
        self.was_marked = False  # whether the optimizer shows that there is state
        self.change_layout(layout, options)
        for rate_scale in table.row_set.rate_scales.values():
            self.check_rate_scale(rate_scale)

    def check_rate_scale(self, rate_scale: RateScale) -> None:
        """Refuse a rate that the optimizer cannot keep, since it has one for all."""
        if self.unscaled is not None and not rate_scale.is_plain:
            raise InputError(
                f"rows of {self.name!r} learn at the rate of their optimizer. Received "
                f"{rate_scale} for {self.unscaled}. Leave out lr_scale and "
                "warmup_steps, or take another optimizer."
            )

    def change_layout(self, layout: StateLayout, options: Group) -> None:
        """Go on under options that were changed; what is remembered already stays."""
        keys, per_row = layout.keys | self.layout.keys, layout.per_row | self.layout.per_row
        self.layout = replace(layout, keys=keys, per_row=per_row)
        # What a step itself changes is no option.
        self._options = {k: v for k, v in options.items() if k not in layout.in_group}

    def has_options_of(self, group: Group) -> bool:
        """Whether the layout follows from the options of a group, as far as can be seen at once."""
        return all(map(is_, map(group.get, self._options), self._options.values()))

    def sync(self) -> bool:
        """Take over the table's row set, and say whether any row joined, to begin, or left."""
        rows = self.table.row_set
        if rows is self._rows:
            return False
        own = rows.within(shard_of(self.parameter))
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

    def _restricted(self, old: Cohort | None, ids: Tensor, rate_scale: RateScale) -> Cohort:
        if old is None:
            return Cohort(ids, rate_scale=rate_scale)
        state = dict(old.state)
        state |= {key: state[key].to(ids.device) for key in self._per_row(state)}
        if len(old.ids) > len(ids):
            # Rows only ever leave a cohort, so each id is found among the old ones.
            state = self._of_rows(state, torch.searchsorted(old.ids.to(ids.device), ids))
        return replace(old, ids=ids, state=state)

    def _of_rows(self, state: State, places: Tensor) -> State:
        """The state of some rows, by their places among all of it."""
        return {
            key: value.index_select(0, places.to(value.device))
            if key in self.layout.per_row
            else value
            for key, value in state.items()
        }

    # Saving and restoring

    @property
    def shared_state(self) -> State:
        """What is not per row, as the optimizer has it for a parameter."""
        stepped = next((cohort.state for cohort in self.cohorts.values() if cohort.state), {})
        own = {key: value for key, value in stepped.items() if key not in self.layout.per_row}
        return {**self.layout.shared, **own}

    def take_cohorts(self, cohorts: dict[int, Cohort]) -> None:
        """Take over the cohorts of a checkpoint, by number, and with them which rows train."""
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
        if not is_sharded(self.parameter):
            return cohorts
        shard, own = shard_of(self.parameter), {}
        for number, cohort in cohorts.items():
            state = self._of_rows(cohort.state, shard.has(cohort.ids).nonzero().flatten())
            own[number] = replace(cohort, ids=shard.own(cohort.ids), state=state)
        return own

    def adopt_from(self, optimizer: Optimizer, group: Group) -> None:
        """Go on with the state of shape V×D that a plain optimizer has, and then has no more."""
        self.was_marked = False
        self.sync()
        loaded = optimizer.state.get(self.parameter, {})
        if any(isinstance(loaded.get(key), Mapping) for key in self.layout.per_row):
            # torch.distributed.checkpoint flattens state, and looks for what is there already.
            raise InputError(
                "state of rows is loaded into an optimizer that knows its tables. Received "
                f"{type(optimizer).__name__} with nothing for {self.name!r}, since its constructor "
                "made state for a plain table. Make it anew, call rowwise(optimizer, model), and "
                "then load."
            )
        if self.layout.flat:
            clear_history(optimizer)  # as long as the whole table
            return
        state = optimizer.state.pop(self.parameter, {})
        state = {key: local(v) if is_sharded(v) else v for key, v in state.items()}
        shared = state.keys() - self.layout.per_row
        heights = [len(value) for key, value in state.items() if key in self.layout.per_row]
        for cohort in self.cohorts.values():
            if len(cohort.ids) and cohort.ids[0] >= min(heights, default=len(self.values)):
                continue  # by which the table grew since
            # Copies, since some optimizers count in place.
            cohort.state = self._of_rows(state, cohort.ids)
            cohort.state |= {key: copy.deepcopy(state[key]) for key in shared}
            if state:
                counted = self.layout.in_group & group.keys()
                cohort.group_state = {key: copy.deepcopy(group[key]) for key in counted}


def clear_history(optimizer: Optimizer) -> None:
    """Make LBFGS forget its one history of all parameters, and how long it was."""
    optimizer.state.clear()
    vars(optimizer)["_numel_cache"] = None
