"""Every framework says the same: when rows are refused, and while a schedule runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import HISTORIES, MATRIX, MEASURED, OPTIMIZERS, SCHEDULES, batches_of, told, written

from partial_embedding import InputError, Schedule

SGD = OPTIMIZERS["SGD"]
BEYOND = "rows must lie in [0, 10). Received: 140. Was the vocabulary resized?"
REFUSED: dict[str, tuple[object, str]] = {
    "beyond_the_table": ([140], BEYOND),
    "first_beyond_the_table": (
        [10],
        "rows must lie in [0, 10). Received: 10. Was the vocabulary resized?",
    ),
    "negative": (
        [3, -1],
        "row ids are not negative. Received: -1. For the last n rows write slice(-n, None).",
    ),
    "repeated": ([2, 5, 2], "each row is named once. Received 2 twice. Remove one."),
    "empty": ([], "a list of rows is not empty. Received: []. For no row write 'none'."),
    "fractional": ([1.5], "row ids are integers. Received: array([1.5]). Convert them to int64."),
    "short_mask": (
        [True, False],
        "a mask has one entry for each of the 10 rows. Received: 2. Was the vocabulary resized?",
    ),
    "long_range": (
        range(11),
        "a range lies within the table's 10 rows. Received: [0, 11, 1]. "
        "Was the vocabulary resized?",
    ),
    "number": (
        3,
        "rows are 'all', 'none', ids, a boolean mask, a range, a slice, a mapping or Rows. "
        "Received: 3. For one row write [3].",
    ),
    "unknown_word": (
        "some",
        "rows are chosen by one of ['all', 'covering', 'difference', 'ids', 'ids_file', "
        "'intersection', 'least_frequent', 'mask', 'matching', 'min_count', 'missing', "
        "'most_frequent', 'nearest', 'new', 'none', 'not', 'random', 'range', 'token_file', "
        "'tokens', 'union']. Received: 'some'. Write [3, 7] for ids, or "
        "{tokens: [the]} for words.",
    ),
    "without_vocabulary": (
        "missing",
        "these rows are chosen by the vocabulary's missing. Received no vocabulary. "
        "Pass vocabulary=Vocabulary(tokens, missing=…) to the callback, or ids.",
    ),
}


@pytest.mark.parametrize(("rows", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_rows_are_refused_in_the_same_words(adapter: Any, rows: object, message: str) -> None:
    with pytest.raises(InputError) as refused:
        adapter.Training(MATRIX, rows, SGD)
    assert str(refused.value) == message
    training = adapter.Training(MATRIX, [2, 5], SGD)
    for verb in (training.train, training.unfreeze, training.freeze):
        with pytest.raises(InputError) as refused:
            verb(rows)
        assert str(refused.value) == message
    assert training.trainable_rows == [2, 5]


def test_ids_of_any_array_are_taken(adapter: Any) -> None:
    training = adapter.Training(MATRIX, np.array([5, 2], np.int16), SGD)
    assert training.trainable_rows == [2, 5]


def test_a_schedule_that_does_not_fit_is_refused_before_it_starts(
    adapter: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [{"epoch": 0, "rows": [2]}, {"epoch": 3, "rows": [2, 140]}]
    with pytest.raises(InputError) as refused:
        adapter.fit(MATRIX, written(tmp_path, {"stages": stages}), SGD, batches_of(0), 1, "all")
    assert str(refused.value).startswith("words: ")
    assert str(refused.value).endswith(BEYOND)
    assert "stage 0" not in capsys.readouterr().out


# What begins, how many rows then train, and what was compared.
TOLD = {
    "leaving_and_returning": (
        HISTORIES["leaving_and_returning"],
        [
            ("0 from epoch 0", 3),
            ("1 from epoch 1", 0),
            ("2 from epoch 2", 2),
            ("3 from epoch 3", 4),
        ],
        "7, 10, 8, 6",
    ),
    "growing_shares": (
        SCHEDULES["growing_shares"],
        [
            ("0 from step 0", 1),
            ("0 from step 3, increment 1 of 3 towards stage 1", 3),
            ("0 from step 6, increment 2 of 3 towards stage 1", 4),
            ("1 from step 9", 6),
        ],
        "9, 4",
    ),
    "plateau": (
        SCHEDULES["plateau"],
        [
            ("0 from step 0", 3),
            ("1 from step 9 after a plateau of val_measured", 4),
            ("2 from step 10", 3),
        ],
        "7, 6, 7",
    ),
}


@pytest.mark.parametrize(("schedule", "stages", "frozen"), TOLD.values(), ids=TOLD)
def test_stages_and_the_audit_are_told_in_the_same_words(
    adapter: Any,
    schedule: Schedule,
    stages: list[tuple[str, int]],
    frozen: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured = MEASURED if schedule.metrics else ()
    path, ever = written(tmp_path, schedule), [1, 2, 4, 5, 6, 7]
    adapter.fit(MATRIX, path, SGD, batches_of(0), 4, ever, measured)
    first = stages[0][1]
    assert told(capsys.readouterr().out) == [
        f"words: {first} of 10 rows train ({3 * first} of 30 parameters), 0 parameters elsewhere",
        *(
            f"words: stage {place}: {n} rows train, {10 * n}.0 % of the table"
            for place, n in stages
        ),
        f"audit: words: frozen rows by stage: {frozen}; changed a bit: 0",
    ]
