"""`fit`, `validate`, `test` and `predict` where Keras is installed and Lightning is not."""

from __future__ import annotations

import argparse
import json
import typing
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any

import keras
import numpy as np
import yaml
from keras import ops
from numpy.typing import NDArray

from partial_embedding.errors import InputError
from partial_embedding.files import parse_yaml, shown
from partial_embedding.recipes.keras_text import (
    SETTINGS,
    TABLE,
    TextBatches,
    TrainerSettings,
    train,
)
from partial_embedding.recipes.predictions import output_of, write_predictions
from partial_embedding.recipes.prepare_texts import (
    TextSettings,
    texts_to_predict,
    texts_to_test,
    texts_to_validate,
)
from partial_embedding.recipes.settings import (
    CommandParser,
    find_checkpoint,
    read_config,
    read_settings,
)
from partial_embedding.rows.vocabulary import Vocabulary

Config = dict[str, dict[str, Any]]


def fit_command(args: Sequence[str]) -> Path:
    """Train from configurations and options, and give the folder of the run."""
    return train(_config(vars(_parser("fit").parse_args(args))))


def measure_command(command: str, args: Sequence[str]) -> None:
    """Measure a saved model, by `validate` or `test`, or `predict` what it says of texts."""
    given = vars(_parser(command).parse_args(args))
    named, text, output = (given.pop(name, None) for name in ("ckpt_path", "text", "output"))
    top_k = given.pop("top_k", 1)
    config = _config(given)
    trainer = read_settings(TrainerSettings, "trainer", config.get("trainer", {}))
    root = Path(trainer.default_root_dir)
    if named == "best":
        raise InputError("in Keras, a run keeps its last model. Received: best. Pass last.")
    if named is not None and Path(named).is_dir():
        named = f"{named}/model.keras"
    path = find_checkpoint(command, named, root, {"last": "**/model.keras"})
    model, names, vocabulary, trained = _loaded(path)
    # Settings of the data may be others than in training.
    data = read_settings(TextSettings, "data", asdict(trained) | config.get("data", {}))
    print(f"checkpoint: {shown(path)}")

    def batches(texts: Sequence[str], labels: NDArray[np.int64]) -> TextBatches:
        return TextBatches(data.encode(texts, vocabulary), labels, data.batch_size)

    if command == "predict":
        output = output_of(output, text is not None or data.test_path == "-", root)
        asked = texts_to_predict(data, names, print) if text is None else [text]
        scores = model.predict(batches(asked, np.zeros(len(asked), np.int64)), verbose=0)
        probabilities = ops.convert_to_numpy(ops.softmax(scores))
        write_predictions(output, asked, probabilities, names, top_k)
        return
    texts_of = texts_to_test if command == "test" else texts_to_validate
    side = texts_of(data, names, print)
    found = model.evaluate(batches(side.texts, side.labels), verbose=0, return_dict=True)
    for name, value in found.items():
        print(f"{'val' if command == 'validate' else command}_{name}: {value:.4f}")


def _loaded(path: Path) -> tuple[Any, list[str], Vocabulary, TextSettings]:
    """A model, its classes, and what its rows and texts are."""
    try:
        meaning = json.loads(path.with_name("meaning.json").read_text(encoding="utf-8"))
        names, vocabulary = list(meaning["names"]), Vocabulary(meaning["tokens"])
        texts = TextSettings(**meaning["texts"])
        model = keras.models.load_model(path)
        found = (model.get_layer(TABLE).input_dim, model.output_shape[-1])
        if found != (meant := (len(vocabulary), len(names))):
            raise ValueError(f"a model of {found} rows and classes, where {meant} are meant")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            "a checkpoint is the model.keras of a run, with its meaning.json beside. "
            f"Received: {path}: {error}. Pass last, or the path of one."
        ) from error
    return model, names, vocabulary, texts


def _parser(command: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        command,
        "The text classifier in Keras.",
        usage=f"partial-embedding {command} [--config FILE] [--PART.SETTING VALUE …]",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", "-c", action="append", help="a YAML file with any of these")
    parts = SETTINGS if command == "fit" else {part: SETTINGS[part] for part in ("data", "trainer")}
    if command != "fit":
        parser.add_argument("--ckpt_path", help="last, or the path of a model.keras")
    if command == "predict":
        parser.add_argument("--text", help="a text, instead of a file")
        parser.add_argument("--output", help="the CSV file to write, or - for the terminal")
        parser.add_argument("--top_k", type=int, help="the classes of each text")
    for part, made in parts.items():
        options = parser.add_argument_group(part)
        for name, hint in typing.get_type_hints(made).items():
            options.add_argument(f"--{part}.{name}", type=_reader(hint), metavar=name.upper())
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
        for part, keys in read_config(path, SETTINGS).items():
            config.setdefault(part, {}).update(keys)
    for name, value in given.items():
        part, _, setting = name.partition(".")
        config.setdefault(part, {})[setting] = value
    return config
