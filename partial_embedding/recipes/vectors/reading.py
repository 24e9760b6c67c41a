"""Word vectors from files of every usual form, text converted once and then opened in no time."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partial_embedding.errors import InputError
from partial_embedding.files import open_vectors, write_atomically, write_text
from partial_embedding.recipes.vectors.formats import (
    TWICE,
    Block,
    WordVectors,
    read_blocks,
    wrong_dimension,
)
from partial_embedding.recipes.vectors.opening import opened
from partial_embedding.rows.vocabulary_file import read_vocabulary

# Smaller files are read in less than a second.
_KEPT_FROM = 1 << 22  # bytes
_FASTTEXT = b"\xba\x16\x4f\x2f"
_NUMPY = b"\x93NUMPY"
_TOKENS = ".tokens"  # the suffix of the file with those of an array that is kept
# Where the tokens of `table.npy` are, with `table` for *.
_TOKEN_FILES = ("*.tsv", "*.txt", "*.vocab", "vocabulary.tsv", "vocab.txt")


def read_vectors(
    path: str | os.PathLike[str],
    dimension: int | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> WordVectors:
    r"""Read word vectors from a file of GloVe, word2vec, fastText, gensim or numpy.

    The file may be packed: gzip, bzip2, xz, Zstandard, or zip with one file. A name that ends in
    `.bin` is word2vec's binary format or fastText's model, `.kv` and `.model` are gensim's, which
    run code when they are read, so take only those that you trust; `.npy` is an array, whose tokens
    stand in a file of the same name that ends in `.tsv`, `.txt` or `.vocab`, or in
    `vocabulary.tsv` or `vocab.txt`. Every other file is text, whose first line is a header when it
    is two whole numbers (word2vec, fastText) and a vector otherwise (GloVe). Of a token that occurs
    twice the first vector counts.

    Args:
        path: The file.
        dimension: The number of values that each vector must have; None takes what is there.
        cache: A folder in which a large file is kept as an array, which the next call opens without
            reading it; None keeps nothing.

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
    with opened(path) as (stream, name):
        magic = stream.peek(6)
        kept = None
        if cache is not None and path.stat().st_size >= _KEPT_FROM:
            kept = Path(cache) / f"{_fingerprint(path)}.npy"
        if magic.startswith(_NUMPY):
            found = _read_array(path)
        elif magic.startswith(_FASTTEXT):
            found = _read_fasttext(path)
        elif name.endswith((".kv", ".model")):
            found = _read_gensim(path)
        elif kept is not None and kept.is_file():
            found = _read_kept(kept)
        else:
            noted: Counter[str] = Counter()
            is_binary = name.endswith(".bin")
            blocks = read_blocks(str(path), stream, is_binary, dimension, noted)
            blocks = _first_of_each(blocks, noted)
            if kept is None:
                tokens, values = zip(*blocks, strict=True)
                found = WordVectors([*chain(*tokens)], np.concatenate(values), _notes(noted))
            else:
                _keep(kept, blocks, noted)
                found = _read_kept(kept)
    if dimension is not None and found.dimension != dimension:
        raise wrong_dimension(path, found.dimension, dimension)
    return found


def _first_of_each(blocks: Iterator[Block], noted: Counter[str]) -> Iterator[Block]:
    seen: set[str] = set()
    for tokens, values in blocks:
        first = []
        for row, token in enumerate(tokens):
            if token not in seen:
                seen.add(token)
                first.append(row)
        if len(first) < len(tokens):
            noted[TWICE] += len(tokens) - len(first)
            tokens, values = [tokens[row] for row in first], values[first]
        yield tokens, values


def _notes(noted: Counter[str]) -> tuple[str, ...]:
    return tuple(f"{count:,} {what}" for what, count in noted.items())


# What is kept


def _fingerprint(path: Path) -> str:
    """Of the file's place, size and time, since its content would take as long as reading it."""
    stat = path.stat()
    place = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    return hashlib.sha256(json.dumps(place).encode(errors="surrogateescape")).hexdigest()[:32]


