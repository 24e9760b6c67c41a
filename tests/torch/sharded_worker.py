"""Tables that processes share by rows; a script, started by `test_sharded.py`.

Usage: sharded_worker.py FOLDER RANK PROCESSES

It runs the cases for so many processes and writes what they returned to
`{folder}/{case}-{rank}.pt`.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from partial_embedding.torch import FrozenRowAudit, PartialEmbedding, PartialLinear

V, D, STEPS, IDS = 11, 4, 6, 12

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
}
# The rows of each step, from the one that is named.
ROWS: dict[str, dict[int, list[int]]] = {
    "late": {0: [1, 7, 9], 3: [0, 1, 5, 7, 9]},
    "refrozen": {0: [1, 5, 7, 9], 2: [1, 9], 4: [1, 5, 9]},
    "growing": {0: [0], 1: [0, 1], 2: [0, 1, 2], 4: [0, 1, 2, 3, 10]},
}


class Net(nn.Module):
    """A table, a hidden layer and a head, tied or not."""

    def __init__(self, tied: bool, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = PartialEmbedding(V, D, **options)
        self.hidden = nn.Linear(D, D)
        self.head = PartialLinear(D, V, bias=not tied)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(self.table(ids))).square().mean()

    def set_rows(self, rows: list[int]) -> None:
        self.table.set_trainable_rows(rows)
        self.head.set_trainable_rows(rows)


def batch(step: int, rank: int) -> Tensor:
    made = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(V, (IDS,), generator=made)


def whole(parameter: Tensor) -> Tensor:
    held: Any = parameter.detach()
    return (held.full_tensor() if hasattr(held, "full_tensor") else held).clone()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def shard(model: Net, tied: bool) -> Net:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard([model.table, model.head] if tied else model.table, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp(optimizer: str, rows: str, tied: bool) -> Any:
    model = Net(tied)
    model.set_rows(ROWS[rows][0])
    shard(model, tied)
    made = OPTIMIZERS[optimizer](model.parameters())
    audit = FrozenRowAudit(model.table, "table")
    seen: list[Any] = [weights(model)]
    gradients = []
    for step in range(STEPS):
        if step in ROWS[rows]:
            audit.check(step)
            model.set_rows(ROWS[rows][step])
            audit.restart()
        made.zero_grad()
        model(batch(step, dist.get_rank())).backward()
        gradients.append({n: whole(p.grad) for n, p in model.named_parameters()})
        made.step()
        seen.append(weights(model))
    audit.check(STEPS)
    return {"seen": seen, "gradients": gradients}


if __name__ == "__main__":
    folder, own_rank, number = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), number)
    dist.init_process_group("gloo", store=store, rank=own_rank, world_size=number)
    for o in OPTIMIZERS:
        for r in ROWS:
            for t in (False, True):
                out = fsdp(o, r, t)
                torch.save(out, folder / f"{o}-{r}-{t}-{own_rank}.pt")
    dist.barrier()
    os._exit(0)
