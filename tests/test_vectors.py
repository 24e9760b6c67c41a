import gzip
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

pytest.importorskip("gensim")

from partial_embedding.errors import InputError
from partial_embedding.recipes.vectors import (
    WordVectors,
    build_table,
    read_vectors,
    save_vectors,
    tables,
    train_vectors,
)
from partial_embedding.rows.vocabulary import Vocabulary

SUFFIXES = [".txt", ".vec", ".bin", ".txt.gz", ".vec.gz", ".bin.gz"]
TOKENS = ["the", "naïve", "我愛", "x-1"]
TABLE = np.array([[0.1, -2.5], [1e-42, 3.4e38], [-0.0, 1 / 3], [7, 0]], np.float32)


def row(token: str, *values: float) -> bytes:
    return token.encode() + b" " + np.array(values, "<f4").tobytes()


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return a.dtype == b.dtype == np.float32 and a.shape == b.shape and a.tobytes() == b.tobytes()


TEXT = "the 0.5 1\nof -2 1e-3\n"
GOOD = {
    "glove.txt": TEXT.encode(),
    "word2vec.txt": b"2 2\n" + TEXT.encode(),
    "fasttext.vec": b"2 2\nthe 0.5 1 \nof -2 1e-3 \n",
    "windows.txt": b"2 2\r\nthe 0.5 1\r\nof -2 1e-3",
    "without.suffix": TEXT.encode(),
    "word2vec.bin": b"2 2\n" + row("the", 0.5, 1) + row("of", -2, 1e-3),
    "original.bin": b"2 2\n" + row("the", 0.5, 1) + b"\n" + row("of", -2, 1e-3) + b"\n",
}


