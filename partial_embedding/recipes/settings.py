"""Settings from a configuration: what is read without LightningCLI, and ranges of numbers."""

from __future__ import annotations

import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from partial_embedding.errors import InputError, did_you_mean
from partial_embedding.files import read_yaml


def read_config(
    path: str | os.PathLike[str], parts: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """The parts of a configuration of `fit`; of one that names a `class_path`, its `init_args`.

    Args:
        path: The file.
        parts: Those that are refused where they are no mappings, in place of being left out.

    Raises:
        InputError: The file cannot be read or is no mapping.
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
            keys = keys.get("init_args")
            keys = {} if keys is None else keys
        if isinstance(keys, Mapping):
            config[str(part)] = dict(keys)
        elif part in parts and keys is not None:
            raise InputError(
                f"{path}: {part} is a mapping of its settings. Received: {keys!r}. Write them "
                f"below it, each on a line of its own."
            )
    return config


def check_range(name: str, value: float, least: float, below: float = math.inf) -> None:
    """Refuse a number that is out of its range.

    Raises:
        InputError: It is less than `least`, not less than `below`, or not a number.

    Example:
        >>> check_range("channels", 0, 1)
        Traceback (most recent call last):
            ...
        partial_embedding.errors.InputError: channels is at least 1. Received: 0. Leave it out for \
the default.
    """
    if not least <= value < below:
        rule = f"is at least {least}" if below == math.inf else f"lies in [{least}, {below})"
        raise InputError(f"{name} {rule}. Received: {value}. Leave it out for the default.")


def settings(made: Callable[..., Any]) -> list[str]:
    """The names of those arguments of a class or function that have a default.

    Example:
        >>> settings(lambda data, lr=1e-3: None)
        ['lr']
    """
    parameters = inspect.signature(made).parameters.items()
    return [name for name, one in parameters if one.default is not one.empty]


def checked(made: Callable[..., Any], given: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The arguments for a class or function, each of the simple type that it asks for.

    What has no default is for its caller to give.

    Raises:
        InputError: There is no such argument, or its value is of another type; the message names
            the part of the configuration.

    Example:
        >>> def model(lr: float = 1e-3, encoder: Literal["cnn", "mean"] = "cnn") -> None: ...
        >>> checked(model, {"lr": 1}, "model")
        {'lr': 1.0}
    """
    # Those of a dataclass stand at the class.
    hints = typing.get_type_hints(made)
    known = settings(made)
    for name in given:
        if name not in known:
            raise InputError(
                f"{part} has the keys {known}. Received: {name!r}."
                f"{did_you_mean(name, known, ' Remove it.')}"
            )
    return {name: _checked(f"{part}.{name}", value, hints[name]) for name, value in given.items()}


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
