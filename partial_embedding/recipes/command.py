"""What the commands share: refusals in one line, and the name that was meant."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NoReturn

from partial_embedding.errors import InputError


class CommandParser(argparse.ArgumentParser):
    """Raises what it refuses, so that every command says it in the same way."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        _, unknown, given = message.partition("unrecognized arguments: ")
        meant = did_you_mean(given.split("=")[0], self._option_string_actions) if unknown else ""
        raise InputError(f"{message}.{meant} See {self.prog} --help.")


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """A question after the name that was meant, or nothing where none is near.

    Example:
        >>> did_you_mean("--data.batchsize", ["--data.batch_size", "--data.path"])
        ' Did you mean --data.batch_size?'
    """
    near = get_close_matches(given, list(known), n=1, cutoff=0.75)
    return f" Did you mean {near[0]}?" if near else ""
