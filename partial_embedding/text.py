"""Labelled texts for both frameworks' recipes: read, split, tokenize, count, encode."""

import csv
import hashlib
import importlib
import inspect
import io
import json
import os
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from partial_embedding.errors import InputError
from partial_embedding.vocabulary import Vocabulary

PADDING = "<pad>"
UNKNOWN = "<unk>"

# Marks that belong to the letter before them, which `\w` leaves out: Latin, Hebrew, Arabic, the
# scripts of India, Thai. Without them a Hindi word would fall apart at each of its vowels.
_MARKS = "\u0300-\u036f\u0591-\u05bd\u064b-\u065f\u0900-\u0963\u0966-\u0dff\u0e31-\u0e4e"
_WORD = rf"\w[\w{_MARKS}]*"
_TOKEN = re.compile(
    rf"""
    <\w+>                           # marks such as <unk> or <user>
    | n't\b                         # the negation that stands alone in tokenized text,
    | {_WORD}?(?=n't\b)             # and the word before it: do|n't
    | '(?:s|re|ve|ll|d|m)\b         # it|'s, we|'ll
    | \d+(?:[.,]\d+)+               # 3.5, 1,000
    | {_WORD}(?:-{_WORD})*          # words, coming-of-age
    | \.\.+ | --+                   # an ellipsis, a dash
    | \S                            # any other character by itself
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z(\"'])")
_PLAIN_WORD = re.compile(r"[A-Za-z]{2,}")
_FASTTEXT_LABEL = "__label__"

_DOCUMENTED_MODULES = (
    "codecs",
    "collections",
    "configparser",
    "decimal",
    "difflib",
    "doctest",
    "email.message",
    "enum",
    "http.cookiejar",
    "imaplib",
    "inspect",
    "io",
    "ipaddress",
    "logging",
    "mailbox",
    "re",
    "shutil",
    "smtplib",
    "socket",
    "statistics",
    "tarfile",
    "threading",
    "unittest.mock",
    "xml.etree.ElementTree",
)
_MOST_PER_MODULE = 150

# The place for messages, the text, the name of its class.
_Example = tuple[str, str, str]


@dataclass(frozen=True, eq=False)
class LabelledTexts:
    """Texts, the class of each, and the names of the classes.

    Args:
        texts: One text per example.
        labels: The class of each text as an index into `names`, shape (N,), int64.
        names: The names of the classes, sorted.

    Raises:
        InputError: There is not one label per text, or a label is no index into `names`.

    Example:
        >>> films = LabelledTexts(("a joy", "a bore"), np.array([1, 0]), ("neg", "pos"))
        >>> len(films), films.names[films.labels[0]]
        (2, 'pos')
    """

    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.labels.shape != (len(self.texts),):
            raise InputError(
                f"each text has one label. Received: labels of shape {self.labels.shape} for "
                f"{len(self.texts)} texts. Pass one label per text."
            )
        wrong = self.labels[(self.labels < 0) | (self.labels >= len(self.names))]
        if wrong.size:
            raise InputError(
                f"labels must lie in [0, {len(self.names)}). Received: {wrong[0]}. Name every "
                "class."
            )

    def __len__(self) -> int:
        return len(self.texts)


def read_labelled(
    path: str | os.PathLike[str], text_column: str = "text", label_column: str = "label"
) -> LabelledTexts:
    r"""Read labelled texts from a file, or from a folder with one folder per class.

    The suffix says which format, and everything is UTF-8:

    - `.csv` and `.tsv`: a line of column names, then one example per row.
    - `.jsonl`: one JSON object per line; a label is a string, an integer or a boolean.
    - `.txt` and `.ft`: fastText's lines, `__label__name the text`.
    - A folder: each folder in it is a class, and each file below that one text.

    Empty lines and hidden files are passed over.

    Args:
        path: The file or the folder.
        text_column: The column or key that holds the text (CSV, TSV and JSONL).
        label_column: The column or key that holds the name of the class (the same formats).

    Returns:
        The examples in the order of the file, or of the sorted file names of a folder.

    Raises:
        InputError: The file is missing, unreadable, empty or malformed, or has only one class.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "films.csv"
        ...     _ = file.write_text("text,label\na joy,pos\na bore,neg\n")
        ...     read_labelled(file).names
        ('neg', 'pos')
    """
    path = Path(path)
    if not os.path.exists(path):
        raise InputError(f"the texts are in a file or folder. Received: {path}, which is missing.")
    pairs = [_checked(example) for example in _examples(path, text_column, label_column)]
    names = sorted({name for _, name in pairs})
    if not pairs:
        raise InputError(f"there is at least one example. Received: {path}, which has none.")
    if len(names) == 1:
        raise InputError(
            f"texts are told apart by at least two classes. Received: {path}, where all "
            f"{len(pairs)} are {reprlib.repr(names[0])}. Is {label_column!r} the label?"
        )
    return _labelled(pairs)


def stdlib_docstrings() -> LabelledTexts:
    """Give sentences from the standard library's documentation, labelled by module.

    A small data set that every Python has: which of some twenty modules does this sentence
    document? The text changes a little with the version of Python. Sentences that occur in two
    modules are left out, and no module has more than 150.

    Returns:
        A few thousand examples, always in the same order.

    Raises:
        InputError: Python runs without docstrings (`-OO`).

    Example:
        >>> sentences = stdlib_docstrings()
        >>> len(sentences) > 2000, "threading" in sentences.names
        (True, True)
    """
    if sys.flags.optimize >= 2:
        raise InputError(
            "the texts are docstrings. Received: Python's option -OO, which strips them. Run "
            "without it, or name a file."
        )
    pieces = {name: _pieces_of(name) for name in _DOCUMENTED_MODULES}
    modules_with = Counter(piece for found in pieces.values() for piece in found)
    pairs = []
    for name, found in pieces.items():
        own = [piece for piece in found if modules_with[piece] == 1]
        # Ordered by a number of their own: that of `split` would favour one of its sides.
        own.sort(key=lambda piece: _share_of(0, f"a docstring: {piece}"))
        pairs += [(piece, name) for piece in own[:_MOST_PER_MODULE]]
    return _labelled(pairs)


def split(
    examples: LabelledTexts, validation_share: float = 0.15, seed: int = 0
) -> tuple[LabelledTexts, LabelledTexts]:
    """Divide examples into a training and a validation side by a hash of each text.

    Equal texts fall on the same side, and a text stays on its side when others are added, removed
    or moved.

    Args:
        examples: The examples to divide.
        validation_share: The expected share of the validation side, in (0, 1).
        seed: Another seed divides differently.

    Returns:
        The training side and the validation side, with the same `names`.

    Raises:
        InputError: The share does not lie in (0, 1), or leaves one side empty.

    Example:
        >>> training, validation = split(stdlib_docstrings(), validation_share=0.2)
        >>> set(training.texts).isdisjoint(validation.texts)
        True
    """
    if not 0 < validation_share < 1:
        raise InputError(
            f"validation_share must lie in (0, 1). Received: {validation_share}. 0.15 is usual."
        )
    held_out = np.array([_share_of(seed, text) < validation_share for text in examples.texts], bool)
    training, validation = _select(examples, ~held_out), _select(examples, held_out)
    if not len(training) or not len(validation):
        raise InputError(
            f"both sides of a split have examples. Received: {len(training)} for training and "
            f"{len(validation)} for validation of {len(set(examples.texts))} different texts at "
            f"validation_share={validation_share}. Change the share or the seed, or add texts."
        )
    return training, validation


def tokenize(text: str, lowercase: bool = True) -> list[str]:
    """Cut a text into words, numbers and punctuation.

    Words keep inner hyphens (`coming-of-age`); `n't` and `'s`, `'re`, `'ve`, `'ll`, `'d`, `'m` are
    tokens of their own, as in the vocabularies of GloVe; so are marks such as `<user>`. Runs of
    dots and of dashes stay together, every other character stands alone. Text that was cut this
    way before passes unchanged. The typographic apostrophe becomes the plain one.

    Args:
        text: The text.
        lowercase: Whether to lower-case it first, as most word vectors need.

    Returns:
        The tokens in order, none of which contains whitespace.

    Example:
        >>> tokenize("It isn't a feel-good film ... it's 3.5 stars!")
        ['it', 'is', "n't", 'a', 'feel-good', 'film', '...', 'it', "'s", '3.5', 'stars', '!']
    """
    if lowercase:
        text = text.lower()
    return _TOKEN.findall(text.replace("\u2019", "'"))


def count_tokens(
    documents: Iterable[Sequence[str]],
    min_count: int = 1,
    max_size: int | None = None,
    specials: Sequence[str] = (PADDING, UNKNOWN),
) -> Vocabulary:
    """Make a vocabulary of the tokens that occur in documents, the most frequent ones first.

    Args:
        documents: The tokens of each document.
        min_count: Leave out tokens that occur fewer times than this, at least 1.
        max_size: Keep no more rows than this, `specials` included; None keeps all.
        specials: Tokens of the first rows, with count 0.

    Returns:
        `specials`, then the tokens by falling frequency, equally frequent ones alphabetically,
        with their counts.

    Raises:
        InputError: A document is a string, a number is out of range, or no token is left.

    Example:
        >>> vocabulary = count_tokens([["b", "a"], ["c", "a"]])
        >>> vocabulary.tokens, vocabulary.counts.tolist()
        (('<pad>', '<unk>', 'a', 'b', 'c'), [0, 0, 2, 1, 1])
    """
    if min_count < 1:
        raise InputError(f"min_count is at least 1. Received: {min_count}. 1 keeps every token.")
    if max_size is not None and max_size <= len(specials):
        raise InputError(
            f"max_size leaves room beyond the {len(specials)} special tokens. Received: "
            f"{max_size}. Raise it, or pass None."
        )
    counter: Counter[str] = Counter()
    for document in documents:
        if isinstance(document, str):
            raise InputError(
                "a document is a list of tokens. Received the string "
                f"{reprlib.repr(document)}. Tokenize it first."
            )
        counter.update(document)
    for special in specials:
        counter.pop(special, None)
    ranked = sorted(
        ((token, count) for token, count in counter.items() if count >= min_count),
        key=lambda pair: (-pair[1], pair[0]),
    )
    if max_size is not None:
        ranked = ranked[: max_size - len(specials)]
    if not ranked:
        raise InputError(
            f"at least one token occurs min_count={min_count} times. Received: "
            f"{len(counter)} different tokens, the most frequent "
            f"{max(counter.values(), default=0)} times. Lower min_count, or add documents."
        )
    return Vocabulary(
        [*specials, *(token for token, _ in ranked)],
        counts=[0] * len(specials) + [count for _, count in ranked],
    )


def encode(tokens: Sequence[str], vocabulary: Vocabulary, max_length: int) -> list[int]:
    """Give the row of each token; tokens without one get the row of `<unk>`.

    Args:
        tokens: The tokens of one document.
        vocabulary: The tokens of the table's rows.
        max_length: Cut the document after this many tokens, at least 1.

    Returns:
        At most `max_length` ids of rows.

    Raises:
        InputError: `max_length` is below 1, or a token is unknown and there is no `<unk>`.

    Example:
        >>> encode(["a", "zyzzyva", "a"], Vocabulary(["<pad>", "<unk>", "a"]), max_length=2)
        [2, 1]
    """
    if max_length < 1:
        raise InputError(f"max_length is at least 1. Received: {max_length}.")
    index = vocabulary.index
    unknown = index.get(UNKNOWN)
    rows: list[int] = []
    for token in tokens[:max_length]:
        row = index.get(token, unknown)
        if row is None:
            raise InputError(
                f"each token has a row. Received {reprlib.repr(token)}, which has none. Add "
                f"{UNKNOWN!r} to the vocabulary."
            )
        rows.append(row)
    return rows


def pad(
    sequences: Sequence[Sequence[int]], padding: int = 0, min_length: int = 1
) -> NDArray[np.int64]:
    """Put sequences of different lengths into one array, filled up at the end.

    Args:
        sequences: The ids of each document.
        padding: The id that fills up.
        min_length: The least number of columns, for example the width of a convolution.

    Returns:
        The ids, shape (len(sequences), max(min_length, longest)), int64.

    Example:
        >>> pad([[5, 6, 7], [8]]).tolist()
        [[5, 6, 7], [8, 0, 0]]
    """
    longest = max((len(sequence) for sequence in sequences), default=0)
    padded = np.full((len(sequences), max(min_length, longest)), padding, np.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return padded


def _labelled(pairs: Sequence[tuple[str, str]]) -> LabelledTexts:
    names = tuple(sorted({name for _, name in pairs}))
    index = {name: label for label, name in enumerate(names)}
    return LabelledTexts(
        texts=tuple(text for text, _ in pairs),
        labels=np.array([index[name] for _, name in pairs], np.int64),
        names=names,
    )


def _select(examples: LabelledTexts, chosen: NDArray[np.bool_]) -> LabelledTexts:
    return LabelledTexts(
        texts=tuple(examples.texts[i] for i in np.flatnonzero(chosen)),
        labels=examples.labels[chosen],
        names=examples.names,
    )


def _share_of(seed: int, text: str) -> float:
    """Map a text to a number that is spread evenly over [0, 1)."""
    digest = hashlib.blake2b(f"{seed}\n{text}".encode(errors="surrogatepass"), digest_size=6)
    return int.from_bytes(digest.digest(), "big") / 2**48


def _checked(example: _Example) -> tuple[str, str]:
    place, text, name = example
    for what, value in (("text", text), ("label", name)):
        if not value.strip():
            raise InputError(
                f"a {what} is not blank. Received: {reprlib.repr(value)} in {place}. Fill it in, "
                "or drop the example."
            )
    return text, name


def _examples(path: Path, text_column: str, label_column: str) -> Iterator[_Example]:
    if os.path.isdir(path):
        return _read_folders(path)
    match path.suffix.lower():
        case ".csv":
            return _read_rows(path, ",", text_column, label_column)
        case ".tsv":
            return _read_rows(path, "\t", text_column, label_column)
        case ".jsonl":
            return _read_json_lines(path, text_column, label_column)
        case ".txt" | ".ft":
            return _read_fasttext_lines(path)
        case suffix:
            raise InputError(
                "the suffix says the format: .csv, .tsv, .jsonl, .txt or .ft. Received: "
                f"{suffix!r} of {path}. Rename or convert the file."
            )


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the texts can be read. Received: {error.strerror or error} for {path}. Check the "
            "path and its permissions."
        ) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"texts are UTF-8. Received the byte 0x{error.object[error.start]:02x} in {path}, "
            f"line {line}. Convert the file to UTF-8."
        ) from error


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    # `splitlines` would also cut at separators that may stand inside a text, such as U+2028.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", line.rstrip("\r")


def _read_rows(
    path: Path, delimiter: str, text_column: str, label_column: str
) -> Iterator[_Example]:
    rows = csv.reader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        columns = next(rows, [])
        if not columns:
            return
        text, label = (_column(path, columns, name) for name in (text_column, label_column))
        for row in rows:
            place = f"{path}, line {rows.line_num}"
            if row and len(row) != len(columns):
                raise InputError(
                    f"each row has {len(columns)} columns. Received: {len(row)} in {place}. "
                    "Quote fields that contain the separator."
                )
            if row:
                yield place, row[text], row[label]
    except csv.Error as error:
        raise InputError(
            f"rows follow the rules of CSV. Received: {error} in {path}, line {rows.line_num}. "
            "Close and double the quotes, or convert the file to JSONL."
        ) from error


def _column(path: Path, columns: list[str], name: str) -> int:
    if name not in columns:
        raise InputError(
            f"the first line names the columns, among them {name!r}. Received: "
            f"{', '.join(map(repr, columns))} in {path}. Name the column that holds it."
        )
    return columns.index(name)


def _read_json_lines(path: Path, text_key: str, label_key: str) -> Iterator[_Example]:
    for place, line in _read_lines(path):
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(
                f"each line is one JSON object. Received: {reprlib.repr(line)} in {place} "
                f"({error}). Correct the line."
            ) from error
        if not isinstance(record, dict):
            raise InputError(
                f"each line is one JSON object. Received: {reprlib.repr(record)} in {place}. "
                f"Write it as {{{json.dumps(text_key)}: …, {json.dumps(label_key)}: …}}."
            )
        yield (
            place,
            _value(record, text_key, (str,), place),
            _value(record, label_key, (str, int), place),
        )


def _value(record: dict[str, Any], key: str, types: tuple[type, ...], place: str) -> str:
    if key not in record:
        raise InputError(
            f"each object has the key {key!r}. Received: {', '.join(map(repr, record)) or 'none'} "
            f"in {place}. Name the key that holds it."
        )
    value = record[key]
    if not isinstance(value, types):
        raise InputError(
            f"the value of {key!r} is {' or '.join(t.__name__ for t in types)}. Received: "
            f"{reprlib.repr(value)} in {place}. Correct the line."
        )
    return value if isinstance(value, str) else json.dumps(value)


def _read_fasttext_lines(path: Path) -> Iterator[_Example]:
    for place, line in _read_lines(path):
        label, *rest = line.split(maxsplit=1)
        text = rest[0] if rest else ""
        if not label.startswith(_FASTTEXT_LABEL):
            raise InputError(
                f"each line begins with {_FASTTEXT_LABEL}. Received: {reprlib.repr(line)} in "
                f"{place}. Write it as `{_FASTTEXT_LABEL}name the text`."
            )
        if text.startswith(_FASTTEXT_LABEL):
            raise InputError(
                f"each text has one label. Received: {reprlib.repr(line)} in {place}. Keep one."
            )
        yield place, text, label.removeprefix(_FASTTEXT_LABEL)


def _read_folders(path: Path) -> Iterator[_Example]:
    folders = [entry for entry in _visible(path) if entry.is_dir()]
    if not folders:
        raise InputError(
            f"a folder of texts holds one folder per class. Received: {path}, which holds none. "
            "Move the texts of each class into a folder named after it."
        )
    for folder in folders:
        files = list(_files_below(folder))
        if not files:
            raise InputError(
                f"each class has texts. Received: {folder}, which has none. Remove or fill it."
            )
        for file in files:
            yield str(file), _read_text(file), folder.name


def _visible(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(
            f"the texts can be read. Received: {error.strerror or error} for {path}. Check its "
            "permissions."
        ) from error


def _files_below(folder: Path) -> Iterator[Path]:
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _files_below(entry)
        else:
            yield entry


def _pieces_of(module_name: str) -> set[str]:
    try:
        module = importlib.import_module(module_name)
    except ImportError:  # Some builds of Python leave out a module.
        return set()
    return {
        piece
        for docstring in _docstrings(module)
        for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring))
        if ">>>" not in paragraph
        for piece in _SENTENCE_END.split(" ".join(paragraph.split()))
        if sum(bool(_PLAIN_WORD.search(word)) for word in piece.split()) >= 4
    }


def _docstrings(module: ModuleType) -> Iterator[str]:
    # Written in C or not, `decimal` and `_decimal` are one module to its readers.
    homes = {module.__name__, f"_{module.__name__}"}
    found: list[object] = [module]
    for value in vars(module).values():
        if getattr(value, "__module__", None) in homes:
            found.append(value)
            if isinstance(value, type):
                found += vars(value).values()
    for value in found:
        docstring = getattr(value, "__doc__", None)
        # An instance shows the docstring of its class, which may come from another module.
        if isinstance(docstring, str) and docstring != type(value).__doc__:
            yield docstring
