"""The shapes of tensors that get memory of their own."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from partial_embedding.torch.row_gradient import RowGradient


def storages(values: Any) -> dict[int, Tensor]:
    """The dense tensors among some values, by where their memory begins."""
    return {
        one.untyped_storage().data_ptr(): one
        for one in tree_leaves(values)
        if isinstance(one, Tensor)
        and not isinstance(one, RowGradient)
        and one.layout == torch.strided
    }


class MadeTensors(TorchDispatchMode):
    """Keeps the shapes of what functions give that is no view of what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[torch.Size] = set()

    @property
    def largest(self) -> int:
        return max(map(math.prod, self.shapes))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = storages((args, kwargs)), storages(result)
        self.shapes |= {made[place].shape for place in made.keys() - given.keys()}
        return result
