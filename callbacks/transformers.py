"""The callback for Hugging Face's Trainer: which rows train as training goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from partial_embedding.errors import InputError, check_flags
from partial_embedding.rows.vocabulary import Vocabulary
from partial_embedding.schedule import AnySchedule, Position, schedules_by_table
from partial_embedding.schedule.messages import AuditResult
from partial_embedding.schedule.runner import Runner
from partial_embedding.torch.adapter import TorchTables
from partial_embedding.torch.table import PartialTable
from partial_embedding.torch.table_files import check_checkpoint, remember_origins, rows_saved_alone


class RowUnfreezing(TrainerCallback, ExportableState):
    """Trains the rows that a schedule names, and leaves all others as they are, bit for bit.

    All is as in `partial_embedding.callbacks.lightning.RowUnfreezing`, for the Trainer's optimizer;
    the metrics that stages wait for are those of an evaluation, such as `eval_loss`. Where the
    schedule stands is in the `trainer_state.json` of each checkpoint, and a resumed run goes on
    there. With the argument `restore_callback_states_from_checkpoint` the Trainer takes the
    schedule itself from there, too, but a vocabulary cannot be kept in that file.

    With FSDP2 (`fsdp=True`) tables are sharded with the model, and learn what they learn whole. A
    run that goes on from a checkpoint then needs a call, `resume`.

    Evaluate by steps where a stage waits for a metric and checkpoints are written by steps: from a
    checkpoint that lies between the last step of an epoch and the evaluation at its end, the
    Trainer resumes without that evaluation.

    Args:
        schedule: As in the callback for Lightning.
        vocabulary: What rows mean, for schedules that ask for it, as `Vocabulary.of` reads it.
        lazy: Step only the rows that a batch touched, as `rowwise` does.
        audit: As in the callback for Lightning.
        checkpoint: As in the callback for Lightning, for the checkpoints that the Trainer writes
            while it trains, and takes up by `resume_from_checkpoint` and `load_best_model_at_end`.
            `from_pretrained` knows no such files: save the model after training, which is whole.

    Raises:
        InputError: As in the callback for Lightning.

    Example:
        >>> RowUnfreezing({"stages": [{"epoch": 0, "rows": [1]}]}).schedules
        {None: Schedule([{'epoch': 0, 'rows': {'ids': [1]}}])}
    """

    def __init__(
        self,
        schedule: AnySchedule | Mapping[str, AnySchedule],
        *,
        vocabulary: Any = None,
        lazy: bool = False,
        audit: bool | int = False,
        checkpoint: str = "table",
    ) -> None:
        check_flags(lazy=lazy)
        self.schedules = schedules_by_table(schedule)
        self.vocabulary = None if vocabulary is None else Vocabulary.of(vocabulary)
        self.lazy = lazy
        self.audit = audit
        self.checkpoint = check_checkpoint(checkpoint)
        # What the audit found in the stages that ended.
        self.audit_results: list[AuditResult] = []
        self._runner: Runner | None = None
        self._tables: TorchTables | None = None
        # The tables of which checkpoints hold rows alone; and open while that is so.
        self._followed: list[PartialTable] = []
        self._saved_alone = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check every stage against the tables, and set the first rows."""
        tables = TorchTables(kwargs["model"])
        runner = Runner(tables, self.schedules, self.vocabulary, self.audit, say=print)
        _check_engine(args, tables, self.checkpoint)
        _check_metrics(args, state, runner)
        self._go_on(runner, state)
        self._saved_alone.close()  # what a run left that was interrupted
        followed = {}
        if self.checkpoint == "rows":
            followed = {name: tables.tables[name] for name in runner.schedules}
            remember_origins(followed, print, resumed=bool(state.global_step))
        self._runner, self._tables, self._followed = runner, tables, [*followed.values()]
        self.audit_results = runner.audit_results

    def resume(self, model: nn.Module, checkpoint: str | Path) -> None:
        """Set the rows of a checkpoint, to which the state of its optimizer belongs.

        For FSDP2: there the Trainer loads an optimizer into what the rows of the model are, before
        it calls any callback. So call it before `trainer.train(resume_from_checkpoint=checkpoint)`
        where the schedule has moved on since the first stage.

        Args:
            model: The model, which is not sharded yet.
            checkpoint: A folder that the Trainer has written.

        Raises:
            InputError: As when training begins.
        """
        tables = TorchTables(model)
        runner = Runner(tables, self.schedules, self.vocabulary, say=lambda line: None)
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        self._go_on(runner, state)

    def _go_on(self, runner: Runner, state: TrainerState) -> None:
        """Set the rows to which the optimizer's state belongs."""
        # A mapping once it is made, whatever its annotation says. The Trainer fails to save a
        # callback that it has not read from a checkpoint, so that one is put there.
        states: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
        saved = states.setdefault(type(self).__name__, self.state())
        # Several callbacks of one class are a list, to which each checkpoint adds.
        callbacks = saved if isinstance(saved, list) else [saved]
        if not state.global_step:  # later the list has those of the checkpoint too
            _check_others([one["args"]["schedule"] for one in callbacks])
        every = [one["attributes"]["saved"] for one in callbacks]
        mine = [one for one in every if one and one["schedules"].keys() & runner.schedules.keys()]
        if state.global_step and mine:
            runner.restore(mine[-1])
        runner.start(state.max_steps)
        # In a checkpoint without this callback, rows are those of its place.
        here = Position(_epoch_done(state), state.global_step, runner.total_steps)
        runner.place(here if state.global_step and not mine else None)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the rows of this epoch or step, and say so where a stage begins."""
        self._saved_alone.close()
        if self._runner is None or self._tables is None:
            return
        if not self._runner.has_begun:
            # The optimizer has its state already, which belongs to the rows that every callback
            # of this kind has set by now.
            self._tables.prepare(self._runner.schedules, [kwargs["optimizer"]], self.lazy)
            self._runner.check_rate_scales()
        self._runner.advance(int(state.epoch or 0), state.global_step)

    on_step_begin = on_epoch_begin  # where rows may change within an epoch

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Audit, if one is due."""
        if self._runner is not None:
            self._runner.after_step(state.global_step)
            self._save_rows_alone()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let a checkpoint of this epoch hold rows alone, if so asked."""
        self._save_rows_alone()

    def _save_rows_alone(self) -> None:
        # The Trainer saves between an end and what begins next. Not for longer: after an error it
        # calls no callback, and the model is to be saved whole.
        self._saved_alone.close()
        self._saved_alone.enter_context(rows_saved_alone(self._followed))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the model be whole again."""
        self._saved_alone.close()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the metrics that a stage waits for."""
        # What is measured before the first step is no validation.
        if self._runner is not None and self._runner.has_begun and self._runner.metrics:
            self._saved_alone.close()  # it may refuse to go on
            self._runner.observe(_epoch_done(state), state.global_step, kwargs["metrics"])
            self._save_rows_alone()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the last stage, and say what the audit found."""
        if self._runner is not None:
            self._saved_alone.close()
            self._runner.finish(state.global_step)
            self._runner, self._followed = None, []

    def state(self) -> dict[str, Any]:
        """What the Trainer keeps of this callback in each checkpoint."""
        named = {name: schedule.to_config() for name, schedule in self.schedules.items()}
        schedule = named.pop(None, None) or named
        saved = None if self._runner is None else self._runner.state()
        return {
            "args": {
                "schedule": schedule,
                "lazy": self.lazy,
                "audit": self.audit,
                "checkpoint": self.checkpoint,
            },
            "attributes": {"saved": saved},
        }


