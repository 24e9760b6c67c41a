"""The tables of one model, moved along their schedules: what every framework does alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sized
from dataclasses import replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from partial_embedding.errors import InputError
from partial_embedding.rows.rows import Rows
from partial_embedding.rows.vocabulary import Ids, Vocabulary
from partial_embedding.schedule import Position, RateScale, Schedule, StageState
from partial_embedding.schedule.messages import (
    StageReport,
    audit_line,
    place_text,
    resumed_lines,
    stage_line,
    table_line,
)

Say = Callable[[str], Any]
Table = TypeVar("Table")


class _Audit(Protocol):
    @property
    def frozen(self) -> Sized: ...

    def check(self, step: int | None = None) -> None: ...


class BaseScheduledTables(ABC, Generic[Table]):
    """Tables that follow schedules, for a framework's `ScheduledTables` to read and to change.

    Args:
        tables: All tables of the model by name.
        schedules: A schedule for each table's name; the key None is for all other tables.
        vocabulary: What rows mean, for schedules that ask for it.
        audit: Whether to compare the bits of frozen rows whenever others begin to train.
        say: What takes the lines that tell of stages.
        watch: Keeps what the frozen rows of a table hold now, given the table and its name.

    Raises:
        InputError: A schedule is for no table, or a stage does not fit its table.
    """

    def __init__(
        self,
        tables: Mapping[str, Table],
        schedules: Mapping[str | None, Schedule],
        vocabulary: Vocabulary | None,
        audit: bool | int,
        say: Say,
        watch: Callable[[Table, str], _Audit],
    ) -> None:
        if unknown := [name for name in schedules if name not in (None, *tables)]:
            raise InputError(
                f"schedules are named after the model's tables, {sorted(tables)}. "
                f"Received: {unknown[0]!r}."
            )
        named = tables if None in schedules else tables.keys() & schedules.keys()
        self.tables = {name: table for name, table in tables.items() if name in named}
        self.schedules = schedules
        self.vocabulary = vocabulary
        self.audit = audit
        self.say = say
        self._watch = watch
        self.reports: list[StageReport] = []
        self._followed = [self.schedule_of(name) for name in self.tables]
        self.metrics = tuple(dict.fromkeys(m for one in self._followed for m in one.metrics))
        self._stage_states: dict[str, StageState] = {}
        self._audits: dict[str, _Audit] = {}
        # How many rows were frozen when the stage began.
        self._frozen: dict[str, int] = {}
        for name in self.tables:
            self._check_stages(name)

    def schedule_of(self, name: str) -> Schedule:
        """The schedule of a table.

        Args:
            name: The table's name.
        """
        return self.schedules[name if name in self.schedules else None]

    def _check_stages(self, name: str) -> None:
        for i, stage in enumerate(self.schedule_of(name).stages):
            stage_states = [StageState(i)]
            if stage.growth is not None:
                stage_states.append(StageState(i - 1, increment=1, increments=2))
            for stage_state in stage_states:
                try:
                    self._ids_at(name, stage_state)
                except InputError as error:
                    raise InputError(f"{name}: stages[{i}].rows: {error}") from None

    def _ids_at(self, name: str, stage_state: StageState) -> Ids:
        return self._resolve(name, self.schedule_of(name).rows_at(stage_state))

    def _resolve(self, name: str, rows: Rows) -> Ids:
        num_rows, _ = self._shape(self.tables[name])
        return rows.resolve(num_rows, self.vocabulary)

    def _states_at(self, position: Position) -> dict[str, StageState]:
        return {name: self.schedule_of(name).state_at(position) for name in self.tables}

    # Moving with the schedules

    def move_to(self, position: Position) -> bool:
        """Set the rows of a position; tell and audit where a stage or an increment begins.

        Args:
            position: Where training stands.

        Returns:
            Whether anything began.

        Raises:
            FrozenRowsMoved: A row that was frozen until now changed a bit.
        """
        stage_states = self._states_at(position)
        begun = [
            name
            for name, stage_state in stage_states.items()
            if stage_state != self._stage_states.get(name)
        ]
        for name in begun:
            self._begin(name, stage_states[name], position)
        return bool(begun)

    def _begin(self, name: str, stage_state: StageState, position: Position) -> None:
        table, schedule = self.tables[name], self.schedule_of(name)
        before = self._stage_states.get(name)
        goes_on = before is not None and before._replace(increment=0) == stage_state._replace(
            increment=0
        )
        if not goes_on:
            self._close(name, position.step)
        elif name in self._audits:
            self._audits[name].check(position.step)
        self._train(table, self._ids_at(name, stage_state), schedule.rate_scale_at(stage_state))
        self._stage_states[name] = stage_state
        if self.audit:
            self._audits[name] = self._watch(table, name)
            self._frozen.setdefault(name, len(self._audits[name].frozen))
        place, (num_rows, _) = place_text(schedule, position), self._shape(table)
        self.say(stage_line(name, place, self._trainable(table), num_rows, self.vocabulary))

    def go_on(
        self, saved: Mapping[str | None, Schedule], before: Position, total_steps: int | None
    ) -> None:
        """Tell how the schedules were changed since a run was saved.

        Args:
            saved: The schedules of then, by table.
            before: Where its rows were set last.
            total_steps: Optimizer steps of the run as it is now, where they are known.

        Raises:
            InputError: Other rows train there now.
        """
        now = replace(before, total_steps=total_steps)
        for name in self.tables:
            if (then := saved.get(name if name in saved else None)) is not None:
                schedule, resolve = self.schedule_of(name), partial(self._resolve, name)
                for line in resumed_lines(name, then, schedule, before, now, resolve):
                    self.say(line)

    def _tell_size(self, name: str) -> None:
        table = self.tables[name]
        trainable = len(self._trainable(table))
        self.say(table_line(name, trainable, *self._shape(table), self._parameters_elsewhere()))

    # Audit

    def audit_now(self, step: int) -> None:
        """Compare the bits of frozen rows.

        Args:
            step: Optimizer steps completed, for the message.

        Raises:
            FrozenRowsMoved: A frozen row changed a bit.
        """
        for audit in self._audits.values():
            audit.check(step)

    def finish(self, step: int) -> None:
        """Close the last stage, and tell what the audit found.

        Args:
            step: Optimizer steps completed.

        Raises:
            FrozenRowsMoved: A frozen row changed a bit.
        """
        for name in self.tables:
            self._close(name, step)
        if self.reports:
            self.say(audit_line(self.reports))

    def _close(self, name: str, step: int) -> None:
        if (audit := self._audits.pop(name, None)) is not None:
            audit.check(step)
            stage, frozen = self._stage_states[name].stage, self._frozen.pop(name)
            self.reports.append(StageReport(name, stage, frozen, changed=0))

    # What a framework does in its own way

    @abstractmethod
    def _shape(self, table: Table) -> tuple[int, int]:
        """The rows V and the columns D of a table."""

    @abstractmethod
    def _trainable(self, table: Table) -> Ids:
        """The rows of a table that train now, rising."""

    @abstractmethod
    def _train(self, table: Table, ids: Ids, rate_scale: RateScale) -> None:
        """Train these rows of a table and no others; those that join learn at this rate_scale."""

    @abstractmethod
    def _parameters_elsewhere(self) -> int:
        """How many parameters train outside of the tables."""
