"""Gradients of whole tables among those of a model that lies in shards.

torch takes no norm of `DTensor` gradients and plain ones together. So a whole table's gradient
becomes a `DTensor` that each process has all of, within which it is as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch import distributed as dist


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`.

    Args:
        tensor: Any tensor.
    """
    # By name: importing the class takes longer than making a table.
    return type(tensor).__name__ == "DTensor"


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, in the same memory.

    Args:
        tensor: Any tensor.
    """
    # Not `to_local()`, whose view would make a gradient by rows dense.
    own: Tensor = tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return own


def replicate_gradients(tables: Iterable[nn.Parameter], others: Iterable[Tensor]) -> None:
    """Make gradients of whole tables such that torch takes a norm of them and of sharded ones.

    Args:
        tables: The weights of whole tables.
        others: The parameters among which they are.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    meshes: Iterable[Any] = (o.device_mesh for o in others if is_sharded(o))  # type: ignore[attr-defined]
    if (mesh := next(iter(meshes), None)) is None:
        return
    for parameter in tables:
        grad = parameter.grad
        if grad is not None and not is_sharded(parameter) and not is_sharded(grad):
            parameter.grad = _replicated(grad, mesh)


def _replicated(own: Tensor, mesh: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    # `DTensor.from_local` would ask for a view.
    meta = TensorMeta(own.shape, own.stride(), own.dtype)
    spec = DTensorSpec(mesh, (Replicate(),) * mesh.ndim, tensor_meta=meta)
    return DTensor(own, spec, requires_grad=False)
