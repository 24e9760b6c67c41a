"""Rows of one table that join and leave, and each cohort of them alone, to compare with.

Alone, a cohort is a variable with a plain optimizer of its own from the step at which it joined,
whose learning rate is a schedule that follows the cohort's rate scale.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from partial_embedding.schedule import RateScale
from partial_embedding.tensorflow import PartialEmbedding

NUM_ROWS, WIDTH, STEPS, RATE = 12, 4, 8, 0.05
RESERVED = [1, 2, 5, 7, 8, 11]
MATRIX = np.random.default_rng(1).normal(size=(NUM_ROWS, WIDTH)).astype(np.float32)
Moves = dict[int, tuple[list[int], RateScale]]
Batches = list[tuple[Any, Any]]
# The rows that train from a step on. Rows 2 and 7 train throughout, 5 and 11 join at step 3, row 8
# leaves at 2 and joins again at 5.
MOVES: Moves = {
    0: ([2, 7, 8], RateScale()),
    2: ([2, 7], RateScale()),
    3: ([2, 5, 7, 11], RateScale()),
    5: ([2, 5, 7, 8, 11], RateScale()),
}
# The same with the rate scale of those that join there.
SCALED: Moves = {
    0: ([2, 7], RateScale(lr_scale=0.5)),
    2: ([2, 5, 7], RateScale(lr_scale=0.25, warmup_steps=3)),
    4: ([2, 5, 8, 11], RateScale(warmup_steps=2)),
    5: ([1, 2, 5, 7, 8, 11], RateScale()),
}


class Cohort(NamedTuple):
    """Rows, their rate scale, and the steps that they make."""

    rows: list[int]
    rate_scale: RateScale
    start: int
    stop: int


COHORTS = [
    Cohort([2], RateScale(lr_scale=0.5), 0, 8),
    Cohort([7], RateScale(lr_scale=0.5), 0, 4),
    Cohort([5], RateScale(lr_scale=0.25, warmup_steps=3), 2, 8),
    Cohort([8, 11], RateScale(warmup_steps=2), 4, 8),
    Cohort([1, 7], RateScale(), 5, 8),
]


def batches(every_row: bool = False) -> Batches:
    """Ids, which occur several times, and gradients of what is looked up, step by step."""
    # Multiples of 1/8, so that sums are exact in any order and at any precision.
    rng = np.random.default_rng(0)
    shape = (4, 6) if every_row else (4, 5)
    ids = np.tile(np.arange(NUM_ROWS), 2).reshape(4, 6) if every_row else None
    return [
        (
            rng.integers(0, NUM_ROWS, shape) if ids is None else ids,
            rng.integers(-8, 9, (*shape, WIDTH)).astype(np.float32) / 8,
        )
        for _ in range(STEPS)
    ]


def gradient(ids: Any, upstream: Any) -> Any:
    """The gradient of the table, summed over what occurs several times."""
    summed = np.zeros(MATRIX.shape, np.float32)
    np.add.at(summed, ids, upstream)
    return summed


@keras.saving.register_keras_serializable()
def product(upstream: Any, rows: Any) -> Any:
    """The loss whose gradients are those given."""
    return tf.reduce_sum(upstream * rows)


def moved(layer: Any, before: Any) -> list[int]:
    """The rows that are not what they were."""
    return [int(row) for row in np.flatnonzero((layer.get_weights()[0] != before).any(axis=1))]


def step(layer: Any, optimizer: Any, *parts: Callable[[], Any]) -> list[int]:
    """Step down the sum of some parts in a loop of one's own, and give the rows that moved."""
    (before,), weights = layer.get_weights(), layer.trainable_variables
    with tf.GradientTape() as tape:
        loss = sum(tf.reduce_sum(part()) for part in parts)
    optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
    return moved(layer, before)


def model_of(optimizer: Any, moves: Moves = MOVES, **settings: Any) -> Any:
    """A model of one table."""
    layer = PartialEmbedding.from_matrix(
        MATRIX, trainable_rows=moves[0][0], reserve_rows=RESERVED, name="words"
    )
    model = keras.Sequential([keras.Input((None,), dtype="int64"), layer])
    model.compile(optimizer, loss=product, **settings)
    optimizer.build(model.trainable_variables)
    return model


def run(
    model: Any,
    moves: Moves = MOVES,
    data: Batches | None = None,
    begin: int = 0,
    end: int = STEPS,
) -> list[Any]:
    """Train, and give the table before the first step and after each."""
    layer, data = model.layers[0], data or batches()
    tables = [layer.get_weights()[0]]
    for step in range(begin, end):
        if step in moves:
            rows, rate_scale = moves[step]
            layer.set_trainable_rows(rows, **vars(rate_scale))
        model.train_on_batch(*data[step])
        tables.append(layer.get_weights()[0])
    return tables


class Scaled(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """The rate of a cohort: its rate scale, and the optimizer's rate at the step at which it is."""

    def __init__(self, cohort: Cohort, falls: bool = False) -> None:
        self.cohort, self.falls = cohort, falls

    def __call__(self, step: Any) -> Any:
        rates = [
            RATE
            * self.cohort.rate_scale.factor(age)
            * (0.5 ** ((age + self.cohort.start) // 3) if self.falls else 1)
            for age in range(STEPS + 1)
        ]
        return tf.gather(tf.constant(rates, tf.float32), step)


def assert_cohorts_train_as_alone(
    tables: list[Any], make: Callable[[Cohort], Any], data: Batches
) -> None:
    """Fail unless the rows of each cohort end where they do alone, and others do not move."""
    for cohort in COHORTS:
        table, optimizer = keras.Variable(tables[cohort.start][cohort.rows]), make(cohort)
        optimizer.build([table])
        if optimizer.use_ema and cohort.start % 2:
            continue  # it overwrites at its own even steps
        for batch in data[cohort.start : cohort.stop]:
            own = optimizer.scale_loss(tf.constant(gradient(*batch)[cohort.rows]))
            optimizer.apply([own], [table])
        got = tables[cohort.stop][cohort.rows]
        np.testing.assert_allclose(got, table.numpy(), rtol=1e-5, atol=1e-7)
    rows: list[int] = []
    for step, (before, after) in enumerate(pairwise(tables)):
        rows = SCALED.get(step, (rows,))[0]
        frozen = np.setdiff1d(np.arange(NUM_ROWS), rows)
        assert after[frozen].tobytes() == before[frozen].tobytes()


class TwoOptimizers(keras.Model):  # type: ignore[misc]
    """One optimizer for the table, another for the rest; the one of `compile` steps nothing."""

    def train_step(self, data: Any) -> Any:
        ids, targets = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(y=targets, y_pred=self(ids, training=True))
        words, *rest = self.trainable_variables
        gradients = tape.gradient(loss, [words, *rest])
        self.of_table.apply_gradients([(gradients[0], words)])
        self.of_rest.apply_gradients(zip(gradients[1:], rest, strict=True))
        return {"loss": loss}
