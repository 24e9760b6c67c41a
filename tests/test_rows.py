"""Rows: every accepted form, and the algebra against Python's sets."""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from partial_embedding import InputError, Rows, Vocabulary

V = 12
COUNTS = (3, 9, 0, 9, 1, 4, 4, 4, 0, 2, 7, 5)
MISSING = (2, 8, 11)
TOKENS = tuple(f"w{i}" for i in range(V))
VECTORS = np.random.default_rng(0).normal(size=(V, 3)).astype(np.float16)
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
    "set": ({7, 2}, [2, 7]),
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
    "range": (range(2, 5), [2, 3, 4]),
    "empty_range": (range(0), []),
    "slice_from": (slice(9, None), [9, 10, 11]),
    "slice_of_the_last_two": (slice(-2, None), [10, 11]),
    "slice_backwards": (slice(None, None, -5), [1, 6, 11]),
    "config_ids": ({"ids": [7, 2]}, [2, 7]),
    "config_mask": ({"mask": [True] + [False] * (V - 1)}, [0]),
    "config_range": ({"range": [8, None, 2]}, [8, 10]),
    "config_all": ({"all": None}, list(range(V))),
    "most_frequent_number": ({"most_frequent": 3}, [1, 3, 10]),
    "most_frequent_share": ({"most_frequent": 0.25}, [1, 3, 10]),
    # Rows 5, 6 and 7 occur equally often; the lower ids come first.
    "most_frequent_among_equals": ({"most_frequent": 6}, [1, 3, 5, 6, 10, 11]),
    "most_frequent_share_in_numpy": ({"most_frequent": np.float64(0.25)}, [1, 3, 10]),
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
    "tokens_from_a_generator": ({"tokens": (f"w{i}" for i in (7, 2))}, [2, 7]),
    "matching_anywhere": ({"matching": "1"}, [1, 10, 11]),
    "matching_without_case": ({"matching": "(?i)^W[78]"}, [7, 8]),
    "matching_nothing": ({"matching": "^x"}, []),
    "random_all": ({"random": 1.0}, list(range(V))),
    "random_without_a_seed": ({"random": 3}, sorted(np.random.default_rng(0).permutation(V)[:3])),
    "nearest_all": ({"nearest": {"tokens": ["w4"], "amount": V}}, list(range(V))),
    "nearest_only_themselves": ({"nearest": {"tokens": ["w9", "w4"], "amount": 2}}, [4, 9]),
    "difference": ({"difference": ["all", [0, 1], {"range": [3, None]}]}, [2]),
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


def test_a_random_share_has_a_seed_that_may_be_left_out() -> None:
    assert Rows.parse({"random": 0.3}) == Rows.parse({"random": {"amount": 0.3, "seed": 0}})


@pytest.mark.parametrize("total", [7, 10, 49, 100, 300, 1000])
def test_rows_that_cover_a_share_are_the_fewest_that_do(total: int) -> None:
    # With one token of each kind, k/total of the tokens are covered by exactly k rows.
    vocabulary = Vocabulary(map(str, range(total)), counts=[1] * total)
    for number in range(1, total + 1):
        ids = Rows.parse({"covering": number / total}).resolve(total, vocabulary)
        assert ids.tolist() == list(range(number))


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
    st.just(("all", frozenset(range(V)))),
    st.just(("none", frozenset())),
    st.just(("missing", frozenset(MISSING))),
    st.frozensets(st.integers(0, V - 1), min_size=1).map(lambda s: (list(s), s)),
    st.lists(st.booleans(), min_size=V, max_size=V).map(
        lambda mask: (mask, frozenset(i for i, kept in enumerate(mask) if kept))
    ),
    # One that names no row is refused, unless it ends where it starts.
    st.slices(V).filter(lambda s: range(V)[s]).map(lambda s: (s, frozenset(range(V)[s]))),
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
@example((slice(0, -V), frozenset()))  # from the first row up to the first row
# Where it counts that cosines are compared, and that padding, among the given, is near to nothing.
@example(_nearest((frozenset({3, 4, 10}), 9)))
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


RANGES = st.builds(
    range, st.integers(0, V), st.integers(-1, V), st.sampled_from([1, 2, 5, -1, -2])
).filter(lambda ids: all(0 <= row < V for row in ids))


@settings(max_examples=50, deadline=None)
@given(RANGES)
def test_a_range_names_the_ids_that_it_yields(ids: range) -> None:
    assert Rows.parse(ids).resolve(V).tolist() == sorted(ids)


@pytest.mark.parametrize("ids", [range(-2, 2), range(2, -3, -1)], ids=["up", "down"])
def test_a_range_with_negative_ids_is_refused(ids: range) -> None:
    # As a slice, -2 counts from the end; in a range it is the id -2, which no table has.
    with pytest.raises(InputError, match="-2"):
        Rows.parse(ids).resolve(V)


def test_an_array_that_was_computed_empty_is_no_row() -> None:
    assert Rows.parse(np.array([], np.int64)) == Rows.none()
