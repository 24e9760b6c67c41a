"""Rows: every accepted form, the algebra against Python's sets, and every refusal."""

import copy
import math
import pickle
import random
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_embedding import InputError, Rows, Vocabulary
from partial_embedding.growth import Growth

V = 12
COUNTS = (3, 9, 0, 9, 1, 4, 4, 4, 0, 2, 7, 5)
MISSING = (2, 8, 11)
TOKENS = tuple(f"w{i}" for i in range(V))
VECTORS = np.random.default_rng(0).normal(size=(V, 3)).astype(np.float32)
VECTORS[4] = 0  # padding
VOCABULARY = Vocabulary(TOKENS, COUNTS, MISSING, VECTORS)


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
    "most_frequent_share_in_numpy": ({"most_frequent": np.float64(0.25)}, [1, 3, 10]),
    "most_frequent_one": ({"most_frequent": 1}, [1]),
    "least_frequent_number": ({"least_frequent": 3}, [2, 4, 8]),
    "least_frequent_share": ({"least_frequent": 0.25}, [2, 4, 8]),
    # Of rows 5, 6 and 7 those come in that are left out of the most frequent first.
    "least_frequent_among_equals": ({"least_frequent": 7}, [0, 2, 4, 6, 7, 8, 9]),
    "share_of_less_than_half_a_row": ({"least_frequent": 0.01}, []),
    # Rows 1 and 3 make up 18 of 48 tokens, row 10 another 7.
    "covering_exactly": ({"covering": 0.375}, [1, 3]),
    "covering_a_little_more": ({"covering": 0.376}, [1, 3, 10]),
    "covering_all_that_occurs": ({"covering": 1.0}, [0, 1, 3, 4, 5, 6, 7, 9, 10, 11]),
    "min_count": ({"min_count": 5}, [1, 3, 10, 11]),
    "min_count_of_no_row": ({"min_count": 10}, []),
    "tokens": ({"tokens": ["w7", "w10", "w2"]}, [2, 7, 10]),
    "token": ({"tokens": "w3"}, [3]),
    "tokens_in_an_array": ({"tokens": np.array(["w7", "w2"])}, [2, 7]),
    "tokens_from_a_generator": ({"tokens": (f"w{i}" for i in (7, 2))}, [2, 7]),
    "matching_anywhere": ({"matching": "1"}, [1, 10, 11]),
    "matching_at_the_ends": ({"matching": "^w1$"}, [1]),
    "matching_without_case": ({"matching": "(?i)^W[78]"}, [7, 8]),
    "matching_nothing": ({"matching": "^x"}, []),
    "random_all": ({"random": 1.0}, list(range(V))),
    "nearest_all": ({"nearest": {"tokens": ["w4"], "amount": V}}, list(range(V))),
    "nearest_only_themselves": ({"nearest": {"tokens": ["w9", "w4"], "amount": 2}}, [4, 9]),
    "difference": ({"difference": ["all", [0, 1], {"range": [3, None]}]}, [2]),
    "difference_of_one": ({"difference": ["missing"]}, list(MISSING)),
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
    "min_count_zero": ({"min_count": 0}, "0"),
    "min_count_as_share": ({"min_count": 0.5}, "0.5"),
    "min_count_true": ({"min_count": True}, "True"),
    "covering_in_percent": ({"covering": 90}, "90"),
    "covering_nothing": ({"covering": 0.0}, "0.0"),
    "covering_one_without_a_point": ({"covering": 1}, "Received: 1."),
    "tokens_of_nothing": ({"tokens": []}, "[]"),
    "tokens_that_are_numbers": ({"tokens": ["the", 7]}, "['the', 7]"),
    "tokens_that_yaml_read_as_truth": ({"tokens": [True]}, "[True]"),
    "tokens_in_a_mapping": ({"tokens": {"the": 1}}, "{'the': 1}"),
    "tokens_of_a_number": ({"tokens": 7}, "7"),
    "tokens_in_bytes": ({"tokens": b"the"}, "b'the'"),
    "token_twice": ({"tokens": ["a", "b", "a"]}, "'a' twice"),
    "pattern_unclosed": ({"matching": "(a"}, "'(a'"),
    "pattern_of_a_number": ({"matching": 7}, "7"),
    "pattern_of_bytes": ({"matching": b"a"}, "b'a'"),
    "pattern_missing": ({"matching": None}, "None"),
    "pattern_that_repeats_too_much": ({"matching": "a{99999999999}"}, "99999999999"),
    # Its flags would be lost on the way through YAML.
    "pattern_compiled": ({"matching": re.compile("a", re.IGNORECASE)}, "re.compile"),
    "random_of_nothing": ({"random": None}, "None"),
    "random_share_above_one": ({"random": 1.5}, "1.5"),
    "random_negative_seed": ({"random": {"amount": 2, "seed": -1}}, "'seed': -1"),
    "random_seed_in_words": ({"random": {"amount": 2, "seed": "x"}}, "'seed': 'x'"),
    "random_unknown_key": ({"random": {"amount": 2, "sed": 1}}, "'sed': 1"),
    "random_without_amount": ({"random": {"seed": 1}}, "None"),
    "nearest_of_tokens": ({"nearest": ["a"]}, "['a']"),
    "nearest_without_amount": ({"nearest": {"tokens": ["a"]}}, "{'tokens': ['a']}"),
    "nearest_unknown_key": ({"nearest": {"tokens": "a", "amount": 1, "by": 2}}, "'by': 2"),
    "nearest_malformed_amount": ({"nearest": {"tokens": "a", "amount": -3}}, "-3"),
    "nearest_malformed_tokens": ({"nearest": {"tokens": [3], "amount": 3}}, "[3]"),
    "ids_file_without_a_path": ({"ids_file": None}, "None"),
    "ids_file_of_ids": ({"ids_file": [1, 2]}, "[1, 2]"),
    "token_file_of_a_number": ({"token_file": 3}, "3"),
    "grown_of_nothing": ({"grown": None}, "None"),
    "grown_without_parts": ({"grown": {"from": "none", "to": "all"}}, "{'from': 'none'"),
    "grown_beyond_all_parts": (
        {"grown": {"from": "none", "to": "all", "growth": "linear", "part": 4, "parts": 3}},
        "4 of 3",
    ),
    "grown_in_a_malformed_way": (
        {"grown": {"from": "none", "to": "all", "growth": "fast", "part": 1, "parts": 3}},
        "'fast'",
    ),
    "difference_of_nothing": ({"difference": []}, "[]"),
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
    "less_frequent_than_all": ({"least_frequent": V + 1}, VOCABULARY, ("12 rows", "13 of them")),
    "more_at_random_than_all": ({"random": V + 1}, None, ("12 rows", "13 of them")),
    "more_near_than_all": (
        {"nearest": {"tokens": "w1", "amount": V + 1}},
        VOCABULARY,
        ("12 rows", "13 of them"),
    ),
    "unknown_token": ({"tokens": ["w1", "the"]}, VOCABULARY, ("12", "'the'")),
    "unknown_tokens": ({"tokens": ["a", "w1", "b", "c"]}, VOCABULARY, ("'a' and 2 more",)),
    "near_to_an_unknown_token": (
        {"nearest": {"tokens": "the", "amount": 1}},
        VOCABULARY,
        ("'the'",),
    ),
    "tokens_without_vocabulary": ({"tokens": ["w1"]}, None, ("tokens", "no vocabulary")),
    "pattern_without_vocabulary": ({"matching": "w"}, None, ("tokens", "no vocabulary")),
    "covering_without_counts": ({"covering": 0.5}, Vocabulary(TOKENS), ("counts", "without")),
    "min_count_without_counts": ({"min_count": 5}, Vocabulary(TOKENS), ("counts", "without")),
    "rare_without_counts": ({"least_frequent": 5}, Vocabulary(TOKENS), ("counts", "without")),
    "near_without_vectors": (
        {"nearest": {"tokens": "w1", "amount": 1}},
        Vocabulary(TOKENS),
        ("vectors", "without"),
    ),
    "covering_tokens_that_never_occur": (
        {"covering": 0.5},
        Vocabulary(TOKENS, counts=[0] * V),
        ("counts that are all 0",),
    ),
    "grown_without_counts": (
        {"grown": {"from": "none", "to": "all", "growth": "linear", "part": 1, "parts": 2}},
        Vocabulary(TOKENS),
        ("counts", "without"),
    ),
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
    for value in ([2, 5], [False, True] * 6, "all", "missing", slice(3, None)):
        parsed = Rows.parse(value)
        for rows in (parsed, copy.deepcopy(parsed), pickle.loads(pickle.dumps(parsed))):
            vocabulary = copy.deepcopy(VOCABULARY)
            ids = rows.resolve(V, vocabulary)
            expected = ids.tolist()
            if ids.flags.writeable:
                ids[:] = 0
            assert rows.resolve(V, vocabulary).tolist() == expected


