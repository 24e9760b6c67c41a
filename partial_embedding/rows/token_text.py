"""Text from outside, such as tokens, as it may be shown in a terminal, a file or a page."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Escape what would not be seen, or would move what stands around it.

    Those are controls, line ends, escapes of terminals, marks of direction and half surrogates.
    Markup is left to what makes HTML.

    Args:
        text: Any text.

    Example:
        >>> print(printable("na\u00efve \x1b[2J\u202e\n"))
        naïve \x1b[2J\u202e\n
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
