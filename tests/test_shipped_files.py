"""Texts and vectors as they are really shipped: read as meant, or refused with help."""

import bz2
import gzip
import lzma
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gensim")

from gensim.corpora import Dictionary
from gensim.models import FastText, KeyedVectors, Word2Vec
from gensim.models.fasttext import save_facebook_model

from partial_embedding.cli import main
from partial_embedding.errors import InputError
from partial_embedding.recipes.predictions import write_table
from partial_embedding.recipes.prepare_texts import classes_text
from partial_embedding.recipes.text import LabelledTexts, read_labelled, read_texts
from partial_embedding.recipes.vectors import formats, opening, read_vectors, reading
from partial_embedding.rows.vocabulary_file import read_vocabulary

TEXT = b"the 0.5 1\nof -2 1e-3\n"
VALUES = [[0.5, 1.0], [-2.0, float(np.float32(1e-3))]]


def zipped(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/", b"")
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr("__MACOSX/._a.txt", b"rubbish")


PACKED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "gzip": ("a.txt.gz", lambda path: path.write_bytes(gzip.compress(TEXT))),
    "gzip_without_suffix": ("a", lambda path: path.write_bytes(gzip.compress(TEXT))),
    "gzip_called_txt": ("a.txt", lambda path: path.write_bytes(gzip.compress(TEXT))),
    "bzip2": ("a.txt.bz2", lambda path: path.write_bytes(bz2.compress(TEXT))),
    "xz": ("a.txt.xz", lambda path: path.write_bytes(lzma.compress(TEXT))),
    "zip": ("a.zip", lambda path: zipped(path, **{"a.txt": TEXT})),
    "byte_order_mark": ("a.txt", lambda path: path.write_bytes(b"\xef\xbb\xbf" + TEXT)),
    "mark_and_header": ("a.vec", lambda path: path.write_bytes(b"\xef\xbb\xbf2 2\n" + TEXT)),
}


@pytest.mark.parametrize(("name", "write"), PACKED.values(), ids=PACKED)
def test_packed_vectors_are_read(
    name: str, write: Callable[[Path], object], tmp_path: Path
) -> None:
    write(tmp_path / name)
    found = read_vectors(tmp_path / name)
    assert list(found.tokens) == ["the", "of"]
    assert found.values.tolist() == VALUES
    assert found.notes == ()


def test_a_zip_of_several_is_refused_with_their_names(tmp_path: Path) -> None:
    zipped(tmp_path / "glove.zip", **{"glove.50d.txt": TEXT, "glove.100d.txt": TEXT})
    with pytest.raises(InputError, match=r"glove\.50d\.txt, glove\.100d\.txt.*zipfile -e glove"):
        read_vectors(tmp_path / "glove.zip")
    # The remedy.
    with zipfile.ZipFile(tmp_path / "glove.zip") as archive:
        archive.extractall(tmp_path)
    assert read_vectors(tmp_path / "glove.50d.txt").tokens == ["the", "of"]


def pack_by_zstandard(content: bytes) -> bytes:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.compress(content)
    packed: bytes = pytest.importorskip("backports.zstd").compress(content)
    return packed


def test_zstandard_is_read_also_in_several_frames(tmp_path: Path) -> None:
    whole = pack_by_zstandard(TEXT)
    frames = b"".join(pack_by_zstandard(line + b"\n") for line in TEXT.splitlines())
    for name, packed in (("a.txt.zst", whole), ("b.txt.zst", frames), ("c", whole)):
        (tmp_path / name).write_bytes(packed)
        found = read_vectors(tmp_path / name)
        assert (list(found.tokens), found.values.tolist()) == (["the", "of"], VALUES)


@pytest.mark.parametrize("damage", ["cut off", "another byte", "rubbish behind"])
def test_damaged_zstandard_is_refused(damage: str, tmp_path: Path) -> None:
    packed = pack_by_zstandard(TEXT * 1000)
    damaged = {
        "cut off": packed[: len(packed) // 2],
        "another byte": packed[:6] + bytes([packed[6] ^ 255]) + packed[7:],
        "rubbish behind": packed + b"x" * 50,
    }
    (tmp_path / "a.txt.zst").write_bytes(damaged[damage])
    with pytest.raises(InputError, match=r"the word vectors can be read.*a\.txt\.zst"):
        read_vectors(tmp_path / "a.txt.zst")


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python itself reads it from 3.14 on")
def test_zstandard_without_its_package_is_refused_with_a_remedy_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "zstd", None)
    (tmp_path / "a.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd" + b"x" * 50)
    with pytest.raises(InputError, match=r"need the package backports\.zstd.*a\.txt\.zst"):
        read_vectors(tmp_path / "a.txt.zst")
    # The remedy, as the command that is named would have done it.
    (tmp_path / "a.txt").write_bytes(TEXT)
    assert read_vectors(tmp_path / "a.txt").values.tolist() == VALUES