def test_rows_are_values() -> None:
    rows = Rows.missing() | Rows.parse([1])
    assert rows == Rows.parse({"union": ["missing", {"ids": [1]}]})
    assert rows != Rows.parse([1]) | Rows.missing()
    assert rows != "missing"
    assert len({rows, copy.deepcopy(rows), pickle.loads(pickle.dumps(rows))}) == 1
    for kind in ("most_frequent", "least_frequent", "random"):
        # One row is not all rows, though 1 == 1.0 to Python.
        assert Rows.parse({kind: 1}) != Rows.parse({kind: 1.0})
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

AMOUNTS = st.one_of(st.integers(1, V), st.floats(0, 1, exclude_min=True))
BY_FREQUENCY = sorted(range(V), key=lambda row: (-COUNTS[row], row))


def _number(amount: int | float) -> int:
    return amount if isinstance(amount, int) else round(amount * V)


def _covering(share: float) -> frozenset[int]:
    rows = [row for row in BY_FREQUENCY if COUNTS[row]]
    for number in range(1, len(rows) + 1):
        if sum(COUNTS[row] for row in rows[:number]) / sum(COUNTS) >= share:
            break
    return frozenset(rows[:number])


def _nearest(drawn: tuple[frozenset[int], int | float]) -> tuple[Any, frozenset[int]]:
    own, amount = drawn

    def cosine(a: int, b: int) -> float:
        x, y = VECTORS[a].astype(float), VECTORS[b].astype(float)
        return float(sum(x * y)) / (math.hypot(*x) * math.hypot(*y))

    def closeness(row: int) -> float:
        if row in own:
            return math.inf
        return -math.inf if row == 4 else max((cosine(row, o) for o in own - {4}), default=0)

    order = sorted(range(V), key=lambda row: (-closeness(row), row))
    argument = {"tokens": [TOKENS[row] for row in own], "amount": amount}
    return {"nearest": argument}, frozenset(order[: _number(amount)])


