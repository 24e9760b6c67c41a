"""`fit`, `validate`, `test` and `predict`: LightningCLI, with the callbacks of this library."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
    ArgumentError,
    Namespace,
    class_from_function,
)
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from partial_embedding.callbacks.lightning import RowUnfreezing
from partial_embedding.callbacks.lightning_monitor import RowMonitor
from partial_embedding.errors import InputError, did_you_mean
from partial_embedding.files import read_yaml, shown
from partial_embedding.recipes.predictions import output_of
from partial_embedding.recipes.prepare_texts import TextSettings
from partial_embedding.recipes.report_command import write_page
from partial_embedding.recipes.resume import RandomState
from partial_embedding.recipes.run_folder import (
    RunLogger,
    WholeCheckpoints,
    read_checkpoint,
    settings_in,
)
from partial_embedding.recipes.settings import (
    ClassifierSettings,
    diverged,
    find_checkpoint,
    read_config,
)

# Imported so that configurations can name them without their module.
from partial_embedding.recipes.text_classifier import TextClassifier, TextData

_DEFAULT_CLASSES: dict[str, dict[str, Any]] = {
    "data": {"class_path": "TextData"},
    "model": {"class_path": "TextClassifier", "init_args": {"export": "vec"}},
}
_OF_A_CLASS = ("class_path", "init_args", "dict_kwargs")
_CHECKPOINTS = {name: f"**/checkpoints/{name}.ckpt" for name in ("last", "best")}
_DEFAULTS = {
    "rows.schedule": {"stages": [{"epoch": 0, "rows": "missing"}]},
    # Two callbacks: with a metric to monitor, Lightning refreshes `last` only when it improves.
    "last.filename": "last",
    "last.enable_version_counter": False,
    "best.filename": "best",
    "best.monitor": "val_loss",
    "best.enable_version_counter": False,
    "trainer.default_root_dir": "runs",
    "trainer.max_epochs": 10,
    "trainer.log_every_n_steps": 10,
    # It counts the weights of frozen rows among those that train.
    "trainer.enable_model_summary": False,
}


def row_unfreezing(
    schedule: dict[str, Any] | str,
    lazy: bool = False,
    audit: bool | int = True,
    checkpoint: Literal["table", "rows"] = "table",
) -> RowUnfreezing:
    """Which rows train, and when.

    Args:
        schedule: `{stages: [{epoch: …, rows: …}, …]}`, or the path of a YAML file that holds it.
        lazy: Step only the rows that a batch touched.
        audit: Compare the bits of frozen rows at the end of each stage, and every n steps too.
        checkpoint: What a checkpoint holds: the whole table, or the rows that ever trained; then
            the texts and vectors of the training are read again to use it.
    """
    return RowUnfreezing(schedule, lazy=lazy, audit=audit, checkpoint=checkpoint)


# What has options of its own, in the order of `--help`.
_PARTS: dict[str, Any] = {
    "data": TextData,
    "model": TextClassifier,
    # Made here once, where Lightning would look through the stack for each command.
    "rows": class_from_function(row_unfreezing),
    "monitor": RowMonitor,
    "random_state": RandomState,
    "last": ModelCheckpoint,
    "best": ModelCheckpoint,
    "trainer": Trainer,
}


class _SaveConfig(SaveConfigCallback):
    """Keeps the configuration beside the log, once all of it has been accepted."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing: the run may still be refused."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")


class _ConfigFile(ActionConfigFile):
    """Names the file in which something is wrong."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        # What a checkpoint says comes as YAML, of several lines.
        if "\n" not in values:
            read_config(values)
        super().__call__(parser, cfg, values, option_string)  # type: ignore[no-untyped-call]


class _StopDiverged(Callback):
    """Ends a run whose loss is no finite number, before that reaches the weights."""

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        finite = math.isfinite(loss.item())
        if trainer.world_size > 1:  # one that stopped alone would leave the others waiting
            finite = trainer.strategy.reduce_boolean_decision(finite, all=True)
        if not finite:
            raise diverged(loss.item(), trainer.global_step, trainer.current_epoch)


class _OneLineBar(RichProgressBar):
    """Lightning's bar, short enough for one line of a terminal of 80 columns."""

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        return [
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
        ]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)  # the folder is said at the end
        # Of texts, such as that of a stage, the part before a colon.
        return {k: v.partition(":")[0] if isinstance(v, str) else v for k, v in shown.items()}


