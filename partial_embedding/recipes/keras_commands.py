"""`fit`, `validate`, `test` and `predict` where Keras is installed and Lightning is not."""

from __future__ import annotations

import argparse
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any

import keras
import numpy as np
import yaml
from keras import ops

from partial_embedding.errors import InputError
from partial_embedding.files import parse_yaml, shown
from partial_embedding.recipes.command import CommandParser
from partial_embedding.recipes.keras_text import (
    TABLE,
    RowSettings,
    TextBatches,
    TrainerSettings,
    text_classifier,
    train,
)
from partial_embedding.recipes.predictions import write_predictions
from partial_embedding.recipes.prepare_texts import (
    TextSettings,
    read_known,
    read_sides,
    with_names,
)
from partial_embedding.recipes.settings import checked, read_config, settings
from partial_embedding.recipes.text import LabelledTexts, read_texts
from partial_embedding.rows.vocabulary import Vocabulary

Config = dict[str, dict[str, Any]]
_PARTS = ("data", "model", "rows", "trainer")


def fit_command(args: Sequence[str]) -> Path:
    """Train from configurations and options.

    Args:
        args: The arguments of `fit`.

    Returns:
        The folder of the run.

    Raises:
        InputError: An argument, a file or the schedule is refused.
    """
    return train(_config(vars(_parser("fit").parse_args(args))))


def measure_command(command: str, args: Sequence[str]) -> None:
    """Measure a model that was saved, or ask what it says of texts.

    Args:
        command: `"validate"`, `"test"` or `"predict"`.
        args: The arguments after it.

    Raises:
        InputError: An argument, a file or the checkpoint is refused.
    """
    given = vars(_parser(command).parse_args(args))
    named, text, output, top_k = (
        given.pop(name, default)
        for name, default in (("ckpt_path", None), ("text", None), ("output", None), ("top_k", 1))
    )
    config = _config(given)
    trainer = checked(TrainerSettings, config.get("trainer", {}), "trainer")
    root = Path(TrainerSettings(**trainer).default_root_dir)
    saved = SavedModel(_found(command, named, root), config.get("data", {}))
    print(f"checkpoint: {shown(saved.path)}")
    if command != "predict":
        saved.measure(command)
        return
    typed = text is not None or saved.texts.test_path == "-"
    saved.predict(text, output or ("-" if typed else root / "predictions.csv"), top_k)


class SavedModel:
    """A model of a run, which knows what its rows and classes mean.

    Args:
        path: Its `model.keras`, with `meaning.json` beside.
        data: What settings of the data are to be others than in training.

    Raises:
        InputError: The files are missing or damaged, or a setting is refused.
    """

    def __init__(self, path: Path, data: Mapping[str, Any]) -> None:
        self.path = path
        try:
            meaning = json.loads(path.with_name("meaning.json").read_text(encoding="utf-8"))
            self.vocabulary = Vocabulary(meaning["tokens"])
            self.names = tuple(meaning["names"])
            texts = asdict(TextSettings(**meaning["texts"]))
            self.model = keras.models.load_model(path)
            of_model = (self.model.get_layer(TABLE).input_dim, self.model.output_shape[-1])
            if of_model != (meant := (len(self.vocabulary), len(self.names))):
                raise ValueError(f"a model of {of_model} rows and classes, where {meant} are meant")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                "a checkpoint is the model.keras of a run, with its meaning.json beside. "
                f"Received: {path}: {error}. Pass last, or the path of one."
            ) from error
        self.texts = TextSettings(**{**texts, **checked(TextSettings, data, "data")})

    def measure(self, command: str) -> None:
        """Print loss and accuracy.

        Args:
            command: `"test"`, on `data.test_path` where it is set, or `"validate"`.

        Raises:
            InputError: The texts are refused.
        """
        if command == "test" and (path := self.texts.test_path) is not None:
            side = read_known(path, self.texts, self.names, print)
        else:
            side = self._validation()
        found = self.model.evaluate(self._batches(side), verbose=0, return_dict=True)
        for name, value in found.items():
            print(f"{'val' if command == 'validate' else command}_{name}: {value:.4f}")

    def predict(self, text: str | None, output: str | Path, top_k: int) -> None:
        """Write what the model says of texts.

        Args:
            text: A text; None takes those of `data.test_path`, or of the validation side.
            output: The CSV file, or `"-"`.
            top_k: How many classes of each text.

        Raises:
            InputError: The texts are refused.
        """
        if text is not None:
            texts: Sequence[str] = [text]
        elif (path := self.texts.test_path) is not None:
            texts = read_texts(path, self.texts.text_column, print)
        else:
            texts = self._validation().texts
        unknown = np.zeros(len(texts), np.int64)
        batches = self._batches(LabelledTexts(tuple(texts), unknown, self.names))
        probabilities = ops.softmax(self.model.predict(batches, verbose=0))
        write_predictions(output, texts, ops.convert_to_numpy(probabilities), self.names, top_k)

    def _validation(self) -> LabelledTexts:
        return with_names(read_sides(self.texts, print)[1], self.names)

    def _batches(self, side: LabelledTexts) -> TextBatches:
        rows = self.texts.encode(side.texts, self.vocabulary)
        return TextBatches(rows, side.labels, self.texts.batch_size)


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
    models = list(root.glob("**/model.keras"))
    if not models:
        raise InputError(
            f"last is the model of a run. Received: {root}, which holds none. Pass the "
            "--trainer.default_root_dir of that run, or the path of its model.keras."
        )
    return max(models, key=lambda path: path.stat().st_mtime_ns)


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
        hints = typing.get_type_hints(made)
        for name in settings(made):
            read = _reader(hints[name])
            options.add_argument(f"--{part}.{name}", type=read, metavar=name.upper())
    return parser


def _reader(hint: Any) -> Callable[[str], Any]:
    """What reads an option: a name stands as it is, and all else is YAML."""
    kinds = set(typing.get_args(hint) or (hint,))

    def read(text: str) -> Any:
        if kinds <= {str, NoneType}:
            return None if text == "null" and NoneType in kinds else text
        try:
            return parse_yaml(text)
        except yaml.YAMLError:
            raise argparse.ArgumentTypeError(
                f"a setting is a value in YAML. Received: {text!r}"
            ) from None

    return read


def _config(given: dict[str, Any]) -> Config:
    """The parts of the configuration files, and what options say instead."""
    config: Config = {}
    for path in given.pop("config", []):
        for part, keys in read_config(path, _PARTS).items():
            config.setdefault(part, {}).update(keys)
    for name, value in given.items():
        part, _, setting = name.partition(".")
        config.setdefault(part, {})[setting] = value
    return config
