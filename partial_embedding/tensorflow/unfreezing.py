"""The tables of one Keras model, moved along their schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from partial_embedding.errors import InputError
from partial_embedding.report import (
    StageReport,
    audit_line,
    place_text,
    resumed_lines,
    stage_line,
    table_line,
)
from partial_embedding.rows import Rows
from partial_embedding.schedule import Moment, Position, Schedule
from partial_embedding.tensorflow.audit import FrozenRowAudit
from partial_embedding.tensorflow.embedding import PartialEmbedding
from partial_embedding.tensorflow.rowwise import Rowwise
from partial_embedding.tensorflow.tables import tables_in
from partial_embedding.vocabulary import Ids, Vocabulary

Say = Callable[[str], Any]

# More steps than a run has, where the length of an epoch is not known.
_NEVER = 1 << 40


class ScheduledTables:
    """The tables of a model that follow schedules.

    Every stage is resolved when this is made, so that a schedule that does not fit is refused
    before the first step.

    Args:
        model: The `keras.Model` that holds the tables.
        schedules: A schedule for each layer's name; the key None is for all other tables.
        vocabulary: What rows mean, for schedules that ask for it.
        audit: Compare the bits of frozen rows whenever others begin to train.
        say: What takes the lines that tell of stages.

    Raises:
        InputError: The model has no such table, or a stage does not fit its table or the optimizer.

    Example:
        >>> import keras
        >>> model = keras.Sequential([PartialEmbedding(10, 4, reserve_rows="all", name="words")])
        >>> schedule = Schedule([{"epoch": 0, "rows": [2]}, {"epoch": 3, "rows": "all"}])
        >>> tables = ScheduledTables(model, {None: schedule}, say=print)
        >>> tables.move_to(Position(epoch=0))
        words: 1 of 10 rows train (4 of 40 parameters), 0 parameters elsewhere
        words: stage 0 from epoch 0: 1 rows train, 10.0 % of the table
        >>> tables.move_to(Position(epoch=1))
        >>> model.layers[0].trainable_rows
        array([2])
    """

    def __init__(
        self,
        model: Any,
        schedules: Mapping[str | None, Schedule],
        vocabulary: Vocabulary | None = None,
        audit: bool = False,
        say: Say = lambda line: None,
    ) -> None:
        self.model = model
        self.schedules = schedules
        self.vocabulary = vocabulary
        self.audit = audit
        self.say = say
        self.reports: list[StageReport] = []
        self.tables = self._find()
        self._moments: dict[str, Moment] = {}
        self._audits: dict[str, FrozenRowAudit] = {}
        # How many rows were frozen when the stage began.
        self._frozen: dict[str, int] = {}
        for name in self.tables:
            self._check(name)
        self._check_paces()

    def _find(self) -> dict[str, PartialEmbedding]:
        tables = tables_in(self.model)
        if not tables:
            raise InputError(
                "RowUnfreezing needs a PartialEmbedding in the model. Received a "
                f"{type(self.model).__name__} without one. Replace its Embedding, for example by "
                "PartialEmbedding.from_layer."
            )
        if unknown := [name for name in self.schedules if name not in (None, *tables)]:
            raise InputError(
                f"schedules are named after the model's tables, {sorted(tables)}. "
                f"Received: {unknown[0]!r}."
            )
        if None in self.schedules:
            return tables
        return {name: table for name, table in tables.items() if name in self.schedules}

    def schedule_of(self, name: str) -> Schedule:
        """The schedule of a table.

        Args:
            name: The name of its layer.
        """
        return self.schedules[name if name in self.schedules else None]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that stages of these tables wait for, each once."""
        schedules = [self.schedule_of(name) for name in self.tables]
        return tuple(dict.fromkeys(metric for one in schedules for metric in one.metrics))

    # Before the first step

    def _check(self, name: str) -> None:
        """Refuse rows that the table does not have or did not reserve."""
        schedule, layer = self.schedule_of(name), self.tables[name]
        for i, stage in enumerate(schedule.stages):
            moments = [Moment(i)]
            if stage.growth is not None:
                moments.append(Moment(i - 1, part=1, parts=2))
            for moment in moments:
                try:
                    layer.check_trainable_rows(self._resolve(name, schedule.rows_at(moment)))
                except InputError as error:
                    raise InputError(f"{name}: stages[{i}].rows: {error}") from None

    def _check_paces(self) -> None:
        paced = [
            f"{name}: stages[{index}]"
            for name in self.tables
            for index, stage in enumerate(self.schedule_of(name).stages)
            if not stage.pace.is_plain
        ]
        if not paced:
            return
        optimizer = innermost(self.model.optimizer)
        if not isinstance(optimizer, Rowwise) or not optimizer.paces:
            raise InputError(
                f"{paced[0]}: lr and warmup are what rowwise(optimizer, paces=True) keeps. Received"
                f" the optimizer {type(optimizer).__name__}"
                f"{' with paces=False' if isinstance(optimizer, Rowwise) else ''}. Compile the "
                "model with one."
            )
        if not optimizer.built:
            if not self.model.built:
                raise InputError(
                    f"{paced[0]}: rows have a pace of their own in a model that is built. Received "
                    "one that is not. Give it a keras.Input, or call it on a batch."
                )
            # Keras builds an optimizer only while it traces the first step.
            self.model.optimizer.build(self.model.trainable_variables)

    # Moving with the schedule

    def go_on(
        self, saved: Mapping[str | None, Schedule], before: Position, total_steps: int | None
    ) -> None:
        """Tell how the schedules were changed since a backup.

        Args:
            saved: The schedules of the backup, by table.
            before: Where its rows were set last.
            total_steps: Optimizer steps of the run as it is now, where they are known.

        Raises:
            InputError: Other rows train there now.
        """
        now = replace(before, total_steps=total_steps)
        for name in self.tables:
            then = saved.get(name if name in saved else None)
            if then is not None:
                resolve = partial(self._resolve, name)
                schedule = self.schedule_of(name)
                for line in resumed_lines(name, then, schedule, before, now, resolve):
                    self.say(line)

    def _resolve(self, name: str, rows: Rows) -> Ids:
        return rows.resolve(self.tables[name].input_dim, self.vocabulary)

    def move_to(self, position: Position) -> None:
        """Set the rows of a position, and tell and audit where others than before train.

        Args:
            position: Where training stands.

        Raises:
            FrozenRowsMoved: A row that was frozen changed a bit.
        """
        is_first = not self._moments
        for name in self.tables:
            moment = self.schedule_of(name).moment(position)
            if self._moments.get(name) != moment:
                self._begin(name, moment, position, is_first)

    def _begin(self, name: str, moment: Moment, position: Position, is_first: bool) -> None:
        layer, schedule = self.tables[name], self.schedule_of(name)
        before = self._moments.get(name)
        goes_on = before is not None and before._replace(part=0) == moment._replace(part=0)
        if goes_on and (audit := self._audits.get(name)) is not None:
            audit.check(position.step)
        elif not goes_on:
            self._close(name, position.step)
        ids = self._resolve(name, schedule.rows_at(moment))
        layer.set_trainable_rows(ids, pace=schedule.pace_at(moment))
        self._moments[name] = moment
        if self.audit:
            self._audits[name] = FrozenRowAudit(layer, name)
            frozen = int(self._audits[name].frozen.size)
            self._frozen[name] = self._frozen.get(name, frozen) if goes_on else frozen
        if is_first:
            self._tell_size(name, layer)
        place, live = place_text(schedule, position), layer.trainable_rows
        self.say(stage_line(name, place, live, layer.input_dim, self.vocabulary))

    def next_change(self, position: Position, steps: int | None) -> int:
        """The step at which rows may change next, while neither the epoch nor what was seen does.

        Args:
            position: Where training stands.
            steps: Optimizer steps until then at most, or None where that is not known.

        Returns:
            A step beyond the position's; one that is out of reach if no rows change.
        """
        schedules = [self.schedule_of(name) for name in self.tables]
        end = position.step + steps if steps is not None else _NEVER
        changes = [
            _next_change(schedule, position, end)
            for schedule in schedules
            if schedule.moves_within_epochs
        ]
        return min(changes, default=_NEVER)

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
            self.reports.append(StageReport(name, self._moments[name].stage, self._frozen[name], 0))

    def _tell_size(self, name: str, layer: PartialEmbedding) -> None:
        own = {id(v) for table in self.tables.values() for v in table.trainable_variables}
        elsewhere = sum(
            int(np.prod(v.shape)) for v in self.model.trainable_variables if id(v) not in own
        )
        trainable = layer.trainable_rows.size
        self.say(table_line(name, trainable, layer.input_dim, layer.output_dim, elsewhere))


def _next_change(schedule: Schedule, position: Position, end: int) -> int:
    """The first step up to `end` at which another moment has begun; without one, out of reach."""
    now = schedule.moment(position)

    def is_over(step: int) -> bool:
        return schedule.moment(replace(position, step=step)) != now

    # A moment that is over does not come back, so the step is found by halving.
    before, after = position.step, end
    if not is_over(after):
        return _NEVER
    while after - before > 1:
        middle = (before + after) // 2
        before, after = (before, middle) if is_over(middle) else (middle, after)
    return after


def innermost(optimizer: Any) -> Any:
    """The optimizer that steps, inside of those that scale the loss.

    Args:
        optimizer: A Keras optimizer.
    """
    while (inner := getattr(optimizer, "inner_optimizer", None)) is not None:
        optimizer = inner
    return optimizer
