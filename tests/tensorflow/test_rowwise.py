"""`rowwise`: rows that join late train as if the optimizer had just begun, and lazy steps.

The reference is one variable for each cohort, with a plain optimizer of its own from the step that
the cohort joined at.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from partial_embedding import InputError  # noqa: E402  # after the skip
from partial_embedding.tensorflow import PartialEmbedding, rowwise  # noqa: E402
from partial_embedding.tensorflow.served import SERVED  # noqa: E402

NUM_ROWS, WIDTH, STEPS = 12, 4, 7
RESERVED = [1, 2, 5, 7, 8, 11]
MATRIX = np.random.default_rng(1).normal(size=(NUM_ROWS, WIDTH)).astype(np.float32)
# Rows 2 and 7 train throughout, 5 and 11 join at step 3, row 8 leaves at 2 and joins again at 5.
SCHEDULE = [[2, 7, 8]] * 2 + [[2, 7]] + [[2, 5, 7, 11]] * 2 + [[2, 5, 7, 8, 11]] * 2
COHORTS = [([2, 7], 0, 7), ([8], 0, 2), ([5, 11], 3, 7), ([8], 5, 7)]

OPTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{name: (name, {}, {}) for name in SERVED},
    "SGD-nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}, {}),
    "RMSprop-centered": ("RMSprop", {"momentum": 0.9, "centered": True}, {}),
    "Adam-amsgrad": ("Adam", {"amsgrad": True}, {}),
    "Adam-weight_decay": ("Adam", {"weight_decay": 0.1}, {}),
    "ScheduleFreeAdamW-weight_decay": ("ScheduleFreeAdamW", {"weight_decay": 0.1}, {}),
    "Adam-use_ema": ("Adam", {"use_ema": True, "ema_overwrite_frequency": 2}, {}),
    "Adam-clipvalue": ("Adam", {"clipvalue": 0.25}, {}),
    "Adam-loss_scale_factor": ("Adam", {"loss_scale_factor": 8.0}, {}),
    "Adam-jit": ("Adam", {}, {"jit_compile": True}),
    "Adam-eager": ("Adam", {}, {"run_eagerly": True}),
    "SGD-eager": ("SGD", {"momentum": 0.9}, {"run_eagerly": True}),
}


def _batches(seed: int = 0, steps: int = STEPS) -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(seed)
    return [
        (
            rng.integers(0, NUM_ROWS, (4, 5)),
            rng.integers(-8, 9, (4, 5, WIDTH)).astype(np.float32) / 8,
        )
        for _ in range(steps)
    ]


def _gradient(ids: Any, upstream: Any) -> Any:
    gradient = np.zeros(MATRIX.shape, np.float32)
    np.add.at(gradient, ids, upstream)
    return gradient


def _model(optimizer: Any, **settings: Any) -> Any:
    layer = PartialEmbedding.from_matrix(MATRIX, trainable_rows=SCHEDULE[0], reserve_rows=RESERVED)
    model = keras.Sequential([keras.Input((None,), dtype="int64"), layer])
    model.compile(optimizer, loss=lambda upstream, rows: tf.reduce_sum(upstream * rows), **settings)
    return model


def _run(model: Any, schedule: list[list[int]] = SCHEDULE) -> list[Any]:
    layer, tables = model.layers[0], [model.layers[0].get_weights()[0]]
    for rows, (ids, upstream) in zip(schedule, _batches(), strict=True):
        layer.set_trainable_rows(rows)
        model.train_on_batch(ids, upstream)
        tables.append(layer.get_weights()[0])
    return tables


def _alone(make: Any, rows: list[int], start: int, stop: int, before: Any) -> Any:
    table, optimizer = keras.Variable(before[rows]), make()
    optimizer.build([table])
    for ids, upstream in _batches()[start:stop]:
        gradient = tf.constant(_gradient(ids, upstream)[rows])
        optimizer.apply([optimizer.scale_loss(gradient)], [table])
    return table.numpy()


@pytest.mark.parametrize("option", OPTIONS)
def test_a_cohort_that_joins_late_trains_as_if_the_optimizer_began_there(option: str) -> None:
    name, settings, compiled = OPTIONS[option]
    make = lambda: getattr(keras.optimizers, name)(learning_rate=0.05, **settings)  # noqa: E731
    tables = _run(_model(rowwise(make()), **compiled))
    for rows, start, stop in COHORTS:
        if "overwrite" in str(settings) and start % 2:
            continue  # a lone optimizer overwrites at its own even steps
        expected = _alone(make, rows, start, stop, tables[start])
        np.testing.assert_allclose(tables[stop][rows], expected, rtol=2e-6, atol=1e-7)
    for rows, before, after in zip(SCHEDULE, tables, tables[1:], strict=False):
        frozen = np.setdiff1d(np.arange(NUM_ROWS), rows)
        assert after[frozen].tobytes() == before[frozen].tobytes()


def test_a_plain_optimizer_kicks_rows_that_join_late_and_rowwise_does_not() -> None:
    first_steps = []
    for optimizer in (keras.optimizers.Adam(0.05), rowwise(keras.optimizers.Adam(0.05))):
        model = _model(optimizer)
        tables = _run(model)
        optimizer.iterations.assign(1000)
        model.layers[0].set_trainable_rows([1])
        model.train_on_batch(np.array([[1]]), np.ones((1, 1, WIDTH)))
        first_steps.append(np.abs(model.layers[0].get_weights()[0] - tables[-1]).max())
    assert first_steps[0] > 2 * 0.05
    assert first_steps[1] <= 0.0501


def test_other_variables_step_as_under_the_plain_optimizer() -> None:
    def train(optimizer: Any) -> Any:
        keras.utils.set_random_seed(0)
        layer = PartialEmbedding.from_matrix(MATRIX, trainable_rows=RESERVED)
        inputs = keras.Input((5,), dtype="int64")
        model = keras.Model(inputs, keras.layers.Dense(3)(layer(inputs)))
        model.compile(optimizer, "mse")
        for ids, _ in _batches():
            model.train_on_batch(ids, np.ones((4, 5, 3)))
        return model.get_weights()

    for plain, ours in zip(
        train(keras.optimizers.AdamW(0.05)),
        train(rowwise(keras.optimizers.AdamW(0.05))),
        strict=True,
    ):
        np.testing.assert_allclose(ours, plain, rtol=1e-6, atol=1e-7)


# Lazy steps


def _sparse_adam(rate: float, decay: float = 0.0) -> Any:
    """`torch.optim.SparseAdam` in numpy, with decoupled weight decay of touched rows."""
    table, mean, square = MATRIX.astype(np.float64), 0 * MATRIX, 0 * MATRIX
    for step, (ids, upstream) in enumerate(_batches(), start=1):
        rows = np.intersect1d(np.unique(ids), RESERVED)
        gradient = _gradient(ids, upstream)[rows]
        table[rows] -= decay * rate * table[rows]
        mean[rows] += (gradient - mean[rows]) * 0.1
        square[rows] += (gradient**2 - square[rows]) * 0.001
        size = rate * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
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
    tables = _run(_model(optimizer, **settings), [RESERVED] * STEPS)
    np.testing.assert_allclose(tables[-1], _sparse_adam(0.01, decay or 0.0), rtol=0, atol=1e-6)
    for (ids, _), before, after in zip(_batches(), tables, tables[1:], strict=False):
        untouched = np.setdiff1d(np.arange(NUM_ROWS), np.intersect1d(ids, RESERVED))
        assert after[untouched].tobytes() == before[untouched].tobytes()


@pytest.mark.parametrize("name", [name for name in SERVED if name != "ScheduleFreeAdamW"])
def test_lazy_is_the_same_where_every_row_is_touched(name: str) -> None:
    ids = np.tile(np.arange(NUM_ROWS), 2).reshape(4, 6)
    upstream = np.random.default_rng(3).integers(-8, 9, (4, 6, WIDTH)).astype(np.float32) / 8
    make = lambda: getattr(keras.optimizers, name)(learning_rate=0.05)  # noqa: E731
    ends = []
    for lazy in (False, True):
        # Tracing takes longer than a run does, so these two stand for traced ones.
        model = _model(rowwise(make(), lazy=lazy), run_eagerly=name not in ("Adam", "Ftrl"))
        for rows in SCHEDULE:
            model.layers[0].set_trainable_rows(rows)
            model.train_on_batch(ids, upstream)
        ends.append(model.layers[0].get_weights()[0])
    # A step's size is computed for one row or for all, which rounds differently.
    np.testing.assert_allclose(ends[1], ends[0], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm", "clipvalue"])
def test_lazy_clips_as_the_dense_gradient_would_be(clip: str) -> None:
    settings = {"learning_rate": 0.05, clip: 0.5}
    ends = [
        _run(_model(optimizer, run_eagerly=True), [RESERVED] * STEPS)[-1]
        for optimizer in (
            rowwise(keras.optimizers.SGD(**settings), lazy=True),
            keras.optimizers.SGD(**settings),
        )
    ]
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-5, atol=1e-7)


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "plain": ({}, {}, False),
    "eager": ({}, {"run_eagerly": True}, False),
    "clipnorm": ({"clipnorm": 0.5}, {}, False),
    "global_clipnorm": ({"global_clipnorm": 0.5}, {}, False),
    "clipvalue": ({"clipvalue": 0.25}, {}, False),
    "loss_scale": ({}, {}, True),
    "loss_scale-jit": ({}, {"jit_compile": True}, True),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_lazy_step_moves_rows_that_were_looked_up_whatever_their_gradient(variant: str) -> None:
    settings, compiled, scaled = VARIANTS[variant]
    optimizer = rowwise(keras.optimizers.Adam(0.05, **settings), lazy=True)
    model = _model(keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer)
    model.compile(model.optimizer, model.loss, **compiled)
    layer, (first, second, *_, last) = model.layers[0], RESERVED
    layer.set_trainable_rows(RESERVED)
    for row in RESERVED:
        model.train_on_batch(np.array([[row, 0]]), np.ones((1, 2, WIDTH)))
    for ids, gradient, moves in [
        ([0, 3], 1.0, []),
        ([0, first], 0.0, [first]),
        ([first, first], -0.0, [first]),
        ([0, last], -0.0, [last]),
        ([second, first], 0.0, [first, second]),
    ]:
        before = layer.get_weights()[0]
        model.train_on_batch(np.array([ids]), np.full((1, 2, WIDTH), gradient, np.float32))
        moved = np.flatnonzero((layer.get_weights()[0] != before).any(axis=1)).tolist()
        assert moved == moves, (ids, gradient)


def test_a_lazy_step_on_an_empty_batch_moves_nothing() -> None:
    model = _model(rowwise(keras.optimizers.Adam(0.05), lazy=True))
    model.train_on_batch(np.zeros((1, 0), int), np.ones((1, 0, WIDTH)))
    assert model.layers[0].get_weights()[0].tobytes() == MATRIX.tobytes()


def test_a_lazy_step_counts_a_row_of_two_look_ups_and_of_a_tied_head() -> None:
    layer = PartialEmbedding.from_matrix(MATRIX, trainable_rows=RESERVED)
    optimizer = rowwise(keras.optimizers.Adam(0.05), lazy=True)
    layer.build()
    optimizer.build(weights := layer.trainable_variables)

    def moved(*parts: Any) -> list[int]:
        before = layer.get_weights()[0]
        with tf.GradientTape() as tape:
            loss = sum(tf.reduce_sum(part()) for part in parts)
        optimizer.apply(tape.gradient(loss, [v.value for v in weights]), weights)
        return np.flatnonzero((layer.get_weights()[0] != before).any(axis=1)).tolist()

    rows = lambda *ids: lambda: layer(np.array(ids))  # noqa: E731
    assert moved(rows(0, 1, 2), rows(2, 11)) == [1, 2, 11]
    assert moved(rows(0), lambda: 0 * layer(np.array([1]))) == [1]
    assert moved(rows(5), lambda: layer.embeddings[7:9]) == [5, 7, 8]


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

        return twice(tf.constant(_batches()[0][0]))

    for lazily, densely in zip(penalty(lazy=True), penalty(lazy=False), strict=True):
        assert np.abs(densely).max() > 1
        np.testing.assert_allclose(lazily, densely, rtol=1e-5)


def test_a_plain_optimizer_after_a_lazy_one_is_refused_and_a_wrapped_one_is_not() -> None:
    model = _model(rowwise(keras.optimizers.Adam(0.05), lazy=True))
    ids, upstream = _batches()[0]
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

    def step(optimizer: Any, row: int) -> list[int]:
        before = layer.get_weights()[0]
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(tf.constant([row])))
        weights = layer.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return np.flatnonzero((layer.get_weights()[0] != before).any(axis=1)).tolist()

    for optimizer, is_lazy in zip(optimizers, lazy, strict=True):
        step(optimizer, 2)
        # Momentum moves rows that no batch touches, but not lazily.
        assert step(optimizer, 7) == ([7] if is_lazy else [2, 7])
    layer.unfreeze_rows([5], lr_scale=0.5)
    assert [one.row_scales(layer.rows_variable).are_plain for one in optimizers] == [False] * 2


@pytest.mark.parametrize("first", [False, True])
def test_variables_can_be_excluded_from_weight_decay(first: bool) -> None:
    own = keras.optimizers.SGD(0.05, weight_decay=0.1)
    if first:
        own.exclude_from_weight_decay(var_names=["embeddings"])
    model = _model(optimizer := rowwise(own), run_eagerly=True)
    if not first:
        optimizer.exclude_from_weight_decay(var_names=["embeddings"])
    plain = _model(keras.optimizers.SGD(0.05), run_eagerly=True)
    np.testing.assert_array_equal(_run(model)[-1], _run(plain)[-1])


@pytest.mark.parametrize("lazy", [False, True])
def test_it_works_inside_a_loss_scale_optimizer(lazy: bool) -> None:
    inner = rowwise(keras.optimizers.Adam(0.05), lazy=lazy)
    scaled = _run(_model(keras.optimizers.LossScaleOptimizer(inner)))
    plain = _run(_model(rowwise(keras.optimizers.Adam(0.05), lazy=lazy)))
    np.testing.assert_allclose(scaled[-1], plain[-1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("lazy", [False, True])
def test_it_works_in_a_loop_of_ones_own(lazy: bool) -> None:
    layer = PartialEmbedding.from_matrix(MATRIX, trainable_rows=SCHEDULE[0], reserve_rows=RESERVED)
    optimizer = rowwise(keras.optimizers.Adam(0.05), lazy=lazy)
    optimizer.build(layer.trainable_variables)

    @tf.function
    def step(ids: Any, upstream: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(ids) * upstream)
        weights = layer.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))

    for rows, (ids, upstream) in zip(SCHEDULE, _batches(), strict=True):
        layer.set_trainable_rows(rows)
        step(tf.constant(ids), tf.constant(upstream))
    expected = _run(_model(rowwise(keras.optimizers.Adam(0.05), lazy=lazy)))
    np.testing.assert_allclose(layer.get_weights()[0], expected[-1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_file_goes_on_where_the_run_stood(lazy: bool, tmp_path: Path) -> None:
    schedule = keras.optimizers.schedules.ExponentialDecay(0.05, 3, 0.5)
    model = _model(rowwise(keras.optimizers.Adam(schedule), lazy=lazy))
    model.loss = "mse"
    model.compile(model.optimizer, "mse")
    batches = _batches()

    def train(model: Any, part: slice) -> None:
        for rows, (ids, upstream) in list(zip(SCHEDULE, batches, strict=True))[part]:
            model.layers[0].set_trainable_rows(rows)
            model.train_on_batch(ids, upstream)

    train(model, slice(4))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.optimizer.lazy is lazy
    train(model, slice(4, None))
    train(again, slice(4, None))
    expected = model.layers[0].get_weights()[0]
    assert again.layers[0].get_weights()[0].tobytes() == expected.tobytes()


def test_state_is_no_larger_than_the_reserved_rows() -> None:
    model = _model(rowwise(keras.optimizers.Adam()))
    model.optimizer.build(model.trainable_variables)
    sizes = sorted(int(np.prod(v.shape)) for v in model.optimizer.variables)
    # Step, rate, then when each row joined, its factor and its warm-up, and two moments.
    assert sizes == [1, 1, 6, 6, 6, 24, 24]


def test_the_wrapped_optimizer_is_left_alone() -> None:
    inner = keras.optimizers.Adam(0.05, use_ema=True)
    before = inner.get_config()
    optimizer = rowwise(inner)
    _run(_model(optimizer))
    assert inner.get_config() == before
    assert not inner.built
    optimizer.learning_rate = 0.01
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    np.testing.assert_allclose(float(again.learning_rate), 0.01, rtol=1e-6)


@pytest.mark.parametrize("name", ["Adafactor", "Lamb", "Muon", "Nadam"])
def test_optimizers_that_it_cannot_serve_are_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match=f"Received: {name}"):
        rowwise(getattr(keras.optimizers, name)())


def test_options_that_it_cannot_serve_are_refused() -> None:
    adam = keras.optimizers.Adam
    with pytest.raises(InputError, match="Received ScheduleFreeAdamW"):
        rowwise(keras.optimizers.ScheduleFreeAdamW(), lazy=True)
    with pytest.raises(InputError, match="no beginning"):
        rowwise(adam(use_ema=True, gradient_accumulation_steps=2))
    for option in (
        {"use_ema": True},
        {"gradient_accumulation_steps": 2},
        {"loss_scale_factor": 2.0},
    ):
        with pytest.raises(InputError, match=next(iter(option))):
            rowwise(adam(**option), lazy=True)
    built = adam()
    built.build([keras.Variable([1.0])])
    with pytest.raises(InputError, match="before its first step"):
        rowwise(built)
    layer = PartialEmbedding(4, 2, trainable_rows=[1], embeddings_constraint="non_neg")
    layer.build()
    with pytest.raises(InputError, match="embeddings_constraint"):
        rowwise(adam(), lazy=True).build(layer.trainable_variables)
