"""A run along its schedules: where it stands, what begins, what is said, audited and kept.

This is the only place that knows. A framework hands in its tables as an `Adapter`, and its callback
tells the runner where training stands and what was measured; neither asks the other anything.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from partial_embedding.errors import FrozenRowsMoved, InputError, did_you_mean, refused_at
from partial_embedding.rows.rows import Rows
from partial_embedding.rows.vocabulary import Ids, Vocabulary
from partial_embedding.schedule.adapter import Adapter, Audit
from partial_embedding.schedule.messages import (
    AuditResult,
    audit_line,
    not_reached_line,
    place_text,
    resumed_lines,
    stage_line,
    stopper_text,
    table_line,
)
from partial_embedding.schedule.position import Evaluation, Position
from partial_embedding.schedule.rank_consistency import RankView, check_ranks, digest
from partial_embedding.schedule.schedule import NEVER, Schedule, StageState

Say = Callable[[str], Any]


class Runner:
    """Moves the tables of one model along their schedules.

    Every stage is resolved when this is made, so that a schedule that does not fit is refused
    before the first step. Where several processes train the model, they compare their rows whenever
    rows change, and their metrics whenever one is observed; all of them stop where these differ.
    There is a schedule for each table's name, and that of None is for all others.

    Raises:
        InputError: A schedule is for no table, or a stage does not fit its table.
    """

    def __init__(
        self,
        adapter: Adapter,
        schedules: Mapping[str | None, Schedule],
        vocabulary: Vocabulary | None = None,
        audit: bool | int = False,
        say: Say = lambda line: None,
    ) -> None:
        if not isinstance(audit, int) or audit < 0:
            raise InputError(
                "audit is true, false, or the number of steps between two comparisons. Received: "
                f"{audit!r}. True compares at the end of each stage."
            )
        shapes = adapter.shapes
        if unknown := [name for name in schedules if name not in (None, *shapes)]:
            raise InputError(
                f"schedules are named after the model's tables, {sorted(shapes)}. "
                f"Received: {unknown[0]!r}."
                f"{did_you_mean(unknown[0], shapes, ' Take one of these.')}"
            )
        self.adapter = adapter
        self.schedules = {
            name: schedules[name if name in schedules else None]
            for name in shapes
            if name in schedules or None in schedules
        }
        self.vocabulary = vocabulary
        self.audit = audit
        self.say = say
        self.audit_results: list[AuditResult] = []
        followed = self.schedules.values()
        self.metrics = tuple(dict.fromkeys(m for one in followed for m in one.metrics))
        self.total_steps: int | None = None
        self.position = Position()
        # What was measured so far; the position has what rows were moved by.
        self.evaluations: tuple[Evaluation, ...] = ()
        self._within_epochs = any(one.moves_within_epochs for one in followed)
        self._saved: dict[str, Schedule] = {}
        self._advanced: tuple[int, ...] | None = None
        self._stage_states: dict[str, StageState] = {}
        self._audits: dict[str, Audit] = {}
        self._audited_step = 0
        # How many rows were frozen when the stage began.
        self._frozen: dict[str, int] = {}
        for name in self.schedules:
            self._check_stages(name)

    def _check_stages(self, name: str) -> None:
        for i, stage in enumerate(self.schedules[name].stages):
            stage_states = [StageState(i)]
            if stage.growth is not None:
                stage_states.append(StageState(i - 1, increment=1, increments=2))
            for stage_state in stage_states:
                with refused_at(f"{name}: stages[{i}].rows"):
                    self.adapter.check_rows(name, self._ids_at(name, stage_state))

    def _ids_at(self, name: str, stage_state: StageState) -> Ids:
        return self._resolve(name, self.schedules[name].rows_at(stage_state))

    def _resolve(self, name: str, rows: Rows) -> Ids:
        num_rows, _ = self.adapter.shapes[name]
        return rows.resolve(num_rows, self.vocabulary, new=self.adapter.new_rows(name))

    # Before the first step

    def check_rate_scales(self) -> None:
        """Refuse stages whose learning rate the optimizers cannot keep."""
        for name, schedule in self.schedules.items():
            for i, stage in enumerate(schedule.stages):
                with refused_at(f"{name}: stages[{i}]"):
                    self.adapter.check_rate_scale(name, stage.rate_scale)

    def refuse_to_wait(self, reason: str) -> None:
        """Refuse stages that wait for a metric, in a run that measures none."""
        if self.metrics:
            raise InputError(
                f"a stage waits for {self.metrics[0]!r}, which validation measures. Received a run "
                f"that never validates: {reason}"
            )

    def warn_of_stopper(self, stopper: str, monitor: str) -> None:
        """Warn of something that may end the run before stages that wait for the same metric."""
        if monitor in self.metrics:
            warnings.warn(stopper_text(stopper, monitor), stacklevel=2)

    def place(self, position: Position | None = None) -> None:
        """Set rows without beginning a stage, for an optimizer to load the state that is theirs.

        They are those of the position, by default of where a state was kept, or of the start. All
        of them join there.
        """
        if position is None and self._saved:
            position = self.position
        stage_states = {}
        for name, schedule in self.schedules.items():
            schedule = self._saved.get(name, schedule)
            # The start is known before the length of the run is.
            state = StageState(0) if position is None else schedule.state_at(position)
            ids = self._resolve(name, schedule.rows_at(state))
            self.adapter.set_rows(name, ids, schedule.rate_scale_at(state), all_join=True)
            stage_states[name] = state
        self._agree(stage_states)

    def start(self, total_steps: float = math.inf) -> None:
        """Know the length of the run, and tell how schedules were changed since a state was kept.

        Raises:
            InputError: A schedule asks for the length, and it is not known; or other rows train now
                than those that the state was kept with.
        """
        if any("share" in schedule.units for schedule in self.schedules.values()):
            if not 0 < total_steps < math.inf:
                raise InputError(
                    "a stage that starts at a share of the run needs its length. Received a run of "
                    "unknown length. Set the trainer's max_epochs or max_steps, or pass "
                    "steps_per_epoch= to Keras's fit; or use epoch or step."
                )
            self.total_steps = int(total_steps)
        now = replace(self.position, total_steps=self.total_steps)
        for name, then in self._saved.items():
            if (schedule := self.schedules.get(name)) is not None:
                resolve = partial(self._resolve, name)
                for line in resumed_lines(name, then, schedule, self.position, now, resolve):
                    self.say(line)

    # Moving

    @property
    def has_begun(self) -> bool:
        """Whether rows have moved to where training stands."""
        return bool(self._stage_states)

    def advance(self, epoch: int, step: int) -> bool:
        """Set the rows of where training stands; tell and audit where a stage or increment begins.

        It costs next to nothing where rows cannot have changed, and gives whether anything began.
        """
        place = (epoch, step if self._within_epochs else 0, len(self.evaluations))
        if place == self._advanced:
            return False
        if self._advanced is None:
            self._audited_step = step
        self._advanced = place
        self.position = Position(epoch, step, self.total_steps, self.evaluations)
        stage_states = self._states_at(self.position)
        before = self._stage_states
        begun = [name for name, state in stage_states.items() if state != before.get(name)]
        for name in begun:
            self._begin(name, stage_states[name])
        if begun:
            self._agree(self._stage_states)
        return bool(begun)

    def _states_at(self, position: Position) -> dict[str, StageState]:
        return {name: schedule.state_at(position) for name, schedule in self.schedules.items()}

    def _begin(self, name: str, stage_state: StageState) -> None:
        schedule, step = self.schedules[name], self.position.step
        before = self._stage_states.get(name)
        goes_on = before is not None and before._replace(increment=0) == stage_state._replace(
            increment=0
        )
        if not goes_on:
            self._close(name, step)
        elif name in self._audits:
            self._check(name, step)
        ids = self._ids_at(name, stage_state)
        self.adapter.set_rows(name, ids, schedule.rate_scale_at(stage_state))
        self._stage_states[name] = stage_state
        if self.audit:
            self._audits[name] = self.adapter.watch(name)
            if not goes_on:
                self._frozen[name] = self._audits[name].num_frozen
        trainable, (num_rows, width) = self.adapter.trainable_rows(name), self.adapter.shapes[name]
        if before is None:
            elsewhere = self.adapter.parameters_elsewhere(self.schedules)
            self.say(table_line(name, len(trainable), num_rows, width, elsewhere))
        place = place_text(schedule, self.position)
        self.say(stage_line(name, place, trainable, num_rows, self.vocabulary))

    def next_change(self, steps: int | None) -> int:
        """The step at which rows may change next, while neither the epoch nor what was seen does.

        One out of reach if none change in so many steps, or ever where their number is not known.
        """
        end = self.position.step + steps if steps is not None else NEVER
        return min(one.next_change(self.position, end) for one in self.schedules.values())

    @property
    def bar(self) -> dict[str, str]:
        """What a progress bar shows of each table: the stage, and the trainable rows."""
        rows = {name: len(self.adapter.trainable_rows(name)) for name in self._stage_states}
        return {n: f"stage {s.stage}: {rows[n]:,} rows" for n, s in self._stage_states.items()}

    # Measuring

    def observe(
        self,
        epoch: int,
        step: int,
        logged: Mapping[str, Any],
        expected: Iterable[str] | None = None,
    ) -> None:
        """Take what a validation measured, for stages that wait for a metric.

        What is measured again after the same step takes the place of what was measured first. The
        metrics that are expected, by default all that stages wait for, must be among those logged.

        Raises:
            InputError: A metric is lacking, or processes saw different values of it.
        """
        metrics = {name: float(logged[name]) for name in self.metrics if name in logged}
        earlier = tuple(one for one in self.evaluations if one.step != step)
        evaluations = (*earlier, Evaluation(epoch, step, metrics))
        self._agree(self._states_at(Position(epoch, step, self.total_steps, evaluations)), metrics)
        for name in self.metrics if expected is None else expected:
            if name not in metrics:
                self.refuse_unmeasured(name, logged)
        self.evaluations = evaluations

    def refuse_unmeasured(self, metric: str, logged: Iterable[str]) -> None:
        """Refuse to wait for a metric that a validation did not log."""
        raise InputError(
            f"a stage waits for a metric that validation logs, {metric!r}. Received: "
            f"{sorted(logged)}. Log it in validation (in Keras: validation_data= of fit, and "
            "metrics= of compile), or name another one."
        )

    def _agree(self, stage_states: Mapping[str, StageState], metrics: Any = None) -> None:
        if self.adapter.processes == 1:
            return
        rows = {name: digest(self.adapter.trainable_rows(name)) for name in self.schedules}
        check_ranks(self.adapter.gather(RankView(metrics, dict(stage_states), rows)))

    # Auditing

    def is_audit_due(self, step: int) -> bool:
        """Whether `after_step` compares bits: where a multiple of the audit's number was passed."""
        # True equals 1, but asks for no audit between the ends of stages.
        every = 0 if self.audit is True else int(self.audit)
        return every > 0 and step // every > self._audited_step // every

    def after_step(self, step: int) -> None:
        """Compare the bits of frozen rows, if that is due."""
        if self.is_audit_due(step):
            self._audited_step = step
            for name in self._audits:
                self._check(name, step)

    def finish(self, step: int) -> None:
        """Close the last stage; tell which stages were not reached, and what the audit found."""
        for name in self._stage_states:
            self._close(name, step)
            schedule = self.schedules[name]
            if stages := schedule.not_reached(self.position):
                self.say(not_reached_line(name, schedule, stages))
        if self.audit_results:
            self.say(audit_line(self.audit_results))

    def _close(self, name: str, step: int) -> None:
        if name in self._audits:
            self._check(name, step)
            del self._audits[name]
            self._note(name, changed=0)

    def _check(self, name: str, step: int) -> None:
        try:
            self._audits[name].check(step)
        except FrozenRowsMoved as moved:
            # For the record of the run, which is written also of one that this ends.
            self._note(name, len(moved.rows))
            raise

    def _note(self, name: str, changed: int) -> None:
        stage, frozen = self._stage_states[name].stage, self._frozen[name]
        self.audit_results.append(AuditResult(name, stage, frozen, changed))

    # Keeping

    def state(self) -> dict[str, Any]:
        """Where the schedules stand and what they are, as plain values for a checkpoint."""
        return {
            "position": replace(self.position, evaluations=self.evaluations).to_state(),
            # What was measured since then has not moved any row yet.
            "acted_on": len(self.position.evaluations),
            "schedules": {name: one.to_config() for name, one in self.schedules.items()},
        }

    def restore(self, state: Mapping[str, Any], before_epoch: int | None = None) -> None:
        """Go on where a state was kept, forgetting what it has of an epoch and later ones."""
        position = Position.from_state(state["position"])
        evaluations, acted_on = position.evaluations, position.evaluations[: state["acted_on"]]
        if before_epoch is not None and before_epoch <= position.epoch:
            evaluations = tuple(one for one in evaluations if one.epoch < before_epoch)
            if not evaluations:
                return
            # Rows as the last step of the epoch before had them.
            last, acted_on = evaluations[-1], evaluations[:-1]
            position = replace(position, epoch=last.epoch, step=max(0, last.step - 1))
        self.evaluations = evaluations
        self.position = replace(position, evaluations=acted_on)
        self._saved = {name: Schedule.parse(one) for name, one in state["schedules"].items()}
