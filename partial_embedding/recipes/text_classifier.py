"""Text classification: a datamodule over labelled texts and word vectors, and a small model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from partial_embedding.errors import InputError
from partial_embedding.recipes.prepare_texts import PADDING_ID, WIDTHS, prepare_texts
from partial_embedding.recipes.resume import ReplayableLoader
from partial_embedding.recipes.text import LabelledTexts, encode, pad, read_labelled, tokenize
from partial_embedding.rows.vocabulary import Vocabulary
from partial_embedding.torch import PartialEmbedding

# Token ids, shape (B, L), and labels, shape (B,), both int64.
TextBatch = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class _Encoded:
    """Texts as rows of the table."""

    source: LabelledTexts
    rows: list[list[int]]

    def batch(self, chosen: NDArray[np.int64]) -> TextBatch:
        ids = pad([self.rows[i] for i in chosen], PADDING_ID, min_length=max(WIDTHS))
        return torch.from_numpy(ids), torch.from_numpy(self.source.labels[chosen])


class TextData(LightningDataModule):
    """Labelled texts, their vocabulary, and a table of word vectors for it.

    Each batch is a function of seed, epoch and batch number, so that a run which stops anywhere
    goes on exactly. When `setup` has run, `vocabulary` has the tokens of the rows with their counts
    and which were missing from the vectors, `table` the vectors, shape (V, D), float32, and `names`
    the classes. Row 0 is padding, row 1 every token that is not in the vocabulary.

    Args:
        path: A file or folder as `partial_embedding.recipes.text.read_labelled` reads it; by
            default the docstrings of the standard library.
        text_column: The column or key that holds the text.
        label_column: The column or key that holds the name of the class.
        test_path: Texts with the same classes for `test` and `predict`; by default the validation
            side.
        vectors: A file as `partial_embedding.recipes.vectors.read_vectors` reads it; by default
            gensim trains vectors on the training side.
        dimension: The values per vector that a file must have, or that trained vectors get (50).
        lowercase: Whether to lower-case texts, as most word vectors need.
        missing_scale: How far rows without a vector are drawn from zero, as a share of the scale
            of those with one.
        min_count: Tokens that are rarer in the training side become the unknown token.
        max_length: Texts are cut after this many tokens.
        validation_share: The share of texts held out, chosen by a hash of each text.
        batch_size: Texts per batch.
        seed: Divides, shuffles and draws; another seed does so differently.
        cache: The folder that keeps trained vectors, by default `partial_embedding` in the user's
            cache folder; an empty string keeps nothing.

    Raises:
        InputError: When the data are set up: files are missing, malformed or do not fit.

    Example:
        >>> data = TextData(dimension=8, cache="")
        >>> data.setup("fit")
        >>> data.vocabulary.tokens[:2], data.table.shape == (len(data.vocabulary), 8)
        (('<pad>', '<unk>'), True)
    """

    names: tuple[str, ...]
    vocabulary: Vocabulary
    table: NDArray[np.float32]

    def __init__(
        self,
        path: str | None = None,
        text_column: str = "text",
        label_column: str = "label",
        test_path: str | None = None,
        vectors: str | None = None,
        dimension: int | None = None,
        lowercase: bool = True,
        missing_scale: float = 1.0,
        min_count: int = 1,
        max_length: int = 100,
        validation_share: float = 0.15,
        batch_size: int = 50,
        seed: int = 0,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value < 1:
                raise InputError(f"{name} is at least 1. Received: {value}.")
        if seed < 0:
            raise InputError(f"a seed is a whole number from 0 up. Received: {seed}.")
        if dimension is not None and dimension < 1:
            raise InputError(f"dimension is at least 1. Received: {dimension}.")
        self.path = path
        self.text_column = text_column
        self.label_column = label_column
        self.test_path = test_path
        self.vectors = vectors
        self.dimension = dimension
        self.lowercase = lowercase
        self.missing_scale = missing_scale
        self.min_count = min_count
        self.max_length = max_length
        self.validation_share = validation_share
        self.batch_size = batch_size
        self.seed = seed
        self.cache = cache
        self._training: _Encoded | None = None

    def prepare_data(self) -> None:
        """Train vectors into the cache, in one process, before the others ask for them."""
        self._prepare()

    def setup(self, stage: str) -> None:
        """Read, split, count and encode, once.

        Args:
            stage: Any; all stages share a vocabulary.
        """
        self._prepare()

    def _prepare(self) -> None:
        if self._training is not None:
            return
        texts = prepare_texts(
            path=self.path,
            text_column=self.text_column,
            label_column=self.label_column,
            vectors=self.vectors,
            dimension=self.dimension,
            lowercase=self.lowercase,
            missing_scale=self.missing_scale,
            min_count=self.min_count,
            validation_share=self.validation_share,
            seed=self.seed,
            cache=self.cache,
        )
        self.vocabulary, self.table, self.names = (
            texts.vocabulary,
            texts.table,
            texts.training.names,
        )
        self._validation = self._encode(texts.validation)
        self._test = self._encode(self._test_texts()) if self.test_path else self._validation
        self._training = self._encode(texts.training)

    def _test_texts(self) -> LabelledTexts:
        texts = read_labelled(str(self.test_path), self.text_column, self.label_column)
        if unknown := sorted(set(texts.names) - set(self.names)):
            raise InputError(
                f"texts to test are of the classes {list(self.names)}. Received: {unknown[0]!r} "
                f"in {self.test_path}. Correct its labels."
            )
        index = np.array([self.names.index(name) for name in texts.names], np.int64)
        return LabelledTexts(texts.texts, index[texts.labels], self.names)

    def _encode(self, texts: LabelledTexts) -> _Encoded:
        tokens = (tokenize(text, self.lowercase) for text in texts.texts)
        return _Encoded(texts, [encode(t, self.vocabulary, self.max_length) for t in tokens])

    def _loader(self, texts: _Encoded | None, seed: int | None) -> ReplayableLoader[TextBatch]:
        if texts is None:
            raise InputError("the data are set up first. Received none. Call setup('fit').")
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return ReplayableLoader(
            texts.batch, len(texts.source), self.batch_size, seed, rank, world_size
        )

    def train_dataloader(self) -> ReplayableLoader[TextBatch]:
        """The training side, shuffled anew for each epoch."""
        return self._loader(self._training, self.seed)

    def val_dataloader(self) -> ReplayableLoader[TextBatch]:
        """The validation side, in order."""
        return self._loader(self._training and self._validation, None)

    def test_dataloader(self) -> ReplayableLoader[TextBatch]:
        """The texts of `test_path`, or the validation side, in order."""
        return self._loader(self._training and self._test, None)

    def predict_dataloader(self) -> ReplayableLoader[TextBatch]:
        """The same texts as for `test`."""
        return self.test_dataloader()

    @property
    def test_texts(self) -> LabelledTexts:
        """The texts that `test` and `predict` see, in their order."""
        return self._test.source


class TextClassifier(LightningModule):
    """A small text classifier over a partly trainable table of word vectors.

    It is built when it meets its data: the table, the vocabulary and the classes come from the
    datamodule, or from the checkpoint. A checkpoint holds all three, so it can be loaded alone, and
    one that was trained on another vocabulary is refused.

    Args:
        encoder: `"cnn"`, convolutions of widths 3, 4 and 5 with a maximum over time (Kim 2014,
            https://arxiv.org/abs/1408.5882), or `"mean"`, the average of the vectors.
        channels: Channels per width of the convolutions.
        dropout: The share of the encoder's features dropped in training.
        lr: The learning rate of AdamW.
        weight_decay: The weight decay of AdamW.

    Raises:
        InputError: When `fit` or `test` starts: the datamodule has no table, or the checkpoint is
            of another vocabulary.

    Example:
        >>> TextClassifier(encoder="mean").hparams["encoder"]
        'mean'
    """

    embedding: PartialEmbedding
    names: tuple[str, ...]

    def __init__(
        self,
        encoder: Literal["cnn", "mean"] = "cnn",
        channels: int = 64,
        dropout: float = 0.5,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        # Loggers would open their files before the data are accepted.
        self.save_hyperparameters(logger=False)
        self.encoder_kind = encoder
        self.channels = channels
        self.dropout = nn.Dropout(dropout)
        self.lr = lr
        self.weight_decay = weight_decay
        self.vocabulary: Vocabulary | None = None

    def setup(self, stage: str) -> None:
        """Build the layers for the datamodule's table, once.

        Args:
            stage: Any.
        """
        if self.vocabulary is not None:
            return
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, TextData):
            raise InputError(
                "a TextClassifier takes its table from TextData. Received: "
                f"{type(data).__name__}. Pass datamodule=TextData(…)."
            )
        self._build(data.vocabulary, data.names, torch.from_numpy(data.table.copy()))

    def _build(self, vocabulary: Vocabulary, names: tuple[str, ...], table: Tensor) -> None:
        self.vocabulary, self.names = vocabulary, names
        dimension = table.shape[1]
        self.embedding = PartialEmbedding.from_pretrained(table, padding_idx=PADDING_ID)
        cnn = self.encoder_kind == "cnn"
        self.encoder = _Convolutions(dimension, self.channels) if cnn else _Mean()
        features = len(WIDTHS) * self.channels if cnn else dimension
        self.head = nn.Linear(features, len(names))
        self.train_accuracy, self.val_accuracy, self.test_accuracy = (
            MulticlassAccuracy(len(names), average="micro") for _ in range(3)
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Score the classes of texts.

        Args:
            ids: Rows of the table, shape (B, L), int64, filled up with 0.

        Returns:
            One score per class, shape (B, C).
        """
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
        log(f"{stage}_accuracy", accuracy, prog_bar=True)
        return loss

    def predict_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        """The probability of each class, shape (B, C)."""
        probabilities: Tensor = self(batch[0]).softmax(dim=1)
        return probabilities

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A plain AdamW over all parameters; `RowUnfreezing` keeps it off the frozen rows."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put in what the rows and the classes mean."""
        assert self.vocabulary is not None  # setup comes first
        checkpoint["text"] = {"tokens": list(self.vocabulary.tokens), "names": list(self.names)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another vocabulary; build the layers where there are none yet.

        Raises:
            InputError: The tokens, the classes or the width of the vectors are others.
        """
        saved = checkpoint.get("text")
        if saved is None:
            raise InputError(
                "a checkpoint of a TextClassifier holds its vocabulary. Received one without. "
                "Name a checkpoint that `fit` wrote."
            )
        table: Tensor = checkpoint["state_dict"]["embedding.weight"]
        if self.vocabulary is None:
            self._build(Vocabulary(saved["tokens"]), tuple(saved["names"]), table.clone())
            return
        _refuse_another("vocabulary", "tokens", saved["tokens"], self.vocabulary.tokens)
        _refuse_another("classes", "classes", saved["names"], self.names)
        if table.shape != self.embedding.weight.shape:
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
    differ = next(
        (i for i, (a, b) in enumerate(zip(saved, given, strict=False)) if a != b),
        min(len(saved), len(given)),
    )
    raise InputError(
        f"a checkpoint belongs to the {what} it was trained on, {len(saved):,} {units}. Received "
        f"data with {len(given):,}, the first other one at {differ}. Pass the data and the seed "
        "that it was trained with; texts of your own to test go to data.test_path."
    )
