"""The trainable rows of one table as tensors: cohorts, and where each row stands among them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from partial_embedding.rows.fingerprint import fingerprint_of
from partial_embedding.schedule import RateScale
from partial_embedding.torch.shards import Shard


class RowSet:
    """The rows of a table that train, by cohort; replaced when rows change, never mutated.

    Rows that began to train together are a cohort. The rows of all cohorts, oldest cohort first,
    are numbered 0 … K-1; that number is a row's *slot* in every compact K×D tensor.

    Args:
        num_rows: The number of rows V of the table.
        cohorts: Sorted ids, int64, by the cohort's number; numbers rise with time.
        next_number: The number that the next cohort gets.
        device: Where the ids lie.
        rate_scales: How fast cohorts learn, by number; those that are not named are plain.
        keep_empty: Whether cohorts without rows are kept; processes that share a table have all.
    """

    def __init__(
        self,
        num_rows: int,
        cohorts: Mapping[int, Tensor],
        next_number: int,
        device: torch.device | str = "cpu",
        rate_scales: Mapping[int, RateScale] | None = None,
        keep_empty: bool = False,
    ) -> None:
        self.num_rows = num_rows
        self.cohorts = {n: ids for n, ids in sorted(cohorts.items()) if keep_empty or len(ids)}
        self.rate_scales = {n: p for n, p in (rate_scales or {}).items() if n in self.cohorts}
        self.next_number = next_number
        self.device = torch.device(device)
        self._within: dict[Shard, RowSet] = {}
        # The row id of each slot, int64, shape (K,); without a copy where there is one cohort.
        none, ids = torch.empty(0, dtype=torch.int64, device=self.device), self.cohorts.values()
        self.order = next(iter(ids)) if len(ids) == 1 else torch.cat([none, *ids])
        # Whether each row of the table trains, booleans, shape (V,). Made now: an exporter that
        # asked for it first would leave one that has no memory. What inference makes, no backward
        # pass may keep.
        with torch.inference_mode(False):
            self.mask = torch.zeros(num_rows, dtype=torch.bool, device=self.device)
            self.mask[self.order] = True

    def __len__(self) -> int:
        return self.order.shape[0]

    @cached_property
    def ids(self) -> Tensor:
        """The trainable rows in rising order, int64, shape (K,)."""
        return self.order if len(self.cohorts) < 2 else self.order.sort().values

    @cached_property
    def slots(self) -> Tensor:
        """The slot of each row, and K for a frozen one, int32, shape (V,).

        The slot K is one past the end: a sum over slots collects in one extra row what frozen rows
        would get, and that row is thrown away. No branch, no mask, no synchronisation.
        """
        slots = torch.full((self.num_rows,), len(self), dtype=torch.int32, device=self.device)
        slots[self.order] = torch.arange(len(self), dtype=torch.int32, device=self.device)
        return slots

    @cached_property
    def fingerprint(self) -> int:
        """A number that tells row sets apart, by their rows and the order of their slots."""
        return fingerprint_of(self.order.cpu().numpy()) ^ self.num_rows

    def is_trainable(self, ids: Tensor) -> Tensor:
        """Whether each row trains, for ids of any integer dtype and shape."""
        # The mask and not the slots: a quarter of the memory, so that more of it is in the cache.
        return self.mask.index_select(0, ids.flatten().long()).view(ids.shape)

    def changed_to(self, ids: Tensor, rate_scale: RateScale | None = None) -> RowSet:
        """The row set in which exactly `ids`, sorted, train: rows that stay keep their cohort.

        Those that join learn at this rate.
        """
        wanted = torch.zeros(self.num_rows, dtype=torch.bool, device=self.device)
        wanted[ids] = True
        kept = {
            n: old if wanted[old].all() else old[wanted[old]] for n, old in self.cohorts.items()
        }
        joining = ids[~self.is_trainable(ids)]
        if not len(joining) and len(self) == len(ids):
            return self
        scaled = {} if rate_scale is None or rate_scale.is_plain else {self.next_number: rate_scale}
        return RowSet(
            self.num_rows,
            {**kept, self.next_number: joining},
            self.next_number + bool(len(joining)),
            self.device,
            {**self.rate_scales, **scaled},
        )

    def followed_by(self, later: RowSet) -> RowSet:
        """The row set in which exactly the rows of a later one train, and keep their cohort here.

        Those that are not here join by its cohorts.
        """
        cohorts = {n: ids[later.is_trainable(ids)] for n, ids in self.cohorts.items()}
        if sum(map(len, cohorts.values())) == len(self) == len(later):
            return self
        rate_scales, number = dict(self.rate_scales), max(self.next_number, later.next_number)
        for theirs, ids in later.cohorts.items():
            joining = ids[~self.is_trainable(ids)]
            if len(joining):
                cohorts[number] = joining
                if theirs in later.rate_scales:
                    rate_scales[number] = later.rate_scales[theirs]
                number += 1
        return RowSet(self.num_rows, cohorts, number, self.device, rate_scales)

    def resized_to(self, num_rows: int) -> RowSet:
        """The row set after the table grew, with new rows frozen, or shrank."""
        cohorts = {number: ids[ids < num_rows] for number, ids in self.cohorts.items()}
        return RowSet(num_rows, cohorts, self.next_number, self.device, self.rate_scales)

    def within(self, shard: Shard) -> RowSet:
        """The rows that one process has, numbered from its first; no cohort is left out."""
        if shard == Shard(0, self.num_rows):
            return self
        if (known := self._within.get(shard)) is not None:
            return known
        own = {number: shard.own(ids) for number, ids in self.cohorts.items()}
        rows = shard.stop - shard.start
        found = RowSet(rows, own, self.next_number, self.device, self.rate_scales, keep_empty=True)
        self._within[shard] = found
        return found

    def to(self, device: torch.device) -> RowSet:
        """The same row set on another device."""
        if self.device == device:
            return self
        cohorts = {number: ids.to(device) for number, ids in self.cohorts.items()}
        return RowSet(self.num_rows, cohorts, self.next_number, device, self.rate_scales)


def shown(ids: Tensor, most: int = 6) -> str:
    """The first of some rows, for messages.

    Example:
        >>> shown(torch.arange(10), most=2)
        '(0, 1, …)'
    """
    listed = ", ".join(map(str, ids[:most].tolist()))
    return f"({listed}{', …' if len(ids) > most else ''})"
