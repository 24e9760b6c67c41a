"""Tables whose rows are spread over processes, for tables that are larger than a device.

A process looks up its batch by asking those that have the rows. They answer with the rows, and with
whether each trains; in backward only gradients of those come back, which both sides know the order
of. So a step costs its tokens, and nothing of shape (V, D) exists anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from partial_embedding.errors import InputError
from partial_embedding.torch.embedding import PartialEmbedding
from partial_embedding.torch.row_average import check_alike, explaining
from partial_embedding.torch.row_gradient import RowGradient
from partial_embedding.torch.shards import is_sharded, local, shard_of, sharded_like
from partial_embedding.torch.table import tables_of

# What a process tells another before a lookup, where ids that are no rows are as many as this.
_NO_ROWS = -1


def split_rows(table: nn.Module, mesh: Any, src_data_rank: int | None = 0) -> set[nn.Parameter]:
    """Spread the rows of a table over processes; a lookup asks those that have the rows.

    Each process looks up a batch of its own, of any size, and all of them look up, and go backward,
    equally often. The weight becomes a `DTensor` that is sharded by rows, whose gradient holds the
    rows of this step: it is that of the mean of the processes' losses, and needs no
    `average_gradients`. What the processes send each other grows with their tokens.

    Args:
        table: A `PartialEmbedding`, on its device. On the meta device it gets no rows: call
            `table.to_empty(device=…)` and `table.reset_parameters()` then, or write into
            `table.weight.to_local()`.
        mesh: The processes with other batches, a one-dimensional `DeviceMesh`.
        src_data_rank: The process whose rows all others take; None where each has the same ones
            already, such as from one file that is mapped into memory, so that none are sent.

    Returns:
        The weight, for `fully_shard(model, ignored_params=…)`.

    Raises:
        InputError: The table is no `PartialEmbedding` by itself (a head, bags, or tied to one), has
            an option that looks across processes, or is sharded already; or the mesh has several
            dimensions.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> table = PartialEmbedding(10, 4, trainable_rows=[2])
        >>> weights = split_rows(table, dist.init_device_mesh("cpu", (1,)))
        >>> table(torch.tensor([1, 2, 2])).sum().backward()
        >>> table.weight.grad.to_local().any(dim=1).nonzero().flatten()
        tensor([2])
        >>> dist.destroy_process_group()
    """
    from torch.distributed.tensor import Shard as ByRows
    from torch.distributed.tensor import distribute_tensor

    _check(table, mesh)
    assert isinstance(table, PartialEmbedding)
    weight = table.weight
    if not weight.is_meta:
        check_alike({"table": weight}, mesh.get_group())
    split = distribute_tensor(weight.detach(), mesh, [ByRows(0)], src_data_rank=src_data_rank)
    table.weight = nn.Parameter(split, requires_grad=weight.requires_grad)
    table.__class__ = SplitEmbedding
    vars(table).pop("_averaged", None)  # its gradients are those of all processes
    return {table.weight}


class SplitEmbedding(PartialEmbedding):
    """A `PartialEmbedding` of which each process has some rows; `split_rows` makes it of one."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the parent's name
        """Look up rows wherever they are; all processes call this.

        Args:
            input: Ids, any integer shape (*), which may be empty.

        Returns:
            Rows, shape (*, D).

        Raises:
            InputError: A process has ids that are no rows, or trains others than this one; all
                raise it.
        """
        if not is_sharded(self.weight):
            return super().forward(input)  # `functional_call` has put a whole one there
        ids = input.reshape(-1).long()
        rows: Tensor = _LookUp.apply(self.weight, ids, self)  # type: ignore[no-untyped-call]
        return rows.view(*input.shape, rows.shape[-1])

    def reset_parameters(self) -> None:
        """Draw rows anew, those of each process by itself."""
        own = local(self.weight)
        nn.init.normal_(own)
        if (padding := self.padding_row) is not None:
            own[shard_of(self.weight).own(torch.tensor([padding], device=own.device))] = 0


