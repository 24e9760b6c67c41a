"""Rows: every accepted form, the algebra against Python's sets, and every refusal."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_embedding import InputError, Rows, Vocabulary

V = 12
COUNTS = (3, 9, 0, 9, 1, 4, 4, 4, 0, 2, 7, 5)
MISSING = (2, 8, 11)
VOCABULARY = Vocabulary([f"w{i}" for i in range(V)], counts=COUNTS, missing=MISSING)


class TensorLike:
    """What numpy sees of a framework's tensor."""

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return self.values

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)

    def __setitem__(self, at: int, value: Any) -> None:
        self.values[at] = value


ACCEPTED: dict[str, tuple[Any, list[int]]] = {
    "all": ("all", list(range(V))),
    "none": ("none", []),
    "missing": ("missing", list(MISSING)),
    "rows": (Rows.parse([3]), [3]),
    "list_out_of_order": ([7, 2, 5], [2, 5, 7]),
    "tuple": ((7, 2), [2, 7]),
    "set": ({7, 2}, [2, 7]),
    "dict_keys": ({7: "a", 2: "b"}.keys(), [2, 7]),
    "generator": ((i for i in (7, 2)), [2, 7]),
    "array_int8": (np.array([7, 2], np.int8), [2, 7]),
    "array_uint64": (np.array([7, 2], np.uint64), [2, 7]),
    "tensor": (TensorLike([7, 2]), [2, 7]),
    "list_of_numpy_integers": ([np.int64(7), np.int32(2)], [2, 7]),
    "last_row": ([V - 1], [V - 1]),
    "mask_array": (np.arange(V) % 5 == 1, [1, 6, 11]),
    "mask_list": ([i == 4 for i in range(V)], [4]),
    "mask_tensor": (TensorLike(np.arange(V) > 9), [10, 11]),
    "mask_of_no_row": ([False] * V, []),
    "mask_of_every_row": (np.ones(V, np.bool_), list(range(V))),
    "range": (range(2, 5), [2, 3, 4]),
    "range_with_step": (range(1, V, 4), [1, 5, 9]),
    "empty_range": (range(0), []),
    "slice_from": (slice(9, None), [9, 10, 11]),
    "slice_of_the_last_two": (slice(-2, None), [10, 11]),
    "slice_backwards": (slice(None, None, -5), [1, 6, 11]),
    "config_ids": ({"ids": [7, 2]}, [2, 7]),
    "config_mask": ({"mask": [True] + [False] * (V - 1)}, [0]),
    "config_range": ({"range": [8, None, 2]}, [8, 10]),
    "config_range_of_two": ({"range": [0, 3]}, [0, 1, 2]),
    "config_all": ({"all": None}, list(range(V))),
    "most_frequent_number": ({"most_frequent": 3}, [1, 3, 10]),
    "most_frequent_share": ({"most_frequent": 0.25}, [1, 3, 10]),
    # Rows 5, 6 and 7 occur equally often; the lower ids come first.
    "most_frequent_among_equals": ({"most_frequent": 6}, [1, 3, 5, 6, 10, 11]),
    "most_frequent_all": ({"most_frequent": 1.0}, list(range(V))),
    "not": ({"not": {"range": [0, 10]}}, [10, 11]),
    "union": ({"union": ["missing", [0], {"ids": [0, 2]}]}, [0, 2, 8, 11]),
    "intersection": ({"intersection": ["missing", {"range": [3, None]}, "all"]}, [8, 11]),
    "nested": ({"not": {"union": [{"not": "missing"}, [2]]}}, [8, 11]),
}


@pytest.mark.parametrize(("value", "expected"), ACCEPTED.values(), ids=ACCEPTED)
def test_every_form_names_its_rows_and_survives_yaml(value: Any, expected: list[int]) -> None:
    rows = Rows.parse(value)
    ids = rows.resolve(V, VOCABULARY)
    assert ids.dtype == np.int64
    assert ids.tolist() == expected
    again = Rows.parse(yaml.safe_load(yaml.safe_dump(rows.to_config())))
    assert again == rows
    assert hash(again) == hash(rows)
    assert again.resolve(V, VOCABULARY).tolist() == expected
    assert Rows.parse(rows) is rows


