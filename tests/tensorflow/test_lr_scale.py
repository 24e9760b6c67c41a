"""Rows of one table that begin with their cohort, and learn at rates of their own."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from cohorts import (
    RATE,
    RESERVED,
    SCALED,
    WIDTH,
    Scaled,
    assert_cohorts_train_as_alone,
    batches,
    model_of,
    run,
)

from partial_embedding import InputError
from partial_embedding.tensorflow import PartialEmbedding, rowwise
from partial_embedding.tensorflow.served import SERVED

OPTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{name: (name, {}, {}) for name in SERVED},
    "SGD-momentum": ("SGD", {"momentum": 0.9}, {}),
    "SGD-nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}, {}),
    "SGD-weight_decay": ("SGD", {"weight_decay": 0.5}, {}),
    "RMSprop-centered": ("RMSprop", {"momentum": 0.9, "centered": True}, {}),
    "Adam-amsgrad": ("Adam", {"amsgrad": True}, {}),
    "Adam-clipvalue": ("Adam", {"clipvalue": 0.25}, {}),
    "Adam-use_ema": ("Adam", {"use_ema": True, "ema_overwrite_frequency": 2}, {}),
    "Adam-loss_scale_factor": ("Adam", {"loss_scale_factor": 8.0}, {}),
    "AdamW-weight_decay": ("AdamW", {"weight_decay": 0.5}, {}),
    "AdamW-weight_decay-jit": ("AdamW", {"weight_decay": 0.5}, {"jit_compile": True}),
    "ScheduleFreeAdamW-weight_decay": ("ScheduleFreeAdamW", {"weight_decay": 0.1}, {}),
}
REFUSED_LAZY = ("ScheduleFreeAdamW", "use_ema", "loss_scale_factor")
CASES = [
    (option, lazy)
    for option in OPTIONS
    for lazy in (False, True)
    if not (lazy and any(part in option for part in REFUSED_LAZY))
]


@pytest.mark.parametrize(("option", "lazy"), CASES)
def test_a_cohort_trains_as_under_an_optimizer_that_began_there_with_its_own_rate(
    option: str, lazy: bool
) -> None:
    name, settings, compiled = OPTIONS[option]
    # Tracing takes longer than a run does, so these and what is compiled stand for traced steps.
    compiled = compiled or {"run_eagerly": option not in ("Adam", "SGD-momentum")}
    kind, data = getattr(keras.optimizers, name), batches(every_row=lazy)
    model = model_of(rowwise(kind(RATE, **settings), lazy), SCALED, **compiled)
    tables = run(model, SCALED, data)
    assert_cohorts_train_as_alone(tables, lambda own: kind(Scaled(own), **settings), data)


def test_a_schedule_and_a_scaled_loss_compose_with_rates_of_rows() -> None:
    falling = keras.optimizers.schedules.ExponentialDecay(RATE, 3, 0.5, staircase=True)
    adamw = keras.optimizers.AdamW
    optimizer = keras.optimizers.LossScaleOptimizer(rowwise(adamw(falling, weight_decay=0.5)))
    tables = run(model_of(optimizer, SCALED), SCALED)
    assert_cohorts_train_as_alone(
        tables, lambda own: adamw(Scaled(own, falls=True), weight_decay=0.5), batches()
    )


@pytest.mark.parametrize("compiled", [{}, {"jit_compile": True}], ids=str)
def test_rows_at_the_optimizers_own_rate_move_as_under_the_plain_one(
    compiled: dict[str, Any],
) -> None:
    # SGD, since others raise to the power of a row's steps, one number for each row.
    make = lambda: keras.optimizers.SGD(RATE, weight_decay=0.1)  # noqa: E731
    wrapped, alone = (
        run(model_of(optimizer, **compiled))[-1] for optimizer in (rowwise(make()), make())
    )
    assert wrapped.tobytes() == alone.tobytes()


def test_rates_are_assigned_without_tracing_again_and_kept_in_a_file(tmp_path: Path) -> None:
    whole = model_of(rowwise(keras.optimizers.AdamW(RATE)), SCALED)
    traces, step = [], whole.train_step
    whole.train_step = lambda data: (traces.append(1), step(data))[1]
    expected = run(whole, SCALED)[-1]
    assert len(traces) == 1
    half = model_of(rowwise(keras.optimizers.AdamW(RATE)), SCALED)
    run(half, SCALED, end=3)
    half.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    # As a callback does that goes on: rows that made a step already keep their rate.
    again.layers[0].set_trainable_rows(SCALED[2][0], lr_scale=100)
    assert run(again, SCALED, begin=3)[-1].tobytes() == expected.tobytes()


def test_a_row_takes_the_rate_that_it_begins_with() -> None:
    model = model_of(rowwise(keras.optimizers.SGD(1.0)))
    layer, batch = model.layers[0], (np.array([RESERVED]), np.ones((1, len(RESERVED), WIDTH)))
    before = layer.get_weights()[0]
    layer.set_trainable_rows([1, 2], lr_scale=0.5)
    layer.unfreeze_rows([5], lr_scale=0.25)
    layer.freeze_rows([2])
    model.train_on_batch(*batch)
    layer.unfreeze_rows([1, 2, 7])
    model.train_on_batch(*batch)
    moved = (before - layer.get_weights()[0])[[1, 2, 5, 7]].mean(axis=1)
    np.testing.assert_allclose(moved, [1.0, 1.0, 0.5, 1.0], rtol=1e-6)


def test_a_rate_that_nobody_keeps_is_refused() -> None:
    layer = PartialEmbedding(4, 2, trainable_rows=[1], reserve_rows="all", name="words")
    with pytest.raises(InputError, match=r"Received: RateScale\(lr_scale=0.5, .* optimizer\.build"):
        layer.unfreeze_rows([2], lr_scale=0.5)
    layer.build()
    rowwise(keras.optimizers.SGD()).build(layer.trainable_variables)
    layer.unfreeze_rows([2], lr_scale=0.5)
    plain = keras.optimizers.SGD()
    gradients = [tf.ones((4, 2))]
    with pytest.raises(InputError, match=r"Received another optimizer for 'words'"):
        plain.apply(gradients, layer.trainable_variables)


def test_another_optimizer_may_follow_where_no_row_has_a_rate_of_its_own() -> None:
    layer = PartialEmbedding(4, 2, trainable_rows=[1], reserve_rows="all", name="words")
    layer.build()
    rowwise(keras.optimizers.SGD()).build(layer.trainable_variables)
    layer.unfreeze_rows([2])
    keras.optimizers.SGD().apply([tf.ones((4, 2))], layer.trainable_variables)
    with pytest.raises(InputError, match="a learning rate of rows is what rowwise"):
        layer.set_trainable_rows([3], warmup_steps=5)
    assert layer.trainable_rows.tolist() == [1, 2]
