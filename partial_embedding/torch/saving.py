"""What an optimizer's `state_dict` holds of its tables: K×D state, and the rows it belongs to.

It lies in the parameter group, under the key `rowwise`, and not under `state[weight]`:
torch casts what it finds there to the dtype of the weight, row ids too (257 is 256 in bf16), and
a plain optimizer would take it for state of the whole table. This way a plain optimizer loads the
checkpoint, and begins the table's state afresh.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from partial_embedding.errors import InputError
from partial_embedding.torch.inspection import Group, State
from partial_embedding.torch.table_state import TableState

KEY = "rowwise"

Tables = Mapping[int, TableState]


def into_state_dict(optimizer: Optimizer, tables: Tables, state_dict: State) -> State:
    """Add the tables to what the optimizer saves of itself.

    Args:
        optimizer: The optimizer.
        tables: Its tables, by the id of the weight.
        state_dict: The optimizer's own.
    """
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        here = {i: tables[id(p)] for i, p in enumerate(group["params"]) if id(p) in tables}
        if not here:
            continue
        saved[KEY] = [{"position": i, **table.dump()} for i, table in here.items()]
        if any(table.layout.flat for table in here.values()):
            # A history of the rows that train is of no length that a plain optimizer could use.
            saved[KEY][0]["history"] = state_dict["state"]
            state_dict["state"] = {}
    return state_dict


def check_state_dict(optimizer: Optimizer, tables: Tables, state_dict: State) -> None:
    """Refuse state of other rows before anything is loaded.

    Args:
        optimizer: The optimizer.
        tables: Its tables, by the id of the weight.
        state_dict: What would be loaded.

    Raises:
        InputError: A table has another size, place or set of rows than the one that was saved.
    """
    # The number and length of groups are torch's to compare, which it does next.
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        for entry in saved.get(KEY, ()):
            if _is_stale(entry, saved, state_dict["state"]):
                continue
            position, params = entry["position"], group["params"]
            if position >= len(params) or id(params[position]) not in tables:
                raise InputError(
                    f"the checkpoint has a table as parameter {position} of a group. Received an "
                    "optimizer whose parameters come in another order. Build it as it was then."
                )
            tables[id(params[position])].check(entry)


def from_state_dict(optimizer: Optimizer, tables: Tables) -> None:
    """Take what was loaded out of the optimizer's groups and into the tables.

    Args:
        optimizer: The optimizer, just after it loaded its own.
        tables: Its tables, by the id of the weight.
    """
    for group in optimizer.param_groups:
        fresh = (e for e in group.pop(KEY, ()) if not _is_stale(e, group, optimizer.state))
        entries: dict[int, Any] = {entry["position"]: entry for entry in fresh}
        for position, param in enumerate(group["params"]):
            if (table := tables.get(id(param))) is None:
                continue
            if (entry := entries.get(position)) is None:
                table.adopt_from(optimizer, group)  # saved without rowwise, or after that
                continue
            table.restore(entry, group)
            if "history" in entry:
                _restore_history(optimizer, group, entry["history"])


def _is_stale(entry: State, group: Group, state: Mapping[Any, Any]) -> bool:
    """Whether a plain optimizer, which carries our key along, has stepped the table since."""
    if "history" in entry:
        return bool(state)
    return bool(state.get(group["params"][entry["position"]]))


def _restore_history(optimizer: Optimizer, group: Group, saved: State) -> None:
    params: list[nn.Parameter] = group["params"]
    for index, history in saved.items():
        param = params[int(index)]
        optimizer.state[param] = {k: _moved(v, param.device) for k, v in history.items()}


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_moved(part, device) for part in value]
    return value.to(device) if isinstance(value, Tensor) else value