def _random(drawn: tuple[int | float, int]) -> tuple[Any, frozenset[int]]:
    amount, seed = drawn
    order = np.random.default_rng(seed).permutation(V).tolist()
    return {"random": {"amount": amount, "seed": seed}}, frozenset(order[: _number(amount)])


def _grown(drawn: tuple[Any, Any, int, int]) -> tuple[Any, frozenset[int]]:
    before, after, part, more = drawn
    parts = part + more
    joining = [row for row in BY_FREQUENCY if row in after and row not in before]
    number = len(before) + len(joining) * Fraction(part, parts)
    rows = {
        "from": sorted(before) or "none",
        "to": sorted(after) or "none",
        "growth": "linear",
        "part": part,
        "parts": parts,
    }
    return {"grown": rows}, before | set(joining[: round(number) - len(before)])


SETS = st.frozensets(st.integers(0, V - 1))
LEAVES = st.one_of(
    SETS.filter(bool).map(lambda s: ({"tokens": [TOKENS[row] for row in s]}, s)),
    st.sampled_from([("1$", {1, 11}), ("^w[2-4]$", {2, 3, 4}), ("x", ()), ("", range(V))]).map(
        lambda pair: ({"matching": pair[0]}, frozenset(pair[1]))
    ),
    AMOUNTS.map(lambda a: ({"most_frequent": a}, frozenset(BY_FREQUENCY[: _number(a)]))),
    AMOUNTS.map(lambda a: ({"least_frequent": a}, frozenset(BY_FREQUENCY[V - _number(a) :]))),
    st.floats(0, 1, exclude_min=True).map(lambda share: ({"covering": share}, _covering(share))),
    st.integers(1, 10).map(
        lambda n: ({"min_count": n}, frozenset(row for row in range(V) if COUNTS[row] >= n))
    ),
    st.tuples(AMOUNTS, st.integers(0, 5)).map(_random),
    st.tuples(SETS.filter(bool), AMOUNTS).map(_nearest),
    st.tuples(SETS, SETS, st.integers(0, 5), st.integers(1, 5)).map(_grown),
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


@settings(max_examples=300, deadline=None)
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


# More and less of the same


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.data())
def test_a_larger_random_amount_has_the_rows_of_a_smaller_one(
    drawn: tuple[int, int], data: st.DataObject
) -> None:
    num_rows, number = drawn
    more, seed = data.draw(st.integers(number, num_rows)), data.draw(st.integers(0, 9))
    smaller, larger = (
        set(Rows.parse({"random": {"amount": n, "seed": seed}}).resolve(num_rows).tolist())
        for n in (number, more)
    )
    assert smaller <= larger
    assert (len(smaller), len(larger)) == (number, more)


