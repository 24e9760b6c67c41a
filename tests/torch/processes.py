"""Plain loops on two processes or more; a script, started by `test_averages.py`.

Usage: processes.py FOLDER RANK PROCESSES

It runs the cases for so many processes and writes what they returned to
`{folder}/{case}-{rank}.pt`.
"""

import copy
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from partial_embedding import InputError
from partial_embedding.torch import (
    PartialEmbedding,
    PartialLinear,
    average_gradients,
    clip_grad_norm_,
    ignore_in_ddp,
    rowwise,
)

V, D, STEPS = 30, 4, 6
FIRST, LATER = [3, 4, 9, 20], [2, 3, 9, 20, 21]


class Net(nn.Module):
    """A table, a hidden layer, and a head of any kind."""

    def __init__(self, sparse: bool = True, head: str = "none", rows: int = V) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = PartialEmbedding(rows, D, sparse=sparse, trainable_rows=FIRST)
        self.hidden = nn.Linear(D, D)
        self.head: nn.Module = nn.Identity()
        if head == "tied_dense":
            self.head = nn.Linear(D, rows, bias=False)
        elif head != "none":
            self.head = PartialLinear(D, rows, bias=head == "untied", trainable_rows=FIRST)
        if head.startswith("tied"):
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(self.table(ids))).square().mean()


def adamw(model: nn.Module, lazy: bool = False) -> torch.optim.Optimizer:
    made = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.2)
    return rowwise(made, model, lazy=lazy)


def wrapped(model: Net, ours: bool = True) -> nn.Module:
    if ours:
        ignore_in_ddp(model)
    return DistributedDataParallel(model)


def batch(step: int) -> Tensor:
    made = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randint(V, (16,), generator=made)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train(
    model: Net, ours: bool, lazy: bool = False, accumulate: int = 1, max_norm: float | None = None
) -> list[dict[str, Tensor]]:
    """The weights after each step, of which the rows change in the middle."""
    ddp, optimizer, seen = wrapped(model, ours), adamw(model, lazy), []
    for step in range(STEPS):
        if step == STEPS // 2:
            model.table.set_trainable_rows(LATER)
        optimizer.zero_grad()
        for part in range(accumulate):
            with nullcontext() if part + 1 == accumulate else ddp.no_sync():
                ddp(batch(accumulate * step + part)).backward()
        average_gradients(optimizer)
        if max_norm is not None:
            clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        seen.append(weights(model))
    return seen


def beside_ddp(**options: Any) -> Callable[[], Any]:
    build = {key: options.pop(key) for key in ("sparse", "head") if key in options}
    return lambda: {who: train(Net(**build), who == "ours", **options) for who in ("ours", "ddp")}


def alone(**options: Any) -> Callable[[], Any]:
    """For models that DDP itself cannot reduce."""
    build = {key: options.pop(key) for key in ("sparse", "head") if key in options}
    return lambda: train(Net(**build), ours=True, **options)


def without_a_gradient(sparse: bool, ranks: tuple[int, ...]) -> Any:
    """Gradients before and after, where only some processes have one."""
    table = PartialEmbedding(V, D, sparse=sparse, trainable_rows=FIRST)
    ignore_in_ddp(table)
    optimizer = adamw(table)
    if dist.get_rank() in ranks:
        table(batch(0)).square().sum().backward()
    own = None if table.weight.grad is None else table.weight.grad.to_dense().clone()
    average_gradients(optimizer)
    mean = table.weight.grad
    before = weights(table)
    optimizer.step()
    return {
        "own": own,
        "mean": None if mean is None else mean.to_dense(),
        "sparse": mean is not None and mean.is_sparse,
        "moved": not torch.equal(before["weight"], table.weight),
    }


def of_both_kinds() -> Any:
    table = PartialEmbedding(V, D, sparse=dist.get_rank() == 0, trainable_rows=FIRST)
    ignore_in_ddp(table)
    optimizer = adamw(table)
    table(batch(0)).square().sum().backward()
    own = table.weight.grad.to_dense().clone()
    average_gradients(optimizer)
    once = table.weight.grad.clone()
    average_gradients(optimizer)
    return {"own": own, "mean": once, "twice": table.weight.grad}


def begun_apart() -> Any:
    torch.manual_seed(dist.get_rank())
    table = PartialEmbedding(V, D, trainable_rows=FIRST)
    own = weights(table)
    ignore_in_ddp(table)
    adamw(table)
    return {"own": own, "after": weights(table)}


def scaled(sparse: bool) -> Any:
    """One process has a gradient that is not finite in its first step."""
    model = Net(sparse)
    ddp, optimizer = wrapped(model), adamw(model)
    scaler, seen = torch.amp.GradScaler("cpu", init_scale=4.0), [weights(model)]
    for step in range(3):
        optimizer.zero_grad()
        loss = ddp(torch.tensor([FIRST[0], 1]))
        if step == 0 and dist.get_rank() == 1:
            # Of the table alone, so that only what is averaged tells the other process.
            loss = loss + model.table(torch.tensor(FIRST)).sum() * float("inf")
        scaler.scale(loss).backward()
        average_gradients(optimizer)
        scaler.step(optimizer)
        scaler.update()
        seen.append(weights(model))
    return seen