class _LookUp(torch.autograd.Function):
    """The rows of ids, asked for by all processes at once."""

    @staticmethod
    def forward(ctx: Any, weight: Any, ids: Tensor, table: SplitEmbedding) -> Tensor:
        group, shard = weight.device_mesh.get_group(), shard_of(weight)
        order, asked, here, asked_here = _ask(weight, ids, table, group)
        own = here - shard.start
        found = _exchange(local(weight).index_select(0, own), asked_here, asked, group)
        ctx.weight, ctx.group, ctx.height = weight, group, shard.stop - shard.start
        ctx.own, ctx.sent, ctx.counts = own, order, (asked, asked_here)
        # All of them do, as the processes have told each other.
        if table.has_frozen_rows or table.padding_row is not None:
            trains = table.row_set.within(shard).is_trainable(own)
            wanted = _exchange(trains.to(torch.uint8), asked_here, asked, group).bool()
            ctx.own, ctx.sent = own[trains], order[wanted]
            ctx.counts = _count(wanted, asked), _count(trains, asked_here)
        return torch.empty_like(found).index_copy_(0, order, found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # As in DDP each process divides before the sum, for the sake of half precision.
        own = grad.index_select(0, ctx.sent) / dist.get_world_size(ctx.group)
        sent, got = ctx.counts
        values = _exchange(own, sent, got, ctx.group)
        return sharded_like(RowGradient(ctx.own, values, ctx.height), ctx.weight), None, None


def _ask(
    weight: Any, ids: Tensor, table: SplitEmbedding, group: Any
) -> tuple[Tensor, list[int], Tensor, list[int]]:
    """Tell each process which of its rows are wanted, in the order of its ids.

    Returns:
        The places of the ids in the order in which they are asked for, how many of them each
        process has; and what this one is asked for, by how many of each.
    """
    processes = dist.get_world_size(group)
    fit = not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < weight.shape[0])
    owner = ids // _height(weight) if fit else ids.new_zeros(0)
    asked = owner.bincount(minlength=processes)
    headers = torch.stack([asked, torch.full_like(asked, table.row_set.fingerprint)], dim=1)
    if not fit:
        headers[:, 0] = _NO_ROWS
    others = torch.empty_like(headers)
    with explaining():
        dist.all_to_all_single(others, headers, group=group)
    asked_here, fingerprints = others.t().tolist()
    for rank, (count, fingerprint) in enumerate(zip(asked_here, fingerprints, strict=True)):
        if count == _NO_ROWS:
            raise InputError(
                f"ids lie in [0, {weight.shape[0]}). Received others in process {rank}. Was the "
                "vocabulary resized?"
            )
        if fingerprint != table.row_set.fingerprint:
            raise InputError(
                "all processes train the same rows of a table, which joined in the same order. "
                f"Received others in process {rank} than in process {dist.get_rank(group)}. Set "
                "the same rows in each."
            )
    order, sizes = owner.argsort(stable=True), asked.tolist()
    return order, sizes, _exchange(ids[order], sizes, asked_here, group), asked_here


def _exchange(own: Tensor, sent: Sequence[int], got: Sequence[int], group: Any) -> Tensor:
    """What the processes have for this one, by rank, for what it has for them."""
    theirs = own.new_empty(sum(got), *own.shape[1:])
    dist.all_to_all_single(theirs, own.contiguous(), list(got), list(sent), group=group)
    return theirs


def _count(marked: Tensor, sizes: Sequence[int]) -> list[int]:
    """How many are marked of each run of entries."""
    return [int(part.sum()) for part in marked.split(list(sizes))]


def _height(weight: Any) -> int:
    """How many rows a process has, but for the last ones, as torch cuts a tensor into chunks."""
    num_rows: int = weight.shape[0]
    processes: int = weight.device_mesh.size()
    return -(-num_rows // processes)


def _check(table: nn.Module, mesh: Any) -> None:
    dimensions = getattr(mesh, "ndim", 0)
    if is_sharded(getattr(table, "weight", None)) or dimensions != 1:
        raise InputError(
            "rows are split once, over a mesh of one dimension. Received "
            f"{dimensions} dimensions and a {type(table).__name__}, which may be sharded. Call "
            'split_rows before fully_shard, with mesh["dp"], for example.'
        )
    if type(table) is not PartialEmbedding:
        raise InputError(
            "rows are split of a PartialEmbedding. Received a "
            f"{type(table).__name__}. Every process needs the logits of a head for all rows, so a "
            "head is for tensor parallelism: ColwiseParallel and loss_parallel; for bags look rows "
            "up and reduce them."
        )
    if any(other is not table for other in tables_of(table.leaf_weight)):
        raise InputError(
            "rows are split of a table by itself. Received one that is tied to a head, which needs "
            "all of them. Untie them, or take keep_whole(model)."
        )
    for option in ("max_norm", "scale_grad_by_freq"):
        if getattr(table, option):
            raise InputError(
                f"{option} looks at all that is looked up. Received it for a table whose rows "
                "are to be split. Leave it out."
            )
