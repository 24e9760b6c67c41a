"""The one exception that this library raises for input it refuses."""


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
