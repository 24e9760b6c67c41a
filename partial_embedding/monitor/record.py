"""The record of a run: what was planned for the rows and what became of them, in one file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from partial_embedding.errors import InputError
from partial_embedding.files import write_atomically
from partial_embedding.monitor.track import RowTrack
from partial_embedding.rows.vocabulary import Vocabulary
from partial_embedding.schedule import Plateau, Schedule, Stage
from partial_embedding.schedule.messages import StageReport

RECORD = "rows.json"
_FORMAT = 1
_MOST_SCORES = 1000
_MOST_PARTS = 50
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
        trainable: How many they are.
        growth: How many train after each part of the way to it; empty where all are unfrozen at
            once.
        notes: How they are unfrozen and how fast they learn, where that is not the usual.
    """

    start: str
    unit: str | None
    at: float | None
    rows: str
    trainable: int
    growth: list[int] = field(default_factory=list)
    notes: str = ""


@dataclass
class Score:
    """What a validation measured.

    Args:
        place: Where in training.
        trainable: The rows that trained, in all tables together.
        metrics: The numbers by name.
    """

    place: float
    trainable: int
    metrics: dict[str, float]


@dataclass
class RowRecord:
    """What a run did to its rows.

    Args:
        tables: What was seen of each table.
        plans: The stages that were planned for each table.
        scores: What validations measured, in order.
        audit: The frozen rows of each stage, and how many changed a bit; empty without an audit.
        length: The epochs that were planned, where that is known.
        epoch_steps: The optimizer steps of an epoch, where that is known.

    Example:
        >>> record = RowRecord({"words": RowTrack(10, 1.0)})
        >>> RowRecord.from_state(record.to_state()) == record
        True
    """

    tables: dict[str, RowTrack] = field(default_factory=dict)
    plans: dict[str, list[PlannedStage]] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    audit: list[StageReport] = field(default_factory=list)
    length: int | None = None
    epoch_steps: float | None = None

    def add_score(self, place: float, metrics: Mapping[str, float]) -> None:
        """Keep what a validation measured.

        Args:
            place: Where in training.
            metrics: The numbers by name; those that are not finite are left out.
        """
        finite = {name: float(v) for name, v in metrics.items() if math.isfinite(v)}
        trainable = sum(track.trainable[-1][1] for track in self.tables.values() if track.trainable)
        self.scores.append(Score(place, trainable, finite))
        if len(self.scores) > _MOST_SCORES:
            self.scores = self.scores[::2]

    def to_state(self) -> dict[str, Any]:
        """Plain values for a checkpoint or a JSON file."""
        return {"format": _FORMAT, **asdict(self)}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> RowRecord:
        """The inverse of `to_state`, also of what JSON made of it.

        Args:
            state: What `to_state` gave.
        """
        return RowRecord(
            {name: RowTrack.from_state(track) for name, track in state["tables"].items()},
            {name: [PlannedStage(**one) for one in plan] for name, plan in state["plans"].items()},
            [Score(**score) for score in state["scores"]],
            [StageReport(**report) for report in state["audit"]],
            state["length"],
            state["epoch_steps"],
        )


def planned_stages(
    schedule: Schedule,
    num_rows: int,
    vocabulary: Vocabulary | None = None,
    padding: int | None = None,
) -> list[PlannedStage]:
    """Describe the stages of a schedule for one table.

    Args:
        schedule: The schedule.
        num_rows: The rows V of the table.
        vocabulary: What rows mean, for schedules that ask for it.
        padding: The row of padding, which never trains.

    Raises:
        InputError: The rows do not fit the table or the vocabulary.

    Example:
        >>> stages = [{"epoch": 0, "rows": [3]}, {"epoch": 2, "rows": "all", "lr_scale": 0.5}]
        >>> [(stage.start, stage.trainable, stage.notes) for stage in planned_stages(Schedule(stages), 10)]
        [('epoch 0', 1, ''), ('epoch 2', 10, 'lr: 0.5')]
    """  # noqa: E501  # a line that is copied stays one line
    planned: list[PlannedStage] = []
    for stage in schedule.stages:
        start, config = stage.start, stage.to_config()
        ids = stage.rows.resolve(num_rows, vocabulary)
        trainable = int(np.count_nonzero(ids != padding))
        planned.append(
            PlannedStage(
                str(start),
                None if isinstance(start, Plateau) else start.unit,
                None if isinstance(start, Plateau) else start.at,
                _yaml(config.pop("rows")),
                trainable,
                _grown(stage, planned[-1], trainable) if planned else [],
                ", ".join(
                    f"{key}: {_yaml(value)}"
                    for key, value in config.items()
                    if key in ("grow", "lr_scale", "warmup_steps", "plateau")
                ),
            )
        )
    return planned


def _grown(stage: Stage, before: PlannedStage, trainable: int) -> list[int]:
    if (growth := stage.growth) is None:
        return []
    # Fewer parts than there may be, for a picture and not for training.
    parts = min(growth.increments or _MOST_PARTS, _MOST_PARTS)
    return [growth.trainable(part, parts, before.trainable, trainable) for part in range(1, parts)]


def planned_points(
    plan: Sequence[PlannedStage], unit: str, end: float, epoch_steps: float | None
) -> list[tuple[float, int]]:
    """Where in training how many rows should train.

    Args:
        plan: The stages of a table.
        unit: The unit of places in training, `"epoch"` or `"step"`.
        end: Where training ends.
        epoch_steps: The optimizer steps of an epoch, where that is known.

    Returns:
        The places with the trainable rows from there on, as far as they can be known: nothing from a
        stage on that waits for a metric.

    Example:
        >>> plan = planned_stages(Schedule([{"epoch": 0, "rows": [3]}, {"share": 0.5, "rows": "all"}]), 8)
        >>> planned_points(plan, "epoch", end=4.0, epoch_steps=None)
        [(0.0, 1), (2.0, 8)]
    """  # noqa: E501  # a line that is copied stays one line
    points: list[tuple[float, int]] = []
    for stage in plan:
        place = _in_unit(stage, unit, end, epoch_steps)
        if place is None:
            break
        if points and stage.growth:
            before, parts = points[-1][0], len(stage.growth) + 1
            points += [
                (before + (place - before) * part / parts, trainable)
                for part, trainable in enumerate(stage.growth, 1)
            ]
        points.append((place, stage.trainable))
    return points


def _in_unit(stage: PlannedStage, unit: str, end: float, epoch_steps: float | None) -> float | None:
    if stage.at is None or stage.unit == unit or not stage.at:
        return None if stage.at is None else float(stage.at)
    if stage.unit == "share":
        return stage.at * end
    if epoch_steps is None:
        return None
    return stage.at / epoch_steps if unit == "epoch" else stage.at * epoch_steps


def write_record(path: str | os.PathLike[str], record: RowRecord) -> None:
    """Write a record as JSON, in full or not at all.

    Args:
        path: The file; its folder must exist.
        record: What to write.

    Raises:
        OSError: The file cannot be written.
    """
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(record.to_state()) + "\n", encoding="utf-8")


def read_record(run: str | os.PathLike[str]) -> RowRecord:
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
        return RowRecord.from_state(state)
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
