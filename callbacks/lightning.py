"""PyTorch Lightning callbacks: which rows train as training goes on, and what they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer

from partial_embedding.callbacks.lightning_base import Callback
from partial_embedding.callbacks.lightning_monitor import RowMonitor
from partial_embedding.errors import InputError, check_flags
from partial_embedding.rows.vocabulary import Vocabulary, find_vocabulary
from partial_embedding.schedule import AnySchedule, schedules_by_table
from partial_embedding.schedule.messages import AuditResult
from partial_embedding.schedule.runner import Runner
from partial_embedding.torch.adapter import TorchTables
from partial_embedding.torch.averaging import keep_equal_rows
from partial_embedding.torch.optimizer import average_gradients
from partial_embedding.torch.table import PartialTable, tables_in
from partial_embedding.torch.table_files import check_checkpoint, leave_rows_alone, remember_origins

__all__ = ["RowMonitor", "RowUnfreezing"]

# By name, for both of Lightning's packages. These strategies flatten or move weights.
_REFUSED_STRATEGIES = {"FSDPStrategy", "DeepSpeedStrategy"}
_FINDERS = {"LearningRateFinder", "BatchSizeFinder"}


class RowUnfreezing(Callback):
    """Trains the rows that a schedule names, and leaves all others as they are, bit for bit.

    The callback prepares the trainer's optimizers with `rowwise`; `configure_optimizers` stays as
    it is, with a plain optimizer over `self.parameters()`. Rows may change at the start of an epoch
    and, where a schedule moves within epochs, with any optimizer step; a stage that waits for a
    metric sees what each validation logged, and starts with the next batch. The progress bar shows
    the stage and the trainable rows. Steps are counted as Lightning counts them, in manual
    optimization those of every optimizer.

    Under DDP, processes send each other the rows that trained instead of the whole table, unless
    nothing but tables trains.

    A run that is stopped and resumed from a checkpoint goes on where the schedule stood. A schedule
    that was changed in between is told of line by line, and refused if other rows would train
    where the checkpoint stands. Learning rates and batch sizes are searched with the first rows,
    and `fit` goes on from there as if nothing had been searched.

    `EarlyStopping` counts on from stage to stage, and so may end a run whose stages wait for the
    same metric; `fit` warns of that. At its end it names the stages that it did not come to.

    Args:
        schedule: A `Schedule`, a mapping, or the path of a YAML file, for all tables of the module;
            or a mapping from the names of tables to these.
        vocabulary: What rows mean, for schedules that ask for it, as `Vocabulary.of` reads it: a
            list of tokens, for example. By default the `vocabulary` of the datamodule or of the
            module.
        lazy: Step only the rows that a batch touched, as `rowwise` does.
        audit: Compare the bits of frozen rows at the end of each stage; a number n compares them
            every n optimizer steps of the run too. One comparison reads the frozen part of the
            table once.
        checkpoint: What a checkpoint holds of a table that follows a schedule: `"table"`, all of
            it, or `"rows"`, those that ever trained, and a fingerprint of the others. Such a
            checkpoint is loaded, in `fit`, `test` or `load_from_checkpoint`, by a module whose
            tables are made as they were made for the run; another table is refused. Of the rows
            that trained a copy is kept on the CPU, as they were. Checkpoints of weights alone
            (`save_weights_only`) hold tables whole.

    Raises:
        InputError: The schedule is malformed. When `fit` starts: it does not fit the module, an
            optimizer or strategy cannot keep frozen rows exact or a stage's learning rate, a weight
            takes no gradients, or nothing validates while a stage waits for a metric. During `fit`:
            validation does not log such a metric, or processes differ.

    Example:
        >>> RowUnfreezing({"stages": [{"epoch": 0, "rows": [1]}, {"epoch": 3, "rows": "all"}]})
        RowUnfreezing(Schedule([{'epoch': 0, 'rows': {'ids': [1]}}, {'epoch': 3, 'rows': 'all'}]))
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
        self._runner: Runner | None = None
        self._restored: dict[str, Any] | None = None
        # The epoch of a validation that follows the last batch.
        self._validation_due: int | None = None

    def __repr__(self) -> str:
        return f"RowUnfreezing({', '.join(map(repr, self.schedules.values()))})"

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint; callbacks for other tables have others."""
        return self._generate_state_key(tables=sorted(map(str, self.schedules)))

    @property
    def audit_results(self) -> list[AuditResult]:
        """What the audit found in the stages that ended."""
        return [] if self._runner is None else self._runner.audit_results

    # Before the first step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be kept exact."""
        if stage != "fit":
            return
        if _REFUSED_STRATEGIES & _kinds(trainer.strategy):
            raise InputError(
                "RowUnfreezing needs weights that are whole, or split by rows. Received "
                f"{type(trainer.strategy).__name__}, which flattens them. Use DDPStrategy or "
                "ModelParallelStrategy."
            )
        if trainer.strategy.restore_checkpoint_after_setup:
            if self.checkpoint == "rows":
                raise InputError(
                    "a checkpoint of rows alone is loaded before a model is sharded. Received "
                    f"checkpoint='rows' with {type(trainer.strategy).__name__}. Leave checkpoint "
                    "out."
                )
            _restore_rows_first(trainer.strategy, self.state_key, self._go_on)
        for other in _callbacks_of(trainer):
            if "StochasticWeightAveraging" in _kinds(other):
                # It averages by itself, with a function of the user's that may round.
                update = type(other).update_parameters  # type: ignore[attr-defined]
                vars(other)["update_parameters"] = keep_equal_rows(update)
        # What a search or an earlier `fit` left.
        self._runner = self._restored = self._validation_due = None
        # Lightning puts finders first, and they train the module within `on_fit_start`, without
        # any other callback: rows must be set by then. It is going through the list of now.
        others = [one for one in _callbacks_of(trainer) if one is not self]
        if any(_FINDERS & _kinds(one) for one in others):
            vars(trainer)["callbacks"] = [self, *others]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check every stage against the tables, set the first rows, and prepare the optimizers."""
        tables = TorchTables(pl_module)
        vocabulary = find_vocabulary(
            self.vocabulary, getattr(trainer, "datamodule", None), pl_module
        )
        runner = Runner(tables, self.schedules, vocabulary, self.audit, say=pl_module.print)
        self._check_others(trainer, runner)
        if self._restored is not None:
            self._restore(runner, self._restored)
        # Before the optimizers load their state, which belongs to the rows of that position.
        runner.place()
        if self.checkpoint == "rows":
            followed = {name: tables.tables[name] for name in runner.schedules}
            remember_origins(followed, pl_module.print, resumed=self._restored is not None)
        tables.prepare(runner.schedules, trainer.optimizers, self.lazy)
        runner.check_rate_scales()
        if not trainer.enable_validation:
            runner.refuse_to_wait(
                "it has no validation_step or no validation data, or limit_val_batches=0. Give it "
                "one, or let the stage start at an epoch, a step or a share."
            )
        every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
        if every is not None and epochs is not None and 0 <= epochs < every:
            runner.refuse_to_wait(
                f"check_val_every_n_epoch={every} of {epochs} epochs. Set it to {max(epochs, 1)}, "
                "or let the stage start at an epoch, a step or a share."
            )
        self._runner = runner

    def _restore(self, runner: Runner, state: Mapping[str, Any]) -> None:
        runner.restore(state)
        self._validation_due = state["validation_due"]

    def _go_on(self, state: Mapping[str, Any]) -> None:
        """Set the rows of a checkpoint that is loaded later than Lightning does by default."""
        self._restore(self._active, state)
        self._active.place()

    def _check_others(self, trainer: Trainer, runner: Runner) -> None:
        for other in _callbacks_of(trainer):
            if self.checkpoint == "rows" and "WeightAveraging" in _kinds(other):
                raise InputError(
                    "a checkpoint of averaged weights holds tables whole. Received "
                    f"checkpoint='rows' beside {type(other).__name__}. Leave checkpoint out."
                )
            if "EarlyStopping" in _kinds(other):
                runner.warn_of_stopper(type(other).__name__, vars(other)["monitor"])
            if not isinstance(other, RowUnfreezing) or other is self:
                continue
            for name in runner.schedules:
                if name in other.schedules or None in other.schedules:
                    raise InputError(
                        f"each table follows one schedule. Received two RowUnfreezing for {name!r}."
                        f" Name the tables of each: RowUnfreezing({{{name!r}: …}})."
                    )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Know the length of the run, and validate if the checkpoint left that to do."""
        # Only now: asked before, Lightning would make the data loaders at once, and not give them
        # the state of the checkpoint, so that a resumed run would train on the wrong batches.
        self._active.start(trainer.estimated_stepping_batches)
        if self._validation_due is not None:
            _validate(trainer)

    @property
    def _active(self) -> Runner:
        assert self._runner is not None, "Lightning calls on_fit_start first"
        return self._runner

    # Moving with the schedule

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the rows of this epoch, and say so where a stage begins."""
        if self._active.advance(trainer.current_epoch, trainer.global_step):
            # As Lightning's own callbacks write to `trainer.callback_metrics`.
            shown: dict[str, Any] = trainer.progress_bar_metrics
            shown.update(self._active.bar)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the rows of this step, where they may change within an epoch.

        Resumed from a checkpoint of a step, Lightning goes on within that epoch, or with the first
        batch of the next one, without `on_train_epoch_start`.
        """
        self.on_train_epoch_start(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the metrics that a stage waits for."""
        # Checkpoints of this validation are written after this, and so hold what was seen.
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        due, self._validation_due = self._validation_due, None
        epoch = trainer.current_epoch if due is None else due
        if self._active.metrics:
            self._active.observe(epoch, trainer.global_step, trainer.callback_metrics)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the last stage, and say what the audit found."""
        # Not in `on_train_end`, where callbacks that average weights put them into the model.
        self._active.finish(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Audit, if one is due."""
        self._active.after_step(trainer.global_step)
        if self._active.metrics:
            # Only Lightning knows whether it validates next, and has no public name for it.
            loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
            due = fetcher is not None and loop._should_check_val_fx(fetcher)
            self._validation_due = trainer.current_epoch if due else None

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average the gradients of the tables over all processes, where DDP averages the others."""
        # DDP's own flag, which is down while gradients are accumulated; other strategies reduce
        # them in each backward pass. What is averaged already stays as it is, be it by another
        # callback, or beside DDP where backward is not called within `training_step`.
        if getattr(trainer.model, "require_backward_grad_sync", trainer.world_size > 1):
            for optimizer in trainer.optimizers:
                average_gradients(optimizer)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands, what was seen on the way, and what the schedule is."""
        if self._runner is None:
            return self._restored or {}
        return {**self._runner.state(), "validation_due": self._validation_due}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the rows that ever trained in the place of whole tables, if so asked."""
        if self.checkpoint == "rows":
            names = self.schedules
            followed = [t for name, t in tables_in(pl_module) if {name, None} & names.keys()]
            weights = [table._shared for table in followed]
            # In what is there, which other callbacks may have changed; tied tables are there too.
            for name, module in pl_module.named_modules(remove_duplicate=False):
                if isinstance(module, PartialTable) and module._shared in weights:
                    leave_rows_alone(module, checkpoint["state_dict"], f"{name}.")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember where the schedule stood until `fit` starts.

        Finders restore a checkpoint of their own after that; it is of the same place.
        """
        self._restored = state_dict


def _callbacks_of(trainer: Trainer) -> list[Callback]:
    # Lightning gives this attribute no type, and sets it elsewhere.
    callbacks: list[Callback] = vars(trainer)["callbacks"]
    return callbacks


def _kinds(thing: object) -> set[str]:
    """The names of an object's classes."""
    return {kind.__name__ for kind in type(thing).__mro__}


def _validate(trainer: Trainer) -> None:
    """Make up for the validation after the batch with which a checkpoint ended.

    Lightning resumes without it, and a stage that waits for a metric would start late.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    # It does go back to one that had begun; releases before 2.5.1 have no word for that.
    if getattr(loop, "restarted_mid_evaluation", False):
        return
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True
    loop._has_run = False  # or the resumed epoch would be taken for done


def _restore_rows_first(
    strategy: Any, state_key: str, restore: Callable[[Mapping[str, Any]], None]
) -> None:
    """Let a callback go on where it stood before a strategy loads optimizers, the next time.

    A strategy that loads a checkpoint once the model is sharded loads the optimizers with it, and
    Lightning restores callbacks after that; but an optimizer's state belongs to the rows of then.
    """
    load = strategy.load_checkpoint

    def load_checkpoint(checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        vars(strategy).pop("load_checkpoint", None)
        path = Path(strategy.broadcast(checkpoint_path))
        # Of a checkpoint that is a folder, the entries that are no weights.
        file = path / "meta.pt" if path.is_dir() else path
        kept = torch.load(file, map_location="cpu", mmap=True, weights_only=weights_only)
        if (state := kept.get("callbacks", {}).get(state_key)) is not None:
            restore(state)
        return load(checkpoint_path, weights_only=weights_only)

    strategy.load_checkpoint = load_checkpoint
