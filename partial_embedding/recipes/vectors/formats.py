"""Word vectors out of a stream, block by block: text with and without a header, and binary.

gensim reads these too, but a line with a single value fills its whole row, rows beyond the header's
number are dropped, infinite values pass, and tokens with spaces are refused.
"""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Iterator
from io import BufferedReader
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from partial_embedding.errors import InputError

SPACED = "tokens have spaces, which no token of a text has"
TWICE = "tokens occur again, of which the first vector counts"
CUT = "tokens are cut inside a character and were left out"
HALF = "vectors are of 16 bits a value"

_HEADER = re.compile(rb"\s*(\d{1,18})\s+(\d{1,18})\s*")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Rows that are handed on together.
_ROWS = 8192
# Lines from which the number of values is told; rows by which a binary's type is told.
_FIRST = 100
_MOST_TOKEN = 10_000  # bytes

# Tokens and their vectors, shape (B, D).
Block = tuple[list[str], NDArray[np.float32]]


def read_text(
    place: str, stream: BufferedReader, dimension: int | None, noted: Counter[str]
) -> Iterator[Block]:
    """Read a file of lines, each a token and its values with single spaces between.

    A first line of two whole numbers is a header. Tokens may have spaces, as those of GloVe's
    largest file have.

    Args:
        place: The file, for messages.
        stream: Its content.
        dimension: The values that each vector must have; None takes what is there.
        noted: Counts what is to be said.

    Raises:
        InputError: The file is malformed, or of another dimension.
    """
    first = list(islice(stream, _FIRST))
    if first and first[0].startswith(_BYTE_ORDER_MARK):
        first[0] = first[0].removeprefix(_BYTE_ORDER_MARK)
    header = _parse_header(first[0]) if first else None
    lines = first[1:] if header else first
    if header:
        promised, size = header
    else:
        # A token with spaces seems to have more values.
        promised, size = None, min((line.rstrip().count(b" ") for line in lines[:1]), default=0)
        if lines and dimension is not None and size > dimension:
            size = min(line.rstrip().count(b" ") for line in lines)
    if first:
        _check_size(place, size, dimension)
    found = 0
    start = 1 + (header is not None)
    tokens: list[str] = []
    rows: list[list[float]] = []
    for number, line in enumerate(chain(lines, stream), start):
        token, values = _parse_line(f"{place}, line {number}", line, size, noted)
        tokens.append(token)
        rows.append(values)
        found += 1
        if len(rows) == _ROWS:
            yield tokens, _finite(place, number - len(rows) + 1, tokens, rows)
            tokens, rows = [], []
    _check_rows(place, found if promised is None else promised, found, size)
    if rows:
        yield tokens, _finite(place, start + found - len(rows), tokens, rows)


def read_binary(
    place: str, stream: BufferedReader, dimension: int | None, noted: Counter[str]
) -> Iterator[Block]:
    """Read word2vec's binary format, of 32 or 16 bits a value.

    Args:
        place: The file, for messages.
        stream: Its content.
        dimension: The values that each vector must have; None takes what is there.
        noted: Counts what is to be said.

    Raises:
        InputError: The file is malformed, or of another dimension.
    """
    header = _parse_header(stream.readline(100))
    if header is None:
        raise InputError(
            f"a binary file begins with its numbers of rows and values. Received: {place}, which "
            "does not. Name a text file .txt or .vec."
        )
    promised, size = header
    _check_size(place, size, dimension)
    buffer = stream.read(1 << 20)
    kind = "<f4"
    if not _fits(buffer, size, kind, promised) and _fits(buffer, size, "<f2", promised):
        kind = "<f2"
        noted[HALF] = promised
    width = np.dtype(kind).itemsize * size
    position = found = 0
    tokens: list[str] = []
    rows: list[NDArray[np.float32]] = []
    while True:
        end = buffer.find(b" ", position)
        if end < 0 or len(buffer) - end - 1 < width:
            # A damaged header may ask for more than fits into memory, but the file ends before.
            more = stream.read(1 << 20)
            if more:
                buffer, position = buffer[position:] + more, 0
                continue
            break
        token = buffer[position:end].lstrip(b"\n")
        values = np.frombuffer(buffer, kind, size, end + 1).astype(np.float32)
        position = end + 1 + width
        found += 1
        try:
            tokens.append(token.decode())
        except UnicodeDecodeError:
            noted[CUT] += 1
            continue
        if not np.isfinite(values).all():
            raise InputError(
                f"values are finite. Received: nan or inf in the vector of "
                f"{reprlib.repr(tokens[-1])} in {place}. Make the file again without it."
            )
        rows.append(values)
        if len(rows) == _ROWS:
            yield tokens, np.stack(rows)
            tokens, rows = [], []
    _check_rows(place, promised, found, size)
    if 2 * noted[CUT] > found:
        raise InputError(
            f"tokens are UTF-8. Received: other bytes in {noted[CUT]:,} of {found:,} rows of "
            f"{place}. Convert the file to UTF-8."
        )
    if rest := buffer[position:].strip(b"\n"):
        raise InputError(
            f"a binary file ends after its last row. Received: {reprlib.repr(rest)} after row "
            f"{found} in {place}. Get it again."
        )
    if rows:
        yield tokens, np.stack(rows)


