"""`fit`, `validate`, `test` and `predict` where Keras is installed and Lightning is not."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from partial_embedding.errors import InputError
from partial_embedding.files import newest, parse_yaml, shown
from partial_embedding.recipes.keras_text import (
    RowSettings,
    TextBatches,
    TrainerSettings,
    text_classifier,
    train,
)
from partial_embedding.recipes.predictions import write_predictions
from partial_embedding.recipes.prepare_texts import (
    TextSettings,
    texts_to_predict,
    texts_to_test,
    texts_to_validate,
)
from partial_embedding.recipes.settings import CommandParser, checked, read_config
from partial_embedding.rows.vocabulary import Vocabulary

Config = dict[str, dict[str, Any]]


def fit_command(args: Sequence[str]) -> Path:
    """Train from configurations and options, and give the folder of the run.

    Raises:
        InputError: An argument, a file or the schedule is refused.
    """
    return train(_config(vars(_parser("fit").parse_args(args))))


def measure_command(command: str, args: Sequence[str]) -> None:
    """Measure a model that was saved, by `validate` or `test`, or ask what it says of texts.

    Raises:
        InputError: An argument, a file or the checkpoint is refused.
    """
    given = vars(_parser(command).parse_args(args))
    named, text, output = (given.pop(name, None) for name in ("ckpt_path", "text", "output"))
    top_k = given.pop("top_k", 1)
    config = _config(given)
    trainer = checked(TrainerSettings, config.get("trainer", {}), "trainer")
    root = Path(TrainerSettings(**trainer).default_root_dir)
    saved = SavedModel(_found(command, named, root), config.get("data", {}))
    print(f"checkpoint: {shown(saved.path)}")
    if command == "predict":
        typed = text is not None or saved.texts.test_path == "-"
        saved.predict(text, output or ("-" if typed else root / "predictions.csv"), top_k)
    else:
        saved.measure(command)


class SavedModel:
    """A `model.keras` that knows what its rows and classes mean by the `meaning.json` beside it.

    Settings of the data may be others than in training.
    """

    def __init__(self, path: Path, data: Mapping[str, Any]) -> None:
        self.path = path
        try:
            meaning = json.loads(path.with_name("meaning.json").read_text(encoding="utf-8"))
            self.model = keras.models.load_model(path)
        except (OSError, ValueError) as error:
            raise InputError(
                "a checkpoint is the model.keras of a run, with its meaning.json beside. "
                f"Received: {path}: {error}. Pass last, or the path of one."
            ) from error
        self.vocabulary = Vocabulary(meaning["tokens"])
        self.names = tuple(meaning["names"])
        self.texts = TextSettings(**{**meaning["texts"], **checked(TextSettings, data, "data")})

    def measure(self, command: str) -> None:
        """Print loss and accuracy, of `test` on `data.test_path` where it is set."""
        texts_of = texts_to_test if command == "test" else texts_to_validate
        side = texts_of(self.texts, self.names, print)
        batches = self._batches(side.texts, side.labels)
        found = self.model.evaluate(batches, verbose=0, return_dict=True)
        for name, value in found.items():
            print(f"{'val' if command == 'validate' else command}_{name}: {value:.4f}")

    def predict(self, text: str | None, output: str | Path, top_k: int) -> None:
        """Write what the model says of a text, or else of those that the settings name."""
        asked = texts_to_predict(self.texts, self.names, print) if text is None else [text]
        batches = self._batches(asked, np.zeros(len(asked), np.int64))
        probabilities = ops.convert_to_numpy(ops.softmax(self.model.predict(batches, verbose=0)))
        write_predictions(output, asked, probabilities, self.names, top_k)

    def _batches(self, texts: Sequence[str], labels: NDArray[np.int64]) -> TextBatches:
        rows = self.texts.encode(texts, self.vocabulary)
        return TextBatches(rows, labels, self.texts.batch_size)


def _found(command: str, named: str | None, root: Path) -> Path:
    """The model that is meant."""
    if named is None:
        raise InputError(
            f"{command} is of a checkpoint. Received no --ckpt_path. Pass last or the path of a "
            "model.keras."
        )
    if named == "best":
        raise InputError("in Keras, a run keeps its last model. Received: best. Pass last.")
    if named != "last":
        return Path(named) / "model.keras" if Path(named).is_dir() else Path(named)
    if (found := newest(root, "**/model.keras")) is None:
        raise InputError(
            f"last is the model of a run. Received: {root}, which holds none. Pass the "
            "--trainer.default_root_dir of that run, or the path of its model.keras."
        )
    return found


def _parser(command: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=f"partial-embedding {command}",
        usage=f"partial-embedding {command} [--config FILE] [--PART.SETTING VALUE …]",
        description="The text classifier in Keras.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", "-c", action="append", help="a YAML file with any of these")
    parts: dict[str, Any] = {"data": TextSettings, "trainer": TrainerSettings}
    if command == "fit":
        parts |= {"model": text_classifier, "rows": RowSettings}
    else:
        parser.add_argument("--ckpt_path", help="last, or the path of a model.keras")
    if command == "predict":
        parser.add_argument("--text", help="a text, instead of a file")
        parser.add_argument("--output", help="the CSV file to write, or - for the terminal")
        parser.add_argument("--top_k", type=int, help="the classes of each text")
    for part, made in parts.items():
        options = parser.add_argument_group(part)
        for name in inspect.signature(made).parameters:
            options.add_argument(f"--{part}.{name}", type=parse_yaml, metavar=name.upper())
    return parser


def _config(given: dict[str, Any]) -> Config:
    """The parts of the configuration files, and what options say instead."""
    config: Config = {}
    for path in given.pop("config", []):
        for part, keys in read_config(path).items():
            config.setdefault(part, {}).update(keys)
    for name, value in given.items():
        part, _, setting = name.partition(".")
        config.setdefault(part, {})[setting] = value
    return config
