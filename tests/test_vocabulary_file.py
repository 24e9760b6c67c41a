"""Vocabularies come back from their files as they were, and files that are none are refused."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_embedding import InputError, Vocabulary
from partial_embedding.rows.vocabulary_file import read_vocabulary, write_vocabulary

TOKENS = st.lists(
    st.text(st.characters() | st.sampled_from("\\xu0b\x1b\ud83d\ufeff"), min_size=1).filter(
        lambda t: "\t" not in t and t.splitlines() == [t]
    ),
    min_size=1,
    max_size=8,
    unique=True,
)


@settings(max_examples=100, deadline=None)
@given(TOKENS, st.booleans(), st.booleans(), st.data())
def test_a_vocabulary_comes_back_as_it_was_written(
    tokens: list[str], counted: bool, known: bool, data: st.DataObject
) -> None:
    number = len(tokens)
    vocabulary = Vocabulary(
        tokens,
        data.draw(st.lists(st.integers(0, 9), min_size=number, max_size=number))
        if counted
        else None,
        data.draw(st.sets(st.integers(0, number - 1))) if known else None,
    )
    path = Path(data.draw(st.just(_folder)) / "vocabulary.tsv")
    write_vocabulary(path, vocabulary)
    assert read_vocabulary(path) == vocabulary


@pytest.fixture(autouse=True, scope="module")
def _a_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global _folder
    _folder = tmp_path_factory.mktemp("vocabularies")


_folder: Path


def test_a_list_of_tokens_is_a_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "tokens.txt"
    path.write_bytes("\ufeffthe\nof\nété\n".encode())
    assert read_vocabulary(path).tokens == ("the", "of", "été")


BROKEN = {
    "empty": (b"", "Received none"),
    "header_alone": (b"token\tcount\n", "Received none"),
    "not_utf8": (b"caf\xe9\n", "UTF-8"),
    "columns_without_header": (b"the\t9\n", "line 1"),
    "a_column_is_lacking": (b"token\tcount\nthe\t9\nof\n", "line 3"),
    "no_number": (b"token\tcount\nthe\tmany\n", "line 2: count is a whole number"),
    "negative": (b"token\tcount\nthe\t-1\n", "'-1'"),
    "twice": (b"the\nthe\n", "'the' twice"),
    "absent": (None, "No such file"),
}


@pytest.mark.parametrize(("content", "named"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_refused_by_name(
    content: bytes | None, named: str, tmp_path: Path, refused: Any
) -> None:
    path = tmp_path / "broken.tsv"
    if content is not None:
        path.write_bytes(content)
    assert refused(read_vocabulary, path, parts=[named]).startswith(f"{path}: ")


@pytest.mark.parametrize("token", ["a\tb", "a\nb", "", "a\r"])
def test_tokens_that_would_break_a_file_are_refused_and_nothing_is_written(
    token: str, tmp_path: Path
) -> None:
    path = tmp_path / "vocabulary.tsv"
    with pytest.raises(InputError, match="row 1"):
        write_vocabulary(path, Vocabulary(["the", token]))
    assert not path.exists()


def test_a_vocabulary_in_a_terminal_moves_nothing_and_plain_lists_are_what_they_say(
    tmp_path: Path,
) -> None:
    tokens = ["\x1b[2J", r"\x1b", "\u202ea", r"\d", "\ud83d"]
    file = tmp_path / "vocabulary.tsv"
    write_vocabulary(file, Vocabulary(tokens, counts=[5, 4, 3, 2, 1]))
    lines = file.read_text(encoding="utf-8").splitlines()
    assert all(line.replace("\t", " ").isprintable() for line in lines)
    assert list(read_vocabulary(file).tokens) == tokens
    file.write_text("\\d\n\\x41\n\\u00e9\n", encoding="utf-8")
    assert list(read_vocabulary(file).tokens) == [r"\d", r"\x41", r"\u00e9"]