# What is malformed whatever the table, and what of it the message must show.
MALFORMED: dict[str, tuple[Any, str]] = {
    "unknown_word": ("everything", "'everything'"),
    "empty_word": ("", "''"),
    "word_that_needs_an_argument": ("ids", "None"),
    "union_without_choices": ("union", "None"),
    "unknown_kind": ({"rarest": 3}, "'rarest'"),
    "two_kinds": ({"ids": [1], "range": [0, 2]}, "['ids', 'range']"),
    "no_kind": ({}, "[]"),
    "number": (7, "7"),
    "nothing": (None, "None"),
    "share_without_a_kind": (0.5, "0.5"),
    "no_ids": ([], "[]"),
    "no_numbers_in_an_array": (np.array([]), "[]"),
    "id_twice": ([4, 9, 4], "4 twice"),
    "id_twice_in_a_config": ({"ids": [9, 9]}, "9 twice"),
    "negative_id": ([3, -1], "-1"),
    "fractional_id": ([1.5, 2.5], "[1.5, 2.5]"),
    "integral_floats": (np.array([1.0, 2.0]), "array([1., 2.])"),
    "words_in_a_list": (["cat", "dog"], "['cat', 'dog']"),
    "null_in_a_list": ([1, None], "[1, None]"),
    "ragged_list": ([[1], [2, 3]], "[[1], [2, 3]]"),
    "matrix_of_ids": ([[1, 2], [3, 4]], "[[1, 2], [3, 4]]"),
    "bytes": (b"ab", "b'ab'"),
    "scalar_array": (np.array(3), "array(3)"),
    "matrix_mask": (np.ones((2, 3), np.bool_), "True"),
    "ids_of_a_word": ({"ids": "all"}, "'all'"),
    "ids_of_a_number": ({"ids": 5}, "5"),
    "ids_that_are_a_mask": ({"ids": [True, False]}, "[True, False]"),
    "mask_of_numbers": ({"mask": [1, 0, 1]}, "[1, 0, 1]"),
    "empty_mask": ({"mask": []}, "[]"),
    "range_of_one": ({"range": [3]}, "[3]"),
    "range_of_four": ({"range": [0, 9, 1, 1]}, "[0, 9, 1, 1]"),
    "range_of_fractions": ({"range": [0, 2.5]}, "[0, 2.5]"),
    "range_of_truth": ({"range": [False, True]}, "[False, True]"),
    "range_of_a_word": ({"range": "all"}, "'all'"),
    "range_with_step_0": ({"range": [0, 9, 0]}, "[0, 9, 0]"),
    "slice_of_words": (slice("a", "b"), "'a'"),
    "argument_for_all": ({"all": 3}, "3"),
    "argument_for_missing": ({"missing": ["a"]}, "['a']"),
    "amount_zero": ({"most_frequent": 0}, "0"),
    "amount_negative": ({"most_frequent": -2}, "-2"),
    "share_zero": ({"most_frequent": 0.0}, "0.0"),
    "share_above_one": ({"most_frequent": 1.5}, "1.5"),
    "share_that_is_no_number": ({"most_frequent": float("nan")}, "nan"),
    "amount_true": ({"most_frequent": True}, "True"),
    "amount_in_words": ({"most_frequent": "half"}, "'half'"),
    "amount_missing": ({"most_frequent": None}, "None"),
    "union_of_nothing": ({"union": []}, "[]"),
    "union_of_a_word": ({"union": "all"}, "'all'"),
    "intersection_of_a_mapping": ({"intersection": {"ids": [1]}}, "{'ids': [1]}"),
    "not_of_nothing": ({"not": None}, "None"),
    "deep_inside": ({"not": {"union": ["all", {"intersection": [[4, 4]]}]}}, "4 twice"),
}


