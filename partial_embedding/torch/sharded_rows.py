"""Chosen rows of a weight that processes share, read from all of them and written in each."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch import distributed as dist

from partial_embedding.torch import shards
from partial_embedding.torch.shards import gathered, is_sharded, local, shard_of


def is_first(weight: Tensor) -> bool:
    """Whether this process is the one that writes what `rows_of` gathers of a sharded weight."""
    return not is_sharded(weight) or dist.get_rank() == 0


@torch.no_grad()
def rows_of(weight: Tensor, ids: Tensor) -> Tensor:
    """Rows on the CPU, shape (n, …); of a sharded weight all processes call this.

    Of that one the first process gets them, and all others none.
    """
    if (shard := shard_of(weight)) is None:
        return weight.detach()[ids].cpu().contiguous()
    own, first, chunks = local(weight), is_first(weight), []
    height = max(1, shards.CHUNK_BYTES // max(1, math.prod(own.shape[1:]) * own.element_size()))
    for chunk in ids.split(height):
        here = shard.has(chunk)
        parts = gathered((here.cpu(), own[shard.own(chunk)].cpu()), weight)
        if first:
            rows = parts[0][1].new_empty(len(chunk), *own.shape[1:])
            for places, values in parts:
                rows[places] = values
            chunks.append(rows)
    return torch.cat(chunks) if chunks else own[:0].cpu()


@torch.no_grad()
def put_rows(weight: Tensor, ids: Tensor, values: Tensor) -> None:
    """Write rows; of a sharded weight each process writes those that it has."""
    ids, own = ids.to(weight.device), local(weight)
    if (shard := shard_of(weight)) is not None:
        values, ids = values[shard.has(ids).to(values.device)], shard.own(ids)
    own[ids] = values.to(own)


@torch.no_grad()
def rows_that_differ(weight: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """The rows that hold something else, int64, on the CPU.

    Of a sharded weight all processes call this, and all know.
    """
    own, mine, shard = local(weight), ids, shard_of(weight)
    places = ids
    if shard is not None:
        here = shard.has(ids)
        mine, values, places = ids[here], values[here], shard.own(ids)
    held = own[places.to(own.device)].cpu()
    unlike = [bool((a != b).any()) for a, b in zip(held, values.to(held), strict=True)]
    found = mine[torch.tensor(unlike, dtype=torch.bool, device=mine.device)]
    return found if shard is None else torch.cat(gathered(found, weight)).unique()
