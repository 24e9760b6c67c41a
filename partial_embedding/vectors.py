"""Word-vector files: a table, its vocabulary and the rows that were missing.

gensim reads, writes and trains. What it accepts but mangles is refused here: a line with a single
value fills its whole row, rows beyond the header's number are dropped, and infinite values pass.
"""

import hashlib
import json
import os
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from itertools import chain
from pathlib import Path

import gensim
import numpy as np
from gensim.models import KeyedVectors, Word2Vec
from numpy.typing import ArrayLike, NDArray

from partial_embedding.errors import InputError
from partial_embedding.files import write_atomically
from partial_embedding.text import PADDING, count_tokens
from partial_embedding.vocabulary import Vocabulary

_HEADER = re.compile(rb"\s*(\d{1,18})\s+(\d{1,18})\s*")
_WRITTEN_SUFFIXES = (".txt", ".vec", ".bin", ".txt.gz", ".vec.gz", ".bin.gz")
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
            check = _check_binary if _is_binary(path) else _check_text
            has_header = check(path, stream, dimension)
        try:
            # A value beyond float32 becomes infinite, which is refused below with its line.
            with np.errstate(over="ignore"):
                vectors = KeyedVectors.load_word2vec_format(
                    str(path), binary=_is_binary(path), no_header=not has_header
                )
        except ValueError:
            _refuse_first_bad_number(path, has_header)
            raise
    _drop_unfilled_rows(vectors)
    finite = np.isfinite(vectors.vectors).all(axis=1)
    if not finite.all():
        if not _is_binary(path):
            _refuse_first_bad_number(path, has_header)
        token = vectors.index_to_key[int(np.argmin(finite))]
        raise InputError(
            f"values are finite. Received: nan or inf in the vector of {reprlib.repr(token)} in "
            f"{path}. Make the file again without it."
        )
    return vectors


def train_vectors(
    documents: Iterable[Sequence[str]],
    dimension: int = 50,
    min_count: int = 3,
    epochs: int = 20,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
) -> KeyedVectors:
    """Train word vectors on documents with gensim's Word2Vec.

    Tokens that are rarer than `min_count` get no vector: they are the missing rows of a table
    built from these vectors. The same arguments give the same bits on the same machine.

    Args:
        documents: The tokens of each document; pass the training side of a split.
        dimension: The number of values of each vector.
        min_count: Leave out tokens that occur fewer times than this.
        epochs: The number of passes over the documents.
        seed: Starts the random numbers.
        cache: A folder that keeps the result for the next call with the same arguments; None
            keeps nothing. A file that is damaged there is made again.

    Returns:
        The vectors, float32, the most frequent tokens first.

    Raises:
        InputError: A number is below 1, a document is a string, no token occurs `min_count`
            times, or a token cannot be written to a file.

    Example:
        >>> vectors = train_vectors([["a", "b"], ["a", "c"], ["a", "b"]], dimension=4, min_count=2)
        >>> vectors.index_to_key, vectors.vectors.shape
        (['a', 'b'], (2, 4))
    """
    for name, value in (("dimension", dimension), ("epochs", epochs)):
        if value < 1:
            raise InputError(f"{name} is at least 1. Received: {value}. 50 and 20 are usual.")
    given = list(documents)
    _check_tokens(count_tokens(given, min_count, specials=()).tokens)
    kept = [list(document) for document in given]
    settings = {
        "vector_size": dimension,
        "min_count": min_count,
        "epochs": epochs,
        "seed": seed,
        "workers": 1,  # Threads would add up their updates in any order.
    }
    if cache is None:
        return _train(kept, settings)
    file = Path(cache) / f"{_fingerprint(kept, settings)}.bin.gz"
    try:
        return read_vectors(file, dimension)
    except InputError:
        vectors = _train(kept, settings)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_vectors(file, vectors.index_to_key, vectors.vectors)
        return read_vectors(file, dimension)


