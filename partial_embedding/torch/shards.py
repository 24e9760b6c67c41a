"""Weights of which each process has some rows: a `DTensor` that is sharded on its first axis.

What makes the shards, `fully_shard` or tensor parallelism, does not matter here: a process steps
the rows that it has, as if they were a table of their own, and what an optimizer is given of them
are `DTensor`s again, so that torch's own sums over all processes stay what they are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from partial_embedding.errors import InputError

# Rows are sent in chunks of about this many bytes, which bounds the memory beyond the rows.
CHUNK_BYTES = 1 << 24
# How many seconds a process waits for the others before what they do together.
PATIENCE = 300.0

# Importing the class takes longer than making a table; whoever has a tensor of it has done so.
DTensor = Any


@dataclass(frozen=True)
class Shard:
    """The rows of a weight that this process has, `range(start, stop)`."""

    start: int
    stop: int

    def has(self, ids: Tensor) -> Tensor:
        """Whether this process has each of some rows of the whole weight, booleans, shape (n,)."""
        return (ids >= self.start) & (ids < self.stop)

    def own(self, ids: Tensor) -> Tensor:
        """Those of some rows that this process has, numbered from its first."""
        return ids[self.has(ids)] - self.start


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`."""
    return type(tensor).__name__ == "DTensor"


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, in the same memory and past autograd."""
    held: Any = tensor.detach() if tensor.requires_grad else tensor
    # Not `to_local()`, whose view would make a gradient by rows dense.
    own: Tensor = held._local_tensor if is_sharded(held) else held
    return own


def shard_of(weight: Tensor) -> Shard:
    """The rows of a weight that this process has, which are all of a plain one.

    Raises:
        InputError: It is not split by rows.
    """
    if not is_sharded(weight):
        return Shard(0, weight.shape[0])
    held: DTensor = weight
    split = [placement for placement in held.placements if not placement.is_replicate()]
    # FSDP2 has a name of its own for what it shards a second time.
    names = {type(placement).__name__ for placement in split}
    if not names <= {"Shard", "_StridedShard"} or any(placement.dim for placement in split):
        raise InputError(
            "processes share a table by rows, Shard(0). Received a weight of the shape "
            f"{tuple(weight.shape)} with the placements {tuple(map(str, held.placements))}. For "
            "an embedding take RowwiseParallel, for a head ColwiseParallel, and for fully_shard "
            "no shard_placement_fn that says otherwise."
        )
    if len(split) == 1 and names == {"Shard"}:
        # As torch cuts a tensor into chunks. Its own function goes through all rows.
        axis = held.placements.index(split[0])
        num_rows = weight.shape[0]
        height = -(-num_rows // held.device_mesh.size(axis))
        start = min(height * held.device_mesh.get_local_rank(axis), num_rows)
        return Shard(start, min(start + height, num_rows))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        weight.shape, held.device_mesh, held.placements
    )
    start = int(offset[0]) if shape[0] else weight.shape[0]
    return Shard(start, start + int(shape[0]))


def check_sharding(parameter: Tensor, table: nn.Module) -> None:
    """Refuse a table whose rows cannot be kept exact where its weight is sharded."""
    if not is_sharded(parameter):
        return
    shard_of(parameter)
    if getattr(table, "max_norm", None) is not None:
        raise InputError(
            "max_norm scales rows while they are looked up, where a sharded weight is only lent. "
            f"Received max_norm={table.max_norm} in a {type(table).__name__} whose weight is "
            "sharded. Leave it out, or leave the table out of the engine."
        )


def is_lent(parameter: Tensor, shard: Tensor, table: nn.Module) -> bool:
    """Whether a parameter stands in for a shard during a pass of FSDP2, or is that shard again."""
    if parameter is shard:
        return True
    if not vars(table).get("_is_fsdp_managed_module"):
        return False
    one: DTensor = parameter
    other: DTensor = shard
    # Not in the same way is a weight that is gathered in part.
    placed = other.device_mesh, other.placements
    return not (is_sharded(one) and (one.device_mesh, one.placements) == placed)


def sharded_like(own: Tensor, whole: DTensor, num_rows: int | None = None) -> Tensor:
    """What this process has of a tensor, as one that is sharded like another of its shape.

    Of `num_rows` rows, where it is given, processes may have any number each. Memory is shared.
    """
    shape = whole.shape if num_rows is None else torch.Size((num_rows, *own.shape[1:]))
    return as_dtensor(own, whole.device_mesh, whole.placements, shape)


def as_dtensor(own: Tensor, mesh: Any, placements: Sequence[Any], shape: torch.Size) -> Tensor:
    """What this process has of a tensor, as a `DTensor` that holds it as it is."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    # `DTensor.from_local` asks for a view, which would make a gradient by rows dense.
    meta = TensorMeta(shape, torch.empty(shape, device="meta").stride(), own.dtype)
    return DTensor(own, DTensorSpec(mesh, tuple(placements), tensor_meta=meta), requires_grad=False)


