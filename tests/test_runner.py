"""What the runner decides for every framework, on tables that are sets of ids."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from partial_embedding import FrozenRowsMoved, InputError, Position, RateScale, Rows, Schedule
from partial_embedding.schedule.rank_consistency import RankView
from partial_embedding.schedule.runner import Runner

GROWING = Schedule(
    [
        {"step": 0, "rows": [0, 1]},
        {"step": 6, "rows": range(8), "grow": {"order": [*range(2, 8)], "increments": 3}},
    ]
)
PLAIN = Schedule([{"step": 0, "rows": [3]}])
WAITING = Schedule([{"step": 0, "rows": [3]}, {"plateau": "loss", "rows": [4]}])
WAITING_LATE = Schedule(
    [
        {"step": 0, "rows": [1]},
        {"step": 2, "rows": [1, 2], "lr_scale": 0.5},
        {"plateau": "loss", "rows": [3]},
    ]
)


class SetTables:
    """Ten rows of four columns in each table, of which some train."""

    def __init__(self, *names: str) -> None:
        self.shapes = dict.fromkeys(names, (10, 4))
        self.rows: dict[str, Any] = {name: np.arange(10) for name in names}
        self.new: dict[str, Any] = {}
        self.joined: list[tuple[str, list[int], RateScale, bool]] = []
        self.checked: list[tuple[str, int, int]] = []
        self.moved: list[int] = []
        self.processes = 1
        self.other: Callable[[RankView], RankView] = lambda view: view

    def gather(self, view: RankView) -> Sequence[RankView]:
        return [view, self.other(view)]

    def check_rows(self, name: str, ids: Any) -> None:
        if 9 in ids:
            raise InputError("row 9 never trains.")

    def check_rate_scale(self, name: str, rate_scale: RateScale) -> None:
        if rate_scale.warmup_steps:
            raise InputError("no warm-up here.")

    def trainable_rows(self, name: str) -> Any:
        return self.rows[name]

    def new_rows(self, name: str) -> Any:
        return self.new.get(name)

    def set_rows(
        self, name: str, ids: Any, rate_scale: RateScale, *, all_join: bool = False
    ) -> None:
        self.rows[name] = ids
        self.joined.append((name, ids.tolist(), rate_scale, all_join))

    def watch(self, name: str) -> "SetAudit":
        return SetAudit(self, name)

    def parameters_elsewhere(self, names: Iterable[str]) -> int:
        return 0


class SetAudit:
    """Notes when it is asked, and is content."""

    def __init__(self, tables: SetTables, name: str) -> None:
        self.tables, self.name = tables, name
        self.num_frozen = len(np.setdiff1d(np.arange(10), tables.rows[name]))

    def check(self, step: int | None = None) -> None:
        assert step is not None
        self.tables.checked.append((self.name, step, self.num_frozen))
        if self.tables.moved:
            raise FrozenRowsMoved("some moved", self.tables.moved)


def runner_of(
    schedules: Mapping[str | None, Schedule] | Schedule,
    said: list[str] | None = None,
    audit: bool | int = True,
) -> tuple[Runner, SetTables]:
    if isinstance(schedules, Schedule):
        schedules = {"words": schedules}
    tables = SetTables("words", "items")
    say = ([] if said is None else said).append
    return Runner(tables, schedules, None, audit, say), tables


# What begins, and what is said


def test_frozen_rows_are_compared_before_each_increment_that_begins() -> None:
    runner, tables = runner_of(GROWING)
    for step in range(9):
        runner.advance(0, step)
    # Each time the rows that were frozen since the increment before.
    assert tables.checked == [("words", 2, 8), ("words", 4, 6), ("words", 6, 4)]
    runner.finish(8)
    assert tables.checked[3:] == [("words", 8, 2)]


def test_new_rows_are_those_by_which_each_table_grew() -> None:
    tables = SetTables("words", "items")
    schedule = Schedule([{"step": 0, "rows": "new"}, {"step": 3, "rows": {"union": ["new", [0]]}}])
    with pytest.raises(InputError, match=r"words: stages\[0\]\.rows: .*grow_table"):
        Runner(tables, {None: schedule})
    tables.new = {"words": np.array([8]), "items": np.array([5, 6])}
    runner = Runner(tables, {None: schedule})
    runner.advance(0, 0)
    assert [tables.rows[name].tolist() for name in ("words", "items")] == [[8], [5, 6]]
    runner.advance(0, 3)
    assert [tables.rows[name].tolist() for name in ("words", "items")] == [[0, 8], [0, 5, 6]]


def test_a_move_says_whether_anything_began() -> None:
    runner, _ = runner_of({"words": GROWING, "items": PLAIN})
    began = [runner.advance(0, step) for step in range(8)]
    assert began == [True, False, True, False, True, False, True, False]


def test_nothing_is_computed_where_nothing_can_have_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = {"state_at": 0, "resolve": 0}
    by_epoch, _ = runner_of(Schedule([{"epoch": 0, "rows": [1]}]))
    by_step, _ = runner_of(WAITING_LATE)
    for runner in (by_epoch, by_step):
        runner.place()
        runner.advance(0, 0)
        runner.advance(0, 2)
    for step in range(3, 30):
        by_step.observe(0, step, {"loss": -step})
    by_step.advance(0, 30)
    for owner, name in ((Schedule, "state_at"), (Rows, "resolve")):
        real = getattr(owner, name)

        def count(self: Any, *args: Any, name: str = name, real: Any = real) -> Any:
            asked[name] += 1
            return real(self, *args)

        monkeypatch.setattr(owner, name, count)
    for step in range(31, 131):
        assert not by_epoch.advance(0, step)
        assert not by_step.advance(0, step)
        assert not by_step.advance(0, step)  # another batch of the same step
    assert asked == {"state_at": 100, "resolve": 0}


def test_the_step_of_the_next_change_is_known_in_advance() -> None:
    runner, _ = runner_of({"words": GROWING, "items": PLAIN})
    runner.advance(0, 0)
    assert runner.next_change(100) == runner.next_change(None) == 2
    runner.advance(0, 3)
    assert runner.next_change(100) == 4
    assert runner.next_change(1) == 4
    runner.advance(0, 7)
    assert runner.next_change(100) > 10**9


def test_tables_follow_the_schedule_of_their_name_or_the_one_for_all_others() -> None:
    both, _ = runner_of({"words": GROWING, None: WAITING})
    assert both.schedules == {"words": GROWING, "items": WAITING}
    assert both.metrics == ("loss",)
    one, _ = runner_of({"items": PLAIN})
    assert one.schedules == {"items": PLAIN}
    assert one.metrics == ()


# What is refused before the first step


def test_a_schedule_for_no_table_is_refused() -> None:
    message = "schedules are named after the model's tables, ['items', 'words']. Received: 'word'."
    with pytest.raises(InputError, match=re.escape(message)):
        runner_of({"word": PLAIN})


@pytest.mark.parametrize(
    ("stage", "place"),
    [
        ({"epoch": 2, "rows": [99]}, r"words: stages\[1\]\.rows: .*99"),
        ({"epoch": 2, "rows": [8, 9]}, r"words: stages\[1\]\.rows: row 9 never"),
        (
            {"epoch": 2, "rows": [4], "grow": {"order": [77]}},
            r"words: stages\[1\]\.rows: order: .*77",
        ),
        ({"epoch": 2, "rows": [4], "grow": "linear"}, r"words: stages\[1\]\.rows: .*vocabulary"),
    ],
)
def test_every_stage_is_tried_at_once(stage: dict[str, Any], place: str) -> None:
    with pytest.raises(InputError, match=place):
        runner_of(Schedule([{"epoch": 0, "rows": [1]}, stage]))


@pytest.mark.parametrize("audit", [-3, "yes", 1.5])
def test_an_audit_at_no_step_is_refused(audit: Any) -> None:
    with pytest.raises(InputError, match=f"^audit is true, false, or .* Received: {audit!r}"):
        Runner(SetTables("words"), {None: PLAIN}, audit=audit)


def test_a_rate_that_an_optimizer_cannot_keep_is_refused_with_its_stage() -> None:
    stages = [{"epoch": 0, "rows": [1]}, {"epoch": 2, "rows": [2], "warmup_steps": 3}]
    runner, _ = runner_of(Schedule(stages))
    with pytest.raises(InputError, match=r"^words: stages\[1\]: no warm-up here"):
        runner.check_rate_scales()


@pytest.mark.parametrize("length", [0, float("inf")])
def test_a_share_of_a_run_of_unknown_length_is_refused(length: float) -> None:
    shares = Schedule([{"share": 0, "rows": [1]}, {"share": 0.5, "rows": [2]}])
    runner, tables = runner_of(shares)
    runner.place()
    assert tables.rows["words"].tolist() == [1]
    with pytest.raises(InputError, match=r"unknown length\. Set .*max_steps, .*steps_per_epoch="):
        runner.start(length)
    runner_of(PLAIN)[0].start(length)


# What was measured


def test_what_is_measured_again_after_a_step_replaces_what_was_measured_first() -> None:
    runner, tables = runner_of(WAITING_LATE)
    for value in (5.0, 4.0):
        runner.observe(0, 3, {"loss": value})
    assert [(one.step, one.metrics) for one in runner.evaluations] == [(3, {"loss": 4.0})]
    runner.advance(0, 3)
    assert tables.rows["words"].tolist() == [1, 2]


def test_a_metric_that_is_not_measured_is_refused_unless_it_was_not_expected() -> None:
    runner, _ = runner_of(WAITING)
    with pytest.raises(InputError, match=r"'loss'\. Received: \['accuracy', 'lost'\]\. Log it"):
        runner.observe(0, 3, {"lost": 1.0, "accuracy": 0.5})
    assert runner.evaluations == ()
    runner.observe(0, 3, {"lost": 1.0}, expected=())
    assert [dict(one.metrics) for one in runner.evaluations] == [{}]


def test_a_run_names_the_stages_that_it_did_not_reach() -> None:
    stages = [
        *WAITING_LATE.to_config()["stages"],
        {"step": 9, "rows": [4]},
        {"epoch": 7, "rows": "none"},
    ]
    for steps, told in [
        (5, "stage 2, at a plateau of loss; stage 3, at step 9; stage 4, at epoch 7"),
        (10, "stage 2, at a plateau of loss; stage 4, at epoch 7"),
    ]:
        said: list[str] = []
        runner, _ = runner_of(Schedule(stages), said, audit=False)
        for step in range(steps):
            runner.advance(0, step)
        runner.finish(steps)
        assert said[-1] == f"words: the run ended before {told}"
    said = []
    runner, _ = runner_of(WAITING_LATE, said, audit=False)
    for step in range(6):
        runner.advance(0, step)
        runner.observe(0, step + 1, {"loss": 1.0})
    runner.finish(6)
    assert "stage 2" in said[-1]
    assert not any("ended" in line for line in said)


# Audits


@pytest.mark.parametrize(
    ("first", "steps_at_once", "audit", "due"),
    [
        (0, 1, 4, [4, 8, 12, 16, 20]),
        (0, 2, 4, [4, 8, 12, 16, 20]),
        (0, 3, 4, [6, 9, 12, 18, 21]),
        (6, 1, 4, [8, 12, 16, 20]),  # a run that goes on
        (0, 1, True, []),  # at the end of stages alone
    ],
)
def test_audits_come_at_multiples_of_their_number_in_the_whole_run(
    first: int, steps_at_once: int, audit: int, due: list[int]
) -> None:
    runner, tables = runner_of(PLAIN, audit=audit)
    for step in range(first, 21, steps_at_once):
        runner.advance(step // 6, step)
        runner.after_step(step + steps_at_once)
    assert [step for _, step, _ in tables.checked] == due


ENDS: dict[str, Callable[[Runner], object]] = {
    "increment": lambda runner: runner.advance(0, 2),
    "interval": lambda runner: runner.after_step(4),
    "end_of_the_run": lambda runner: runner.finish(1),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_what_moved_is_among_the_results_when_it_ends_the_run(end: Any) -> None:
    runner, tables = runner_of(GROWING, audit=4)
    runner.advance(0, 0)
    tables.moved = [8, 9]
    with pytest.raises(FrozenRowsMoved):
        end(runner)
    assert [(one.stage, one.frozen, one.changed) for one in runner.audit_results] == [(0, 8, 2)]
    with pytest.raises(FrozenRowsMoved):
        runner.finish(5)  # of whoever goes on all the same


# What is kept and restored


def test_a_run_that_goes_on_tells_what_was_changed_in_each_schedule() -> None:
    said: list[str] = []
    before, _ = runner_of({"items": PLAIN, "words": GROWING})
    before.advance(0, 1)
    runner, _ = runner_of({"words": GROWING, "items": WAITING}, said)
    runner.restore(before.state())
    runner.start()
    (line,) = said
    assert line.startswith("items: the schedule is not the checkpoint's: stages[1]")
    before, _ = runner_of({None: PLAIN})
    before.advance(0, 1)
    runner.restore(before.state())
    with pytest.raises(InputError, match=r"^words: a resumed run trains the rows"):
        runner.start()


def test_a_measurement_that_moved_no_row_yet_is_restored_as_such() -> None:
    runner, _ = runner_of(WAITING_LATE)
    runner.place()
    runner.advance(0, 2)
    runner.observe(0, 3, {"loss": 1.0})
    runner.observe(0, 4, {"loss": 1.0})
    state = runner.state()
    again, tables = runner_of(WAITING_LATE)
    again.restore(state)
    again.place()
    assert tables.joined == [("words", [1, 2], RateScale(0.5), True)]
    assert again.state() == state
    assert again.advance(0, 4)
    assert tables.rows["words"].tolist() == [3]


def test_rows_are_placed_as_the_schedule_of_the_state_had_them_before_the_length_is_known() -> None:
    shares = [{"share": 0, "rows": [1]}, {"share": 0.5, "rows": [2], "lr_scale": 0.5}]
    before, _ = runner_of(Schedule(shares))
    before.start(8)
    before.advance(0, 4)
    later = Schedule([shares[0], {**shares[1], "share": 0.25, "lr_scale": 2}])
    again, tables = runner_of(later)
    again.restore(before.state())
    again.place()
    assert tables.joined == [("words", [2], RateScale(0.5), True)]
    again.start(8)
    assert again.advance(0, 4)


def test_a_state_is_cut_to_the_epochs_before_one() -> None:
    runner, _ = runner_of(WAITING_LATE)
    for epoch in range(4):
        runner.advance(epoch, 5 * epoch)
        runner.observe(epoch, 5 * epoch + 5, {"loss": float(-epoch)})
    for epoch in (1, 2, 3):
        again, _ = runner_of(WAITING_LATE)
        again.restore(runner.state(), before_epoch=epoch)
        assert [one.epoch for one in again.evaluations] == list(range(epoch))
        assert again.position == replace(
            Position(epoch - 1, 5 * epoch - 1), evaluations=again.evaluations[:-1]
        )
    again.restore(runner.state(), before_epoch=4)
    assert again.state() == runner.state()


# Among processes


def test_processes_that_differ_are_stopped_with_what_differs() -> None:
    cases: list[tuple[Callable[[RankView], RankView], str]] = [
        (lambda view: view._replace(rows={"words": "2 rows (x)"}), r"same rows of 'words'"),
        (lambda view: view._replace(stage_states={}), r"same place of a schedule"),
    ]
    for other, rule in cases:
        runner, tables = runner_of(WAITING)
        tables.processes, tables.other = 2, other
        for move in (runner.place, lambda runner=runner: runner.advance(0, 0)):
            with pytest.raises(InputError, match=rule):
                move()
    runner, tables = runner_of(WAITING)
    tables.processes, tables.other = 2, lambda view: view._replace(metrics={"loss": 1.5})
    with pytest.raises(InputError, match=r"same metrics\..* \{'loss': 1\.5\} in process 1"):
        runner.observe(0, 3, {"loss": 1.0})
    tables.other = lambda view: view._replace(metrics={"loss": 1.0 + 1e-9})
    runner.observe(0, 3, {"loss": 1.0})
    assert len(runner.evaluations) == 1
