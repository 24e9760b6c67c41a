"""Tables in a model that `DistributedDataParallel` wraps: it is not given them, and needs no call.

It reduces a dense gradient as one block of V×D, and a sparse one only of an embedding, and where
the backend can, which NCCL cannot. So tables are averaged by row, when a backward pass ends in
which it reduces the rest.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._compile import _disable_dynamo
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _find_tensors

from partial_embedding.errors import InputError
from partial_embedding.torch.hooks import after_backward
from partial_embedding.torch.row_average import average, begin_alike, check_max_norm
from partial_embedding.torch.shards import is_sharded
from partial_embedding.torch.table import PartialTable, tables_in, tables_of
from partial_embedding.torch.trainable_rows import ProcessGroup

# By what wraps them, of which a copy finds its own tables.
_wrapped: weakref.WeakKeyDictionary[nn.Module, _Tables] = weakref.WeakKeyDictionary()


class _Tables:
    """The tables of a model that are averaged beside the `DistributedDataParallel` around it."""

    def __init__(self, ddp: DistributedDataParallel, model: nn.Module) -> None:
        alive = weakref.ref(ddp)
        # Rows that are split are those of all processes already.
        self.tables = {
            name: table
            for name, table in tables_in(model)
            if _name_of(model, table) in ddp.parameters_to_ignore
            and not is_sharded(table.leaf_weight)
        }

        def group() -> ProcessGroup | None:
            return None if (one := alive()) is None else one.process_group

        for table in self.tables.values():
            for tied in tables_of(table.leaf_weight):
                tied.average_over(["weight"], group)
        # Whether the backward pass that runs will average.
        self.is_queued = False

    def follow(self, _: Tensor) -> None:
        """Average when the backward pass has ended that gave this gradient."""
        if not self.is_queued:
            self.is_queued = True
            after_backward(self._average)

    def _average(self) -> None:
        self.is_queued = False
        weights = {name: table.leaf_weight for name, table in self.tables.items()}
        names = {id(weight): name for name, weight in weights.items()}
        average(zip(weights.values(), self.tables.values(), strict=True), names)


def _take_tables_out(ddp: nn.Module, part: str, model: nn.Module | None) -> None:
    """Keep tables out of what is about to wrap a model; called whenever a module gets a part.

    All processes begin with the rows of the first one. Biases of heads stay, and where nothing but
    tables trains one table does, since `DistributedDataParallel` refuses to have nothing to do.
    """
    if model is None or part != "module" or not isinstance(ddp, DistributedDataParallel):
        return
    tables = dict(tables_in(model))
    if not tables:
        return
    check_max_norm(tables)
    weights = {id(table.leaf_weight) for table in tables.values()}
    # A tied weight has a name in each module.
    named = dict(model.named_parameters(remove_duplicate=False))
    others = (p for n, p in named.items() if n not in ddp.parameters_to_ignore)
    if not any(p.requires_grad and id(p) not in weights for p in others):
        weights -= _what_stays(tables, ddp.process_group)
    names = [n for n, parameter in named.items() if id(parameter) in weights]
    # For a parameter of the model itself it has a name of its own.
    ddp.parameters_to_ignore.update(names, (f".{n}" for n in names if "." not in n))
    taken = _wrapped[ddp] = _Tables(ddp, model)
    ours = {n: table.leaf_weight for n, table in taken.tables.items()}
    begin_alike(ours, ddp.process_group)
    ddp.register_forward_pre_hook(_begin)
    ddp.register_forward_hook(_follow)


def _what_stays(tables: Mapping[str, PartialTable], group: ProcessGroup) -> set[int]:
    """The weight that is left to `DistributedDataParallel`, by its id."""
    trained = {n: table for n, table in tables.items() if table.leaf_weight.requires_grad}
    # Of embeddings alone it takes sparse gradients.
    lookups = [n for n, table in trained.items() if not isinstance(table, nn.Linear)]
    for name in [*lookups, *trained][:1]:
        table = trained[name]
        if name in lookups and table.sparse and dist.get_backend(group) == "nccl":
            raise InputError(
                "NCCL cannot reduce sparse gradients, and a table stays with "
                "DistributedDataParallel where nothing else trains. Received the sparse table "
                f"{name!r}. Make it with sparse=False."
            )
        for tied in tables_of(table.leaf_weight):
            tied.leave_to_ddp()
        return {id(table.leaf_weight)}
    return set()


def _name_of(model: nn.Module, table: PartialTable) -> str:
    weight = table.leaf_weight
    return next(n for n, parameter in model.named_parameters() if parameter is weight)


@_disable_dynamo
def _begin(ddp: DistributedDataParallel, _: Any) -> None:
    if ddp._join_config.enable:
        raise InputError(
            "processes with tables make equally many steps. Received a pass within "
            "DistributedDataParallel.join(). Give each process as many batches: "
            "DistributedSampler(…, drop_last=True)."
        )
    # Of a backward pass that failed.
    _tables_in(ddp).is_queued = False


@_disable_dynamo
def _follow(ddp: DistributedDataParallel, _: Any, output: Any) -> None:
    # As it decides itself; its flag is down while gradients are accumulated.
    if torch.is_grad_enabled() and ddp.require_backward_grad_sync:
        for tensor in _find_tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(_tables_in(ddp).follow)


def _tables_in(ddp: DistributedDataParallel) -> _Tables:
    if ddp not in _wrapped:
        _wrapped[ddp] = _Tables(ddp, ddp.module)
    return _wrapped[ddp]


# Once for the process, since nothing else is called where a model is wrapped.
register_module_module_registration_hook(_take_tables_out)
