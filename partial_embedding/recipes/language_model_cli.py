"""The command line of the language-model recipe."""

from __future__ import annotations

from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser

from partial_embedding.recipes.language_model import NewTokens, TokenTexts
from partial_embedding.recipes.resume import RandomState
from partial_embedding.recipes.text_cli import TextCLI, row_unfreezing, short

_DEFAULTS = {
    "rows.schedule": {"stages": [{"epoch": 0, "rows": "missing"}]},
    "last.filename": "last",
    "last.enable_version_counter": False,
}


class LanguageModelCLI(TextCLI):
    """New tokens in a causal language model, of which only their rows learn.

    As for `TextCLI`, every option can stand in a YAML file and on the command line, and a fit keeps
    what it makes in one folder.

    Args:
        args: The arguments, by default those of the process.

    Raises:
        InputError: Model, tokens, texts, schedule or checkpoint are refused.
        jsonargparse.ArgumentError: An option is unknown or has a wrong value.
        FrozenRowsMoved: The audit found that frozen rows changed.
    """

    recipe = "language_model"
    kinds: tuple[type[LightningModule], type[LightningDataModule]] = (NewTokens, TokenTexts)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give each callback of the recipe a key of its own."""
        self.add_recipe(parser)
        parser.add_lightning_class_args(row_unfreezing, "rows")
        parser.add_lightning_class_args(RandomState, "random_state")
        parser.add_lightning_class_args(ModelCheckpoint, "last")
        parser.set_defaults(_DEFAULTS)

    def after_fit(self) -> None:
        """Say where everything lies."""
        places = {
            "log": self.trainer.log_dir,
            "checkpoint": self.config_init[self.subcommand].last.best_model_path,
            "rows": self.model.rows_path,
        }
        if self.trainer.is_global_zero:
            for name, place in places.items():
                if place:
                    print(f"{name}: {short(place)}")