def _keep(path: Path, blocks: Iterator[Block], noted: Counter[str]) -> None:
    """Write the vectors as an array, and the tokens beside it, as they are read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens: list[str] = []
    header: dict[str, Any] = {"descr": "<f4", "fortran_order": False}
    with write_atomically(path) as temporary:
        with temporary.open("wb") as file:
            for block, values in blocks:
                if not tokens:
                    header["shape"] = (0, values.shape[1])
                    np.lib.format.write_array_header_1_0(file, header)
                tokens += block
                file.write(values.astype("<f4").tobytes())
            # numpy leaves room in a header for the first number to grow.
            file.seek(0)
            header["shape"] = (len(tokens), values.shape[1])
            np.lib.format.write_array_header_1_0(file, header)
        write_text(path.with_suffix(_TOKENS), "\n".join([json.dumps(_notes(noted)), *tokens]))


def _read_kept(path: Path) -> WordVectors:
    notes, *tokens = path.with_suffix(_TOKENS).read_text(encoding="utf-8").split("\n")
    values = open_vectors(path).astype(np.float32, copy=False)
    return WordVectors(tokens, values, tuple(json.loads(notes)))


# Formats of other libraries


def _read_array(path: Path) -> WordVectors:
    beside = [path.with_name(name.replace("*", path.stem)) for name in _TOKEN_FILES]
    found = next((file for file in beside if file.is_file()), None)
    if found is None:
        raise InputError(
            f"the tokens of an array stand in a file beside it. Received: {path} without. Write "
            f"them, one a line, to {beside[1].name}."
        )
    values, tokens = open_vectors(path), read_vocabulary(found).tokens
    if len(values) != len(tokens):
        raise InputError(
            f"{path}: an array has a row of floating-point values for each of the {len(tokens):,} "
            f"tokens of {found.name}. Received: {values.dtype} of the shape {values.shape}. "
            f"Write one token for each of the {len(values):,} rows, one a line."
        )
    return _finite(path, tokens, values)


def _finite(path: Path, tokens: Sequence[str], values: NDArray[np.floating]) -> WordVectors:
    with np.errstate(over="ignore"):
        values = values.astype(np.float32, copy=False)
    for row in range(0, len(values), 1 << 16):  # by blocks, since all may be more than memory
        finite = np.isfinite(values[row : row + (1 << 16)]).all(axis=1)
        if not finite.all():
            token = tokens[row + int(np.argmin(finite))]
            raise InputError(
                f"values are finite. Received: nan or inf in the vector of {reprlib.repr(token)} "
                f"in {path}. Make the file again without it."
            )
    return WordVectors(tokens, values)


def _read_fasttext(path: Path) -> WordVectors:
    from gensim.models.fasttext import load_facebook_vectors

    try:
        vectors = load_facebook_vectors(str(path))
    except Exception as error:  # of a damaged model, whatever its numbers lead gensim to
        raise InputError(
            f"{path}: a model of fastText can be read in whole. Received: "
            f"{type(error).__name__}: {error}. Get it again, or take the .vec file of the model."
        ) from error
    return _finite(path, vectors.index_to_key, vectors.vectors)


def _read_gensim(path: Path) -> WordVectors:
    import gensim

    try:
        found = gensim.utils.SaveLoad.load(str(path), mmap="r")
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: gensim keeps large arrays in files beside. Received: {error.filename}, "
            "which is missing. Copy it too."
        ) from None
    except (pickle.UnpicklingError, AttributeError, EOFError, ImportError, ValueError) as error:
        raise InputError(
            f"{path}: a .kv or .model is a file that gensim saved. Received: {error}. Save it as "
            "text: vectors.save_word2vec_format('vectors.txt')."
        ) from None
    vectors = getattr(found, "wv", found)
    if not hasattr(vectors, "index_to_key"):
        raise InputError(
            f"{path}: a .kv or .model holds word vectors. Received: {type(found).__name__}. "
            "Save those of the model, model.wv."
        )
    return _finite(path, vectors.index_to_key, vectors.vectors)
