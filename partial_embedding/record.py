"""The record of a run: what was planned for the rows and what became of them, in one file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from partial_embedding.drift import RowTrack
from partial_embedding.errors import InputError
from partial_embedding.files import write_atomically
from partial_embedding.report import StageReport
from partial_embedding.schedule import Plateau, Schedule
from partial_embedding.vocabulary import Vocabulary

RECORD = "rows.json"
_FORMAT = 1
_MOST_SCORES = 1000
# A stage of a few hundred ids is no description; its beginning is.
_MOST_TEXT = 120


@dataclass
class PlannedStage:
    """One stage of a schedule, as it was planned.

    Args:
        start: Where it starts, in words.
        unit: `"epoch"`, `"step"` or `"share"`; None where it waits for a metric.
        at: Where in that unit.
        rows: Its rows, as YAML.
        awake: How many they are.
        notes: How they wake and how fast they learn, where that is not the usual.
    """

    start: str
    unit: str | None
    at: float | None
    rows: str
    awake: int
    notes: str = ""


@dataclass
class Score:
    """What a validation measured.

    Args:
        place: Where in training.
        awake: The rows that were awake, in all tables together.
        metrics: The numbers by name.
    """

    place: float
    awake: int
    metrics: dict[str, float]


@dataclass
class RunRecord:
    """What a run did to its rows.

    Args:
        tables: What was seen of each table.
        plans: The stages that were planned for each table.
        scores: What validations measured, in order.
        audit: The frozen rows of each stage, and how many changed a bit; empty without an audit.

    Example:
        >>> record = RunRecord({"words": RowTrack(10, 1.0)})
        >>> RunRecord.from_state(record.to_state()) == record
        True
    """

    tables: dict[str, RowTrack] = field(default_factory=dict)
    plans: dict[str, list[PlannedStage]] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    audit: list[StageReport] = field(default_factory=list)

    def add_score(self, place: float, metrics: Mapping[str, float]) -> None:
        """Keep what a validation measured.

        Args:
            place: Where in training.
            metrics: The numbers by name; those that are not finite are left out.
        """
        finite = {name: float(v) for name, v in metrics.items() if math.isfinite(v)}
        awake = sum(track.awake[-1][1] for track in self.tables.values() if track.awake)
        self.scores.append(Score(place, awake, finite))
        if len(self.scores) > _MOST_SCORES:
            self.scores = self.scores[::2]

    def to_state(self) -> dict[str, Any]:
        """Plain values for a checkpoint or a JSON file."""
        return {"format": _FORMAT, **asdict(self)}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> RunRecord:
        """The inverse of `to_state`, also of what JSON made of it.

        Args:
            state: What `to_state` gave.
        """
        return RunRecord(
            {name: RowTrack.from_state(track) for name, track in state["tables"].items()},
            {name: [PlannedStage(**one) for one in plan] for name, plan in state["plans"].items()},
            [Score(**score) for score in state["scores"]],
            [StageReport(**report) for report in state["audit"]],
        )


def planned_stages(
    schedule: Schedule, num_rows: int, vocabulary: Vocabulary | None = None
) -> list[PlannedStage]:
    """Describe the stages of a schedule for one table.

    Args:
        schedule: The schedule.
        num_rows: The rows V of the table.
        vocabulary: What rows mean, for schedules that ask for it.

    Raises:
        InputError: The rows do not fit the table or the vocabulary.

    Example:
        >>> stages = [{"epoch": 0, "rows": [3]}, {"epoch": 2, "rows": "all", "lr": 0.5}]
        >>> planned_stages(Schedule(stages), 10)[1]
        PlannedStage(start='epoch 2', unit='epoch', at=2, rows='all', awake=10, notes='lr: 0.5')
    """
    planned = []
    for stage in schedule.stages:
        start, config = stage.start, stage.to_config()
        waits = isinstance(start, Plateau)
        planned.append(
            PlannedStage(
                str(start),
                None if isinstance(start, Plateau) else start.unit,
                None if isinstance(start, Plateau) else start.at,
                _yaml(config.pop("rows")),
                stage.rows.resolve(num_rows, vocabulary).size,
                ", ".join(
                    f"{key}: {_yaml(value)}"
                    for key, value in config.items()
                    if key in ("grow", "lr", "warmup") or (waits and key == "plateau")
                ),
            )
        )
    return planned


def write_record(path: str | os.PathLike[str], record: RunRecord) -> None:
    """Write a record as JSON, in full or not at all.

    Args:
        path: The file; its folder must exist.
        record: What to write.

    Raises:
        OSError: The file cannot be written.
    """
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(record.to_state()) + "\n", encoding="utf-8")


def read_record(run: str | os.PathLike[str]) -> RunRecord:
    """Read the record of a run.

    Args:
        run: The folder of the run, or the file itself.

    Raises:
        InputError: There is no such file, or `RowMonitor` did not write it.
    """
    path = Path(run)
    path = path / RECORD if path.is_dir() else path
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["format"] != _FORMAT:
            raise InputError(
                f"{path}: this version reads records of format {_FORMAT}. "
                f"Received: {state['format']!r}. Use the version that wrote it."
            )
        return RunRecord.from_state(state)
    except OSError as error:
        raise InputError(
            f"{path}: the record of a run cannot be read: {error.strerror}. Name the folder of a "
            "run that had a RowMonitor."
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: a record is what RowMonitor wrote. Received something else: {reason}."
        ) from None


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("\n...").strip()
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]} …"
