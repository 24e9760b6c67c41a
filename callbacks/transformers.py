"""The callback for Hugging Face's Trainer: which rows train, epoch by epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from partial_embedding.errors import InputError
from partial_embedding.schedule import Position, Schedule, schedules_by_table
from partial_embedding.torch.unfreezing import ScheduledTables
from partial_embedding.vocabulary import Vocabulary

AnySchedule = Schedule | Mapping[str, Any] | str | PathLike[str]


class RowUnfreezing(TrainerCallback):
    """Trains the rows that a schedule names, and leaves all others as they are, bit for bit.

    The callback prepares the Trainer's optimizer with `rowwise`. A run that is resumed from a
    checkpoint goes on where the schedule stood.

    Args:
        schedule: As for `partial_embedding.callbacks.lightning.RowUnfreezing`.
        vocabulary: What rows mean, for schedules that ask for it.
        lazy: Step only the rows that a batch touched, as `rowwise` does.
        audit: Compare the bits of frozen rows at the end of each stage; a number n compares them
            every n optimizer steps too.

    Raises:
        InputError: The schedule is malformed. When training starts: it does not fit the model, a
            table is sparse, or the Trainer's arguments would shard it.

    Example:
        >>> RowUnfreezing({"stages": [{"epoch": 0, "rows": [1]}]}).schedules
        {None: Schedule([{'epoch': 0, 'rows': {'ids': [1]}}])}
    """

    def __init__(
        self,
        schedule: AnySchedule | Mapping[str, AnySchedule],
        vocabulary: Vocabulary | None = None,
        lazy: bool = False,
        audit: bool | int = False,
    ) -> None:
        self.schedules = schedules_by_table(schedule)
        self.vocabulary = vocabulary
        self.lazy = lazy
        self.audit = audit
        self._tables: ScheduledTables | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check every stage against the tables, set the first rows, and prepare the optimizer."""
        tables = ScheduledTables(
            kwargs["model"], self.schedules, self.vocabulary, self.audit, say=print
        )
        _check_arguments(args, tables)
        tables.check_backend()
        # Where the optimizer's state was saved: at the end of an epoch, not in the next one.
        epoch = max(0, math.ceil(state.epoch or 0) - 1)
        tables.place(Position(epoch, state.global_step))
        optimizer = kwargs["optimizer"]
        # Accelerate wraps the optimizer that steps.
        tables.prepare([getattr(optimizer, "optimizer", optimizer)], self.lazy)
        tables.tell_sizes()
        self._tables = tables

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the rows of this epoch, and say so where a stage begins."""
        if self._tables is not None:
            self._tables.move_to(_position(state))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Audit, if one is due."""
        if self._tables is not None:
            self._tables.after_step(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the last stage, and say what the audit found."""
        if self._tables is not None:
            self._tables.finish(state.global_step)


def _position(state: TrainerState) -> Position:
    return Position(int(state.epoch or 0), state.global_step)


def _check_arguments(args: TrainingArguments, tables: ScheduledTables) -> None:
    if args.fsdp or args.deepspeed:
        raise InputError(
            "RowUnfreezing needs whole weights on each device. Received "
            f"{'fsdp' if args.fsdp else 'deepspeed'} in the training arguments. Use one device or "
            "DDP."
        )
    for name, table in tables.tables.items():
        if getattr(table, "sparse", False):
            raise InputError(
                "the Trainer measures the norm of all gradients, which torch cannot do for sparse "
                f"ones. Received the sparse table {name!r}. Make it with sparse=False."
            )
