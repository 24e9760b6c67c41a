"""What both frameworks' commands share: settings, checkpoints that are meant, what is refused."""

from __future__ import annotations

import argparse
import math
import os
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from partial_embedding.errors import InputError, did_you_mean
from partial_embedding.files import newest, read_yaml, refuse_no_file

Settings = TypeVar("Settings")
# The recipe that runs in Keras too, as a configuration names its parts.
_OF_KERAS = ["TextClassifier", "TextData"]


class CommandParser(argparse.ArgumentParser):
    """Raises what it refuses, so that every command says it in the same way, in one line."""

    def __init__(self, command: str, description: str, **options: Any) -> None:
        prog = f"partial-embedding {command}"
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        _, unknown, given = message.partition("unrecognized arguments: ")
        meant = did_you_mean(given.split("=")[0], self._option_string_actions) if unknown else ""
        raise InputError(f"{message}.{meant} See {self.prog} --help.")


def positive(text: str) -> int:
    """A whole number from 1 up, as the type of an option."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 up. Received: {text!r}")
    return int(text)


def read_config(
    path: str | os.PathLike[str], parts: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """The parts of a configuration of `fit`; of one that names a `class_path`, its `init_args`.

    What is no mapping is left out, or, where it is one of these parts, refused.
    """
    given = read_yaml(path, "configuration") or {}
    if not isinstance(given, Mapping):
        raise InputError(
            f"{path}: a configuration is a mapping with parts such as data and model. Received: "
            f"{given!r}. Begin with one of them, such as 'data:'."
        )
    config = {}
    for part, keys in given.items():
        if isinstance(keys, Mapping) and "class_path" in keys:
            named = str(keys["class_path"])
            if part in parts and named.rpartition(".")[2] not in _OF_KERAS:
                raise InputError(
                    f"{path}: in Keras, {part} is one of {_OF_KERAS}. Received: {named}. Install "
                    "partial-embedding[lightning,text,transformers] for others."
                )
            keys = keys.get("init_args")
            keys = {} if keys is None else keys
        if isinstance(keys, Mapping):
            config[str(part)] = dict(keys)
        elif part in parts and keys is not None:
            raise InputError(
                f"{path}: {part} is a mapping of its settings. Received: {keys!r}. Write them "
                "below it, each on a line of its own."
            )
    return config


def check_range(name: str, value: float, least: float, below: float = math.inf) -> None:
    """Refuse a number that is out of its range."""
    if not least <= value < below:
        rule = f"is at least {least}" if below == math.inf else f"lies in [{least}, {below})"
        raise InputError(f"{name} {rule}. Received: {value}. Leave it out for the default.")


@dataclass(frozen=True)
class ClassifierSettings:
    """What a small text classifier is made of, and how it learns, in either framework.

    Args:
        encoder: `"cnn"`, convolutions of widths 3, 4 and 5 with a maximum over time (Kim 2014,
            https://arxiv.org/abs/1408.5882), or `"mean"`, the average of the vectors.
        channels: Channels per width of the convolutions.
        dropout: The share of the encoder's features dropped in training.
        lr: The learning rate of AdamW.
        weight_decay: The weight decay of AdamW.
    """

    encoder: Literal["cnn", "mean"] = "cnn"
    channels: int = 64
    dropout: float = 0.5
    lr: float = 1e-3
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        check_range("channels", self.channels, 1)
        check_range("dropout", self.dropout, 0, below=1)
        check_range("lr", self.lr, 0)
        check_range("weight_decay", self.weight_decay, 0)


def read_settings(made: type[Settings], part: str, given: Mapping[str, Any]) -> Settings:
    """Make a dataclass of settings of what is given, each of the type that it asks for."""
    hints = typing.get_type_hints(made)
    for name in given:
        if name not in hints:
            raise InputError(
                f"{part} has the keys {list(hints)}. Received: {name!r}."
                f"{did_you_mean(name, hints, ' Remove it.')}"
            )
    read = {name: _checked(f"{part}.{name}", value, hints[name]) for name, value in given.items()}
    return made(**read)


def _checked(place: str, value: Any, hint: Any) -> Any:
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = typing.get_args(hint) if is_union else (hint,)
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            if value in typing.get_args(kind):
                return value
        # A truth value is an int to Python, and no number of anything.
        elif isinstance(value, bool) and kind is not bool:
            continue
        elif kind is float and isinstance(value, int | float):
            return float(value)
        elif isinstance(value, typing.get_origin(kind) or kind):
            return value
    wanted = " or ".join(
        f"one of {typing.get_args(kind)}" if typing.get_origin(kind) is Literal else kind.__name__
        for kind in kinds
    )
    raise InputError(f"{place} is {wanted}. Received: {value!r}. Leave it out for the default.")


def find_checkpoint(
    command: str, named: str | None, root: Path, patterns: Mapping[str, str]
) -> Path:
    """The checkpoint that is meant: of the newest run in a folder, by a name, or at a path."""
    names = ", ".join(patterns)
    if named is None:
        raise InputError(
            f"{command} is of a checkpoint. Received no --ckpt_path. Pass {names} or the path of "
            "one."
        )
    found = newest(root, patterns[named]) if named in patterns else Path(named)
    if found is None:
        raise InputError(
            f"{named} is the checkpoint of a run. Received: {root}, which holds none. Pass the "
            "--trainer.default_root_dir of that run, or the path of a checkpoint."
        )
    refuse_no_file(found, "a checkpoint is a file")
    if not found.is_file():
        raise InputError(
            f"a checkpoint is a file. Received: {named}, which is missing. Pass {names}, or the "
            "path of one."
        )
    return found


def diverged(loss: float, step: int, epoch: int) -> InputError:
    """The error of a run whose loss is no finite number after some steps."""
    return InputError(
        f"a loss is a finite number. Received: {loss} after {step:,} steps, in epoch {epoch}. "
        "Lower model.lr and start anew."
    )
