"""Models whose tables processes share by rows: how they are shared, trained, and remembered."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from device_nets import OPTIMIZERS, Net, whole
from launch import of_all, processes
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from partial_embedding.torch import FrozenRowAudit, rowwise
from partial_embedding.torch.optimizer import prepared
from partial_embedding.torch.shards import shard_of

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


# What they are held against


def alone(
    optimizer: str, rows: str, tied: bool, backward: Callable[[Net, int], object]
) -> list[Weights]:
    """The weights after each step of one process, in which nothing is sharded."""
    model = net_of(tied, ROWS[rows][0])
    # Two uses of one weight are summed in another order where they are sparse.
    model.table.sparse = model.head.sparse = not tied
    return train(model, OPTIMIZERS[optimizer](model.parameters()), ROWS[rows], backward)[0]


def of_batches(number: int) -> Callable[[Net, int], None]:
    """The gradients of so many processes."""

    def backward(model: Net, step: int) -> None:
        for rank in range(number):
            (model(batch(step, rank)) / number).backward()

    return backward


def recorded(gradients: list[Weights]) -> Callable[[Net, int], None]:
    def put(model: Net, step: int) -> None:
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[step][name].clone()

    return put


# Checkpoints


def memory(model: Net, made: Optimizer) -> dict[str, Any]:
    """All that a run goes on from: weights, and what is remembered of each cohort, by row."""
    handle: Any = prepared(made)
    kept = {}
    for state in handle.tables.values():
        shard = shard_of(state.parameter)
        for number, cohort in state.cohorts.items():
            kept[f"{state.name} {number}"] = {
                "rows": cohort.ids + shard.start,
                "steps": cohort.steps,
                "lr_scale": cohort.rate_scale.lr_scale,
                **copy.deepcopy(cohort.state),
            }
    assert len(kept) == 6  # two cohorts of the table, of the head's weight and of its bias
    parts = of_all(kept)
    for cohort, state in kept.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                state[key] = torch.cat([part[cohort][key] for part in parts])
    return {"weights": weights(model), **kept}


def begun(optimizer: str, only_tables: bool) -> tuple[Net, Optimizer]:
    model = net_of(False, ROWS["late"][0])
    if only_tables:
        model.hidden.requires_grad_(False)
    by_fsdp(model)
    return model, rowwise(OPTIMIZERS[optimizer](model.parameters()), model)


def go_on(model: Net, made: Optimizer, steps: range) -> None:
    for step in steps:
        if step == 3:
            model.set_rows(ROWS["late"][3], lr_scale=0.5, warmup_steps=3)
        model(batch(step, dist.get_rank())).backward()
        made.step()
        made.zero_grad()


def state_of(model: Net, made: Optimizer, options: StateDictOptions) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, made, options=options),
    }
