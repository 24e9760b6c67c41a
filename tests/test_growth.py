"""Growth: never back, from exactly the rows before to exactly all, whatever shape and order."""

import copy
import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_embedding import InputError, Rows, Vocabulary
from partial_embedding.rows.growth import GrownRows, Growth

V = 30
COUNTS = np.random.default_rng(1).integers(0, 9, V)
TOKENS = tuple(f"w{row}" for row in range(V))
VOCABULARY = Vocabulary(TOKENS, COUNTS)
SHAPES = ["linear", "cosine", "exponential", "doubling"]
IDS = st.lists(st.integers(0, V - 1), min_size=1, unique=True)
ORDERS = st.one_of(
    st.sampled_from(["most_frequent", "least_frequent", "random", "ids"]),
    IDS,
    IDS.map(lambda ids: [TOKENS[row] for row in ids]),
)
GROWTHS = st.builds(
    Growth, st.sampled_from(SHAPES), ORDERS, st.none() | st.integers(1, 50), st.integers(0, 9)
)


@settings(max_examples=60, deadline=None)
@given(GROWTHS, st.sets(st.integers(0, V - 1)), st.sets(st.integers(0, V - 1)), st.integers(1, 12))
def test_rows_only_join_from_exactly_the_former_ones_to_exactly_all(
    growth: Growth, before: set[int], after: set[int], parts: int
) -> None:
    def rows_at(part: int) -> set[int]:
        first, last = (Rows.parse(np.array(sorted(ids), int)) for ids in (before, after))
        return set(GrownRows(first, last, growth, part, parts).resolve(V, VOCABULARY).tolist())

    grown = [rows_at(part) for part in range(parts + 1)]
    assert grown[0] == before
    assert grown[-1] == before | after
    assert all(earlier <= later for earlier, later in pairwise(grown))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.integers(1, 60),
    st.integers(0, 10**7).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
)
def test_numbers_of_trainable_rows_rise_between_their_ends(
    shape: str, parts: int, ends: tuple[int, int]
) -> None:
    before, after = ends
    numbers = [Growth(shape).trainable(part, parts, before, after) for part in range(parts + 1)]
    assert numbers == sorted(numbers)
    assert (numbers[0], numbers[-1]) == (before, after)


# How many of rows 100 to 1000 train, worked out by hand from what each shape is said to be.
NUMBERS: dict[str, tuple[int, int, list[int]]] = {
    "linear": (100, 1000, [100, 325, 550, 775, 1000]),
    "cosine": (0, 1000, [0, 146, 500, 854, 1000]),
    "exponential": (100, 1600, [100, 200, 400, 800, 1600]),
    "doubling": (0, 1000, [0, 125, 250, 500, 1000]),
}


@pytest.mark.parametrize("shape", NUMBERS)
def test_shapes_unfreeze_as_many_rows_as_they_say(shape: str) -> None:
    before, after, expected = NUMBERS[shape]
    assert [Growth(shape).trainable(part, 4, before, after) for part in range(5)] == expected


def test_exponential_growth_from_no_row_begins_with_one() -> None:
    numbers = [Growth("exponential").trainable(part, 3, 0, 1000) for part in range(4)]
    assert numbers == [0, 10, 100, 1000]


ARRANGED: dict[str, tuple[Any, list[int]]] = {
    "most_frequent": ("most_frequent", [3, 1, 4, 0, 2]),
    "least_frequent": ("least_frequent", [2, 0, 4, 1, 3]),
    "ids": ("ids", [0, 1, 2, 3, 4]),
    "listed_ids": ([4, 5, 0], [4, 0, 1, 2, 3]),
    "ids_in_an_array": (np.array([4, 5, 0]), [4, 0, 1, 2, 3]),
    "listed_tokens": (["d", "b"], [3, 1, 0, 2, 4]),
}


@pytest.mark.parametrize(("order", "expected"), ARRANGED.values(), ids=ARRANGED)
def test_rows_join_in_their_order(order: Any, expected: list[int]) -> None:
    vocabulary = Vocabulary("abcdef", counts=[2, 5, 0, 7, 5, 9])
    growth = Growth(order=order)
    assert growth.arranged(np.arange(5), 6, vocabulary).tolist() == expected
    assert growth.arranged(np.array([], np.int64), 6, vocabulary).tolist() == []


