"""Stages of training, and the rows that train in each."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from partial_embedding.errors import InputError, refused_at
from partial_embedding.files import read_yaml
from partial_embedding.rows.growth import GrownRows
from partial_embedding.rows.rows import Rows
from partial_embedding.schedule.position import Evaluation, Position
from partial_embedding.schedule.presets import from_preset
from partial_embedding.schedule.stages import RateScale, Stage, only_keys, parsed
from partial_embedding.schedule.starts import Plateau, Start, Wait, place_in

# In how many increments rows grow between two stages that do not start at epochs.
_PARTS = 10
# Shares are quotients, and their rounding must not make a stage or an increment begin a step late.
_HAIR = 1e-9
# More steps than a run has.
NEVER = 1 << 40


class StageState(NamedTuple):
    """What a position is to a schedule; the rows that train are the same wherever it is.

    Args:
        stage: The index of the stage.
        increment: The increments that have begun of growing into the next stage.
        increments: In how many increments it grows; 0 where it does not.
        cycle_index: The cycles that were completed.

    Example:
        >>> schedule = Schedule([{"epoch": 0, "rows": [7]}, {"epoch": 2, "rows": "all"}])
        >>> schedule.state_at(Position(epoch=5)).stage
        1
    """

    stage: int
    increment: int = 0
    increments: int = 0
    cycle_index: int = 0


@dataclass(frozen=True, repr=False)
class Schedule:
    """Stages of training, each with its rows, which last until the next one starts.

    A stage replaces the rows of the one before, so freezing again is a stage like any other. It
    starts at an `epoch`, at an optimizer `step`, at a `share` of the run, or at a `plateau`, when a
    metric stopped improving in the stage before. Of several that have started the last one counts:
    a stage that waits for a plateau is left out when a later one starts first.

    With `grow`, rows are unfrozen bit by bit from the start of the stage before, and all train when
    the stage starts. `lr_scale` and `warmup_steps` say how fast the rows learn that join by this
    stage, for as long as they train; see `RateScale`.

    Args:
        stages: `Stage`s, or mappings with one of the keys `epoch`, `step`, `share` and `plateau`,
            with `rows`, and perhaps `grow`, `lr_scale` and `warmup_steps`. Starts of one unit rise,
            and the first is 0.
        cycle: Begin again with the first stage whenever this much has passed, in the one unit of
            all starts.

    Raises:
        InputError: There is no stage, the first does not start at 0, the starts do not rise, or a
            stage is malformed; the message names the place.

    Example:
        >>> schedule = Schedule([{"epoch": 0, "rows": [4, 5]}, {"epoch": 2, "rows": "all"}])
        >>> schedule.trainable_rows(Position(epoch=1))
        Rows({'ids': [4, 5]})
        >>> schedule.trainable_rows(2), schedule.state_at(7).stage
        (Rows('all'), 1)
    """

    stages: tuple[Stage, ...]
    cycle: float | None

    def __init__(
        self, stages: Sequence[Stage | Mapping[str, Any]], cycle: float | None = None
    ) -> None:
        object.__setattr__(self, "stages", parsed(stages, cycle))
        if cycle is not None and "share" in self.units:
            cycle = float(cycle)
        object.__setattr__(self, "cycle", cycle)

    def __repr__(self) -> str:
        cycle = "" if self.cycle is None else f", cycle={self.cycle}"
        return f"Schedule({[stage.to_config() for stage in self.stages]!r}{cycle})"

    # Where a position is

    def state_at(self, position: Position | int) -> StageState:
        """What a position is to this schedule; depends on nothing else.

        Args:
            position: A `Position`, or an epoch.

        Raises:
            InputError: The epoch or step is negative, or a share is asked for and the length of the
                run is not known.

        Example:
            >>> grown = {"epoch": 4, "rows": "all", "grow": "linear"}
            >>> Schedule([{"epoch": 0, "rows": "none"}, grown]).state_at(3)
            StageState(stage=0, increment=3, increments=4, cycle_index=0)
        """
        position = _position(position)
        passed = self._passed(position.evaluations, position.total_steps)
        stage = self._latest(position, passed[-1])
        cycle_index = _whole(place_in(self.units[0], position) / self.cycle) if self.cycle else 0
        if stage + 1 == len(self.stages) or (growth := self.stages[stage + 1].growth) is None:
            return StageState(stage, cycle_index=cycle_index)
        first, last = self.stages[stage].start, self.stages[stage + 1].start
        assert isinstance(first, Start), "checked when the schedule was made"
        assert isinstance(last, Start), "likewise"
        length = last.at - first.at
        usual = {"epoch": length, "step": min(length, _PARTS), "share": _PARTS}[last.unit]
        increments = growth.increments or int(usual)
        increment = _whole((self._place(first.unit, position) - first.at) * increments / length)
        return StageState(stage, increment, increments, cycle_index)

    def _passed(self, history: tuple[Evaluation, ...], total_steps: int | None) -> tuple[int, ...]:
        """The stages in which measurements were made, and the one that the last of them started."""
        if not history or not self.metrics:
            return (0,)
        # The last answer is kept, since a run asks at every step and measures only now and then.
        known = vars(self).get("_known")
        if known is not None and known[0] is history and known[1] == total_steps:
            answer: tuple[int, ...] = known[2]
            return answer
        passed, wait = [0], self._wait_after(0)
        for evaluation in history:
            # What is measured after a step belongs to the stage that the step was made in.
            there = Position(evaluation.epoch, evaluation.step - 1, total_steps)
            if (later := self._latest(there, passed[-1])) != passed[-1]:
                passed.append(later)
                wait = self._wait_after(later)
            if wait is not None and wait.is_over(evaluation):
                passed.append(passed[-1] + 1)
                wait = self._wait_after(passed[-1])
        object.__setattr__(self, "_known", (history, total_steps, tuple(passed)))
        return tuple(passed)

    def not_reached(self, position: Position) -> list[int]:
        """The stages that a run which ends at a position never came to.

        Args:
            position: Where training ends.

        Example:
            >>> stages = [{"epoch": 0, "rows": [1]}, {"plateau": "loss", "rows": [2]}]
            >>> Schedule([*stages, {"epoch": 4, "rows": "all"}]).not_reached(Position(epoch=5))
            [1]
        """
        state = self.state_at(position)
        if state.cycle_index:
            return []
        passed = self._passed(position.evaluations, position.total_steps)
        return [
            i
            for i, stage in enumerate(self.stages)
            if i > state.stage or (isinstance(stage.start, Plateau) and i not in passed)
        ]

    def plateau_after(self, stage: int) -> Plateau | None:
        """What a stage waits for, where a plateau starts the next one."""
        following = self.stages[stage + 1].start if stage + 1 < len(self.stages) else None
        return following if isinstance(following, Plateau) else None

    def _wait_after(self, stage: int) -> Wait | None:
        plateau = self.plateau_after(stage)
        return None if plateau is None else Wait(plateau)

    def _latest(self, position: Position, stage: int) -> int:
        """The last stage from `stage` on that has started."""
        for i in range(len(self.stages) - 1, stage, -1):
            if isinstance(start := self.stages[i].start, Plateau):
                continue
            if self._place(start.unit, position) > start.at - _HAIR:
                return i
        return stage

    def next_change(self, position: Position, end: int) -> int:
        """The step at which rows may change next, while neither the epoch nor what was seen does.

        Args:
            position: Where training stands.
            end: The last step that is asked for.

        Returns:
            A step beyond the position's; `NEVER` if no rows change up to the end.

        Example:
            >>> schedule = Schedule([{"step": 0, "rows": "none"}, {"step": 40, "rows": "all"}])
            >>> schedule.next_change(Position(step=3), end=1000)
            40
        """
        if not self.moves_within_epochs:
            return NEVER
        later = range(position.step + 1, end + 1)
        place = first_other(self, position, later)
        return later[place] if place < len(later) else NEVER

    def _place(self, unit: str, position: Position) -> float:
        place = place_in(unit, position)
        if self.cycle:
            place -= _whole(place / self.cycle) * self.cycle
        return place

    # What happens there

    def trainable_rows(self, position: Position | int) -> Rows:
        """The rows that train at a position; arguments and errors are those of `state_at`.

        How fast they learn is told by `rate_scale_at`.
        """
        return self.rows_at(self.state_at(position))

    def rows_at(self, stage_state: StageState) -> Rows:
        """The rows that train in a stage state, as `state_at` gives it."""
        rows = self.stages[stage_state.stage].rows
        if not stage_state.increment:
            return rows
        following = self.stages[stage_state.stage + 1]
        assert following.growth is not None
        return GrownRows(
            rows, following.rows, following.growth, stage_state.increment, stage_state.increments
        )

    def rate_scale_at(self, stage_state: StageState) -> RateScale:
        """How fast the rows learn that join in a stage state, as `state_at` gives it."""
        return self.stages[stage_state.stage + bool(stage_state.increment)].rate_scale

    # What it needs

    @property
    def units(self) -> tuple[str, ...]:
        """The units in which stages start, each once: `"epoch"`, `"step"`, `"share"`."""
        starts = [stage.start for stage in self.stages if isinstance(stage.start, Start)]
        return tuple(dict.fromkeys(start.unit for start in starts))

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that stages wait for, each once."""
        starts = [s.start for s in self.stages if isinstance(s.start, Plateau)]
        return tuple(dict.fromkeys(start.monitor for start in starts))

    @property
    def moves_within_epochs(self) -> bool:
        """Whether rows may change at any step, and not at the beginning of an epoch alone."""
        return self.units != ("epoch",)

    def to_config(self) -> dict[str, Any]:
        """Write the schedule as plain YAML values; the inverse of `parse`.

        Example:
            >>> Schedule.parse({"stages": [{"epoch": 0, "rows": "all"}]}).to_config()
            {'stages': [{'epoch': 0, 'rows': 'all'}]}
        """
        config: dict[str, Any] = {"stages": [stage.to_config() for stage in self.stages]}
        if self.cycle is not None:
            config["cycle"] = self.cycle
        return config

    @staticmethod
    def parse(value: Schedule | Mapping[str, Any] | str | PathLike[str]) -> Schedule:
        """Read a schedule.

        Args:
            value: A `Schedule`; a mapping with the key `stages` and perhaps `cycle`, or with the
                one key `preset`, as `partial_embedding.schedule.presets` lists them; or the path of
                a YAML file that holds such a mapping.

        Raises:
            InputError: The file cannot be read, or what it holds is no schedule; the message names
                the file and the key.
        """
        if isinstance(value, Schedule):
            return value
        if isinstance(value, Mapping):
            if "preset" in value:
                only_keys(value, ["preset"], [], "schedule")
                return Schedule(from_preset(value["preset"]))
            only_keys(value, ["stages"], ["cycle"], "schedule")
            return Schedule(value["stages"], value.get("cycle"))
        if not isinstance(value, str | PathLike):
            raise InputError(
                "a schedule is a mapping with the key 'stages' or 'preset', or a YAML file. "
                f"Received: {value!r}. Write stages as {{'stages': […]}}."
            )
        loaded = read_yaml(value, "schedule")
        with refused_at(str(value)):
            if not isinstance(loaded, Mapping):
                raise InputError(
                    "a schedule is a mapping with the key 'stages' or 'preset'. "
                    f"Received: {loaded!r}. Put stages under 'stages:'."
                )
            return Schedule.parse(loaded)


