import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from partial_embedding.errors import InputError
from partial_embedding.recipes.prepare_texts import TextSettings, padded
from partial_embedding.recipes.text import (
    PADDING,
    UNKNOWN,
    LabelledTexts,
    count_tokens,
    read_labelled,
    read_texts,
    split,
    stdlib_docstrings,
    tokenize,
)
from partial_embedding.rows.vocabulary import Vocabulary

FILMS = [("a joy", "pos"), ("a bore", "neg"), ("so, so", "neg"), ('the "end"', "pos")]


def labelled(*pairs: tuple[str, str]) -> LabelledTexts:
    names = tuple(sorted({name for _, name in pairs}))
    labels = np.array([names.index(name) for _, name in pairs], np.int64)
    return LabelledTexts(tuple(text for text, _ in pairs), labels, names)


def pairs_of(examples: LabelledTexts) -> list[tuple[str, str]]:
    return [
        (text, examples.names[label])
        for text, label in zip(examples.texts, examples.labels, strict=True)
    ]


GOOD = {
    "films.csv": 'text,label\na joy,pos\na bore,neg\n\n"so, so",neg\n"the ""end""",pos\n',
    "columns.CSV": 'id,label,text\n1,pos,a joy\n2,neg,a bore\n3,neg,"so, so"\n'
    '4,pos,"the ""end"""\n',
    "windows.csv": '\ufefftext,label\r\na joy,pos\r\na bore,neg\r\n"so, so",neg\r\n'
    '"the ""end""",pos\r\n',
    "films.tsv": 'text\tlabel\na joy\tpos\na bore\tneg\nso, so\tneg\nthe "end"\tpos\n',
    "films.jsonl": '{"text": "a joy", "label": "pos"}\n{"text": "a bore", "label": "neg", "x": 1}\n'
    '\n{"text": "so, so", "label": "neg"}\r\n{"label": "pos", "text": "the \\"end\\""}',
    "films.txt": "__label__pos a joy\n__label__neg a bore\n\n__label__neg so, so\n"
    '__label__pos the "end"\n',
    "films.ft": "__label__pos\ta joy\r\n__label__neg a bore\r\n__label__neg so, so\r\n"
    '__label__pos the "end"',
}


