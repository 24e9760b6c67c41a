"""What a stage waits for: a place in training, or a metric that stopped improving."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from partial_embedding.choices import is_whole
from partial_embedding.errors import InputError
from partial_embedding.schedule.position import Position, Seen

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
            raise InputError(f"a stage starts at one of {list(UNITS)}. Received: {self.unit!r}.")
        if self.unit == "share":
            number = isinstance(self.at, int | float) and not isinstance(self.at, bool)
            if not number or not 0 <= self.at < 1:
                raise InputError(
                    f"a share of the run is a number in [0, 1). Received: {self.at!r}."
                )
        elif not is_whole(self.at) or self.at < 0:
            article = "an" if self.unit == "epoch" else "a"
            raise InputError(
                f"{article} {self.unit} is a whole number from 0 up. Received: {self.at!r}."
            )

    def to_config(self) -> dict[str, Any]:
        """Write the start as plain YAML values."""
        return {self.unit: self.at}

    def __str__(self) -> str:
        return f"{self.unit} {self.at:,}"


def place_in(unit: str, position: Position) -> float:
    """Where training stands, in one of `UNITS`.

    Args:
        unit: The unit.
        position: Where training stands.

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
        metric: The name of a number that validation logs.
        mode: `"min"` where lower is better, `"max"` where higher is.
        patience: The stage starts when this many values in a row were no improvement.
        min_change: A change of no more than this is no improvement; from 0 up, in the metric's
            unit.
        max_wait: The stage starts after this many values at the latest; None waits for ever.

    Raises:
        InputError: A number is out of range, or there is no such mode.

    Example:
        >>> plateau = Plateau("loss", patience=2)
        >>> values = [Seen(epoch, epoch, {"loss": v}) for epoch, v in enumerate([3, 2, 2, 2])]
        >>> plateau.is_reached(values[:3]), plateau.is_reached(values)
        (False, True)
    """

    metric: str
    mode: str = "min"
    patience: int = 1
    min_change: float = 0.0
    max_wait: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise InputError(
                f"a plateau is of a metric, such as val_loss. Received: {self.metric!r}."
            )
        if self.mode not in ("min", "max"):
            raise InputError(f"mode is 'min' or 'max'. Received: {self.mode!r}.")
        numbers: dict[str, Any] = {"patience": self.patience, "max_wait": self.max_wait}
        for name, value in numbers.items():
            if value is None and name == "max_wait":
                continue
            if not is_whole(value) or value < 1:
                raise InputError(
                    f"{name} is a whole number of validations from 1 up. Received: {value!r}."
                )
        number = isinstance(self.min_change, int | float) and not isinstance(self.min_change, bool)
        if not number or not 0 <= self.min_change < math.inf:
            raise InputError(f"min_change is a number from 0 up. Received: {self.min_change!r}.")

    @staticmethod
    def parse(value: object) -> Plateau:
        """Read the name of a metric, or a mapping of the arguments.

        Args:
            value: A string, a mapping or a `Plateau`.

        Raises:
            InputError: It is none of these, or malformed.
        """
        if isinstance(value, Plateau):
            return value
        given = {"metric": value} if isinstance(value, str) else value
        keys = list(Plateau.__dataclass_fields__)
        if not isinstance(given, Mapping) or not set(given) <= set(keys) or "metric" not in given:
            raise InputError(
                f"a plateau is the name of a metric, or a mapping with metric and others of {keys}."
                f" Received: {value!r}."
            )
        return Plateau(**given)

    def is_reached(self, seen: Sequence[Seen]) -> bool:
        """Whether the metric has stopped improving.

        Args:
            seen: What was seen since the stage before began.
        """
        values = [one.metrics[self.metric] for one in seen if self.metric in one.metrics]
        best, waited = math.inf, 0
        for value in values:
            value = -value if self.mode == "max" else value
            # A value that is not a number is no improvement.
            improved = value < best - self.min_change
            best, waited = (value, 0) if improved else (best, waited + 1)
        return waited >= self.patience or (
            self.max_wait is not None and len(values) >= self.max_wait
        )

    def to_config(self) -> dict[str, Any]:
        """Write the plateau as plain YAML values."""
        fields = Plateau.__dataclass_fields__
        given = {name: getattr(self, name) for name in fields}
        changed = {n: v for n, v in given.items() if n == "metric" or v != fields[n].default}
        return {"plateau": changed}

    def __str__(self) -> str:
        return f"a plateau of {self.metric}"
