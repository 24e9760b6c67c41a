"""Which parameters of a table are averaged by row, and among which processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from partial_embedding.torch.table import PartialTable

Group = Any  # `ProcessGroup` exists only where torch was built with torch.distributed


def average_over(
    table: PartialTable, names: Iterable[str], group_of: Callable[[], Group | None]
) -> None:
    """Have parameters of a table averaged by row from now on; a copy knows nothing of it.

    Args:
        table: The table.
        names: Those of its `row_parameters`.
        group_of: Gives the process group, or None once nobody averages any more.
    """
    vars(table)["_averaged"] = dict.fromkeys(names, group_of)


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


def averaging_group(table: PartialTable, parameter: nn.Parameter) -> Group | None:
    """The processes over which a parameter is averaged by row, or None.

    Args:
        table: The table.
        parameter: One of its parameters with an entry for each row.
    """
    for name, group_of in (vars(table).get("_averaged") or {}).items():
        if table.row_parameter(name) is parameter:
            return group_of()
    return None
