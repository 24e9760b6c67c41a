"""When: a pure function from the position in training to the rows that train there."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from partial_embedding.errors import InputError
from partial_embedding.rows import Rows


@dataclass(frozen=True)
class Position:
    """Where training stands.

    Args:
        epoch: Epochs completed before the current one; the first epoch is 0.
        step: Optimizer steps completed.
    """

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class Stage:
    """The rows that train from an epoch on, until the next stage.

    Args:
        epoch: The first epoch of the stage; the first epoch of training is 0.
        rows: The rows that train during it.
    """

    epoch: int
    rows: Rows

    def to_config(self) -> dict[str, Any]:
        """Write the stage as plain YAML values."""
        return {"epoch": self.epoch, "rows": self.rows.to_config()}


@dataclass(frozen=True, repr=False)
class Schedule:
    """Stages of (epoch, rows), the first at epoch 0, each lasting until the next one starts.

    A stage replaces the rows of the one before, so freezing again is a stage like any other.

    Args:
        stages: `Stage`s or mappings with the keys `epoch` and `rows`, in rising order of epochs.

    Raises:
        InputError: There is no stage, the first does not start at epoch 0, the epochs do not rise,
            or a stage is malformed; the message names the place.

    Example:
        >>> schedule = Schedule([{"epoch": 0, "rows": [4, 5]}, {"epoch": 2, "rows": "all"}])
        >>> schedule.trainable_rows(Position(epoch=1))
        Rows({'ids': [4, 5]})
        >>> schedule.trainable_rows(2), schedule.stage_at(7)
        (Rows('all'), 1)
    """

    stages: tuple[Stage, ...]

    def __init__(self, stages: Sequence[Stage | Mapping[str, Any]]) -> None:
        if isinstance(stages, str | Mapping) or not isinstance(stages, Sequence) or not stages:
            raise InputError(
                "stages are a list of {epoch: …, rows: …} with at least one entry. "
                f"Received: {stages!r}."
            )
        parsed = tuple(_stage(stage, f"stages[{i}]") for i, stage in enumerate(stages))
        if parsed[0].epoch != 0:
            raise InputError(
                f"stages[0].epoch: the first stage starts at epoch 0. Received: {parsed[0].epoch}. "
                "To train no row until then, put {epoch: 0, rows: none} first."
            )
        for i, (before, after) in enumerate(pairwise(parsed), start=1):
            if after.epoch <= before.epoch:
                raise InputError(
                    f"stages[{i}].epoch: stages come in rising order of epochs. Received: "
                    f"{after.epoch} after {before.epoch}. Sort them, or merge the two."
                )
        object.__setattr__(self, "stages", parsed)

    def __repr__(self) -> str:
        return f"Schedule({[stage.to_config() for stage in self.stages]!r})"

    def stage_at(self, position: Position | int) -> int:
        """The index of the stage at a position in training.

        Args:
            position: A `Position`, or an epoch.

        Raises:
            InputError: The epoch is negative.
        """
        epoch = position if isinstance(position, int) else position.epoch
        if epoch < 0:
            raise InputError(f"an epoch is a whole number from 0 up. Received: {epoch}.")
        return bisect_right(self.stages, epoch, key=lambda stage: stage.epoch) - 1

    def trainable_rows(self, position: Position | int) -> Rows:
        """The rows that train at a position in training; depends on nothing else.

        Args:
            position: A `Position`, or an epoch.
        """
        return self.stages[self.stage_at(position)].rows

    def to_config(self) -> dict[str, Any]:
        """Write the schedule as plain YAML values; the inverse of `parse`.

        Example:
            >>> Schedule.parse({"stages": [{"epoch": 0, "rows": "all"}]}).to_config()
            {'stages': [{'epoch': 0, 'rows': 'all'}]}
        """
        return {"stages": [stage.to_config() for stage in self.stages]}

    @staticmethod
    def parse(value: Schedule | Mapping[str, Any] | str | PathLike[str]) -> Schedule:
        """Read a schedule.

        Args:
            value: A `Schedule`, a mapping with the key `stages`, or the path of a YAML file that
                holds such a mapping.

        Raises:
            InputError: The file cannot be read, or what it holds is no schedule; the message names
                the file and the key.
        """
        if isinstance(value, Schedule):
            return value
        if isinstance(value, Mapping):
            _only_keys(value, {"stages"}, "schedule")
            return Schedule(value["stages"])
        if not isinstance(value, str | PathLike):
            raise InputError(
                "a schedule is a mapping with the key 'stages', or a YAML file. "
                f"Received: {value!r}."
            )
        try:
            loaded = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            if not isinstance(loaded, Mapping):
                raise InputError(
                    f"a schedule is a mapping with the key 'stages'. Received: {loaded!r}."
                )
            return Schedule.parse(loaded)
        except OSError as error:
            raise InputError(
                f"{value}: the schedule cannot be read: {error.strerror}. Check the path."
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{value}: a schedule is YAML in UTF-8. Received: {reason}.") from None
        except InputError as error:
            raise InputError(f"{value}: {error}") from None


def schedules_by_table(value: Any) -> dict[str | None, Schedule]:
    """Read one schedule for all tables, or one for each of several.

    Args:
        value: What `Schedule.parse` takes, or a mapping from the names of tables to such.

    Returns:
        The schedules by table; the key None stands for every table that is not named.

    Raises:
        InputError: A schedule is malformed.

    Example:
        >>> sorted(schedules_by_table({"items": {"stages": [{"epoch": 0, "rows": "all"}]}}))
        ['items']
    """
    if isinstance(value, Mapping) and value and "stages" not in value:
        return {str(name): _of_table(str(name), schedule) for name, schedule in value.items()}
    return {None: Schedule.parse(value)}


def _of_table(name: str, value: Any) -> Schedule:
    try:
        return Schedule.parse(value)
    except InputError as error:
        raise InputError(f"schedule of the table {name!r}: {error}") from None


def _stage(value: Stage | Mapping[str, Any], place: str) -> Stage:
    if isinstance(value, Stage):
        value = {"epoch": value.epoch, "rows": value.rows}
    if not isinstance(value, Mapping):
        raise InputError(f"{place}: a stage is {{epoch: …, rows: …}}. Received: {value!r}.")
    _only_keys(value, {"epoch", "rows"}, place)
    epoch = value["epoch"]
    if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
        raise InputError(
            f"{place}.epoch: an epoch is a whole number from 0 up. Received: {epoch!r}."
        )
    try:
        return Stage(epoch, Rows.parse(value["rows"]))
    except InputError as error:
        raise InputError(f"{place}.rows: {error}") from None


def _only_keys(value: Mapping[str, Any], keys: set[str], place: str) -> None:
    if unknown := [key for key in value if key not in keys]:
        raise InputError(f"{place}: the keys are {sorted(keys)}. Received: {unknown[0]!r}.")
    if lacking := sorted(keys - set(value)):
        raise InputError(
            f"{place}: the keys are {sorted(keys)}. Received none named {lacking[0]!r}."
        )
