"""Rows that a file names."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from partial_embedding import InputError, Rows, Vocabulary

V = 12
VOCABULARY = Vocabulary([f"w{i}" for i in range(V)])


def _npy(values: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("wb") as file:  # by its name, np.save would add an ending
            np.save(file, values)

    return write


def _text(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


FILES: dict[str, tuple[str, str, Callable[[Path], None], list[int]]] = {
    "npy_ids": ("ids_file", "a.npy", _npy(np.array([7, 2])), [2, 7]),
    "npy_mask": ("ids_file", "a.npy", _npy(np.arange(V) > 9), [10, 11]),
    "npy_of_no_id": ("ids_file", "a.npy", _npy(np.array([], np.int64)), []),
    "ids": ("ids_file", "a.txt", _text(b"7\n2\n"), [2, 7]),
    "ids_with_empty_lines": ("ids_file", "a.txt", _text(b"\n7\n\n 2 \n\n"), [2, 7]),
    "ids_from_windows": ("ids_file", "a.txt", _text(b"\xef\xbb\xbf7\r\n2\r\n"), [2, 7]),
    "tokens": ("token_file", "a.txt", _text(b"w7\nw2\n"), [2, 7]),
    "tokens_with_empty_lines": ("token_file", "a.txt", _text(b"\nw7\n\n  w2\t\n"), [2, 7]),
}


@pytest.mark.parametrize(("kind", "name", "write", "expected"), FILES.values(), ids=FILES)
def test_rows_in_a_file_are_read_once(
    kind: str, name: str, write: Callable[[Path], None], expected: list[int], tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path)
    rows = [Rows.parse({kind: path}), Rows.parse({kind: str(path)})]
    path.unlink()
    for one in rows:
        assert one.resolve(V, VOCABULARY).tolist() == expected
        again = Rows.parse(yaml.safe_load(yaml.safe_dump(one.to_config())))
        assert again == one


def test_tokens_in_a_file_may_have_any_other_character(tmp_path: Path) -> None:
    tokens = ["naïve", "new york", "a\x85b", "\u2028", "#", "\u2019s", "\ufeff"]
    kept = [token for token in tokens if token.strip()]
    path = tmp_path / "tokens.txt"
    path.write_text("\n".join(kept), encoding="utf-8")
    vocabulary = Vocabulary(tokens)
    expected = [tokens.index(token) for token in kept]
    assert Rows.parse({"token_file": path}).resolve(7, vocabulary).tolist() == expected


MALFORMED_FILES: dict[str, tuple[str, str, Callable[[Path], None], str]] = {
    "word_among_ids": ("ids_file", "a.txt", _text(b"3\ncat\n"), "'cat'"),
    "fraction": ("ids_file", "a.txt", _text(b"1.5\n"), "'1.5'"),
    "no_id": ("ids_file", "a.txt", _text(b"\n"), "[]"),
    "ids_that_are_no_text": ("ids_file", "a.txt", _text(b"\xff\xfe3"), "0xff"),
    "npy_of_fractions": ("ids_file", "a.npy", _npy(np.array([0.5])), "0.5"),
    "npy_matrix": ("ids_file", "a.npy", _npy(np.zeros((1, 2), np.int64)), "[[0, 0]]"),
    "npy_objects": ("ids_file", "a.npy", _npy(np.array([1, None])), "allow_pickle=False"),
    "npy_empty_file": ("ids_file", "a.npy", _text(b""), "Received: "),
    "npy_cut_short": ("ids_file", "a.npy", _text(b"\x93NUMPY\x01\x00"), "Received: "),
    "npy_that_is_a_broken_zip": ("ids_file", "a.npy", _text(b"PK\x03\x04 oops"), "Received: "),
    "no_token": ("token_file", "a.txt", _text(b"\n \n"), "[]"),
    "token_twice": ("token_file", "a.txt", _text(b"a\nb\na\n"), "'a' twice"),
    "tokens_that_are_no_text": ("token_file", "a.txt", _text(b"caf\xe9\n"), "0xe9"),
    "absent_ids": ("ids_file", "absent.txt", lambda _: None, "No such file"),
    "absent_tokens": ("token_file", "absent.txt", lambda _: None, "No such file"),
    "folder_of_ids": ("ids_file", "a.npy", Path.mkdir, "Received a folder"),
    "ids_without_end": ("ids_file", "a.txt", os.mkfifo, "Received a device"),
    "no_name_of_a_file": ("token_file", "a\0b", lambda _: None, "null"),
}


@pytest.mark.parametrize(
    ("kind", "name", "write", "received"), MALFORMED_FILES.values(), ids=MALFORMED_FILES
)
def test_malformed_files_of_rows_are_refused_in_one_line_with_their_name(
    kind: str, name: str, write: Callable[[Path], None], received: str, tmp_path: Path, refused: Any
) -> None:
    path = tmp_path / name
    write(path)
    message = refused(Rows.parse, {"union": [{kind: str(path)}]}, parts=[received])
    assert message.startswith(f"{path}: ")


def test_a_repeated_token_of_a_large_file_is_found_at_once(tmp_path: Path) -> None:
    # Comparing each token with all before it would take minutes.
    tokens = [f"token{i}" for i in range(200_000)]
    random.Random(0).shuffle(tokens)
    path = tmp_path / "tokens.txt"
    path.write_text("\n".join([*tokens, tokens[-7]]))
    with pytest.raises(InputError, match=f"'{tokens[-7]}' twice"):
        Rows.parse({"token_file": path})