@pytest.mark.parametrize("name", GOOD)
def test_every_format_reads_the_same(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(GOOD[name], encoding="utf-8", newline="")
    examples = read_labelled(tmp_path / name)
    assert pairs_of(examples) == FILMS
    assert examples.names == ("neg", "pos")
    assert examples.labels.dtype == np.int64


def test_a_folder_per_class_is_read_in_sorted_order(tmp_path: Path) -> None:
    for name, content in {
        "pos/2": "b",
        "pos/1": "a",
        "neg/deep/x.txt": "ü",
        "neg/.hidden": "no",
        ".git/config": "no",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "README").write_text("no")
    assert pairs_of(read_labelled(tmp_path)) == [("ü", "neg"), ("a", "pos"), ("b", "pos")]


def test_columns_can_be_named_otherwise(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("review,stars\ngood,5\nbad,1\n")
    (tmp_path / "a.jsonl").write_text(
        '{"review": "good", "stars": 5}\n{"review": "bad", "stars": true}\n'
    )
    assert read_labelled(tmp_path / "a.csv", "review", "stars").names == ("1", "5")
    assert read_labelled(tmp_path / "a.jsonl", "review", "stars").names == ("5", "true")


def test_separators_inside_a_text_do_not_end_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("__label__a x\u2028y\n__label__b z\x85\n", encoding="utf-8")
    assert read_labelled(tmp_path / "a.txt").texts == ("x\u2028y", "z\x85")


JSON = '{"text": "a", "label": "x"}\n'
# The file's name, its content, and what the message must say was received.
BAD = {
    "empty csv": ("a.csv", b"", ["a.csv, which has none"]),
    "header only": ("a.csv", b"text,label\n", ["a.csv, which has none"]),
    "one class": ("a.csv", b"text,label\na,x\nb,x\n", ["all 2 are 'x'", "'label'"]),
    "unknown suffix": ("a.xlsx", b"text", ["'.xlsx'", ".csv, .tsv, .jsonl"]),
    "no text column": ("a.csv", b"review,label\na,x\n", ["'text'", "'review', 'label'"]),
    "long row": ("a.csv", b"text,label\na,x\nb,c,y\n", ["2 columns", "Received: 3", "line 3"]),
    "open quote": ("a.csv", b'text,label\na,x\n"b,y\n', ["unexpected end", "line 3"]),
    "blank text": ("a.csv", b"text,label\na,x\n ,y\n", ["a text", "' '", "line 3"]),
    "blank label": ("a.csv", b"text,label\na,x\nb,\n", ["a label", "''", "line 3"]),
    "not utf-8": ("a.csv", b"text,label\na,x\nb\xe9,y\n", ["0xe9", "line 3"]),
    "not utf-8 after a mark": ("a.txt", b"\xef\xbb\xbf__label__x a\n\xff", ["0xff", "line 2"]),
    "malformed json": ("a.jsonl", f"{JSON}{{text: 1\n".encode(), ["'{text: 1'", "line 2"]),
    "deep json": ("a.jsonl", b"[" * 100_000, ["line 1"]),
    "json list": ("a.jsonl", f"\n{JSON}[1]\n".encode(), ["[1]", "line 3"]),
    "no json text": ("a.jsonl", b'{"review": "a", "label": "x"}', ["'text'", "'review', 'label'"]),
    "number as text": ("a.jsonl", b'{"text": 7, "label": "x"}', ["'text' is str", "7", "line 1"]),
    "null label": ("a.jsonl", b'{"text": "a", "label": null}', ["str or int", "None", "line 1"]),
    "no fasttext label": ("a.txt", b"__label__x a\nplain\n", ["'plain'", "line 2"]),
    "no fasttext text": ("a.txt", b"__label__x a\n__label__y\n", ["a text", "line 2"]),
    "missing": ("no.csv", None, ["no.csv, which is missing"]),
    "two labels": ("a.ft", b"__label__x __label__y a\n", ["one label", "__label__y", "line 1"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, case: str, refused: Any) -> None:
    name, content, said = BAD[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = refused(read_labelled, tmp_path / name, parts=[name, *said])
    assert len(message) < 300 + 2 * len(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("new.csv", "text\na joy\na bore\n"),
        ("new.csv", "a joy\na bore\n"),
        ("new.tsv", "id\ttext\n1\ta joy\n2\ta bore\n"),
        ("new.jsonl", '{"text": "a joy"}\n{"text": "a bore"}\n'),
        ("new.txt", "a joy\n\na bore\n"),
        ("new.ft", "__label__pos a joy\n__label__other a bore\n"),
    ],
)
def test_texts_without_labels_are_read(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert read_texts(tmp_path / name) == ["a joy", "a bore"]


@pytest.mark.parametrize(("name", "reads"), [("a.csv", "read_bytes"), (".", "iterdir")])
def test_what_cannot_be_read_is_refused(
    name: str, reads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.csv").write_text("text,label\n")
    monkeypatch.setattr(Path, reads, refuse)
    with pytest.raises(InputError, match=rf"Permission denied for .*{(tmp_path / name).name}"):
        read_labelled(tmp_path / name)


@pytest.mark.parametrize(
    ("made", "said"),
    [([], "which holds none"), (["a/1", "b/"], "b, which has none"), (["a/1"], "all 1 are 'a'")],
)
def test_a_bad_folder_is_refused(tmp_path: Path, made: list[str], said: str) -> None:
    for name in made:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_text("text")
    with pytest.raises(InputError, match=said):
        read_labelled(tmp_path)


@pytest.fixture(scope="module")
def docstrings() -> LabelledTexts:
    return stdlib_docstrings()


def test_docstrings_of_the_standard_library_are_varied_and_balanced(
    docstrings: LabelledTexts,
) -> None:
    sizes = np.bincount(docstrings.labels)
    assert len(docstrings) > 2500
    assert 20 <= len(docstrings.names) == len(sizes)
    assert sizes.min() >= 50
    assert sizes.max() <= 150
    assert len(set(docstrings.texts)) == len(docstrings)
    assert all(len(text.split()) >= 4 and "\n" not in text for text in docstrings.texts)


def test_docstrings_are_chosen_independently_of_the_split(docstrings: LabelledTexts) -> None:
    for seed in range(3):
        validation = split(docstrings, validation_share=0.15, seed=seed)[1]
        assert len(validation) / len(docstrings) == pytest.approx(0.15, abs=0.02)


def test_docstrings_are_the_same_in_every_process_and_without_warnings(
    docstrings: LabelledTexts,
) -> None:
    code = (
        "from partial_embedding.recipes.text import stdlib_docstrings; d = stdlib_docstrings();"
        "print(ascii((d.texts, d.labels.tolist())))"
    )
    found = subprocess.run(
        [sys.executable, "-OO", "-W", "error", "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1"},  # another one than this process's
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == f"{(docstrings.texts, docstrings.labels.tolist())!a}\n"
    assert found.stderr == ""


@pytest.mark.parametrize("lacks", ["sources", "a module"])
def test_a_python_without_sources_is_refused(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacks == "sources":
        monkeypatch.setattr(inspect, "getfile", lambda _: "gone.py")
    else:
        monkeypatch.setitem(sys.modules, "codecs", None)  # so an import fails
    with pytest.raises(InputError, match=r"a Python without that of codecs\. Name a file"):
        stdlib_docstrings()


MANY = labelled(*((f"text {i}", "ab"[i % 2]) for i in range(2000)))


def test_a_split_divides_by_the_share_and_keeps_every_example() -> None:
    training, validation = split(MANY, validation_share=0.2)
    assert sorted(pairs_of(training) + pairs_of(validation)) == sorted(pairs_of(MANY))
    assert 0.17 < len(validation) / len(MANY) < 0.23
    assert training.names == validation.names == MANY.names
    assert list(training.texts) == [t for t in MANY.texts if t in set(training.texts)]


def test_a_text_keeps_its_side_when_others_come_and_move() -> None:
    held_out = set(split(MANY)[1].texts)
    more = labelled(*((f"new {i}", "c") for i in range(99)), *reversed(pairs_of(MANY)))
    assert {t for t in split(more)[1].texts if t.startswith("text")} == held_out
    assert held_out == set(split(MANY)[1].texts)
    assert held_out != set(split(MANY, seed=1)[1].texts)


def test_a_larger_share_only_adds_to_the_validation_side() -> None:
    assert set(split(MANY, 0.1)[1].texts) < set(split(MANY, 0.3)[1].texts)


def test_equal_texts_fall_on_the_same_side() -> None:
    doubled = labelled(*pairs_of(MANY), *((text, "c") for text in MANY.texts))
    training, validation = split(doubled)
    assert set(training.texts).isdisjoint(validation.texts)
    assert len(validation) == 2 * len(split(MANY)[1])


def test_a_split_is_a_fixed_function() -> None:
    # Another hash would move examples between the sides of runs that are resumed.
    training, validation = split(
        labelled(*((c, "ab"[i % 2]) for i, c in enumerate("abcdefgh"))), 0.5
    )
    assert (training.texts, validation.texts) == (tuple("cdeg"), tuple("abfh"))


def test_half_a_surrogate_pair_falls_on_a_side() -> None:
    odd = labelled(*((f"\ud800 {i}", "ab"[i % 2]) for i in range(99)))
    assert sum(map(len, split(odd))) == 99


@pytest.mark.parametrize("share", [0, 1, -0.1, 15, float("nan")])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(InputError, match=rf"validation_share.*Received: {share}"):
        split(MANY, validation_share=share)


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_a_split_with_an_empty_side_is_refused(share: float) -> None:
    with pytest.raises(InputError, match=r"Received: (0|4) for training and (4|0) for validation"):
        split(labelled(*FILMS), validation_share=share)


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("Don't stop.", "do n't stop ."),
        ("DON\u2019T", "do n't"),
        ("it's the dog's, we'll see", "it 's the dog 's , we 'll see"),
        ("can't won't", "ca n't wo n't"),
        ("is n't it 's", "is n't it 's"),
        ("the characters' lives", "the characters ' lives"),
        ("'60s rock 'n' roll", "' 60s rock ' n ' roll"),
        ("coming-of-age -- a too-tepid biopic", "coming-of-age -- a too-tepid biopic"),
        ("wait... what?!", "wait ... what ? !"),
        ("j . r . r tolkien", "j . r . r tolkien"),
        ("1,000 at 3.5 in 2002.", "1,000 at 3.5 in 2002 ."),
        ("<unk> <user> a < b", "<unk> <user> a < b"),
        ("read_csv(path)", "read_csv ( path )"),
        ("clichés naïveté", "clichés naïveté"),
        ("cliche\u0301s", "cliche\u0301s"),
        ("हिन्दी में", "हिन्दी में"),
        ("我愛 ™", "我愛 ™"),
        (" \t\n", ""),
    ],
)
def test_text_is_cut_into_tokens(given_text: str, expected: str) -> None:
    assert tokenize(given_text) == expected.split()


def test_case_is_kept_on_request() -> None:
    assert tokenize("The DON'T", lowercase=False) == ["The", "DO", "N'T"]


@given(st.text() | st.text(alphabet="aDn'tT s.-<>_3,é\u0301", max_size=12))
def test_tokenized_text_passes_unchanged_and_loses_nothing(given_text: str) -> None:
    tokens = tokenize(given_text)
    assert tokenize(" ".join(tokens)) == tokens
    assert "".join(tokens) == "".join(given_text.lower().replace("\u2019", "'").split())


def test_long_text_is_cut_in_linear_time() -> None:
    # In quadratic time it would take hours.
    assert tokenize("a" * 300_000) == ["a" * 300_000]
    assert len(tokenize("a-" * 100_000)) == 2
    assert len(tokenize("1," * 100_000)) == 2


DOCUMENTS = [["b", "a", "c"], ["c", "a", "<unk>"], ["c", "d"]]


def test_tokens_are_ranked_by_count_and_then_by_name() -> None:
    vocabulary = count_tokens(DOCUMENTS)
    assert vocabulary.tokens == (PADDING, UNKNOWN, "c", "a", "b", "d")
    assert vocabulary.counts is not None
    assert vocabulary.counts.tolist() == [0, 0, 3, 2, 1, 1]
    assert vocabulary.missing is None
    assert vocabulary == count_tokens(iter(DOCUMENTS))


def test_rare_tokens_are_left_out() -> None:
    assert count_tokens(DOCUMENTS, min_count=2).tokens == (PADDING, UNKNOWN, "c", "a")
    for documents, said in ((DOCUMENTS, "4 different tokens, the most frequent 3"), ([], "0 diff")):
        with pytest.raises(InputError, match=said):
            count_tokens(documents, min_count=4)


def test_texts_become_rows() -> None:
    vocabulary = Vocabulary([PADDING, UNKNOWN, "a", "b"])
    rows = TextSettings(max_length=3).encode(["b X a a", ""], vocabulary)
    assert rows == [[3, 1, 2], []]
    assert padded(rows).tolist() == [[3, 1, 2, 0, 0], [0] * 5]
    assert padded([[1] * 9, [2]]).shape == (2, 9)
    assert padded([]).dtype == np.int64