@contextmanager
def counting() -> Iterator[list[tuple[str, int]]]:
    """The calls to the process group, and the bytes that each one gives it."""
    calls: list[tuple[str, int]] = []

    def counted(call: Any, which: int) -> Any:
        def wrapper(*arguments: Any) -> Any:
            calls.append((call.__name__, arguments[which].nbytes))
            return call(*arguments)

        return wrapper

    before = dist.all_reduce, dist.all_gather
    dist.all_reduce, dist.all_gather = counted(before[0], 0), counted(before[1], 1)
    try:
        yield calls
    finally:
        dist.all_reduce, dist.all_gather = before


def traffic(sparse: bool, rows: int, trainable: int, ids: int) -> int:
    table = PartialEmbedding(rows, D, sparse=sparse, trainable_rows=range(trainable))
    ignore_in_ddp(table)
    optimizer = adamw(table)
    table(torch.arange(ids)).square().sum().backward()
    with counting() as calls:
        average_gradients(optimizer)
    return sum(size for _, size in calls)


def of_many(ids: Callable[[int], list[int]]) -> Any:
    """The gradient of each process, their mean, and how it was made."""
    table = PartialEmbedding(V, D, trainable_rows=range(20))
    ignore_in_ddp(table)
    optimizer = rowwise(torch.optim.SGD(table.parameters(), lr=0.1), table)
    rank = dist.get_rank()
    ((2 + rank) * table(torch.tensor(ids(rank))).square()).sum().backward()
    own = table.weight.grad.to_dense().clone()
    with counting() as calls:
        average_gradients(optimizer)
    return {"own": own, "mean": table.weight.grad.to_dense(), "last": calls[-1][0]}


def all_traffic() -> Any:
    return {
        f"{'sparse' if sparse else 'dense'} {rows} {trainable} {ids}": traffic(
            sparse, rows, trainable, ids
        )
        for sparse in (True, False)
        for rows in (1_000, 100_000)
        for trainable in (100, 800)
        for ids in (10, 50)
    }


def buckets() -> Any:
    """How many bytes DDP reduces, with and without the table."""
    return {
        who: wrapped(Net(sparse=False, rows=1_000), who == "ours")._get_ddp_logging_data()[
            "total_parameter_size_bytes"
        ]
        for who in ("ours", "ddp")
    }


def refusal(act: Callable[[], Any]) -> str:
    try:
        act()
    except InputError as error:
        return str(error)
    return "nothing was refused"


def refused(rows: list[int], more: list[int], average: bool = True) -> str:
    table = PartialEmbedding(V, D, trainable_rows=rows)
    ignore_in_ddp(table)
    optimizer = adamw(table)
    table.unfreeze_rows(more)
    table(torch.arange(V)).sum().backward()
    return refusal(lambda: average_gradients(optimizer) if average else optimizer.step())


def wrapped_again() -> Any:
    """A table that was ignored once is DDP's again."""
    model = Net()
    ignore_in_ddp(model)
    there = copy.copy(model._ddp_params_and_buffers_to_ignore)
    ignore_in_ddp(model, ignore=False)
    return {
        "ignored": there,
        "after": list(DistributedDataParallel(model).parameters_to_ignore),
    }


OF_TWO: dict[str, Callable[[], Any]] = {
    "dense": beside_ddp(sparse=False),
    "sparse": beside_ddp(),
    "sparse_lazy": beside_ddp(lazy=True),
    "dense_accumulated": beside_ddp(sparse=False, accumulate=3),
    "dense_clipped": beside_ddp(sparse=False, max_norm=0.01),
    "sparse_accumulated": beside_ddp(accumulate=3),
    "sparse_clipped": beside_ddp(max_norm=0.01),
    "dense_tied": beside_ddp(sparse=False, head="tied_dense"),
    "tied_head_of_rows": beside_ddp(head="tied_rows"),
    "sparse_tied_to_dense": alone(head="tied_dense"),
    "untied_sparse_head": alone(head="untied"),
    "one_without_sparse": lambda: without_a_gradient(True, (1,)),
    "one_without_dense": lambda: without_a_gradient(False, (1,)),
    "none_sparse": lambda: without_a_gradient(True, ()),
    "of_both_kinds": of_both_kinds,
    "begun_apart": begun_apart,
    "scaled_sparse": lambda: scaled(True),
    "scaled_dense": lambda: scaled(False),
    "traffic": all_traffic,
    "buckets": buckets,
    "other_rows": lambda: refused([1 + dist.get_rank()], [7]),
    "other_order": lambda: refused(*(([1], [2]) if dist.get_rank() else ([2], [1]))),
    "not_averaged": lambda: refused([1], [2], average=False),
    "wrapped_again": wrapped_again,
}


OF_THREE: dict[str, Callable[[], Any]] = {
    "same_ids": lambda: of_many(lambda rank: [3, 1, 3, 19, 25]),
    "other_ids": lambda: of_many(lambda rank: [3, *range(7 * rank, 5 * rank + 5)]),
}
CASES = {2: OF_TWO, 3: OF_THREE}


if __name__ == "__main__":
    folder, own_rank, number = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), number)
    dist.init_process_group("gloo", store=store, rank=own_rank, world_size=number)
    for name, case in CASES[number].items():
        torch.save(case(), folder / f"{name}-{own_rank}.pt")
    dist.barrier()
    os._exit(0)  # threads of the process group may abort an interpreter that ends with them
