"""Averages of a model: rows that are equal in both keep their bits, however the two are named."""

import copy
from collections.abc import Callable

import pytest
import torch
from oracle import rows_that_differ
from steps import take_steps
from torch import nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from partial_embedding.torch import PartialEmbedding

V, D, ROWS = 40, 4, [1, 4]


def wrapped(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The average was made of the model, and sees it compiled, with other names."""
    return model, torch.compile(model, backend="eager")


def plain_teacher(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The average is of a model without partly trainable tables."""
    teacher = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, 2))
    teacher.load_state_dict(model.state_dict())
    return teacher, model


def of_an_average(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The average is made of another average's model."""
    return copy.deepcopy(model), model


@pytest.mark.parametrize("pair", [wrapped, plain_teacher, of_an_average])
def test_frozen_rows_of_an_average_keep_their_bits(
    pair: Callable[[nn.Module], tuple[nn.Module, nn.Module]],
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(PartialEmbedding(V, D, trainable_rows=ROWS), nn.Linear(D, 2))
    before = model[0].weight.detach().clone()
    of, seen = pair(model)
    average = AveragedModel(of, avg_fn=get_ema_avg_fn(0.9))
    optimizer = SGD(model.parameters(), 0.1)
    for _ in range(5):
        take_steps(optimizer, lambda: model(torch.arange(V)).square().sum())
        average.update_parameters(seen)
    assert rows_that_differ(before, next(average.parameters())) == ROWS
