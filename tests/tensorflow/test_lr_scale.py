"""Rows of one table that learn at rates of their own.

The reference is one variable for each cohort, with a plain optimizer of its own whose learning rate
is a schedule that follows the cohort's rate scale.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from partial_embedding import InputError  # noqa: E402  # after the skip
from partial_embedding.schedule import RateScale  # noqa: E402
from partial_embedding.tensorflow import PartialEmbedding, rowwise  # noqa: E402
from partial_embedding.tensorflow.served import SERVED  # noqa: E402

NUM_ROWS, WIDTH, RATE = 12, 4, 0.05
RESERVED = [1, 2, 5, 7, 8, 11]
MATRIX = np.random.default_rng(1).normal(size=(NUM_ROWS, WIDTH)).astype(np.float32)
# The rows that train from a step on, and the rate scale of those that join there.
MOVES: dict[int, tuple[list[int], RateScale | None]] = {
    0: ([2, 7], RateScale(lr_scale=0.5)),
    2: ([2, 5, 7], RateScale(lr_scale=0.25, warmup_steps=3)),
    4: ([2, 5, 8, 11], RateScale(warmup_steps=2)),
    5: ([1, 2, 5, 7, 8, 11], None),
}
STEPS = 8
# The rows of a cohort, its rate scale, and the steps that it makes.
COHORTS = [
    ([2], RateScale(lr_scale=0.5), 0, 8),
    ([7], RateScale(lr_scale=0.5), 0, 4),
    ([5], RateScale(lr_scale=0.25, warmup_steps=3), 2, 8),
    ([8, 11], RateScale(warmup_steps=2), 4, 8),
    ([1, 7], RateScale(), 5, 8),
]

OPTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{name: (name, {}, {}) for name in SERVED},
    "SGD-momentum": ("SGD", {"momentum": 0.9}, {}),
    "SGD-weight_decay": ("SGD", {"weight_decay": 0.5}, {}),
    "AdamW-weight_decay-jit": ("AdamW", {"weight_decay": 0.5}, {"jit_compile": True}),
    "AdamW-weight_decay": ("AdamW", {"weight_decay": 0.5}, {}),
    "Adam-clipvalue": ("Adam", {"clipvalue": 0.25}, {}),
}


class Scaled(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """The rate of a cohort: its rate scale, and the optimizer's rate at the step at which it is."""

    def __init__(self, rate_scale: RateScale, start: int, falls: bool = False) -> None:
        self.rate_scale, self.start, self.falls = rate_scale, start, falls

    def __call__(self, step: Any) -> Any:
        rates = [
            RATE
            * self.rate_scale.factor(age)
            * (0.5 ** ((age + self.start) // 3) if self.falls else 1)
            for age in range(STEPS + 1)
        ]
        return tf.gather(tf.constant(rates, tf.float32), step)


def _batches(every_row: bool = False) -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(0)
    shape = (4, 6) if every_row else (4, 5)
    ids = np.tile(np.arange(NUM_ROWS), 2).reshape(shape) if every_row else None
    return [
        (
            rng.integers(0, NUM_ROWS, shape) if ids is None else ids,
            rng.integers(-8, 9, (*shape, WIDTH)).astype(np.float32) / 8,
        )
        for _ in range(STEPS)
    ]


def _loss(upstream: Any, rows: Any) -> Any:
    return tf.reduce_sum(upstream * rows)


def _model(optimizer: Any, **settings: Any) -> Any:
    layer = PartialEmbedding.from_matrix(
        MATRIX, trainable_rows=MOVES[0][0], reserve_rows=RESERVED, name="words"
    )
    model = keras.Sequential([keras.Input((None,), dtype="int64"), layer])
    model.compile(optimizer, loss=_loss, **settings)
    optimizer.build(model.trainable_variables)
    return model


def _run(model: Any, batches: list[Any], moves: Any = MOVES, begin: int = 0) -> list[Any]:
    layer, tables = model.layers[0], [model.layers[0].get_weights()[0]]
    for step, (ids, upstream) in enumerate(batches[begin:], start=begin):
        if step in moves:
            rows, rate_scale = moves[step]
            layer.set_trainable_rows(rows, **vars(rate_scale or RateScale()))
        model.train_on_batch(ids, upstream)
        tables.append(layer.get_weights()[0])
    return tables


def _alone(
    make: Any, cohort: tuple[list[int], RateScale, int, int], batches: list[Any], tables: list[Any]
) -> Any:
    rows, rate_scale, start, stop = cohort
    table, optimizer = keras.Variable(tables[start][rows]), make(rate_scale, start)
    optimizer.build([table])
    for ids, upstream in batches[start:stop]:
        gradient = np.zeros(MATRIX.shape, np.float32)
        np.add.at(gradient, ids, upstream)
        optimizer.apply([tf.constant(gradient[rows])], [table])
    return table.numpy()


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_cohort_trains_as_under_an_optimizer_with_its_own_learning_rate(
    option: str, lazy: bool
) -> None:
    name, settings, compiled = OPTIONS[option]
    if lazy and name == "ScheduleFreeAdamW":
        pytest.skip("lazy=True refuses it")
    # Tracing takes longer than a run does, so these and what is compiled stand for traced steps.
    compiled = compiled or {"run_eagerly": option not in ("Adam", "SGD-momentum")}
    kind = getattr(keras.optimizers, name)
    batches = _batches(every_row=lazy)
    tables = _run(_model(rowwise(kind(RATE, **settings), lazy), **compiled), batches)
    for cohort in COHORTS:
        expected = _alone(lambda *own: kind(Scaled(*own), **settings), cohort, batches, tables)
        rows, stop = cohort[0], cohort[-1]
        np.testing.assert_allclose(tables[stop][rows], expected, rtol=1e-5, atol=1e-7)


def test_a_schedule_and_a_scaled_loss_compose_with_rates_of_rows() -> None:
    falling = keras.optimizers.schedules.ExponentialDecay(RATE, 3, 0.5, staircase=True)
    optimizer = keras.optimizers.LossScaleOptimizer(
        rowwise(keras.optimizers.AdamW(falling, weight_decay=0.5))
    )
    batches = _batches()
    tables = _run(_model(optimizer), batches)
    for cohort in COHORTS:
        expected = _alone(
            lambda rate_scale, start: keras.optimizers.AdamW(
                Scaled(rate_scale, start, True), weight_decay=0.5
            ),
            cohort,
            batches,
            tables,
        )
        rows, stop = cohort[0], cohort[-1]
        np.testing.assert_allclose(tables[stop][rows], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("compiled", [{}, {"jit_compile": True}], ids=str)
def test_rows_at_the_optimizers_own_rate_move_as_under_the_plain_one(
    compiled: dict[str, Any],
) -> None:
    # SGD, since others raise to the power of a row's steps, one number for each row.
    make = lambda: keras.optimizers.SGD(RATE, weight_decay=0.1)  # noqa: E731
    plain = {step: (rows, RateScale()) for step, (rows, _) in MOVES.items()}
    wrapped, alone = (
        _run(_model(optimizer, **compiled), _batches(), plain)[-1]
        for optimizer in (rowwise(make()), make())
    )
    assert wrapped.tobytes() == alone.tobytes()


def test_rates_are_assigned_without_tracing_again_and_kept_in_a_file(tmp_path: Path) -> None:
    batches = _batches()
    whole = _model(rowwise(keras.optimizers.AdamW(RATE)))
    traces, step = [], whole.train_step
    whole.train_step = lambda data: (traces.append(1), step(data))[1]
    expected = _run(whole, batches)[-1]
    assert len(traces) == 1
    half = _model(rowwise(keras.optimizers.AdamW(RATE)))
    _run(half, batches[:3])
    half.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras", custom_objects={"_loss": _loss})
    # As a callback does that goes on: rows that made a step already keep their rate.
    again.layers[0].set_trainable_rows(MOVES[2][0], lr_scale=100)
    assert _run(again, batches, begin=3)[-1].tobytes() == expected.tobytes()


def test_a_row_takes_the_rate_that_it_begins_with() -> None:
    model = _model(rowwise(keras.optimizers.SGD(1.0)))
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
