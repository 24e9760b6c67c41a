"""Texts from files, with labels or without: tables, JSON lines, fastText lines, folders."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from partial_embedding.errors import InputError
from partial_embedding.recipes.text.labelled import LabelledTexts, labelled

_FASTTEXT_LABEL = "__label__"
# In the order in which they are said.
_EMPTY = "empty lines were passed over"
_HIDDEN = "hidden files were passed over"
_HALVES = "texts had half of a surrogate pair, which became \ufffd"
_UNQUOTED = "values were all in quotes, which were taken off"

# The place for messages, the text, the name of its class; None where there is none.
_Example = tuple[str, str, str | None]


def read_labelled(
    path: str | os.PathLike[str],
    text_column: str | int = "text",
    label_column: str | int = "label",
    least_classes: int = 2,
    say: Callable[[str], object] | None = None,
) -> LabelledTexts:
    r"""Read labelled texts from a file, or from a folder with one folder per class.

    The suffix says which format, and everything is UTF-8:

    - `.csv`: a line of column names, then one example per row, quoted as CSV is.
    - `.tsv`: the same with tabs, and quotes are characters like others; only where all values of a
      column stand in quotes, they are taken off, and `\"` is a quote.
    - `.jsonl`: one JSON object per line; a label is a string, a number or a boolean.
    - `.txt` and `.ft`: fastText's lines, `__label__name the text`.
    - A folder: each folder in it is a class, and each file below that one text.

    Labels that differ in spaces alone are one class, and so are `1` and `1.0`. Empty lines and
    hidden files are passed over, and counted.

    Args:
        path: The file or the folder.
        text_column: The column or key that holds the text (CSV, TSV and JSONL); the number of the
            column, from 1, in a file whose first line is an example and not names.
        label_column: The column or key that holds the name of the class (the same formats).
        least_classes: How many classes there must be.
        say: Called with a line for each kind of thing that was passed over or mended.

    Returns:
        The examples in the order of the file, or of the sorted file names of a folder.

    Raises:
        InputError: The file is missing, unreadable, empty or malformed, or has too few classes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "films.csv"
        ...     _ = file.write_text("text,label\na joy,pos\na bore,neg\n")
        ...     read_labelled(file).names
        ('neg', 'pos')
    """
    path = Path(path)
    examples = _read(path, str(text_column), str(label_column), say)
    pairs = [(text, _class_name(name, place)) for place, text, name in examples]
    names = sorted({name for _, name in pairs})
    if len(names) < least_classes:
        raise InputError(
            f"texts are told apart by at least two classes. Received: {path}, where all "
            f"{len(pairs)} are {reprlib.repr(names[0])}. Is {label_column!r} the label?"
        )
    return labelled(pairs)


def read_texts(
    path: str | os.PathLike[str],
    text_column: str | int = "text",
    say: Callable[[str], object] | None = None,
) -> list[str]:
    r"""Read texts whether or not they have labels.

    Args:
        path: A file as `read_labelled` takes it, without labels too; in `.txt` each line is a text,
            without the label that it may begin with. `-` reads lines from standard input.
        text_column: The column or key that holds the text; a table of one column needs no name.
        say: As for `read_labelled`.

    Raises:
        InputError: The file is missing, unreadable, empty or malformed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "new.txt"
        ...     _ = file.write_text("a joy\n__label__neg a bore\n")
        ...     read_texts(file)
        ['a joy', 'a bore']
    """
    return [text for _, text, _ in _read(Path(path), str(text_column), None, say)]


def _read(
    path: Path, text_column: str, label_column: str | None, say: Callable[[str], object] | None
) -> list[_Example]:
    """All examples, with no blank and no half characters in them."""
    if str(path) != "-" and not path.exists():
        raise InputError(f"the texts are in a file or folder. Received: {path}, which is missing.")
    noted: Counter[str] = Counter()
    examples = []
    for place, text, name in _examples(path, text_column, label_column, noted):
        if not text.isprintable() and (whole := _without_halves(text)) != text:
            noted[_HALVES] += 1
            text = whole
        if not text.strip():
            raise InputError(
                f"a text is not blank. Received: {reprlib.repr(text)} in {place}. Fill it in, "
                "or drop the example."
            )
        examples.append((place, text, name))
    if not examples:
        raise InputError(f"there is at least one example. Received: {path}, which has none.")
    for what, count in noted.items():
        if say is not None:
            say(f"{path}: {count:,} {what}")
    return examples


def _without_halves(text: str) -> str:
    """The same text with whole characters: pairs put together, what is left of others marked."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _class_name(name: str | None, place: str) -> str:
    """One name for labels that differ only in how they are written."""
    assert name is not None  # it was asked for
    name = " ".join(name.split())
    if not name:
        raise InputError(
            f"a label is not blank. Received: {name!r} in {place}. Fill it in, or drop the example."
        )
    # Tables that had an empty cell once hold their whole numbers as 1.0.
    return name.partition(".")[0] if re.fullmatch(r"[+-]?\d+\.0*", name) else name


