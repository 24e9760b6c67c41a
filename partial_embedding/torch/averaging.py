"""Averages of weights, in which rows that do not train keep their bits.

An average of equal numbers is that number, and yet `decay * average + (1 - decay) * weight` rounds:
under `torch.optim.swa_utils.get_ema_avg_fn`, which Lightning's `EMAWeightAveraging` uses, frozen
rows of the averaged model drift.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from partial_embedding.torch.table import row_parameters_in

_update_parameters = AveragedModel.update_parameters


@wraps(_update_parameters)
@torch.no_grad()
def _keep_what_is_equal(averaged: AveragedModel, model: nn.Module) -> Any:
    own = {name: parameter for name, _, parameter in row_parameters_in(averaged.module)}
    source = model.module if isinstance(model, AveragedModel) else model
    pairs = [
        (own[name], parameter)
        for name, table, parameter in row_parameters_in(source)
        if table.has_frozen_rows and name in own and own[name].shape == parameter.shape
    ]
    equal = [_equal_rows(average, parameter) for average, parameter in pairs]
    result = _update_parameters(averaged, model)
    for (average, parameter), rows in zip(pairs, equal, strict=True):
        now = average.detach()
        mask = rows.view(-1, *[1] * (now.dim() - 1))
        now.copy_(torch.where(mask, parameter.detach().to(now.device, now.dtype), now))
    return result


def _equal_rows(one: Tensor, other: Tensor) -> Tensor:
    """Whether each row has the same bits in both, booleans, shape (V,)."""
    rows = [tensor.detach().reshape(len(tensor), -1) for tensor in (one, other.to(one.device))]
    if one.dtype != other.dtype:
        return (rows[0] == rows[1]).all(dim=1)
    words = [tensor.contiguous().view(torch.uint8) for tensor in rows]
    return (words[0] == words[1]).all(dim=1)


# In the class itself: whoever averages, a plain loop or a callback, makes the object on his own.
AveragedModel.update_parameters = _keep_what_is_equal  # type: ignore[method-assign, assignment]
