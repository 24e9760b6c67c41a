"""Schedule: a pure function of the position, plain YAML both ways, and every refusal."""

import copy
import math
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_embedding import InputError, Position, Rows, Schedule, Stage
from partial_embedding.growth import Growth
from partial_embedding.schedule import (
    Moment,
    Pace,
    Plateau,
    Seen,
    changes,
    schedules_by_table,
)

CHOICES: tuple[Any, ...] = (
    "all",
    "none",
    "missing",
    [4, 2],
    {"range": [0, 5]},
    {"most_frequent": 0.5},
    {"union": ["missing", {"not": [1]}]},
)

EPOCHS = st.sets(st.integers(1, 40), max_size=6).map(lambda later: [0, *sorted(later)])
STAGES = EPOCHS.flatmap(
    lambda epochs: st.lists(
        st.sampled_from(CHOICES), min_size=len(epochs), max_size=len(epochs)
    ).map(lambda rows: [{"epoch": e, "rows": r} for e, r in zip(epochs, rows, strict=True)])
)


@settings(max_examples=80, deadline=None)
@given(STAGES, st.permutations(range(45)), st.integers(0, 10**6))
def test_rows_depend_on_the_position_alone(
    stages: list[dict[str, Any]], order: list[int], step: int
) -> None:
    schedule = Schedule(stages)
    for epoch in order:  # in any order: nothing is remembered from one question to the next
        begun = [i for i, stage in enumerate(stages) if stage["epoch"] <= epoch]
        for position in (epoch, Position(epoch), Position(epoch, step)):
            assert schedule.stage_at(position) == begun[-1]
            assert schedule.trainable_rows(position) == Rows.parse(stages[begun[-1]]["rows"])


@settings(max_examples=80, deadline=None)
@given(STAGES)
def test_schedules_round_trip_through_yaml(stages: list[dict[str, Any]]) -> None:
    schedule = Schedule(stages)
    config = schedule.to_config()
    again = Schedule.parse(yaml.safe_load(yaml.safe_dump(config)))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert again.to_config() == config
    assert [stage.start.at for stage in schedule.stages] == [stage["epoch"] for stage in stages]


STAGE_LIST = [{"epoch": 0, "rows": [4, 5]}, {"epoch": 2, "rows": "all"}]


def _as_file(folder: Path) -> Path:
    path = folder / "schedule.yaml"
    path.write_text("stages:\n  - {epoch: 0, rows: [4, 5]}\n  - {epoch: 2, rows: all}\n")
    return path


FORMS: dict[str, Callable[[Path], Any]] = {
    "schedule": lambda _: Schedule(STAGE_LIST),
    "mapping": lambda _: {"stages": STAGE_LIST},
    "stages_in_a_tuple": lambda _: {"stages": tuple(STAGE_LIST)},
    "stage_objects": lambda _: {
        "stages": [Stage(0, Rows.parse([5, 4])), Stage(2, Rows.all())],
    },
    "rows_as_an_array": lambda _: {
        "stages": [{"epoch": 0, "rows": np.array([4, 5])}, STAGE_LIST[1]]
    },
    "path": _as_file,
    "path_as_text": lambda folder: str(_as_file(folder)),
}


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_every_form_reads_as_the_same_schedule(make: Callable[[Path], Any], tmp_path: Path) -> None:
    assert Schedule.parse(make(tmp_path)) == Schedule(STAGE_LIST)


def test_schedules_are_values() -> None:
    schedule = Schedule(STAGE_LIST)
    copies = {schedule, copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))}
    assert copies == {Schedule(STAGE_LIST)}
    assert schedule != Schedule(STAGE_LIST[:1])
    with pytest.raises(AttributeError):
        schedule.stages = ()  # type: ignore[misc]


def test_later_changes_of_the_callers_mapping_do_not_matter() -> None:
    ids = np.array([4, 5])
    stages: list[dict[str, Any]] = [{"epoch": 0, "rows": ids}]
    schedule = Schedule.parse({"stages": stages})
    ids[:] = 0
    stages[0]["rows"] = "all"
    stages.append({"epoch": 0, "rows": "none"})
    assert schedule == Schedule([{"epoch": 0, "rows": [4, 5]}])


def after(**stage: Any) -> dict[str, Any]:
    """A schedule whose second stage is this one."""
    return {"stages": [STAGE_LIST[0], {"rows": "all", **stage}]}


