"""What the commands that need no trainer share."""

import argparse
from typing import NoReturn

from partial_embedding.errors import InputError


class CommandParser(argparse.ArgumentParser):
    """Raises what it refuses, so that every command says it in the same way."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments.

        Args:
            message: What is wrong with them.

        Raises:
            InputError: Always.
        """
        raise InputError(f"{message}. See {self.prog} --help.")
