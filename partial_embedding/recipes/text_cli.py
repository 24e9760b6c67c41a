"""The command line of the text recipe, on which those of others build."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import (
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from pytorch_lightning.loggers import TensorBoardLogger

from partial_embedding.callbacks.lightning import RowUnfreezing
from partial_embedding.callbacks.lightning_monitor import RowMonitor
from partial_embedding.errors import InputError
from partial_embedding.files import write_atomically
from partial_embedding.recipes.export import ExportVectors
from partial_embedding.recipes.report_command import write_page
from partial_embedding.recipes.resume import RandomState
from partial_embedding.recipes.text_classifier import TextClassifier, TextData

SUBCOMMANDS = ("fit", "validate", "test", "predict")
_DEFAULTS = {
    "rows.schedule": {"stages": [{"epoch": 0, "rows": "missing"}]},
    # Two callbacks: with a metric to watch, Lightning refreshes `last` only when it improves.
    "last.filename": "last",
    "last.enable_version_counter": False,
    "best.filename": "best",
    "best.monitor": "val_accuracy",
    "best.mode": "max",
    "best.enable_version_counter": False,
}
# The key by which Lightning knows its own checkpoints.
_WRITTEN_BY = "pytorch-lightning_version"
_TRAINER_DEFAULTS = {"default_root_dir": "runs", "max_epochs": 10, "log_every_n_steps": 10}


def row_unfreezing(
    schedule: dict[str, Any] | str, lazy: bool = False, audit: bool | int = True
) -> RowUnfreezing:
    """Which rows train, and when.

    Args:
        schedule: `{stages: [{epoch: …, rows: …}, …]}`, or the path of a YAML file that holds it.
        lazy: Step only the rows that a batch touched.
        audit: Compare the bits of frozen rows at the end of each stage, and every n steps too.
    """
    return RowUnfreezing(schedule, lazy=lazy, audit=audit)


class _LateLogger(TensorBoardLogger):
    """Opens its file with the first numbers, so that a run that is refused leaves none."""

    _begun = False

    @property
    def experiment(self) -> Any:
        """The writer, or nothing before there is something to write; Lightning asks early."""
        return super().experiment if self._begun else None

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Write numbers."""
        self._begun = True
        super().log_metrics(metrics, step)

    def save(self) -> None:
        """Flush what was written."""
        if self._begun:
            super().save()


class _SaveConfig(SaveConfigCallback):
    """Keeps the configuration beside the log, once all of it has been accepted."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing: the run may still be refused."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        super().setup(trainer, pl_module, "fit")


class TextCLI(LightningCLI):
    """Text classification with a partly trainable table of word vectors.

    Every option of the trainer, the model, the data and the callbacks can stand in a YAML file and
    on the command line. A fit keeps its log, checkpoints, vectors and page in one folder,
    `version_N` below `trainer.default_root_dir`.

    Args:
        args: The arguments, by default those of the process.

    Raises:
        InputError: Data, vectors, schedule or checkpoint are refused.
        jsonargparse.ArgumentError: An option is unknown or has a wrong value.
        FrozenRowsMoved: The audit found that frozen rows changed.
    """

    recipe = "text"
    kinds: tuple[type[LightningModule], type[LightningDataModule]] = (TextClassifier, TextData)

    trainer: Trainer
    model: Any
    datamodule: Any

    def __init__(self, args: list[str] | None = None) -> None:
        # Errors are raised, so that `main` can say them in one line.
        raising = {"exit_on_error": False}
        super().__init__(
            *self.kinds,
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=dict(_TRAINER_DEFAULTS),
            seed_everything_default=0,
            parser_kwargs={**raising, **{name: dict(raising) for name in SUBCOMMANDS}},
            auto_configure_optimizers=False,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give each callback of the recipe a key of its own."""
        self.add_recipe(parser)
        parser.add_lightning_class_args(row_unfreezing, "rows")
        parser.add_lightning_class_args(RowMonitor, "monitor")
        parser.add_lightning_class_args(RandomState, "random_state")
        parser.add_lightning_class_args(ExportVectors, "export")
        parser.add_lightning_class_args(ModelCheckpoint, "last")
        parser.add_lightning_class_args(ModelCheckpoint, "best")
        parser.set_defaults(_DEFAULTS)

    def add_recipe(self, parser: LightningArgumentParser) -> None:
        """Accept the name of the recipe, by which `main` has chosen this class."""
        parser.add_argument(
            "--recipe", default=self.recipe, help="what is trained: text or language_model"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and find the checkpoint that is meant by `last`."""
        # Not the parent's, which warns of arguments that come from Python.
        self.config = parser.parse_args(args)
        config = self.config[self.config.subcommand]
        self._resumed_run: str | None = None
        if config.ckpt_path == "last":
            path = _last_checkpoint(Path(config.trainer.default_root_dir))
            config.ckpt_path = str(path)
            self._resumed_run = path.parent.parent.name
        if config.ckpt_path is not None:
            _check_checkpoint(config.ckpt_path)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, whose log is the folder of the run."""
        config = self.config_init[self.subcommand].trainer
        if config.logger in (None, True):
            kwargs["logger"] = self.subcommand == "fit" and _LateLogger(
                config.default_root_dir, name="", version=self._resumed_run
            )
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Say where everything lies."""
        made = self.config_init[self.subcommand]
        places = {
            "log": self.trainer.log_dir,
            "checkpoint": made.last.best_model_path,
            "best checkpoint": made.best.best_model_path,
            "vectors": made.export.path,
            "page": made.monitor.path and write_page(made.monitor.path.parent),
        }
        if self.trainer.is_global_zero:
            if (accuracy := self.trainer.callback_metrics.get("val_accuracy")) is not None:
                print(f"validation accuracy: {100 * float(accuracy):.1f} %")
            for name, place in places.items():
                if place:
                    print(f"{name}: {short(place)}")

    def predict(self, **kwargs: Any) -> None:
        """Write the most likely class of each text, and its probability, to a CSV file."""
        batches = self.trainer.predict(**{**kwargs, "return_predictions": True})
        probabilities = torch.cat(batches)  # type: ignore[arg-type]  # one tensor per batch
        best = probabilities.max(dim=1)
        texts = self.datamodule.test_texts.texts
        path = Path(self.trainer.default_root_dir) / "predictions.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            write_atomically(path) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            rows = csv.writer(file)
            rows.writerow(["text", "label", "probability"])
            for text, label, share in zip(
                texts, best.indices.tolist(), best.values.tolist(), strict=False
            ):
                rows.writerow([text, self.model.names[label], f"{share:.4f}"])
        print(f"predictions: {path}")


def _last_checkpoint(root: Path) -> Path:
    found = list(root.glob("*/checkpoints/last.ckpt"))
    if not found:
        raise InputError(
            f"a run goes on from its last checkpoint. Received: {root}, which holds none. Leave "
            "out --ckpt_path to begin, or pass the --trainer.default_root_dir of that run."
        )
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def _check_checkpoint(path: str) -> None:
    """Refuse what Lightning would meet with a traceback."""
    if not Path(path).is_file():
        raise InputError(f"a checkpoint is a file. Received: {path}, which is missing.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"a checkpoint is a file that `fit` wrote. Received: {path}: {reason}"
        ) from error
    if not isinstance(checkpoint, dict) or _WRITTEN_BY not in checkpoint:
        raise InputError(f"a checkpoint is a file that `fit` wrote. Received: {path}.")


def short(path: str | Path) -> str:
    """The path as one would type it here."""
    absolute = Path(path).absolute()
    here = Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)
