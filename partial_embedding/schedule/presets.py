"""Schedules that have a name: the stages that each stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from partial_embedding.errors import InputError, did_you_mean
from partial_embedding.rows.kinds import is_number, is_whole

Stages = list[dict[str, Any]]


def missing_first(epochs: int = 4) -> Stages:
    """First the rows without a pre-trained vector, then all.

    Args:
        epochs: The epochs in which the missing rows train alone.

    Example:
        >>> missing_first(2)
        [{'epoch': 0, 'rows': 'missing'}, {'epoch': 2, 'rows': 'all'}]
    """
    return [{"epoch": 0, "rows": "missing"}, {"epoch": epochs, "rows": "all"}]


def gradual(bands: int = 4, epochs: int = 1, lr_decay: float = 2.6) -> Stages:
    """Gradual unfreezing with discriminative learning rates, of bands of rows instead of layers.

    Howard & Ruder 2018 (ULMFiT, https://arxiv.org/abs/1801.06146, sections 3.2 and 3.3) unfreeze
    one layer an epoch, from the least general one on, each at the rate of the one before divided by
    2.6. Here the least general rows come first: the missing ones, then bands of the same size from
    the least to the most frequent.

    Args:
        bands: How many bands follow the missing rows.
        epochs: The epochs from one band to the next.
        lr_decay: The rate of each band is that of the one before divided by this, at least 1.

    Example:
        >>> [stage["rows"] for stage in gradual(bands=2)]
        ['missing', {'union': ['missing', {'least_frequent': 0.5}]}, 'all']
        >>> [round(stage["lr_scale"], 3) for stage in gradual(bands=2)]
        [1.0, 0.385, 0.148]
    """
    rows: list[Any] = ["missing"]
    rows += [{"union": ["missing", {"least_frequent": band / bands}]} for band in range(1, bands)]
    rows.append("all")
    return [
        {"epoch": i * epochs, "rows": choice, "lr_scale": lr_decay**-i}
        for i, choice in enumerate(rows)
    ]


def chain_thaw(bands: int = 4, epochs: int = 1) -> Stages:
    """First the new rows, then each band of rows alone, then all together.

    Felbo et al. 2017 (DeepMoji, https://arxiv.org/abs/1708.00524, section 3.4) train a new layer,
    then each layer by itself from the first to the last, and last all of them. Here the new rows
    are the missing ones, and bands of the same size follow from the most to the least frequent.

    Args:
        bands: How many bands are trained by themselves.
        epochs: The epochs of each stage.

    Example:
        >>> [stage["rows"] for stage in chain_thaw(bands=1)]
        ['missing', {'most_frequent': 1.0}, 'all']
    """
    rows: list[Any] = ["missing"]
    for band in range(bands):
        upper: Any = {"most_frequent": (band + 1) / bands}
        rows.append({"difference": [upper, {"most_frequent": band / bands}]} if band else upper)
    rows.append("all")
    return [{"epoch": i * epochs, "rows": choice} for i, choice in enumerate(rows)]


_PRESETS: Mapping[str, Callable[..., Stages]] = {
    "missing_first": missing_first,
    "gradual": gradual,
    "chain_thaw": chain_thaw,
}


def from_preset(value: object) -> Stages:
    """The stages that a preset stands for.

    Args:
        value: The name of a function of this module, or `{name: {argument: value}}`.

    Example:
        >>> from_preset({"missing_first": {"epochs": 3}}) == missing_first(3)
        True
    """
    given = {value: None} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or len(given) != 1 or not set(given) <= _PRESETS.keys():
        raise InputError(
            f"preset: a preset is one of {sorted(_PRESETS)}, or {{name: {{argument: value}}}}. "
            f"Received: {value!r}.{did_you_mean(value, _PRESETS, ' Take one of these.')}"
        )
    ((name, arguments),) = given.items()
    known = signature(_PRESETS[name]).parameters
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping) or not set(arguments) <= set(known):
        raise InputError(
            f"preset: {name} has the arguments {list(known)}. Received: {arguments!r}."
            f"{did_you_mean(arguments, known, ' Write {argument: value}.')}"
        )
    for key, number in arguments.items():
        if key == "lr_decay":
            if not is_number(number) or not 1 <= number < 1e6:
                raise InputError(
                    f"preset: {key} is a number from 1 up. Received: {number!r}. 1 keeps the rate."
                )
        # Each is a stage, or its length; a million of them would fill the memory.
        elif not is_whole(number) or not 1 <= number <= 10_000:
            raise InputError(
                f"preset: {key} is a whole number from 1 to 10,000. Received: {number!r}. "
                f"Leave it out for {known[key].default}."
            )
    return _PRESETS[name](**arguments)