@pytest.mark.parametrize("name", GOOD)
def test_every_format_reads_the_same(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(GOOD[name])
    for dimension in (None, 2):
        found = read_vectors(tmp_path / name, dimension)
        assert found.tokens == ["the", "of"]
        assert same_bits(found.values, np.array([[0.5, 1], [-2, 1e-3]], np.float32))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"a 1 2\nb 3 4\na 5 6\nc 7 8\n"),
        ("a.vec", b"4 2\na 1 2\nb 3 4\na 5 6\nc 7 8\n"),
        ("a.bin", b"4 2\n" + row("a", 1, 2) + row("b", 3, 4) + row("a", 5, 6) + row("c", 7, 8)),
    ],
)
def test_the_first_vector_of_a_token_counts(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    found = read_vectors(tmp_path / name)
    assert found.tokens == ["a", "b", "c"]
    assert found.values.tolist() == [[1, 2], [3, 4], [7, 8]]
    # What gensim returns by itself has an empty row and no token for it.
    save_vectors(tmp_path / "again.txt", found.tokens, found.values)
    assert read_vectors(tmp_path / "again.txt").tokens == ["a", "b", "c"]


WORD2VEC = b"2 2\na 1 2\nb 3 4\n"
BINARY = b"2 2\n" + row("a", 1, 2) + row("b", 3, 4)
ZIPPED = gzip.compress(WORD2VEC * 50)
# The file's name, its content, and what the message must say was received.
BAD = {
    "missing": ("no.txt", None, ["no.txt, which is missing"]),
    "folder": (".", None, ["a folder"]),
    "empty": ("a.txt", b"", ["a.txt, which has none"]),
    "header of no rows": ("a.txt", b"0 2\n", ["which has none"]),
    "header of no values": ("a.txt", b"2 0\na\nb\n", ["at least one value", "0 in line 1"]),
    "tabs": ("a.txt", b"a\t1\t2\n", ["at least one value", "spaces"]),
    "more rows promised": ("a.txt", b"3 2\na 1 2\nb 3 4\n", ["promises 3", "holds 2", "`2 2`"]),
    "fewer rows promised": ("a.txt", b"1 2\na 1 2\nb 3 4\n", ["promises 1", "holds 2", "`2 2`"]),
    "memory's end promised": ("a.txt", b"9" * 17 + b" 300\n", ["promises 9999", "holds 0"]),
    "other size promised": ("a.txt", b"1 3\na 1 2\n", ["3 values", "2 values in", "line 2"]),
    "one value": ("a.txt", b"a 1 2\nb 3\n", ["1 values in", "line 2"]),
    "blank line": ("a.txt", b"a 1 2\n\nb 3 4\n", ["0 values in", "line 2"]),
    "more values": ("a.txt", b"a 1 2\nb 3 4 5\n", ["3 values in", "line 2"]),
    "two spaces": ("a.txt", b"a 1 2\nb  4\n", ["Received: ''", "line 2"]),
    "no number": ("a.txt", b"2 2\na 1 2\nb x 4\n", ["Received: 'x'", "line 3"]),
    "nan": ("a.txt", b"a 1 2\na 0 0\nb nan 4\n", ["Received: 'nan'", "line 3"]),
    "inf": ("a.vec", b"1 2\na 1 -inf\n", ["Received: '-inf'", "line 2"]),
    "beyond float32": ("a.txt", b"a 1e39 2\n", ["Received: '1e39'", "line 1"]),
    "not utf-8": ("a.txt", b"a 1 2\n\xe9 3 4\n", ["0xe9", "line 2"]),
    "cut off gzip": ("a.txt.gz", ZIPPED[:-12], ["a.txt.gz", "ended before"]),
    "changed gzip": ("a.txt.gz", ZIPPED[:-8] + b"\0" * 8, ["a.txt.gz", "CRC"]),
    "no gzip": ("a.txt.gz", WORD2VEC, ["a.txt.gz", "Not a gzipped file"]),
    "empty binary": ("a.bin", b"", ["a.bin, which does not"]),
    "text called binary": ("a.bin", TEXT.encode(), ["a.bin, which does not", ".txt"]),
    "binary called text": ("a.txt", b"1 2\n" + row("a", 0, np.nan), ["0xc0", "line 2", ".bin"]),
    "binary cut in values": ("a.bin", BINARY[:-3], ["promises 2", "holds 1"]),
    "binary, more promised": ("a.bin", b"9" + BINARY, ["promises 92", "holds 2", "`2 2`"]),
    "binary, fewer promised": ("a.bin", BINARY + row("c", 5, 6), ["promises 2", "holds 3"]),
    "binary, rest": ("a.bin", BINARY + b"\nabc", ["after its last row", "abc", "row 2"]),
    "binary, memory's end": ("a.bin", b"1 " + b"9" * 17 + b"\na ", ["promises 1", "holds 0"]),
    "binary, no values": ("a.bin", b"2 0\na b ", ["at least one value"]),
    "binary, not utf-8": ("a.bin", b"1 1\n\xe9 " + b"\0" * 4, ["other bytes in 1 of 1 rows"]),
    "binary nan": ("a.bin", b"1 2\n" + row("a", 1, np.nan), ["nan", "'a'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, case: str, refused: Any) -> None:
    name, content, said = BAD[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # gensim leaves a file without a header to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        refused(read_vectors, tmp_path / name, parts=[str(tmp_path / name), *said])


@pytest.mark.parametrize("name", ["word2vec.txt", "glove.txt", "word2vec.bin"])
def test_another_dimension_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(GOOD[name])
    with pytest.raises(InputError, match=r"3 values each\. Received: 2 in .*Set dimension to 2"):
        read_vectors(tmp_path / name, dimension=3)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_saved_vectors_come_back_bit_for_bit(tmp_path: Path, suffix: str, dtype: type) -> None:
    path = tmp_path / f"table{suffix}"
    table = np.vstack([TABLE, np.random.default_rng(0).normal(size=(500, 2)).astype(np.float32)])
    tokens = TOKENS + [f"token{i}" for i in range(500)]
    save_vectors(path, tokens, table.astype(dtype))
    found = read_vectors(path)
    assert found.tokens == tokens
    assert same_bits(found.values, table)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == suffix.endswith(".gz")


@settings(max_examples=25, deadline=None)
@given(
    arrays(
        np.float32, (3, 40), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    ),
    st.lists(
        st.text(
            st.characters(exclude_characters=" \t\n\r\v\f", exclude_categories=["Cs"]), min_size=1
        ),
        min_size=3,
        max_size=3,
        unique=True,
    ),
    st.sampled_from([".txt", ".bin"]),
)
def test_any_finite_float32_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    table: NDArray[np.float32],
    tokens: list[str],
    suffix: str,
) -> None:
    path = tmp_path_factory.mktemp("vectors") / f"a{suffix}"
    save_vectors(path, tokens, table)
    found = read_vectors(path)
    assert found.tokens == tokens
    assert same_bits(found.values, table)


@pytest.mark.parametrize(
    ("name", "tokens", "table", "said"),
    [
        ("a.npy", ["a"], [[1.0]], r"\.txt, \.vec, \.bin.*Received: .*a\.npy"),
        ("a.txt", ["a b"], [[1.0]], "whitespace.*Received: 'a b'"),
        ("a.bin", ["a\n"], [[1.0]], r"whitespace.*Received: 'a\\n'"),
        ("a.txt", [""], [[1.0]], "empty.*Received: ''"),
        ("a.txt", ["a\ud800"], [[1.0]], r"surrogate.*Received: 'a\\ud800'"),
        ("a.txt", ["a", "a"], [[1.0], [2.0]], "once.*Received: 'a' twice"),
        ("a.txt", ["a"], [[1.0], [2.0]], r"Received: shape \(2, 1\) for 1 tokens"),
        ("a.txt", ["a"], [1.0], r"Received: shape \(1,\) for 1 tokens"),
        ("a.txt", [], np.zeros((0, 2)), r"Received: shape \(0, 2\) for 0 tokens"),
        ("a.txt", ["a", "b"], [[1.0], [np.nan]], r"finite.*Received: \[nan\] for 'b'"),
        ("a.bin", ["a", "b"], [[1.0], [1e39]], r"finite.*Received: \[inf\] for 'b'"),
    ],
)
def test_vectors_that_could_not_be_read_are_not_saved(
    tmp_path: Path, name: str, tokens: list[str], table: object, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        save_vectors(tmp_path / name, tokens, table)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, suffix: str, largest_file: Any
) -> None:
    path = tmp_path / f"table{suffix}"
    save_vectors(path, TOKENS, TABLE)
    before = path.read_bytes()
    large = np.random.default_rng(0).normal(size=(4, 10_000))
    with pytest.raises(OSError, match="File too large"), largest_file(20_000):
        save_vectors(path, TOKENS, large)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


DOCUMENTS = [
    ["the", "film", "is", "good"],
    ["the", "film", "is", "bad"],
    ["the", "plot", "is", "good", "<unk>"],
] * 20 + [["rare", "the"]]
SMALL = {"dimension": 5, "epochs": 2}


def test_training_leaves_out_rare_tokens() -> None:
    found = train_vectors(DOCUMENTS, **SMALL)
    assert set(found.tokens) == {"the", "film", "is", "good", "bad", "plot", "<unk>"}
    assert found.tokens[0] == "the"
    assert found.values.shape == (7, 5)
    assert found.values.dtype == np.float32
    assert "rare" in train_vectors(DOCUMENTS, min_count=1, **SMALL).index


def test_training_depends_on_the_seed_and_the_documents() -> None:
    found = train_vectors(DOCUMENTS, **SMALL).values
    assert same_bits(found, train_vectors(DOCUMENTS, **SMALL).values)
    assert not same_bits(found, train_vectors(DOCUMENTS, seed=1, **SMALL).values)
    assert not same_bits(found, train_vectors(DOCUMENTS[::-1], **SMALL).values)


def test_training_moves_the_vectors() -> None:
    begun = train_vectors(DOCUMENTS, dimension=5, epochs=1).values
    assert not np.allclose(begun, train_vectors(DOCUMENTS, dimension=5, epochs=9).values)


def test_training_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys; from partial_embedding.recipes.vectors import train_vectors;"
        "documents = [['a', 'b', str(i % 7), str(i % 5)] for i in range(9000)];"
        "v = train_vectors(documents, dimension=8, epochs=3, cache=sys.argv[1]);"
        "print(v.tokens, v.values.tobytes().hex())"
    )
    there = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "there")],
        env={**os.environ, "PYTHONHASHSEED": "1"},  # another one than this process's
        capture_output=True,
        text=True,
        check=True,
    )
    documents = [["a", "b", str(i % 7), str(i % 5)] for i in range(9000)]
    here = train_vectors(documents, dimension=8, epochs=3, cache=tmp_path / "here")
    assert there.stdout == f"{here.tokens} {here.values.tobytes().hex()}\n"
    assert len({file.name for file in tmp_path.glob("*/*")}) == 1


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count how often vectors are really trained."""
    counted: list[int] = []

    class Counting(tables.Word2Vec):  # type: ignore[misc]  # gensim has no types
        def __init__(self, *arguments: object, **settings: object) -> None:
            counted.append(1)
            super().__init__(*arguments, **settings)

    monkeypatch.setattr(tables, "Word2Vec", Counting)
    return counted


def test_a_cache_keeps_the_result(tmp_path: Path, trainings: list[int]) -> None:
    cache = tmp_path / "new" / "cache"
    fresh = train_vectors(DOCUMENTS, **SMALL)
    for _ in range(2):
        kept = train_vectors(DOCUMENTS, cache=cache, **SMALL)
        assert kept.tokens == fresh.tokens
        assert same_bits(kept.values, fresh.values)
    assert len(trainings) == 2
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "other",
    [{"dimension": 6}, {"epochs": 3}, {"seed": 1}, {"min_count": 2}, {"documents": DOCUMENTS[1:]}],
)
def test_a_cache_tells_other_arguments_apart(
    tmp_path: Path, trainings: list[int], other: dict[str, object]
) -> None:
    arguments: dict[str, object] = {"documents": DOCUMENTS, **SMALL, "cache": tmp_path}
    train_vectors(**arguments)  # type: ignore[arg-type]
    train_vectors(**{**arguments, **other})  # type: ignore[arg-type]
    assert len(trainings) == len(list(tmp_path.iterdir())) == 2


def test_a_cache_tells_the_limits_of_documents_apart(tmp_path: Path) -> None:
    for documents in ([["a", "b"], ["c"]], [["a"], ["b", "c"]], [["a", "bc"], ["c"]]):
        train_vectors(documents * 9, cache=tmp_path, **SMALL)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "flipped"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, trainings: list[int], damage: str) -> None:
    fresh = train_vectors(DOCUMENTS, cache=tmp_path, **SMALL)
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    middle = len(good) // 2
    file.write_bytes(
        {
            "cut": good[:middle],
            "empty": b"",
            "garbage": b"garbage",
            "flipped": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
        }[damage]
    )
    for _ in range(2):
        again = train_vectors(DOCUMENTS, cache=tmp_path, **SMALL)
        assert same_bits(again.values, fresh.values)
    assert len(trainings) == 2
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        (
            [["a", "b"], ["a"]],
            "min_count=3 times. Received: 2 different tokens, the most frequent 2",
        ),
        ([], "Received: 0 different tokens, the most frequent 0"),
    ],
)
def test_documents_that_cannot_be_trained_on_are_refused(
    documents: list[list[str]], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        train_vectors(documents)


def test_each_row_gets_its_vector_or_is_missing() -> None:
    known = WordVectors(["the", "The", "film"], np.array([[1, 2], [3, 4], [5, 6]], np.float32))
    vocabulary = Vocabulary(["<pad>", "<unk>", "The", "FILM", "zyzzyva", "the"], [0, 0, 5, 4, 3, 2])
    table, described = build_table(vocabulary, known)
    assert table.dtype == np.float32
    assert table[[0, 2, 3, 5]].tolist() == [[0, 0], [3, 4], [5, 6], [1, 2]]
    assert described == Vocabulary(vocabulary.tokens, vocabulary.counts, missing=[1, 4])
    assert vocabulary.missing is None
    assert np.all(table[[1, 4]] != 0)


def test_padding_is_zero_even_where_it_has_a_vector() -> None:
    known = WordVectors(["<pad>", "a"], np.array([[1, 2], [3, 4]], np.float32))
    table, described = build_table(Vocabulary(["a", "<pad>"]), known)
    assert table.tolist() == [[3, 4], [0, 0]]
    assert described.missing is not None
    assert described.missing.tolist() == []


def test_missing_rows_are_drawn_at_the_scale_of_each_dimension() -> None:
    rng = np.random.default_rng(0)
    known = (rng.normal(size=(4000, 3)) * [0.1, 1, 10] + [5, 0, -70]).astype(np.float32)
    tokens = [f"known{i}" for i in range(4000)]
    vocabulary = Vocabulary(["<pad>", *tokens, *(f"missing{i}" for i in range(4000))])
    table, described = build_table(vocabulary, WordVectors(tokens, known))
    assert described.missing is not None
    drawn = table[described.missing]
    assert drawn.shape == (4000, 3)
    np.testing.assert_allclose(drawn.std(axis=0), [0.1, 1, 10], rtol=0.1)
    np.testing.assert_allclose(drawn.mean(axis=0) / [0.1, 1, 10], 0, atol=0.1)
    assert len(np.unique(drawn)) > 11_900


def test_missing_rows_depend_on_the_seed_alone() -> None:
    known = WordVectors(["a"], np.array([[1, 2]], np.float32))
    vocabulary = Vocabulary(["a", "b"])
    table = build_table(vocabulary, known)[0]
    assert same_bits(table, build_table(vocabulary, known)[0])
    assert not same_bits(table, build_table(vocabulary, known, seed=1)[0])
    assert np.all(table[1] != 0)


def test_a_table_does_not_share_memory_with_the_vectors() -> None:
    known = WordVectors(["a"], np.array([[1, 2]], np.float32))
    build_table(Vocabulary(["a"]), known)[0][:] = 9
    assert known["a"].tolist() == [1, 2]


@pytest.mark.parametrize("tokens", [["<pad>", "ФИЛЬМ"], []])
def test_vectors_of_other_tokens_are_refused(tokens: list[str]) -> None:
    known = WordVectors(["a", "<pad>"], np.ones((2, 2), np.float32))
    with pytest.raises(InputError, match=rf"Received: {len(tokens)} tokens.*'a'.*language or case"):
        build_table(Vocabulary(tokens), known)


def test_missing_rows_are_drawn_at_the_scale_that_is_asked_for() -> None:
    known = WordVectors(["a", "b", "c"], np.array([[1, 2], [3, 5], [4, 4]], np.float32))
    vocabulary = Vocabulary(["a", "b", "c", *(f"x{i}" for i in range(50))])
    table, half, none = (build_table(vocabulary, known, scale=s)[0] for s in (1.0, 0.5, 0.0))
    assert np.allclose(half[3:], table[3:] / 2)
    assert table[3:].any()
    assert not none[3:].any()
    assert half[:3].tobytes() == table[:3].tobytes()
    with pytest.raises(InputError, match=r"not negative\. Received: -1"):
        build_table(vocabulary, known, scale=-1)
