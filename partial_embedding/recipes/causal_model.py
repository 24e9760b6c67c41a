"""What the recipes of language models share: texts, losses, checkpoints that are enough alone."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor

from partial_embedding.errors import InputError
from partial_embedding.files import shown
from partial_embedding.recipes.predictions import write_table
from partial_embedding.recipes.resume import ReplayableLoader
from partial_embedding.recipes.settings import check_range
from partial_embedding.recipes.small_language_model import TokenBatch, batch_of
from partial_embedding.recipes.text.labelled import are_held_out
from partial_embedding.recipes.text.reading import read_texts
from partial_embedding.rows.vocabulary import Vocabulary

Data = TypeVar("Data")

# Under which a checkpoint has the model's configuration and the files of its tokenizer.
_KEY = "language_model"


class CausalModel(LightningModule):
    """A causal language model of `transformers` and its tokenizer.

    A checkpoint holds both, so that `test` and `predict` need nothing else. When training ends, a
    folder `model` beside the log holds what plain `transformers` loads.
    """

    model: Any
    tokenizer: Any
    vocabulary: Vocabulary

    def __init__(self, lr: float, weight_decay: float, max_new_tokens: int) -> None:
        super().__init__()
        # Loggers would open their files before the data are accepted.
        self.save_hyperparameters(logger=False)
        check_range("lr", lr, 0)
        check_range("weight_decay", weight_decay, 0)
        check_range("max_new_tokens", max_new_tokens, 1)
        self.model = None  # until it is loaded, trained or read from a checkpoint

    def data_of(self, kind: type[Data]) -> Data:
        """The datamodule of the run; one of another kind is refused."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, kind):
            name = kind.__name__
            raise InputError(
                f"{type(self).__name__} takes its texts from {name}. Received: "
                f"{type(data).__name__}. Pass datamodule={name}(…)."
            )
        return data

    def encode(self, texts: Sequence[str], max_length: int) -> TokenBatch:
        """Make a batch of texts that are cut after some tokens."""
        return batch_of([self.tokenizer(text)["input_ids"][:max_length] for text in texts])

    @torch.no_grad()
    def measured(
        self, texts: Sequence[str], max_length: int, batch_size: int
    ) -> Iterator[tuple[TokenBatch, Any]]:
        """Batches of texts, and what the model gives for each, without dropout."""
        was_training = self.model.training
        self.model.eval()
        for start in range(0, len(texts), batch_size):
            batch = self.encode(texts[start : start + batch_size], max_length)
            batch = {key: value.to(self.device) for key, value in batch.items()}
            yield batch, self.model(**batch)
        self.model.train(was_training)

    def total_loss(
        self, texts: Sequence[str], max_length: int, batch_size: int
    ) -> tuple[float, int]:
        """The loss of texts, summed over their tokens, and the number of these."""
        total, count = 0.0, 0
        for batch, output in self.measured(texts, max_length, batch_size):
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            total += float(output.loss) * tokens
            count += tokens
        return total, count

    # Training and measuring

    def forward(self, **batch: Tensor) -> Any:
        """What the language model gives, loss and logits among it."""
        return self.model(**batch)

    def _loss(self, batch: TokenBatch, name: str, **options: Any) -> Tensor:
        loss: Tensor = self(**batch).loss
        self.log(name, loss, batch_size=len(batch["labels"]), **options)
        return loss

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """The loss of the next token."""
        return self._loss(batch, "train_loss", on_step=False, on_epoch=True)

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Log the loss as `val_loss`."""
        self._loss(batch, "val_loss", prog_bar=True, sync_dist=True)

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Log the loss as `test_loss`."""
        self._loss(batch, "test_loss")

    def predict_step(self, batch: TokenBatch, batch_idx: int) -> list[str]:
        """The most likely continuation of a prompt, alone in its batch."""
        # One of a single token was padded.
        length = int(batch["attention_mask"].sum())
        given = {key: batch[key][:, :length] for key in ("input_ids", "attention_mask")}
        made = self.model.generate(
            **given,
            max_new_tokens=self.hparams["max_new_tokens"],
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id or 0,
        )
        texts: list[str] = self.tokenizer.batch_decode(made[:, length:], skip_special_tokens=True)
        return texts

    def train_tables(
        self, new: Sequence[int], counts: Counter[int] | None = None, body: bool = False
    ) -> None:
        """Let the tables train, of which some rows are new and so `missing`, and the body if asked.

        Tokens of the texts may have been counted.
        """
        tables = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        learning = {id(parameter) for table in tables for parameter in table.parameters()}
        for parameter in self.model.parameters():
            parameter.requires_grad_(body or id(parameter) in learning)
        self.model.train()
        # Some models have more rows than their tokenizer has tokens.
        tokens = Vocabulary.of(self.tokenizer, len(tables[0].weight)).tokens
        each = None if counts is None else [counts[row] for row in range(len(tokens))]
        self.vocabulary = Vocabulary(tokens, each, new)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A plain AdamW; frozen rows are out of its reach."""
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        own = self.hparams
        return torch.optim.AdamW(learning, lr=own["lr"], weight_decay=own["weight_decay"])

    # What is kept

    def write_predictions(
        self, output: str | Path, texts: Sequence[str], batches: Sequence[Any], top_k: int = 1
    ) -> None:
        """Write how prompts go on, each in one way, whatever `top_k` is."""
        said = [text for batch in batches for text in batch]
        write_table(output, ["text", "continuation"], list(zip(texts, said, strict=True)))

    def on_train_end(self) -> None:
        """Write the model for plain `transformers`."""
        if self.trainer.is_global_zero and self.trainer.log_dir:
            folder = Path(self.trainer.log_dir) / "model"
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            print(f"model: {shown(folder)}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put in what the rows mean, and what the model is made of."""
        checkpoint["tokens"] = list(self.vocabulary.tokens)
        with tempfile.TemporaryDirectory() as folder:
            self.model.config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            # As text, whatever they are: a checkpoint is read without unpickling anything else.
            checkpoint[_KEY] = {
                str(path.relative_to(folder)): path.read_bytes().decode("latin-1") for path in files
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other tokens; make the model where there is none yet."""
        if _KEY not in checkpoint:
            raise InputError(
                "a checkpoint belongs to the model that it was trained with. Received one of "
                "another kind for a language model. Name one that this configuration made."
            )
        if self.model is None:
            self._build(checkpoint[_KEY])
        elif checkpoint["tokens"] != list(self.vocabulary.tokens):
            raise InputError(
                "a checkpoint belongs to the tokens it was trained on. Received one of others. "
                "Pass the model, the texts and the tokens that it was trained with."
            )

    def _build(self, files: dict[str, str]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.encode("latin-1"))
            config = transformers.AutoConfig.from_pretrained(folder)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        make: Any = transformers.AutoModelForCausalLM
        self.model = make.from_config(config)


def pretrained(name: str) -> tuple[Any, Any]:
    """A model of the Hugging Face hub or of a local folder, and its tokenizer."""
    try:
        return (
            transformers.AutoModelForCausalLM.from_pretrained(name),
            transformers.AutoTokenizer.from_pretrained(name),
        )
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"a model is a name on the Hugging Face hub or a local folder. Received {name!r}: "
            f"{reason.rstrip('.')}. Check the spelling."
        ) from None


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
        self.path, self.test_path = path, test_path
        self.max_length, self.batch_size = max_length, batch_size
        self.validation_share, self.seed = validation_share, seed
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
                f"{type(module).__name__}. Pass these data to the trainer of one, as NewTokens is."
            )
        return module

    def _loader(
        self, texts: list[str], seed: int | None = None, batch_size: int | None = None
    ) -> ReplayableLoader[TokenBatch]:
        module = self._module()

        def batch(indices: NDArray[np.int64]) -> TokenBatch:
            return module.encode([texts[i] for i in indices], self.max_length)

        size = batch_size or self.batch_size
        rank, world_size = module.trainer.global_rank, module.trainer.world_size
        return ReplayableLoader(batch, len(texts), size, seed, rank, world_size)
