"""Vocabularies as text files: one token a line, with its count and whether it had no vector."""

from __future__ import annotations

import os

from partial_embedding.errors import InputError, refused_at
from partial_embedding.files import read_lines, write_text
from partial_embedding.rows.token_text import escaped, unescaped
from partial_embedding.rows.vocabulary import Vocabulary

_HEADER = ("token", "count", "missing")


def write_vocabulary(path: str | os.PathLike[str], vocabulary: Vocabulary) -> None:
    r"""Write the tokens of a table's rows, and what is known of them, in columns.

    The file is UTF-8, its columns are separated by tabs, with the header `token`, `count` (where
    there are counts) and `missing` (1 or 0, where that is known). Tokens alone have no header.
    Controls and escapes of terminals are written as `\x1b`, for example.

    Raises:
        InputError: A token has a tab or a line break.
    """
    for row, token in enumerate(vocabulary.tokens):
        if token.splitlines() != [token] or "\t" in token:
            raise InputError(
                f"a token in a file has no tab or line break, and is not empty. Received {token!r} "
                f"in row {row}. Rename it."
            )
    columns = {"token": [escaped(token) for token in vocabulary.tokens]}
    if vocabulary.counts is not None:
        columns["count"] = [str(count) for count in vocabulary.counts]
    if vocabulary.missing is not None:
        missing = set(vocabulary.missing.tolist())
        columns["missing"] = [str(int(row in missing)) for row in range(len(vocabulary))]
    header = [tuple(columns)] if len(columns) > 1 else []
    rows = [*header, *zip(*columns.values(), strict=True)]
    write_text(path, "".join("\t".join(row) + "\n" for row in rows))


def read_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """Read a vocabulary that `write_vocabulary` wrote, or a list of tokens, one a line.

    Raises:
        InputError: The file cannot be read, has no token, or a line does not fit the header.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = f"{folder}/vocabulary.tsv"
        ...     write_vocabulary(file, Vocabulary(["the", "zyzzyva"], counts=[9, 1], missing=[1]))
        ...     vocabulary = read_vocabulary(file)
        >>> vocabulary.tokens, vocabulary.counts.tolist(), vocabulary.missing.tolist()
        (('the', 'zyzzyva'), [9, 1], [1])
    """
    lines = read_lines(path, "a vocabulary is text in UTF-8, a token a line")
    header = lines[0].split("\t")
    if header[0] != "token" or not set(header) <= set(_HEADER) or len(header) == 1:
        header = ["token"]
    else:
        lines = lines[1:]
    if not any(lines):
        raise InputError(
            f"{path}: a vocabulary has at least one token. Received none. Write one a line."
        )
    rows = [line.split("\t") for line in lines]
    for number, row in enumerate(rows, start=1 + (len(header) > 1)):
        if len(row) != len(header):
            raise InputError(
                f"{path}: line {number}: the columns are {header}. Received {len(row)} values. "
                "Where tokens have counts, begin the file with the line token<TAB>count."
            )
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    counts = _whole_numbers(path, "count", columns.get("count"))
    missing = _whole_numbers(path, "missing", columns.get("missing"))
    with refused_at(str(path)):
        return Vocabulary(
            [unescaped(token) for token in columns["token"]],
            counts,
            None if missing is None else [row for row, flag in enumerate(missing) if flag],
        )


def _whole_numbers(
    path: str | os.PathLike[str], name: str, values: tuple[str, ...] | None
) -> list[int] | None:
    if values is None:
        return None
    for number, value in enumerate(values, start=2):
        if not value.isascii() or not value.isdigit():
            raise InputError(
                f"{path}: line {number}: {name} is a whole number from 0 up. Received: {value!r}. "
                f"Write {'1 or 0' if name == 'missing' else 'how often the token occurs'}."
            )
    return [int(value) for value in values]