def test_another_seed_chooses_other_rows_at_random() -> None:
    chosen = {
        tuple(Rows.parse({"random": {"amount": 10, "seed": seed}}).resolve(1000).tolist())
        for seed in range(20)
    }
    assert len(chosen) == 20
    assert Rows.parse({"random": 0.3}) == Rows.parse({"random": {"amount": 0.3, "seed": 0}})


@pytest.mark.parametrize("total", [7, 10, 49, 100, 300, 1000])
def test_rows_that_cover_a_share_are_the_fewest_that_do(total: int) -> None:
    # With one token of each kind, k/total of the tokens are covered by exactly k rows.
    vocabulary = Vocabulary(map(str, range(total)), counts=[1] * total)
    for number in range(1, total + 1):
        ids = Rows.parse({"covering": number / total}).resolve(total, vocabulary)
        assert ids.tolist() == list(range(number))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(1, 100))
def test_covering_is_minimal(counts: list[int], percent: int) -> None:
    total = sum(counts)
    if not total:
        return
    vocabulary = Vocabulary(map(str, range(len(counts))), counts=counts)
    ids = Rows.parse({"covering": percent / 100}).resolve(len(counts), vocabulary).tolist()
    chosen = sorted((counts[row] for row in ids), reverse=True)
    assert Fraction(sum(chosen), total) >= Fraction(percent, 100)
    assert Fraction(sum(chosen[:-1]), total) < Fraction(percent, 100)
    assert chosen == sorted(counts, reverse=True)[: len(ids)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.data())
def test_the_most_and_the_least_frequent_complete_each_other(
    counts: list[int], data: st.DataObject
) -> None:
    num_rows = len(counts)
    vocabulary = Vocabulary(map(str, range(num_rows)), counts=counts)
    number = data.draw(st.integers(1, num_rows))
    rare = Rows.parse({"least_frequent": number})
    if number == num_rows:
        assert rare.resolve(num_rows, vocabulary).tolist() == list(range(num_rows))
    else:
        frequent = ~Rows.most_frequent(num_rows - number)
        expected = frequent.resolve(num_rows, vocabulary).tolist()
        assert rare.resolve(num_rows, vocabulary).tolist() == expected


def test_neighbours_are_measured_by_angle_and_padding_is_near_to_nothing() -> None:
    # Row 1 is far along the same line, row 2 is close by at another angle, row 3 opposite.
    vectors = np.array([[1, 0], [50, 1], [1, 1], [-1, 0], [0, 0], [0, 2]], np.float16)
    vocabulary = Vocabulary("abcdef", vectors=vectors)
    order = [0, 1, 2, 5, 3, 4]
    for number in range(1, 7):
        nearest = Rows.parse({"nearest": {"tokens": "a", "amount": number}})
        assert nearest.resolve(6, vocabulary).tolist() == sorted(order[:number])


def test_rows_near_to_several_tokens_are_near_to_one_of_them() -> None:
    vectors = [[1.0, 0.0], [0.0, 1.0], [0.99, 0.01], [0.7, 0.7], [0.01, 0.99]]
    vocabulary = Vocabulary("abcde", vectors=vectors)  # type: ignore[arg-type]  # a list will do
    nearest = Rows.parse({"nearest": {"tokens": ["a", "b"], "amount": 4}})
    assert nearest.resolve(5, vocabulary).tolist() == [0, 1, 2, 4]


# Growing


@pytest.mark.parametrize("part", [-1, 4, 1.5, True])
def test_a_part_beyond_all_parts_is_refused(part: Any) -> None:
    with pytest.raises(InputError, match=f"{part} of 3"):
        Rows.grown(Rows.none(), Rows.all(), Growth(), part, 3)


