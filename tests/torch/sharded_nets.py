"""Models whose tables processes share by rows, and how they are shared and trained."""

from collections.abc import Callable
from typing import Any

import torch
from device_nets import Net, whole
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from partial_embedding.torch import FrozenRowAudit

V, STEPS, IDS = 11, 6, 12

Weights = dict[str, Tensor]
Optimizer = torch.optim.Optimizer
# The rows from each step on; some are in the shard of one process alone.
ROWS: dict[str, dict[int, list[int]]] = {
    "late": {0: [1, 7, 9], 3: [0, 1, 5, 7, 9]},
    "refrozen": {0: [1, 5, 7, 9], 2: [1, 9], 4: [1, 5, 9]},
    "growing": {0: [0], 1: [0, 1], 2: [0, 1, 2], 4: [0, 1, 2, 3, 10]},
}


def net_of(tied: bool, rows: Any = "all") -> Net:
    return Net("tied" if tied else "untied", rows, V)


def batch(step: int, rank: int) -> Tensor:
    made = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(V, (IDS,), generator=made)


def weights(model: nn.Module) -> Weights:
    return {name: whole(p).detach().clone() for name, p in model.named_parameters()}


def train(
    model: Net,
    optimizer: Optimizer,
    stages: dict[int, list[int]],
    backward: Callable[[Net, int], object],
    steps: int = STEPS,
) -> tuple[list[Weights], list[Weights]]:
    """The weights before and after each step, and the gradients of each."""
    audits = [FrozenRowAudit(model.table), FrozenRowAudit(model.head)]
    seen, gradients = [weights(model)], []
    for step in range(steps):
        for audit in audits:
            audit.check(step)
        if step in stages:
            model.set_rows(stages[step])
        for audit in audits:
            audit.restart()
        optimizer.zero_grad()
        backward(model, step)
        gradients.append({n: whole(p.grad).clone() for n, p in model.named_parameters()})
        optimizer.step()
        seen.append(weights(model))
    return seen, gradients


def processes() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


# What shards a model


def by_fsdp(model: Net, mesh: DeviceMesh | None = None) -> Net:
    """The table and the head in groups of their own; together where they have one weight."""
    mesh = mesh or processes()
    tied = model.head.weight is model.table.weight
    for module in [[model.table, model.head]] if tied else [model.table, model.head]:
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def by_tensor_parallelism(model: Net, mesh: DeviceMesh | None = None) -> Net:
    tied = model.head.weight is model.table.weight
    plan = {
        "table": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh or processes(), plan)
    if tied:  # which torch parts
        model.head.weight = model.table.weight
    return model


def by_both(model: Net, tensor: int = 1) -> Net:
    """FSDP2 over tensor parallelism, of so many processes each."""
    shape = (dist.get_world_size() // tensor, tensor)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    return by_fsdp(by_tensor_parallelism(model, mesh["tensor"]), mesh["data"])


def with_copies(model: Net) -> Net:
    """FSDP2 that shards within a group of processes, of which there are several."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("copies", "shards"))
    return by_fsdp(model, mesh)


def in_one_group(model: Net) -> Net:
    return fully_shard(model, mesh=processes())


def in_bf16(model: Net) -> Net:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model.table, mesh=processes(), mp_policy=policy)
    return fully_shard(model, mesh=processes(), mp_policy=policy)
