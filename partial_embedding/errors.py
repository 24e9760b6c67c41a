"""The exceptions of this library: input that is refused, and a frozen row that moved."""


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


class FrozenRowsMoved(RuntimeError):  # noqa: N818  # names what happened, as StopIteration does
    """A row that was frozen changed a bit; the message names the table, the rows and the step."""
