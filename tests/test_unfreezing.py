"""What every framework's `ScheduledTables` decides alike, on tables that are sets of ids."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from partial_embedding import InputError, Position, Schedule
from partial_embedding.schedule.messages import StageReport
from partial_embedding.schedule.runner import BaseScheduledTables

GROWING = Schedule(
    [
        {"step": 0, "rows": [0, 1]},
        {"step": 6, "rows": range(8), "grow": {"order": [*range(2, 8)], "increments": 3}},
    ]
)
PLAIN = Schedule([{"step": 0, "rows": [3]}])
WAITING = Schedule([{"step": 0, "rows": [3]}, {"plateau": "loss", "rows": "all"}])


class Table:
    """Ten rows of four columns, and the rows that train."""

    def __init__(self) -> None:
        self.trainable = np.arange(10)


class Audit:
    """Notes when it is asked, and is content."""

    asked: list[tuple[str, int, int]]

    def __init__(self, table: Table, name: str) -> None:
        self.name = name
        self.frozen = np.setdiff1d(np.arange(10), table.trainable)

    def check(self, step: int | None = None) -> None:
        assert step is not None
        self.asked.append((self.name, step, len(self.frozen)))


class ScheduledTables(BaseScheduledTables[Table]):
    def _shape(self, table: Table) -> tuple[int, int]:
        return 10, 4

    def _trainable(self, table: Table) -> Any:
        return table.trainable

    def _train(self, table: Table, ids: Any, rate_scale: Any) -> None:
        table.trainable = ids

    def _parameters_elsewhere(self) -> int:
        return 0


def tables_of(schedules: Mapping[str | None, Schedule], said: list[str]) -> ScheduledTables:
    Audit.asked = []
    tables = {"words": Table(), "items": Table()}
    return ScheduledTables(tables, schedules, None, True, said.append, Audit)


def test_frozen_rows_are_compared_before_each_part_that_begins() -> None:
    tables = tables_of({"words": GROWING}, [])
    for step in range(9):
        tables.move_to(Position(step=step))
    # Each time the rows that were frozen since the part before.
    assert Audit.asked == [("words", 2, 8), ("words", 4, 6), ("words", 6, 4)]
    tables.audit_now(7)
    tables.finish(8)
    assert Audit.asked[3:] == [("words", 7, 2), ("words", 8, 2)]


def test_a_stage_reports_the_rows_that_were_frozen_when_it_began() -> None:
    said: list[str] = []
    tables = tables_of({"words": GROWING}, said)
    for step in range(9):
        tables.move_to(Position(step=step))
    tables.finish(9)
    assert tables.reports == [StageReport("words", 0, 8, 0), StageReport("words", 1, 2, 0)]
    assert said[-1] == "audit: words: frozen rows by stage: 8, 2; changed a bit: 0"
    assert [line.partition(":")[2].partition(":")[0] for line in said[:-1]] == [
        " stage 0 from step 0",
        " stage 0 from step 2, increment 1 of 3 towards stage 1",
        " stage 0 from step 4, increment 2 of 3 towards stage 1",
        " stage 1 from step 6",
    ]


def test_a_move_says_whether_anything_began() -> None:
    tables = tables_of({"words": GROWING, "items": PLAIN}, [])
    began = [tables.move_to(Position(step=step)) for step in range(8)]
    assert began == [True, False, True, False, True, False, True, False]


def test_tables_follow_the_schedule_of_their_name_or_the_one_for_all_others() -> None:
    both = tables_of({"words": GROWING, None: WAITING}, [])
    assert list(both.tables) == ["words", "items"]
    assert both.schedule_of("words") == GROWING
    assert both.schedule_of("items") == WAITING
    assert both.metrics == ("loss",)
    one = tables_of({"items": PLAIN}, [])
    assert list(one.tables) == ["items"]
    assert one.metrics == ()


def test_a_schedule_for_no_table_is_refused() -> None:
    message = "schedules are named after the model's tables, ['items', 'words']. Received: 'word'."
    with pytest.raises(InputError, match=re.escape(message)):
        tables_of({"word": PLAIN}, [])


def test_a_run_that_goes_on_tells_what_was_changed_in_each_schedule() -> None:
    said: list[str] = []
    tables = tables_of({"words": GROWING, "items": WAITING}, said)
    tables.go_on({None: PLAIN, "words": GROWING}, Position(step=1), None)
    (line,) = said
    assert line.startswith("items: the schedule is not the checkpoint's: stages[1]")
    with pytest.raises(InputError, match=r"^words: a resumed run trains the rows"):
        tables.go_on({None: PLAIN}, Position(step=1), None)
