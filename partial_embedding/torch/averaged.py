"""Which parameters of a table are averaged by row, among which processes, and by whom."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from partial_embedding.torch.table import PartialTable

Group = Any  # `ProcessGroup` exists only where torch was built with torch.distributed


class Averaging:
    """Processes that average parameters of tables by row.

    Args:
        group_of: Gives the process group, or None once nobody averages any more.
    """

    def __init__(self, group_of: Callable[[], Group | None]) -> None:
        self.group_of = group_of
        # Whether what the last backward pass left is averaged already, alike in all processes.
        self.is_done = False


def average_over(table: PartialTable, names: Iterable[str], averaging: Averaging) -> None:
    """Have parameters of a table averaged by row from now on; a copy knows nothing of it.

    Args:
        table: The table.
        names: Those of its `row_parameters`.
        averaging: By which processes.
    """
    vars(table)["_averaged"] = dict.fromkeys(names, averaging)


def leave_to_ddp(table: PartialTable) -> None:
    """Know that `DistributedDataParallel` reduces a table itself.

    Args:
        table: The table.
    """
    vars(table)["_averaged"] = None


def is_left_to_ddp(table: PartialTable) -> bool:
    """Whether `DistributedDataParallel` reduces a table itself.

    Args:
        table: The table.
    """
    return vars(table).get("_averaged", {}) is None


def averaging_of(table: PartialTable, parameter: nn.Parameter) -> Averaging | None:
    """Those that average a parameter by row, or None.

    Args:
        table: The table.
        parameter: One of its parameters with an entry for each row.
    """
    for name, averaging in (vars(table).get("_averaged") or {}).items():
        if table.row_parameter(name) is parameter:
            alive: Averaging | None = averaging if averaging.group_of() is not None else None
            return alive
    return None
