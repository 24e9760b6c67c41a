"""How fast each row learns, relative to the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from partial_embedding.rows.vocabulary import Ids
from partial_embedding.schedule import RateScale


@dataclass(eq=False)
class RowScales:
    """When each reserved row joined, and how fast it learns, in variables assigned without tracing.

    Args:
        joined_at: The optimizer step at which each row joined, or -1; int64, shape (R,).
        lr_scale: The factor on the learning rate of each row, float32, shape (R,).
        warmup_steps: The steps of each row's warm-up, from 1 up, int64, shape (R,).
    """

    joined_at: Any
    lr_scale: Any
    warmup_steps: Any

    @property
    def are_plain(self) -> bool:
        """Whether every row learns at the optimizer's own rate."""
        return bool((self.lr_scale.numpy() == 1).all() and (self.warmup_steps.numpy() == 1).all())

    def begin(self, slots: Ids, rate_scale: RateScale) -> None:
        """Set the rate scale of those at these places whose first step is still to come."""
        begins = np.isin(np.arange(self.lr_scale.shape[0]), slots) & (self.joined_at.numpy() < 0)
        warmup = max(rate_scale.warmup_steps, 1)
        self.lr_scale.assign(np.where(begins, rate_scale.lr_scale, self.lr_scale.numpy()))
        self.warmup_steps.assign(np.where(begins, warmup, self.warmup_steps.numpy()))

    def leave(self, slots: Ids) -> None:
        """Forget when those at these places joined, so that they begin where they join again."""
        joined_at = self.joined_at.numpy()
        if (joined_at[slots] >= 0).any():
            joined_at[slots] = -1
            self.joined_at.assign(joined_at)

    def rates(self, learning_rate: Any, ages: Any, slots: Any = None) -> Any:
        """The learning rate of each row, as `RateScale.factor` gives it; float32, shape (N, 1).

        It is that of rows that have made so many steps, int64, shape (N, 1), and lie at these
        places among the reserved ones, shape (N,); by default of all.
        """
        scale, warmup = (
            tf.convert_to_tensor(v) if slots is None else tf.gather(v.value, slots)
            for v in (self.lr_scale, self.warmup_steps)
        )
        warmup = warmup[:, tf.newaxis]
        risen = tf.cast(tf.minimum(ages + 1, warmup), scale.dtype) / tf.cast(warmup, scale.dtype)
        return tf.cast(learning_rate, scale.dtype) * (scale[:, tf.newaxis] * risen)
