"""Text classification in Keras: the texts, vectors, model and schedule of the Lightning recipe.

`partial-embedding fit --config configs/quickstart.yaml` runs it where Lightning is not installed,
as `keras_commands` says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import yaml
from keras import ops
from numpy.typing import NDArray

from partial_embedding.callbacks.keras import RowMonitor, RowUnfreezing
from partial_embedding.errors import InputError, did_you_mean
from partial_embedding.files import claim_version, shown, write_atomically, write_text
from partial_embedding.recipes.prepare_texts import (
    PADDING_ID,
    WIDTHS,
    PreparedTexts,
    TextSettings,
    padded,
    prepare_texts,
)
from partial_embedding.recipes.settings import (
    ClassifierSettings,
    check_range,
    diverged,
    read_settings,
)
from partial_embedding.tensorflow import PartialEmbedding, rowwise

# The name of the table, for schedules of several.
TABLE = "embedding"
# What a configuration of the Lightning recipe has besides, which changes nothing of the training.
_LEFT_OUT = {"best", "last", "monitor", "random_state"}


class TextBatches(keras.utils.PyDataset):
    """Batches of the rows of texts, in an order that is a function of the seed and the epoch.

    Example:
        >>> batches = TextBatches([[2], [3, 4]], np.array([1, 0]), batch_size=2)
        >>> ids, labels = batches[0]
        >>> ids.tolist(), labels.tolist()
        ([[2, 0, 0, 0, 0], [3, 4, 0, 0, 0]], [1, 0])
    """

    def __init__(
        self,
        rows: list[list[int]],
        labels: NDArray[np.int64],
        batch_size: int,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.rows, self.labels = rows, labels
        self.batch_size = batch_size
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, counted from 0."""
        self.order = np.arange(len(self.rows))
        if self.seed is not None:
            np.random.default_rng((self.seed, epoch)).shuffle(self.order)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        return padded([self.rows[i] for i in chosen]), self.labels[chosen]


class EpochSeeds(keras.callbacks.Callback):
    """Makes the order of the data and the random numbers of an epoch follow from its number.

    Weight files hold no random state, so a run that is resumed would drop other features out.
    """

    def __init__(self, batches: TextBatches, seed: int = 0) -> None:
        super().__init__()
        self.batches = batches
        self.seed = seed

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Set what the epoch begins with."""
        self.batches.set_epoch(epoch)
        for place, layer in enumerate(self.model.layers):
            if (generator := getattr(layer, "seed_generator", None)) is not None:
                state = np.random.SeedSequence((self.seed, epoch, place)).generate_state(2)
                generator.state.assign(state & 0x7FFFFFFF)


class StopDiverged(keras.callbacks.Callback):
    """Ends a run whose loss is no finite number."""

    epoch = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Know the epoch."""
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Refuse a loss that is infinite or not a number."""
        # Keras's is the mean of the epoch so far, which such a loss spoils.
        if not math.isfinite(loss := float(logs["loss"])):
            steps = int(self.model.optimizer.iterations) - 1
            raise diverged(loss, steps, self.epoch)


@keras.saving.register_keras_serializable("partial_embedding")
class MaxOverText(keras.layers.Layer):
    """The largest activation of each channel, over windows that begin inside the text.

    Windows that begin behind a text would make it depend on the longest of its batch.

    Example:
        >>> activations = np.array([[[1.0], [5.0]]])
        >>> MaxOverText(2)(activations, np.array([[7, 8, 0]])).numpy()
        array([[1.]], dtype=float32)
    """

    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = width

    def call(self, activations: Any, ids: Any) -> Any:
        """From (B, L - width + 1, channels), not negative, and ids, (B, L), to (B, channels)."""
        lengths = ops.sum(ops.cast(ids != PADDING_ID, "int32"), axis=1, keepdims=True)
        begins = ops.arange(ops.shape(activations)[1], dtype="int32")
        inside = begins <= ops.maximum(lengths - self.width, 0)
        return ops.max(ops.where(inside[..., None], activations, 0.0), axis=1)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), "width": self.width}


@keras.saving.register_keras_serializable("partial_embedding")
class MeanOfText(keras.layers.Layer):
    """The average of the vectors of a text; padding adds nothing.

    Example:
        >>> MeanOfText()(np.array([[[2.0], [9.0]]]), np.array([[7, 0]])).numpy()
        array([[2.]], dtype=float32)
    """

    def call(self, words: Any, ids: Any) -> Any:
        """From (B, L, D) and ids, (B, L), to (B, D)."""
        is_word = ops.cast(ids != PADDING_ID, words.dtype)[..., None]
        return ops.sum(words * is_word, axis=1) / ops.maximum(ops.sum(is_word, axis=1), 1.0)


def text_classifier(data: PreparedTexts, settings: ClassifierSettings, lazy: bool = False) -> Any:
    """A small text classifier over a partly trainable table of word vectors, compiled.

    It goes from ids, shape (B, L), filled up with 0, to one score per class, (B, C), as
    `text_classifier.TextClassifier` does, which is the same model in torch.
    """
    # All rows train until a schedule reserves those that it will train.
    table = PartialEmbedding.from_matrix(data.table, freeze_padding=True, name=TABLE)
    ids = keras.Input((None,), dtype="int64", name="ids")
    dropout = keras.layers.Dropout
    words = dropout(settings.dropout)(table(ids))
    if settings.encoder == "cnn":
        convolution = partial(keras.layers.Conv1D, settings.channels, activation="relu")
        convolved = [convolution(kernel_size=width)(words) for width in WIDTHS]
        pooled = [MaxOverText(w)(c, ids) for w, c in zip(WIDTHS, convolved, strict=True)]
        features = keras.layers.Concatenate()(pooled)
    else:
        features = MeanOfText()(words, ids)
    scores = keras.layers.Dense(len(data.training.names))(dropout(settings.dropout)(features))
    model = keras.Model(ids, scores)
    optimizer = keras.optimizers.AdamW(settings.lr, weight_decay=settings.weight_decay)
    model.compile(
        rowwise(optimizer, lazy=lazy),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


@dataclass(frozen=True)
class RowSettings:
    """Which rows train, and when: what `RowUnfreezing` takes."""

    schedule: dict[str, Any] | str = field(
        default_factory=lambda: {"stages": [{"epoch": 0, "rows": "missing"}]}
    )
    lazy: bool = False
    audit: bool | int = True


@dataclass(frozen=True)
class TrainerSettings:
    """How long training goes, and in which folder the run gets one of its own."""

    max_epochs: int = 10
    default_root_dir: str = "runs"

    def __post_init__(self) -> None:
        check_range("max_epochs", self.max_epochs, 1)
        if (root := Path(self.default_root_dir)).exists() and not root.is_dir():
            raise InputError(
                f"default_root_dir is a folder. Received: {shown(root)}, a file. Name another."
            )


# The parts of a configuration, in the order of `--help`.
SETTINGS: dict[str, type[Any]] = {
    "data": TextSettings,
    "model": ClassifierSettings,
    "rows": RowSettings,
    "trainer": TrainerSettings,
}


def read_parts(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All settings of each part of a configuration."""
    if unknown := [part for part in config if part not in {*SETTINGS, *_LEFT_OUT}]:
        raise InputError(
            f"in Keras, a configuration has the parts {sorted(SETTINGS)}. Received: "
            f"{unknown[0]!r}.{did_you_mean(unknown[0], SETTINGS, ' Remove it.')}"
        )
    return {
        part: read_settings(made, part, config.get(part, {})) for part, made in SETTINGS.items()
    }