class RecipeCLI(LightningCLI):
    """Trainer, model, data and callbacks, from a command line and its configuration files.

    Any model and datamodule can be named by their `class_path`; those of the text recipe are the
    default. A fit keeps its log, checkpoints and what else it writes in one folder, `version_N`
    below `trainer.default_root_dir`. The other commands take the settings that they are not given
    from the checkpoint.
    """

    trainer: Trainer
    model: Any
    datamodule: Any

    def __init__(self, command: str, args: Sequence[str]) -> None:
        self.command = command
        self.log: RunLogger | None = None
        # With the classes known, the parser knows their options, and lists them.
        known = "--help" in args or "-h" in args
        super().__init__(
            TextClassifier if known else LightningModule,
            TextData if known else LightningDataModule,
            subclass_mode_model=not known,
            subclass_mode_data=not known,
            save_config_callback=_SaveConfig if command == "fit" else None,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={
                "prog": f"partial-embedding {command}",
                "usage": f"partial-embedding {command} [--config FILE] [--OPTION VALUE …]",
                "description": None,
                "allow_abbrev": False,
                # Errors are raised, so that they are said in one line.
                "exit_on_error": False,
            },
            auto_configure_optimizers=False,
            args=list(args),
            run=False,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser, with an option for configuration files."""
        parser = LightningArgumentParser(**kwargs)
        parser.add_argument(
            "-c", "--config", action=_ConfigFile, help="a YAML file with any of these"
        )
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Put what belongs to this command first, and Lightning's trainer last."""
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            help="last, best, or the path of a checkpoint; last and best are those of the newest "
            "run below trainer.default_root_dir",
        )
        if self.command == "predict":
            parser.add_argument("--text", type=str | None, help="a text, instead of a file")
            parser.add_argument(
                "--output",
                type=str | None,
                help="the CSV file to write, or - for the terminal; by default predictions.csv "
                "below trainer.default_root_dir",
            )
            parser.add_argument("--top_k", type=int, default=1, help="the classes of each text")
        for key, made in _PARTS.items():
            any_class: Any = {"data": LightningDataModule, "model": LightningModule}.get(key)
            if any_class and self.subclass_mode_model:
                parser.add_lightning_class_args(any_class, key, subclass_mode=True)
                parser.set_defaults({key: _DEFAULT_CLASSES[key]})
            else:
                parser.add_lightning_class_args(made, key)
        parser.set_defaults(_DEFAULTS)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, find the checkpoint, and take from it what was not given."""
        # Not the parent's, which warns of arguments that come from Python.
        self.config = self._parsed(parser, args)
        self.ckpt_path: Path | None = None
        named, root = self.config.ckpt_path, Path(self.config.trainer.default_root_dir)
        if named is None and self.command == "fit":
            return
        self.ckpt_path = find_checkpoint(self.command, named, root, _CHECKPOINTS)
        checkpoint = read_checkpoint(self.ckpt_path, to_go_on=self.command == "fit")
        if self.command != "fit":
            settings = yaml.safe_dump(settings_in(checkpoint))
            self.config = self._parsed(parser, ["--config", settings, *args])

    def _parsed(self, parser: LightningArgumentParser, args: Sequence[str]) -> Any:
        if self.subclass_mode_model:
            # jsonargparse gives the settings of the default class to another one that has the same
            # names, so the class that is meant becomes the default before the settings are read.
            named = parser.parse_args([arg for arg in args if not arg.startswith("--print_config")])
            for path in filter(None, named.config or []):
                for option in _left_out(read_yaml(str(path), "configuration"), named):
                    raise InputError(_no_option(self.command, option))
            for key, default in _DEFAULT_CLASSES.items():
                if not named[key].class_path.endswith(f".{default['class_path']}"):
                    parser.set_defaults({key: {"class_path": named[key].class_path}})
        return parser.parse_args(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, whose log is the folder of the run."""
        config = self.config_init.trainer
        if self.command != "fit":
            # Several processes would measure some texts twice, to have equally many.
            kwargs |= {"logger": False, "devices": 1, "num_nodes": 1}
        elif config.logger in (None, True):
            went_on = self.ckpt_path if self.config.ckpt_path == "last" else None
            self.log = RunLogger(config.default_root_dir, went_on and went_on.parents[1])
            kwargs["logger"] = self.log
        kwargs["callbacks"] = callbacks = [*_as_list(config.callbacks), _StopDiverged()]
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if config.enable_progress_bar is not False and not has_bar:
            callbacks.append(_OneLineBar())
        kwargs["plugins"] = [*_as_list(config.plugins), WholeCheckpoints()]
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError, MisconfigurationException) as error:
            reason = str(error).rstrip(".")
            raise InputError(
                f"trainer has the options of Lightning's Trainer. Received: {reason}. "
                f"See partial-embedding {self.command} --help."
            ) from error

    def run(self) -> None:
        """Do what the command says."""
        do = {"fit": self._fit, "predict": self._predict}.get(self.command, self._measure)
        try:
            do()
        finally:
            if self.log is not None:
                self.log.leave_nothing_empty()

    def _fit(self) -> None:
        trainer = self.trainer
        trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self.ckpt_path)
        if not trainer.is_global_zero:
            return
        made = self.config_init
        if (accuracy := trainer.callback_metrics.get("val_accuracy")) is not None:
            print(f"validation accuracy: {100 * float(accuracy):.1f} %")
        places = {
            "log": trainer.log_dir,
            "checkpoint": made.last.best_model_path,
            "best checkpoint": made.best.best_model_path,
            "page": made.monitor.path and write_page(made.monitor.path.parent),
        }
        for name, place in places.items():
            if place:
                print(f"{name}: {shown(place)}")

    def how_to_go_on(self) -> str:
        """What to say after an interrupt."""
        if self.command != "fit" or not (path := self.config_init.last.best_model_path):
            return "interrupted before the first checkpoint"
        return f"interrupted; the same command with --ckpt_path last goes on from {shown(path)}"

    def _measure(self) -> None:
        print(f"checkpoint: {shown(str(self.ckpt_path))}")
        measure = self.trainer.test if self.command == "test" else self.trainer.validate
        measure(self.model, datamodule=self.datamodule, ckpt_path=self.ckpt_path)

    def _predict(self) -> None:
        config, data = self.config, self.datamodule
        if not hasattr(data, "given_texts"):
            raise InputError(
                f"predict is of texts. Received: the data of a {type(data).__name__}. Call the "
                "trainer's predict for others."
            )
        if config.text is not None:
            data.given_texts = [config.text]
        typed = config.text is not None or data.hparams.get("test_path") == "-"
        output = output_of(config.output, typed, Path(config.trainer.default_root_dir))
        batches = self.trainer.predict(self.model, datamodule=data, ckpt_path=self.ckpt_path)
        self.model.write_predictions(output, data.given_texts, batches, config.top_k)


