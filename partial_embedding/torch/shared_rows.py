"""What belongs to a weight, and so to all tables that have it."""

from __future__ import annotations

from dataclasses import dataclass

from partial_embedding.rows.vocabulary import Ids
from partial_embedding.torch.origin import Origin
from partial_embedding.torch.rowset import RowSet


@dataclass(eq=False)
class SharedRows:
    """Which rows of a weight train, and what else is known of them: one for all tables tied to it.

    Args:
        row_set: The rows that train; None stands for "every row but padding", for which no
            bookkeeping exists.
        padding_row: The row that never trains.
        earlier_sizes: How many rows there were each time before the weight grew.
        new_rows: The rows by which it grew last.
        origin: What it held before its rows trained, where that is remembered.
        saves_rows: Whether a `state_dict` then holds no more than the rows that did.
        is_tied: Whether several tables have the weight.
    """

    row_set: RowSet | None = None
    padding_row: int | None = None
    earlier_sizes: tuple[int, ...] = ()
    new_rows: Ids | None = None
    origin: Origin | None = None
    saves_rows: bool = False
    is_tied: bool = False

    @property
    def has_frozen(self) -> bool:
        """Whether some row other than padding does not train."""
        rows = self.row_set
        return rows is not None and len(rows) + (self.padding_row is not None) < rows.num_rows
