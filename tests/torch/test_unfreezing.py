"""`ScheduledTables`: what callbacks share, without a framework's trainer."""

from typing import Any

import pytest
from torch import nn

from partial_embedding import InputError, Position, Rows, Schedule
from partial_embedding.schedule import Plateau
from partial_embedding.torch import PartialEmbedding
from partial_embedding.torch.adapter import ScheduledTables

WAITS = {
    "stages": [
        {"step": 0, "rows": [1]},
        {"step": 2, "rows": [1, 2], "lr_scale": 0.5},
        {"plateau": "loss", "rows": [3]},
    ]
}


def tables_of(schedule: Any, rows: Any = "all") -> ScheduledTables:
    model = nn.Sequential(PartialEmbedding(10, 4, trainable_rows=rows))
    return ScheduledTables(model, {None: Schedule.parse(schedule)})


def test_nothing_is_computed_where_nothing_can_have_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = {"moment": 0, "resolve": 0, "is_reached": 0}

    def counted(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def count(self: Any, *args: Any, **kwargs: Any) -> Any:
            asked[name] += 1
            return real(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, count)

    by_epoch, by_step = tables_of({"stages": [{"epoch": 0, "rows": [1]}]}), tables_of(WAITS)
    for tables in (by_epoch, by_step):
        tables.place()
        tables.advance(0, 0)
        tables.advance(0, 2)
    for step in range(3, 30):
        by_step.observe(0, step, {"loss": -step})
    by_step.advance(0, 30)
    for owner, name in ((Schedule, "moment"), (Rows, "resolve"), (Plateau, "is_reached")):
        counted(owner, name)
    for step in range(31, 131):
        assert not by_epoch.advance(0, step)
        assert not by_step.advance(0, step)
        assert not by_step.advance(0, step)  # another batch of the same step
    assert asked == {"moment": 100, "resolve": 0, "is_reached": 0}


def test_what_is_measured_again_after_a_step_replaces_what_was_measured_first() -> None:
    tables = tables_of(WAITS)
    tables.place()
    for value in (5.0, 4.0):
        tables.observe(0, 3, {"loss": value})
    assert [(one.step, one.metrics) for one in tables.seen] == [(3, {"loss": 4.0})]
    tables.advance(0, 3)
    assert tables.tables["0"].trainable_rows.tolist() == [1, 2]


def test_an_audited_run_can_be_placed_elsewhere() -> None:
    schedule = Schedule([{"epoch": 0, "rows": [1]}, {"epoch": 2, "rows": [2]}])
    model = tables_of({"stages": [{"epoch": 0, "rows": [1]}]}).model
    tables = ScheduledTables(model, {None: schedule}, audit=True)
    tables.move_to(Position(epoch=2, step=8))
    tables.place()
    tables.move_to(Position(epoch=0))
    tables.finish(1)
    assert [(report.stage, report.changed) for report in tables.reports] == [(0, 0)]


def test_the_first_rows_join_with_their_pace_whatever_trained_before() -> None:
    for rows in ("all", [2, 3]):
        tables = tables_of({"stages": [{"epoch": 0, "rows": [2, 3], "lr_scale": 0.5}]}, rows)
        tables.place()
        table = tables.tables["0"]
        assert table.trainable_rows.tolist() == [2, 3]
        assert [rate_scale.lr_scale for rate_scale in table.rate_scales.values()] == [0.5]
        # And a plain schedule after that begins plainly.
        again = ScheduledTables(tables.model, {None: Schedule([{"epoch": 0, "rows": [2, 3]}])})
        again.place()
        assert table.rate_scales == {}


def test_places_between_a_measurement_and_its_stage_are_restored() -> None:
    tables = tables_of(WAITS)
    tables.place()
    tables.advance(0, 2)
    tables.observe(0, 3, {"loss": 1.0})
    tables.observe(0, 4, {"loss": 1.0})
    state = tables.to_state()
    again = tables_of(WAITS)
    again.restore(state)
    assert again.tables["0"].trainable_rows.tolist() == [1, 2]
    assert again.to_state() == state
    assert again.advance(0, 4)
    assert again.tables["0"].trainable_rows.tolist() == [3]


def test_states_of_an_earlier_release_are_read() -> None:
    schedule = {"stages": [{"epoch": 0, "rows": [1]}, {"epoch": 2, "rows": [2]}]}
    tables = tables_of(schedule)
    tables.restore(
        {
            "position": {"epoch": 2, "step": 8},
            "schedules": [{"table": None, "schedule": schedule}],
        }
    )
    assert tables.position == Position(2, 8)
    assert tables.tables["0"].trainable_rows.tolist() == [2]


@pytest.mark.parametrize(
    ("stages", "place"),
    [
        ([{"epoch": 0, "rows": [1]}, {"epoch": 2, "rows": [99]}], r"0: stages\[1\]\.rows: .*99"),
        (
            [{"epoch": 0, "rows": [1]}, {"epoch": 2, "rows": "all", "grow": {"order": [77]}}],
            r"0: stages\[1\]\.rows: order: .*77",
        ),
        (
            [{"epoch": 0, "rows": [1]}, {"epoch": 2, "rows": "all", "grow": "linear"}],
            r"0: stages\[1\]\.rows: .*vocabulary",
        ),
    ],
)
def test_every_stage_is_tried_at_once(stages: list[dict[str, Any]], place: str) -> None:
    with pytest.raises(InputError, match=place):
        tables_of({"stages": stages})