def _fits(buffer: bytes, size: int, kind: str, promised: int) -> bool:
    """Whether the first rows look like tokens and vectors of this type."""
    position, width = 0, np.dtype(kind).itemsize * size
    for _ in range(min(_FIRST, promised)):
        end = buffer.find(b" ", position, position + _MOST_TOKEN)
        if end < 0 or len(buffer) < end + 1 + width:
            return position > 0 and len(buffer) >= 1 << 20
        token = buffer[position:end].lstrip(b"\n")
        if not token or any(byte < 32 for byte in token):
            return False
        position = end + 1 + width
    return promised > _FIRST or not buffer[position:].strip(b"\n")


def _parse_header(line: bytes) -> tuple[int, int] | None:
    match = _HEADER.fullmatch(line.removeprefix(_BYTE_ORDER_MARK))
    return (int(match[1]), int(match[2])) if match else None


def _parse_line(place: str, line: bytes, size: int, noted: Counter[str]) -> tuple[str, list[float]]:
    parts = line.rstrip().rsplit(b" ", size)
    head = parts[0]
    # A token whose last part is a number would be one of too many values.
    if len(parts) != size + 1 or (b" " in head and _is_number(head.rsplit(b" ", 1)[1])):
        _decoded(place, line)  # of a binary file, no count of values would help
        raise InputError(
            f"each line is a token and {size} values with single spaces between. Received: "
            f"{line.rstrip().count(b' ')} values in {place}. Correct or remove the line."
        )
    token = _decoded(place, head)
    if b" " in head:
        noted[SPACED] += 1
    try:
        values = [float(value) for value in parts[1:]]
    except ValueError:
        raise _no_number(place, parts[1:]) from None
    # Python takes 1_000 for a number.
    if b"_" in line and any(b"_" in value for value in parts[1:]):
        raise _no_number(place, parts[1:])
    return token, values


def _decoded(place: str, text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"tokens are UTF-8. Received: the byte 0x{text[error.start]:02x} in {place}. Convert "
            "the file to UTF-8, or name a binary file .bin."
        ) from error


def _is_number(text: bytes) -> bool:
    try:
        return b"_" not in text and bool(np.isfinite(np.float32(float(text))))
    except (ValueError, OverflowError):
        return False


def _no_number(place: str, values: list[bytes]) -> InputError:
    with np.errstate(over="ignore"):
        wrong = next(value for value in values if not _is_number(value))
    return InputError(
        "values are finite numbers in float32, with single spaces between. Received: "
        f"{reprlib.repr(wrong.decode(errors='replace'))} in {place}. Correct or remove the line."
    )


def _finite(
    place: str, first: int, tokens: list[str], rows: list[list[float]]
) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        values = np.array(rows, np.float64).astype(np.float32)
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values).all(axis=1)))
        wrong = next(v for v, x in zip(rows[row], values[row], strict=True) if not np.isfinite(x))
        raise InputError(
            "values are finite numbers in float32, with single spaces between. Received: "
            f"{str(wrong).replace('e+', 'e')!r} in {place}, line {first + row}. Correct or remove "
            "the line."
        )
    return values


def _check_size(place: str, size: int, dimension: int | None) -> None:
    if size == 0:
        raise InputError(
            f"each vector has at least one value. Received: 0 in line 1 of {place}. Are the values "
            "separated by spaces?"
        )
    if dimension is not None and size != dimension:
        raise InputError(
            f"the vectors have {dimension} values each. Received: {size} in {place}. Ask for "
            f"{size}, or take another file."
        )


def _check_rows(place: str, promised: int, found: int, size: int) -> None:
    if promised != found:
        raise InputError(
            f"the header says how many rows follow. Received: a header that promises {promised} "
            f"rows in {place}, which holds {found}. Get the file again, or correct its first line "
            f"to `{found} {size}`."
        )
    if not found:
        raise InputError(
            f"a file of vectors holds at least one. Received: {place}, which has none. Get it "
            "again."
        )
