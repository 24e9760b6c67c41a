"""Rows of a tensor brought together, summed and written back, at the speed of memory.

Memory is used again where it can be: the system takes longer to hand out a large block than torch
does to fill it.
"""

from __future__ import annotations

from typing import TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import increment_version

# With more slots than this for each id, going through all slots takes longer than sorting the ids.
_SPARSE = 6
# With fewer numbers than this, torch has written them before NumPy begins.
_MANY = 2**13
_OF_NUMPY = (torch.float32, torch.float64, torch.float16)


def run_of(ids: Tensor) -> slice | None:
    """The slice that names the same rows, if they lie side by side.

    Args:
        ids: Sorted ids without duplicates, int64, shape (k,).

    Example:
        >>> run_of(torch.tensor([4, 5, 6]))
        slice(4, 7, None)
        >>> run_of(torch.tensor([4, 6])) is None
        True
    """
    if not len(ids):
        return None
    first, last = int(ids[0]), int(ids[-1])
    return slice(first, last + 1) if last - first + 1 == len(ids) else None


def read_rows(source: Tensor, ids: Tensor, run: slice | None, into: Tensor | None = None) -> Tensor:
    """Rows of a matrix, shape (k, D), contiguous, and in its memory where they lie side by side.

    `run` is what `run_of` gave for their ids; the memory of `into` is used again if it fits.
    """
    if run is not None and source.is_contiguous():
        return source[run]
    if _fits(into, source, ids.shape[0]):
        return torch.index_select(source, 0, ids, out=into)
    return source.index_select(0, ids)


def write_rows(target: Tensor, ids: Tensor, run: slice | None, values: Tensor) -> None:
    """Put rows where `read_rows` took them; nothing is copied where the memory is shared."""
    if run is not None:
        target[run].copy_(values)  # does nothing where both are the same memory
        return
    are_alike = target.dtype == values.dtype and target.device == values.device
    are_alike = are_alike and _has_whole_rows(target, values)
    if are_alike and target.is_cuda and is_wide(target, values):
        # Torch has a thread copy one element, and this is the widest that there is.
        target, values = target.view(torch.complex128), values.view(torch.complex128)
    if not (are_alike and target.is_cpu and values.numel() > _MANY):
        target.index_copy_(0, ids, values)
        return
    # torch copies element by element, and NumPy what it is told is one element: twice as fast.
    _as_elements(target)[ids.numpy()] = _as_elements(values)
    if not target.is_inference():
        increment_version(target)  # which NumPy does not know of


def sum_rows(slots: Tensor, values: Tensor, height: int, into: Tensor | None = None) -> Tensor:
    """Sum rows by slot, in the order in which a dense embedding's own backward pass sums them.

    Gives (height, D) numbers, in the memory of `into` if it fits.
    """
    total = (
        into.zero_() if _fits(into, values, height) else values.new_zeros(height, *values.shape[1:])
    )
    # torch has a path of its own for int64, about twice as fast.
    return total.index_add_(0, slots.long(), values)


def distinct(slots: Tensor, height: int) -> tuple[Tensor, Tensor]:
    """What `torch.unique` gives with `return_inverse`, without sorting where there is much to sort.

    Args:
        slots: Any of 0 … height - 1, int64, shape (n,).
        height: The number of slots.

    Returns:
        The slots that occur, rising, shape (m,), and the place of each given one among them, (n,).

    Example:
        >>> distinct(torch.tensor([5, 2, 5]), 6)
        (tensor([2, 5]), tensor([1, 0, 1]))
    """
    if height > _SPARSE * len(slots):
        found, places = torch.unique(slots, return_inverse=True)
        return found, places
    marks = torch.zeros(height, dtype=torch.int64, device=slots.device).index_fill_(0, slots, 1)
    found = marks.nonzero().flatten()
    marks.index_copy_(0, found, torch.arange(len(found), device=slots.device))
    return found, marks.index_select(0, slots)


def _fits(into: Tensor | None, like: Tensor, height: int) -> TypeGuard[Tensor]:
    return (
        into is not None
        and into.shape == (height, *like.shape[1:])
        and (into.dtype, into.device) == (like.dtype, like.device)
    )


def is_wide(*tensors: Tensor) -> bool:
    """Whether rows are made of whole and aligned elements of 16 bytes."""
    return all(
        tensor.shape[-1] * tensor.itemsize % 16 == 0 and tensor.data_ptr() % 16 == 0
        for tensor in tensors
    )


def _has_whole_rows(*tensors: Tensor) -> bool:
    return all(tensor.dim() > 1 and tensor.is_contiguous() for tensor in tensors)


def _as_elements(rows: Tensor) -> NDArray[np.void]:
    """The same memory, in which each row is one element."""
    numbers = (rows if rows.dtype in _OF_NUMPY else rows.view(torch.uint8)).numpy()
    numbers = numbers.reshape(len(numbers), -1)
    return numbers.view(np.dtype((np.void, numbers.shape[1] * numbers.itemsize)))[:, 0]
