"""What an optimizer's `state_dict` holds of its tables: K×D state, and the rows it belongs to.

It lies where any other parameter's state does, in `state[weight]`, so that whatever saves, moves or
shards optimizer state finds it, torch.distributed.checkpoint too:

    {"step": …, "rowwise": {"num_rows": V, "rows": …, "state": {"exp_avg": …, …}, …}}

What is beside `rowwise` is what some optimizers look for in any state that they load. An optimizer
that keeps no state has none of other parameters either, and torch refuses state of some only: its
tables are listed in their parameter group, and so is LBFGS's, which has one history for all.

Of a table that processes share by rows, each has its own rows' state and saves all rows': the
optimizer's `state_dict` is then a collective call, which every process makes.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from functools import partial
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from partial_embedding.errors import InputError
from partial_embedding.torch import shards
from partial_embedding.torch.blocks import Cohort
from partial_embedding.torch.dry_run import Group, State
from partial_embedding.torch.inspection import KEY, first_state, is_eager, state_of_one_row
from partial_embedding.torch.rowset import shown
from partial_embedding.torch.saved_state import (
    by_row,
    cohorts_of,
    joined,
    rate_scales_in,
    rows_in,
)
from partial_embedding.torch.shards import gathered, is_sharded, shard_of
from partial_embedding.torch.table_state import TableState

Tables = Mapping[int, TableState]
# What was saved of tables, by the place of the group and of the parameter in it.
Entries = dict[tuple[int, int], State]


def into_state_dict(optimizer: Optimizer, tables: Tables, state_dict: State) -> State:
    """Add the tables, by the id of the parameter, to what the optimizer saves of itself."""
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        listed: list[State] = []
        for i, (parameter, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            if (table := tables.get(id(parameter))) is None:
                continue
            entry = _dumped(table, optimizer, group)
            if not table.layout.flat:
                state_dict["state"].pop(key, None)
            if table.layout.keys:
                state_dict["state"][key] = {**table.shared_state, KEY: entry}
            else:
                listed.append({"position": i, **entry})
        saved.pop(KEY, None)
        if listed:
            saved[KEY] = listed
            if any(table.layout.flat for table in tables.values()):
                # A history of the rows that train is of no length that a plain optimizer could use.
                listed[0]["history"] = state_dict["state"]
                state_dict["state"] = {}
    return state_dict


def mark(optimizer: Optimizer, tables: Tables) -> None:
    """Show that there is state of the tables, once the optimizer has stepped.

    torch.distributed.checkpoint makes a step of an optimizer without any state before it saves, and
    loads only what it sees in the optimizer that it loads into.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            table = tables.get(id(parameter))
            if table is None or table.layout.flat or is_marked(optimizer, table):
                continue
            keeps = table.was_marked = bool(table.layout.keys)
            optimizer.state[parameter] = (
                {**table.shared_state, KEY: _Kept(table, optimizer, group)} if keeps else {}
            )
            if not keeps:
                group.setdefault(KEY, [])


def is_marked(optimizer: Optimizer, table: TableState) -> bool:
    """Whether an optimizer shows that there is state of a table, which others may overwrite."""
    shown = optimizer.state.get(table.parameter)
    return shown is not None and (not table.layout.keys or isinstance(shown.get(KEY), _Kept))


def without_tables(state_dict: State) -> tuple[State, Entries]:
    """What is the optimizer's own in a `state_dict`, and what was saved of tables.

    It may be an optimizer's attributes, too, after one that is not prepared has loaded that.
    """
    state, groups, entries = dict(state_dict["state"]), [], Entries()
    for g, saved in enumerate(state_dict["param_groups"]):
        group = dict(saved)
        listed = group.pop(KEY, ())
        for i, key in enumerate(saved["params"]):
            one = state.get(key, {})
            if isinstance(one, Mapping) and KEY in one:
                del state[key]
                if one[KEY]:
                    entries[g, i] = one[KEY]
        for entry in listed:
            # A plain optimizer carries our key along when it steps the table by itself.
            own = state if "history" in entry else state.get(saved["params"][entry["position"]])
            if not own:
                entries[g, entry["position"]] = entry
        groups.append(group)
    return {**state_dict, "state": state, "param_groups": groups}, entries


def take_from(optimizer: Optimizer) -> Entries:
    """Take what was saved of tables out of an optimizer that has loaded it."""
    own, entries = without_tables(vars(optimizer))
    for key in optimizer.state.keys() - own["state"].keys():
        del optimizer.state[key]
    for group in optimizer.param_groups:
        group.pop(KEY, None)
    return entries