def test_tokens_with_spaces_are_read_and_counted(tmp_path: Path) -> None:
    lines = ["the 0.5 1", ". . . 2 3", "at name@domain.com 4 5"]
    (tmp_path / "glove.840B.txt").write_text("\n".join(lines))
    found = read_vectors(tmp_path / "glove.840B.txt")
    assert list(found.tokens) == ["the", ". . .", "at name@domain.com"]
    assert found.values[1].tolist() == [2.0, 3.0]
    assert found.notes == ("2 tokens have spaces, which no token of a text has",)


def binary(*rows: tuple[bytes, list[float]], kind: str = "<f4", size: int = 2) -> bytes:
    body = b"".join(token + b" " + np.array(v, kind).tobytes() + b"\n" for token, v in rows)
    return f"{len(rows)} {size}\n".encode() + body


def test_values_of_16_bits_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(f"token{i}".encode(), rng.normal(size=30).tolist()) for i in range(300)]
    (tmp_path / "half.bin").write_bytes(binary(*rows, kind="<f2", size=30))
    found = read_vectors(tmp_path / "half.bin")
    assert len(found) == 300
    assert found.values[299].tolist() == np.array(rows[299][1], np.float16).tolist()
    assert found.notes == ("300 vectors are of 16 bits a value",)


def test_a_token_cut_inside_a_character_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [(b"the", [1.0, 2.0]), ("й".encode()[:1], [3.0, 4.0]), (b"of", [5.0, 6.0])]
    (tmp_path / "cut.bin").write_bytes(binary(*rows))
    found = read_vectors(tmp_path / "cut.bin")
    assert list(found.tokens) == ["the", "of"]
    assert found.values.tolist() == [[1, 2], [5, 6]]
    assert found.notes == ("1 tokens are cut inside a character and were left out",)


def test_a_token_that_comes_again_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT + b"the 7 8\n")
    assert read_vectors(tmp_path / "a.txt").notes == (
        "1 tokens occur again, of which the first vector counts",
    )


SENTENCES = [["the", "film", "of", "the", "year"], ["a", "film", "of", "film"]] * 5


def test_files_of_gensim_and_fasttext_are_read(tmp_path: Path) -> None:
    trained = Word2Vec(SENTENCES, vector_size=4, min_count=1, workers=1, seed=1)
    trained.save(str(tmp_path / "w.model"))
    trained.wv.save(str(tmp_path / "w.kv"))
    for name in ("w.model", "w.kv"):
        found = read_vectors(tmp_path / name, dimension=4)
        assert list(found.tokens) == trained.wv.index_to_key
        assert found.values.tolist() == trained.wv.vectors.tolist()
    model = FastText(SENTENCES, vector_size=4, min_count=1, workers=1, seed=1, bucket=50)
    save_facebook_model(model, str(tmp_path / "f.bin"))
    found = read_vectors(tmp_path / "f.bin")
    assert list(found.tokens) == model.wv.index_to_key
    np.testing.assert_allclose(found["film"], model.wv["film"], rtol=1e-5)


def test_a_damaged_model_of_fasttext_names_the_other_file(tmp_path: Path) -> None:
    (tmp_path / "cc.bin").write_bytes(b"\xba\x16\x4f\x2f" + bytes(range(200)))
    with pytest.raises(InputError, match=r"cc\.bin: a model of fastText.*\.vec file"):
        read_vectors(tmp_path / "cc.bin")


def test_a_large_array_of_gensim_that_was_left_behind_is_named(tmp_path: Path) -> None:
    vectors = KeyedVectors(4)
    vectors.add_vectors(["a"], np.ones((1, 4), np.float32))
    vectors.save(str(tmp_path / "v.kv"), sep_limit=0)
    assert read_vectors(tmp_path / "v.kv")["a"].tolist() == [1, 1, 1, 1]
    (tmp_path / "v.kv.vectors.npy").unlink()
    with pytest.raises(InputError, match=r"v\.kv\.vectors\.npy, which is missing\. Copy it too"):
        read_vectors(tmp_path / "v.kv")


