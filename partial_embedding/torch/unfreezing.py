"""The tables of one model, moved along their schedules: what every callback and loop needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

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
from partial_embedding.schedule import Moment, Position, Schedule, Seen
from partial_embedding.torch.agreement import check_agreement
from partial_embedding.torch.audit import FrozenRowAudit
from partial_embedding.torch.ddp import check_backend
from partial_embedding.torch.rowwise import prepared, rowwise
from partial_embedding.torch.table import PartialTable, tables_in
from partial_embedding.vocabulary import Ids, Vocabulary

Say = Callable[[str], Any]


class ScheduledTables:
    """The tables of a model that follow schedules.

    Every stage is resolved when this is made, so that a schedule that does not fit is refused
    before the first step. Where several processes train the model, they compare their rows whenever
    rows change, and their metrics whenever one is observed; all of them stop where these differ.

    Args:
        model: The module that holds the tables.
        schedules: A schedule for each table's name; the key None is for all other tables.
        vocabulary: What rows mean, for schedules that ask for it.
        audit: Compare the bits of frozen rows at the end of each stage; a number n compares them
            every n optimizer steps too.
        say: What takes the lines that tell of stages.
        total_steps: Finds out the optimizer steps of the whole run; called if a schedule asks.

    Raises:
        InputError: The model has no such table, a stage does not fit its table, or the length of
            the run is asked for and not known.

    Example:
        >>> from partial_embedding.torch import PartialEmbedding
        >>> model = nn.Sequential(PartialEmbedding(10, 4))
        >>> schedule = Schedule([{"epoch": 0, "rows": [2]}, {"epoch": 3, "rows": "all"}])
        >>> tables = ScheduledTables(model, {None: schedule}, say=print)
        >>> begun = tables.move_to(Position(epoch=0))
        0: stage 0 from epoch 0: 1 rows train, 10.0 % of the table
        >>> tables.move_to(Position(epoch=1))
        False
        >>> model[0].trainable_rows
        tensor([2])
    """

    def __init__(
        self,
        model: nn.Module,
        schedules: Mapping[str | None, Schedule],
        vocabulary: Vocabulary | None = None,
        audit: bool | int = False,
        say: Say = lambda line: None,
        total_steps: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self.model = model
        self.schedules = schedules
        self.vocabulary = vocabulary
        self.audit = audit
        self.say = say
        self.reports: list[StageReport] = []
        self.tables = self._find()
        followed = [self.schedule_of(name) for name in self.tables]
        self.metrics = tuple(dict.fromkeys(metric for one in followed for metric in one.metrics))
        asks = any("share" in schedule.units for schedule in followed)
        self.total_steps = _length(total_steps) if asks else None
        self._within_epochs = any(schedule.moves_within_epochs for schedule in followed)
        self.position = Position()
        self.seen: tuple[Seen, ...] = ()
        self._advanced: tuple[int, ...] | None = None
        self._moments: dict[str, Moment] = {}
        self._audits: dict[str, FrozenRowAudit] = {}
        self._frozen: dict[str, int] = {}
        self._audited_step = 0
        for name in self.tables:
            self._check_stages(name)

    def _find(self) -> dict[str, PartialTable]:
        tables = dict(tables_in(self.model))
        if not tables:
            raise InputError(
                "unfreezing rows needs a PartialEmbedding in the model. Received a "
                f"{type(self.model).__name__} without one. Replace its nn.Embedding."
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
            name: The table's name.
        """
        return self.schedules[name if name in self.schedules else None]

    def _check_stages(self, name: str) -> None:
        schedule = self.schedule_of(name)
        for i, stage in enumerate(schedule.stages):
            moments = [Moment(i)]
            if stage.growth is not None:
                moments.append(Moment(i - 1, part=1, parts=2))
            for moment in moments:
                try:
                    self._ids_at(name, moment)
                except InputError as error:
                    raise InputError(f"{name}: stages[{i}].rows: {error}") from None

    def _ids_at(self, name: str, moment: Moment) -> Ids:
        return self._resolve(name, self.schedule_of(name).rows_at(moment))

    def _resolve(self, name: str, rows: Rows) -> Ids:
        return rows.resolve(self.tables[name].weight.shape[0], self.vocabulary)

    # Optimizers

    def prepare(self, optimizers: Iterable[Optimizer], lazy: bool = False) -> None:
        """Make optimizers step the trainable rows alone; those that `rowwise` prepared stay so.

        Args:
            optimizers: All optimizers of the model.
            lazy: Step only rows that a batch touched.

        Raises:
            InputError: A table belongs to none of them, or one cannot keep frozen rows exact or a
                stage's learning rate.
        """
        left = {id(table.weight): name for name, table in self.tables.items()}
        for optimizer in optimizers:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if held & left.keys() and prepared(optimizer) is None:
                rowwise(optimizer, self.model, lazy=lazy)
            left = {weight: name for weight, name in left.items() if weight not in held}
        for name in left.values():
            raise InputError(
                f"each scheduled table belongs to an optimizer. Received none with {name!r}. "
                "Build the optimizer from the model's parameters()."
            )
        for name, table in self.tables.items():
            for i, stage in enumerate(self.schedule_of(name).stages):
                try:
                    table.check_pace(stage.pace)
                except InputError as error:
                    raise InputError(f"{name}: stages[{i}]: {error}") from None

    def check_backend(self) -> None:
        """Refuse a process group that cannot reduce the tables' gradients.

        Raises:
            InputError: As for `ddp.check_backend`.
        """
        check_backend(self.tables)

    # Moving with the schedules

    def place(self, position: Position | None = None) -> None:
        """Set the rows of a position without beginning a stage there; all of them join there.

        Args:
            position: Where training stands, or stood when a checkpoint was made; by default, where
                it begins.

        Raises:
            InputError: Processes disagree about the rows.
        """
        position = position or Position(total_steps=self.total_steps)
        self.position, self.seen = position, position.seen
        self._advanced, self._moments = None, {}
        moments = self._moments_at(position)
        for name, table in self.tables.items():
            moment = moments[name]
            pace, ids = self.schedule_of(name).pace_at(moment), self._ids_at(name, moment)
            if table.paces or not pace.is_plain:
                table.set_trainable_ids(ids[:0])  # rows that train already would keep their pace
            table.set_trainable_ids(ids, pace)
        check_agreement(self.tables, moments)

    @property
    def has_begun(self) -> bool:
        """Whether rows have moved to where training stands."""
        return bool(self._moments)

    def advance(self, epoch: int, step: int) -> bool:
        """Move to where training stands; costs next to nothing where rows cannot have changed.

        Args:
            epoch: Epochs completed before the current one.
            step: Optimizer steps completed.

        Returns:
            Whether anything began.

        Raises:
            FrozenRowsMoved: As for `move_to`.
            InputError: Likewise.
        """
        place = (epoch, step if self._within_epochs else 0, len(self.seen))
        if place == self._advanced:
            return False
        self._advanced = place
        return self.move_to(Position(epoch, step, self.total_steps, self.seen))

    def move_to(self, position: Position) -> bool:
        """Set the rows of a position, and tell and audit where a stage or a part of one begins.

        Args:
            position: Where training stands.

        Returns:
            Whether anything began.

        Raises:
            FrozenRowsMoved: A row that was frozen until now changed a bit.
            InputError: Processes disagree about the rows.
        """
        self.position = position
        moments = self._moments_at(position)
        begun = [name for name, moment in moments.items() if moment != self._moments.get(name)]
        for name in begun:
            self._begin(name, moments[name], position)
        if begun:
            check_agreement(self.tables, moments)
        return bool(begun)

    def _begin(self, name: str, moment: Moment, position: Position) -> None:
        table, schedule = self.tables[name], self.schedule_of(name)
        before = self._moments.get(name)
        goes_on = before is not None and before._replace(part=0) == moment._replace(part=0)
        if goes_on and (audit := self._audits.get(name)) is not None:
            audit.check(position.step)
        elif not goes_on:
            self._close(name, position.step)
        table.set_trainable_ids(self._ids_at(name, moment), schedule.pace_at(moment))
        self._moments[name] = moment
        if self.audit:
            self._audits[name] = FrozenRowAudit(table, name)
            frozen = len(self._audits[name].frozen)
            self._frozen[name] = self._frozen.get(name, frozen) if goes_on else frozen
        ids, num_rows = table.row_set.ids.cpu().numpy(), table.weight.shape[0]
        place = place_text(schedule, position)
        self.say(stage_line(name, place, ids, num_rows, self.vocabulary))

    def observe(self, epoch: int, step: int, logged: Mapping[str, Any]) -> None:
        """Take what a validation measured, for stages that wait for a metric.

        What is measured again after the same step takes the place of what was measured first.

        Args:
            epoch: The epoch that the validation belongs to.
            step: Optimizer steps completed.
            logged: All numbers that are known, by name.

        Raises:
            InputError: A metric is lacking, or processes saw different values of it.
        """
        if not self.metrics:
            return
        metrics = {name: float(logged[name]) for name in self.metrics if name in logged}
        earlier = tuple(one for one in self.seen if one.step != step)
        seen = (*earlier, Seen(epoch, step, metrics))
        there = Position(epoch, step, self.total_steps, seen)
        check_agreement(self.tables, self._moments_at(there), metrics)
        for name in self.metrics:
            if name not in metrics:
                raise InputError(
                    f"a stage waits for a metric that validation logs, {name!r}. Received: "
                    f"{sorted(logged)}. Log it in validation, or name another one."
                )
        self.seen = seen

    def _moments_at(self, position: Position) -> dict[str, Moment]:
        return {name: self.schedule_of(name).moment(position) for name in self.tables}

    @property
    def bar(self) -> dict[str, str]:
        """What a progress bar shows of each table: the stage, and the rows awake."""
        rows = {name: len(self.tables[name].row_set) for name in self._moments}
        return {n: f"stage {m.stage}: {rows[n]:,} rows" for n, m in self._moments.items()}

    # Checkpoints

    def to_state(self) -> dict[str, Any]:
        """Where the schedules stand and what they are, as plain values."""
        return {
            "position": replace(self.position, seen=self.seen).to_state(),
            # What was measured since then has not moved any row yet.
            "acted_on": len(self.position.seen),
            "schedules": [
                {"table": name, "schedule": schedule.to_config()}
                for name, schedule in self.schedules.items()
            ],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Place the rows of a checkpoint, and tell how the schedules were changed since.

        Args:
            state: What `to_state` gave.

        Raises:
            InputError: Other rows train there now.
        """
        position = Position.from_state(state["position"])
        acted_on = position.seen[: state.get("acted_on")]
        before = replace(position, seen=acted_on)
        now = replace(before, total_steps=self.total_steps)
        saved = {one["table"]: Schedule.parse(one["schedule"]) for one in state["schedules"]}
        for name in self.tables:
            then = saved.get(name if name in saved else None)
            if then is not None:
                resolve = partial(self._resolve, name)
                schedule = self.schedule_of(name)
                for line in resumed_lines(name, then, schedule, before, now, resolve):
                    self.say(line)
        self.place(now)
        self.seen = position.seen

    # Audit

    def after_step(self, step: int) -> None:
        """Audit, if one is due.

        Args:
            step: Optimizer steps completed.

        Raises:
            FrozenRowsMoved: A frozen row changed a bit.
        """
        # True equals 1, but asks for no audit between the ends of stages.
        if self.audit is True or not self.audit or step - self._audited_step < self.audit:
            return
        self._audited_step = step
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
        audit = self._audits.pop(name, None)
        if audit is not None:
            audit.check(step)
            self.reports.append(StageReport(name, self._moments[name].stage, self._frozen[name], 0))

    def tell_sizes(self) -> None:
        """Tell how many parameters really train, which a model summary cannot know."""
        own = {id(table.weight) for table in self.tables.values()}
        elsewhere = sum(
            p.numel() for p in self.model.parameters() if p.requires_grad and id(p) not in own
        )
        for name, table in self.tables.items():
            rows, width = table.weight.shape
            self.say(table_line(name, len(table.row_set), rows, width, elsewhere))


def _length(total_steps: Callable[[], float]) -> int:
    length = total_steps()
    if not 0 < length < math.inf:
        raise InputError(
            "a stage that starts at a share of the run needs its length. Received a run without "
            "end. Set the trainer's max_epochs or max_steps, or use epoch or step."
        )
    return int(length)
