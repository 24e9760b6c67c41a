"""Word vectors from files of every usual form.

gensim reads. What it accepts but mangles is refused here: a line with a single value fills its
whole row, rows beyond the header's number are dropped, and infinite values pass.
"""

import os
import re
import reprlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from itertools import chain
from pathlib import Path

import gensim
import numpy as np
from gensim.models import KeyedVectors

from partial_embedding.errors import InputError

_HEADER = re.compile(rb"\s*(\d{1,18})\s+(\d{1,18})\s*")
_BUFFER = 1 << 20  # bytes

# Number of rows and of values per row.
_Header = tuple[int, int]


def read_vectors(path: str | os.PathLike[str], dimension: int | None = None) -> KeyedVectors:
    r"""Read word vectors from a file of GloVe, word2vec or fastText, also gzipped.

    A name that ends in `.bin` or `.bin.gz` is word2vec's binary format. Every other file is text,
    whose first line is a header when it is two whole numbers (word2vec, fastText) and a vector
    otherwise (GloVe). Of a token that occurs twice the first vector counts, as in gensim, which
    logs a warning.

    Args:
        path: The file.
        dimension: The number of values that each vector must have; None takes what is there.

    Returns:
        The vectors, float32, in the order of the file.

    Raises:
        InputError: The file is missing, damaged or malformed, or of another dimension.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "glove.txt"
        ...     _ = file.write_text("the 0.5 1\nof -2 0.25\n")
        ...     read_vectors(file, dimension=2)["of"].tolist()
        [-2.0, 0.25]
    """
    path = Path(path)
    with _damage_named(path):
        with _open(path) as stream:
            check = _check_binary if is_binary(path) else _check_text
            has_header = check(path, stream, dimension)
        try:
            # A value beyond float32 becomes infinite, which is refused below with its line.
            with np.errstate(over="ignore"):
                vectors = KeyedVectors.load_word2vec_format(
                    str(path), binary=is_binary(path), no_header=not has_header
                )
        except ValueError:
            _refuse_first_bad_number(path, has_header)
            raise
    _drop_unfilled_rows(vectors)
    finite = np.isfinite(vectors.vectors).all(axis=1)
    if not finite.all():
        if not is_binary(path):
            _refuse_first_bad_number(path, has_header)
        token = vectors.index_to_key[int(np.argmin(finite))]
        raise InputError(
            f"values are finite. Received: nan or inf in the vector of {reprlib.repr(token)} in "
            f"{path}. Make the file again without it."
        )
    return vectors


def is_binary(path: Path) -> bool:
    """Whether a file of this name is in the binary format."""
    return path.name.endswith((".bin", ".bin.gz"))


def _open(path: Path) -> BufferedReader:
    # Small reads of a gzip file are slow without another buffer.
    return BufferedReader(gensim.utils.open(str(path), "rb"), _BUFFER)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(
            f"the word vectors are in a file. Received: {path}, which is missing. Check the path."
        ) from error
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(
            f"the word vectors can be read. Received: {error} for {path}. Check its permissions, "
            "or get it again if it is cut off."
        ) from error


def _check_text(path: Path, stream: BufferedReader, dimension: int | None) -> bool:
    """Check the shape of a text file and say whether it has a header."""
    first = stream.readline()
    if not first:
        _check_rows(path, 0, 0, 0)
    header = _parse_header(first)
    rows, size = header or (0, first.rstrip().count(b" "))
    _check_size(path, size, dimension)
    found = 0
    for number, line in enumerate(stream if header else chain([first], stream), 1 + bool(header)):
        _check_line(f"{path}, line {number}", line, size)
        found += 1
    _check_rows(path, rows if header else found, found, size)
    return header is not None


def _check_binary(path: Path, stream: BufferedReader, dimension: int | None) -> bool:
    """Check that a binary file holds the rows of its header, no more and no less."""
    header = _parse_header(stream.readline(100))
    if header is None:
        raise InputError(
            f"a binary file begins with its numbers of rows and values. Received: {path}, which "
            "does not. Name a text file .txt or .vec."
        )
    rows, size = header
    _check_size(path, size, dimension)
    found = 0
    while (token := _read_token(stream)).endswith(b" "):
        if not _skip(stream, 4 * size):
            break
        found += 1
        _check_utf8(f"{path}, row {found}", token)
    _check_rows(path, rows, found, size)
    if token.strip(b"\n"):
        raise InputError(
            f"a binary file ends after its last row. Received: {reprlib.repr(token)} after row "
            f"{found} in {path}. Get it again."
        )
    return True


def _read_token(stream: BufferedReader) -> bytes:
    """Read a token and the space after it, or what is left at the end of the file."""
    token = bytearray()
    while byte := stream.read(1):
        token += byte
        if byte == b" ":
            break
    return bytes(token)


def _skip(stream: BufferedReader, size: int) -> bool:
    """Pass over some bytes and say whether they were there."""
    # A damaged header may ask for more than fits into memory.
    while size and (read := stream.read(min(size, _BUFFER))):
        size -= len(read)
    return not size


def _parse_header(line: bytes) -> _Header | None:
    match = _HEADER.fullmatch(line)
    return (int(match[1]), int(match[2])) if match else None


def _check_size(path: Path, size: int, dimension: int | None) -> None:
    if size == 0:
        raise InputError(
            f"each vector has at least one value. Received: 0 in line 1 of {path}. Are the values "
            "separated by spaces?"
        )
    if dimension is not None and size != dimension:
        raise InputError(
            f"the vectors have {dimension} values each. Received: {size} in {path}. Ask for "
            f"{size}, or take another file."
        )


def _check_line(place: str, line: bytes, size: int) -> None:
    _check_utf8(place, line)
    found = line.rstrip().count(b" ")
    if found != size:
        raise InputError(
            f"each line is a token and {size} values with single spaces between. "
            f"Received: {found} values in {place}. Correct or remove the line."
        )


def _check_utf8(place: str, data: bytes) -> None:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"tokens are UTF-8. Received: the byte 0x{data[error.start]:02x} in {place}. Convert "
            "the file to UTF-8, or name a binary file .bin."
        ) from error


def _check_rows(path: Path, promised: int, found: int, size: int) -> None:
    if promised != found:
        raise InputError(
            f"the header says how many rows follow. Received: a header that promises {promised} "
            f"rows in {path}, which holds {found}. Get the file again, or correct its first line "
            f"to `{found} {size}`."
        )
    if not found:
        raise InputError(
            f"a file of vectors holds at least one. Received: {path}, which has none. Get it again."
        )


def _refuse_first_bad_number(path: Path, has_header: bool) -> None:
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if has_header and number == 1:
                continue
            for value in line.decode().rstrip().split(" ")[1:]:
                if not _is_finite_number(value):
                    raise InputError(
                        "values are finite numbers in float32, with single spaces between. "
                        f"Received: {reprlib.repr(value)} in {path}, line {number}. Correct or "
                        "remove the line."
                    )


def _is_finite_number(value: str) -> bool:
    try:
        with np.errstate(over="ignore"):
            return bool(np.isfinite(np.float32(value)))
    except ValueError:
        return False


def _drop_unfilled_rows(vectors: KeyedVectors) -> None:
    """Cut off the empty rows that gensim leaves at the end for tokens that occur twice."""
    filled = len(vectors.key_to_index)
    if filled < len(vectors.index_to_key):
        vectors.index_to_key = vectors.index_to_key[:filled]
        vectors.vectors = vectors.vectors[:filled].copy()
        vectors.expandos = {name: values[:filled] for name, values in vectors.expandos.items()}
