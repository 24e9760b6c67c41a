"""Numbers that differ when a bit of a row, or of a table, does."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows are read in chunks of about this many bytes, which bounds the extra memory.
_CHUNK = 1 << 20
# The widest words that a sum of 64 bits has room for: a product of two wide ones would lose the
# highest bits of both, and with them a change of two signs.
_WORDS = (torch.int32, torch.int16, torch.uint8)


@torch.no_grad()
def fingerprints(weight: Tensor, ids: Tensor) -> Tensor:
    """A number, int64, for each of some rows that differs when any bit of the row does.

    The row's words of 32 bits, or fewer where it is no whole number of them, are summed with fixed
    odd factors modulo 2⁶⁴, so that a change of one word is always seen, and one of several words
    but for a rare chance.
    """
    prints = torch.empty(len(ids), dtype=torch.int64, device=weight.device)
    step = _rows_at_once(weight)
    for into, chunk in zip(prints.split(step), ids.split(step), strict=True):
        into.copy_(_prints(weight.detach().index_select(0, chunk)))
    return prints


@torch.no_grad()
def table_fingerprint(weight: Tensor, num_rows: int, dtype: torch.dtype | None = None) -> int:
    """One number, of 64 bits, for the first rows of a table, as if they were cast to a dtype.

    Each row adds its own to it: see `rows_fingerprint`.
    """
    total, step = 0, _rows_at_once(weight)
    for start in range(0, num_rows, step):
        rows = weight.detach()[start : min(start + step, num_rows)]
        ids = torch.arange(start, start + len(rows), device=weight.device)
        total += rows_fingerprint(rows.to(dtype or weight.dtype), ids)
    return wrapped(total)


@torch.no_grad()
def rows_fingerprint(rows: Tensor, ids: Tensor) -> int:
    """What rows, with these ids, add to the fingerprint of their table.

    Example:
        >>> table, ids = torch.eye(4), torch.tensor([1, 3])
        >>> others = torch.tensor([0, 2])
        >>> whole = table_fingerprint(table, 4)
        >>> parts = [rows_fingerprint(table[some], some) for some in (ids, others)]
        >>> whole == wrapped(sum(parts))
        True
    """
    if not len(ids):
        return 0
    # An odd factor for each place, so that rows which change places change the sum.
    return int((_prints(rows) * (2 * ids + 1)).sum())


def wrapped(number: int) -> int:
    """A whole number modulo 2⁶⁴, as a signed integer of 64 bits.

    Example:
        >>> wrapped(2**63 + 1) == 1 - 2**63
        True
    """
    return (number + 2**63) % 2**64 - 2**63


def _rows_at_once(weight: Tensor) -> int:
    return max(1, _CHUNK // max(1, weight.shape[1] * weight.element_size()))


def _prints(rows: Tensor) -> Tensor:
    width = rows.shape[1] * rows.element_size()
    word = next(word for word in _WORDS if width % word.itemsize == 0)
    words = rows.contiguous().view(torch.uint8).view(word)
    generator = torch.Generator().manual_seed(0x5EED)
    shape = (words.shape[1],)
    drawn = torch.randint(-(2**62), 2**62, shape, generator=generator, device="cpu")
    return (words.long() * (drawn * 2 + 1).to(rows.device)).sum(1)