# Files


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
    "npy_small_ids": ("ids_file", "a.npy", _npy(np.array([7, 2], np.uint8)), [2, 7]),
    "npy_mask": ("ids_file", "a.npy", _npy(np.arange(V) > 9), [10, 11]),
    "npy_of_no_id": ("ids_file", "a.npy", _npy(np.array([], np.int64)), []),
    "ids": ("ids_file", "a.txt", _text(b"7\n2\n"), [2, 7]),
    "ids_without_a_last_line_end": ("ids_file", "a", _text(b"7\n2"), [2, 7]),
    "ids_with_empty_lines": ("ids_file", "a.txt", _text(b"\n7\n\n 2 \n\n"), [2, 7]),
    "ids_from_windows": ("ids_file", "a.txt", _text(b"\xef\xbb\xbf7\r\n2\r\n"), [2, 7]),
    "tokens": ("token_file", "a.txt", _text(b"w7\nw2\n"), [2, 7]),
    "tokens_with_empty_lines": ("token_file", "a.txt", _text(b"\nw7\n\n  w2\t\n"), [2, 7]),
    "tokens_from_windows": ("token_file", "a.txt", _text(b"\xef\xbb\xbfw7\r\nw2\r\n"), [2, 7]),
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
    "negative_id": ("ids_file", "a.txt", _text(b"3\n-4\n"), "-4"),
    "fraction": ("ids_file", "a.txt", _text(b"1.5\n"), "'1.5'"),
    "id_twice": ("ids_file", "a.txt", _text(b"3\n4\n3\n"), "3 twice"),
    "no_id": ("ids_file", "a.txt", _text(b"\n"), "[]"),
    "ids_that_are_no_text": ("ids_file", "a.txt", _text(b"\xff\xfe3"), "0xff"),
    "npy_of_fractions": ("ids_file", "a.npy", _npy(np.array([0.5])), "0.5"),
    "npy_of_words": ("ids_file", "a.npy", _npy(np.array(["a"])), "'a'"),
    "npy_matrix": ("ids_file", "a.npy", _npy(np.zeros((1, 2), np.int64)), "[[0, 0]]"),
    "npy_scalar": ("ids_file", "a.npy", _npy(np.int64(7)), "array(7)"),
    "npy_objects": ("ids_file", "a.npy", _npy(np.array([1, None])), "allow_pickle=False"),
    "npy_empty_file": ("ids_file", "a.npy", _text(b""), "Received: "),
    "npy_that_is_text": ("ids_file", "a.npy", _text(b"7\n2\n"), "Received: "),
    "npy_cut_short": ("ids_file", "a.npy", _text(b"\x93NUMPY\x01\x00"), "Received: "),
    "npy_that_is_a_broken_zip": ("ids_file", "a.npy", _text(b"PK\x03\x04 oops"), "Received: "),
    "npy_that_is_an_npz": (
        "ids_file",
        "a.npy",
        lambda path: np.savez(path.open("wb"), ids=[1]),
        "Received: ",
    ),
    "no_token": ("token_file", "a.txt", _text(b"\n \n"), "[]"),
    "token_twice": ("token_file", "a.txt", _text(b"a\nb\na\n"), "'a' twice"),
    "tokens_that_are_no_text": ("token_file", "a.txt", _text(b"caf\xe9\n"), "0xe9"),
    "absent_ids": ("ids_file", "absent.txt", lambda _: None, "No such file"),
    "absent_npy": ("ids_file", "absent.npy", lambda _: None, "No such file"),
    "absent_tokens": ("token_file", "absent.txt", lambda _: None, "No such file"),
    "folder_of_ids": ("ids_file", "a.npy", Path.mkdir, "Is a directory"),
    "folder_of_tokens": ("token_file", "a", Path.mkdir, "Is a directory"),
    "no_name_of_a_file": ("token_file", "a\0b", lambda _: None, "null"),
}


@pytest.mark.parametrize(
    ("kind", "name", "write", "received"), MALFORMED_FILES.values(), ids=MALFORMED_FILES
)
def test_malformed_files_of_rows_are_refused_in_one_line_with_their_name(
    kind: str, name: str, write: Callable[[Path], None], received: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(InputError) as refused:
        Rows.parse({"union": [{kind: str(path)}]})
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    assert received in message
    assert "\n" not in message


def test_a_repeated_token_of_a_large_file_is_found_at_once(tmp_path: Path) -> None:
    # Comparing each token with all before it would take minutes.
    tokens = [f"token{i}" for i in range(200_000)]
    random.Random(0).shuffle(tokens)
    path = tmp_path / "tokens.txt"
    path.write_text("\n".join([*tokens, tokens[-7]]))
    with pytest.raises(InputError, match=f"'{tokens[-7]}' twice"):
        Rows.parse({"token_file": path})
