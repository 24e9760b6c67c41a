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

# What takes a line to print.
Say = Callable[[str], object]
# The place for messages, the text, the name of its class; None where there is none.
_Example = tuple[str, str, str | None]
# A place and the fields of a row.
_Row = tuple[str, list[str]]


def read_labelled(
    path: str | os.PathLike[str],
    text_column: str | int = "text",
    label_column: str | int = "label",
    least_classes: int = 2,
    say: Say = lambda line: None,
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
    examples = _Source(path, text_column, label_column, say).read()
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
    say: Say = lambda line: None,
) -> list[str]:
    r"""Read texts whether or not they have labels, from files that `read_labelled` takes.

    In `.txt` each line is a text, without the label that it may begin with. `-` reads lines from
    standard input. A table of one column needs no name of it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "new.txt"
        ...     _ = file.write_text("a joy\n__label__neg a bore\n")
        ...     read_texts(file)
        ['a joy', 'a bore']
    """
    return [text for _, text, _ in _Source(path, text_column, None, say).read()]


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


class _Source:
    """Reads the examples of a file or folder, and counts what is to be said of them."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        text: str | int,
        label: str | int | None,
        say: Say,
    ) -> None:
        self.path = Path(path)
        self.is_input = str(path) == "-"
        self.text = str(text)
        self.label = None if label is None else str(label)
        self.say = say
        self.noted: Counter[str] = Counter()

    def read(self) -> list[_Example]:
        """All examples, with no blank and no half characters in them."""
        if not (self.is_input or self.path.exists()):
            raise InputError(
                f"the texts are in a file or folder. Received: {self.path}, which is missing. "
                "Check the path."
            )
        try:
            examples = [self._mended(*example) for example in self._examples()]
        except OSError as error:
            raise InputError(
                f"the texts can be read. Received: {error.strerror or error} for "
                f"{error.filename or self.path}. Check the path and its permissions."
            ) from error
        if not examples:
            raise InputError(
                f"there is at least one example. Received: {self.path}, which has none. Write one "
                "into it, or name another file."
            )
        for what, count in self.noted.items():
            self.say(f"{self.path}: {count:,} {what}")
        return examples

    def _mended(self, place: str, text: str, name: str | None) -> _Example:
        if not text.isprintable():
            # Halves of a pair are put together, what is left of others is marked.
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            if whole != text:
                self.noted[_HALVES] += 1
            text = whole
        if not text.strip():
            raise InputError(
                f"a text is not blank. Received: {reprlib.repr(text)} in {place}. Fill it in, or "
                "drop the example."
            )
        return place, text, name

    def _examples(self) -> Iterator[_Example]:
        if self.is_input:
            return self._of_lines()
        if self.path.is_dir():
            return self._of_folders()
        match self.path.suffix.lower():
            case ".csv":
                return self._of_table(self._csv_rows())
            case ".tsv":
                rows = [(place, line.split("\t")) for place, line in self._lines()]
                return self._of_table(self._unquoted(rows))
            case ".jsonl":
                return self._of_json_lines()
            case ".txt" | ".ft":
                return self._of_lines()
            case suffix:
                raise InputError(
                    "the suffix says the format: .csv, .tsv, .jsonl, .txt or .ft. Received: "
                    f"{suffix!r} of {self.path}. Rename or convert the file."
                )

    def _lines(self) -> Iterator[tuple[str, str]]:
        place = "standard input" if self.is_input else self.path
        text = sys.stdin.read() if self.is_input else self._text()
        # `splitlines` would also cut at separators that may stand inside a text, such as U+2028.
        for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
            if line.strip():
                yield f"{place}, line {number}", line.rstrip("\r")
            elif text:
                self.noted[_EMPTY] += 1

    def _text(self, path: Path | None = None) -> str:
        """The content of the file, or of one in the folder."""
        path = path or self.path
        if not path.is_file():
            raise InputError(
                f"texts are in files. Received: {path}, which is none. Name a file, or take it out "
                "of the folder."
            )
        try:
            return path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise InputError(
                f"texts are UTF-8. Received the byte 0x{error.object[error.start]:02x} in {path}, "
                f"line {line}. Convert the file to UTF-8."
            ) from error

    # Tables

    def _csv_rows(self) -> list[_Row]:
        rows = csv.reader(io.StringIO(self._text(), newline=""), strict=True)
        # The module's limit of 128 KiB is there for all its users.
        usual = csv.field_size_limit(2**31 - 1)
        try:
            found = [(f"{self.path}, line {rows.line_num}", row) for row in rows]
        except csv.Error as error:
            raise InputError(
                f"rows follow the rules of CSV. Received: {error} in {self.path}, line "
                f"{rows.line_num}. Close and double the quotes, or convert the file to JSONL."
            ) from error
        finally:
            csv.field_size_limit(usual)
        filled = [(place, row) for place, row in found if row]
        if len(filled) < len(found):
            self.noted[_EMPTY] += len(found) - len(filled)
        return filled

    def _unquoted(self, rows: list[_Row]) -> list[_Row]:
        """Without the quotes around all values of a column, as Kaggle ships some files."""
        width = min((len(fields) for _, fields in rows), default=0)
        for column in range(width):
            values = [fields[column] for _, fields in rows[1:]]
            if values and all(len(v) > 1 and v[0] == v[-1] == '"' for v in values):
                self.noted[_UNQUOTED] += len(values)
                for _, fields in rows:
                    if inner := re.fullmatch(r'"(.*)"', fields[column], re.DOTALL):
                        fields[column] = re.sub(r'\\"|""', '"', inner[1])
        return rows

    def _of_table(self, rows: list[_Row]) -> Iterator[_Example]:
        if not rows:
            return
        first = rows[0][1]
        wanted = [name for name in (self.text, self.label) if name is not None]
        # Numbers of columns say that the first line is an example.
        numbered = all(name.isdigit() and name not in first for name in wanted)
        if self.label is None and len(first) == 1 and self.text not in first:
            columns, numbered = [0], True  # nothing but texts
        else:
            columns = [self._column(first, name, numbered) for name in wanted]
        for place, fields in rows[0 if numbered else 1 :]:
            if len(fields) != len(first):
                raise InputError(
                    f"each row has {len(first)} columns. Received: {len(fields)} in {place}. "
                    "Quote fields that contain the separator; in a .tsv, where no field holds a "
                    "tab, convert the file to CSV or JSONL."
                )
            yield place, fields[columns[0]], fields[columns[1]] if len(columns) > 1 else None

    def _column(self, first: list[str], name: str, numbered: bool) -> int:
        if numbered:
            if not 1 <= int(name) <= len(first):
                raise InputError(
                    f"columns are numbered from 1 to {len(first)} in {self.path}. Received: "
                    f"{name}. Count from 1 at the left."
                )
            return int(name) - 1
        if name not in first:
            raise InputError(
                f"the first line names the columns, among them {name!r}. Received: "
                f"{', '.join(map(reprlib.repr, first))} in {self.path}. Set text_column and "
                "label_column to two of these, or, where that line is an example, to the numbers "
                "of columns from 1."
            )
        return first.index(name)

    # Lines

    def _of_json_lines(self) -> Iterator[_Example]:
        for place, line in self._lines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError: numbers of 5,000 digits too
                raise InputError(
                    f"each line is one JSON object. Received: {reprlib.repr(line)} in {place} "
                    f"({error}). Write it as {{{json.dumps(self.text)}: …, …}}."
                ) from error
            if not isinstance(record, dict):
                raise InputError(
                    f"each line is one JSON object. Received: {reprlib.repr(record)} in {place}. "
                    f"Write it as {{{json.dumps(self.text)}: …, …}}."
                )
            kinds = (str, int, float)
            label = None if self.label is None else _value(record, self.label, kinds, place)
            yield place, _value(record, self.text, (str,), place), label

    def _of_lines(self) -> Iterator[_Example]:
        for place, line in self._lines():
            first, *rest = line.split(maxsplit=1)
            text = rest[0] if rest else ""
            if not first.startswith(_FASTTEXT_LABEL):
                if self.label is None:
                    yield place, line, None
                    continue
                raise InputError(
                    f"each line begins with {_FASTTEXT_LABEL}. Received: {reprlib.repr(line)} in "
                    f"{place}. Write it as `{_FASTTEXT_LABEL}name the text`."
                )
            if text.startswith(_FASTTEXT_LABEL):
                raise InputError(
                    f"each text has one label. Received: {reprlib.repr(line)} in {place}. Keep the "
                    "one that fits best."
                )
            yield place, text, first.removeprefix(_FASTTEXT_LABEL)

    # Folders

    def _of_folders(self) -> Iterator[_Example]:
        folders = [entry for entry in self._visible(self.path) if entry.is_dir()]
        if self.label is None and not folders:
            folders = [self.path]
        if not folders:
            raise InputError(
                f"a folder of texts holds one folder per class. Received: {self.path}, which holds "
                "none. Move the texts of each class into a folder named after it."
            )
        for folder in folders:
            files = list(self._files_below(folder))
            if not files:
                raise InputError(
                    f"each class has texts. Received: {folder}, which has none. Put the texts of "
                    "this class there, or remove the folder."
                )
            for file in files:
                yield str(file), self._text(file), folder.name

    def _visible(self, folder: Path) -> list[Path]:
        entries = sorted(folder.iterdir())
        visible = [entry for entry in entries if not entry.name.startswith(".")]
        if len(visible) < len(entries):
            self.noted[_HIDDEN] += len(entries) - len(visible)
        return visible

    def _files_below(self, folder: Path) -> Iterator[Path]:
        for entry in self._visible(folder):
            yield from self._files_below(entry) if entry.is_dir() else [entry]


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
            f"{reprlib.repr(value)} in {place}. Write one of that kind there."
        )
    return value if isinstance(value, str) else json.dumps(value)