# What is malformed, and what the message must name: the place, and what was received.
MALFORMED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no_mapping": (7, ("'stages'", "Received: 7")),
    "nothing": (None, ("'stages'", "None")),
    "list_of_stages": ([{"epoch": 0, "rows": "all"}], ("'stages'", "'epoch': 0")),
    "unknown_key": ({"stages": STAGE_LIST, "metric": "loss"}, ("schedule:", "'metric'")),
    "no_stages_key": ({}, ("schedule:", "'stages'")),
    "misspelt_stages": ({"stage": STAGE_LIST}, ("schedule:", "'stage'")),
    "empty_stages": ({"stages": []}, ("stages", "[]")),
    "stages_as_text": ({"stages": "all"}, ("stages", "'all'")),
    "stages_as_mapping": ({"stages": {"epoch": 0}}, ("stages", "{'epoch': 0}")),
    "stage_as_text": ({"stages": ["all"]}, ("stages[0]", "'all'")),
    "stage_as_number": ({"stages": [STAGE_LIST[0], 3]}, ("stages[1]", "3")),
    "no_epoch": ({"stages": [{"rows": "all"}]}, ("stages[0]", "'epoch'")),
    "no_rows": ({"stages": [STAGE_LIST[0], {"epoch": 2}]}, ("stages[1]", "'rows'")),
    "unknown_key_in_a_stage": (
        {"stages": [STAGE_LIST[0], {"epoch": 2, "rows": "all", "rate": 0.1}]},
        ("stages[1]", "'rate'"),
    ),
    "negative_epoch": ({"stages": [{"epoch": -1, "rows": "all"}]}, ("stages[0].epoch", "-1")),
    "fractional_epoch": ({"stages": [{"epoch": 0.5, "rows": "all"}]}, ("stages[0].epoch", "0.5")),
    "epoch_true": ({"stages": [{"epoch": True, "rows": "all"}]}, ("stages[0].epoch", "True")),
    "epoch_in_words": ({"stages": [{"epoch": "two", "rows": "all"}]}, ("stages[0].epoch", "'two'")),
    "late_start": ({"stages": [{"epoch": 3, "rows": "all"}]}, ("stages[0].epoch", "3")),
    "falling_epochs": (
        {"stages": [*STAGE_LIST, {"epoch": 1, "rows": "none"}]},
        ("stages[2].epoch", "1 after 2"),
    ),
    "epoch_twice": (
        {"stages": [*STAGE_LIST, {"epoch": 2, "rows": "none"}]},
        ("stages[2].epoch", "2 after 2"),
    ),
    "malformed_rows": (
        {"stages": [STAGE_LIST[0], {"epoch": 2, "rows": [3, -4]}]},
        ("stages[1].rows", "-4"),
    ),
    "unknown_rows": ({"stages": [{"epoch": 0, "rows": "some"}]}, ("stages[0].rows", "'some'")),
    "two_starts": (
        {"stages": [STAGE_LIST[0], {"epoch": 2, "step": 9, "rows": "all"}]},
        ("stages[1]", "['epoch', 'step']"),
    ),
    "place_and_plateau": (
        {"stages": [STAGE_LIST[0], {"share": 0.2, "plateau": "loss", "rows": "all"}]},
        ("stages[1]", "['share', 'plateau']"),
    ),
    "fractional_step": (after(step=1.5), ("stages[1].step", "1.5")),
    "negative_step": (after(step=-3), ("stages[1].step", "-3")),
    "share_in_percent": (after(share=30), ("stages[1].share", "30")),
    "share_of_the_whole_run": (after(share=1.0), ("stages[1].share", "1.0")),
    "late_share": ({"stages": [{"share": 0.1, "rows": "all"}]}, ("stages[0].share", "0.1")),
    "plateau_of_a_number": (after(plateau=3), ("stages[1].plateau", "3")),
    "plateau_without_patience": (
        after(plateau={"metric": "loss", "patience": 0}),
        ("stages[1].plateau", "patience", "0"),
    ),
    "plateau_first": (
        {"stages": [{"plateau": "loss", "rows": "all"}]},
        ("stages[0].plateau", "plateau"),
    ),
    "falling_steps": (
        {"stages": [STAGE_LIST[0], {"step": 9, "rows": "all"}, {"step": 4, "rows": "none"}]},
        ("stages[2].step", "4 after 9"),
    ),
    "falling_shares_with_others_between": (
        {
            "stages": [
                STAGE_LIST[0],
                {"share": 0.5, "rows": "all"},
                {"step": 4, "rows": "none"},
                {"share": 0.25, "rows": "none"},
            ]
        },
        ("stages[3].share", "0.25 after 0.5"),
    ),
    "rate_of_0": (after(epoch=2, lr=0), ("stages[1].lr", "0")),
    "rate_in_words": (after(epoch=2, lr="1e-3"), ("stages[1].lr", "'1e-3'")),
    "rate_null": (after(epoch=2, lr=None), ("stages[1].lr", "None")),
    "fractional_warmup": (after(epoch=2, warmup=0.1), ("stages[1].warmup", "0.1")),
    "negative_warmup": (after(epoch=2, lr=0.5, warmup=-1), ("stages[1].warmup", "-1")),
    "growth_in_a_stage_alone": (
        {"stages": [{"epoch": 0, "rows": "all", "grow": "linear"}]},
        ("stages[0].grow",),
    ),
    "growth_unknown": (after(epoch=2, grow="fast"), ("stages[1].grow", "'fast'")),
    "growth_of_a_list": (after(epoch=2, grow=["linear"]), ("stages[1].grow", "['linear']")),
    "growth_across_units": (after(step=9, grow="linear"), ("stages[1].grow", "epoch 0", "step 9")),
    "growth_to_a_plateau": (
        after(plateau="loss", grow="linear"),
        ("stages[1].grow", "plateau of loss"),
    ),
    "growth_from_a_plateau": (
        {
            "stages": [
                STAGE_LIST[0],
                {"plateau": "loss", "rows": "none"},
                {"epoch": 5, "rows": "all", "grow": "linear"},
            ]
        },
        ("stages[2].grow", "plateau of loss", "epoch 5"),
    ),
    "more_parts_than_epochs": (
        after(epoch=2, grow={"parts": 3}),
        ("stages[1].grow.parts", "3 parts for 2 epochs"),
    ),
    "cycle_of_nothing": ({"stages": STAGE_LIST, "cycle": 0}, ("cycle", "0")),
    "cycle_within_the_stages": ({"stages": STAGE_LIST, "cycle": 2}, ("cycle", "2", "Received: 2")),
    "fractional_cycle": ({"stages": STAGE_LIST, "cycle": 2.5}, ("cycle", "2.5")),
    "cycle_true": ({"stages": STAGE_LIST[:1], "cycle": True}, ("cycle", "True")),
    "cycle_in_words": ({"stages": STAGE_LIST, "cycle": "3"}, ("cycle", "'3'")),
    "cycle_that_is_no_number": (
        {"stages": [{"share": 0, "rows": "all"}], "cycle": math.nan},
        ("cycle", "nan"),
    ),
    "cycle_of_more_than_the_run": (
        {"stages": [{"share": 0, "rows": "all"}], "cycle": 1.5},
        ("cycle", "1.5"),
    ),
    "cycle_of_two_units": ({**after(step=4), "cycle": 9}, ("cycle", "['epoch 0', 'step 4']")),
    "cycle_of_a_plateau": ({**after(plateau="loss"), "cycle": 9}, ("cycle", "plateau of loss")),
    "late_stage_object": ({"stages": [Stage(2, Rows.all())]}, ("stages[0].epoch", "2")),
}


