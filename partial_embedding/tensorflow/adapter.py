"""The tables of a Keras model, as the runner of schedules moves them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from partial_embedding.errors import InputError
from partial_embedding.rows.vocabulary import Ids
from partial_embedding.schedule import RateScale
from partial_embedding.schedule.rank_consistency import RankView
from partial_embedding.tensorflow.audit import FrozenRowAudit
from partial_embedding.tensorflow.models import forget_traced, tables_for
from partial_embedding.tensorflow.optimizer import optimizer_of
from partial_embedding.tensorflow.row_optimizer import Rowwise


class KerasTables:
    """The tables of a `keras.Model`; an `Adapter` of the runner."""

    # Replicas of a strategy are in one process.
    processes = 1

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tables = tables_for("unfreezing rows", model)
        # What stages train of tables that can still be told which rows to reserve.
        self._stages: dict[str, list[Ids]] = {}

    @property
    def optimizer(self) -> Any:
        """What steps the tables, or will; None where the model knows of no optimizer."""
        known = (optimizer_of(self.model, table.rows_variable) for table in self.tables.values())
        default = innermost(getattr(self.model, "optimizer", None))
        return next((optimizer for optimizer in known if optimizer is not None), default)

    @property
    def steps(self) -> int:
        """The steps that the optimizer completed, those of earlier runs too; waits for them."""
        return 0 if self.optimizer is None else int(self.optimizer.iterations.numpy())

    @property
    def batches_of_a_step(self) -> int:
        """The batches whose gradients are accumulated for one step."""
        return getattr(self.optimizer, "gradient_accumulation_steps", None) or 1

    def reserve(self) -> None:
        """Reserve what the stages that were checked will ever train, where a layer was not told.

        It comes before the first step is traced: the variables that train are others afterwards.
        """
        for name, stages in self._stages.items():
            table = self.tables[name]
            # A table whose rows all train throughout stays a plain one.
            if any(ids.size < table.input_dim for ids in stages):
                ever = np.unique(np.concatenate(stages))
                table.reserve_rows(ever if ever.size else "none")
                forget_traced(self.model)
        self._stages = {}

    # What the runner asks for

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """The rows V and the columns D of each table."""
        return {name: (table.input_dim, table.output_dim) for name, table in self.tables.items()}

    def gather(self, view: RankView) -> Sequence[RankView]:
        """What all processes hand in: there is this one."""
        return [view]

    def check_rows(self, name: str, ids: Ids) -> None:
        """Refuse rows that the layer cannot train, and keep them for `reserve` where it will."""
        table = self.tables[name]
        optimizer = innermost(getattr(self.model, "optimizer", None))
        is_known = optimizer_of(self.model, table.rows_variable) is not None
        if ids.size and not table.trainable:
            raise InputError(
                f"rows train in a layer that does. Received {name!r} with trainable=False. Set "
                "layer.trainable = True before the model is compiled, or leave the layer out of "
                "the schedule."
            )
        table.check_kind(ids)
        if ids.size and optimizer is not None and optimizer.built and not is_known:
            raise InputError(
                f"rows train under an optimizer that was built for them. Received {name!r}, and a "
                f"{type(optimizer).__name__} that was built without it. Compile the model again."
            )
        if table.reserves_rows or is_known:
            table.check_trainable_rows(ids)
        else:
            self._stages.setdefault(name, []).append(ids)

    def check_rate_scale(self, name: str, rate_scale: RateScale) -> None:
        """Refuse a rate that the optimizer cannot keep, and build the one that can."""
        if rate_scale.is_plain:
            return
        if not self.model.built:
            raise InputError(
                "rows have a learning rate of their own in a built model. Received one that is "
                "not. Give it a keras.Input, or call it on a batch."
            )
        rows, whole = self.tables[name].rows_variable, getattr(self.model, "optimizer", None)
        if optimizer_of(self.model, rows) is None and whole is not None:
            # Keras builds an optimizer only while it traces the first step.
            whole.build(self.model.trainable_variables)
        optimizer = optimizer_of(self.model, rows)
        if not isinstance(optimizer, Rowwise):
            raise InputError(
                "lr_scale and warmup_steps are what rowwise(optimizer) keeps. Received the "
                f"optimizer {type(optimizer).__name__}. Compile the model with one."
            )

    def trainable_rows(self, name: str) -> Ids:
        """The rows that train now, rising, int64, shape (K,)."""
        return self.tables[name].trainable_rows

    def new_rows(self, name: str) -> Ids | None:
        """The rows by which the table grew last, rising, int64, or None."""
        return self.tables[name].new_rows

    def set_rows(
        self, name: str, ids: Ids, rate_scale: RateScale, *, all_join: bool = False
    ) -> None:
        """Train these rows and no others; until they make a step, all of them join."""
        self.tables[name].set_trainable_rows(
            ids, lr_scale=rate_scale.lr_scale, warmup_steps=rate_scale.warmup_steps
        )

    def watch(self, name: str) -> FrozenRowAudit:
        """Keep what the frozen rows hold now."""
        return FrozenRowAudit(self.tables[name], name)

    def parameters_elsewhere(self, names: Iterable[str]) -> int | None:
        """How many parameters train outside of these tables, in a model that has them all."""
        if not self.model.built:
            return None
        own = {id(v) for name in names for v in self.tables[name].trainable_variables}
        others = (v for v in self.model.trainable_variables if id(v) not in own)
        return sum(int(np.prod(v.shape)) for v in others)


def innermost(optimizer: Any) -> Any:
    """The optimizer that steps, inside of those that scale the loss."""
    while (inner := getattr(optimizer, "inner_optimizer", None)) is not None:
        optimizer = inner
    return optimizer