def _left_out(given: Any, parsed: Any, option: str = "--") -> Iterator[str]:
    """Options that jsonargparse left out: it passes over unknown keys of an empty mapping."""
    if isinstance(given, list) and isinstance(parsed, list):
        for one, made in zip(given, parsed, strict=False):
            yield from _left_out(one, made, option)
    if not isinstance(given, dict) or not isinstance(parsed, Namespace):
        return
    if "class_path" in parsed:  # whose settings may stand beside it, or below init_args
        given = {**(given.get("init_args") or {}), **given}
        given = {key: value for key, value in given.items() if key not in _OF_A_CLASS}
        parsed = parsed.get("init_args", parsed)
    for key, value in given.items():
        if key not in parsed:
            yield f"{option}{key}"
        else:
            yield from _left_out(value, parsed[key], f"{option}{key}.")


def _as_list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given] if given else []


def run_lightning(command: str, args: Sequence[str]) -> RecipeCLI:
    """Run a command that trains or measures, and say in one line what Lightning refuses.

    Raises:
        InputError: An argument, the data, the schedule or a checkpoint are refused.
        FrozenRowsMoved: The audit found that frozen rows changed.
        KeyboardInterrupt: It was interrupted; the message says how to go on.
    """
    _quieten()
    try:
        cli = RecipeCLI(command, args)
    except InputError:
        raise
    except (ArgumentError, ValueError) as error:  # jsonargparse's, also of what a class refuses
        raise InputError(_in_one_line(command, str(error))) from error
    try:
        cli.run()
    except MisconfigurationException as error:
        raise InputError(str(error)) from error
    except RuntimeError as error:
        if "Early stopping conditioned on metric" in str(error):
            raise InputError(f"{error} Set the monitor of EarlyStopping to one of these.") from None
        raise
    except SystemExit:  # Lightning's answer to an interrupt
        raise KeyboardInterrupt(cli.how_to_go_on()) from None
    return cli


