"""Schedule: a pure function of the position, plain YAML both ways, and every refusal."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_embedding import InputError, Position, Rows, Schedule, Stage

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
    for path, reason in ((absent, "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError) as refused:
            Schedule.parse(path)
        assert str(refused.value).startswith(f"{path}: ")
        assert reason in str(refused.value)