@pytest.mark.parametrize(("value", "named"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_schedules_are_refused_with_the_place(value: Any, named: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as refused:
        Schedule.parse(value)
    for part in named:
        assert part in str(refused.value)


MALFORMED_FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("'stages'", "None")),
    "text": (b"all", ("'stages'", "'all'")),
    "list": (b"- {epoch: 0, rows: all}", ("'stages'", "epoch")),
    "broken_yaml": (b"stages: [{epoch: 0, rows: all", ("YAML", "line 1")),
    "tab_indented": (b"stages:\n\t- {epoch: 0, rows: all}", ("YAML", "line 2")),
    "not_utf8": (b"stages: # caf\xe9\n", ("UTF-8", "0xe9")),
    "python_object": (b"!!python/object/apply:os.getcwd []", ("YAML", "python/object")),
    "unknown_key": (b"stages: []\nepochs: 3\n", ("schedule:", "'epochs'")),
    "bad_stage": (b"stages:\n- {epoch: 0, rows: {ids: []}}\n", ("stages[0].rows", "[]")),
    "no_day": (b"stages:\n- {epoch: 0, rows: {tokens: [2020-13-45]}}\n", ("YAML", "month")),
    "no_mapping_of_tables": (b"words: {stages: []}\n", ("schedule:", "'words'")),
    "rate": (b"stages:\n- {epoch: 0, rows: all, lr: -1}\n", ("stages[0].lr", "-1")),
    "preset": (b"preset: gentle\n", ("preset", "'gentle'")),
    "cycle": (b"stages:\n- {epoch: 0, rows: all}\ncycle: x\n", ("cycle", "'x'")),
    "rows_of_no_kind": (b"stages:\n- {epoch: 0, rows: }\n", ("stages[0].rows", "None")),
}


@pytest.mark.parametrize(("content", "named"), MALFORMED_FILES.values(), ids=MALFORMED_FILES)
@pytest.mark.parametrize("of_type", [str, Path])
def test_malformed_files_are_refused_in_one_line_with_their_name(
    content: bytes, named: tuple[str, ...], of_type: type, tmp_path: Path
) -> None:
    path = tmp_path / "broken schedule.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        Schedule.parse(of_type(path))
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for part in named:
        assert part in message


def test_unreadable_files_are_refused_with_their_name(tmp_path: Path) -> None:
    absent = tmp_path / "absent.yaml"
    unnamed = tmp_path / "a\0b"
    paths = ((absent, "No such file"), (tmp_path, "Is a directory"), (unnamed, "null"))
    for path, reason in paths:
        with pytest.raises(InputError) as refused:
            Schedule.parse(path)
        assert str(refused.value).startswith(f"{path}: ")
        assert reason in str(refused.value)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = _as_file(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert Schedule.parse(path) == Schedule(STAGE_LIST)


NO_STAGES: dict[str, tuple[Any, str]] = {
    "start_in_words": (lambda: Stage("two", Rows.all()), "'two'"),  # type: ignore[arg-type]
    "fractional_start": (lambda: Stage(1.5, Rows.all()), "1.5"),  # type: ignore[arg-type]
    "start_true": (lambda: Stage(True, Rows.all()), "True"),
    "no_start": (lambda: Stage(None, Rows.all()), "None"),  # type: ignore[arg-type]
    "rows": (lambda: Stage(0, "some"), "'some'"),  # type: ignore[arg-type]
    "growth": (lambda: Stage(0, Rows.all(), "fast"), "'fast'"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("make", "received"), NO_STAGES.values(), ids=NO_STAGES)
def test_malformed_stages_are_refused_when_they_are_made(make: Any, received: str) -> None:
    with pytest.raises(InputError, match=f"Received: {received}"):
        make()


@pytest.mark.parametrize("at", [-1, Position(-1), Position(0, -1), 0.5, "2", None, Position("1")])
def test_a_position_before_the_beginning_is_refused(at: Any) -> None:
    with pytest.raises(InputError, match=r"from 0 up\. Received: "):
        Schedule(STAGE_LIST).moment(at)


# Every kind of start, growth and pace, against a run that is simulated step by step.


@dataclass
class Run:
    """A schedule as it was drawn, and a run through it."""

    stages: list[dict[str, Any]]
    shares: dict[float, Fraction]  # what a share was before it was rounded
    epochs: int
    steps: int  # in an epoch
    every: int  # how many steps from one validation to the next
    values: list[float]

    @property
    def total(self) -> int:
        return self.epochs * self.steps

    def start(self, stage: int) -> tuple[str, Any]:
        ((unit, at),) = ((k, v) for k, v in self.stages[stage].items() if k in UNITS)
        return unit, self.shares[at] if unit == "share" else at

    def place(self, unit: str, epoch: int, step: int) -> Fraction:
        return {
            "epoch": Fraction(epoch),
            "step": Fraction(step),
            "share": Fraction(step, self.total),
        }[unit]

    def part(self, stage: int, epoch: int, step: int) -> tuple[int, int]:
        if stage + 1 == len(self.stages) or "grow" not in self.stages[stage + 1]:
            return 0, 0
        unit, first = self.start(stage)
        length = self.start(stage + 1)[1] - first
        parts = self.stages[stage + 1]["grow"].get("parts")
        if parts is None:
            parts = {"epoch": length, "step": min(length, 10), "share": 10}[unit]
        return math.floor((self.place(unit, epoch, step) - first) * parts / length), parts

    def simulated(self) -> list[tuple[Position, Moment]]:
        """What the schedule should say before each step."""
        answers: list[tuple[Position, Moment]] = []
        stage, waited = 0, []
        seen: tuple[Seen, ...] = ()
        for step in range(self.total):
            epoch = step // self.steps
            for later in range(len(self.stages) - 1, stage, -1):
                unit, at = self.start(later)
                if unit != "plateau" and self.place(unit, epoch, step) >= at:
                    stage, waited = later, []
                    break
            part, parts = self.part(stage, epoch, step)
            answers.append((Position(epoch, step, self.total, seen), Moment(stage, part, parts)))
            if (step + 1) % self.every:
                continue
            value = self.values[step % len(self.values)]
            seen += (Seen(epoch, step + 1, {"loss": value}),)
            waited.append(value)
            if stage + 1 < len(self.stages) and "plateau" in self.stages[stage + 1]:
                plateau = Plateau.parse(self.stages[stage + 1]["plateau"])
                counted = [Seen(0, 0, {"loss": value}) for value in waited]
                if plateau.is_reached(counted):  # tested by itself in test_starts.py
                    stage, waited = stage + 1, []
        return answers


UNITS = ("epoch", "step", "share", "plateau")
PLATEAUS = st.fixed_dictionaries(
    {"metric": st.just("loss")},
    optional={
        "patience": st.integers(1, 3),
        "max_wait": st.integers(1, 4),
        "min_change": st.just(1.0),
        "mode": st.just("max"),
    },
)


@st.composite
def runs(draw: st.DrawFn) -> Run:
    shares: dict[float, Fraction] = {0.0: Fraction(0)}
    latest: dict[str, Any] = {}
    stages: list[dict[str, Any]] = []
    for i in range(draw(st.integers(1, 6))):
        unit = draw(st.sampled_from(UNITS[:3] if i == 0 else UNITS))
        if unit == "plateau":
            at = draw(PLATEAUS)
        elif i == 0:
            at = 0
        elif unit == "share":
            below = draw(st.integers(2, 60))
            exact = Fraction(draw(st.integers(1, below - 1)), below)
            at = exact.numerator / exact.denominator
            shares[at] = exact
        else:
            at = latest.get(unit, -1) + draw(st.integers(1, 12 if unit == "step" else 3))
        if unit != "plateau" and not at > latest.get(unit, -1):
            continue
        stage = {unit: at, "rows": draw(st.sampled_from(CHOICES))}
        before = next(iter(stages[-1])) if stages else "plateau"
        if unit == before != "plateau" and draw(st.booleans()):
            length = 99 if unit == "share" else at - stages[-1][unit]
            stage["grow"] = {"order": "ids"}
            if draw(st.booleans()):
                stage["grow"]["parts"] = draw(st.integers(1, min(length, 12)))
        if unit != "plateau":
            latest[unit] = at
        if draw(st.booleans()):
            stage.update(lr=draw(st.sampled_from([0.5, 2.0])), warmup=draw(st.integers(0, 3)))
        stages.append(stage)
    values = st.lists(st.sampled_from([0.0, 1.0, 2.0, math.nan]), min_size=1, max_size=9)
    counts = (draw(st.integers(1, 6)), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    return Run(stages, shares, *counts, draw(values))


@settings(max_examples=400, deadline=None)
@given(runs(), st.randoms(use_true_random=False))
def test_a_schedule_says_what_a_run_step_by_step_would_meet(run: Run, order: random.Random) -> None:
    schedule = Schedule(run.stages)
    answers = run.simulated()
    order.shuffle(answers)  # nothing is remembered from one question to the next
    moved = {epoch: set() for epoch in range(run.epochs)}
    for position, moment in answers:
        assert schedule.moment(position) == moment
        assert schedule.stage_at(position) == moment.stage
        rows = Rows.parse(run.stages[moment.stage]["rows"])
        joined = moment.stage
        if moment.part:
            joined += 1
            following = run.stages[joined]
            growth, after = Growth.parse(following["grow"]), Rows.parse(following["rows"])
            rows = Rows.grown(rows, after, growth, moment.part, moment.parts)
        assert schedule.trainable_rows(position) == rows == schedule.rows_at(moment)
        pace = Pace(run.stages[joined].get("lr", 1.0), run.stages[joined].get("warmup", 0))
        assert schedule.pace_at(moment) == pace
        assert schedule.moment(Position.from_state(position.to_state())) == moment
        moved[position.epoch].add(moment)
    if not schedule.moves_within_epochs and not schedule.metrics:
        assert all(len(moments) == 1 for moments in moved.values())
    assert schedule.metrics == (("loss",) if any("plateau" in s for s in run.stages) else ())
    assert set(schedule.units) == {unit for s in run.stages for unit in UNITS[:3] if unit in s}


@settings(max_examples=150, deadline=None)
@given(runs(), st.integers(1, 5))
def test_every_schedule_is_a_value_and_round_trips_through_yaml(run: Run, more: int) -> None:
    units = {next(iter(stage)) for stage in run.stages}
    cycle = None
    if units in ({"epoch"}, {"step"}):
        cycle = run.stages[-1][units.pop()] + more
    schedule = Schedule(run.stages, cycle)
    config = schedule.to_config()
    again = Schedule.parse(yaml.safe_load(yaml.safe_dump(config)))
    assert again.to_config() == config
    assert {again, copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))} == {schedule}
    assert changes(schedule, again) == []
    assert "Schedule" in repr(schedule)


# Cycles


@settings(max_examples=200, deadline=None)
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
        assert schedule.moment(position) == Moment(stage, part, parts, turn)


def test_a_cycle_of_a_share_begins_with_the_step_that_completes_it() -> None:
    # 0.3 / 0.1 is a little less than 3.
    schedule = Schedule([{"share": 0, "rows": "none"}, {"share": 0.05, "rows": "all"}], 0.1)
    for step in range(20):
        moment = schedule.moment(Position(0, step, 20))
        assert (moment.turn, moment.stage) == divmod(step, 2)


# Shares


@pytest.mark.parametrize("total", [3, 7, 10, 30, 49, 100, 999, 1000])
def test_a_share_of_steps_is_reached_with_the_step_that_completes_it(total: int) -> None:
    for step in range(1, total):
        schedule = Schedule([STAGE_LIST[0], {"share": step / total, "rows": "all"}])
        places = [Position(0, at, total) for at in (step - 1, step)]
        assert [schedule.stage_at(place) for place in places] == [0, 1]
        # The same share of a run that is three times as long.
        places = [Position(0, at, 3 * total) for at in (3 * step - 1, 3 * step)]
        assert [schedule.stage_at(place) for place in places] == [0, 1]


@pytest.mark.parametrize("total", [10**6, 10**8])
def test_a_share_of_a_long_run_is_exact_to_the_step(total: int) -> None:
    for step in (1, 333_333, total // 7, total - 1):
        schedule = Schedule([STAGE_LIST[0], {"share": step / total, "rows": "all"}])
        places = [Position(0, at, total) for at in (step - 1, step)]
        assert [schedule.stage_at(place) for place in places] == [0, 1]


@pytest.mark.parametrize("total", [None, 0])
def test_a_share_of_a_run_of_unknown_length_is_refused(total: int | None) -> None:
    schedule = Schedule([STAGE_LIST[0], {"share": 0.5, "rows": "all"}])
    with pytest.raises(InputError, match=r"without total_steps.*max_epochs"):
        schedule.moment(Position(0, 3, total))


def test_the_rows_within_an_epoch_move_only_where_something_counts_steps() -> None:
    grown = {"epoch": 4, "rows": "all", "grow": {"parts": 2}}
    assert not Schedule([*STAGE_LIST[:1], grown]).moves_within_epochs
    assert not Schedule([STAGE_LIST[0], {"plateau": "loss", "rows": "all"}]).moves_within_epochs
    assert Schedule([STAGE_LIST[0], {"step": 4, "rows": "all"}]).moves_within_epochs
    assert Schedule([{"share": 0, "rows": "all"}]).moves_within_epochs


def test_many_validations_are_counted_once_each() -> None:
    # Counting all of them again for each would take minutes.
    seen = tuple(Seen(epoch, epoch + 1, {"loss": -epoch}) for epoch in range(20_000))
    stages = [STAGE_LIST[0], {"plateau": "loss", "rows": "all"}]
    assert Schedule(stages).stage_at(Position(20_000, 20_000, None, seen)) == 0
    stopped = (*seen, Seen(20_000, 20_001, {"loss": 0.0}))
    assert Schedule(stages).stage_at(Position(20_001, 20_001, None, stopped)) == 1


# What is not the same in two schedules

BASE: dict[str, Any] = {
    "stages": [
        {"epoch": 0, "rows": {"most_frequent": 1}},
        {"epoch": 3, "rows": "all", "grow": "linear"},
        {"plateau": "loss", "rows": "none", "lr": 0.5},
    ],
}


def changed(stage: int, **new: Any) -> dict[str, Any]:
    stages = copy.deepcopy(BASE["stages"])
    stages[stage] = {k: v for k, v in {**stages[stage], **new}.items() if v is not None}
    return {"stages": stages}


CHANGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing": (BASE, []),
    "default_that_is_written": (changed(1, lr=1.0, warmup=0, grow={"shape": "linear"}), []),
    "epoch": (changed(1, epoch=4), ["stages[1].epoch: 3 became 4"]),
    "unit": (
        changed(2, plateau=None, step=9),
        ["stages[2].plateau: {'metric': 'loss'} was removed", "stages[2].step: 9 was added"],
    ),
    # To Python these two are equal.
    "one_row_and_all_rows": (
        changed(0, rows={"most_frequent": 1.0}),
        ["stages[0].rows.most_frequent: 1 became 1.0"],
    ),
    "rows": (changed(1, rows=[3]), ["stages[1].rows: 'all' became {'ids': [3]}"]),
    "kind_of_rows": (
        changed(0, rows={"random": 2}),
        [
            "stages[0].rows.most_frequent: 1 was removed",
            "stages[0].rows.random: {'amount': 2, 'seed': 0} was added",
        ],
    ),
    "growth": (changed(1, grow="cosine"), ["stages[1].grow.shape: 'linear' became 'cosine'"]),
    "no_growth": (changed(1, grow=None), ["stages[1].grow: {'shape': 'linear'} was removed"]),
    "pace": (
        changed(2, lr=0.25, warmup=5),
        ["stages[2].lr: 0.5 became 0.25", "stages[2].warmup: 5 was added"],
    ),
    "metric": (
        changed(2, plateau={"metric": "acc", "mode": "max"}),
        [
            "stages[2].plateau.metric: 'loss' became 'acc'",
            "stages[2].plateau.mode: 'max' was added",
        ],
    ),
    "stage_less": (
        {"stages": BASE["stages"][:2]},
        ["stages[2]: {'plateau': {'metric': 'loss'}, 'rows': 'none', 'lr': 0.5} was removed"],
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


@settings(max_examples=100, deadline=None)
@given(runs(), runs())
def test_schedules_without_changes_are_equal(a: Run, b: Run) -> None:
    before, after = Schedule(a.stages), Schedule(b.stages)
    assert (before == after) == (changes(before, after) == [])
    if before == after:
        assert hash(before) == hash(after)


# Tables


def test_tables_have_one_schedule_or_each_its_own(tmp_path: Path) -> None:
    path, schedule = _as_file(tmp_path), Schedule(STAGE_LIST)
    assert schedules_by_table(path) == {None: schedule}
    assert schedules_by_table({"preset": "gradual"}).keys() == {None}
    assert schedules_by_table({"items": path, "users": schedule}) == {
        "items": schedule,
        "users": schedule,
    }


BY_TABLE: dict[str, tuple[Any, tuple[str, ...]]] = {
    "empty": ({}, ("schedule:", "'stages'")),
    "misspelt_stages": ({"stage": STAGE_LIST}, ("'stage'", "'epoch': 0")),
    "inside_a_table": (
        {"items": {"stages": [{"epoch": 0, "rows": [3, -4]}]}},
        ("'items'", "stages[0].rows", "-4"),
    ),
    "table_without_a_schedule": ({"items": None}, ("'items'", "None")),
    "absent_file": ({"items": "absent.yaml"}, ("'items'", "absent.yaml", "No such file")),
}


@pytest.mark.parametrize(("value", "named"), BY_TABLE.values(), ids=BY_TABLE)
def test_a_malformed_schedule_of_a_table_is_refused_with_its_name(
    value: Any, named: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as refused:
        schedules_by_table(value)
    for part in named:
        assert part in str(refused.value)
