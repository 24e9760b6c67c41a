"""Rows that are malformed, or that fit no such table or vocabulary."""

import re
from typing import Any

import numpy as np
import pytest

from partial_embedding import Rows, Vocabulary

V = 12
TOKENS = tuple(f"w{i}" for i in range(V))
VOCABULARY = Vocabulary(TOKENS, [1] * V, [2], np.eye(V, dtype=np.float32))

# What is malformed whatever the table, and what of it the message must show.
MALFORMED: dict[str, tuple[Any, str]] = {
    "unknown_word": ("everything", "'everything'"),
    "word_that_needs_an_argument": ("ids", "None"),
    "union_without_choices": ("union", "None"),
    "unknown_kind": ({"rarest": 3}, "'rarest'"),
    "two_kinds": ({"ids": [1], "range": [0, 2]}, "['ids', 'range']"),
    "no_kind": ({}, "[]"),
    "number": (7, "7"),
    "nothing": (None, "None"),
    "no_ids": ([], "[]"),
    "no_numbers_in_an_array": (np.array([]), "[]"),
    "id_twice": ([4, 9, 4], "4 twice"),
    "negative_id": ([3, -1], "-1"),
    "fractional_id": ([1.5, 2.5], "[1.5, 2.5]"),
    "integral_floats": (np.array([1.0, 2.0]), "array([1., 2.])"),
    "words_in_a_list": (["cat", "dog"], "['cat', 'dog']"),
    "ragged_list": ([[1], [2, 3]], "[[1], [2, 3]]"),
    "matrix_of_ids": ([[1, 2], [3, 4]], "[[1, 2], [3, 4]]"),
    "bytes": (b"ab", "b'ab'"),
    "matrix_mask": (np.ones((2, 3), np.bool_), "True"),
    "ids_of_a_word": ({"ids": "all"}, "'all'"),
    "ids_that_are_a_mask": ({"ids": [True, False]}, "[True, False]"),
    "mask_of_numbers": ({"mask": [1, 0, 1]}, "[1, 0, 1]"),
    "range_of_one": ({"range": [3]}, "[3]"),
    "range_of_fractions": ({"range": [0, 2.5]}, "[0, 2.5]"),
    "range_of_a_word": ({"range": "all"}, "'all'"),
    "range_with_step_0": ({"range": [0, 9, 0]}, "[0, 9, 0]"),
    "slice_of_words": (slice("a", "b"), "'a'"),
    "argument_for_all": ({"all": 3}, "3"),
    "amount_zero": ({"most_frequent": 0}, "0"),
    "share_above_one": ({"most_frequent": 1.5}, "1.5"),
    "share_that_is_no_number": ({"most_frequent": float("nan")}, "nan"),
    "amount_true": ({"most_frequent": True}, "True"),
    "min_count_zero": ({"min_count": 0}, "0"),
    "covering_in_percent": ({"covering": 90}, "90"),
    "covering_one_without_a_point": ({"covering": 1}, "Received: 1."),
    "tokens_of_nothing": ({"tokens": []}, "[]"),
    "tokens_that_are_numbers": ({"tokens": ["the", 7]}, "['the', 7]"),
    "tokens_in_a_mapping": ({"tokens": {"the": 1}}, "{'the': 1}"),
    "tokens_in_bytes": ({"tokens": b"the"}, "b'the'"),
    "token_twice": ({"tokens": ["a", "b", "a"]}, "'a' twice"),
    "pattern_unclosed": ({"matching": "(a"}, "'(a'"),
    "pattern_of_bytes": ({"matching": b"a"}, "b'a'"),
    "pattern_that_repeats_too_much": ({"matching": "a{99999999999}"}, "99999999999"),
    # Its flags would be lost on the way through YAML.
    "pattern_compiled": ({"matching": re.compile("a", re.IGNORECASE)}, "re.compile"),
    "random_share_above_one": ({"random": 1.5}, "1.5"),
    "random_negative_seed": ({"random": {"amount": 2, "seed": -1}}, "'seed': -1"),
    "random_unknown_key": ({"random": {"amount": 2, "sed": 1}}, "'sed': 1"),
    "nearest_of_tokens": ({"nearest": ["a"]}, "['a']"),
    "nearest_without_amount": ({"nearest": {"tokens": ["a"]}}, "{'tokens': ['a']}"),
    "nearest_unknown_key": ({"nearest": {"tokens": "a", "amount": 1, "by": 2}}, "'by': 2"),
    "nearest_malformed_amount": ({"nearest": {"tokens": "a", "amount": -3}}, "-3"),
    "ids_file_of_ids": ({"ids_file": [1, 2]}, "[1, 2]"),
    "token_file_of_a_number": ({"token_file": 3}, "3"),
    "grown": ({"grown": {"from": "none", "to": "all"}}, "'grown'"),
    "difference_of_nothing": ({"difference": []}, "[]"),
    "union_of_nothing": ({"union": []}, "[]"),
    "deep_inside": ({"not": {"union": ["all", {"intersection": [[4, 4]]}]}}, "4 twice"),
}


@pytest.mark.parametrize(("value", "received"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_rows_are_refused_with_what_was_received(
    value: Any, received: str, refused: Any
) -> None:
    refused(Rows.parse, value, parts=[received])


# What is well formed but does not fit this table or this vocabulary.
UNFITTING: dict[str, tuple[Any, Vocabulary | None, tuple[str, ...]]] = {
    "id_beyond_the_table": ([3, V], None, ("[0, 12)", "Received: 12.")),
    "short_mask": ([True] * (V - 1), None, ("12 rows", "Received: 11.")),
    "range_beyond": ({"range": [0, V + 1]}, None, ("12 rows", "13")),
    "range_downward": ({"range": [5, 2]}, None, ("[5, 2, None]", "rows 2 to 4")),
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
    "covering_without_counts": ({"covering": 0.5}, Vocabulary(TOKENS), ("counts", "without")),
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
    "another_vocabulary": ("all", Vocabulary("abc"), ("3 tokens", "12 rows")),
    "inside_a_union": ({"union": ["all", [V]]}, None, ("[0, 12)", "Received: 12.")),
}


@pytest.mark.parametrize(("value", "vocabulary", "named"), UNFITTING.values(), ids=UNFITTING)
def test_rows_that_do_not_fit_are_refused_with_what_was_received(
    value: Any, vocabulary: Vocabulary | None, named: tuple[str, ...], refused: Any
) -> None:
    refused(Rows.parse(value).resolve, V, vocabulary, parts=named)
