"""The tables of one Keras model, moved along their schedules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from partial_embedding.errors import InputError
from partial_embedding.rows.vocabulary import Ids, Vocabulary
from partial_embedding.schedule import Position, RateScale, Schedule, StageState
from partial_embedding.schedule.runner import BaseScheduledTables, Say
from partial_embedding.tensorflow.audit import FrozenRowAudit
from partial_embedding.tensorflow.embedding import PartialEmbedding
from partial_embedding.tensorflow.models import tables_in
from partial_embedding.tensorflow.row_optimizer import Rowwise

# More steps than a run has, where the length of an epoch is not known.
_NEVER = 1 << 40


class ScheduledTables(BaseScheduledTables[PartialEmbedding]):
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
        >>> begun = tables.move_to(Position(epoch=0))
        words: 1 of 10 rows train (4 of 40 parameters), 0 parameters elsewhere
        words: stage 0 from epoch 0: 1 rows train, 10.0 % of the table
        >>> tables.move_to(Position(epoch=1))
        False
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
        super().__init__(_all_tables(model), schedules, vocabulary, audit, say, FrozenRowAudit)
        self._check_rate_scales()

    def _check_rate_scales(self) -> None:
        scaled = [
            f"{name}: stages[{index}]"
            for name in self.tables
            for index, stage in enumerate(self.schedule_of(name).stages)
            if not stage.rate_scale.is_plain
        ]
        if not scaled:
            return
        optimizer = innermost(self.model.optimizer)
        if not isinstance(optimizer, Rowwise):
            raise InputError(
                f"{scaled[0]}: lr_scale and warmup_steps are what rowwise(optimizer) keeps. "
                f"Received the optimizer {type(optimizer).__name__}. Compile the model with one."
            )
        if not optimizer.built:
            if not self.model.built:
                raise InputError(
                    f"{scaled[0]}: rows have a learning rate of their own in a built model. "
                    "Received one that is not. Give it a keras.Input, or call it on a batch."
                )
            # Keras builds an optimizer only while it traces the first step.
            self.model.optimizer.build(self.model.trainable_variables)

    def next_change(self, position: Position, steps: int | None) -> int:
        """The step at which rows may change next, while neither the epoch nor what was seen does.

        Args:
            position: Where training stands.
            steps: Optimizer steps until then at most, or None where that is not known.

        Returns:
            A step beyond the position's; one that is out of reach if no rows change.
        """
        end = position.step + steps if steps is not None else _NEVER
        changes = [
            _next_change(schedule, position, end)
            for schedule in self._followed
            if schedule.moves_within_epochs
        ]
        return min(changes, default=_NEVER)

    # What Keras does in its own way

    def _shape(self, table: PartialEmbedding) -> tuple[int, int]:
        return table.input_dim, table.output_dim

    def _trainable(self, table: PartialEmbedding) -> Ids:
        return table.trainable_rows

    def _ids_at(self, name: str, stage_state: StageState) -> Ids:
        return self.tables[name].check_trainable_rows(super()._ids_at(name, stage_state))

    def _train(self, table: PartialEmbedding, ids: Ids, rate_scale: RateScale) -> None:
        table.set_trainable_rows(
            ids, lr_scale=rate_scale.lr_scale, warmup_steps=rate_scale.warmup_steps
        )
        if table.name not in self._stage_states:
            self._tell_size(table.name)

    def _parameters_elsewhere(self) -> int:
        own = {id(v) for table in self.tables.values() for v in table.trainable_variables}
        others = (v for v in self.model.trainable_variables if id(v) not in own)
        return sum(int(np.prod(v.shape)) for v in others)


def _all_tables(model: Any) -> dict[str, PartialEmbedding]:
    tables = tables_in(model)
    if not tables:
        raise InputError(
            "RowUnfreezing needs a PartialEmbedding in the model. Received a "
            f"{type(model).__name__} without one. Replace its Embedding, for example by "
            "PartialEmbedding.from_layer."
        )
    return tables


def _next_change(schedule: Schedule, position: Position, end: int) -> int:
    """The first step up to `end` at which the stage state differs; out of reach without one."""
    now = schedule.state_at(position)

    def is_over(step: int) -> bool:
        return schedule.state_at(replace(position, step=step)) != now

    # A stage_state that is over does not come back, so the step is found by halving.
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
