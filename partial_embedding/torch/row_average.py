"""Tables among several processes: their gradients are averaged at the cost of their rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from partial_embedding.errors import InputError
from partial_embedding.torch.row_gradient import RowGradient, as_tensor, entries_of
from partial_embedding.torch.rowcopy import distinct, read_rows, sum_rows, write_rows
from partial_embedding.torch.shards import local
from partial_embedding.torch.table import PartialTable, tables_of
from partial_embedding.torch.trainable_rows import ProcessGroup

_NONE, _SPARSE, _DENSE = 0, 1, 2


# The same tables in each process


def check_max_norm(tables: Mapping[str, PartialTable]) -> None:
    """Refuse `max_norm` among several processes, which would part."""
    for name, table in tables.items():
        if getattr(table, "max_norm", None) is not None and dist.get_world_size() > 1:
            raise InputError(
                "max_norm scales the rows that a process looks up in that process alone, so that "
                f"processes part. Received it for {name!r}. Leave it out, or use one process."
            )


@torch.no_grad()
def begin_alike(parameters: Mapping[str, nn.Parameter], group: ProcessGroup) -> None:
    """Give all processes the values of the first one; each of them calls this."""
    check_alike(parameters, group)
    for parameter in parameters.values():
        dist.broadcast(parameter.detach(), dist.get_global_rank(group, 0), group=group)


def check_alike(parameters: Mapping[str, nn.Parameter], group: ProcessGroup) -> None:
    """Refuse processes that made tables of other sizes; each of them calls this."""
    shapes = {name: (*one.shape, str(one.dtype)) for name, one in parameters.items()}
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, shapes, group=group)
    for rank, others in enumerate(everyone):
        if others != everyone[0]:
            raise InputError(
                f"all processes have the same tables. Received: {everyone[0]} in process 0 and "
                f"{others} in process {rank}. Build the same vocabulary in each."
            )


@contextmanager
def explaining() -> Iterator[None]:
    """Say in what torch raises there what it means that a process did not answer."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(
            "A process was waited for that ended, failed, or made fewer steps. Give each as many "
            "batches (DistributedSampler(…, drop_last=True)), and look for its own error."
        )
        raise


# Averaging


@torch.no_grad()
def average(tables: Iterable[tuple[nn.Parameter, PartialTable]], names: Mapping[int, str]) -> None:
    """Replace the gradients of tables by their means over processes, which all call this.

    Dense gradients cost K×D numbers, whatever V; of those that are held by row in each process, the
    rows are exchanged that some process stepped. A process without a gradient counts as zero,
    unless none has one; and where none has a new one since the last call, nothing is done. As in
    DDP each process divides before the sum, for the sake of half precision.

    The parameters come in one order in all processes; `names` are for messages, by their ids.

    Raises:
        InputError: Processes train different rows; all raise the same.
    """
    found: dict[Any, list[_Gradient]] = {}
    for parameter, table in tables:
        if (group := table.averaging_group(parameter)) is not None:
            found.setdefault(group, []).append(
                _Gradient(names.get(id(parameter), repr(table)), parameter, table)
            )
    for group, everyone in found.items():
        gradients = _tell_each_other(everyone, group)
        for gradient in everyone:
            for tied in tables_of(gradient.weight):
                tied.awaits_average = False
        for alike in _alike(gradients, _DENSE):
            _average_dense(alike, group)
        for alike in _alike(gradients, _SPARSE):
            _average_sparse(alike, group)


class _Gradient:
    """What this process has for the mean of one table, with its name in messages."""

    def __init__(self, name: str, weight: nn.Parameter, table: PartialTable) -> None:
        self.name = name
        self.weight = weight
        self.rows = table.row_set
        self.grad = None if self.weight.grad is None else local(self.weight.grad)
        # Where all rows train in their order, nothing needs to be gathered.
        in_order = len(self.rows) == self.rows.num_rows and len(self.rows.cohorts) == 1
        self.run = slice(0, len(self.rows)) if in_order else None
        self.kind = _NONE
        self.is_new = any(tied.awaits_average for tied in tables_of(weight))
        # The slots that a sparse gradient has entries for, rising, and the sum of each.
        self.stepped = self.rows.order[:0]
        self.sums = self.weight.new_zeros(0, *self.weight.shape[1:])
        # What all processes have: how many of them each, and the widest kind.
        self.counts: list[int] = []
        self.kind_of_all = self.kind
        entries = None if self.grad is None else entries_of(self.grad)
        if self.grad is not None and entries is None:
            self.kind, self.grad = _DENSE, as_tensor(self.grad)
        if entries is not None:
            self.kind = _SPARSE
            slots = self.rows.slots.index_select(0, entries[0]).long()
            stepped, places = distinct(slots, len(self.rows) + 1)
            sums = sum_rows(places, entries[1], len(stepped))
            # The last slot is that of frozen rows.
            number = int(torch.searchsorted(stepped, len(self.rows)))
            self.stepped, self.sums = stepped[:number], sums[:number]

    @property
    def header(self) -> list[int]:
        """What the other processes must know."""
        return [self.kind, len(self.stepped), self.rows.fingerprint, self.is_new]

    def by_slot(self) -> Tensor:
        """The gradient of all trainable rows, shape (K, …)."""
        if self.grad is not None and self.kind == _DENSE:
            return read_rows(self.grad, self.rows.order, self.run)
        dense = self.weight.new_zeros(len(self.rows), *self.weight.shape[1:])
        return dense.index_copy_(0, self.stepped, self.sums)

    def become_dense(self, mean: Tensor) -> None:
        """Take the mean of all trainable rows, shape (K, …)."""
        if self.grad is None or self.kind == _SPARSE:
            self.grad = self.weight.grad = torch.zeros_like(self.weight)
        write_rows(self.grad, self.rows.order, self.run, mean)

    def become_sparse(self, slots: Tensor, mean: Tensor) -> None:
        """Take the mean of some slots, shapes (n,) and (n, …)."""
        ids = self.rows.order.index_select(0, slots)
        self.weight.grad = RowGradient(ids, mean, self.rows.num_rows)


