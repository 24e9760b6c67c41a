"""Texts for a language model, one on each line of a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pytorch_lightning import LightningDataModule

from partial_embedding.errors import InputError
from partial_embedding.recipes.causal_model import CausalModel, TokenBatch
from partial_embedding.recipes.resume import ReplayableLoader
from partial_embedding.recipes.settings import check_range
from partial_embedding.recipes.text.labelled import are_held_out
from partial_embedding.recipes.text.reading import read_texts


class TextLines(LightningDataModule, ABC):
    """Texts, divided into a side to train on and one to validate on.

    Each batch is a function of seed, epoch and batch number, so that a run which stops anywhere
    goes on exactly.

    Args:
        path: A file with one text on each line; by default texts that every Python has.
        test_path: The texts that `test` measures and the prompts that `predict` continues; by
            default the validation side.
        max_length: Texts are cut after this many tokens.
        validation_share: The share of texts held out, chosen by a hash of each text.
        batch_size: Texts per batch.
        seed: Divides and shuffles; another seed does so differently.

    Raises:
        InputError: An argument is out of its range. When the data are set up: a file is missing or
            has no text.
    """

    training: list[str]
    validation: list[str]

    def __init__(
        self,
        path: str | None = None,
        test_path: str | None = None,
        max_length: int = 128,
        validation_share: float = 0.2,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # A checkpoint holds them, so that it is enough to measure it on other texts.
        self.save_hyperparameters(logger=False)
        check_range("batch_size", batch_size, 1)
        check_range("max_length", max_length, 1)
        are_held_out([], validation_share, seed)  # refuses a share that is none
        self.path = path
        self.test_path = test_path
        self.max_length = max_length
        self.validation_share = validation_share
        self.batch_size = batch_size
        self.seed = seed
        # What `predict` is asked for: lines of a file by default, or these.
        self.given_texts: list[str] | None = None

    @abstractmethod
    def default_texts(self) -> Sequence[str]:
        """The texts where no file is given."""

    def chosen(self, texts: list[str], module: CausalModel) -> list[str]:
        """Those of some texts that have something to teach the module: all."""
        return texts

    def setup(self, stage: str) -> None:
        """Read and divide the texts."""
        texts = read_texts(self.path) if self.path else self.default_texts()
        held_out = are_held_out(texts, self.validation_share, self.seed)
        self.training = [t for t, out in zip(texts, held_out, strict=True) if not out]
        self.validation = [t for t, out in zip(texts, held_out, strict=True) if out]

    def train_dataloader(self) -> ReplayableLoader[TokenBatch]:
        """The training side, shuffled anew for each epoch."""
        return self._loader(self.chosen(self.training, self._module()), self.seed)

    def val_dataloader(self) -> ReplayableLoader[TokenBatch]:
        """The validation side, in order."""
        return self._loader(self.chosen(self.validation, self._module()))

    def test_dataloader(self) -> ReplayableLoader[TokenBatch]:
        """The texts of `test_path`, in order."""
        return self._loader(self.chosen(self._asked(), self._module()))

    def predict_dataloader(self) -> ReplayableLoader[TokenBatch]:
        """The prompts, in order, one at a time."""
        self.given_texts = self.given_texts or self._asked()
        return self._loader(self.given_texts, batch_size=1)

    def _asked(self) -> list[str]:
        return read_texts(self.test_path) if self.test_path else self.validation

    def _module(self) -> CausalModel:
        module = self.trainer and self.trainer.lightning_module
        if not isinstance(module, CausalModel):
            raise InputError(
                "texts become tokens by the tokenizer of a language model. Received "
                f"{type(module).__name__}. Pass these data to the trainer of one."
            )
        return module

    def _loader(
        self, texts: list[str], seed: int | None = None, batch_size: int | None = None
    ) -> ReplayableLoader[TokenBatch]:
        module, trainer = self._module(), self.trainer
        assert trainer is not None

        def batch(indices: NDArray[np.int64]) -> TokenBatch:
            return module.encode([texts[i] for i in indices], self.max_length)

        size = batch_size or self.batch_size
        rank, world_size = trainer.global_rank, trainer.world_size
        return ReplayableLoader(batch, len(texts), size, seed, rank, world_size)
