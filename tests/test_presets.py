"""Presets: the stages of their papers, as any other schedule, and every refusal."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from partial_embedding import InputError, Position, Schedule, Vocabulary

V = 40
VOCABULARY = Vocabulary(
    map(str, range(V)), np.random.default_rng(2).integers(0, 50, V), missing=[3, 17, 39]
)
MISSING = {3, 17, 39}


def rows_by_stage(schedule: Schedule) -> list[set[int]]:
    return [set(stage.rows.resolve(V, VOCABULARY).tolist()) for stage in schedule.stages]


def frequent(number: int) -> set[int]:
    assert VOCABULARY.counts is not None
    counts = VOCABULARY.counts.tolist()
    return set(sorted(range(V), key=lambda row: (-counts[row], row))[:number])


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 7, 40, 60])
def test_gradual_unfreezes_from_the_rarest_on_each_band_more_slowly(bands: int) -> None:
    preset = {"gradual": {"bands": bands, "epochs": 3, "lr_decay": 2.6}}
    schedule = Schedule.parse({"preset": preset})
    rows = rows_by_stage(schedule)
    assert len(rows) == bands + 1
    for band, trainable in enumerate(rows):
        rare = set(range(V)) - frequent(V - round(V * band / bands))
        assert trainable == MISSING | rare
    assert [stage.start.to_config() for stage in schedule.stages] == [
        {"epoch": 3 * band} for band in range(bands + 1)
    ]
    rates = [stage.rate_scale.lr_scale for stage in schedule.stages]
    assert rates[0] == 1
    assert all(a / b == pytest.approx(2.6) for a, b in pairwise(rates))


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 7, 40, 60])
def test_chain_thaw_trains_each_row_in_one_band_and_then_all(bands: int) -> None:
    schedule = Schedule.parse({"preset": {"chain_thaw": {"bands": bands, "epochs": 2}}})
    first, *alone, last = rows_by_stage(schedule)
    assert first == MISSING
    assert last == set(range(V))
    assert len(alone) == bands
    assert sorted(row for band in alone for row in band) == list(range(V))
    for band, trainable in enumerate(alone):
        assert trainable == frequent(round(V * (band + 1) / bands)) - frequent(
            round(V * band / bands)
        )
    assert [schedule.state_at(epoch).stage for epoch in range(2 * bands + 4)] == [
        min(epoch // 2, bands + 1) for epoch in range(2 * bands + 4)
    ]
    assert all(stage.rate_scale.is_plain for stage in schedule.stages)


def test_missing_first_trains_the_missing_rows_and_then_all() -> None:
    schedule = Schedule.parse({"preset": {"missing_first": {"epochs": 2}}})
    assert rows_by_stage(schedule) == [MISSING, set(range(V))]
    assert [schedule.state_at(Position(epoch)).stage for epoch in range(4)] == [0, 0, 1, 1]


PRESETS: dict[str, Any] = {
    "missing_first": "missing_first",
    "gradual": "gradual",
    "chain_thaw": "chain_thaw",
    "null": {"gradual": None},
    "no_arguments": {"chain_thaw": {}},
    "no_decay": {"gradual": {"lr_decay": 1}},
    "many": {"gradual": {"bands": 9, "epochs": 2, "lr_decay": 1.5}},
}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_are_schedules_as_any_other(preset: Any, tmp_path: Path) -> None:
    schedule = Schedule.parse({"preset": preset})
    written = yaml.safe_dump(schedule.to_config())
    assert Schedule.parse(yaml.safe_load(written)) == schedule
    path = tmp_path / "preset.yaml"
    path.write_text(yaml.safe_dump({"preset": preset}))
    assert Schedule.parse(path) == schedule


MALFORMED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "unknown": ("gentle", ("'gentle'", "chain_thaw")),
    "list": (["gradual"], ("['gradual']",)),
    "two": ({"gradual": {}, "chain_thaw": {}}, ("'gradual'", "'chain_thaw'")),
    "arguments_in_a_list": ({"gradual": [4]}, ("gradual", "[4]")),
    "no_arguments_but_a_number": ({"gradual": 0}, ("gradual", "0")),
    "unknown_argument": ({"gradual": {"stages": 4}}, ("gradual", "'bands'", "'stages': 4")),
    "argument_of_another": ({"chain_thaw": {"lr_decay": 2}}, ("chain_thaw", "'lr_decay': 2")),
    "no_bands": ({"gradual": {"bands": 0}}, ("bands", "0")),
    "bands_true": ({"chain_thaw": {"bands": True}}, ("bands", "True")),
    "no_epochs": ({"missing_first": {"epochs": 0}}, ("epochs", "0")),
    "epochs_in_words": ({"gradual": {"epochs": "two"}}, ("epochs", "'two'")),
    "rising_rates": ({"gradual": {"lr_decay": 0.5}}, ("lr_decay", "0.5")),
    "decay_that_is_no_number": ({"gradual": {"lr_decay": float("nan")}}, ("lr_decay", "nan")),
}


@pytest.mark.parametrize(("preset", "named"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_presets_are_refused_with_what_was_received(
    preset: Any, named: tuple[str, ...], tmp_path: Path, refused: Any
) -> None:
    path = tmp_path / "preset.yaml"
    path.write_text(yaml.safe_dump({"preset": preset}))
    for value, where in (({"preset": preset}, "preset: "), (path, f"{path}: preset: ")):
        assert refused(Schedule.parse, value, parts=named).startswith(where)


@pytest.mark.parametrize("key", ["stages", "cycle", "presets"])
def test_a_preset_stands_alone(key: str) -> None:
    with pytest.raises(InputError, match=f"'{key}'"):
        Schedule.parse({"preset": "gradual", key: 3})