def _examples(
    path: Path, text_column: str, label_column: str | None, noted: Counter[str]
) -> Iterator[_Example]:
    if str(path) == "-":
        return _read_lines_of_text("standard input", sys.stdin.read(), None, noted)
    if path.is_dir():
        return _read_folders(path, label_column is not None, noted)
    match path.suffix.lower():
        case ".csv":
            return _read_table(path, _csv_rows(path, noted), text_column, label_column)
        case ".tsv":
            rows = _unquoted(_tsv_rows(path, noted), noted)
            return _read_table(path, rows, text_column, label_column)
        case ".jsonl":
            return _read_json_lines(path, text_column, label_column, noted)
        case ".txt" | ".ft":
            return _read_lines_of_text(str(path), _read_text(path), label_column, noted)
        case suffix:
            raise InputError(
                "the suffix says the format: .csv, .tsv, .jsonl, .txt or .ft. Received: "
                f"{suffix!r} of {path}. Rename or convert the file."
            )


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"texts are in files. Received: {path}, which is none.")
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


def _lines(place: str, text: str, noted: Counter[str]) -> Iterator[tuple[str, str]]:
    # `splitlines` would also cut at separators that may stand inside a text, such as U+2028.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        if line.strip():
            yield f"{place}, line {number}", line.rstrip("\r")
        elif text:
            noted[_EMPTY] += 1


# Tables

# A place and the fields of a row.
_Row = tuple[str, list[str]]


def _csv_rows(path: Path, noted: Counter[str]) -> list[_Row]:
    rows = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    found: list[_Row] = []
    # The module's limit of 128 KiB is there for all its users.
    usual = csv.field_size_limit(2**31 - 1)
    try:
        for row in rows:
            if row:
                found.append((f"{path}, line {rows.line_num}", row))
            else:
                noted[_EMPTY] += 1
    except csv.Error as error:
        raise InputError(
            f"rows follow the rules of CSV. Received: {error} in {path}, line {rows.line_num}. "
            "Close and double the quotes, or convert the file to JSONL."
        ) from error
    finally:
        csv.field_size_limit(usual)
    return found


def _tsv_rows(path: Path, noted: Counter[str]) -> list[_Row]:
    return [(place, line.split("\t")) for place, line in _lines(str(path), _read_text(path), noted)]


def _unquoted(rows: list[_Row], noted: Counter[str]) -> list[_Row]:
    """Without the quotes around all values of a column, as Kaggle ships some files."""
    width = min((len(fields) for _, fields in rows), default=0)
    for column in range(width):
        values = [fields[column] for _, fields in rows[1:]]
        if values and all(len(v) > 1 and v[0] == v[-1] == '"' for v in values):
            noted[_UNQUOTED] += len(values)
            for _, fields in rows:
                inner = re.fullmatch(r'"(.*)"', fields[column], re.DOTALL)
                if inner:
                    fields[column] = re.sub(r'\\"|""', '"', inner[1])
    return rows


def _read_table(
    path: Path, rows: list[_Row], text_column: str, label_column: str | None
) -> Iterator[_Example]:
    if not rows:
        return
    first = rows[0][1]
    wanted = [name for name in (text_column, label_column) if name is not None]
    # Numbers of columns say that the first line is an example.
    numbered = all(name.isdigit() and name not in first for name in wanted)
    if label_column is None and len(first) == 1 and text_column not in first:
        columns, numbered = [0], True  # nothing but texts
    elif numbered:
        columns = [_numbered_column(path, first, int(name)) for name in wanted]
    else:
        columns = [_named_column(path, first, name) for name in wanted]
    for place, fields in rows[0 if numbered else 1 :]:
        if len(fields) != len(first):
            raise InputError(
                f"each row has {len(first)} columns. Received: {len(fields)} in {place}. "
                + (
                    "Quote fields that contain the separator."
                    if path.suffix.lower() == ".csv"
                    else "A field cannot hold a tab: convert the file to CSV or JSONL."
                )
            )
        yield place, fields[columns[0]], fields[columns[1]] if len(columns) > 1 else None


