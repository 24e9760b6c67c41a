"""Gradients of whole tables among those of a model that lies in shards.

torch takes no norm of `DTensor` gradients and plain ones together. So a whole table's gradient
becomes a `DTensor` that each process has all of, within which it is as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch import distributed as dist

from partial_embedding.torch.shards import as_dtensor, is_sharded


def replicate_gradients(tables: Iterable[nn.Parameter], others: Iterable[Tensor]) -> None:
    """Make gradients of whole tables such that torch takes a norm of them and of sharded ones.

    Args:
        tables: The weights of whole tables.
        others: The parameters among which they are.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    meshes: Iterable[Any] = (one.device_mesh for one in others if is_sharded(one))  # type: ignore[attr-defined]
    if (mesh := next(iter(meshes), None)) is None:
        return
    from torch.distributed.tensor import Replicate

    for parameter in tables:
        grad = parameter.grad
        if grad is not None and not is_sharded(parameter) and not is_sharded(grad):
            everywhere = [Replicate()] * mesh.ndim
            parameter.grad = as_dtensor(grad, mesh, everywhere, grad.shape)
