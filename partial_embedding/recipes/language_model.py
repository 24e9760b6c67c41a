"""New tokens for a causal language model: texts, and a model of which only their rows learn."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from partial_embedding.errors import InputError
from partial_embedding.files import shown
from partial_embedding.recipes.causal_model import (
    CausalModel,
    TokenBatch,
    pretrained,
    vocabulary_of,
)
from partial_embedding.recipes.resume import ReplayableLoader
from partial_embedding.recipes.small_language_model import small_language_model
from partial_embedding.recipes.text import stdlib_docstrings
from partial_embedding.recipes.text.labelled import share_of
from partial_embedding.recipes.text.reading import read_texts
from partial_embedding.torch import add_tokens
from partial_embedding.torch.row_files import save_rows

# Texts that are compared before and after, and new tokens whose neighbours are shown.
_COMPARED = 32
_SHOWN = 5
_NEIGHBOURS = 3


class TokenTexts(LightningDataModule):
    """Texts, and the tokens that a language model is to learn from them.

    Each batch is a function of seed, epoch and batch number, so that a run which stops anywhere
    goes on exactly. Only texts with a new token are trained on: no other has anything to teach.

    Args:
        tokens: The new tokens, or a file with one on each line.
        path: A file with one text on each line; by default the docstrings of the standard library.
        test_path: The texts that `test` measures and the prompts that `predict` continues; by
            default the validation side.
        max_length: Texts are cut after this many tokens.
        validation_share: The share of texts held out, chosen by a hash of each text.
        batch_size: Texts per batch.
        seed: Divides and shuffles; another seed does so differently.

    Raises:
        InputError: An argument is out of its range. When the data are set up: a file is missing or
            has no text.

    Example:
        >>> data = TokenTexts(["iterable"])
        >>> data.setup("fit")
        >>> data.tokens, len(data.training) > 2000
        (['iterable'], True)
    """

    training: list[str]
    validation: list[str]

    def __init__(
        self,
        tokens: list[str] | str,
        path: str | None = None,
        test_path: str | None = None,
        max_length: int = 64,
        validation_share: float = 0.2,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # A checkpoint holds them, so that it is enough to measure it on other texts.
        self.save_hyperparameters(logger=False)
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value < 1:
                raise InputError(f"{name} is at least 1. Received: {value}.")
        if not 0 < validation_share < 1:
            raise InputError(f"validation_share lies in (0, 1). Received: {validation_share}.")
        self.tokens = _lines(tokens) if isinstance(tokens, str) else tokens
        self.path = path
        self.test_path = test_path
        # What `predict` is asked for: lines of a file by default, or these.
        self.given_texts: list[str] | None = None
        self.max_length = max_length
        self.validation_share = validation_share
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Read and divide the texts.

        Args:
            stage: Any.
        """
        texts = _lines(self.path) if self.path else list(stdlib_docstrings().texts)
        held_out = [share_of(self.seed, text) < self.validation_share for text in texts]
        self.training = [t for t, out in zip(texts, held_out, strict=True) if not out]
        self.validation = [t for t, out in zip(texts, held_out, strict=True) if out]

    def _module(self) -> NewTokens:
        module = self.trainer and self.trainer.lightning_module
        if not isinstance(module, NewTokens):
            raise InputError(
                "texts become tokens by the tokenizer of a NewTokens. Received "
                f"{type(module).__name__}. Pass these data to its trainer."
            )
        return module

    def _loader(self, texts: list[str], seed: int | None) -> ReplayableLoader[TokenBatch]:
        module = self._module()
        chosen = module.with_new_tokens(texts)
        if not chosen:
            raise InputError(
                "new tokens are learned from texts that have them. Received none with any of "
                f"{', '.join(self.tokens[:_SHOWN])} among {len(texts)}. Check their spelling."
            )
        assert self.trainer is not None

        def batch(indices: NDArray[np.int64]) -> TokenBatch:
            return module.encode([chosen[i] for i in indices], self.max_length)

        return ReplayableLoader(
            batch,
            len(chosen),
            self.batch_size,
            seed,
            self.trainer.global_rank,
            self.trainer.world_size,
        )

    def train_dataloader(self) -> ReplayableLoader[TokenBatch]:
        """The training side's texts with a new token, shuffled anew for each epoch."""
        return self._loader(self.training, self.seed)

    def val_dataloader(self) -> ReplayableLoader[TokenBatch]:
        """The validation side's texts with a new token, in order."""
        return self._loader(self.validation, None)

    def test_dataloader(self) -> ReplayableLoader[TokenBatch]:
        """The texts of `test_path` with a new token, in order."""
        return self._loader(self._asked(), None)

    def predict_dataloader(self) -> DataLoader[TokenBatch]:
        """The prompts, in order, one at a time."""
        self.given_texts = self.given_texts or self._asked()
        module = self._module()
        prompts = [module.encode([text], self.max_length) for text in self.given_texts]
        # A prompt of one token is padded, and would be continued after that.
        short = [{k: v[:, : int(p["attention_mask"].sum())] for k, v in p.items()} for p in prompts]
        return DataLoader(short, batch_size=None)  # type: ignore[arg-type]  # a list has items

    def _asked(self) -> list[str]:
        return read_texts(self.test_path) if self.test_path else self.validation


