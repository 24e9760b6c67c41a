"""Rows by frequency, at random and near to others: how many they are, and which."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_embedding import Rows, Vocabulary


@settings(max_examples=40, deadline=None)
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


@settings(max_examples=40, deadline=None)
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


@settings(max_examples=30, deadline=None)
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