# What `Schedule.parse` reads.
AnySchedule = Schedule | Mapping[str, Any] | str | PathLike[str]


def first_other(
    schedule: Schedule, here: Position, later: range, steps_per_epoch: int | None = None
) -> int:
    """Which of some later steps is the first in another state than here; their number if none is.

    All of them are in the epoch of here, unless epochs are so many steps long.
    """
    now = schedule.state_at(here)

    def is_over(step: int) -> bool:
        epoch = step // steps_per_epoch if steps_per_epoch else here.epoch
        return schedule.state_at(replace(here, epoch=epoch, step=step)) != now

    # A state that is over does not come back, so that the end of it is found by halving.
    return bisect_left(later, True, key=is_over)


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
    if not isinstance(value, Mapping) or not value or {"stages", "preset"} & value.keys():
        return {None: Schedule.parse(value)}
    schedules: dict[str | None, Schedule] = {}
    for name, schedule in value.items():
        with refused_at(f"schedule of the table {str(name)!r}"):
            schedules[str(name)] = Schedule.parse(schedule)
    return schedules


def _whole(number: float) -> int:
    """The whole part of a number from 0 up, also where rounding left it a hair too small."""
    return int(number + _HAIR)


def _position(value: Position | int) -> Position:
    position = value if isinstance(value, Position) else Position(epoch=value)
    for unit, number in (("an epoch", position.epoch), ("a step", position.step)):
        if not isinstance(number, int | np.integer) or number < 0:
            raise InputError(
                f"{unit} is a whole number from 0 up. Received: {number!r}. The first is 0."
            )
    return position
