"""What a table held before its rows trained: with it, a file need hold no more than those that did.

In a `state_dict` the rows that ever trained take the place of the whole weight, with their ids and
a fingerprint of all others. Loaded into the same table as it was before, they make it what it was.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partial_embedding.errors import InputError
from partial_embedding.torch.fingerprint import rows_fingerprint, table_fingerprint, wrapped


class Origin:
    """The first values of each row of a table that ever trained.

    They stay on the CPU, K×D, so that a file of an earlier day can be loaded after other rows have
    trained.

    Args:
        weight: The table, shape (V, D), as no row of it has trained yet.
    """

    def __init__(self, weight: Tensor) -> None:
        # Rows by which the table grows later have no origin that another process could know.
        self.num_rows = weight.shape[0]
        # The rows that ever trained, rising, int64, shape (n,), and their first values, (n, D).
        self.ids = torch.empty(0, dtype=torch.int64, device="cpu")
        self.values = weight.detach().new_empty(0, *weight.shape[1:], device="cpu")
        self._fingerprints: dict[tuple[torch.dtype, int], int] = {}

    @torch.no_grad()
    def include(self, weight: Tensor, ids: Tensor) -> None:
        """Remember what rows hold that are about to train for the first time."""
        ids = ids.cpu()
        if not len(joining := ids[~torch.isin(ids, self.ids)]):
            return
        every, order = torch.cat([self.ids, joining]).sort()
        values = torch.cat([self.values.to(weight.dtype), _rows(weight, joining).cpu()])
        self.ids, self.values = every, values[order]

    def fingerprint_without(
        self, weight: Tensor, ids: Tensor, num_rows: int, dtype: torch.dtype
    ) -> int:
        """A number for what the table held at first, but for rows that ever trained.

        The first `num_rows` rows count, as if they were cast to the dtype.
        """
        # The table is read once. No row changes from here on but those that are remembered.
        if (dtype, num_rows) not in self._fingerprints:
            now = table_fingerprint(weight, num_rows, dtype)
            trained = _fingerprint(_rows(weight, self.ids), self.ids, num_rows, dtype)
            first = _fingerprint(self.values, self.ids, num_rows, dtype)
            self._fingerprints[dtype, num_rows] = now - trained + first
        places = torch.searchsorted(self.ids, ids)
        left_out = _fingerprint(self.values[places], ids, num_rows, dtype)
        return wrapped(self._fingerprints[dtype, num_rows] - left_out)


@dataclass(frozen=True)
class SavedRows:
    """What a `state_dict` holds of a table whose origin is known.

    Args:
        ids: The rows that ever trained, rising, int64, shape (n,).
        rows: What they hold, shape (n, D).
        num_rows: The rows V of the table.
        num_first: Its rows before it grew.
        others: The fingerprint of what all other rows hold.
    """

    ids: Tensor
    rows: Tensor
    num_rows: int
    num_first: int
    others: int

    @staticmethod
    def of(weight: Tensor, origin: Origin) -> SavedRows:
        """What is to be saved of a table that held what `origin` knows."""
        num_first = min(origin.num_rows, weight.shape[0])
        origin.include(weight, torch.arange(num_first, weight.shape[0], device="cpu"))
        others = origin.fingerprint_without(weight, origin.ids, num_first, weight.dtype)
        ids = origin.ids
        return SavedRows(ids, _rows(weight, ids), weight.shape[0], num_first, others)

    def put_into(self, state_dict: dict[str, Any], name: str) -> None:
        """Take the place of the whole weight in a `state_dict`."""
        state_dict.pop(name, None)
        about = torch.tensor([self.num_rows, self.num_first, self.others], device="cpu")
        entries = {"ids": self.ids, "rows": self.rows, "others": about}
        # Of tables that are tied the file has one, as it has of their weight.
        tied = [key.removesuffix("ids") for key, value in state_dict.items() if value is self.ids]
        for key, value in entries.items():
            state_dict[f"{name}.{key}"] = state_dict[f"{tied[0]}{key}"] if tied else value

    @staticmethod
    def taken_from(state_dict: dict[str, Any], name: str) -> SavedRows | None:
        """What `put_into` put there, which is there no longer; or None."""
        if f"{name}.others" not in state_dict:
            return None
        ids, rows, about = (state_dict.pop(f"{name}.{key}") for key in ("ids", "rows", "others"))
        return SavedRows(ids.cpu(), rows, *about.tolist())

    @torch.no_grad()
    def restore(
        self, weight: Tensor, origin: Origin, name: str, earlier_sizes: Collection[int] = ()
    ) -> None:
        """Make a table what it was when it was saved.

        Raises:
            InputError: It is another table. It is then as it was.
        """
        here = tuple(weight.shape)
        sizes = {weight.shape[0], *earlier_sizes}
        if self.num_rows not in sizes or self.rows.shape[1:] != weight.shape[1:]:
            raise InputError(
                f"rows that trained are loaded into their own table. Received those of a table of "
                f"the shape {(self.num_rows, *self.rows.shape[1:])} for {name!r} of the shape "
                f"{here}. Make the model as it was; where it grew since, load first, and then call "
                "grow_table."
            )
        origin.include(weight, self.ids)
        dtype = self.rows.dtype
        if origin.fingerprint_without(weight, self.ids, self.num_first, dtype) != self.others:
            raise InputError(
                f"rows that trained are loaded into the table that they are from. Received, for "
                f"{name!r}, a checkpoint of {len(self.ids)} rows and a table whose other rows are "
                "not those of then. Make the model from the same vectors, or with the same seed."
            )
        # Rows that trained since go back to where they began.
        weight.index_copy_(0, origin.ids.to(weight.device), origin.values.to(weight))
        weight.index_copy_(0, self.ids.to(weight.device), self.rows.to(weight))


def _rows(weight: Tensor, ids: Tensor) -> Tensor:
    return weight.detach().index_select(0, ids.to(weight.device))


def _fingerprint(rows: Tensor, ids: Tensor, num_rows: int, dtype: torch.dtype) -> int:
    counts = (ids < num_rows).nonzero().flatten()
    return rows_fingerprint(
        rows.index_select(0, counts.to(rows.device)).to(dtype),
        ids.index_select(0, counts).to(rows.device),
    )
