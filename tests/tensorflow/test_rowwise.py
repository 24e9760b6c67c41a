"""`rowwise`: lazy steps and the optimizers around it; its cohorts are in `test_lr_scale.py`."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from cohorts import (
    MATRIX,
    MOVES,
    NUM_ROWS,
    RESERVED,
    WIDTH,
    batches,
    gradient,
    model_of,
    moved,
    run,
    step,
)

from partial_embedding import InputError
from partial_embedding.schedule import RateScale
from partial_embedding.tensorflow import PartialEmbedding, rowwise

EVERY = {0: (RESERVED, RateScale())}


@pytest.mark.parametrize("lazy", [False, True])
def test_rows_count_on_where_the_steps_of_an_optimizer_are_set_back(lazy: bool) -> None:
    late = {0: ("none", RateScale()), 3: (RESERVED, RateScale())}
    ends = []
    for moves, begin in ((late, 0), (EVERY, 3)):
        model = model_of(rowwise(keras.optimizers.Adam(0.05), lazy), moves, run_eagerly=True)
        run(model, moves, begin=begin)
        model.optimizer.iterations.assign(0)
        run(model, {}, end=3)
        ends.append(model.layers[0].get_weights()[0])
    assert np.isfinite(ends[0]).all()
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-6, atol=1e-7)


def test_other_variables_step_as_under_the_plain_optimizer() -> None:
    def train(optimizer: Any) -> Any:
        keras.utils.set_random_seed(0)
        layer = PartialEmbedding.from_matrix(MATRIX, trainable_rows=RESERVED)
        inputs = keras.Input((5,), dtype="int64")
        model = keras.Model(inputs, keras.layers.Dense(3)(layer(inputs)))
        model.compile(optimizer, "mse", run_eagerly=True)
        for ids, _ in batches():
            model.train_on_batch(ids, np.ones((4, 5, 3)))
        return model.get_weights()

    make = lambda: keras.optimizers.AdamW(0.05)  # noqa: E731
    for plain, ours in zip(train(make()), train(rowwise(make())), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-6, atol=1e-7)


# Lazy steps


def _sparse_adam(rate: float, decay: float = 0.0) -> Any:
    """`torch.optim.SparseAdam` in numpy, with decoupled weight decay of touched rows."""
    table, mean, square = MATRIX.astype(np.float64), 0 * MATRIX, 0 * MATRIX
    for count, (ids, upstream) in enumerate(batches(), start=1):
        rows = np.intersect1d(np.unique(ids), RESERVED)
        own = gradient(ids, upstream)[rows]
        table[rows] -= decay * rate * table[rows]
        mean[rows] += (own - mean[rows]) * 0.1
        square[rows] += (own**2 - square[rows]) * 0.001
        size = rate * np.sqrt(1 - 0.999**count) / (1 - 0.9**count)
        table[rows] -= size * mean[rows] / (np.sqrt(square[rows]) + 1e-7)
    return table


@pytest.mark.parametrize(
    ("settings", "decay"),
    [({}, None), ({}, 0.1), ({"jit_compile": True}, 0.1), ({"run_eagerly": True}, 0.1)],
    ids=str,
)
def test_lazy_adam_steps_the_rows_that_the_batch_touched(
    decay: float | None, settings: dict[str, Any]
) -> None:
    optimizer = rowwise(keras.optimizers.Adam(0.01, weight_decay=decay), lazy=True)
    tables = run(model_of(optimizer, **settings), EVERY)
    np.testing.assert_allclose(tables[-1], _sparse_adam(0.01, decay or 0.0), rtol=0, atol=1e-6)
    for (ids, _), before, after in zip(batches(), tables, tables[1:], strict=False):
        untouched = np.setdiff1d(np.arange(NUM_ROWS), np.intersect1d(ids, RESERVED))
        assert after[untouched].tobytes() == before[untouched].tobytes()


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm", "clipvalue"])
def test_lazy_clips_as_the_dense_gradient_would_be(clip: str) -> None:
    settings = {"learning_rate": 0.05, clip: 0.5}
    ends = [
        run(model_of(optimizer, run_eagerly=True), EVERY)[-1]
        for optimizer in (
            rowwise(keras.optimizers.SGD(**settings), lazy=True),
            keras.optimizers.SGD(**settings),
        )
    ]
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-5, atol=1e-7)


EAGER = {"run_eagerly": True}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    # Tracing takes longer than a run does, so the first and the last stand for traced steps.
    "plain": ({}, {}, False),
    "eager": ({}, EAGER, False),
    "clipnorm": ({"clipnorm": 0.5}, EAGER, False),
    "global_clipnorm": ({"global_clipnorm": 0.5}, EAGER, False),
    "clipvalue": ({"clipvalue": 0.25}, EAGER, False),
    "loss_scale": ({}, EAGER, True),
    "loss_scale-jit": ({}, {"jit_compile": True}, True),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_lazy_step_moves_rows_that_were_looked_up_whatever_their_gradient(variant: str) -> None:
    settings, compiled, scaled = VARIANTS[variant]
    optimizer = rowwise(keras.optimizers.Adam(0.05, **settings), lazy=True)
    model = model_of(keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer)
    model.compile(model.optimizer, model.loss, **compiled)
    layer, (first, second, *_, last) = model.layers[0], RESERVED
    layer.set_trainable_rows(RESERVED)
    for row in RESERVED:
        model.train_on_batch(np.array([[row, 0]]), np.ones((1, 2, WIDTH)))
    for ids, upstream, expected in [
        ([0, 3], 1.0, []),
        ([0, first], 0.0, [first]),
        ([first, first], -0.0, [first]),
        ([0, last], -0.0, [last]),
        ([second, first], 0.0, [first, second]),
    ]:
        before = layer.get_weights()[0]
        model.train_on_batch(np.array([ids]), np.full((1, 2, WIDTH), upstream, np.float32))
        assert moved(layer, before) == expected, (ids, upstream)


def test_a_lazy_step_on_an_empty_batch_moves_nothing() -> None:
    model = model_of(rowwise(keras.optimizers.Adam(0.05), lazy=True))
    model.train_on_batch(np.zeros((1, 0), int), np.ones((1, 0, WIDTH)))
    assert model.layers[0].get_weights()[0].tobytes() == MATRIX.tobytes()


def test_a_lazy_step_counts_a_row_of_two_look_ups_and_of_a_tied_head() -> None:
    layer = PartialEmbedding.from_matrix(MATRIX, trainable_rows=RESERVED)
    optimizer = rowwise(keras.optimizers.Adam(0.05), lazy=True)
    optimizer.build(layer.trainable_variables)
    rows = lambda *ids: lambda: layer(np.array(ids))  # noqa: E731
    assert step(layer, optimizer, rows(0, 1, 2), rows(2, 11)) == [1, 2, 11]
    assert step(layer, optimizer, rows(0), lambda: 0 * layer(np.array([1]))) == [1]
    assert step(layer, optimizer, rows(5), lambda: layer.embeddings[7:9]) == [5, 7, 8]


def test_a_lazy_optimizer_that_its_first_step_builds_makes_it_as_later_ones() -> None:
    def train(built: bool) -> list[Any]:
        layer = PartialEmbedding.from_matrix(MATRIX, trainable_rows=RESERVED)
        # What an earlier optimizer stepped is none of the later one's.
        step(layer, keras.optimizers.SGD(0.5), lambda: 0 * layer(np.array([0, 1])))
        optimizer = rowwise(keras.optimizers.SGD(0.5, weight_decay=0.1), lazy=True)
        if built:
            optimizer.build(layer.trainable_variables)
        parts = lambda: 0 * layer(np.array([0, 2, 7])), lambda: layer(np.array([11, 3]))
        rows = [step(layer, optimizer, *parts) for _ in range(2)]
        return [rows, layer.get_weights()[0].tolist()]

    rows, table = train(built=False)
    assert rows[0] == [2, 7, 11]
    assert [rows, table] == train(built=True)


@pytest.mark.parametrize("traced", ["gradient", "loss", "both"])
def test_a_function_that_was_traced_before_a_lazy_optimizer_was_built_is_refused(
    traced: str,
) -> None:
    layer = PartialEmbedding.from_matrix(MATRIX, trainable_rows=RESERVED)
    optimizer = rowwise(keras.optimizers.Adam(0.5, weight_decay=0.1), lazy=True)
    weights = layer.trainable_variables
    loss = lambda ids: tf.reduce_sum(0 * layer(ids))  # noqa: E731

    def gradients(ids: Any) -> Any:
        with tf.GradientTape() as tape:
            value = loss(ids)
        return tape.gradient(value, weights)

    def train(ids: Any) -> None:
        optimizer.apply_gradients(zip(gradients(ids), weights, strict=True))

    if traced == "loss":
        loss = tf.function(loss)
    else:
        gradients = tf.function(gradients)
    # A function within another is not traced again with it.
    make = (lambda: tf.function(train)) if traced == "both" else lambda: train
    ids = tf.constant([1, 0])
    for _ in range(2):
        with pytest.raises(InputError, match=r"Call optimizer\.build"):
            make()(ids)
        assert moved(layer, MATRIX) == []
    optimizer.build(weights)
    with pytest.raises(InputError, match="make the function anew"):
        make()(ids)
    if traced == "loss":
        loss = tf.function(loss.python_function)
    else:
        gradients = tf.function(gradients.python_function)
    make()(ids)
    assert moved(layer, MATRIX) == [1]


@pytest.mark.parametrize("jit", [None, True])
def test_a_gradient_is_differentiated_again_in_a_graph(jit: bool | None) -> None:
    def penalty(lazy: bool) -> Any:
        layer = PartialEmbedding.from_matrix(MATRIX, trainable_rows=RESERVED)
        rowwise(keras.optimizers.SGD(), lazy=lazy).build(layer.trainable_variables)
        (rows,) = layer.trainable_variables

        @tf.function(jit_compile=jit)
        def twice(ids: Any) -> Any:
            with tf.GradientTape() as outer:
                with tf.GradientTape() as inner:
                    loss = tf.reduce_sum(layer(ids) ** 3)
                first = tf.convert_to_tensor(inner.gradient(loss, rows.value))
                squares = tf.reduce_sum(first**2)
            return first, tf.convert_to_tensor(outer.gradient(squares, rows.value))

        return twice(tf.constant(batches()[0][0]))

    for lazily, densely in zip(penalty(lazy=True), penalty(lazy=False), strict=True):
        assert np.abs(densely).max() > 1
        np.testing.assert_allclose(lazily, densely, rtol=1e-5)


def test_a_plain_optimizer_after_a_lazy_one_is_refused_and_a_wrapped_one_is_not() -> None:
    model = model_of(rowwise(keras.optimizers.Adam(0.05), lazy=True))
    ids, upstream = batches()[0]
    model.train_on_batch(ids, upstream)
    model.compile(rowwise(keras.optimizers.Adam(0.05)), model.loss)
    model.train_on_batch(ids, upstream)
    model.compile(rowwise(keras.optimizers.Adam(0.05), lazy=True), model.loss)
    model.train_on_batch(ids, upstream)
    model.compile(keras.optimizers.Adam(0.05), model.loss)
    with pytest.raises(InputError, match="Wrap it by rowwise too"):
        model.train_on_batch(ids, upstream)


@pytest.mark.parametrize("lazy", [(False, True), (True, False)], ids=str)
def test_two_wrapped_optimizers_step_one_table_each_in_its_way(lazy: tuple[bool, bool]) -> None:
    layer = PartialEmbedding.from_matrix(MATRIX, trainable_rows=[2, 7], reserve_rows=RESERVED)
    optimizers = [rowwise(keras.optimizers.SGD(0.05, momentum=0.9), lazy=one) for one in lazy]
    for optimizer in optimizers:
        optimizer.build(layer.trainable_variables)

    for optimizer, is_lazy in zip(optimizers, lazy, strict=True):
        step(layer, optimizer, lambda: layer(np.array([2])))
        # Momentum moves rows that no batch touches, but not lazily.
        rows = step(layer, optimizer, lambda: layer(np.array([7])))
        assert rows == ([7] if is_lazy else [2, 7])
    layer.unfreeze_rows([5], lr_scale=0.5)
    assert [one.row_scales(layer.rows_variable).are_plain for one in optimizers] == [False] * 2


@pytest.mark.parametrize("first", [False, True])
def test_variables_can_be_excluded_from_weight_decay(first: bool) -> None:
    own = keras.optimizers.SGD(0.05, weight_decay=0.1)
    if first:
        own.exclude_from_weight_decay(var_names=["embeddings"])
    model = model_of(optimizer := rowwise(own), run_eagerly=True)
    if not first:
        optimizer.exclude_from_weight_decay(var_names=["embeddings"])
    plain = model_of(keras.optimizers.SGD(0.05), run_eagerly=True)
    np.testing.assert_array_equal(run(model)[-1], run(plain)[-1])


@pytest.mark.parametrize("lazy", [False, True])
def test_it_works_in_a_loop_of_ones_own(lazy: bool, caplog: pytest.LogCaptureFixture) -> None:
    # Of what it cannot turn into a graph, TensorFlow warns here.
    tf.get_logger().addHandler(caplog.handler)
    # An optimizer that the first step builds, while it is traced.
    layer = PartialEmbedding.from_matrix(MATRIX, trainable_rows=MOVES[0][0], reserve_rows=RESERVED)
    optimizer = rowwise(keras.optimizers.Adam(0.05), lazy=lazy)

    @tf.function
    def traced(ids: Any, upstream: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(ids) * upstream)
        weights = layer.trainable_variables
        optimizer.apply(tape.gradient(loss, weights), weights)

    for number, batch in enumerate(batches()):
        if number in MOVES:
            layer.set_trainable_rows(MOVES[number][0])
        traced(*map(tf.constant, batch))
    tf.get_logger().removeHandler(caplog.handler)
    assert "AutoGraph" not in caplog.text
    expected = run(model_of(rowwise(keras.optimizers.Adam(0.05), lazy=lazy)))
    np.testing.assert_allclose(layer.get_weights()[0], expected[-1], rtol=1e-6, atol=1e-7)


def test_state_is_no_larger_than_the_reserved_rows() -> None:
    model = model_of(rowwise(keras.optimizers.Adam()))
    model.optimizer.build(model.trainable_variables)
    sizes = sorted(int(np.prod(v.shape)) for v in model.optimizer.variables)
    # Step, rate, then when each row joined, its factor and its warm-up, and two moments.
    assert sizes == [1, 1, 6, 6, 6, 24, 24]


def test_the_wrapped_optimizer_is_left_alone() -> None:
    inner = keras.optimizers.Adam(0.05, use_ema=True)
    before = inner.get_config()
    optimizer = rowwise(inner)
    run(model_of(optimizer))
    assert inner.get_config() == before
    assert not inner.built
    optimizer.learning_rate = 0.01
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    np.testing.assert_allclose(float(again.learning_rate), 0.01, rtol=1e-6)


REFUSED: dict[str, tuple[Any, bool]] = {
    **{f"Received: {name}": (name, False) for name in ("Adafactor", "Lamb", "Muon", "Nadam")},
    "Received ScheduleFreeAdamW": ("ScheduleFreeAdamW", True),
    "no beginning": ({"use_ema": True, "gradient_accumulation_steps": 2}, False),
    "Received use_ema": ({"use_ema": True}, True),
    "Received gradient_accumulation_steps": ({"gradient_accumulation_steps": 2}, True),
    "Received loss_scale_factor": ({"loss_scale_factor": 2.0}, True),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_it_cannot_serve_is_refused_by_name(message: str) -> None:
    given, lazy = REFUSED[message]
    name, options = ("Adam", given) if isinstance(given, dict) else (given, {})
    with pytest.raises(InputError, match=message):
        rowwise(getattr(keras.optimizers, name)(**options), lazy)


def test_an_optimizer_that_is_built_and_a_lazy_one_of_a_constraint_are_refused() -> None:
    adam = keras.optimizers.Adam
    built = adam()
    built.build([keras.Variable([1.0])])
    with pytest.raises(InputError, match="before its first step"):
        rowwise(built)
    layer = PartialEmbedding(4, 2, trainable_rows=[1], embeddings_constraint="non_neg")
    layer.build()
    with pytest.raises(InputError, match="embeddings_constraint"):
        rowwise(adam(), lazy=True).build(layer.trainable_variables)