def begin_afresh(optimizer: Optimizer, made: Container[int]) -> None:
    """Forget the tables of an optimizer, which makes state anew for these parameters, by their ids.

    That is the state that its constructor makes, if it makes any.
    """
    take_from(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in made and is_eager(optimizer, group, parameter):
                optimizer.state[parameter] = first_state(optimizer, group, parameter)


def check(
    optimizer: Optimizer, tables: Tables, entries: Entries, before_steps: bool = False
) -> None:
    """Refuse state of other rows before anything is loaded.

    With `before_steps` it was loaded by then, and rows may have joined and left since; only if none
    of those that were saved trains it is a mistake for sure.
    """
    # The number and length of groups are torch's to compare, which it does next.
    groups = [group["params"] for group in optimizer.param_groups]
    for (g, i), entry in entries.items():
        if g >= len(groups) or i >= len(groups[g]) or id(groups[g][i]) not in tables:
            raise InputError(
                f"the checkpoint has a table as parameter {i} of group {g}. Received an optimizer "
                "whose parameters come in another order. Build it as it was then."
            )
        _check_one(tables[id(groups[g][i])], entry, before_steps)


def restore(optimizer: Optimizer, tables: Tables, entries: Entries) -> None:
    """Give tables what was saved of them and checked, or what a plain optimizer has of them."""
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            if (table := tables.get(id(parameter))) is None:
                continue
            if (entry := entries.get((g, i))) is None:
                table.adopt_from(optimizer, group)  # saved by a plain optimizer
                continue
            table.take_cohorts(_cohorts_of(entry, table, group))
            if "history" in entry:
                _restore_history(optimizer, group, entry["history"])
    if entries:
        mark(optimizer, tables)


class _Kept:
    """Stands in an optimizer for the state of a table: a copy of it, or a file, has that state."""

    def __init__(self, table: TableState, optimizer: Optimizer, group: Group) -> None:
        self._owners = table, optimizer, group

    def __bool__(self) -> bool:
        return False  # there is nothing in it that was saved

    def __getitem__(self, key: str) -> Any:
        return self._dumped()[key]  # some optimizers compare what they hold with what they loaded

    def _dumped(self) -> State:
        table = self._owners[0]
        if is_sharded(table.parameter):
            return {}  # which would be a call that all processes make
        table.sync()
        return _dumped(*self._owners)

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        return copy.deepcopy(self._dumped(), memo)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return dict, (self._dumped(),)


# One table


def _dumped(table: TableState, optimizer: Optimizer, group: Group) -> State:
    """What is saved of one table; of one that processes share they all call this."""
    layout, one_row = table.layout, State()
    if any(layout.keys - cohort.state.keys() for cohort in table.cohorts.values()):
        # What loads into the tensors of this checkpoint finds those of rows that have stepped.
        one_row = state_of_one_row(optimizer, layout, group, table.values)
    entry = by_row(table.cohorts, layout.per_row, one_row, shard_of(table.parameter).start)
    if is_sharded(table.parameter):
        entry = joined(entry, partial(gathered, weight=table.parameter), shards.CHUNK_BYTES)
    return {"num_rows": table.parameter.shape[0], **entry}


def _check_one(table: TableState, entry: State, before_steps: bool) -> None:
    num_rows = table.parameter.shape[0]
    if entry["num_rows"] not in (num_rows, *table.table.earlier_sizes):
        raise InputError(
            f"optimizer state belongs to a table of one size. Received state for "
            f"{entry['num_rows']} rows and {table.name!r} with {num_rows}. Load the checkpoint's "
            "vocabulary first."
        )
    saved = rows_in(entry).sort().values
    rows = table.table.row_set.ids.cpu()
    rows = rows[rows < entry["num_rows"]]  # by which the table grew since has no state yet
    some = before_steps and bool(torch.isin(saved, rows).any())
    if not (some or torch.equal(saved, rows)):
        raise InputError(
            "optimizer state belongs to the rows that trained. Received state for "
            f"{len(saved)} rows {shown(saved)}, while in {table.name!r} {len(rows)} train "
            f"{shown(rows)}. Call set_trainable_rows with the former first."
        )
    for rate_scale in rate_scales_in(entry):
        table.check_rate_scale(rate_scale)


def _cohorts_of(entry: State, table: TableState, group: Group) -> dict[int, Cohort]:
    device, cohorts = table.table.row_set.device, cohorts_of(entry)
    for cohort in cohorts.values():
        cohort.ids = cohort.ids.to(device)
        cohort.state = {k: _on_device(k, v, device, group) for k, v in cohort.state.items()}
    return cohorts


def _on_device(key: str, value: Any, device: torch.device, group: Group) -> Any:
    # torch keeps step counts on the CPU unless the maths itself runs on the device.
    counts_on_cpu = key == "step" and not (group.get("capturable") or group.get("fused"))
    return value.to(device) if isinstance(value, Tensor) and not counts_on_cpu else value


def _restore_history(optimizer: Optimizer, group: Group, saved: State) -> None:
    params: list[nn.Parameter] = group["params"]
    for index, history in saved.items():
        param = params[int(index)]
        to_device = methodcaller("to", param.device)
        optimizer.state[param] = tree_map_only(Tensor, to_device, history)
