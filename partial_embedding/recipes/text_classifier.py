"""Text classification: a datamodule over labelled texts and word vectors, and a small model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from partial_embedding.errors import InputError
from partial_embedding.files import shown
from partial_embedding.recipes.predictions import write_predictions
from partial_embedding.recipes.prepare_texts import (
    PADDING_ID,
    WIDTHS,
    PreparedTexts,
    TextSettings,
    padded,
    prepare_texts,
    texts_to_predict,
    texts_to_test,
    texts_to_validate,
)
from partial_embedding.recipes.resume import ReplayableLoader
from partial_embedding.recipes.settings import ClassifierSettings
from partial_embedding.recipes.vectors import save_vectors
from partial_embedding.rows.vocabulary import Vocabulary
from partial_embedding.rows.vocabulary_file import write_vocabulary
from partial_embedding.torch import PartialEmbedding

# Token ids, shape (B, L), and labels, shape (B,), both int64.
TextBatch = tuple[Tensor, Tensor]
VectorSuffix = Literal["vec", "txt", "bin", "vec.gz", "txt.gz", "bin.gz"]


class TextData(LightningDataModule):
    """Labelled texts, their vocabulary, and a table of word vectors for it.

    Each batch is a function of seed, epoch and batch number, so that a run which stops anywhere
    goes on exactly. When `setup("fit")` has run, `vocabulary` has the tokens of the rows with their
    counts and which were missing from the vectors, `table` the vectors, shape (V, D), float32, and
    `names` the classes. Row 0 is padding, row 1 every token that is not in the vocabulary.

    Where nothing is fitted, rows and classes are those of the model, which has them from its
    checkpoint, and no vectors are read.

    Args:
        **settings: Those of `TextSettings`.

    Example:
        >>> data = TextData(dimension=8, cache="")
        >>> data.setup("fit")
        >>> data.vocabulary.tokens[:2], data.table.shape == (len(data.vocabulary), 8)
        (('<pad>', '<unk>'), True)
    """

    names: tuple[str, ...]
    vocabulary: Vocabulary
    table: NDArray[np.float32]

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        # A checkpoint holds them, so that it is enough to measure it on other texts.
        self.save_hyperparameters(logger=False)
        self.settings = TextSettings(**settings)
        self._texts: PreparedTexts | None = None
        # What `predict` is asked for: lines of a file by default, or these.
        self.given_texts: Sequence[str] | None = None

    def prepare_data(self) -> None:
        """Train or convert vectors into the cache, in one process, before the others ask."""
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            self.setup("fit")

    def setup(self, stage: str) -> None:
        """Read, split and count texts, and make the table, once and only to fit."""
        if stage != "fit" or self._texts is not None:
            return
        self._texts = texts = prepare_texts(self.settings, self._say)
        self.vocabulary, self.table = texts.vocabulary, texts.table
        self.names = texts.training.names

    def train_dataloader(self) -> ReplayableLoader[TextBatch]:
        """The training side, shuffled anew for each epoch."""
        if self._texts is None:
            raise InputError("the data are set up first. Received none. Call setup('fit').")
        training = self._texts.training
        return self._loader(training.texts, training.labels, self.settings.seed)

    def val_dataloader(self) -> ReplayableLoader[TextBatch]:
        """The validation side, in order."""
        side = texts_to_validate(self.settings, self._meaning[1], self._say, self._texts)
        return self._loader(side.texts, side.labels)

    def test_dataloader(self) -> ReplayableLoader[TextBatch]:
        """The texts of `test_path`, or the validation side, in order."""
        side = texts_to_test(self.settings, self._meaning[1], self._say, self._texts)
        return self._loader(side.texts, side.labels)

    def predict_dataloader(self) -> ReplayableLoader[TextBatch]:
        """The texts of `test_path`, whether or not they have labels, in order."""
        texts = self.given_texts
        if texts is None:
            texts = texts_to_predict(self.settings, self._meaning[1], self._say, self._texts)
        self.given_texts = texts
        return self._loader(texts, np.zeros(len(texts), np.int64))

    def _say(self, line: str) -> None:
        if self.trainer is not None and self.trainer.is_global_zero:
            print(line)

    @property
    def _meaning(self) -> tuple[Vocabulary, tuple[str, ...]]:
        """The tokens of the rows and the classes: of the model where it is built."""
        module = self.trainer and self.trainer.lightning_module
        if isinstance(module, TextClassifier) and module.vocabulary is not None:
            return module.vocabulary, module.names
        if self._texts is None:
            raise InputError(
                "texts become rows by the vocabulary of a model that was trained. Received none. "
                "Pass ckpt_path, or call fit or setup('fit') first."
            )
        return self.vocabulary, self.names

    def _loader(
        self, texts: Sequence[str], labels: NDArray[np.int64], seed: int | None = None
    ) -> ReplayableLoader[TextBatch]:
        rows = self.settings.encode(texts, self._meaning[0])

        def batch(chosen: NDArray[np.int64]) -> TextBatch:
            ids = padded([rows[i] for i in chosen])
            return torch.from_numpy(ids), torch.from_numpy(labels[chosen])

        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return ReplayableLoader(batch, len(texts), self.settings.batch_size, seed, rank, world_size)


class TextClassifier(LightningModule):
    """A small text classifier over a partly trainable table of word vectors.

    It is built when it meets its data: the table, the vocabulary and the classes come from the
    datamodule, or from the checkpoint. A checkpoint holds all three, so it can be loaded alone, and
    one that was trained on another vocabulary is refused.

    Args:
        **settings: Those of `ClassifierSettings`.
        export: Which of word2vec's formats `fit` writes the trained vectors in, `vectors.vec` for
            example, in the folder of the log; `vec` and `txt` are text, `bin` is binary. None
            writes none.
    """

    embedding: PartialEmbedding
    names: tuple[str, ...]

    def __init__(self, *, export: VectorSuffix | None = None, **settings: Any) -> None:
        super().__init__()
        # Loggers would open their files before the data are accepted.
        self.save_hyperparameters(logger=False)
        self.settings, self.export = ClassifierSettings(**settings), export
        self.dropout = nn.Dropout(self.settings.dropout)
        self.vocabulary: Vocabulary | None = None

    def setup(self, stage: str) -> None:
        """Build the layers for the datamodule's table, once, unless a checkpoint will."""
        if self.vocabulary is None and stage == "fit":
            self._build_for_data()

    def _build_for_data(self) -> None:
        data = getattr(self._trainer, "datamodule", None)
        if not isinstance(data, TextData):
            raise InputError(
                "a TextClassifier takes its table from TextData, also where a checkpoint holds the "
                f"rows alone that trained. Received: {type(data).__name__}. Use a trainer with "
                "datamodule=TextData(…)."
            )
        data.setup("fit")
        self._build(data.vocabulary, data.names, torch.from_numpy(data.table.copy()))

    def _build(self, vocabulary: Vocabulary, names: tuple[str, ...], table: Tensor) -> None:
        self.vocabulary, self.names = vocabulary, names
        self.embedding = PartialEmbedding.from_pretrained(table, padding_idx=PADDING_ID)
        dimension, channels = table.shape[1], self.settings.channels
        cnn = self.settings.encoder == "cnn"
        self.encoder = _Convolutions(dimension, channels) if cnn else _Mean()
        self.head = nn.Linear(len(WIDTHS) * channels if cnn else dimension, len(names))
        self.train_accuracy, self.val_accuracy, self.test_accuracy = (
            MulticlassAccuracy(len(names), average="micro") for _ in range(3)
        )

    def forward(self, ids: Tensor) -> Tensor:
        """From rows of the table, shape (B, L), filled up with 0, to a score per class, (B, C)."""
        features: Tensor = self.encoder(self.embedding(ids), (ids != PADDING_ID).sum(1))
        scores: Tensor = self.head(self.dropout(features))
        return scores

    def training_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        """The cross-entropy of a batch."""
        return self._step(batch, "train", self.train_accuracy)

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Log loss and accuracy as `val_…`."""
        self._step(batch, "val", self.val_accuracy)

    def test_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Log loss and accuracy as `test_…`."""
        self._step(batch, "test", self.test_accuracy)

    def _step(self, batch: TextBatch, stage: str, accuracy: MulticlassAccuracy) -> Tensor:
        ids, labels = batch
        scores = self(ids)
        loss = F.cross_entropy(scores, labels)
        accuracy.update(scores, labels)
        log = partial(self.log, on_step=False, on_epoch=True, batch_size=len(labels))
        log(f"{stage}_loss", loss, sync_dist=stage != "train")
        log(f"{stage}_accuracy", accuracy, prog_bar=stage != "train")
        return loss

    def predict_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        """The probability of each class, shape (B, C)."""
        probabilities: Tensor = self(batch[0]).softmax(dim=1)
        return probabilities

    def write_predictions(
        self, output: str | Path, texts: Sequence[str], batches: Sequence[Any], top_k: int = 1
    ) -> None:
        """Write the likeliest classes of texts, given what `predict_step` said of each batch."""
        write_predictions(output, texts, torch.cat([*batches]).numpy(), self.names, top_k)

    def on_fit_end(self) -> None:
        """Write the table as word vectors, which gensim loads, where it was asked for.

        Beside them lies `vocabulary.tsv`, which `partial-embedding schedule` reads.
        """
        trainer = self.trainer
        if self.export is None or not trainer.is_global_zero:
            return
        assert self.vocabulary is not None  # setup comes first
        path = Path(trainer.log_dir or trainer.default_root_dir) / f"vectors.{self.export}"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = self.embedding.weight.detach().float().cpu().numpy()
        save_vectors(path, self.vocabulary.tokens, table)
        write_vocabulary(path.with_name("vocabulary.tsv"), self.vocabulary)
        print(f"vectors: {shown(path)}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A plain AdamW over all parameters; `RowUnfreezing` keeps it off the frozen rows."""
        lr, weight_decay = self.settings.lr, self.settings.weight_decay
        return torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=weight_decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put in what the rows and the classes mean."""
        assert self.vocabulary is not None  # setup comes first
        checkpoint["text"] = {"tokens": list(self.vocabulary.tokens), "names": list(self.names)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another vocabulary; build the layers where there are none yet."""
        saved = checkpoint.get("text")
        if saved is None:
            raise InputError(
                "a checkpoint of a TextClassifier holds its vocabulary. Received one without. "
                "Name a checkpoint that `fit` wrote."
            )
        table: Tensor | None = checkpoint["state_dict"].get("embedding.weight")
        if self.vocabulary is None and table is not None:
            self._build(Vocabulary(saved["tokens"]), tuple(saved["names"]), table.clone())
            return
        if self.vocabulary is None:
            self._build_for_data()
        assert self.vocabulary is not None  # it is built now
        _refuse_another("vocabulary", "tokens", saved["tokens"], self.vocabulary.tokens)
        _refuse_another("classes", "classes", saved["names"], self.names)
        if table is not None and table.shape != self.embedding.weight.shape:
            raise InputError(
                f"the checkpoint's vectors have {table.shape[1]} values each. Received data with "
                f"{self.embedding.weight.shape[1]}. Pass the vectors that it was trained with."
            )


class _Convolutions(nn.Module):
    """Convolutions over words, and the largest activation of each channel."""

    def __init__(self, dimension: int, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(dimension, channels, width) for width in WIDTHS)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """From (B, L, D) and the number of words of each text, (B,), to (B, features)."""
        words = words.transpose(1, 2)
        pooled = []
        for layer, width in zip(self.layers, WIDTHS, strict=True):
            activations = F.relu(layer(words))
            # Windows that begin behind a text would make it depend on the longest of its batch.
            last = (lengths - width).clamp(min=0).unsqueeze(1)
            behind = torch.arange(activations.shape[2], device=words.device) > last
            pooled.append(activations.masked_fill(behind.unsqueeze(1), 0).amax(2))
        return torch.cat(pooled, dim=1)


class _Mean(nn.Module):
    """The average of the words' vectors; padding is zero and adds nothing."""

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """From (B, L, D) and the number of words of each text, (B,), to (B, D)."""
        return words.sum(1) / lengths.clamp(min=1).unsqueeze(1)


def _refuse_another(what: str, units: str, saved: list[str], given: tuple[str, ...]) -> None:
    if saved == list(given):
        return
    pairs = enumerate(zip_longest(saved, given))
    differ = next(i for i, (a, b) in pairs if a != b)
    raise InputError(
        f"a checkpoint belongs to the {what} it was trained on, {len(saved):,} {units}. Received "
        f"data with {len(given):,}, the first other one at {differ}. Pass the data and the seed "
        "that it was trained with; texts of your own to test go to data.test_path."
    )
