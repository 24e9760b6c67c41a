"""The callback for Hugging Face's Trainer: which rows train as training goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from partial_embedding.errors import InputError
from partial_embedding.rows.vocabulary import Vocabulary
from partial_embedding.schedule import AnySchedule, Position, schedules_by_table
from partial_embedding.torch.adapter import ScheduledTables


class RowUnfreezing(TrainerCallback, ExportableState):
    """Trains the rows that a schedule names, and leaves all others as they are, bit for bit.

    All is as in `partial_embedding.callbacks.lightning.RowUnfreezing`, for the Trainer's optimizer;
    the metrics that stages wait for are those of an evaluation, such as `eval_loss`. Where the
    schedule stands is in the `trainer_state.json` of each checkpoint, and a resumed run goes on
    there. With the argument `restore_callback_states_from_checkpoint` the Trainer takes the
    schedule itself from there, too, but a vocabulary cannot be kept in that file.

    Evaluate by steps where a stage waits for a metric and checkpoints are written by steps: from a
    checkpoint that lies between the last step of an epoch and the evaluation at its end, the
    Trainer resumes without that evaluation.

    Args:
        schedule: As in the callback for Lightning.
        vocabulary: What rows mean, for schedules that ask for it.
        lazy: Step only the rows that a batch touched, as `rowwise` does.
        audit: As in the callback for Lightning.

    Raises:
        InputError: As in the callback for Lightning; also, when training starts, for a table that
            is sparse.

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
            kwargs["model"],
            self.schedules,
            self.vocabulary,
            self.audit,
            say=print,
            total_steps=lambda: state.max_steps,
        )
        _check_arguments(args, tables)
        tables.check_backend()
        self._place(tables, state)
        optimizer = kwargs["optimizer"]
        # Accelerate wraps the optimizer that steps.
        tables.prepare([getattr(optimizer, "optimizer", optimizer)], self.lazy)
        tables.tell_sizes()
        self._tables = tables

    def _place(self, tables: ScheduledTables, state: TrainerState) -> None:
        """Set the rows to which the optimizer's state belongs."""
        # A mapping once it is made, whatever its annotation says. The Trainer fails to save a
        # callback that it has not read from a checkpoint, so that one is put there.
        states: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
        saved = states.setdefault(type(self).__name__, self.state())
        schedule = (saved[0] if isinstance(saved, list) else saved)["attributes"]["saved"]
        if not state.global_step:
            tables.place()
        elif schedule is None:
            # Saved without this callback.
            tables.place(Position(_epoch_done(state), state.global_step, tables.total_steps))
        else:
            tables.restore(schedule)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the rows of this epoch, and say so where a stage begins."""
        if self._tables is not None:
            self._tables.advance(int(state.epoch or 0), state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the rows of this step, where they may change within an epoch."""
        self.on_epoch_begin(args, state, control, **kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Audit, if one is due."""
        if self._tables is not None:
            self._tables.after_step(state.global_step)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the metrics that a stage waits for."""
        # What is measured before the first step is no validation.
        if self._tables is not None and self._tables.has_begun:
            self._tables.observe(_epoch_done(state), state.global_step, kwargs["metrics"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the last stage, and say what the audit found."""
        if self._tables is not None:
            self._tables.finish(state.global_step)
            self._tables = None

    def state(self) -> dict[str, Any]:
        """What the Trainer keeps of this callback in each checkpoint."""
        named = {name: schedule.to_config() for name, schedule in self.schedules.items()}
        schedule = named.pop(None, None) or named
        saved = None if self._tables is None else self._tables.to_state()
        return {
            "args": {"schedule": schedule, "lazy": self.lazy, "audit": self.audit},
            "attributes": {"saved": saved},
        }


def _epoch_done(state: TrainerState) -> int:
    """The epoch that the last step was made in."""
    return max(0, math.ceil(state.epoch or 0) - 1)


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