@pytest.mark.parametrize(("value", "received"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_rows_are_refused_with_what_was_received(value: Any, received: str) -> None:
    with pytest.raises(InputError) as refused:
        Rows.parse(value)
    message = str(refused.value)
    assert received in message
    assert "\n" not in message


# What is well formed but does not fit this table or this vocabulary.
UNFITTING: dict[str, tuple[Any, Vocabulary | None, tuple[str, ...]]] = {
    "id_beyond_the_table": ([3, V], None, ("[0, 12)", "Received: 12.")),
    "id_far_beyond": ([10**12], None, ("[0, 12)", str(10**12))),
    "short_mask": ([True] * (V - 1), None, ("12 rows", "Received: 11.")),
    "long_mask": ([True] * (V + 1), None, ("12 rows", "Received: 13.")),
    "range_beyond": ({"range": [0, V + 1]}, None, ("12 rows", "13")),
    "range_too_far_back": (slice(-V - 1, None), None, ("12 rows", "-13")),
    "missing_without_vocabulary": ("missing", None, ("missing", "no vocabulary")),
    "frequent_without_vocabulary": ({"most_frequent": 2}, None, ("counts", "no vocabulary")),
    "missing_unknown": ("missing", Vocabulary(VOCABULARY.tokens), ("missing", "without")),
    "counts_unknown": (
        {"most_frequent": 2},
        Vocabulary(VOCABULARY.tokens, missing=[1]),
        ("counts", "without"),
    ),
    "more_than_all": ({"most_frequent": V + 1}, VOCABULARY, ("12 rows", "13 of them")),
    "another_vocabulary": ("all", Vocabulary("abc"), ("3 tokens", "12 rows")),
    "inside_a_union": ({"union": ["all", [V]]}, None, ("[0, 12)", "Received: 12.")),
    "inside_a_complement": ({"not": [V]}, None, ("[0, 12)", "Received: 12.")),
}


@pytest.mark.parametrize(("value", "vocabulary", "named"), UNFITTING.values(), ids=UNFITTING)
def test_rows_that_do_not_fit_are_refused_with_what_was_received(
    value: Any, vocabulary: Vocabulary | None, named: tuple[str, ...]
) -> None:
    rows = Rows.parse(value)
    with pytest.raises(InputError) as refused:
        rows.resolve(V, vocabulary)
    for part in named:
        assert part in str(refused.value)


CALLERS = {
    "mask": (lambda: np.arange(V) < 3, [0, 1, 2]),
    "sorted_ids": (lambda: np.array([1, 4, 6]), [1, 4, 6]),
    "unsorted_ids": (lambda: np.array([6, 1, 4]), [1, 4, 6]),
    "list": (lambda: [6, 1, 4], [1, 4, 6]),
    "tensor": (lambda: TensorLike([6, 1, 4]), [1, 4, 6]),
    "mask_tensor": (lambda: TensorLike(np.arange(V) < 3), [0, 1, 2]),
}


@pytest.mark.parametrize(
    "wrap",
    [lambda given: given, lambda given: {"union": [given, [0]]}],
    ids=["alone", "in_a_union"],
)
@pytest.mark.parametrize(("make", "expected"), CALLERS.values(), ids=CALLERS)
def test_the_callers_object_is_left_alone_and_later_writes_do_not_matter(
    make: Callable[[], Any], expected: list[int], wrap: Callable[[Any], Any]
) -> None:
    given_ = make()
    rows = Rows.parse(wrap(given_))
    before = rows.resolve(V).tolist()
    assert set(before) - {0} == set(expected) - {0}
    assert list(given_) == list(make())

    for i in range(len(given_)):
        given_[i] = list(given_)[i] ^ True  # a mask is inverted, ids move to their neighbours
    assert list(given_) != list(make())
    assert rows.resolve(V).tolist() == before


def test_a_write_into_the_answer_does_not_reach_the_choice() -> None:
    for value in ([2, 5], [False, True] * 6, "all", slice(3, None)):
        rows = Rows.parse(value)
        ids = rows.resolve(V, VOCABULARY)
        expected = ids.tolist()
        if ids.flags.writeable:
            ids[:] = 0
        assert rows.resolve(V, VOCABULARY).tolist() == expected


def test_rows_are_values() -> None:
    rows = Rows.missing() | Rows.parse([1])
    assert rows == Rows.parse({"union": ["missing", {"ids": [1]}]})
    assert rows != Rows.parse([1]) | Rows.missing()
    assert rows != "missing"
    assert len({rows, copy.deepcopy(rows), pickle.loads(pickle.dumps(rows))}) == 1
    with pytest.raises(AttributeError):
        rows.kind = "all"  # type: ignore[misc]


def test_a_million_ids_are_parsed_in_any_order_and_resolved() -> None:
    number = 1_000_000
    ids = np.random.default_rng(0).permutation(number)
    rows = Rows.parse(ids)
    assert np.array_equal(rows.resolve(number), np.arange(number))
    odd = Rows.parse(np.arange(1, number, 2)) - Rows.parse(slice(0, number // 2))
    assert len(odd.resolve(number)) == number // 4
    with pytest.raises(InputError, match="Received 5 twice"):
        Rows.parse([*range(number), 5])


# The algebra, against Python's own sets.

LEAVES = st.one_of(
    st.just(("all", frozenset(range(V)))),
    st.just(("none", frozenset())),
    st.just(("missing", frozenset(MISSING))),
    st.frozensets(st.integers(0, V - 1), min_size=1).map(lambda s: (list(s), s)),
    st.lists(st.booleans(), min_size=V, max_size=V).map(
        lambda mask: (mask, frozenset(i for i, kept in enumerate(mask) if kept))
    ),
    st.slices(V).map(lambda s: (s, frozenset(range(V)[s]))),
)


def _combinations(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    operation = st.sampled_from(["or", "and", "minus"])
    return st.one_of(
        children.map(lambda one: (~Rows.parse(one[0]), frozenset(range(V)) - one[1])),
        st.tuples(operation, children, children).map(_combine),
    )


def _combine(drawn: tuple[str, Any, Any]) -> tuple[Rows, frozenset[int]]:
    operation, (left, left_set), (right, right_set) = drawn
    a, b = Rows.parse(left), Rows.parse(right)
    if operation == "or":
        return a | b, left_set | right_set
    if operation == "and":
        return a & b, left_set & right_set
    return a - b, left_set - right_set


TREES = st.recursive(LEAVES, _combinations, max_leaves=6)


@settings(max_examples=120, deadline=None)
@given(TREES)
def test_choices_behave_as_sets_and_round_trip(tree: tuple[Any, frozenset[int]]) -> None:
    rows, expected = Rows.parse(tree[0]), tree[1]
    ids = rows.resolve(V, VOCABULARY)
    assert ids.tolist() == sorted(expected)
    assert ids.dtype == np.int64
    assert rows.resolve(V, VOCABULARY).tolist() == ids.tolist()
    config = rows.to_config()
    again = Rows.parse(yaml.safe_load(yaml.safe_dump(config)))
    assert again == rows
    assert again.to_config() == config


@settings(max_examples=60, deadline=None)
@given(TREES, TREES)
def test_the_algebra_keeps_its_laws(a: Any, b: Any) -> None:
    def ids(rows: Rows) -> list[int]:
        return rows.resolve(V, VOCABULARY).tolist()

    left, right = Rows.parse(a[0]), Rows.parse(b[0])
    assert ids(~~left) == ids(left)
    assert ids(~(left | right)) == ids(~left & ~right)
    assert ids(left | right) == ids(right | left)
    assert ids((left - right) | (left & right)) == ids(left)
    assert ids(left & ~left) == []
    assert ids(left | ~left) == list(range(V))


RANGES = st.builds(
    range, st.integers(0, V), st.integers(-1, V), st.sampled_from([1, 2, 5, -1, -2])
).filter(lambda ids: all(0 <= row < V for row in ids))


@settings(max_examples=100, deadline=None)
@given(RANGES)
def test_a_range_names_the_ids_that_it_yields(ids: range) -> None:
    assert Rows.parse(ids).resolve(V).tolist() == sorted(ids)


@pytest.mark.parametrize("ids", [range(-2, 2), range(2, -3, -1)], ids=["up", "down"])
def test_a_range_with_negative_ids_is_refused(ids: range) -> None:
    # As a slice, -2 counts from the end; in a range it is the id -2, which no table has.
    with pytest.raises(InputError, match="-2"):
        Rows.parse(ids).resolve(V)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=30).flatmap(
        lambda counts: st.tuples(st.just(counts), st.integers(1, len(counts)))
    )
)
def test_the_most_frequent_are_a_stable_function_of_the_counts(drawn: Any) -> None:
    counts, number = drawn
    vocabulary = Vocabulary(map(str, range(len(counts))), counts=counts)
    order = sorted(range(len(counts)), key=lambda row: (-counts[row], row))
    ids = Rows.most_frequent(number).resolve(len(counts), vocabulary)
    assert ids.tolist() == sorted(order[:number])
    share = Rows.most_frequent(number / len(counts)).resolve(len(counts), vocabulary)
    assert share.tolist() == ids.tolist()


def test_an_array_that_was_computed_empty_is_no_row() -> None:
    assert Rows.parse(np.array([], np.int64)) == Rows.none()
