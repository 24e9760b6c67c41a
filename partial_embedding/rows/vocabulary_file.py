"""Vocabularies as text files: one token a line, with its count and whether it had no vector."""

from __future__ import annotations

import os
from pathlib import Path

from partial_embedding.errors import InputError
from partial_embedding.files import write_atomically
from partial_embedding.rows.token_text import escaped, unescaped
from partial_embedding.rows.vocabulary import Vocabulary

_HEADER = ("token", "count", "missing")


def write_vocabulary(path: str | os.PathLike[str], vocabulary: Vocabulary) -> None:
    r"""Write the tokens of a table's rows, and what is known of them, in columns.

    Args:
        path: The file to write: UTF-8, columns separated by tabs, with the header `token`, `count`
            (where there are counts) and `missing` (1 or 0, where that is known). Tokens alone have
            no header. Controls and escapes of terminals are written as `\x1b`, for example.
        vocabulary: What to write.

    Raises:
        InputError: A token has a tab or a line break.
        OSError: The file cannot be written.
    """
    for row, token in enumerate(vocabulary.tokens):
        if token.splitlines() != [token] or "\t" in token:
            raise InputError(
                f"a token in a file has no tab or line break, and is not empty. Received {token!r} "
                f"in row {row}. Rename it."
            )
    columns = [[escaped(token) for token in vocabulary.tokens]]
    names = [_HEADER[0]]
    if vocabulary.counts is not None:
        names.append(_HEADER[1])
        columns.append([str(count) for count in vocabulary.counts])
    if vocabulary.missing is not None:
        names.append(_HEADER[2])
        missing = set(vocabulary.missing.tolist())
        columns.append([str(int(row in missing)) for row in range(len(vocabulary))])
    lines = ["\t".join(row) for row in zip(*columns, strict=True)]
    if len(names) > 1:
        lines.insert(0, "\t".join(names))
    with write_atomically(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """Read a vocabulary that `write_vocabulary` wrote, or a plain list of tokens.

    Args:
        path: A file in UTF-8. Without the header, each line is one token.

    Raises:
        InputError: The file cannot be read, has no token, or a line does not fit the header.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "vocabulary.tsv"
        ...     write_vocabulary(file, Vocabulary(["the", "zyzzyva"], counts=[9, 1], missing=[1]))
        ...     vocabulary = read_vocabulary(file)
        >>> vocabulary.tokens, vocabulary.counts.tolist(), vocabulary.missing.tolist()
        (('the', 'zyzzyva'), [9, 1], [1])
    """
    if Path(path).exists() and not Path(path).is_file():
        kind = "folder" if Path(path).is_dir() else "device"
        raise InputError(f"{path}: a vocabulary is a file. Received a {kind}. Name a file.")
    try:
        # Not `splitlines`, which also breaks at characters that tokens may have.
        lines = Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"{path}: a vocabulary is text in UTF-8, a token a line. Received: {reason}. "
            "Check the path, or convert the file."
        ) from None
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
                "Begin the file with that header where tokens have counts."
            )
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    counts = _whole_numbers(path, "count", columns.get("count"))
    missing = _whole_numbers(path, "missing", columns.get("missing"))
    try:
        return Vocabulary(
            [unescaped(token) for token in columns["token"]],
            counts,
            None if missing is None else [row for row, flag in enumerate(missing) if flag],
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _whole_numbers(
    path: str | os.PathLike[str], name: str, values: tuple[str, ...] | None
) -> list[int] | None:
    if values is None:
        return None
    for number, value in enumerate(values, start=2):
        if not value.isascii() or not value.isdigit():
            raise InputError(
                f"{path}: line {number}: {name} is a whole number from 0 up. Received: {value!r}. "
                "Correct the line."
            )
    return [int(value) for value in values]
