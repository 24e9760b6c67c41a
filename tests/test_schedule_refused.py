"""Schedules that are malformed, and what the refusal names."""

import math
from pathlib import Path
from typing import Any

import pytest

from partial_embedding import InputError, Position, Rows, Schedule, Stage
from partial_embedding.schedule import schedules_by_table

STAGE_LIST = [{"epoch": 0, "rows": [4, 5]}, {"epoch": 2, "rows": "all"}]


def after(**stage: Any) -> dict[str, Any]:
    """A schedule whose second stage is this one."""
    return {"stages": [STAGE_LIST[0], {"rows": "all", **stage}]}


# What is malformed, and what the message must name: the place, and what was received.
MALFORMED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "nothing": (None, ("'stages'", "None")),
    "list_of_stages": ([{"epoch": 0, "rows": "all"}], ("'stages'", "'epoch': 0")),
    "unknown_key": ({"stages": STAGE_LIST, "metric": "loss"}, ("schedule:", "'metric'")),
    "no_stages_key": ({}, ("schedule:", "'stages'")),
    "misspelt_stages": ({"stage": STAGE_LIST}, ("schedule:", "'stage'")),
    "empty_stages": ({"stages": []}, ("stages", "[]")),
    "stages_as_text": ({"stages": "all"}, ("stages", "'all'")),
    "stage_as_text": ({"stages": ["all"]}, ("stages[0]", "'all'")),
    "no_epoch": ({"stages": [{"rows": "all"}]}, ("stages[0]", "'epoch'")),
    "no_rows": ({"stages": [STAGE_LIST[0], {"epoch": 2}]}, ("stages[1]", "'rows'")),
    "unknown_key_in_a_stage": (
        {"stages": [STAGE_LIST[0], {"epoch": 2, "rows": "all", "rate": 0.1}]},
        ("stages[1]", "'rate'"),
    ),
    "negative_epoch": ({"stages": [{"epoch": -1, "rows": "all"}]}, ("stages[0].epoch", "-1")),
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
    "two_starts": (
        {"stages": [STAGE_LIST[0], {"epoch": 2, "step": 9, "rows": "all"}]},
        ("stages[1]", "['epoch', 'step']"),
    ),
    "place_and_plateau": (
        {"stages": [STAGE_LIST[0], {"share": 0.2, "plateau": "loss", "rows": "all"}]},
        ("stages[1]", "['share', 'plateau']"),
    ),
    "negative_step": (after(step=-3), ("stages[1].step", "-3")),
    "share_in_percent": (after(share=30), ("stages[1].share", "30")),
    "late_share": ({"stages": [{"share": 0.1, "rows": "all"}]}, ("stages[0].share", "0.1")),
    "plateau_of_a_number": (after(plateau=3), ("stages[1].plateau", "3")),
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
    "rate_of_0": (after(epoch=2, lr_scale=0), ("stages[1].lr_scale", "0")),
    "negative_warmup": (
        after(epoch=2, lr_scale=0.5, warmup_steps=-1),
        ("stages[1].warmup_steps", "-1"),
    ),
    "growth_in_a_stage_alone": (
        {"stages": [{"epoch": 0, "rows": "all", "grow": "linear"}]},
        ("stages[0].grow",),
    ),
    "growth_unknown": (after(epoch=2, grow="fast"), ("stages[1].grow", "'fast'")),
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
        after(epoch=2, grow={"increments": 3}),
        ("stages[1].grow.increments", "3 increments for 2 epochs"),
    ),
    "cycle_of_nothing": ({"stages": STAGE_LIST, "cycle": 0}, ("cycle", "0")),
    "cycle_within_the_stages": ({"stages": STAGE_LIST, "cycle": 2}, ("cycle", "2", "Received: 2")),
    "fractional_cycle": ({"stages": STAGE_LIST, "cycle": 2.5}, ("cycle", "2.5")),
    "cycle_true": ({"stages": STAGE_LIST[:1], "cycle": True}, ("cycle", "True")),
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
def test_malformed_schedules_are_refused_with_the_place(
    value: Any, named: tuple[str, ...], refused: Any
) -> None:
    refused(Schedule.parse, value, parts=named)


MALFORMED_FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("'stages'", "None")),
    "list": (b"- {epoch: 0, rows: all}", ("'stages'", "epoch")),
    "broken_yaml": (b"stages: [{epoch: 0, rows: all", ("YAML", "line 1")),
    "not_utf8": (b"stages: # caf\xe9\n", ("UTF-8", "0xe9")),
    "python_object": (b"!!python/object/apply:os.getcwd []", ("YAML", "python/object")),
    "unknown_key": (b"stages: []\nepochs: 3\n", ("schedule:", "'epochs'")),
    "bad_stage": (b"stages:\n- {epoch: 0, rows: {ids: []}}\n", ("stages[0].rows", "[]")),
    "of_itself": (b"stages: &all [*all]\n", ("YAML", "holds itself")),
    "of_5000_digits": (b"cycle: " + b"9" * 5000, ("YAML", "digits")),
    "no_mapping_of_tables": (b"words: {stages: []}\n", ("schedule:", "'words'")),
}


@pytest.mark.parametrize(("content", "named"), MALFORMED_FILES.values(), ids=MALFORMED_FILES)
def test_malformed_files_are_refused_in_one_line_with_their_name(
    content: bytes, named: tuple[str, ...], tmp_path: Path, refused: Any
) -> None:
    path = tmp_path / "broken schedule.yaml"
    path.write_bytes(content)
    assert refused(Schedule.parse, path, parts=named).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("absent.yaml", "No such file"), (".", "Received a folder"), ("a\0b", "null")],
    ids=["absent", "folder", "no_name"],
)
def test_unreadable_files_are_refused_with_their_name(
    name: str, reason: str, tmp_path: Path, refused: Any
) -> None:
    path = tmp_path / name
    assert refused(Schedule.parse, path, parts=[reason]).startswith(f"{path}: ")


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
        Schedule(STAGE_LIST).state_at(at)


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
    value: Any, named: tuple[str, ...], refused: Any
) -> None:
    refused(schedules_by_table, value, parts=named)
