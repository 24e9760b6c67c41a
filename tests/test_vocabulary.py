"""Vocabulary: what is known about rows, checked once and kept apart from the caller's objects."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_embedding import InputError, Vocabulary


@settings(max_examples=60, deadline=None)
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
    "counts_too_long": ({"tokens": "a", "counts": [1, 2]}, ("counts", "(2,)", "1 tokens")),
    "no_counts": ({"tokens": "ab", "counts": []}, ("counts", "(0,)", "2 tokens")),
    "fractional_counts": ({"tokens": "ab", "counts": [1.5, 2.0]}, ("counts", "float64")),
    "counts_of_words": ({"tokens": "ab", "counts": ["1", "2"]}, ("counts", "<U1")),
    "counts_of_truth": ({"tokens": "ab", "counts": [True, False]}, ("counts", "bool")),
    "matrix_of_counts": ({"tokens": "ab", "counts": [[1, 2]]}, ("counts", "(1, 2)")),
    "ragged_counts": ({"tokens": "ab", "counts": [[1], [2, 3]]}, ("counts",)),
    "missing_beyond": ({"tokens": "ab", "missing": [0, 2]}, ("[0, 2)", "Received: 2.")),
    "missing_negative": ({"tokens": "ab", "missing": [-1, 0]}, ("[0, 2)", "Received: -1.")),
    "missing_as_mask": ({"tokens": "ab", "missing": [True, False]}, ("missing", "bool")),
    "missing_in_an_empty_table": ({"tokens": [], "missing": [0]}, ("[0, 0)", "Received: 0.")),
}


@pytest.mark.parametrize(("arguments", "named"), MALFORMED.values(), ids=MALFORMED)
def test_what_does_not_fit_the_tokens_is_refused(
    arguments: dict[str, Any], named: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as refused:
        Vocabulary(**arguments)
    for part in named:
        assert part in str(refused.value)


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
