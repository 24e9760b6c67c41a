"""Text from outside, such as tokens, as it may be shown in a terminal, a file or a page."""

from __future__ import annotations

import re

# What `printable` makes, but for tabs and line ends.
_ESCAPE = r"x[0-9a-f]{2}|u[0-9a-f]{4}|U00(?:0[0-9a-f]|10)[0-9a-f]{4}"


def printable(text: str) -> str:
    r"""Escape what would not be seen, or would move what stands around it.

    Those are controls, line ends, escapes of terminals, marks of direction and half surrogates.
    Markup is left to what makes HTML.

    Example:
        >>> print(printable("na\u00efve \x1b[2J\u202e\n"))
        naïve \x1b[2J\u202e\n
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def escaped(text: str) -> str:
    r"""The same as `printable`, from which `unescaped` makes the text again.

    Example:
        >>> print(escaped("\x1b[2J"), escaped(r"\x1b"), escaped(r"\o/"))
        \x1b[2J \x5cx1b \o/
    """
    return printable(re.sub(rf"\\(?={_ESCAPE})", r"\\x5c", text))


def unescaped(text: str) -> str:
    r"""The text that `escaped` was given; a text that it did not make stays what it is.

    Example:
        >>> unescaped(r"\x5cx1b"), unescaped(r"\x41"), unescaped(escaped("\x1b")) == "\x1b"
        ('\\x1b', '\\x41', True)
    """

    def character(found: re.Match[str]) -> str:
        meant = chr(int(found[1][1:], 16))
        return found[0] if meant.isprintable() and meant != "\\" else meant

    return re.sub(rf"\\({_ESCAPE})", character, text)
