"""Tables that grow in Keras: old rows and their optimizer state stay, new rows begin."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from cohorts import TwoOptimizers, moved

from partial_embedding import InputError, Schedule
from partial_embedding.schedule.runner import Runner
from partial_embedding.tensorflow import PartialEmbedding, grow_table, rowwise
from partial_embedding.tensorflow.adapter import KerasTables

V, D, NEW = 10, 4, 3
OPTIMIZERS: dict[str, Any] = {
    "rowwise-Adam": lambda: rowwise(keras.optimizers.Adam(0.1, weight_decay=0.1)),
    "rowwise-lazy": lambda: rowwise(keras.optimizers.Adam(0.1), lazy=True),
    "SGD-momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(0.1),
    "Adam-ema": lambda: keras.optimizers.Adam(0.1, use_ema=True),
    "loss-scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1)),
}


class TiedScores(keras.layers.Layer):
    """The scores of all items, by the table itself."""

    def __init__(self, table: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.table = table

    def call(self, inputs: Any) -> Any:
        scores = inputs @ keras.ops.transpose(self.table.embeddings)
        return keras.ops.mean(scores[..., :V], axis=-1, keepdims=True)


def model_of(num_rows: int = V, rows: Any = (1, 5), tied: bool = False, **options: Any) -> Any:
    matrix = np.zeros((num_rows, D), np.float32)
    matrix[:V] = np.random.default_rng(0).normal(size=(V, D))
    layer = PartialEmbedding.from_matrix(matrix, trainable_rows=rows, name="items", **options)
    keras.utils.set_random_seed(1)
    head = TiedScores(layer) if tied else keras.layers.Dense(1)
    pool = keras.layers.GlobalAveragePooling1D()
    return keras.Sequential([keras.Input((3,), dtype="int32"), layer, pool, head])


def fit(model: Any, num_rows: int, epochs: int = 2) -> None:
    ids = np.random.default_rng(3).integers(num_rows, size=(24, 3))
    model.fit(ids, np.ones(24), batch_size=8, epochs=epochs, shuffle=False, verbose=0)


def table_of(model: Any) -> Any:
    (matrix,) = model.layers[0].get_weights()
    return matrix


@pytest.mark.parametrize("tied", [False, True], ids=["alone", "tied"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_old_rows_go_on_and_new_ones_begin_bit_for_bit(name: str, tied: bool) -> None:
    # Tracing takes longer than a run does, so these two stand for what was traced before.
    traced = (name, tied) in (("rowwise-lazy", False), ("Adam", True))
    # The same run over a table that had all rows from the start, of which the last joined late.
    grown = model_of(tied=tied)
    whole = model_of(V + NEW, tied=tied, reserve_rows=[1, 5, *range(V, V + NEW)])
    for model in (grown, whole):
        model.compile(OPTIMIZERS[name](), "mse", run_eagerly=not traced)
        fit(model, V, epochs=1)
    assert grow_table(grown, "items", NEW, init=np.zeros((NEW, D))) == [10, 11, 12]
    whole.layers[0].unfreeze_rows(range(V, V + NEW))
    assert np.array_equal(table_of(grown), table_of(whole))
    for model in (grown, whole):
        fit(model, V + NEW, epochs=1)
    assert np.array_equal(table_of(grown), table_of(whole))
    assert table_of(grown)[V:].any()
    assert grown.predict(np.full((1, 3), V + NEW - 1), verbose=0).shape == (1, 1)


def test_new_rows_may_stay_as_they_begin() -> None:
    model = model_of()
    model.compile(OPTIMIZERS["rowwise-Adam"](), "mse")
    fit(model, V)
    mean = table_of(model).mean(axis=0, dtype=np.float32)
    grow_table(model, "items", NEW, trainable=False)
    fit(model, V + NEW)
    assert np.array_equal(table_of(model)[V:], np.tile(mean, (NEW, 1)))
    model.layers[0].unfreeze_rows("new")
    fit(model, V + NEW)
    assert not np.isclose(table_of(model)[V:], mean).any()


@pytest.mark.parametrize("reserve", [None, "all"], ids=["plain", "reserved"])
def test_a_table_of_which_all_rows_train_grows(reserve: Any) -> None:
    model = model_of(rows="all", reserve_rows=reserve)
    model.compile("adam", "mse")
    fit(model, V)
    before = table_of(model)
    grow_table(model, "items", NEW, init=keras.initializers.Ones())
    assert np.array_equal(table_of(model), np.concatenate([before, np.ones((NEW, D))]))
    fit(model, V + NEW)
    assert model.layers[0].trainable_rows.size == V + NEW
    if reserve is None:
        with pytest.raises(InputError, match="reserve_rows='all'"):
            grow_table(model, "items", NEW, trainable=False)
    else:
        grow_table(model, "items", NEW, trainable=False)
        assert model.layers[0].trainable_rows.size == V + NEW


@pytest.mark.parametrize("rows", [(1, 5), "all"], ids=str)
def test_weights_from_before_load_into_the_old_rows(rows: Any, tmp_path: Path) -> None:
    old = model_of(rows=rows)
    old.compile("sgd", "mse")
    fit(old, V)
    old.save_weights(tmp_path / "old.weights.h5")
    grown = model_of(rows=rows)
    grow_table(grown, "items", NEW, init=keras.initializers.Ones())
    grown.load_weights(tmp_path / "old.weights.h5")
    assert np.array_equal(table_of(grown), np.concatenate([table_of(old), np.ones((NEW, D))]))
    grown.layers[0].set_weights([np.zeros((V, D))])
    assert not table_of(grown)[:V].any()
    assert table_of(grown)[V:].all()
    with pytest.raises((InputError, ValueError), match="shape"):
        grown.layers[0].set_weights([np.zeros((V - 1, D))])


def test_a_grown_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model = model_of()
    model.compile("adam", "mse")
    fit(model, V)
    grow_table(model, "items", NEW)
    fit(model, V + NEW)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert np.array_equal(table_of(again), table_of(model))
    for one in (model, again):
        fit(one, V + NEW)
    assert np.array_equal(table_of(again), table_of(model))


def test_new_names_the_rows_by_which_a_table_grew_last() -> None:
    model = model_of()
    schedule = Schedule([{"epoch": 0, "rows": "new"}])
    with pytest.raises(InputError, match="grow_table"):
        Runner(KerasTables(model), {None: schedule})
    grow_table(model, "items", NEW)
    grow_table(model, "items", 1, trainable=False)
    Runner(KerasTables(model), {None: schedule}).advance(0, 0)
    assert model.layers[0].trainable_rows.tolist() == [13]


class Unregistered(keras.optimizers.schedules.LearningRateSchedule):
    """A rate that Keras cannot write down."""

    def __call__(self, step: Any) -> Any:
        return 0.1


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, rowwise], ids=["plain", "rowwise"])
@pytest.mark.parametrize("rate", [lambda: 0.1, Unregistered()], ids=["function", "unregistered"])
def test_an_optimizer_goes_on_at_a_rate_that_keras_cannot_write_down(wrap: Any, rate: Any) -> None:
    model = model_of()
    model.compile(wrap(keras.optimizers.Adam(rate)), "mse", run_eagerly=True)
    fit(model, V, epochs=1)
    grow_table(model, "items", NEW)
    assert model.optimizer._learning_rate is rate
    assert int(model.optimizer.iterations) == 3
    fit(model, V + NEW, epochs=1)


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, rowwise], ids=["plain", "rowwise"])
@pytest.mark.parametrize("by", ["name", "variable"])
def test_what_is_excluded_from_weight_decay_stays_excluded(wrap: Any, by: str) -> None:
    model = model_of()
    optimizer = keras.optimizers.SGD(0.1, weight_decay=0.5)
    names = {"name": {"var_names": ["embeddings"]}}
    optimizer.exclude_from_weight_decay(**names.get(by, {"var_list": [model.layers[0].embeddings]}))
    model.compile(wrap(optimizer), "mse", run_eagerly=True)
    fit(model, V, epochs=1)
    grow_table(model, "items", NEW)
    before = table_of(model)
    model.train_on_batch(np.zeros((2, 3), np.int32), np.ones(2))  # row 0 does not train
    assert np.array_equal(table_of(model), before)


def test_averages_of_new_rows_begin_at_the_rows() -> None:
    model = model_of()
    model.compile(keras.optimizers.SGD(0.0, use_ema=True), "mse", run_eagerly=True)
    fit(model, V, epochs=1)
    grow_table(model, "items", NEW, init=np.full((NEW, D), 5.0))
    fit(model, V + NEW, epochs=1)  # ends with the averages in place of the rows
    np.testing.assert_allclose(table_of(model)[V:], 5.0, rtol=1e-6)


def test_every_optimizer_that_a_model_has_of_the_table_goes_on() -> None:
    parts = model_of()
    model = TwoOptimizers(parts.inputs, parts.outputs)
    model.of_table, of_rest = rowwise(keras.optimizers.Adam(0.1)), keras.optimizers.SGD(0.1)
    model.of_rest = of_rest
    model.compile(loss="mse", run_eagerly=True)
    fit(model, V, epochs=1)
    grow_table(model, "items", NEW)
    before = parts.layers[0].get_weights()[0]
    fit(model, V + NEW, epochs=2)
    assert moved(parts.layers[0], before) == [1, 5, 10, 11, 12]
    assert model.of_rest is of_rest
    assert int(model.of_table.iterations) == int(of_rest.iterations) == 9


def test_an_optimizer_that_cannot_be_made_anew_is_refused_before_the_table_grows() -> None:
    class WithoutConfig(keras.optimizers.SGD):
        def __init__(self) -> None:
            super().__init__(0.1)

    model = model_of()
    model.compile(WithoutConfig(), "mse", run_eagerly=True)
    fit(model, V, epochs=1)
    before = table_of(model)
    with pytest.raises(InputError, match="or call grow_table before compile"):
        grow_table(model, "items", NEW)
    assert np.array_equal(table_of(model), before)
    fit(model, V, epochs=1)


@pytest.mark.parametrize(
    "change",
    [lambda layer: layer.enable_lora(2), lambda layer: layer.quantize("int8")],
    ids=["LoRA", "int8"],
)
def test_a_table_with_lora_or_quantized_does_not_grow(change: Any) -> None:
    model = model_of(rows="all")
    change(model.layers[0])
    with pytest.raises(InputError, match="Call grow_table before enable_lora and quantize"):
        grow_table(model, "items", NEW)
    assert model.layers[0].input_dim == V


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "words"}, r"Name one of \['items'\]"),
        ({"rows": 0}, "from 1 up"),
        ({"init": np.ones((NEW, D + 1))}, "a vector for each new row"),
        ({"init": "zeros"}, "init is 'mean'"),
        ({"init": [[1.0], [1.0, 2.0]]}, "a vector for each new row"),
        ({"init": np.full((NEW, D), "a")}, r"Received: \(3, 4\), <U1"),
        ({"init": np.full((NEW, D), 1j)}, "Received: .*complex128"),
        ({"init": lambda shape: np.ones((NEW, NEW))}, r"Received: \(3, 3\)"),
    ],
    ids=["name", "rows", "vectors", "init", "lengths", "text", "complex", "function"],
)
def test_what_cannot_grow_is_refused_and_stays(change: dict[str, Any], reason: str) -> None:
    model = model_of()
    before = table_of(model)
    with pytest.raises(InputError, match=reason):
        grow_table(model, **{"name": "items", "rows": NEW, **change})
    assert np.array_equal(table_of(model), before)
    assert model.layers[0].input_dim == V


def test_a_layer_made_of_a_table_draws_no_other_one_first() -> None:
    # It would be as much memory again.
    def never(shape: Any, dtype: Any = None) -> Any:
        pytest.fail("drew a table")

    for rows in ([1], "all"):
        layer = PartialEmbedding.from_matrix(
            np.eye(3, dtype=np.float32), trainable_rows=rows, embeddings_initializer=never
        )
        assert np.array_equal(layer.get_weights()[0], np.eye(3))
        assert layer.embeddings_initializer is never
