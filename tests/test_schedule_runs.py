"""Schedules against runs that are simulated step by step: all depends on the position alone."""

import copy
import math
import pickle
import random
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_embedding import Position, Rows, Schedule
from partial_embedding.rows.growth import GrownRows, Growth
from partial_embedding.schedule import Evaluation, Plateau, RateScale, StageState
from partial_embedding.schedule.messages import changes
from partial_embedding.schedule.preview import boundaries
from partial_embedding.schedule.starts import Wait

CHOICES: tuple[Any, ...] = (
    "all",
    "none",
    "missing",
    [4, 2],
    {"range": [0, 5]},
    {"most_frequent": 0.5},
    {"union": ["missing", {"not": [1]}]},
)


# Every kind of start, growth and rate_scale, against a run that is simulated step by step.


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
        parts = self.stages[stage + 1]["grow"].get("increments")
        if parts is None:
            parts = {"epoch": length, "step": min(length, 10), "share": 10}[unit]
        return math.floor((self.place(unit, epoch, step) - first) * parts / length), parts

    def simulated(self) -> list[tuple[Position, StageState]]:
        """What the schedule should say before each step."""
        answers: list[tuple[Position, StageState]] = []
        stage, waited = 0, []
        seen: tuple[Evaluation, ...] = ()
        for step in range(self.total):
            epoch = step // self.steps
            for later in range(len(self.stages) - 1, stage, -1):
                unit, at = self.start(later)
                if unit != "plateau" and self.place(unit, epoch, step) >= at:
                    stage, waited = later, []
                    break
            part, parts = self.part(stage, epoch, step)
            answers.append(
                (Position(epoch, step, self.total, seen), StageState(stage, part, parts))
            )
            if (step + 1) % self.every:
                continue
            value = self.values[step % len(self.values)]
            seen += (Evaluation(epoch, step + 1, {"loss": value}),)
            waited.append(value)
            if stage + 1 < len(self.stages) and "plateau" in self.stages[stage + 1]:
                wait = Wait(Plateau.parse(self.stages[stage + 1]["plateau"]))
                counted = [Evaluation(0, 0, {"loss": value}) for value in waited]
                if [wait.is_over(one) for one in counted][-1]:  # tested in test_starts.py
                    stage, waited = stage + 1, []
        return answers


UNITS = ("epoch", "step", "share", "plateau")
PLATEAUS = st.fixed_dictionaries(
    {"monitor": st.just("loss")},
    optional={
        "patience": st.integers(1, 3),
        "max_wait": st.integers(1, 4),
        "min_delta": st.just(1.0),
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
                stage["grow"]["increments"] = draw(st.integers(1, min(length, 12)))
        if unit != "plateau":
            latest[unit] = at
        if draw(st.booleans()):
            stage.update(
                lr_scale=draw(st.sampled_from([0.5, 2.0])), warmup_steps=draw(st.integers(0, 3))
            )
        stages.append(stage)
    values = st.lists(st.sampled_from([0.0, 1.0, 2.0, math.nan]), min_size=1, max_size=9)
    counts = (draw(st.integers(1, 6)), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    return Run(stages, shares, *counts, draw(values))


@settings(max_examples=120, deadline=None)
@given(runs(), st.randoms(use_true_random=False))
def test_a_schedule_says_what_a_run_step_by_step_would_meet(run: Run, order: random.Random) -> None:
    schedule = Schedule(run.stages)
    answers = run.simulated()
    order.shuffle(answers)  # nothing is remembered from one question to the next
    moved = {epoch: set() for epoch in range(run.epochs)}
    for position, stage_state in answers:
        assert schedule.state_at(position) == stage_state
        rows = Rows.parse(run.stages[stage_state.stage]["rows"])
        joined = stage_state.stage
        if stage_state.increment:
            joined += 1
            following = run.stages[joined]
            growth, after = Growth.parse(following["grow"]), Rows.parse(following["rows"])
            rows = GrownRows(rows, after, growth, stage_state.increment, stage_state.increments)
        assert schedule.trainable_rows(position) == rows == schedule.rows_at(stage_state)
        rate_scale = RateScale(
            run.stages[joined].get("lr_scale", 1.0), run.stages[joined].get("warmup_steps", 0)
        )
        assert schedule.rate_scale_at(stage_state) == rate_scale
        assert schedule.state_at(Position.from_state(position.to_state())) == stage_state
        moved[position.epoch].add(stage_state)
    if not schedule.moves_within_epochs and not schedule.metrics:
        assert all(len(stage_states) == 1 for stage_states in moved.values())
    assert schedule.metrics == (("loss",) if any("plateau" in s for s in run.stages) else ())
    assert set(schedule.units) == {unit for s in run.stages for unit in UNITS[:3] if unit in s}


@settings(max_examples=50, deadline=None)
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
    assert hash(again) == hash(schedule)
    assert {again, copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))} == {schedule}
    assert changes(schedule, again) == []
    assert "Schedule" in repr(schedule)


@settings(max_examples=50, deadline=None)
@given(runs(), runs())
def test_schedules_without_changes_are_equal(a: Run, b: Run) -> None:
    before, after = Schedule(a.stages), Schedule(b.stages)
    assert (before == after) == (changes(before, after) == [])
    if before == after:
        assert hash(before) == hash(after)


def walked(schedule: Schedule, epochs: int, steps: int) -> list[tuple[int, StageState]]:
    """The steps at which another state begins, in a run whose metrics get better for ever."""
    found: list[tuple[int, StageState]] = []
    seen: tuple[Evaluation, ...] = ()
    for step in range(epochs * steps):
        epoch = step // steps
        state = schedule.state_at(Position(epoch, step, epochs * steps, seen))
        if not found or state != found[-1][1]:
            found.append((step, state))
        if (step + 1) % steps == 0:
            plateau = [s.start for s in schedule.stages[state.stage + 1 :]][:1]
            better = -1 if any(p.mode == "min" for p in plateau if isinstance(p, Plateau)) else 1
            seen += (Evaluation(epoch, step + 1, {"loss": 3.0 * better * epoch}),)
    return found


@settings(max_examples=120, deadline=None)
@given(runs(), st.integers(0, 5))
def test_the_boundaries_of_a_plan_are_those_of_a_walk_through_all_steps(
    run: Run, more: int
) -> None:
    # Long enough for plateaus to come, most of which have a longest wait.
    epochs, cycle = run.epochs + 8, None
    stages = [
        {**stage, "plateau": {"max_wait": more + 1, **stage["plateau"]}}
        if "plateau" in stage and more
        else stage
        for stage in run.stages
    ]
    units = {next(iter(stage)) for stage in stages}
    if more and units in ({"epoch"}, {"step"}):
        cycle = run.stages[-1][units.pop()] + more
    schedule = Schedule(stages, cycle)
    found = [(at.step, state) for at, state in boundaries(schedule, epochs, run.steps)]
    assert found == walked(schedule, epochs, run.steps)
