"""Vocabulary: what is known about rows, checked once and kept apart from the caller's objects."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_embedding import InputError, Vocabulary


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=4), unique=True, max_size=20))
def test_index_is_the_inverse_of_tokens(tokens: list[str]) -> None:
    vocabulary = Vocabulary(tokens, counts=range(len(tokens)), missing=range(0, len(tokens), 2))
    assert len(vocabulary) == len(tokens)
    assert vocabulary.tokens == tuple(tokens)
    assert [vocabulary.index[token] for token in tokens] == list(range(len(tokens)))
    assert vocabulary.counts is not None
    assert vocabulary.missing is not None
    assert vocabulary.counts.tolist() == list(range(len(tokens)))
    assert vocabulary.missing.tolist() == list(range(0, len(tokens), 2))


@pytest.mark.parametrize(
    "convert",
    [list, tuple, iter, np.array, lambda ids: np.array(ids, np.uint8)],
    ids=["list", "tuple", "iterator", "array", "array_uint8"],
)
def test_counts_and_missing_take_any_integers(convert: Any) -> None:
    vocabulary = Vocabulary("abc", counts=convert([5, 0, 2]), missing=convert([2, 1, 2]))
    assert vocabulary.counts.dtype == vocabulary.missing.dtype == np.int64
    assert vocabulary.counts.tolist() == [5, 0, 2]
    assert vocabulary.missing.tolist() == [1, 2]


def test_what_is_not_known_is_none_and_differs_from_nothing() -> None:
    assert Vocabulary("ab").counts is None
    assert Vocabulary("ab").missing is None
    known = Vocabulary("ab", missing=[])
    assert known.missing.tolist() == []
    assert known != Vocabulary("ab")


MALFORMED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "token_twice": ({"tokens": ["a", "b", "a"]}, ("'a' twice",)),
    "counts_too_short": ({"tokens": "abc", "counts": [1, 2]}, ("counts", "(2,)", "3 tokens")),
    "no_counts": ({"tokens": "ab", "counts": []}, ("counts", "(0,)", "2 tokens")),
    "fractional_counts": ({"tokens": "ab", "counts": [1.5, 2.0]}, ("counts", "float64")),
    "counts_of_truth": ({"tokens": "ab", "counts": [True, False]}, ("counts", "bool")),
    "ragged_counts": ({"tokens": "ab", "counts": [[1], [2, 3]]}, ("counts",)),
    "negative_counts": ({"tokens": "ab", "counts": [1, -2]}, ("not negative", "-2")),
    "missing_beyond": ({"tokens": "ab", "missing": [0, 2]}, ("[0, 2)", "Received: 2.")),
    "missing_as_mask": ({"tokens": "ab", "missing": [True, False]}, ("missing", "bool")),
    "tokens_that_are_numbers": ({"tokens": ["a", 7]}, ("7", "map(str")),
    "vectors_too_short": ({"tokens": "ab", "vectors": np.ones((1, 3))}, ("(2, D)", "(1, 3)")),
    "vectors_of_integers": ({"tokens": "ab", "vectors": [[1], [2]]}, ("floating", "int64")),
    "ragged_vectors": ({"tokens": "ab", "vectors": [[1.0], [2.0, 3.0]]}, ("(2, D)",)),
}


@pytest.mark.parametrize(("arguments", "named"), MALFORMED.values(), ids=MALFORMED)
def test_what_does_not_fit_the_tokens_is_refused(
    arguments: dict[str, Any], named: tuple[str, ...], refused: Any
) -> None:
    refused(lambda: Vocabulary(**arguments), parts=named)


def test_later_changes_of_the_callers_objects_do_not_matter() -> None:
    tokens, counts, missing = ["a", "b"], np.array([3, 4]), np.array([1])
    vocabulary = Vocabulary(tokens, counts, missing)
    tokens.append("c")
    counts[:] = 0
    missing[:] = 0
    assert vocabulary == Vocabulary("ab", [3, 4], [1])


DIFFERENT = {
    "tokens": Vocabulary("ac", [3, 4], [1]),
    "order": Vocabulary("ba", [3, 4], [1]),
    "counts": Vocabulary("ab", [3, 5], [1]),
    "no_counts": Vocabulary("ab", None, [1]),
    "missing": Vocabulary("ab", [3, 4], [0]),
    "vectors": Vocabulary("ab", [3, 4], [1], [[1.0], [1.0]]),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("other", DIFFERENT.values(), ids=DIFFERENT)
def test_vocabularies_are_values(other: Vocabulary) -> None:
    vocabulary = Vocabulary("ab", [3, 4], [1])
    assert vocabulary != other
    assert vocabulary != "ab"
    same = [Vocabulary("ab", [3, 4], [1]), copy.deepcopy(vocabulary)]
    same.append(pickle.loads(pickle.dumps(vocabulary)))
    assert all(vocabulary == one and hash(vocabulary) == hash(one) for one in same)
    with pytest.raises(AttributeError):
        vocabulary.counts = None  # type: ignore[misc]


# What other libraries have


def _tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers")
    transformers = pytest.importorskip("transformers", reason="an optional package")
    model = tokenizers.models.WordLevel({"[UNK]": 0, "the": 1, "of": 2}, unk_token="[UNK]")
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), unk_token="[UNK]"
    )
    made.add_tokens(["zyzzyva"])
    return made


def _bare_tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers")
    return tokenizers.Tokenizer(tokenizers.models.WordLevel({"b": 1, "a": 0}, unk_token="a"))


def _keyed_vectors() -> Any:
    models = pytest.importorskip("gensim.models", reason="an optional package")
    made = models.KeyedVectors(2)
    made.add_vectors(["b", "a"], np.array([[1, 2], [3, 4]], np.float32))
    return made


SOURCES: dict[str, tuple[Any, int | None, tuple[str, ...]]] = {
    "vocabulary": (lambda: Vocabulary("ab"), None, ("a", "b")),
    "mapping": (lambda: {"of": 1, "the": 0}, None, ("the", "of")),
    "mapping_with_gaps": (lambda: {"of": 3, "the": 1}, None, ("<row 0>", "the", "<row 2>", "of")),
    "mapping_of_numpy_integers": (
        lambda: {"of": np.int64(1), "the": np.uint8(0)},
        2,
        ("the", "of"),
    ),
    "empty_mapping": (dict, None, ()),
    "empty_mapping_for_a_table": (dict, 2, ("<row 0>", "<row 1>")),
    "list": (lambda: ["b", "a"], None, ("b", "a")),
    "generator": (lambda: iter("ba"), None, ("b", "a")),
    "tokenizer": (_tokenizer, None, ("[UNK]", "the", "of", "zyzzyva")),
    "tokenizer_of_a_padded_table": (
        _tokenizer,
        6,
        ("[UNK]", "the", "of", "zyzzyva", "<row 4>", "<row 5>"),
    ),
    "bare_tokenizer": (_bare_tokenizer, None, ("a", "b")),
    "keyed_vectors": (_keyed_vectors, None, ("b", "a")),
    "keyed_vectors_of_a_larger_table": (_keyed_vectors, 3, ("b", "a", "<row 2>")),
}


@pytest.mark.parametrize("longer", [False, True], ids=["as_given", "for_a_larger_table"])
@pytest.mark.parametrize(("make", "num_rows", "tokens"), SOURCES.values(), ids=SOURCES)
def test_a_vocabulary_is_read_from_what_other_libraries_have(
    make: Any, num_rows: int | None, tokens: tuple[str, ...], longer: bool
) -> None:
    if longer:
        num_rows = len(tokens) + 1
        tokens = (*tokens, f"<row {len(tokens)}>")
    vocabulary = Vocabulary.of(make(), num_rows)
    assert vocabulary.tokens == tokens
    assert all(type(token) is str for token in vocabulary.tokens)
    assert [vocabulary.index[token] for token in tokens] == list(range(len(tokens)))


def test_a_vocabulary_stays_the_same_object_where_it_fits() -> None:
    vocabulary = Vocabulary("ab", [3, 4])
    assert Vocabulary.of(vocabulary) is vocabulary
    assert Vocabulary.of(vocabulary, 2) is vocabulary


def test_vectors_are_not_copied_and_counts_are_taken_where_there_are_some() -> None:
    vectors = _keyed_vectors()
    without = Vocabulary.of(vectors)
    assert without.counts is None
    assert without.vectors is vectors.vectors
    vectors.set_vecattr("b", "count", 7)
    vectors.set_vecattr("a", "count", 9)
    counted = Vocabulary.of(vectors)
    assert counted.counts is not None
    assert counted.counts.tolist() == [7, 9]


@pytest.mark.parametrize("wrap", [lambda known: known, _keyed_vectors], ids=["own", "gensim"])
def test_rows_that_a_table_has_more_never_occur_and_are_near_to_nothing(wrap: Any) -> None:
    known = Vocabulary("ba", [7, 9], [1], np.array([[1, 2], [3, 4]], np.float32))
    if wrap is _keyed_vectors:
        source = _keyed_vectors()
        for token, count in (("b", 7), ("a", 9)):
            source.set_vecattr(token, "count", count)
    else:
        source = known
    wide = Vocabulary.of(source, 4)
    assert wide.counts is not None
    assert wide.vectors is not None
    assert wide.counts.tolist() == [7, 9, 0, 0]
    assert wide.vectors.tolist() == [[1, 2], [3, 4], [0, 0], [0, 0]]
    assert wide.vectors.dtype == np.float32
    if source is known:
        assert wide.missing is not None
        assert wide.missing.tolist() == [1]


NO_SOURCES: dict[str, tuple[Any, int | None, tuple[str, ...]]] = {
    "number": (7, None, ("int",)),
    "path": ("vocab.txt", None, ("str",)),
    "set": ({"a", "b"}, None, ("a set", "the list")),
    "token_twice": (["a", "b", "a"], None, ("'a' twice",)),
    "row_twice": ({"a": 1, "b": 0, "c": 1}, None, ("'c' has 1", "as 'a'")),
    "row_below_0": ({"a": 0, "b": -2}, None, ("'b' has -2",)),
    "from_row_to_token": ({0: "the", 1: "of"}, None, ("0 has 'the'", "token to row")),
    "mapping_beyond_the_table": ({"a": 0, "b": 5}, 5, ("[0, 5)", "Received: 5.")),
    "more_tokens_than_rows": (["a", "b", "c"], 2, ("[0, 2)", "Received: 2.")),
    "tokens_that_are_numbers": ([30, 7], None, ("30", "map(str")),
}


@pytest.mark.parametrize(("source", "num_rows", "named"), NO_SOURCES.values(), ids=NO_SOURCES)
def test_what_is_no_vocabulary_is_refused_with_what_was_received(
    source: Any, num_rows: int | None, named: tuple[str, ...], refused: Any
) -> None:
    refused(Vocabulary.of, source, num_rows, parts=named)


def test_too_many_keyed_vectors_are_refused() -> None:
    with pytest.raises(InputError, match=r"\[0, 1\).*Received: 1\."):
        Vocabulary.of(_keyed_vectors(), 1)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text("abc", max_size=4), st.integers(0, 30), max_size=12), st.data())
def test_every_token_of_a_mapping_finds_its_row(rows: dict[str, int], data: st.DataObject) -> None:
    if len(set(rows.values())) < len(rows):
        with pytest.raises(InputError, match="row of its own"):
            Vocabulary.of(rows)
        return
    needed = max(rows.values(), default=-1) + 1
    num_rows = data.draw(st.none() | st.integers(needed, 40))
    vocabulary = Vocabulary.of(rows, num_rows)
    assert len(vocabulary) == (needed if num_rows is None else num_rows)
    assert {token: vocabulary.index[token] for token in rows} == rows