def train(config: Mapping[str, Mapping[str, Any]]) -> Path:
    """Train a text classifier, save it with what its rows and classes mean, and give the folder.

    It holds `model.keras` and `meaning.json`; and `config.yaml`, `rows.json` and logs for
    TensorBoard, of which `partial-embedding report` makes a page.
    """
    settings = read_parts(config)
    texts: TextSettings = settings["data"]
    rows: RowSettings = settings["rows"]
    trainer: TrainerSettings = settings["trainer"]
    if left_out := sorted(_LEFT_OUT & config.keys()):
        print(f"in Keras, these parts of the configuration are left out: {', '.join(left_out)}")
    keras.utils.set_random_seed(texts.seed)
    data = prepare_texts(texts, print)
    unfreezing = RowUnfreezing(rows.schedule, vocabulary=data.vocabulary, audit=rows.audit)
    model = text_classifier(data, settings["model"], rows.lazy)
    training, validation = (
        TextBatches(texts.encode(side.texts, data.vocabulary), side.labels, texts.batch_size, seed)
        for side, seed in ((data.training, texts.seed), (data.validation, None))
    )
    root = Path(trainer.default_root_dir)
    folder = root / f"version_{claim_version(root)}"
    model.fit(
        training,
        validation_data=validation,
        epochs=trainer.max_epochs,
        shuffle=False,
        verbose=2,
        callbacks=[
            unfreezing,
            RowMonitor(folder, vocabulary=data.vocabulary, unfreezing=unfreezing),
            EpochSeeds(training, texts.seed),
            StopDiverged(),
        ],
    )
    plain = {part: dict(keys) for part, keys in config.items()}
    write_text(folder / "config.yaml", yaml.safe_dump(plain, sort_keys=False))
    with write_atomically(folder / "model.keras") as path:
        model.save(path)
    tokens, names = data.vocabulary.tokens, data.training.names
    meaning = {"tokens": tokens, "names": names, "texts": asdict(texts)}
    write_text(folder / "meaning.json", json.dumps(meaning))
    print(f"saved: {shown(folder / 'model.keras')}")
    return folder
