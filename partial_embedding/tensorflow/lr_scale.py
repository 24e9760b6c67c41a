"""How fast each row learns, relative to the optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from partial_embedding.errors import InputError
from partial_embedding.rows.vocabulary import Ids
from partial_embedding.schedule import RateScale


class RowRates:
    """The rate_scale of each reserved row, in variables that are assigned without tracing again.

    Args:
        joined_at: The optimizer step at which each row joined, or -1; int64, shape (R,).
        lr: The factor on the learning rate of each row, float32, shape (R,).
        warmup: The steps of each row's warm-up, from 1 up, int64, shape (R,).
    """

    def __init__(self, joined_at: Any, lr: Any, warmup: Any) -> None:
        self.joined_at = joined_at
        self.lr = lr
        self.warmup = warmup

    def begin(self, slots: Ids, rate_scale: RateScale) -> None:
        """Set the rate_scale of those of these rows whose first step is still to come.

        Args:
            slots: Places of rows among the reserved ones, shape (n,).
            rate_scale: Their rate_scale.
        """
        begins = np.isin(np.arange(self.lr.shape[0]), slots) & (self.joined_at.numpy() < 0)
        for variable, value in (
            (self.lr, rate_scale.lr_scale),
            (self.warmup, max(rate_scale.warmup_steps, 1)),
        ):
            variable.assign(np.where(begins, value, variable.numpy()))

    def rates(self, learning_rate: Any, ages: Any, slots: Any = None) -> Any:
        """The learning rate of each row, as `RateScale.factor` gives it.

        Args:
            learning_rate: That of the optimizer.
            ages: The steps that each row has made, int64, shape (N, 1).
            slots: Places of these rows among the reserved ones, shape (N,); by default all.

        Returns:
            float32, shape (N, 1).
        """
        lr, warmup = (
            tf.convert_to_tensor(v) if slots is None else tf.gather(v.value, slots)
            for v in (self.lr, self.warmup)
        )
        warmup = warmup[:, tf.newaxis]
        risen = tf.cast(tf.minimum(ages + 1, warmup), lr.dtype) / tf.cast(warmup, lr.dtype)
        return tf.cast(learning_rate, lr.dtype) * (lr[:, tf.newaxis] * risen)


def check_kept(rate_scale: RateScale | None, rate_scales: RowRates | None, table: str) -> None:
    """Refuse a rate_scale that nobody keeps.

    Args:
        rate_scale: The rate_scale; None is the plain one.
        rate_scales: Those of the table's rows, where an optimizer keeps them.
        table: The table's name.

    Raises:
        InputError: It is not the optimizer's own, and there are none.
    """
    if rate_scales is None and rate_scale is not None and not rate_scale.is_plain:
        raise InputError(
            "a learning rate of rows is what rowwise(optimizer, rate_scales=True) keeps, once "
            f"it is built. Received: {rate_scale} for {table!r}, which none was built for. "
            "Make the layer with "
            "reserve_rows=, and call optimizer.build(model.trainable_variables) first."
        )
