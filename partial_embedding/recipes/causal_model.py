"""What the recipes of language models share: batches, losses, checkpoints that are enough alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from pytorch_lightning import LightningModule
from torch import Tensor

from partial_embedding.errors import InputError
from partial_embedding.files import shown
from partial_embedding.recipes.predictions import write_table
from partial_embedding.recipes.settings import check_range
from partial_embedding.rows.vocabulary import Vocabulary

# Token ids and what of them counts in the loss, each of shape (B, L).
TokenBatch = dict[str, Tensor]

Data = TypeVar("Data")

# Under which a checkpoint has the model's configuration and the files of its tokenizer.
_KEY = "language_model"


class CausalModel(LightningModule):
    """A causal language model of `transformers` and its tokenizer.

    A checkpoint holds both, so that `test` and `predict` need nothing else. When training ends, a
    folder `model` beside the log holds what plain `transformers` loads.

    Args:
        lr: The learning rate of AdamW.
        weight_decay: The weight decay of AdamW.
        max_new_tokens: How many tokens `predict` adds to a prompt.
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
        self.lr = lr
        self.weight_decay = weight_decay
        self.max_new_tokens = max_new_tokens

    def data_of(self, kind: type[Data]) -> Data:
        """The datamodule of the run.

        Raises:
            InputError: It is of another kind.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, kind):
            name = kind.__name__
            raise InputError(
                f"{type(self).__name__} takes its texts from {name}. Received: "
                f"{type(data).__name__}. Pass datamodule={name}(…)."
            )
        return data

    def encode(self, texts: Sequence[str], max_length: int) -> TokenBatch:
        """Make a batch of texts that are cut after some tokens.

        Returns:
            `input_ids`, `attention_mask` and `labels`, each of shape (B, L), int64; padding is -100
            in the labels.
        """
        rows = [self.tokenizer(t)["input_ids"][:max_length] for t in texts]
        width = max(2, *map(len, rows))  # a loss of the next token needs two
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        labels = ids.masked_fill(mask == 0, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

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
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id or 0,
        )
        texts: list[str] = self.tokenizer.batch_decode(made[:, length:], skip_special_tokens=True)
        return texts

    def train_tables(self, body: bool = False) -> int:
        """Let the tables, or the rows of them that do, train, and nothing but the body if at all.

        Returns:
            The rows of the input table.
        """
        tables = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        learning = {id(parameter) for table in tables for parameter in table.parameters()}
        for parameter in self.model.parameters():
            parameter.requires_grad_(body or id(parameter) in learning)
        self.model.train()
        return len(tables[0].weight)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A plain AdamW; frozen rows are out of its reach."""
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(learning, lr=self.lr, weight_decay=self.weight_decay)

    # What is kept

    def write_predictions(
        self, output: str | Path, texts: Sequence[str], batches: Sequence[Any]
    ) -> None:
        """Write how prompts go on, as a CSV file, or to the terminal for `-`."""
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
        """Refuse a checkpoint of other tokens; make the model where there is none yet.

        Raises:
            InputError: The checkpoint is of another kind of model, or the tokens are others.
        """
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
    """A model of the Hugging Face hub or of a local folder, and its tokenizer.

    Raises:
        InputError: There is none.
    """
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


def vocabulary_of(tokenizer: Any, num_rows: int, new: Sequence[int], counts: Any = None) -> Any:
    """What the rows of a table mean, some of which are new and so `missing`.

    Some models have more rows than their tokenizer has tokens.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    tokens += [f"<row {row}>" for row in range(len(tokens), num_rows)]
    return Vocabulary(tokens[:num_rows], counts, new)
