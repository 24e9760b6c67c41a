"""Tables that stay whole on each device, beside a model that an engine shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import distributed as dist
from torch import nn

from partial_embedding.errors import InputError
from partial_embedding.torch.row_average import begin_alike, check_max_norm
from partial_embedding.torch.shards import is_sharded
from partial_embedding.torch.split import SplitEmbedding
from partial_embedding.torch.table import PartialTable, row_parameters_in, tables_in


def keep_whole(model: nn.Module, processes: Any = None) -> set[nn.Parameter]:
    """Leave a model's tables whole on each device, beside an engine that shards all else.

    What is returned is for the engine to leave alone: `fully_shard(model, ignored_params=whole)`,
    `ignored_states=whole` of FSDP1, and an optimizer of `list(whole)` beside DeepSpeed's ZeRO. All
    processes begin with the rows of the first one. After each backward pass that a step follows,
    call `average_gradients`, which sends the rows that some process stepped; the Lightning callback
    does it by itself.

    Args:
        model: The model, on its device, before it is sharded.
        processes: Those that have other batches: a process group, a one-dimensional `DeviceMesh`,
            or None for all.

    Returns:
        The parameters of which only rows train, in the order of the model: the tables' weights, and
        biases of heads.

    Raises:
        InputError: There is no process group, or no table; or one has `max_norm`, is sharded
            already, lies on the meta device, or has another shape or dtype in another process.

    Example:
        >>> from torch.distributed.fsdp import fully_shard
        >>> from partial_embedding.torch import PartialEmbedding
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = nn.Sequential(PartialEmbedding(10, 4, trainable_rows=[2]), nn.Linear(4, 2))
        >>> mesh = dist.init_device_mesh("cpu", (1,))
        >>> model = fully_shard(model, mesh=mesh, ignored_params=keep_whole(model))
        >>> {name: type(parameter).__name__ for name, parameter in model.named_parameters()}
        {'0.weight': 'Parameter', '1.weight': 'DTensor', '1.bias': 'DTensor'}
        >>> dist.destroy_process_group()
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(
            "tables are kept whole among processes. Received no process group. Call "
            "torch.distributed.init_process_group first."
        )
    group = processes.get_group() if hasattr(processes, "get_group") else processes
    group = dist.group.WORLD if group is None else group
    parameters: dict[str, nn.Parameter] = {}
    for name, table, parameter in row_parameters_in(model):
        if isinstance(table, SplitEmbedding):
            continue
        if is_sharded(parameter):
            raise InputError(
                "tables are kept whole before an engine shards the model. Received "
                f"{name!r} as a DTensor. Call keep_whole(model) first."
            )
        if parameter.is_meta:
            raise InputError(
                "all processes begin with the rows of the first one. Received "
                f"{name!r} on the meta device, which has none. Make the table on its device."
            )
        parameters[name] = parameter
    if not any(isinstance(module, PartialTable) for module in model.modules()):
        raise InputError(
            f"keep_whole is for a model with tables. Received a {type(model).__name__} without "
            "any. Replace its embeddings first."
        )
    check_max_norm(dict(tables_in(model)))
    begin_alike(parameters, group)
    for module in model.modules():
        if isinstance(module, PartialTable) and not isinstance(module, SplitEmbedding):
            module.average_over(module.row_parameters, lambda: group)
    return _InOrder(parameters.values())


class _InOrder(set[nn.Parameter]):
    """A set that is gone through in the order of the model, which is the same in each process.

    A plain one goes by addresses, and processes would average one table with another.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._order = list(parameters)
        super().__init__(self._order)

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self._order)