def test_what_gensim_saved_without_vectors_or_did_not_save_is_refused(tmp_path: Path) -> None:
    Dictionary(SENTENCES).save(str(tmp_path / "words.model"))
    with pytest.raises(InputError, match=r"holds word vectors\. Received: Dictionary"):
        read_vectors(tmp_path / "words.model")
    (tmp_path / "a.kv").write_bytes(b"no pickle")
    with pytest.raises(InputError, match=r"a\.kv: a \.kv or \.model is a file that gensim saved"):
        read_vectors(tmp_path / "a.kv")


@pytest.mark.parametrize("value", [np.nan, 1e300])
def test_an_array_of_what_is_not_finite_in_32_bits_is_refused(value: float, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.array([[1, 2], [3, value]]))
    (tmp_path / "v.txt").write_text("the\nof\n")
    with pytest.raises(InputError, match=r"vector of 'of' in .*v\.npy"):
        read_vectors(tmp_path / "v.npy")


@pytest.mark.parametrize("beside", ["v.tsv", "v.txt", "vocab.txt"])
def test_an_array_has_its_tokens_beside(beside: str, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.array(VALUES, np.float32))
    with pytest.raises(InputError, match=r"v\.npy without\. Write them, one a line, to v\.txt"):
        read_vectors(tmp_path / "v.npy")
    (tmp_path / beside).write_text("the\nof\n")
    found = read_vectors(tmp_path / "v.npy")
    assert (list(found.tokens), found.values.tolist()) == (["the", "of"], VALUES)
    (tmp_path / beside).write_text("the\n")
    with pytest.raises(InputError, match=r"each of the 1 tokens.*shape \(2, 2\)"):
        read_vectors(tmp_path / "v.npy")


# Text is converted once


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as large, with a token twice, a token with a space, and blocks of rows."""
    monkeypatch.setattr(reading, "_KEPT_FROM", 1)
    monkeypatch.setattr(formats, "_ROWS", 4)
    lines = [f"w{i} {i}.5 {-i}" for i in range(10)] + ["a b 1 2", "w3 9 9"]
    path = tmp_path / "large.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_large_file_is_read_once_and_then_mapped(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = read_vectors(large)
    cache = tmp_path / "cache"
    first = read_vectors(large, cache=cache)
    monkeypatch.setattr(reading, "read_blocks", lambda *_: pytest.fail("it was read again"))
    second = read_vectors(large, 2, cache)
    for kept in (first, second):
        assert list(kept.tokens) == list(plain.tokens)
        assert kept.values.tobytes() == plain.values.tobytes()
        assert kept.notes == plain.notes
        assert not kept.values.flags.owndata  # it lies in the file
    assert len(plain.notes) == 2
    with pytest.raises(InputError, match=r"3 values each\. Received: 2"):
        read_vectors(large, 3, cache)


def test_a_file_that_changed_is_read_again(large: Path, tmp_path: Path) -> None:
    read_vectors(large, cache=tmp_path / "cache")
    large.write_text("new 1 2\n")
    assert list(read_vectors(large, cache=tmp_path / "cache").tokens) == ["new"]


def test_a_file_that_is_refused_leaves_nothing_in_the_cache(large: Path, tmp_path: Path) -> None:
    large.write_text(large.read_text() + "bad 1 x\n")
    with pytest.raises(InputError, match="'x'"):
        read_vectors(large, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# Texts


def read(path: Path, content: str | bytes, *columns: str | int) -> tuple[list[str], list[str]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    said: list[str] = []
    found = read_labelled(path, *columns, say=said.append)  # type: ignore[arg-type]
    pairs = [f"{found.names[k]}: {t}" for t, k in zip(found.texts, found.labels, strict=True)]
    return pairs, said


def test_a_tab_file_has_no_quotes(tmp_path: Path) -> None:
    content = 'text\tlabel\n"open good\tpos\na "so, so" film\tneg\nends" here\tneg\n'
    pairs, said = read(tmp_path / "glue.tsv", content)
    assert pairs == ['pos: "open good', 'neg: a "so, so" film', 'neg: ends" here']
    assert said == []


def test_a_column_in_quotes_loses_them_and_says_so(tmp_path: Path) -> None:
    content = 'id\tsentiment\treview\n"1"\t1\t"a \\"good\\" film"\n"2"\t0\t"so ""so"""\n'
    pairs, said = read(tmp_path / "kaggle.tsv", content, "review", "sentiment")
    assert pairs == ['1: a "good" film', '0: so "so"']
    assert said == [f"{tmp_path / 'kaggle.tsv'}: 4 values were all in quotes, which were taken off"]


