"""The exceptions of this library: input that is refused, and a frozen row that moved."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches

import numpy as np


class InputError(ValueError):
    """Input that breaks a rule; the message gives the rule, what was received and the remedy.

    It is a `ValueError`, so code that expects one keeps working. The command line prints it as one
    line and exits with code 2.

    Example:
        >>> raise InputError("a share lies in (0, 1]. Received: 7. Was a count meant?")
        Traceback (most recent call last):
            ...
        partial_embedding.errors.InputError: a share lies in (0, 1]. Received: 7. Was a count meant?
    """

    # A `tf.function` lets it through then, and makes no other error of it.
    ag_pass_through = True


class FrozenRowsMoved(RuntimeError):  # noqa: N818  # names what happened, as StopIteration does
    """A row that was frozen changed a bit; the message names the table, the rows and the step.

    Args:
        message: What is said.
        rows: The ids of all rows that changed.

    Example:
        >>> FrozenRowsMoved("words: 1 frozen row changed by step 12: 3.", [3]).rows
        (3,)
    """

    def __init__(self, message: str, rows: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


@contextmanager
def refused_at(place: str) -> Iterator[None]:
    """Name the place where what is done within it is refused."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def check_flags(**flags: object) -> None:
    """Refuse options that are neither true nor false: Python takes the word "no" for true.

    Example:
        >>> check_flags(lazy=True, sparse=False)
    """
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool):
            raise InputError(
                f"{name} is True or False. Received: {value!r}. Leave it out for the default."
            )


# What others call it, or what it was called before.
_OTHER_NAMES = {
    "lr": "lr_scale",
    "learning_rate": "lr_scale",
    "warmup": "warmup_steps",
    "metric": "monitor",
    "min_change": "min_delta",
    "parts": "increments",
    "growth": "grow",
}


def did_you_mean(received: object, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a message about an unknown word: the known one that was meant, if one is near.

    Args:
        received: A word, or a mapping, whose first unknown key is the word.
        known: What would have been understood.
        otherwise: The remedy where no known word is near.

    Example:
        >>> did_you_mean("warmup", ["lr_scale", "warmup_steps"])
        " Did you mean 'warmup_steps'?"
        >>> did_you_mean({"lr_scale": 1, "colour": 2}, ["lr_scale", "warmup_steps"], " Remove it.")
        ' Remove it.'
    """
    known = list(known)
    words = [str(word) for word in (received if isinstance(received, Mapping) else [received])]
    word = next((word for word in words if word not in known), "")
    other = _OTHER_NAMES.get(word)
    near = [other] if other in known else get_close_matches(word, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else otherwise
