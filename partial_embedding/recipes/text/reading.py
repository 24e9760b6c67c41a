"""Labelled texts from files: tables, JSON lines, fastText lines, folders."""

import csv
import io
import json
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from partial_embedding.errors import InputError
from partial_embedding.recipes.text.labelled import LabelledTexts, labelled

_FASTTEXT_LABEL = "__label__"

# The place for messages, the text, the name of its class.
_Example = tuple[str, str, str]


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
    return labelled(pairs)


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
