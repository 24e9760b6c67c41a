"""Averages of weights, in which rows that do not train keep their bits.

An average of equal numbers is that number, and yet `decay * average + (1 - decay) * weight` rounds:
under `torch.optim.swa_utils.get_ema_avg_fn`, which Lightning's `EMAWeightAveraging` uses, frozen
rows of the averaged model drift.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from partial_embedding.torch.table import tables_of


def keep_equal_rows(update: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what averages a model, so that rows of tables that are equal in both keep their bits.

    Args:
        update: Called with the averaged model, the model, and whatever else it takes.
    """

    @wraps(update)
    @torch.no_grad()
    def updated(averaged: nn.Module, model: nn.Module, *args: Any, **options: Any) -> Any:
        # By their places, as averages pair them: wrappers change names, and a copy may be plain.
        pairs = [
            (average, parameter)
            for average, parameter in zip(averaged.parameters(), model.parameters(), strict=False)
            if average.shape == parameter.shape
            and any(table.has_frozen_rows for table in tables_of(parameter))
        ]
        equal = [_equal_rows(average, parameter) for average, parameter in pairs]
        result = update(averaged, model, *args, **options)
        for (average, parameter), rows in zip(pairs, equal, strict=True):
            now = average.detach()
            mask = rows.view(-1, *[1] * (now.dim() - 1))
            now.copy_(torch.where(mask, parameter.detach().to(now.device, now.dtype), now))
        return result

    return updated


def _equal_rows(one: Tensor, other: Tensor) -> Tensor:
    """Whether each row has the same bits in both, booleans, shape (V,)."""
    rows = [tensor.detach().reshape(len(tensor), -1) for tensor in (one, other.to(one.device))]
    if one.dtype != other.dtype:
        return (rows[0] == rows[1]).all(dim=1)
    words = [tensor.contiguous().view(torch.uint8) for tensor in rows]
    return (words[0] == words[1]).all(dim=1)


# In the class itself: whoever averages, a plain loop or a callback, makes the object on his own.
AveragedModel.update_parameters = keep_equal_rows(AveragedModel.update_parameters)  # type: ignore[method-assign]