def test_a_field_may_have_any_length(tmp_path: Path) -> None:
    long = "word " * 60_000
    pairs, _ = read(tmp_path / "a.csv", f'text,label\n"{long}",x\nb,y\n')
    assert len(pairs[0]) > 299_000


def test_half_a_character_is_marked_and_said(tmp_path: Path) -> None:
    content = '{"text": "cut \\ud83d", "label": 1}\n{"text": "whole \\ud83d\\ude00", "label": 2}\n'
    pairs, said = read(tmp_path / "a.jsonl", content)
    assert pairs == ["1: cut \ufffd", "2: whole 😀"]
    assert said == [
        f"{tmp_path / 'a.jsonl'}: 1 texts had half of a surrogate pair, which became \ufffd"
    ]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["5.0", "1.0", "5"], ("1", "5")),
        (['"sci fi"', '" sci  fi "', '"drama"'], ("drama", "sci fi")),
        (["1", '"1.0"', "2.5"], ("1", "2.5")),
        (["true", "false", "true"], ("false", "true")),
    ],
)
def test_labels_that_mean_the_same_are_one_class(
    labels: list[str], names: tuple[str, ...], tmp_path: Path
) -> None:
    content = "".join(f'{{"text": "t{i}", "label": {x}}}\n' for i, x in enumerate(labels))
    (tmp_path / "a.jsonl").write_text(content)
    assert read_labelled(tmp_path / "a.jsonl").names == names


def test_a_file_without_header_is_refused_with_a_remedy_that_works(tmp_path: Path) -> None:
    path = tmp_path / "cola.tsv"
    content = "gj04\t1\t\ta good one\nbc01\t0\t*\tone bad a\n"
    with pytest.raises(InputError, match="numbers of columns from 1"):
        read(path, content)
    assert read(path, content, 4, 2)[0] == ["1: a good one", "0: one bad a"]
    assert read_texts(path, "4") == ["a good one", "one bad a"]
    with pytest.raises(InputError, match=r"numbered from 1 to 4 in .*Received: 5"):
        read(path, content, 5, 2)


def test_what_is_passed_over_is_counted(tmp_path: Path) -> None:
    _, said = read(tmp_path / "a.ft", "__label__x a\n\n\n__label__y b\n")
    assert said == [f"{tmp_path / 'a.ft'}: 2 empty lines were passed over"]
    for name in ("x/1.txt", "y/2.txt", "y/.hidden", ".git/config"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text("a text")
    noted: list[str] = []
    assert len(read_labelled(tmp_path / "texts", say=noted.append)) == 2
    assert noted == [f"{tmp_path / 'texts'}: 2 hidden files were passed over"]


def test_names_of_classes_cannot_write_into_the_terminal() -> None:
    texts = LabelledTexts(("a",), np.zeros(1, np.int64), ("\x1b[31mred\u202e",))
    line = classes_text(texts, texts)
    assert "red" in line
    assert line.isprintable()


def test_neither_can_errors_and_predictions(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["\x1b[31mfit"]) == 2
    assert capsys.readouterr().err.rstrip("\n").isprintable()
    for seen, said in ((True, r"\x1b[2J"), (False, "\x1b[2J")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda seen=seen: seen)
        write_table("-", ["text"], [["\x1b[2J"]])
        assert capsys.readouterr().out == f"text\n{said}\n"


# What is no file


@pytest.mark.parametrize(
    "reader", [read_vectors, read_labelled, read_texts, read_vocabulary], ids=lambda f: f.__name__
)
def test_a_device_or_a_folder_is_refused_at_once(
    reader: Callable[[Path], object], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (Path("/dev/zero"), tmp_path / "pipe"):
        with pytest.raises(InputError, match=str(place)):
            reader(place)
    if reader in (read_vectors, read_vocabulary):
        with pytest.raises(InputError, match=str(tmp_path)):
            reader(tmp_path)


def test_a_large_file_is_read_with_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    (tmp_path / "glove.txt").write_bytes(TEXT)
    monkeypatch.setattr(opening, "_SHOWN_FROM", 1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert read_vectors(tmp_path / "glove.txt").values.tolist() == VALUES
    assert "glove.txt" in capsys.readouterr().err
