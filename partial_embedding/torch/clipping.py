"""Gradient clipping for plain training loops: torch's functions, for sparse gradients too."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

Tensors = Tensor | Iterable[Tensor]


def clip_grad_norm_(
    parameters: Tensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale gradients down to a total norm, as `torch.nn.utils.clip_grad_norm_` does.

    Frozen rows have no gradient and so no part in the norm.

    Args:
        parameters: One or more tensors whose `grad` is dense or sparse; a sparse one is left
            coalesced.
        max_norm: The largest total norm.
        norm_type: The p of the norm; may be `inf`.
        error_if_nonfinite: Raise when the total norm is not finite.
        foreach: As in torch.

    Returns:
        The total norm before clipping, a scalar.

    Raises:
        RuntimeError: The norm is not finite and `error_if_nonfinite` is set.

    Example:
        >>> from partial_embedding.torch import PartialEmbedding
        >>> table = PartialEmbedding(10, 4, trainable_rows=[2])
        >>> table(torch.tensor([1, 2])).sum().backward()
        >>> clip_grad_norm_(table.parameters(), max_norm=1.0)
        tensor(2.)
    """
    return nn.utils.clip_grad_norm_(
        _dense_views(parameters), max_norm, norm_type, error_if_nonfinite, foreach
    )


def clip_grad_value_(parameters: Tensors, clip_value: float, foreach: bool | None = None) -> None:
    """Clamp gradients to [-clip_value, clip_value], as `torch.nn.utils.clip_grad_value_` does.

    Args:
        parameters: One or more tensors whose `grad` is dense or sparse; a sparse one is left
            coalesced.
        clip_value: The largest magnitude of an entry.
        foreach: As in torch.

    Example:
        >>> from partial_embedding.torch import PartialEmbedding
        >>> table = PartialEmbedding(10, 4, trainable_rows=[2])
        >>> table(torch.tensor([2, 2])).sum().backward()
        >>> clip_grad_value_(table.parameters(), 0.5)
        >>> table.weight.grad.to_dense()[2]
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    nn.utils.clip_grad_value_(_dense_views(parameters), clip_value, foreach)


def _dense_views(parameters: Tensors) -> list[Tensor]:
    """Tensors whose gradients are dense and share memory with those of the parameters."""
    views = []
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        if parameter.grad is not None and parameter.grad.layout == torch.sparse_coo:
            # Summed by row first: the norm of two entries of one row is not that of their sum.
            parameter.grad = parameter.grad.coalesce()
            view = torch.empty_like(parameter.grad._values())
            view.grad = parameter.grad._values()
            views.append(view)
        else:
            views.append(parameter)
    return views
