"""Runs that diverge: told at the step where it happens, in the same words for every framework."""

from __future__ import annotations

from partial_embedding.errors import InputError


def diverged(loss: float, step: int, epoch: int) -> InputError:
    """The error of a run whose loss is no finite number after some steps.

    Example:
        >>> str(diverged(float("nan"), 12, 1)).partition(". Received: ")[2]
        'nan after 12 steps, in epoch 1. Lower model.lr and start anew.'
    """
    return InputError(
        f"a loss is a finite number. Received: {loss} after {step:,} steps, in epoch {epoch}. "
        "Lower model.lr and start anew."
    )