def as_placed(grad: Tensor, weight: Tensor) -> Tensor:
    """A gradient, which tensor parallelism makes whole, with the placements of its weight."""
    found: DTensor = grad
    placements = weight.placements  # type: ignore[attr-defined]  # of a DTensor
    placed: Tensor = found.redistribute(placements=placements)
    return placed


def replicate_gradients(tables: Iterable[nn.Parameter], others: Iterable[Tensor]) -> None:
    """Make gradients of whole tables such that torch takes a norm of them and of sharded ones.

    It takes none of `DTensor`s and plain ones together. So that of a whole table becomes a
    `DTensor` that each process has all of, within which it is as it was.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    meshes: Iterator[Any] = (one.device_mesh for one in others if is_sharded(one))  # type: ignore[attr-defined]
    if (mesh := next(meshes, None)) is None:
        return
    from torch.distributed.tensor import Replicate

    for parameter in tables:
        grad = parameter.grad
        if grad is not None and not is_sharded(parameter) and not is_sharded(grad):
            everywhere = [Replicate()] * mesh.ndim
            parameter.grad = as_dtensor(grad, mesh, everywhere, grad.shape)


def gathered(own: Any, weight: Tensor) -> list[Any]:
    """What each process has, to be pickled, that has a shard of a weight; they all call this.

    A plain weight is one process's alone.

    Raises:
        InputError: A process did not call it within `PATIENCE`.
    """
    everyone = [own]
    if not is_sharded(weight):
        return everyone
    held: DTensor = weight
    _meet(held)
    for axis, placement in enumerate(held.placements):
        if placement.is_replicate():
            continue
        group = held.device_mesh.get_group(axis)
        found: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, everyone, group=group)
        everyone = [part for parts in found for part in parts]
    return everyone


# Chosen rows, read from all processes and written in each


def is_first(weight: Tensor) -> bool:
    """Whether this process is the one that writes what `rows_of` gathers of a sharded weight."""
    return not is_sharded(weight) or dist.get_rank() == 0


@torch.no_grad()
def rows_of(weight: Tensor, ids: Tensor) -> Tensor:
    """Rows on the CPU, shape (n, …); of a sharded weight all processes call this.

    Of that one the first process gets them, and all others none.
    """
    own, shard, first = local(weight), shard_of(weight), is_first(weight)
    height = max(1, CHUNK_BYTES // max(1, math.prod(own.shape[1:]) * own.element_size()))
    rows = own.new_empty(len(ids) if first else 0, *own.shape[1:], device="cpu")
    for start in range(0, len(ids), height):
        chunk = ids[start : start + height]
        here = shard.has(chunk)
        parts = gathered((here.cpu(), own[shard.own(chunk)].cpu()), weight)
        for places, values in parts if first else ():
            rows[start : start + height][places] = values
    return rows


@torch.no_grad()
def put_rows(weight: Tensor, ids: Tensor, values: Tensor) -> None:
    """Write rows; of a sharded weight each process writes those that it has."""
    own, shard, ids = local(weight), shard_of(weight), ids.to(weight.device)
    own[shard.own(ids)] = values[shard.has(ids).to(values.device)].to(own)


@torch.no_grad()
def rows_that_differ(weight: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """The rows that hold something else, int64, on the CPU.

    Of a sharded weight all processes call this, and all know.
    """
    own, shard = local(weight), shard_of(weight)
    here = shard.has(ids)
    mine, values, held = ids[here], values[here], own[shard.own(ids).to(own.device)].cpu()
    unlike = [bool((a != b).any()) for a, b in zip(held, values.to(held), strict=True)]
    found = mine[torch.tensor(unlike, dtype=torch.bool, device=mine.device)]
    every: Tensor = torch.cat(gathered(found, weight)).unique()
    return every


# Waiting for one another


def _meet(weight: DTensor) -> None:
    """Wait for the processes that share a weight, by counts that each has in their store.

    A collective would wait for as long as the process group does, and could not say for whom.
    """
    mesh, me = weight.device_mesh, dist.get_rank()
    at = zip(mesh.get_coordinate(), weight.placements, strict=True)
    split = tuple(c if one.is_replicate() else slice(None) for c, one in at)
    ranks = mesh.mesh[split].flatten().tolist()
    store = dist.distributed_c10d._get_default_store()
    keys = {rank: f"partial_embedding/{ranks}/{rank}" for rank in ranks}
    count, end = store.add(keys[me], 1), time.monotonic() + PATIENCE
    while late := [rank for rank in ranks if store.add(keys[rank], 0) < count]:
        if time.monotonic() > end:
            store.add(keys[me], -1)  # as if it had not come
            raise InputError(
                "what processes share they save and look through together. Received a call in "
                f"process {me}, for which {PATIENCE:g} s long {_named(late)} did not come. Call "
                "optimizer.state_dict(), save_rows and audits in every process, and let one write "
                "what it got."
            )
        time.sleep(0.005)


def _named(ranks: Sequence[int]) -> str:
    return f"process{'es' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
