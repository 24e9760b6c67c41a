"""Rows of a tensor brought together, summed and written back, at the speed of memory.

Memory is used again where it can be: the system takes longer to hand out a large block than torch
does to fill it.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

# The widest elements first.
_WORDS = (torch.complex128, torch.float64)


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
    """Rows of a matrix as a contiguous one, which shares its memory where they lie side by side.

    Args:
        source: Shape (V, D).
        ids: The rows, int64, shape (k,).
        run: What `run_of` gave for them.
        into: A tensor whose memory is used again if it fits.

    Returns:
        Shape (k, D).
    """
    if run is not None and source.is_contiguous():
        return source[run]
    if _fits(into, source, len(ids)):
        return torch.index_select(source, 0, ids, out=into)
    return source.index_select(0, ids)


def write_rows(target: Tensor, ids: Tensor, run: slice | None, values: Tensor) -> None:
    """Put rows where `read_rows` took them; nothing is copied where the memory is shared.

    Args:
        target: Shape (V, D).
        ids: The rows, int64, shape (k,).
        run: What `run_of` gave for them.
        values: Shape (k, D).
    """
    if run is not None:
        target[run].copy_(values)  # does nothing where both are the same memory
        return
    # torch copies element by element, so that the same bytes in fewer elements take half the time.
    word = _word(target, values)
    target.view(word).index_copy_(0, ids, values.view(word))


def sum_rows(slots: Tensor, values: Tensor, height: int, into: Tensor | None = None) -> Tensor:
    """Sum rows by slot, in the order in which a dense embedding's own backward pass sums them.

    Args:
        slots: Where each row goes, any integers, shape (n,).
        values: Shape (n, D).
        height: The number of slots.
        into: A tensor whose memory is used again if it fits.

    Returns:
        Shape (height, D).
    """
    total = (
        into.zero_() if _fits(into, values, height) else values.new_zeros(height, *values.shape[1:])
    )
    # torch has a path of its own for int64, about twice as fast.
    return total.index_add_(0, slots.long(), values)


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in one block of memory."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _fits(into: Tensor | None, like: Tensor, height: int) -> TypeGuard[Tensor]:
    return (
        into is not None
        and into.shape == (height, *like.shape[1:])
        and (into.dtype, into.device) == (like.dtype, like.device)
    )


def _word(*tensors: Tensor) -> torch.dtype:
    """The widest dtype that all rows are a whole number of, or their own."""
    dtype = tensors[0].dtype
    if not all(tensor.is_contiguous() and tensor.dtype == dtype for tensor in tensors):
        return dtype
    for word in _WORDS:
        if dtype.itemsize < word.itemsize and all(_divides(word, tensor) for tensor in tensors):
            return word
    return dtype


def _divides(word: torch.dtype, tensor: Tensor) -> bool:
    sizes = tensor.shape[-1], tensor.storage_offset()
    return all(size * tensor.element_size() % word.itemsize == 0 for size in sizes)
