"""The tables of one model, moved along their schedules: what every callback and loop needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from partial_embedding.errors import InputError
from partial_embedding.rows.vocabulary import Ids, Vocabulary
from partial_embedding.schedule import Evaluation, Position, RateScale, Schedule
from partial_embedding.schedule.runner import BaseScheduledTables, Say
from partial_embedding.torch.agreement import check_agreement
from partial_embedding.torch.audit import FrozenRowAudit
from partial_embedding.torch.ddp import check_backend
from partial_embedding.torch.optimizer import prepared, rowwise
from partial_embedding.torch.table import PartialTable, tables_in


class ScheduledTables(BaseScheduledTables[PartialTable]):
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
        super().__init__(_all_tables(model), schedules, vocabulary, audit, say, FrozenRowAudit)
        asks = any("share" in schedule.units for schedule in self._followed)
        self.total_steps = _length(total_steps) if asks else None
        self._within_epochs = any(schedule.moves_within_epochs for schedule in self._followed)
        self.position = Position()
        self.evaluations: tuple[Evaluation, ...] = ()
        self._advanced: tuple[int, ...] | None = None
        self._audited_step = 0

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
                    table.check_rate_scale(stage.rate_scale)
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
        self.position, self.evaluations = position, position.evaluations
        self._advanced = None
        self._stage_states, self._audits, self._frozen = {}, {}, {}
        stage_states = self._states_at(position)
        for name, table in self.tables.items():
            stage_state = stage_states[name]
            rate_scale, ids = (
                self.schedule_of(name).rate_scale_at(stage_state),
                self._ids_at(name, stage_state),
            )
            if table.rate_scales or not rate_scale.is_plain:
                table.set_trainable_ids(
                    ids[:0]
                )  # rows that train already would keep their rate_scale
            table.set_trainable_ids(ids, rate_scale)
        check_agreement(self.tables, stage_states)

    @property
    def has_begun(self) -> bool:
        """Whether rows have moved to where training stands."""
        return bool(self._stage_states)

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
        place = (epoch, step if self._within_epochs else 0, len(self.evaluations))
        if place == self._advanced:
            return False
        self._advanced = place
        return self.move_to(Position(epoch, step, self.total_steps, self.evaluations))

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
        begun = super().move_to(position)
        if begun:
            check_agreement(self.tables, self._stage_states)
        return begun

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
        earlier = tuple(one for one in self.evaluations if one.step != step)
        seen = (*earlier, Evaluation(epoch, step, metrics))
        there = Position(epoch, step, self.total_steps, seen)
        check_agreement(self.tables, self._states_at(there), metrics)
        for name in self.metrics:
            if name not in metrics:
                raise InputError(
                    f"a stage waits for a metric that validation logs, {name!r}. Received: "
                    f"{sorted(logged)}. Log it in validation, or name another one."
                )
        self.evaluations = seen

    @property
    def bar(self) -> dict[str, str]:
        """What a progress bar shows of each table: the stage, and the trainable rows."""
        rows = {name: len(self.tables[name].row_set) for name in self._stage_states}
        return {n: f"stage {m.stage}: {rows[n]:,} rows" for n, m in self._stage_states.items()}

    # Checkpoints

    def to_state(self) -> dict[str, Any]:
        """Where the schedules stand and what they are, as plain values."""
        return {
            "position": replace(self.position, evaluations=self.evaluations).to_state(),
            # What was measured since then has not moved any row yet.
            "acted_on": len(self.position.evaluations),
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
        acted_on = position.evaluations[: state.get("acted_on")]
        before = replace(position, evaluations=acted_on)
        saved = {one["table"]: Schedule.parse(one["schedule"]) for one in state["schedules"]}
        self.go_on(saved, before, self.total_steps)
        self.place(replace(before, total_steps=self.total_steps))
        self.evaluations = position.evaluations

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
        self.audit_now(step)

    def tell_sizes(self) -> None:
        """Tell how many parameters really train, which a model summary cannot know."""
        for name in self.tables:
            self._tell_size(name)

    # What torch does in its own way

    def _shape(self, table: PartialTable) -> tuple[int, int]:
        num_rows, width = table.weight.shape
        return num_rows, width

    def _trainable(self, table: PartialTable) -> Ids:
        ids: Ids = table.row_set.ids.cpu().numpy()
        return ids

    def _train(self, table: PartialTable, ids: Ids, rate_scale: RateScale) -> None:
        table.set_trainable_ids(ids, rate_scale)

    def _parameters_elsewhere(self) -> int:
        own = {id(table.weight) for table in self.tables.values()}
        others = (p for p in self.model.parameters() if p.requires_grad and id(p) not in own)
        return sum(p.numel() for p in others)


def _all_tables(model: nn.Module) -> dict[str, PartialTable]:
    tables = dict(tables_in(model))
    if not tables:
        raise InputError(
            "unfreezing rows needs a PartialEmbedding in the model. Received a "
            f"{type(model).__name__} without one. Replace its nn.Embedding."
        )
    return tables


def _length(total_steps: Callable[[], float]) -> int:
    length = total_steps()
    if not 0 < length < math.inf:
        raise InputError(
            "a stage that starts at a share of the run needs its length. Received a run without "
            "end. Set the trainer's max_epochs or max_steps, or use epoch or step."
        )
    return int(length)
