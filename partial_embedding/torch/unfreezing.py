"""The tables of one model, moved along their schedules: what every callback and loop needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import distributed as dist
from torch import nn
from torch.optim import Optimizer

from partial_embedding.errors import InputError
from partial_embedding.report import StageReport, audit_line, place_text, stage_line, table_line
from partial_embedding.schedule import Position, Schedule
from partial_embedding.torch.audit import FrozenRowAudit
from partial_embedding.torch.head import PartialLinear
from partial_embedding.torch.rowwise import prepared, rowwise
from partial_embedding.torch.table import PartialTable, tables_in
from partial_embedding.vocabulary import Ids, Vocabulary

Say = Callable[[str], Any]


class ScheduledTables:
    """The tables of a model that follow schedules.

    Every stage is resolved when this is made, so that a schedule that does not fit is refused
    before the first step.

    Args:
        model: The module that holds the tables.
        schedules: A schedule for each table's name; the key None is for all other tables.
        vocabulary: What rows mean, for schedules that ask for it.
        audit: Compare the bits of frozen rows at the end of each stage; a number n compares them
            every n optimizer steps too.
        say: What takes the lines that tell of stages.

    Raises:
        InputError: The model has no such table, or a stage does not fit its table.

    Example:
        >>> from partial_embedding.torch import PartialEmbedding
        >>> model = nn.Sequential(PartialEmbedding(10, 4))
        >>> schedule = Schedule([{"epoch": 0, "rows": [2]}, {"epoch": 3, "rows": "all"}])
        >>> tables = ScheduledTables(model, {None: schedule}, say=print)
        >>> tables.move_to(Position(epoch=0))
        0: stage 0 from epoch 0: 1 rows train, 10.0 % of the table
        >>> tables.move_to(Position(epoch=1))
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
    ) -> None:
        self.model = model
        self.schedules = schedules
        self.vocabulary = vocabulary
        self.audit = audit
        self.say = say
        self.reports: list[StageReport] = []
        self.tables = self._find()
        self._stages: dict[str, int] = {}
        self._audits: dict[str, FrozenRowAudit] = {}
        self._audited_step = 0
        for name in self.tables:
            for stage in range(len(self._schedule(name).stages)):
                self._resolve(name, stage)

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

    def _schedule(self, name: str) -> Schedule:
        return self.schedules[name if name in self.schedules else None]

    def _resolve(self, name: str, stage: int) -> Ids:
        rows = self._schedule(name).stages[stage].rows
        try:
            return rows.resolve(self.tables[name].weight.shape[0], self.vocabulary)
        except InputError as error:
            raise InputError(f"{name}: stages[{stage}].rows: {error}") from None

    # Optimizers

    def prepare(self, optimizers: Iterable[Optimizer], lazy: bool = False) -> None:
        """Make optimizers step the trainable rows alone; those that `rowwise` prepared stay so.

        Args:
            optimizers: All optimizers of the model.
            lazy: Step only rows that a batch touched.

        Raises:
            InputError: A table belongs to none of them, or one cannot keep frozen rows exact.
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

    def check_backend(self) -> None:
        """Refuse a process group that cannot reduce the tables' gradients.

        Raises:
            InputError: A table is sparse and the group is NCCL's, or it is a head that is tied to
                no embedding.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        for name, table in self.tables.items():
            if not getattr(table, "sparse", False):
                continue
            if dist.get_backend() == "nccl":
                raise InputError(
                    "NCCL cannot reduce sparse gradients. Received the sparse table "
                    f"{name!r}. Make it with sparse=False."
                )
            if isinstance(table, PartialLinear):
                raise InputError(
                    "DistributedDataParallel takes sparse gradients of embeddings alone. Received "
                    f"the sparse head {name!r}, which is tied to none. Make it with sparse=False."
                )

    # Stages

    def place(self, position: Position) -> None:
        """Set the rows of a position without beginning a stage there.

        Args:
            position: Where training stands, or stood when a checkpoint was made.
        """
        for name, table in self.tables.items():
            stage = self._schedule(name).stage_at(position)
            table.set_trainable_ids(self._resolve(name, stage))

    def move_to(self, position: Position) -> None:
        """Set the rows of a position, and tell and audit where a stage begins.

        Args:
            position: Where training stands.

        Raises:
            FrozenRowsMoved: A row that was frozen in the stage that ends changed a bit.
        """
        for name, table in self.tables.items():
            stage = self._schedule(name).stage_at(position)
            if self._stages.get(name) == stage:
                continue
            self._close(name, position.step)
            table.set_trainable_ids(self._resolve(name, stage))
            self._stages[name] = stage
            if self.audit:
                self._audits[name] = FrozenRowAudit(table, name)
            ids, num_rows = table.row_set.ids.cpu().numpy(), table.weight.shape[0]
            place = place_text(self._schedule(name), position)
            self.say(stage_line(name, place, ids, num_rows, self.vocabulary))

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
            self.reports.append(StageReport(name, self._stages[name], len(audit.frozen), 0))

    def tell_sizes(self) -> None:
        """Tell how many parameters really train, which a model summary cannot know."""
        own = {id(table.weight) for table in self.tables.values()}
        elsewhere = sum(
            p.numel() for p in self.model.parameters() if p.requires_grad and id(p) not in own
        )
        for name, table in self.tables.items():
            rows, width = table.weight.shape
            self.say(table_line(name, len(table.row_set), rows, width, elsewhere))
