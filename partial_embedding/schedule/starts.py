"""What a stage waits for: a place in training, or a metric that stopped improving."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from partial_embedding.errors import InputError, did_you_mean
from partial_embedding.rows.kinds import is_number, is_whole
from partial_embedding.schedule.position import Evaluation, Position

UNITS = ("epoch", "step", "share")


@dataclass(frozen=True)
class Start:
    """A place in training.

    Args:
        unit: `"epoch"`, `"step"` (optimizer steps) or `"share"` (of the run).
        at: A whole number from 0 up; for a share, a number in [0, 1).

    Raises:
        InputError: There is no such unit, or the number is out of range.

    Example:
        >>> str(Start("step", 1000))
        'step 1,000'
    """

    unit: str
    at: float

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise InputError(
                f"a stage starts at one of {list(UNITS)}. Received: {self.unit!r}. "
                "Take one of these."
            )
        if self.unit == "share":
            if not is_number(self.at) or not 0 <= self.at < 1:
                raise InputError(
                    f"a share of the run is a number in [0, 1). Received: {self.at!r}. "
                    "0.5 is half of it."
                )
            object.__setattr__(self, "at", float(self.at))
        elif not is_whole(self.at) or self.at < 0:
            article = "an" if self.unit == "epoch" else "a"
            raise InputError(
                f"{article} {self.unit} is a whole number from 0 up. Received: {self.at!r}. "
                "The first is 0."
            )

    def to_config(self) -> dict[str, Any]:
        """Write the start as plain YAML values."""
        return {self.unit: self.at}

    def __str__(self) -> str:
        return f"{self.unit} {self.at:,}"


def place_in(unit: str, position: Position) -> float:
    """Where training stands, in one of `UNITS`.

    Raises:
        InputError: The length of the run is asked for and not known.
    """
    if unit != "share":
        return position.epoch if unit == "epoch" else position.step
    if position.share is None:
        raise InputError(
            "a stage that starts at a share of the run needs its length. Received a position "
            "without total_steps. Set the trainer's max_epochs or max_steps, or use epoch or step."
        )
    return position.share


@dataclass(frozen=True)
class Plateau:
    """A metric that stopped improving since the stage before began.

    The count begins with the stage: its first value is the first best one.

    Args:
        monitor: The name of a number that validation logs.
        mode: `"min"` where lower is better, `"max"` where higher is.
        patience: The stage starts when this many values in a row were no improvement.
        min_delta: A change of no more than this is no improvement; from 0 up, in the metric's
            unit.
        max_wait: The stage starts after this many values at the latest; None waits for ever.

    Raises:
        InputError: A number is out of range, or there is no such mode.

    Example:
        >>> Plateau("loss", patience=2).to_config()
        {'plateau': {'monitor': 'loss', 'patience': 2}}
    """

    monitor: str
    mode: str = "min"
    patience: int = 1
    min_delta: float = 0.0
    max_wait: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.monitor, str) or not self.monitor:
            raise InputError(
                f"a plateau is of a metric, such as val_loss. Received: {self.monitor!r}. Name it."
            )
        if self.mode not in ("min", "max"):
            raise InputError(
                f"mode is 'min' or 'max'. Received: {self.mode!r}. A loss has min, an accuracy max."
            )
        waits = {
            "patience": self.patience,
            "max_wait": 1 if self.max_wait is None else self.max_wait,
        }
        for name, value in waits.items():
            if not is_whole(value) or value < 1:
                raise InputError(
                    f"{name} is a whole number of validations from 1 up. Received: {value!r}. "
                    "Leave it out for the default."
                )
        if not is_number(self.min_delta) or not 0 <= self.min_delta < math.inf:
            raise InputError(
                f"min_delta is a number from 0 up. Received: {self.min_delta!r}. 0 is the default."
            )
        object.__setattr__(self, "min_delta", float(self.min_delta))

    @staticmethod
    def parse(value: object) -> Plateau:
        """Read the name of a metric, or a mapping of the arguments.

        Raises:
            InputError: It is none of these, or malformed.
        """
        if isinstance(value, Plateau):
            return value
        given = {"monitor": value} if isinstance(value, str) else value
        keys = list(Plateau.__dataclass_fields__)
        if not isinstance(given, Mapping) or not set(given) <= set(keys) or "monitor" not in given:
            raise InputError(
                f"a plateau is the name of a metric, or a mapping with monitor and any of {keys}."
                f" Received: {value!r}.{did_you_mean(given, keys, ' Take one of these.')}"
            )
        return Plateau(**given)

    def to_config(self) -> dict[str, Any]:
        """Write the plateau as plain YAML values."""
        defaults = {name: field.default for name, field in self.__dataclass_fields__.items()}
        return {"plateau": {n: v for n, v in vars(self).items() if v != defaults[n]}}

    def __str__(self) -> str:
        return f"a plateau of {self.monitor}"


class Wait:
    """The wait of one stage for a plateau, one validation after the other.

    Example:
        >>> wait = Wait(Plateau("loss", patience=2))
        >>> [wait.is_over(Evaluation(0, 0, {"loss": value})) for value in (3, 2, 2, 2)]
        [False, False, False, True]
    """

    def __init__(self, plateau: Plateau) -> None:
        self.plateau = plateau
        self.values = 0
        self.without = 0
        self.best: float | None = None

    def is_over(self, evaluation: Evaluation) -> bool:
        """Take in what a validation measured, and say whether the metric has stopped improving."""
        plateau = self.plateau
        if (value := evaluation.metrics.get(plateau.monitor)) is not None:
            value = -value if plateau.mode == "max" else value
            # A value that is not a number is no improvement.
            first = self.best is None and not math.isnan(value)
            improved = first or (self.best is not None and value < self.best - plateau.min_delta)
            self.best, self.without = (value, 0) if improved else (self.best, self.without + 1)
            self.values += 1
        return self.without >= plateau.patience or (
            plateau.max_wait is not None and self.values >= plateau.max_wait
        )
