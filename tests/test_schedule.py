"""Schedules: the forms that are read, cycles and shares, changes, and tables."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_embedding import InputError, Position, Rows, Schedule, Stage
from partial_embedding.schedule import Evaluation, StageState, schedules_by_table
from partial_embedding.schedule.messages import changes

STAGE_LIST = [{"epoch": 0, "rows": [4, 5]}, {"epoch": 2, "rows": "all"}]


def _as_file(folder: Path) -> Path:
    path = folder / "schedule.yaml"
    path.write_text("stages:\n  - {epoch: 0, rows: [4, 5]}\n  - {epoch: 2, rows: all}\n")
    return path


FORMS: dict[str, Callable[[Path], Any]] = {
    "schedule": lambda _: Schedule(STAGE_LIST),
    "mapping": lambda _: {"stages": STAGE_LIST},
    "stages_in_a_tuple": lambda _: {"stages": tuple(STAGE_LIST)},
    "stage_objects": lambda _: {"stages": [Stage(0, Rows.parse([5, 4])), Stage(2, Rows.all())]},
    "rows_as_an_array": lambda _: {
        "stages": [{"epoch": 0, "rows": np.array([4, 5])}, STAGE_LIST[1]]
    },
    "path": _as_file,
    "path_as_text": lambda folder: str(_as_file(folder)),
}


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_every_form_reads_as_the_same_schedule(make: Callable[[Path], Any], tmp_path: Path) -> None:
    assert Schedule.parse(make(tmp_path)) == Schedule(STAGE_LIST)


def test_a_schedule_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Schedule(STAGE_LIST).stages = ()  # type: ignore[misc]


def test_later_changes_of_the_callers_mapping_do_not_matter() -> None:
    ids = np.array([4, 5])
    stages: list[dict[str, Any]] = [{"epoch": 0, "rows": ids}]
    schedule = Schedule.parse({"stages": stages})
    ids[:] = 0
    stages[0]["rows"] = "all"
    stages.append({"epoch": 0, "rows": "none"})
    assert schedule == Schedule([{"epoch": 0, "rows": [4, 5]}])


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = _as_file(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert Schedule.parse(path) == Schedule(STAGE_LIST)


# Cycles


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["epoch", "step", "share"]),
    st.sets(st.integers(1, 11), max_size=4),
    st.integers(12, 20),
    st.integers(1, 7),
    st.data(),
)
def test_a_cycle_begins_again_and_again(
    unit: str, later: set[int], cycle: int, turns: int, data: st.DataObject
) -> None:
    starts = [0, *sorted(later)]
    grows = [False, *(data.draw(st.booleans()) for _ in later)]
    # A share is a number of steps, of so many in all.
    total = cycle * turns + data.draw(st.integers(0, cycle)) if unit == "share" else 1
    stages = [
        {unit: at / total if unit == "share" and at else at, "rows": "none"}
        | ({"grow": {"order": "ids"}} if grow else {})
        for at, grow in zip(starts, grows, strict=True)
    ]
    schedule = Schedule(stages, cycle / total if unit == "share" else cycle)
    for place in data.draw(st.permutations(range(cycle * turns))):
        turn, within = divmod(place, cycle)
        stage = max(i for i, at in enumerate(starts) if at <= within)
        part = parts = 0
        if stage + 1 < len(starts) and grows[stage + 1]:
            length = starts[stage + 1] - starts[stage]
            parts = {"epoch": length, "step": min(length, 10), "share": 10}[unit]
            part = (within - starts[stage]) * parts // length
        position = Position(place) if unit == "epoch" else Position(0, place, total)
        assert schedule.state_at(position) == StageState(stage, part, parts, turn)


def test_a_cycle_of_a_share_begins_with_the_step_that_completes_it() -> None:
    # 0.3 / 0.1 is a little less than 3.
    schedule = Schedule([{"share": 0, "rows": "none"}, {"share": 0.05, "rows": "all"}], 0.1)
    for step in range(20):
        stage_state = schedule.state_at(Position(0, step, 20))
        assert (stage_state.cycle_index, stage_state.stage) == divmod(step, 2)


# Shares


@pytest.mark.parametrize("total", [3, 7, 10, 30, 49, 100, 999, 1000, 10**6, 10**8])
def test_a_share_of_steps_is_reached_with_the_step_that_completes_it(total: int) -> None:
    some = (1, 333_333, total // 7, total - 1)
    for step in range(1, total) if total <= 1000 else some:
        schedule = Schedule([STAGE_LIST[0], {"share": step / total, "rows": "all"}])
        for times in (1, 3):  # the same share of a run that is three times as long
            places = [Position(0, at, times * total) for at in (times * step - 1, times * step)]
            assert [schedule.state_at(place).stage for place in places] == [0, 1]


@pytest.mark.parametrize("total", [None, 0])
def test_a_share_of_a_run_of_unknown_length_is_refused(total: int | None) -> None:
    schedule = Schedule([STAGE_LIST[0], {"share": 0.5, "rows": "all"}])
    with pytest.raises(InputError, match=r"without total_steps.*max_epochs"):
        schedule.state_at(Position(0, 3, total))


def test_the_rows_within_an_epoch_move_only_where_something_counts_steps() -> None:
    grown = {"epoch": 4, "rows": "all", "grow": {"increments": 2}}
    assert not Schedule([*STAGE_LIST[:1], grown]).moves_within_epochs
    assert not Schedule([STAGE_LIST[0], {"plateau": "loss", "rows": "all"}]).moves_within_epochs
    assert Schedule([STAGE_LIST[0], {"step": 4, "rows": "all"}]).moves_within_epochs
    assert Schedule([{"share": 0, "rows": "all"}]).moves_within_epochs


def test_many_validations_are_counted_once_each() -> None:
    # Counting all of them again for each would take minutes.
    seen = tuple(Evaluation(epoch, epoch + 1, {"loss": -epoch}) for epoch in range(20_000))
    stages = [STAGE_LIST[0], {"plateau": "loss", "rows": "all"}]
    assert Schedule(stages).state_at(Position(20_000, 20_000, None, seen)).stage == 0
    stopped = (*seen, Evaluation(20_000, 20_001, {"loss": 0.0}))
    assert Schedule(stages).state_at(Position(20_001, 20_001, None, stopped)).stage == 1


# What is not the same in two schedules

BASE: dict[str, Any] = {
    "stages": [
        {"epoch": 0, "rows": {"most_frequent": 1}},
        {"epoch": 3, "rows": "all", "grow": "linear"},
        {"plateau": "loss", "rows": "none", "lr_scale": 0.5},
    ]
}


def changed(stage: int, **new: Any) -> dict[str, Any]:
    stages = copy.deepcopy(BASE["stages"])
    stages[stage] = {k: v for k, v in {**stages[stage], **new}.items() if v is not None}
    return {"stages": stages}


CHANGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing": (BASE, []),
    "default_that_is_written": (
        changed(1, lr_scale=1.0, warmup_steps=0, grow={"shape": "linear"}),
        [],
    ),
    "epoch": (changed(1, epoch=4), ["stages[1].epoch: 3 became 4"]),
    "unit": (
        changed(2, plateau=None, step=9),
        ["stages[2].plateau: {'monitor': 'loss'} was removed", "stages[2].step: 9 was added"],
    ),
    # To Python these two are equal.
    "one_row_and_all_rows": (
        changed(0, rows={"most_frequent": 1.0}),
        ["stages[0].rows.most_frequent: 1 became 1.0"],
    ),
    "rows": (changed(1, rows=[3]), ["stages[1].rows: 'all' became {'ids': [3]}"]),
    "growth": (changed(1, grow="cosine"), ["stages[1].grow.shape: 'linear' became 'cosine'"]),
    "rate_scale": (
        changed(2, lr_scale=0.25, warmup_steps=5),
        ["stages[2].lr_scale: 0.5 became 0.25", "stages[2].warmup_steps: 5 was added"],
    ),
    "stage_less": (
        {"stages": BASE["stages"][:2]},
        [
            "stages[2]: {'plateau': {'monitor': 'loss'}, 'rows': 'none', 'lr_scale': 0.5} "
            "was removed"
        ],
    ),
    "stage_more": (
        {"stages": [*BASE["stages"], {"epoch": 9, "rows": "all"}]},
        ["stages[3]: {'epoch': 9, 'rows': 'all'} was added"],
    ),
}


@pytest.mark.parametrize(("after_", "lines"), CHANGES.values(), ids=CHANGES)
def test_changes_are_exactly_what_differs(after_: dict[str, Any], lines: list[str]) -> None:
    before, after = Schedule.parse(BASE), Schedule.parse(after_)
    assert changes(before, after) == lines
    assert (before == after) == (not lines)
    assert len(changes(after, before)) == len(lines)


def test_a_changed_cycle_is_listed() -> None:
    once, again = (Schedule(STAGE_LIST, cycle) for cycle in (None, 4))
    assert changes(once, again) == ["cycle: 4 was added"]
    assert changes(again, Schedule(STAGE_LIST, 5)) == ["cycle: 4 became 5"]
    whole = Schedule([{"share": 0, "rows": "all"}], 1)
    assert changes(whole, Schedule([{"share": 0.0, "rows": "all"}], 1.0)) == []


def test_a_long_change_is_cut_to_a_line() -> None:
    before, after = (Schedule([{"epoch": 0, "rows": range(n, n + 5)}]) for n in (0, 1))
    assert changes(before, after) == ["stages[0].rows.range: [0, 5, 1] became [1, 6, 1]"]
    many = Schedule([{"epoch": 0, "rows": list(range(10_000))}])
    (line,) = changes(Schedule([{"epoch": 0, "rows": list(range(9_999))}]), many)
    assert len(line) < 250


# Tables


def test_tables_have_one_schedule_or_each_its_own(tmp_path: Path) -> None:
    path, schedule = _as_file(tmp_path), Schedule(STAGE_LIST)
    assert schedules_by_table(path) == {None: schedule}
    assert schedules_by_table({"preset": "gradual"}).keys() == {None}
    assert schedules_by_table({"items": path, "users": schedule}) == {
        "items": schedule,
        "users": schedule,
    }