def build_table(
    vocabulary: Vocabulary, vectors: KeyedVectors, seed: int = 0, padding: str = PADDING
) -> tuple[NDArray[np.float32], Vocabulary]:
    """Give each row of a vocabulary its vector, and draw those that have none.

    A token that has no vector is tried again in lower case. The rows still missing are drawn
    from a normal distribution with the mean 0 and, in each dimension, the standard deviation of
    the rows that were found (of all their values together when there is one such row).

    Args:
        vocabulary: The tokens of the rows.
        vectors: The pre-trained vectors, of D values each.
        seed: Starts the random numbers.
        padding: The token whose row is zero, where the vocabulary has it.

    Returns:
        The table, shape (V, D), float32, and the vocabulary with `missing` set to the ids of the
        rows without a vector, the padding row excluded.

    Raises:
        InputError: Not one token has a vector.

    Example:
        >>> vectors = KeyedVectors(2)
        >>> vectors.add_vectors(["the"], np.array([[1, 2]], np.float32))
        >>> table, vocabulary = build_table(Vocabulary(["<pad>", "zyzzyva", "The"]), vectors)
        >>> table[[0, 2]].tolist(), vocabulary.missing.tolist()
        ([[0.0, 0.0], [1.0, 2.0]], [1])
    """
    index = vectors.key_to_index
    sources = np.array(
        [
            -1 if token == padding else index.get(token, index.get(token.lower(), -1))
            for token in vocabulary.tokens
        ],
        np.int64,
    )
    known = np.flatnonzero(sources >= 0)
    if not known.size:
        raise InputError(
            f"at least one token has a vector. Received: {len(vocabulary)} tokens, such as "
            f"{reprlib.repr(list(vocabulary.tokens[-3:]))}, and vectors for others, such as "
            f"{reprlib.repr(vectors.index_to_key[:3])}. Are they of another language or case?"
        )
    missing = np.array(
        [row for row in np.flatnonzero(sources < 0) if vocabulary.tokens[row] != padding], np.int64
    )
    table = np.zeros((len(vocabulary), vectors.vector_size), np.float32)
    table[known] = vectors.vectors[sources[known]]
    found = table[known].astype(np.float64)
    spread = found.std(axis=0) if known.size > 1 else found.std()
    table[missing] = np.random.default_rng(seed).normal(
        0.0, spread, size=(missing.size, table.shape[1])
    )
    return table, Vocabulary(vocabulary.tokens, vocabulary.counts, missing)


def save_vectors(path: str | os.PathLike[str], tokens: Sequence[str], table: ArrayLike) -> None:
    """Write vectors in word2vec's format, so that `read_vectors` gives the same bits back.

    The file appears in full or not at all.

    Args:
        path: A name that ends in `.txt` or `.vec` for text, in `.bin` for binary; with `.gz` after
            it, the file is gzipped.
        tokens: The token of each row, V different ones without whitespace.
        table: The vectors, shape (V, D), stored as float32.

    Raises:
        InputError: The suffix is another one, tokens and table do not fit, a token is empty, twice
            there or holds whitespace, or a value is not finite.
        OSError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "table.vec.gz"
        ...     save_vectors(file, ["the", "of"], np.array([[0.1], [0.2]]))
        ...     read_vectors(file).index_to_key
        ['the', 'of']
    """
    path = Path(path)
    if not path.name.endswith(_WRITTEN_SUFFIXES):
        raise InputError(
            f"the name of a vector file ends in {', '.join(_WRITTEN_SUFFIXES)}. Received: {path}. "
            "Choose one of these."
        )
    tokens = list(tokens)
    _check_tokens(tokens)
    with np.errstate(over="ignore"):
        values = np.asarray(table).astype(np.float32)
    if values.ndim != 2 or values.shape[0] != len(tokens) or not values.size:
        raise InputError(
            f"a table has one row of values per token. Received: shape {values.shape} for "
            f"{len(tokens)} tokens. Pass both in the same order."
        )
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values).all(axis=1)))
        raise InputError(
            f"values are finite in float32. Received: {reprlib.repr(values[row].tolist())} for "
            f"{reprlib.repr(tokens[row])}. Look for the step where training diverged."
        )
    vectors = KeyedVectors(values.shape[1])
    vectors.add_vectors(tokens, values)
    # gensim writes by falling count.
    for row, token in enumerate(tokens):
        vectors.set_vecattr(token, "count", len(tokens) - row)
    with write_atomically(path) as temporary:
        vectors.save_word2vec_format(str(temporary), binary=_is_binary(path))


def _is_binary(path: Path) -> bool:
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


def _check_tokens(tokens: Sequence[str]) -> None:
    twice = [token for token, count in Counter(tokens).items() if count > 1]
    # The formats end a token at a space and a row at a line feed; other whitespace at a token's
    # edge is lost to most readers.
    bad = twice or [t for t in tokens if not t or re.search(r"[ \t\n\r\v\f\ud800-\udfff]", t)]
    if bad:
        raise InputError(
            "a token in a file of vectors is not empty, occurs once, and holds neither whitespace "
            f"nor half a surrogate pair. Received: {reprlib.repr(bad[0])}"
            f"{' twice' if twice else ''}. Rename or drop it."
        )


def _train(documents: Sequence[Sequence[str]], settings: dict[str, int]) -> KeyedVectors:
    return Word2Vec(documents, **settings).wv


def _fingerprint(documents: Sequence[Sequence[str]], settings: dict[str, int]) -> str:
    digest = hashlib.sha256(json.dumps([gensim.__version__, settings]).encode())
    for document in documents:
        digest.update(json.dumps(document).encode())
    return digest.hexdigest()
