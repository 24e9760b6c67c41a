"""What the commands share: arguments that are refused, and runs that diverge, in one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from partial_embedding.errors import InputError, did_you_mean


class CommandParser(argparse.ArgumentParser):
    """Raises what it refuses, so that every command says it in the same way."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        _, unknown, given = message.partition("unrecognized arguments: ")
        meant = did_you_mean(given.split("=")[0], self._option_string_actions) if unknown else ""
        raise InputError(f"{message}.{meant} See {self.prog} --help.")


def positive(text: str) -> int:
    """A whole number from 1 up, as the type of an option.

    Raises:
        argparse.ArgumentTypeError: It is none.

    Example:
        >>> positive("3")
        3
    """
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 up. Received: {text!r}")
    return int(text)


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