def _numbered_column(path: Path, first: list[str], number: int) -> int:
    if not 1 <= number <= len(first):
        raise InputError(
            f"columns are numbered from 1 to {len(first)} in {path}. Received: {number}. Name one "
            "of them."
        )
    return number - 1


def _named_column(path: Path, columns: list[str], name: str) -> int:
    if name not in columns:
        raise InputError(
            f"the first line names the columns, among them {name!r}. Received: "
            f"{', '.join(map(reprlib.repr, columns))} in {path}. Set text_column and label_column "
            "to two of these, or, where that line is an example, to the numbers of columns from 1."
        )
    return columns.index(name)


# Lines


def _read_json_lines(
    path: Path, text_key: str, label_key: str | None, noted: Counter[str]
) -> Iterator[_Example]:
    for place, line in _lines(str(path), _read_text(path), noted):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: numbers of 5,000 digits too
            raise InputError(
                f"each line is one JSON object. Received: {reprlib.repr(line)} in {place} "
                f"({error}). Correct the line."
            ) from error
        if not isinstance(record, dict):
            raise InputError(
                f"each line is one JSON object. Received: {reprlib.repr(record)} in {place}. "
                f"Write it as {{{json.dumps(text_key)}: …, …}}."
            )
        label = None if label_key is None else _value(record, label_key, (str, int, float), place)
        yield place, _value(record, text_key, (str,), place), label


def _value(record: dict[str, Any], key: str, types: tuple[type, ...], place: str) -> str:
    if key not in record:
        raise InputError(
            f"each object has the key {key!r}. Received: {', '.join(map(repr, record)) or 'none'} "
            f"in {place}. Name the key that holds it in text_column or label_column."
        )
    value = record[key]
    if not isinstance(value, types):
        raise InputError(
            f"the value of {key!r} is {' or '.join(t.__name__ for t in types)}. Received: "
            f"{reprlib.repr(value)} in {place}. Correct the line."
        )
    return value if isinstance(value, str) else json.dumps(value)


def _read_lines_of_text(
    source: str, content: str, label_column: str | None, noted: Counter[str]
) -> Iterator[_Example]:
    for place, line in _lines(source, content, noted):
        first, *rest = line.split(maxsplit=1)
        text = rest[0] if rest else ""
        if not first.startswith(_FASTTEXT_LABEL):
            if label_column is None:
                yield place, line, None
                continue
            raise InputError(
                f"each line begins with {_FASTTEXT_LABEL}. Received: {reprlib.repr(line)} in "
                f"{place}. Write it as `{_FASTTEXT_LABEL}name the text`."
            )
        if text.startswith(_FASTTEXT_LABEL):
            raise InputError(
                f"each text has one label. Received: {reprlib.repr(line)} in {place}. Keep one."
            )
        yield place, text, first.removeprefix(_FASTTEXT_LABEL)


# Folders


def _read_folders(path: Path, with_labels: bool, noted: Counter[str]) -> Iterator[_Example]:
    folders = [entry for entry in _visible(path, noted) if entry.is_dir()]
    if not with_labels and not folders:
        folders = [path]
    if not folders:
        raise InputError(
            f"a folder of texts holds one folder per class. Received: {path}, which holds none. "
            "Move the texts of each class into a folder named after it."
        )
    for folder in folders:
        files = list(_files_below(folder, noted))
        if not files:
            raise InputError(
                f"each class has texts. Received: {folder}, which has none. Remove or fill it."
            )
        for file in files:
            yield str(file), _read_text(file), folder.name


def _visible(path: Path, noted: Counter[str]) -> list[Path]:
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        raise InputError(
            f"the texts can be read. Received: {error.strerror or error} for {path}. Check its "
            "permissions."
        ) from error
    visible = [entry for entry in entries if not entry.name.startswith(".")]
    if len(visible) < len(entries):
        noted[_HIDDEN] += len(entries) - len(visible)
    return visible


def _files_below(folder: Path, noted: Counter[str]) -> Iterator[Path]:
    for entry in _visible(folder, noted):
        if entry.is_dir():
            yield from _files_below(entry, noted)
        else:
            yield entry
