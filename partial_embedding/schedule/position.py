"""Where training stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """What a validation measured, and where in training.

    Args:
        epoch: The epoch that it belongs to; the first is 0.
        step: Optimizer steps completed.
        metrics: The numbers by name.

    Example:
        >>> Evaluation(epoch=3, step=400, metrics={"val_loss": 0.5}).metrics["val_loss"]
        0.5
    """

    epoch: int
    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Position:
    """Where training stands, and what was seen on the way: all that a schedule depends on.

    Args:
        epoch: Epochs completed before the current one; the first epoch is 0.
        step: Optimizer steps completed.
        total_steps: Optimizer steps of the whole run, where a schedule asks for shares of it.
        evaluations: What validations measured so far, for schedules that wait for a metric.

    Example:
        >>> Position(epoch=1, step=30, total_steps=120).share
        0.25
    """

    epoch: int = 0
    step: int = 0
    total_steps: int | None = None
    evaluations: tuple[Evaluation, ...] = ()

    @property
    def share(self) -> float | None:
        """The share of the run that is completed, or None where its length is not known."""
        return None if not self.total_steps else self.step / self.total_steps

    def to_state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        evaluations = [[one.epoch, one.step, dict(one.metrics)] for one in self.evaluations]
        return {**vars(self), "evaluations": evaluations}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Position:
        """The inverse of `to_state`."""
        evaluations = tuple(Evaluation(*one) for one in state.get("evaluations", ()))
        return Position(**{**state, "evaluations": evaluations})
