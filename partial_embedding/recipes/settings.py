"""Settings from a configuration, for what is not read by LightningCLI."""

from __future__ import annotations

import inspect
import os
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from partial_embedding.errors import InputError
from partial_embedding.files import read_yaml
from partial_embedding.recipes.command import did_you_mean


def read_config(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Read a configuration as `fit` takes it.

    Args:
        path: A YAML file.

    Returns:
        The parts that are mappings; those of a part that names a `class_path` are its `init_args`.

    Raises:
        InputError: The file cannot be read or is no mapping.
    """
    given = read_yaml(path, "configuration") or {}
    if not isinstance(given, Mapping):
        raise InputError(
            f"{path}: a configuration is a mapping with parts such as data and model. Received: "
            f"{given!r}."
        )
    config = {}
    for part, keys in given.items():
        if isinstance(keys, Mapping):
            config[str(part)] = dict(keys.get("init_args") or {} if "class_path" in keys else keys)
    return config


def checked(made: Callable[..., Any], given: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The arguments for a class or function, each of the type that it asks for.

    Args:
        made: The class or function; keyword arguments with simple types.
        given: Some of its arguments by name.
        part: The part of the configuration, for messages.

    Raises:
        InputError: There is no such argument, or its value is of another type.

    Example:
        >>> def model(lr: float = 1e-3, encoder: Literal["cnn", "mean"] = "cnn") -> None: ...
        >>> checked(model, {"lr": 1}, "model")
        {'lr': 1.0}
    """
    # Those of a dataclass stand at the class.
    hints = typing.get_type_hints(made)
    known = list(inspect.signature(made).parameters)
    return {name: _checked(name, value, hints, known, part) for name, value in given.items()}


def _checked(name: str, value: Any, hints: Mapping[str, Any], known: list[str], part: str) -> Any:
    if name not in known:
        raise InputError(
            f"{part} has the keys {known}. Received: {name!r}.{did_you_mean(name, known)}"
        )
    kinds = typing.get_args(hints[name]) if _is_union(hints[name]) else (hints[name],)
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            if value in typing.get_args(kind):
                return value
        elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        # A truth value is an int to Python, and no number of anything.
        elif kind is not bool and isinstance(value, bool):
            continue
        elif isinstance(value, typing.get_origin(kind) or kind):
            return value
    wanted = " or ".join(
        f"one of {typing.get_args(kind)}" if typing.get_origin(kind) is Literal else kind.__name__
        for kind in kinds
    )
    raise InputError(f"{part}.{name} is {wanted}. Received: {value!r}.")


def _is_union(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
