"""Text classification in Keras: the texts, vectors, model and schedule of the Lightning recipe.

Run it with `python -m partial_embedding.recipes.keras_text configs/quickstart.yaml`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import yaml
from keras import ops
from numpy.typing import NDArray

from partial_embedding.callbacks.keras import RowMonitor, RowUnfreezing
from partial_embedding.errors import FrozenRowsMoved, InputError
from partial_embedding.files import write_atomically
from partial_embedding.recipes.prepare_texts import PADDING_ID, WIDTHS, prepare_texts
from partial_embedding.recipes.text import LabelledTexts, encode, pad, tokenize
from partial_embedding.rows.vocabulary import Vocabulary
from partial_embedding.schedule import Schedule, schedules_by_table
from partial_embedding.tensorflow import PartialEmbedding, rowwise, schedule_rows

# The name of the table, for schedules of several.
_TABLE = "embedding"

# The keys of the Lightning recipe's configuration that this one reads, with their defaults.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "rows": {
        "schedule": {"stages": [{"epoch": 0, "rows": "missing"}]},
        "lazy": False,
        "audit": False,
    },
    "trainer": {"max_epochs": 10, "default_root_dir": "runs"},
    "model": {"encoder": "cnn", "channels": 64, "dropout": 0.5, "lr": 1e-3, "weight_decay": 0.01},
    "data": {
        "path": None,
        "text_column": "text",
        "label_column": "label",
        "vectors": None,
        "dimension": None,
        "lowercase": True,
        "missing_scale": 1.0,
        "min_count": 1,
        "max_length": 100,
        "validation_share": 0.15,
        "batch_size": 50,
        "seed": 0,
        "cache": None,
    },
}


@dataclass(frozen=True, eq=False)
class TextData:
    """Texts as rows of a table, and the table.

    Args:
        vocabulary: The tokens of the rows, their counts and which were missing from the vectors.
        table: The vectors, shape (V, D), float32.
        names: The classes.
        training: The rows of each text, and the classes, shape (N,).
        validation: The same of the texts that were held out.
    """

    vocabulary: Vocabulary
    table: NDArray[np.float32]
    names: tuple[str, ...]
    training: tuple[list[list[int]], NDArray[np.int64]] = field(repr=False)
    validation: tuple[list[list[int]], NDArray[np.int64]] = field(repr=False)


def read_texts(settings: Mapping[str, Any]) -> TextData:
    """Read, split, count and encode texts, and find their vectors.

    Args:
        settings: The keys under `data` of a configuration.

    Raises:
        InputError: Files are missing, malformed or do not fit.
    """
    own = ("max_length", "batch_size")  # not read but made of the texts
    texts = prepare_texts(**{key: value for key, value in settings.items() if key not in own})
    vocabulary = texts.vocabulary

    def encoded(texts: LabelledTexts) -> tuple[list[list[int]], NDArray[np.int64]]:
        tokens = (tokenize(text, settings["lowercase"]) for text in texts.texts)
        rows = [encode(t, vocabulary, settings["max_length"]) for t in tokens]
        return rows, texts.labels

    sides = encoded(texts.training), encoded(texts.validation)
    return TextData(vocabulary, texts.table, texts.training.names, *sides)


class TextBatches(keras.utils.PyDataset):
    """Batches whose order is a function of the seed and the epoch.

    Args:
        texts: The rows of each text, and the classes.
        batch_size: The number of texts in each batch but the last.
        seed: Another seed shuffles differently; None keeps the order of the texts.

    Example:
        >>> batches = TextBatches(([[2], [3, 4]], np.array([1, 0])), batch_size=2)
        >>> ids, labels = batches[0]
        >>> ids.tolist(), labels.tolist()
        ([[2, 0, 0, 0, 0], [3, 4, 0, 0, 0]], [1, 0])
    """

    def __init__(
        self,
        texts: tuple[list[list[int]], NDArray[np.int64]],
        batch_size: int,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.rows, self.labels = texts
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
        ids = pad([self.rows[i] for i in chosen], PADDING_ID, min_length=max(WIDTHS))
        return ids, self.labels[chosen]


class EpochSeeds(keras.callbacks.Callback):
    """Makes the order of the data and the random numbers of an epoch follow from its number.

    Weight files hold no random state, so a run that is resumed would drop other features out.

    Args:
        batches: The training data.
        seed: Another seed draws differently.
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


