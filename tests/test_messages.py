"""The words for where a run is, alike for every framework."""

from typing import Any

import numpy as np
import pytest

from partial_embedding import Position, Schedule, Vocabulary
from partial_embedding.schedule import Evaluation
from partial_embedding.schedule.messages import place_text, stage_line

FIRST = {"epoch": 0, "rows": "none"}
LOSSES = tuple(Evaluation(epoch, 30 * epoch + 30, {"loss": 1.0}) for epoch in range(3))


def growing(unit: str, at: float, **more: Any) -> list[dict[str, Any]]:
    return [{unit: 0, "rows": "none"}, {unit: at, "rows": "all", "grow": "linear", **more}]


PLACES: dict[str, tuple[Schedule, Position, str]] = {
    "epoch": (Schedule([FIRST]), Position(7, 7000), "stage 0 from epoch 7"),
    "step": (
        Schedule([FIRST, {"step": 1000, "rows": "all"}]),
        Position(1, 12_345),
        "stage 1 from step 12,345",
    ),
    "share": (
        Schedule([FIRST, {"share": 0.5, "rows": "all"}]),
        Position(1, 1000, 2000),
        "stage 1 from step 1,000",
    ),
    "part_of_epochs": (
        Schedule(growing("epoch", 4)),
        Position(3, 90),
        "stage 0 from epoch 3, increment 3 of 4 towards stage 1",
    ),
    "fewer_parts_than_epochs": (
        Schedule(growing("epoch", 4, grow={"increments": 2})),
        Position(3, 90),
        "stage 0 from epoch 3, increment 1 of 2 towards stage 1",
    ),
    "part_of_steps": (
        Schedule(growing("step", 100)),
        Position(3, 90),
        "stage 0 from step 90, increment 9 of 10 towards stage 1",
    ),
    "after_a_plateau": (
        Schedule([FIRST, {"plateau": "loss", "rows": "all"}]),
        Position(2, 61, evaluations=LOSSES[:2]),
        "stage 1 from epoch 2 after a plateau of loss",
    ),
    "cycle": (
        Schedule([FIRST, {"epoch": 2, "rows": "all"}], cycle=3),
        Position(8, 90),
        "stage 1 from epoch 8, cycle 2",
    ),
    "part_in_a_cycle": (
        Schedule(growing("step", 20), cycle=30),
        Position(0, 36),
        "stage 0 from step 36, increment 3 of 10 towards stage 1, cycle 1",
    ),
}


@pytest.mark.parametrize(("schedule", "position", "text"), PLACES.values(), ids=PLACES)
def test_a_place_says_stage_part_and_cycle(
    schedule: Schedule, position: Position, text: str
) -> None:
    assert place_text(schedule, position) == text


LINES: dict[str, tuple[list[int], int, Vocabulary | None, str]] = {
    "alone": ([1, 2], 8, None, "2 rows train, 25.0 % of the table"),
    "without_counts": ([1], 3, Vocabulary("abc"), "1 rows train, 33.3 % of the table"),
    "counted": (
        [0],
        3,
        Vocabulary("abc", counts=[2, 1, 0]),
        "1 rows train, 33.3 % of the table, 66.7 % of training tokens",
    ),
    "nothing_counted": (
        [0],
        1,
        Vocabulary("a", counts=[0]),
        "1 rows train, 100.0 % of the table, 0.0 % of training tokens",
    ),
    "empty_table": ([], 0, None, "0 rows train, 0.0 % of the table"),
}


@pytest.mark.parametrize(("ids", "num_rows", "vocabulary", "text"), LINES.values(), ids=LINES)
def test_a_line_says_how_many_rows_train_and_what_they_cover(
    ids: list[int], num_rows: int, vocabulary: Vocabulary | None, text: str
) -> None:
    line = stage_line("words", "stage 3 from step 9", np.array(ids, np.int64), num_rows, vocabulary)
    assert line == f"words: stage 3 from step 9: {text}"