def _epoch_done(state: TrainerState) -> int:
    """The epoch that the last step was made in."""
    return max(0, math.ceil(state.epoch or 0) - 1)


def _check_others(schedules: list[Any]) -> None:
    """Refuse two callbacks of one trainer for one table."""
    taken: set[str | None] = set()
    for names in (schedules_by_table(one).keys() for one in schedules):
        if taken and (None in taken or None in names or taken & names):
            raise InputError(
                "each table follows one schedule. Received two RowUnfreezing for one. Name the "
                "tables of each: RowUnfreezing({name: schedule})."
            )
        taken |= names


def _check_engine(args: TrainingArguments, tables: TorchTables, checkpoint: str) -> None:
    fsdp = (args.fsdp_plugin_args or {}).get("fsdp_version", 2)
    if args.deepspeed or fsdp != 2:
        raise InputError(
            "RowUnfreezing needs weights that are whole, or split by rows. Received "
            f"{'deepspeed' if args.deepspeed else 'fsdp of version 1'} in the training arguments, "
            "which flattens them. Take DDP, or fsdp=True with fsdp_config={'version': 2}."
        )
    if checkpoint == "rows" and any(table.is_sharded for table in tables.tables.values()):
        raise InputError(
            "a checkpoint of rows alone is loaded before a model is sharded. Received "
            "checkpoint='rows' with fsdp. Leave checkpoint out."
        )


def _check_metrics(args: TrainingArguments, state: TrainerState, runner: Runner) -> None:
    if args.eval_strategy == "no":
        runner.refuse_to_wait(
            "its eval_strategy is 'no'. Set it to 'epoch' or 'steps', or let the stage start at an "
            "epoch, a step or a share."
        )
    stopper = "EarlyStoppingCallback"
    if stopper in (state.stateful_callbacks or ()):
        metric = args.metric_for_best_model or ""
        monitor = metric if metric.startswith("eval_") else f"eval_{metric}"
        runner.warn_of_stopper(stopper, monitor)