@keras.saving.register_keras_serializable("partial_embedding")
class MaxOverText(keras.layers.Layer):
    """The largest activation of each channel, over windows that begin inside the text.

    Windows that begin behind a text would make it depend on the longest of its batch.

    Args:
        width: The width of the windows.
        **kwargs: All that `keras.layers.Layer` takes.

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

    def compute_output_shape(self, activations_shape: Any, ids_shape: Any) -> Any:
        """(B, channels)."""
        return (activations_shape[0], activations_shape[2])

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

    def compute_output_shape(self, words_shape: Any, ids_shape: Any) -> Any:
        """(B, D)."""
        return (words_shape[0], words_shape[2])


def text_classifier(
    data: TextData,
    schedule: Schedule,
    encoder: str = "cnn",
    channels: int = 64,
    dropout: float = 0.5,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    lazy: bool = False,
) -> Any:
    """A small text classifier over a partly trainable table of word vectors, compiled.

    Args:
        data: The texts that it will be trained on.
        schedule: When which rows train; the layer reserves them.
        encoder: `"cnn"`, convolutions of widths 3, 4 and 5 with a maximum over time (Kim 2014,
            https://arxiv.org/abs/1408.5882), or `"mean"`, the average of the vectors.
        channels: Channels per width of the convolutions.
        dropout: The share of features dropped in training.
        lr: The learning rate of AdamW.
        weight_decay: The weight decay of AdamW.
        lazy: Step only the rows that a batch touched, as `rowwise` does.

    Returns:
        A `keras.Model` from ids, shape (B, L), filled up with 0, to one score per class, (B, C).

    Raises:
        InputError: There is no such encoder, or the schedule does not fit the vocabulary.
    """
    if encoder not in ("cnn", "mean"):
        raise InputError(f"an encoder is 'cnn' or 'mean'. Received: {encoder!r}.")
    table = PartialEmbedding.from_matrix(
        data.table,
        trainable_rows=schedule.stages[0].rows.resolve(len(data.vocabulary), data.vocabulary),
        reserve_rows=schedule_rows(schedule, len(data.vocabulary), data.vocabulary),
        freeze_padding=True,
        name=_TABLE,
    )
    ids = keras.Input((None,), dtype="int64", name="ids")
    words = keras.layers.Dropout(dropout)(table(ids))
    if encoder == "cnn":
        features = keras.layers.Concatenate()(
            [
                MaxOverText(width)(
                    keras.layers.Conv1D(channels, width, activation="relu")(words), ids
                )
                for width in WIDTHS
            ]
        )
    else:
        features = MeanOfText()(words, ids)
    scores = keras.layers.Dense(len(data.names))(keras.layers.Dropout(dropout)(features))
    model = keras.Model(ids, scores)
    model.compile(
        rowwise(
            keras.optimizers.AdamW(lr, weight_decay=weight_decay),
            lazy=lazy,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def read_config(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Read a configuration of the Lightning recipe.

    Args:
        path: A YAML file with the keys `rows`, `trainer`, `model` and `data`.

    Returns:
        All keys that this recipe reads, with defaults for those that the file does not name.

    Raises:
        InputError: The file cannot be read, or has a key that this recipe does not know.
    """
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: a configuration is YAML in UTF-8. Received: {reason}.") from None
    config = {part: dict(keys) for part, keys in _DEFAULTS.items()}
    for part, keys in given.items() if isinstance(given, Mapping) else [("", None)]:
        if part not in config or not isinstance(keys, Mapping):
            raise InputError(
                f"{path}: a configuration has the parts {sorted(config)}. Received: {part!r}."
            )
        if unknown := [key for key in keys if key not in config[part]]:
            raise InputError(
                f"{path}: in Keras, {part} has the keys {sorted(config[part])}. "
                f"Received: {unknown[0]!r}. Remove it."
            )
        config[part].update(keys)
    return config


def train(config: Mapping[str, Mapping[str, Any]]) -> Path:
    """Train a text classifier, and save it with what its rows and classes mean.

    Args:
        config: What `read_config` returns.

    Returns:
        The folder with `model.keras` and `meaning.json`; and with `config.yaml`, `rows.json` and
        logs for TensorBoard, of which `partial-embedding report` makes a page.

    Raises:
        InputError: Files, settings and schedule do not fit each other.
    """
    seed = config["data"]["seed"]
    keras.utils.set_random_seed(seed)
    data = read_texts(config["data"])
    schedule = _of_the_table(config["rows"]["schedule"])
    model = text_classifier(data, schedule, lazy=config["rows"]["lazy"], **config["model"])
    batches = TextBatches(data.training, config["data"]["batch_size"], seed)
    folder = Path(f"{config['trainer']['default_root_dir']}-keras")
    unfreezing = RowUnfreezing(schedule, vocabulary=data.vocabulary, audit=config["rows"]["audit"])
    model.fit(
        batches,
        validation_data=TextBatches(data.validation, config["data"]["batch_size"]),
        epochs=config["trainer"]["max_epochs"],
        shuffle=False,
        verbose=2,
        callbacks=[
            unfreezing,
            RowMonitor(folder, vocabulary=data.vocabulary, unfreezing=unfreezing),
            EpochSeeds(batches, seed),
        ],
    )
    with write_atomically(folder / "config.yaml") as path:
        path.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    with write_atomically(folder / "model.keras") as path:
        model.save(path)
    meaning = {"tokens": list(data.vocabulary.tokens), "names": list(data.names)}
    with write_atomically(folder / "meaning.json") as path:
        path.write_text(json.dumps(meaning), encoding="utf-8")
    print(f"saved: {folder / 'model.keras'}")
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Train from a configuration; the command line.

    Args:
        arguments: The path of the configuration, by default that of the process.

    Returns:
        0, 1 when frozen rows moved, or 2 when the input is refused; each of these prints one line.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if len(given) != 1:
            raise InputError(
                f"the one argument is the path of a configuration. Received: {given}. "
                "Try configs/quickstart.yaml."
            )
        train(read_config(given[0]))
    except (FrozenRowsMoved, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FrozenRowsMoved) else 2
    return 0


def _of_the_table(schedules: Any) -> Schedule:
    by_table = schedules_by_table(schedules)
    if unknown := [name for name in by_table if name not in (None, _TABLE)]:
        raise InputError(
            f"schedules are named after the model's tables, [{_TABLE!r}]. Received: {unknown[0]!r}."
        )
    (schedule,) = by_table.values()
    return schedule


if __name__ == "__main__":
    sys.exit(main())