def _tell_each_other(gradients: Sequence[_Gradient], group: ProcessGroup) -> list[_Gradient]:
    """Those that some process has a new gradient of."""
    device = gradients[0].weight.device
    own = torch.tensor([gradient.header for gradient in gradients], device=device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    with explaining():
        dist.all_gather(everyone, own, group=group)
    headers = torch.stack(everyone, dim=2).tolist()
    new = []
    for gradient, (kinds, counts, fingerprints, are_new) in zip(gradients, headers, strict=True):
        for rank, fingerprint in enumerate(fingerprints):
            if fingerprint != fingerprints[0]:
                raise InputError(
                    f"all processes train the same rows of {gradient.name!r}, which joined in the "
                    f"same order. Received others in process {rank} than in process 0. Set the "
                    "same rows in each."
                )
        gradient.counts = counts
        gradient.kind_of_all = max(kinds)
        if any(are_new):
            new.append(gradient)
    return new


def _alike(gradients: Iterable[_Gradient], kind: int) -> Iterable[list[_Gradient]]:
    """Those of one kind in lists that can be sent as one."""
    found: dict[Any, list[_Gradient]] = {}
    for gradient in gradients:
        if gradient.kind_of_all == kind:
            weight = gradient.weight
            found.setdefault((weight.dtype, weight.shape[1:], weight.device), []).append(gradient)
    return found.values()


def _average_dense(gradients: Sequence[_Gradient], group: ProcessGroup) -> None:
    own = _joined([gradient.by_slot() for gradient in gradients])
    mean = _reduced(own.div_(dist.get_world_size(group)), group)
    parts = mean.split([len(gradient.rows) for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.become_dense(part)


def _average_sparse(gradients: Sequence[_Gradient], group: ProcessGroup) -> None:
    # As if they were one table, in which the slots of each begin where those before it end.
    ends = list(itertools.accumulate(len(gradient.rows) for gradient in gradients))
    starts = [0, *ends[:-1]]
    stepped = [gradient.stepped + start for gradient, start in zip(gradients, starts, strict=True)]
    sums = _joined([gradient.sums for gradient in gradients])
    counts = [sum(of_one) for of_one in zip(*(g.counts for g in gradients), strict=True)]
    mean_of = _joined(stepped), sums.div_(dist.get_world_size(group))
    slots, mean = _sums_of_stepped(*mean_of, counts, ends[-1], group)
    bounds = torch.searchsorted(slots, torch.tensor([0, *ends], device=slots.device)).tolist()
    for i, (gradient, start) in enumerate(zip(gradients, starts, strict=True)):
        mine = slice(bounds[i], bounds[i + 1])
        gradient.become_sparse(slots[mine] - start, mean[mine])


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _sums_of_stepped(
    stepped: Tensor, values: Tensor, counts: list[int], height: int, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """The slots that any process stepped, rising, and the sums of their values."""
    everyone = _gathered(stepped.int(), counts, group)
    union, places = distinct(torch.cat(everyone).long(), height)
    place_of = places.split(counts)
    total = values.new_zeros(len(union), *values.shape[1:])
    # A ring that gathers sends about N times the most rows of one process, one that reduces twice
    # the union, which is less where many processes touch the same rows.
    if len(counts) * max(counts) <= 2 * len(union):
        # One process after the other: a GPU adds entries of one row in any order.
        for place, part in zip(place_of, _gathered(values, counts, group), strict=True):
            total.index_add_(0, place, part)
    else:
        total.index_copy_(0, place_of[dist.get_rank(group)], values)
        _reduced(total, group)
    return union, total


def _gathered(own: Tensor, counts: list[int], group: ProcessGroup) -> list[Tensor]:
    """The rows that each process gives, of which there are so many."""
    padded = own.new_zeros(max(counts), *own.shape[1:])
    padded[: len(own)] = own
    everyone = [torch.empty_like(padded) for _ in counts]
    if max(counts):
        dist.all_gather(everyone, padded, group=group)
    return [theirs[:count] for theirs, count in zip(everyone, counts, strict=True)]


def _reduced(values: Tensor, group: ProcessGroup) -> Tensor:
    """The sums over all processes, in the same memory."""
    if len(values):
        dist.all_reduce(values, group=group)
    return values