def _in_one_line(command: str, message: str) -> str:
    """What jsonargparse says in a tree of lines, one for each type that it tried."""
    option = "--" + ".".join(re.findall(r'Parser key "(.+?)"', message))
    given = re.findall(r"(?:Got|Given) value: (.*)", message)
    expected = dict.fromkeys(re.findall(r"Expected an? (.+?)(?:\. Got value.*)?$", message, re.M))
    refused = re.search(r"^ +- (.+)\n", message, re.M)
    # Of a key with a mapping under it, it names the keys below too.
    if nested := re.search(r"Group '(.+?)' does not accept option '([^.']+)", message):
        message = f"unrecognized arguments: --{nested[1]}.{nested[2]}"
    unknown = re.search(
        r"Option '(.+?)' is not accepted|unrecognized arguments: (--[^\s=]+)", message
    )
    see = f"See partial-embedding {command} --help."
    if unknown:
        return _no_option(command, unknown[2] or f"{option}.{unknown[1]}".replace("--.", "--"))
    if path := re.search(r"dot import path string: (.+)", message):
        return (
            f"{option} is the path of a class, as in my_module.MyModel. Received: {path[1]}. {see}"
        )
    expected.pop("<class 'NoneType'>", None)
    if expected and given:
        kinds = (re.sub(r"<class '(.+)'>", r"\1", kind) for kind in expected)
        kinds = (re.sub(r"typing\.Literal\[(.+)\]", r"one of \1", kind) for kind in kinds)
        return f"{option} is {' or '.join(kinds)}. Received: {given[0]}. {see}"
    said = refused[1] if refused else message
    # What this library refuses says what to do.
    return said if "Received" in said else f"{said}. {see}"


def _no_option(command: str, name: str) -> str:
    meant = did_you_mean(name, _known_options())
    return f"{name} is no option.{meant} See partial-embedding {command} --help."


def _known_options() -> list[str]:
    own = ["--config", "--ckpt_path", "--text", "--output", "--top_k", "--seed_everything"]
    own.append("--model.export")  # beside the settings that Keras's classifier has too
    known = {"data": TextSettings, "model": ClassifierSettings, "rows": row_unfreezing}
    for part, made in {**_PARTS, **known}.items():
        own += [f"--{part}.{name}" for name in signature(made).parameters]
    return own


def _quieten() -> None:
    """Leave out what tells a user of this command nothing."""
    # Advertisements of other packages, and the seed, which stands in the configuration.
    for logger in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.seed"):
        logging.getLogger(logger).addFilter(_tells_something)
    for message in (
        # Lightning's own use of what its dependencies deprecate.
        r"\s*``instantiate_classes`` was deprecated",
        r"\s*By default only one JsonargparseDeprecationWarning",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        # A resumed run goes on in its own folder.
        r"Checkpoint directory .* exists and is not empty",
        # `test` writes no checkpoints of its own.
        r"The dirpath has changed from",
    ):
        warnings.filterwarnings("ignore", message=message)


def _tells_something(record: logging.LogRecord) -> bool:
    return not re.match("💡|Seed set to", record.getMessage())
