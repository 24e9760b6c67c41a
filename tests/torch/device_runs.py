"""Small models trained among several processes by each engine, and held against one process."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from device_nets import (
    OPTIMIZERS,
    ROWS,
    STEPS,
    Net,
    Step,
    alone,
    batch,
    joined,
    make,
    replayed,
    snapshot,
    train,
)
from launch import all_same, of_all, processes, same
from oracle import rows_that_differ
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from partial_embedding.torch import average_gradients, keep_whole, rowwise, split_rows


def begun_apart(head: str) -> Net:
    """A model with other rows in each process; FSDP2 does not make the other layers alike."""
    net = Net(head, seed=0 if dist.get_rank() == 0 else 7)
    net.hidden.load_state_dict(Net(head).hidden.state_dict())
    return net


def beside_fsdp2(head: str) -> Net:
    """A model that FSDP2 shards but for its tables."""
    net = begun_apart(head)
    fully_shard(net, mesh=processes(), ignored_params=keep_whole(net))
    return net


def split(head: str) -> Net:
    """A model whose table is split, whose head is whole, and of which FSDP2 shards the rest."""
    net = begun_apart(head)
    ours = keep_whole(net) if head != "none" else set()
    fully_shard(net, mesh=processes(), ignored_params=ours | split_rows(net.table, processes()))
    return net


def train_here(
    net: Net,
    *optimizers: torch.optim.Optimizer,
    model: nn.Module | None = None,
    some_empty: bool = False,
    accumulate: int = 1,
    **options: Any,
) -> Iterator[Step]:
    """As `train`, with the batches of this process; DDP averages by itself."""
    by_itself = isinstance(model, DistributedDataParallel)

    def backward(step: int) -> None:
        for part in range(accumulate):
            waits = by_itself and part + 1 < accumulate
            with model.no_sync() if waits else nullcontext():
                (model or net)(batch(step, dist.get_rank(), part, some_empty)).backward()
        if not by_itself:
            average_gradients(optimizers[0])

    return train(net, backward, *optimizers, **options)


def beside_fsdp1(name: str, head: str) -> Iterator[Step]:
    net = Net(head)
    kept = keep_whole(net)
    model = FullyShardedDataParallel(
        net, ignored_states=kept, device_id=torch.device("cpu"), use_orig_params=True
    )
    return train_here(net, make(name, net), model=model)


def in_ddp(name: str, head: str, others: list[str], **options: Any) -> Iterator[Step]:
    """DDP averages all but the tables, which begin apart and learn by the same call of backward."""
    net = Net(head, seed=dist.get_rank(), sparse="dense" not in others)
    if "rowwise_first" in others:
        optimizer, ddp = make(name, net), DistributedDataParallel(net)
    else:
        ddp, optimizer = DistributedDataParallel(net), make(name, net, "lazy" in others)
    return train_here(net, optimizer, model=ddp, **options)


def in_optimizers_of_their_own(name: str, head: str) -> Iterator[Step]:
    """As beside DeepSpeed ZeRO-1: an engine has all but the tables, and steps it by itself."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns where it is imported

    net = Net(head)
    kept = keep_whole(net)
    rest = [parameter for parameter in net.parameters() if parameter not in kept]
    of_rest = ZeroRedundancyOptimizer(rest, torch.optim.AdamW, lr=0.1, weight_decay=0.2)
    of_tables = rowwise(OPTIMIZERS[name](list(kept)), net)

    def backward(step: int) -> None:
        net(batch(step, dist.get_rank())).backward()
        for parameter in rest:  # what the engine does in its backward
            dist.all_reduce(parameter.grad.div_(dist.get_world_size()))
        average_gradients(of_tables)

    return train(net, backward, of_tables, of_rest)


def check(case: str) -> None:
    """Train as the words of a case say, and hold the rows against those of one process."""
    kind, name, head, *others = case.split()
    lazy, world = "lazy" in others, dist.get_world_size()
    options: dict[str, Any] = {"max_norm": 0.05 if "clipped" in others else None}
    of_parts = {"accumulate": 2} if "accumulated" in others else {}
    if kind == "ddp":
        steps = in_ddp(name, head, others, **of_parts, **options)
    elif "fsdp1" in others:
        steps = beside_fsdp1(name, head)
    elif "zero" in others:
        steps = in_optimizers_of_their_own(name, head)
    else:
        net = beside_fsdp2(head) if kind == "whole" else split(head)
        of_parts = of_parts if kind == "whole" else {"some_empty": True}
        steps = train_here(net, make(name, net, lazy), **of_parts, **options)
    seen, grads, norms = zip(*steps, strict=True)
    assert len(seen) == STEPS

    # All processes hold the same bits, and frozen rows those of before.
    if any(not all_same(seen, other) for other in of_all(seen)):
        raise AssertionError("processes hold other rows")
    begun, rows = snapshot(Net(head)), ROWS[0]
    for step, (before, after) in enumerate(zip([begun, *seen], seen, strict=False)):
        rows = ROWS.get(step, rows)
        for which in after:
            moved = rows_that_differ(before[which], after[which])
            assert set(moved) <= set(rows), (step, which)
    for which, ended in seen[-1].items():
        assert not torch.equal(ended[ROWS[0]], begun[which][ROWS[0]])
    if dist.get_rank():
        return  # what follows is the same for all

    # They are the rows of one process with the gradients of all.
    again = [found for found, *_ in replayed(name, head, list(grads), lazy)]
    assert all_same(list(seen), again)

    # They are the rows of one process with the batches of all. Two processes divide by two, which
    # is exact, in which order ever; three do not, nor does the norm of a sum of squares in another
    # order. A gradient is summed in another order where it is tied, or of several passes.
    exact = (
        world == 2
        and options["max_norm"] is None
        and not ("accumulated" in others or "tied" in head)
    )
    if kind == "split":
        exact = exact and head == "none"  # a head sums what comes of each batch by itself
        reference = joined(name, head, world, lazy=lazy, **options)
    else:
        reference = alone(name, head, world, lazy=lazy, **of_parts, **options)
    for found, norm, (wanted, _, its_norm) in zip(seen, norms, reference, strict=True):
        assert norm == (None if its_norm is None else pytest.approx(its_norm, rel=1e-5))
        assert not exact or same(found, wanted)
        for which in wanted:
            torch.testing.assert_close(found[which], wanted[which], rtol=1e-4, atol=1e-5)
