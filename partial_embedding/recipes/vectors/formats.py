"""Word vectors, and how a stream holds them: text with and without a header, and binary.

gensim reads these too, but a line with a single value fills its whole row, rows beyond the header's
number are dropped, infinite values pass, and tokens with spaces are refused.
"""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import BufferedReader
from itertools import chain, islice
from typing import Any

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
# Where a row stands, its token and its values.
_Row = tuple[str, str, Sequence[float] | NDArray[Any]]


@dataclass(frozen=True, eq=False)
class WordVectors:
    """Tokens and the vector of each, which may lie in a file and not in memory.

    Args:
        tokens: V different tokens.
        values: The vectors, shape (V, D), float32.
        notes: What is to be said of the file: what was left out of it, and why.

    Example:
        >>> vectors = WordVectors(["the", "of"], np.array([[1, 2], [3, 4]], np.float32))
        >>> vectors["of"].tolist(), vectors.dimension
        ([3.0, 4.0], 2)
    """

    tokens: Sequence[str]
    values: NDArray[np.float32] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def dimension(self) -> int:
        """The values D of each vector."""
        return int(self.values.shape[1])

    @cached_property
    def index(self) -> Mapping[str, int]:
        """The row of each token."""
        return {token: row for row, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, token: str) -> NDArray[np.float32]:
        vector: NDArray[np.float32] = self.values[self.index[token]]
        return vector


def read_blocks(
    place: str,
    stream: BufferedReader,
    is_binary: bool,
    dimension: int | None,
    noted: Counter[str],
) -> Iterator[Block]:
    """Read word2vec's binary format, of 32 or 16 bits a value, or a file of lines.

    Each line is a token and its values with single spaces between. A first line of two whole
    numbers is a header. Tokens may have spaces, as those of GloVe's largest file have. What is to
    be said is counted in `noted`.

    Raises:
        InputError: The file, in messages `place`, is malformed, or of another dimension than that,
            where there is one.
    """
    rows = (_rows_of_binary if is_binary else _rows_of_text)(place, stream, dimension, noted)
    while block := list(islice(rows, _ROWS)):
        places, tokens, values = zip(*block, strict=True)
        with np.errstate(over="ignore"):
            table = np.array(values, np.float64).astype(np.float32)
        finite = np.isfinite(table).all(axis=1)
        if not finite.all():
            row = int(np.argmin(finite))
            wrong = values[row][int(np.argmin(np.isfinite(table[row])))]
            raise _no_number(places[row], str(wrong).replace("e+", "e"))
        yield list(tokens), table


def _rows_of_text(
    place: str, stream: BufferedReader, dimension: int | None, noted: Counter[str]
) -> Iterator[_Row]:
    first = list(islice(stream, _FIRST))
    if not first:
        _check_rows(place, 0, 0, 0)
    first[0] = first[0].removeprefix(_BYTE_ORDER_MARK)
    promised = None
    lines = first
    if header := _parse_header(first[0]):
        (promised, size), lines = header, first[1:]
    else:
        sizes = [line.rstrip().count(b" ") for line in first]
        # A token with spaces seems to have more values.
        size = min(sizes) if dimension is not None and sizes[0] > dimension else sizes[0]
    _check_size(place, size, dimension)
    found = 0
    for number, line in enumerate(chain(lines, stream), 1 + len(first) - len(lines)):
        where = f"{place}, line {number}"
        yield where, *_parse_line(where, line, size, noted)
        found += 1
    _check_rows(place, found if promised is None else promised, found, size)


def _rows_of_binary(
    place: str, stream: BufferedReader, dimension: int | None, noted: Counter[str]
) -> Iterator[_Row]:
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
    while True:
        end = buffer.find(b" ", position)
        if end < 0 or len(buffer) - end - 1 < width:
            # A damaged header may ask for more than fits into memory, but the file ends before.
            if more := stream.read(1 << 20):
                buffer, position = buffer[position:] + more, 0
                continue
            break
        token = buffer[position:end].lstrip(b"\n")
        values = np.frombuffer(buffer, kind, size, end + 1)
        position = end + 1 + width
        found += 1
        try:
            name = token.decode()
        except UnicodeDecodeError:
            noted[CUT] += 1
        else:
            yield f"the vector of {reprlib.repr(name)} of {place}", name, values
    _check_rows(place, promised, found, size)
    if 2 * noted[CUT] > found:
        raise InputError(
            f"tokens are UTF-8. Received: other bytes in {noted[CUT]:,} of {found:,} rows of "
            f"{place}. Convert the file to UTF-8."
        )
    if rest := buffer[position:].strip(b"\n"):
        raise InputError(
            f"a binary file ends after its last row. Received: {reprlib.repr(rest)} after row "
            f"{found} in {place}. Get the file again, or correct the number in its first line."
        )


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
        values = list(map(float, parts[1:]))
    except ValueError:
        values = []
    # Python takes 1_000 for a number.
    if not values or (b"_" in line and any(b"_" in value for value in parts[1:])):
        wrong = next(value for value in parts[1:] if not _is_number(value))
        raise _no_number(place, wrong.decode(errors="replace"))
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
        with np.errstate(over="ignore"):
            return b"_" not in text and bool(np.isfinite(np.float32(float(text))))
    except (ValueError, OverflowError):
        return False


def _no_number(place: str, wrong: str) -> InputError:
    return InputError(
        "values are finite numbers in float32, with single spaces between. Received: "
        f"{reprlib.repr(wrong)} in {place}. Correct the value, or leave its token out."
    )


def _check_size(place: str, size: int, dimension: int | None) -> None:
    if size == 0:
        raise InputError(
            f"each vector has at least one value. Received: 0 in line 1 of {place}. Are the values "
            "separated by spaces?"
        )
    if dimension is not None and size != dimension:
        raise wrong_dimension(place, size, dimension)


def wrong_dimension(place: object, size: int, wanted: int) -> InputError:
    """The error of vectors of another size than was asked for."""
    return InputError(
        f"the vectors have {wanted} values each. Received: {size} in {place}. Set dimension "
        f"to {size}, or take another file."
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
            f"a file of vectors holds at least one. Received: {place}, which has none. Was the "
            "download cut off? Get the file again."
        )