def test_a_random_order_is_a_function_of_its_seed() -> None:
    def arranged(seed: int, ids: Any = range(V)) -> list[int]:
        return Growth(order="random", seed=seed).arranged(np.array(ids), V, None).tolist()

    assert arranged(3) == arranged(3)
    assert sorted(arranged(3)) == list(range(V))
    assert len({tuple(arranged(seed)) for seed in range(10)}) == 10
    # Rows that are left out do not move the others.
    assert arranged(3, [2, 9, 20]) == [row for row in arranged(3) if row in (2, 9, 20)]


@settings(max_examples=40, deadline=None)
@given(GROWTHS)
def test_growth_is_a_value_and_round_trips_through_yaml(growth: Growth) -> None:
    again = Growth.parse(yaml.safe_load(yaml.safe_dump(growth.to_config())))
    assert again == growth
    assert again.to_config() == growth.to_config()
    assert len({growth, again, copy.deepcopy(growth), pickle.loads(pickle.dumps(growth))}) == 1
    assert Growth.parse(growth) is growth
    with pytest.raises(AttributeError):
        growth.shape = "cosine"  # type: ignore[misc]


MALFORMED: dict[str, tuple[Any, str]] = {
    "number": (3, "3"),
    "truth": (True, "True"),
    "unknown_shape": ("fast", "'fast'"),
    "shape_null": ({"shape": None}, "None"),
    "unknown_key": ({"shape": "linear", "steps": 3}, "'steps': 3"),
    "unknown_order": ({"order": "frequent"}, "'frequent'"),
    "empty_order": ({"order": []}, "[]"),
    "order_of_a_number": ({"order": 5}, "5"),
    "mixed_order": ({"order": [0, "a"]}, "[0, 'a']"),
    "order_of_truth": ({"order": [True, False]}, "[True, False]"),
    "negative_order": ({"order": [3, -1]}, "[3, -1]"),
    "order_with_a_row_twice": ({"order": [3, 1, 3]}, "[3, 1, 3]"),
    "no_parts": ({"increments": 0}, "0"),
    "fractional_parts": ({"increments": 2.0}, "2.0"),
    "negative_seed": ({"seed": -1}, "-1"),
}


@pytest.mark.parametrize(("value", "received"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_growth_is_refused_with_what_was_received(
    value: Any, received: str, refused: Any
) -> None:
    refused(Growth.parse, value, parts=[received])


UNFITTING: dict[str, tuple[Any, Vocabulary | None, tuple[str, ...]]] = {
    "by_frequency_without_vocabulary": ("most_frequent", None, ("counts", "no vocabulary")),
    "by_rarity_without_counts": ("least_frequent", Vocabulary(TOKENS), ("counts", "without")),
    "tokens_without_vocabulary": (["w1"], None, ("tokens", "no vocabulary")),
    "unknown_token": (["w1", "the"], VOCABULARY, ("'the'",)),
    "row_beyond": ([0, V], None, ("order", "[0, 30)", "Received: 30.")),
    "row_far_beyond": ([0, 10**30], None, ("[0, 30)", str(10**30))),
}


@pytest.mark.parametrize(("order", "vocabulary", "named"), UNFITTING.values(), ids=UNFITTING)
def test_an_order_that_does_not_fit_is_refused(
    order: Any, vocabulary: Vocabulary | None, named: tuple[str, ...], refused: Any
) -> None:
    rows = GrownRows(Rows.none(), Rows.all(), Growth(order=order), 1, 2)
    refused(rows.resolve, V, vocabulary, parts=named)


@pytest.mark.parametrize("increment", [-1, 4, 1.5, True])
def test_a_increment_beyond_all_is_refused(increment: Any) -> None:
    with pytest.raises(InputError, match=f"{increment} of 3"):
        GrownRows(Rows.none(), Rows.all(), Growth(), increment, 3)


def test_growing_rows_combine_and_compare_as_others_do() -> None:
    half, whole = (
        GrownRows(Rows.parse([9]), Rows.all(), Growth(order="ids"), n, 2) for n in (1, 2)
    )
    assert half == GrownRows(Rows.parse([9]), Rows.all(), Growth(order="ids"), 1, 2) != whole
    assert (whole - half).resolve(11).tolist() == [5, 6, 7, 8, 10]
    assert Rows.parse(half) is half
    assert "'increment': 1" in repr(half)
