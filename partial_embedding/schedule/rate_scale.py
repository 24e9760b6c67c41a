"""How fast rows learn from when they join: a factor on the learning rate, and a warm-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from partial_embedding.errors import InputError
from partial_embedding.rows.kinds import is_whole


@dataclass(frozen=True)
class RateScale:
    """The learning rate of rows that joined together, relative to the optimizer's.

    Whatever a learning-rate scheduler does to the optimizer's rate, it does to theirs. The warm-up
    rises linearly and counts the steps of these rows alone (Goyal et al. 2017,
    https://arxiv.org/abs/1706.02677, section 2.2).

    Args:
        lr_scale: The factor on the learning rate, above 0.
        warmup_steps: The steps of these rows over which their rate rises to the full one.

    Raises:
        InputError: A number is out of range.

    Example:
        >>> [RateScale(lr_scale=0.5, warmup_steps=4).factor(step) for step in (0, 1, 3, 9)]
        [0.125, 0.25, 0.5, 0.5]
    """

    lr_scale: float = 1.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        number = isinstance(self.lr_scale, int | float) and not isinstance(self.lr_scale, bool)
        if not number or not 0 < self.lr_scale < float("inf"):
            raise InputError(
                "lr_scale is a factor on the optimizer's learning rate, above 0. "
                f"Received: {self.lr_scale!r}. 1 leaves it as it is."
            )
        if not is_whole(self.warmup_steps) or self.warmup_steps < 0:
            raise InputError(
                "warmup_steps is a whole number of steps from 0 up. "
                f"Received: {self.warmup_steps!r}."
            )
        object.__setattr__(self, "lr_scale", float(self.lr_scale))

    @property
    def is_plain(self) -> bool:
        """Whether these rows learn at the optimizer's own rate throughout."""
        return self == _PLAIN

    def factor(self, steps: int) -> float:
        """The factor on the learning rate.

        Args:
            steps: The steps that these rows have made.
        """
        return (
            self.lr_scale * min(1.0, (steps + 1) / self.warmup_steps)
            if self.warmup_steps
            else self.lr_scale
        )

    def to_config(self) -> dict[str, Any]:
        """Write what differs from the optimizer's own rate as plain YAML values."""
        config = {"lr_scale": self.lr_scale, "warmup_steps": self.warmup_steps}
        return {key: value for key, value in config.items() if value != getattr(_PLAIN, key)}


_PLAIN = RateScale()