class NewTokens(CausalModel):
    """A causal language model that learns the rows of new tokens, and nothing else.

    It says before and after training what the loss is on held-out texts with and without the new
    tokens, how far the logits of texts without them are from the original model's, and which
    tokens are nearest to the new ones; then the rows lie in `rows.safetensors` beside the log, and
    the whole model in a folder that plain `transformers` loads.

    Args:
        name: A model of the Hugging Face hub or a local folder. By default a small one, randomly
            initialized and trained here, in less than a minute, on the texts.
        init: What new rows begin from, as for `add_tokens`.
        lr: The learning rate of AdamW.
        weight_decay: The weight decay of AdamW.
        max_new_tokens: How many tokens `predict` adds to a prompt.

    Raises:
        InputError: When training starts: the data have no tokens, or the tokenizer has them.

    Example:
        >>> NewTokens(lr=0.01).hparams["lr"]
        0.01
    """

    def __init__(
        self,
        name: str | None = None,
        init: Literal["pieces", "mean"] = "pieces",
        lr: float = 1e-2,
        weight_decay: float = 0.01,
        max_new_tokens: int = 20,
    ) -> None:
        super().__init__(lr, weight_decay, max_new_tokens)
        # Loggers would open their files before the data are accepted.
        self.save_hyperparameters(logger=False)
        self.name = name
        self.init = init
        self.rows: list[int] = []

    def setup(self, stage: str) -> None:
        """Load the model, or train a small one, and add the tokens.

        Args:
            stage: `"fit"`; for others the checkpoint has all of it.
        """
        if self.rows or stage != "fit":
            return
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, TokenTexts):
            raise InputError(
                f"NewTokens takes its tokens from TokenTexts. Received: {type(data).__name__}. "
                "Pass datamodule=TokenTexts(…)."
            )
        self.model, self.tokenizer = (
            pretrained(self.name) if self.name else small_language_model(data.training)
        )
        # A token that the original model does not know cannot be in a text compared with it.
        self._unchanged = [t for t in data.validation if not _has_word(t, data.tokens)]
        self._unchanged = self._unchanged[:_COMPARED]
        self._columns = self.model.get_input_embeddings().weight.shape[0]
        self._logits = self._logits_of(self._unchanged, data.max_length)
        self.rows = add_tokens(self.model, self.tokenizer, data.tokens, self.init)
        tables = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        learning = {id(parameter) for table in tables for parameter in table.parameters()}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in learning)
        self.model.train()
        self.vocabulary = vocabulary_of(self.tokenizer, len(tables[0].weight), self.rows)

    # Texts

    def with_new_tokens(self, texts: list[str]) -> list[str]:
        """Those of some texts in which the tokenizer finds a new token.

        Args:
            texts: Any texts.
        """
        data: TokenTexts = self.trainer.datamodule  # type: ignore[attr-defined]  # of this trainer
        new = set(self.tokenizer.convert_tokens_to_ids(data.tokens))
        return [text for text in texts if new & set(self.tokenizer(text)["input_ids"])]

    @torch.no_grad()
    def _logits_of(self, texts: list[str], max_length: int) -> Tensor:
        """The logits of the original tokens, one after the other, shape (N, V)."""
        if not texts:
            return torch.zeros(0, self._columns)
        was_training = self.model.training
        self.model.eval()
        batch = {k: v.to(self.device) for k, v in self.encode(texts, max_length).items()}
        logits: Tensor = self.model(**batch).logits[batch["attention_mask"] > 0].cpu()
        self.model.train(was_training)
        return logits[:, : self._columns]

    def _mean_loss(self, texts: list[str], data: TokenTexts) -> float:
        total, count = self.total_loss(texts, data.max_length, data.batch_size)
        return total / count if count else float("nan")

    # Before and after

    def _say(self, when: str) -> None:
        data: TokenTexts = self.trainer.datamodule  # type: ignore[attr-defined]  # of this trainer
        having = self.with_new_tokens(data.validation)
        without = [text for text in data.validation if text not in set(having)][: 4 * _COMPARED]
        self.print(
            f"{when}: loss on {len(having)} texts with new tokens "
            f"{self._mean_loss(having, data):.3f}, on {len(without)} without "
            f"{self._mean_loss(without, data):.3f}"
        )
        now = self._logits_of(self._unchanged, data.max_length)
        apart = (now - self._logits).abs().max().item() if len(now) else 0.0
        self.print(
            f"{when}: logits of {len(self._unchanged)} texts without new tokens differ from the "
            f"original model's by {apart:.1e} at most"
        )
        for row in self.rows[:_SHOWN]:
            self.print(f"{when}: near {self.vocabulary.tokens[row]!r}: {self._nearest(row)}")

    @torch.no_grad()
    def _nearest(self, row: int) -> str:
        table = self.model.get_input_embeddings().weight
        near = F.cosine_similarity(table, table[row].unsqueeze(0)).index_fill(
            0, torch.tensor(row, device=table.device), -2.0
        )
        best = near.topk(min(_NEIGHBOURS, len(near)))
        return ", ".join(
            f"{self.vocabulary.tokens[i]} {share:.2f}"
            for share, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        )

    def on_train_start(self) -> None:
        """Say what the model can do with the new tokens so far."""
        self._say("before")

    def on_train_end(self) -> None:
        """Say what it has learned, and write the rows and the model."""
        self._say("after")
        if self.trainer.is_global_zero and self.trainer.log_dir:
            path = Path(self.trainer.log_dir) / "rows.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_rows(self.model, path, self.tokenizer)
            print(f"rows: {shown(path)}")
        super().on_train_end()


def _has_word(text: str, words: list[str]) -> bool:
    lower = text.lower()
    return any(word.lower() in lower for word in words)


def _lines(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: a text file is UTF-8. Received: {error}.") from None
    except OSError as error:
        raise InputError(
            f"{path}: the file cannot be read: {error.strerror}. Check the path."
        ) from None
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise InputError(f"{path}: a file has one entry on each line. Received an empty one.")
    return found
