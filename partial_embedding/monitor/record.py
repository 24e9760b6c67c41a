"""The record of a run: what was planned for the rows and what became of them, in one file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

from partial_embedding.errors import InputError
from partial_embedding.files import write_text
from partial_embedding.monitor.sampling import TableSample, Values
from partial_embedding.monitor.track import RowTrack, thinned
from partial_embedding.rows.vocabulary import Ids, Vocabulary
from partial_embedding.schedule import Schedule
from partial_embedding.schedule.messages import AuditResult
from partial_embedding.schedule.preview import Planned, plan

RECORD = "rows.json"
_FORMAT = 1
# A list of some hundred ids is no description; its beginning is.
_MOST_TEXT = 120


@dataclass
class Score:
    """What a validation measured, where in training, and how many rows trained in all tables."""

    place: float
    trainable: int
    metrics: dict[str, float]


@dataclass
class RowRecord:
    """What a run did to its rows: by table, in validations, and in the audit of each stage."""

    tables: dict[str, RowTrack] = field(default_factory=dict)
    schedules: dict[str, str] = field(default_factory=dict)  # as YAML
    plans: dict[str, list[Planned]] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    audit: list[AuditResult] = field(default_factory=list)
    # The epochs that were planned, and the optimizer steps of each, where these are known.
    length: int | None = None
    epoch_steps: int | None = None

    @property
    def unit(self) -> str:
        """The unit of places in training, `"epoch"` or `"step"`."""
        return "step" if self.epoch_steps is None else "epoch"

    @property
    def trainable(self) -> int:
        """How many rows train where training stands, in all tables together."""
        return sum(track.count for track in self.tables.values())

    @property
    def num_rows(self) -> int:
        """The rows of all tables together."""
        return sum(track.num_rows for track in self.tables.values())

    @property
    def end(self) -> float:
        """Where training stands."""
        return max((track.end for track in self.tables.values()), default=0.0)

    def to_state(self) -> dict[str, Any]:
        """Plain values for a checkpoint or a JSON file."""
        return {"format": _FORMAT, **asdict(self)}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> RowRecord:
        """The inverse of `to_state`, also of what JSON made of it."""
        return RowRecord(
            {name: RowTrack.from_state(track) for name, track in state["tables"].items()},
            dict(state["schedules"]),
            {name: [Planned(**step) for step in plan] for name, plan in state["plans"].items()},
            [Score(**score) for score in state["scores"]],
            [AuditResult(**result) for result in state["audit"]],
            state["length"],
            state["epoch_steps"],
        )


def check_amounts(**amounts: int) -> None:
    """Refuse arguments of a `RowMonitor` with which it would measure nothing."""
    for name, value in amounts.items():
        if type(value) is not int or value < 1:
            raise InputError(
                f"{name} is a whole number from 1 up. Received: {value!r}. Leave it out for the "
                "default."
            )


class Moving(Protocol):
    """What moves rows along schedules: the `RowUnfreezing` of a framework."""

    schedules: dict[str | None, Schedule]
    vocabulary: Vocabulary | None

    @property
    def audit_results(self) -> list[AuditResult]:
        """What the audit found in the stages that ended."""


class RunRecorder:
    """Samples the tables of a run, and keeps its record: what both `RowMonitor`s have in common.

    Where the optimizer steps of an epoch are not known, places in training are steps. A run that
    continues another is given what `to_state` gave of that.

    Example:
        >>> import numpy as np
        >>> table = np.eye(4, dtype=np.float32)
        >>> run = RunRecorder(length=3, epoch_steps=10)
        >>> sample = run.add_table("words", lambda ids: table[ids], 4)
        >>> sample.note_rows(np.array([True, False, False, False]), place=0.0)
        >>> sample.measure(place=1.0)["trainable_rows"]
        1
        >>> run.add_score({"val_loss": 0.5})
        >>> run.finished().scores
        [Score(place=1.0, trainable=1, metrics={'val_loss': 0.5})]
    """

    def __init__(
        self,
        length: int | None = None,
        epoch_steps: int | None = None,
        size: int = 256,
        vocabulary: Vocabulary | None = None,
        restored: Mapping[str, Any] | None = None,
    ) -> None:
        self.size = size
        self.vocabulary = vocabulary
        self._samples: dict[str, TableSample] = {}
        # The row of padding, and the rows by which a table grew last: what a plan asks for.
        self._special: dict[str, tuple[int | None, Ids | None]] = {}
        self._restored = restored or {"tables": {}, "scores": []}
        scores = [Score(**score) for score in self._restored["scores"]]
        self._record = RowRecord(scores=scores, length=length, epoch_steps=epoch_steps)

    @property
    def unit(self) -> str:
        """The unit of places in training, `"epoch"` or `"step"`."""
        return self._record.unit

    @property
    def tracks(self) -> dict[str, RowTrack]:
        """What was seen so far, by the name of the table."""
        return self._record.tables

    def add_table(
        self,
        name: str,
        rows: Callable[[Ids], Values],
        num_rows: int,
        padding: int | None = None,
        new: Ids | None = None,
    ) -> TableSample:
        """Sample a table from now on, or from where the run that this one continues stopped.

        The arguments are those of `TableSample`, and the rows by which the table grew last.
        """
        sample = TableSample(rows, num_rows, self.size, self.vocabulary, padding)
        if (saved := self._restored["tables"].get(name)) is not None:
            sample.restore(saved)
        self._samples[name], self._record.tables[name] = sample, sample.track
        self._special[name] = padding, new
        return sample

    def add_score(self, metrics: Mapping[str, float]) -> None:
        """Keep what a validation measured, where training stands."""
        if not self._samples:
            return
        finite = {name: float(v) for name, v in metrics.items() if math.isfinite(v)}
        score = Score(self._record.end, self._record.trainable, finite)
        self._record.scores = thinned([*self._record.scores, score])

    def to_state(self) -> dict[str, Any]:
        """What was seen so far, as plain values and arrays."""
        tables = {name: sample.to_state() for name, sample in self._samples.items()}
        return {"tables": tables, "scores": list(map(asdict, self._record.scores))}

    def finished(self, moving: Moving | None = None) -> RowRecord:
        """The record of the run."""
        record = self._record
        for sample in self._samples.values():
            sample.finish()
        if moving is None:
            return record
        record.audit = list(moving.audit_results)
        for name, track in record.tables.items():
            schedule = moving.schedules.get(name, moving.schedules.get(None))
            if schedule is None:
                continue
            length = max(math.ceil(track.end), 1)
            steps = plan(
                schedule,
                track.num_rows,
                moving.vocabulary or self.vocabulary,
                1 if record.epoch_steps is None else record.length or length,
                record.epoch_steps or length,
                *self._special[name],
            )
            record.schedules[name] = _written(schedule)
            record.plans[name] = thinned(steps)
        return record


def write_record(path: str | os.PathLike[str], record: RowRecord) -> None:
    """Write a record as JSON, in full or not at all."""
    write_text(path, json.dumps(record.to_state()) + "\n")


def read_record(run: str | os.PathLike[str]) -> RowRecord:
    """Read the record of a run, from its folder or the file itself."""
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
            f"{path}: a record is what RowMonitor wrote. Received something else: {reason}. "
            "Name the folder of another run."
        ) from None


def _written(schedule: Schedule) -> str:
    """A schedule as YAML, one line a stage."""
    config = schedule.to_config()
    lines = ["stages:", *(f"- {_yaml(stage)}" for stage in config.pop("stages"))]
    lines += [f"{key}: {_yaml(value)}" for key, value in config.items()]
    return "\n".join(f"{s[:_MOST_TEXT]} …" if len(s) > _MOST_TEXT else s for s in lines)


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, width=10**9, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")
