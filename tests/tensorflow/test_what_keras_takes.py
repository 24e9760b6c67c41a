"""`rowwise` takes an optimizer in every form in which Keras does."""

from typing import Any

import keras
import numpy as np
import pytest
from cohorts import MATRIX, NUM_ROWS, WIDTH, moved, product

from partial_embedding import InputError
from partial_embedding.tensorflow import PartialEmbedding, rowwise

IDS = np.array([[1, 2, 3], [2, 2, 8]])
UPSTREAM = np.random.default_rng(0).integers(-8, 9, (2, 3, WIDTH)).astype(np.float32) / 8
RATE = 0.125


class Unregistered(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """As the Transformer tutorial has one: no `get_config`."""

    def __call__(self, step: Any) -> Any:
        return RATE


def a_function() -> float:
    return RATE


RATES = {"float": RATE, "lambda": lambda: RATE, "function": a_function, "schedule": Unregistered()}


def network(optimizer: Any, *more: Any) -> Any:
    rows = {"trainable_rows": [1, 2], "reserve_rows": [1, 2, 3]}
    layer = PartialEmbedding.from_matrix(MATRIX, **rows)
    model = keras.Sequential([keras.Input((3,), dtype="int64"), layer, *more])
    model.compile(optimizer, product)
    return model


def table_after(optimizer: Any) -> Any:
    model = network(optimizer)
    for _ in range(3):
        model.train_on_batch(IDS, UPSTREAM)
    return model.layers[0].get_weights()[0]


@pytest.mark.parametrize("kind", ["Adam", "SGD", "ScheduleFreeAdamW"])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("rate", ["lambda", "function", "schedule"])
def test_a_learning_rate_of_any_kind_is_that_number(rate: str, lazy: bool, kind: str) -> None:
    if lazy and kind == "ScheduleFreeAdamW":
        pytest.skip("lazy=True refuses it")
    make = getattr(keras.optimizers, kind)
    tables = [table_after(rowwise(make(RATES[name]), lazy=lazy)) for name in (rate, "float")]
    assert tables[0].tobytes() == tables[1].tobytes()
    assert tables[0].tobytes() != MATRIX.tobytes()


def test_a_name_is_that_optimizer_and_an_unknown_one_is_refused_by_keras() -> None:
    assert table_after(rowwise("adam")).tobytes() == (
        table_after(rowwise(keras.optimizers.Adam())).tobytes()
    )
    with pytest.raises(ValueError, match="nadamax"):
        rowwise("nadamax")


@pytest.mark.parametrize("lazy", [False, True])
def test_it_goes_into_a_loss_scale_optimizer(lazy: bool) -> None:
    adam, scaled = keras.optimizers.Adam, keras.optimizers.LossScaleOptimizer
    settings = {"initial_scale": 8.0, "dynamic_growth_steps": 5}
    inside = rowwise(scaled(adam(RATE), **settings), lazy=lazy)
    assert settings.items() <= inside.get_config().items()
    table = table_after(inside)
    outside = table_after(scaled(rowwise(adam(RATE), lazy=lazy), **settings))
    assert table.tobytes() == outside.tobytes()
    plain = table_after(rowwise(adam(RATE), lazy=lazy))
    np.testing.assert_allclose(table, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_lazy_step_that_overflows_in_the_first_reserved_row_is_skipped(value: float) -> None:
    optimizer = rowwise(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), lazy=True)
    model = network(optimizer)
    upstream = np.zeros((2, 3, WIDTH), np.float32)
    upstream[0, 0, 0] = value  # row 1, before entries of frozen rows
    scale = float(optimizer.initial_scale)
    model.train_on_batch(IDS, upstream)
    assert model.layers[0].get_weights()[0].tobytes() == MATRIX.tobytes()
    assert float(optimizer.dynamic_scale) == scale / 2


def choose(variable: Any) -> Any:
    return EMBEDDING if "embedding" in variable.path else MUON


EMBEDDING = MUON = None


@pytest.mark.parametrize("by_map", [False, True])
def test_of_several_optimizers_it_wraps_those_of_tables(by_map: bool) -> None:
    global EMBEDDING, MUON
    EMBEDDING, MUON = keras.optimizers.Adam(RATE), keras.optimizers.Muon(RATE)
    choice = keras.optimizers.OptimizerMap(MUON, {".*embeddings": EMBEDDING}) if by_map else choose
    optimizer = rowwise(keras.optimizers.MultiOptimizer(choice))
    model = network(optimizer, keras.layers.Dense(4, use_bias=False))
    model.train_on_batch(IDS, UPSTREAM)
    assert [type(one).__name__ for one in optimizer.optimizers] == ["Rowwise", "Muon"]
    if by_map:  # Keras writes no functions down
        again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
        again.build(model.trainable_variables)
        assert [type(one).__name__ for one in again.optimizers] == ["Rowwise", "Muon"]
    # A row that joins after a thousand steps moves by one learning rate.
    for one in optimizer.optimizers:
        one.iterations.assign(1000)
    (before,) = model.layers[0].get_weights()
    model.layers[0].unfreeze_rows([3])
    model.train_on_batch(IDS, UPSTREAM)
    assert np.abs(model.layers[0].get_weights()[0] - before)[3].max() <= RATE * 1.01


def test_an_optimizer_that_cannot_be_served_is_refused_for_the_table_alone() -> None:
    one_map, lamb = keras.optimizers.OptimizerMap, keras.optimizers.Lamb
    several = keras.optimizers.MultiOptimizer(
        one_map(keras.optimizers.Adam(), {".*kernel": lamb()})
    )
    network(rowwise(several), keras.layers.Dense(4)).train_on_batch(IDS, UPSTREAM)
    several = keras.optimizers.MultiOptimizer(one_map(lamb()))
    with pytest.raises(InputError, match="Received: Lamb"):
        network(rowwise(several)).train_on_batch(IDS, UPSTREAM)


@pytest.mark.parametrize("lazy", [None, False, True])
def test_ids_that_are_none_train_nothing_under_xla(lazy: bool | None) -> None:
    optimizer, last = keras.optimizers.SGD(1.0), NUM_ROWS - 1
    layer = PartialEmbedding.from_matrix(MATRIX, trainable_rows=[0, last])
    model = keras.Sequential([keras.Input((None,), dtype="int64"), layer])
    optimizer = optimizer if lazy is None else rowwise(optimizer, lazy=lazy)
    model.compile(optimizer, product, jit_compile=True)
    model.optimizer.build(model.trainable_variables)
    model.train_on_batch(np.array([[NUM_ROWS, 40, -NUM_ROWS - 1, -50, 1]]), np.ones((1, 5, WIDTH)))
    assert moved(layer, MATRIX) == []
    model.train_on_batch(np.array([[last, -NUM_ROWS]]), np.ones((1, 2, WIDTH)))
    assert moved(layer, MATRIX) == [0, last]
