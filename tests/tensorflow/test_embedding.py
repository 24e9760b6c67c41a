"""`PartialEmbedding` is an ordinary Keras embedding: shapes, files, configs, policies, models."""

import gc
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from cohorts import moved

from partial_embedding import InputError, Rows
from partial_embedding.tensorflow import FrozenRowAudit, PartialEmbedding
from partial_embedding.tensorflow.adapter import KerasTables

MATRIX = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
IDS = np.array([[0, 1, 5], [2, 2, 4]])


def _layer(**settings: Any) -> Any:
    rows = {"trainable_rows": [1, 4], "reserve_rows": [1, 3, 4]}
    return PartialEmbedding.from_matrix(MATRIX, **{**rows, **settings})


def _model(layer: Any, optimizer: str | None = "adam") -> Any:
    inputs = keras.Input((3,), dtype="int64")
    outputs = keras.layers.Dense(1)(keras.layers.Flatten()(layer(inputs)))
    model = keras.Model(inputs, outputs)
    if optimizer:
        model.compile(optimizer, "mse")
        model.optimizer.learning_rate = 0.1
    return model


def _train(model: Any, **settings: Any) -> None:
    model.fit(IDS, np.ones((2, 1)), epochs=2, verbose=0, **settings)


def test_a_split_table_looks_up_the_rows_of_the_matrix() -> None:
    np.testing.assert_array_equal(_layer()(IDS), MATRIX[IDS])
    np.testing.assert_array_equal(_layer()(-IDS), MATRIX[-IDS])
    np.testing.assert_array_equal(_layer().embeddings, MATRIX)


def test_ragged_and_sparse_ids_are_looked_up_as_by_the_plain_layer() -> None:
    plain = keras.layers.Embedding(6, 3, weights=MATRIX)
    ragged = tf.ragged.constant([[[1, 4], []], [[0]]])
    np.testing.assert_array_equal(_layer()(ragged).flat_values, plain(ragged).flat_values)
    assert _layer()(ragged).shape == plain(ragged).shape
    sparse = tf.SparseTensor([[0, 0], [1, 2]], [2, 1], (2, 3))
    np.testing.assert_array_equal(_layer()(sparse), plain(sparse))


def test_float_ids_and_masks_are_treated_as_by_the_plain_layer() -> None:
    layer = _layer(mask_zero=True)
    np.testing.assert_array_equal(layer(IDS.astype("float32")), MATRIX[IDS])
    np.testing.assert_array_equal(layer.compute_mask(IDS), IDS != 0)
    assert layer.compute_output_shape((2, 3)) == (2, 3, 3)


def test_nothing_frozen_is_the_plain_layer_with_one_variable() -> None:
    layer = PartialEmbedding(6, 3)
    layer.build()
    assert [v.name for v in layer.variables] == ["embeddings"]
    assert layer.trainable_variables == layer.variables
    assert layer.embeddings is layer.variables[0]


def test_no_row_trains_with_none() -> None:
    layer = PartialEmbedding.from_matrix(MATRIX, trainable_rows="none")
    _train(_model(layer))
    assert layer.trainable_variables == []
    assert layer.get_weights()[0].tobytes() == MATRIX.tobytes()


def test_summary_counts_the_rows_that_may_train() -> None:
    layer = _layer()
    assert sum(np.prod(v.shape) for v in layer.trainable_variables) == 3 * 3
    lines: list[str] = []
    _model(layer).summary(print_fn=lines.append)
    assert "Trainable params: 19 " in "\n".join(lines)  # 3 rows of 3, and a Dense of 9 + 1


def test_initial_values_are_those_of_the_plain_layer() -> None:
    settings = {"embeddings_initializer": keras.initializers.RandomNormal(seed=3)}
    partial = PartialEmbedding(6, 3, trainable_rows=[2], **settings)
    partial.build()
    plain = keras.layers.Embedding(
        6, 3, embeddings_initializer=keras.initializers.RandomNormal(seed=3)
    )
    plain.build()
    np.testing.assert_array_equal(partial.get_weights()[0], plain.get_weights()[0])
    np.testing.assert_array_equal(partial.trainable_variables[0], plain.get_weights()[0][[2]])


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16", "float64"])
def test_dtype_policies_are_those_of_the_plain_layer(policy: str) -> None:
    plain = keras.layers.Embedding(6, 3, weights=MATRIX, dtype=policy)
    partial = _layer(dtype=policy)
    assert partial(IDS).dtype == plain(IDS).dtype
    np.testing.assert_array_equal(partial(IDS), plain(IDS))
    assert partial.trainable_variables[0].dtype == plain.trainable_variables[0].dtype


def test_a_constraint_applies_to_trainable_rows_only() -> None:
    layer = _layer(embeddings_constraint=keras.constraints.UnitNorm(axis=1))
    _train(_model(layer))
    norms = np.linalg.norm(layer.get_weights()[0], axis=1)
    np.testing.assert_allclose(norms[[1, 4]], 1, rtol=1e-5)
    np.testing.assert_array_equal(layer.get_weights()[0][[0, 2, 3, 5]], MATRIX[[0, 2, 3, 5]])


def test_a_regularizer_moves_trainable_rows_only() -> None:
    layer = _layer(embeddings_regularizer="l2")
    with tf.GradientTape() as tape:
        layer(IDS)
        loss = sum(layer.losses)
    gradient = tape.gradient(loss, layer.trainable_variables[0])
    assert (np.abs(gradient).sum(axis=1) > 0).tolist() == [True, False, True]
    np.testing.assert_allclose(loss, 0.01 * (MATRIX[[1, 3, 4]] ** 2).sum(), rtol=1e-6)


def test_gradients_that_are_not_finite_leave_frozen_rows_alone() -> None:
    layer = _layer()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(IDS) * np.where(np.isin(IDS, [1, 4]), 1, np.nan)[..., None])
    gradient = tape.gradient(loss, layer.trainable_variables[0])
    np.testing.assert_array_equal(gradient, [[1] * 3, [0] * 3, [1] * 3])


def test_config_round_trips_with_the_rows_that_train_now() -> None:
    layer = _layer()
    layer.set_trainable_rows([3])
    again = PartialEmbedding.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert again.trainable_rows.tolist() == [3]
    assert again.reserved_rows.tolist() == [1, 3, 4]
    assert PartialEmbedding(6, 3).get_config()["reserve_rows"] is None
    config = PartialEmbedding(6, 3, trainable_rows=Rows.parse(range(2, 5))).get_config()
    assert config["trainable_rows"] == {"range": [2, 5]}


def test_a_plain_keras_file_loads_as_partial(tmp_path: Path) -> None:
    plain = _model(keras.layers.Embedding(6, 3))
    plain.save(tmp_path / "plain.keras")
    partial = keras.models.clone_model(
        keras.models.load_model(tmp_path / "plain.keras"),
        clone_function=lambda layer: (
            PartialEmbedding.from_layer(layer, trainable_rows=[2])
            if isinstance(layer, keras.layers.Embedding)
            else layer.__class__.from_config(layer.get_config())
        ),
    )
    np.testing.assert_array_equal(
        partial.layers[1].get_weights()[0], plain.layers[1].get_weights()[0]
    )
    assert partial.layers[1].trainable_rows.tolist() == [2]


def test_a_weight_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    _model(keras.layers.Embedding(7, 3)).save_weights(tmp_path / "larger.weights.h5")
    with pytest.raises(ValueError, match="Was the vocabulary resized"):
        _model(_layer()).load_weights(tmp_path / "larger.weights.h5")
    other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    other.save_weights(tmp_path / "other.weights.h5")
    with pytest.raises(ValueError, match="another structure"):
        _model(_layer()).load_weights(tmp_path / "other.weights.h5")


def test_an_exported_model_serves_the_same_numbers(tmp_path: Path) -> None:
    model = _model(_layer())
    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_array_equal(served.serve(IDS), model(IDS))


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantizing_gives_what_the_plain_layer_gives(mode: str, tmp_path: Path) -> None:
    plain, partial = keras.layers.Embedding(6, 3, weights=MATRIX), _layer()
    plain.quantize(mode)
    model = _model(partial)
    partial.quantize(mode)
    np.testing.assert_array_equal(partial(IDS), plain(IDS))
    assert partial.trainable_rows.size == 0
    model.save(tmp_path / "quantized.keras")
    again = keras.models.load_model(tmp_path / "quantized.keras")
    np.testing.assert_array_equal(again.layers[1](IDS), plain(IDS))


def test_a_model_that_was_not_built_compiles_with_xla() -> None:
    # `fit` builds it while it traces the first step, and XLA takes no variable from there.
    layer = PartialEmbedding(6, 2, trainable_rows=[1], reserve_rows=[1, 2])
    model = keras.Sequential([layer])
    model.compile("adam", "mse", jit_compile=True)
    data = np.array([[1, 2, 3]]), np.ones((1, 3, 2))
    model.fit(*data, verbose=0)
    assert model.count_params() == 6 * 2 + 2 * 2 + 2
    assert layer.count_params() == 6 * 2
    before = layer.get_weights()[0]
    model.fit(*data, verbose=0)
    assert moved(layer, before) == [1]


def test_unfreezing_and_freezing_reserved_rows_traces_nothing_again() -> None:
    traces = []

    class Counted(keras.Model):  # type: ignore[misc]
        def call(self, ids: Any) -> Any:
            traces.append(1)
            return tf.reduce_sum(self.table(ids), axis=(1, 2), keepdims=True)[..., 0]

    model = Counted()
    model.table = layer = _layer()
    model.compile(keras.optimizers.Adam(0.1), "mse")
    _train(model)
    after_first = len(traces)
    for rows in ([3], "none", [1, 3, 4], [4]):
        before = layer.get_weights()[0]
        layer.set_trainable_rows(rows)
        assert layer.trainable_rows.tolist() == ([] if rows == "none" else rows)
        np.testing.assert_array_equal(layer.get_weights()[0], before)
        _train(model)
        frozen = np.setdiff1d(np.arange(6), layer.trainable_rows)
        assert layer.get_weights()[0][frozen].tobytes() == before[frozen].tobytes()
    assert len(traces) == after_first


def test_rows_beyond_the_reserved_ones_are_refused() -> None:
    layer = _layer()
    with pytest.raises(InputError, match=r"among the 3 reserved ones. Received: 0. .*reserve_rows"):
        layer.unfreeze_rows([0, 4])
    assert layer.trainable_rows.tolist() == [1, 4]
    with pytest.raises(InputError, match="reserved"):
        PartialEmbedding(6, 3, trainable_rows="all", reserve_rows=[1])


def test_freezing_rows_of_a_plain_table_is_refused_once_it_is_built() -> None:
    layer = PartialEmbedding(6, 3)
    layer.build()
    with pytest.raises(InputError, match="reserve_rows='all'"):
        layer.freeze_rows([1])
    layer = PartialEmbedding(6, 3, reserve_rows="all")
    layer.build()
    layer.freeze_rows([1])
    assert layer.trainable_rows.tolist() == [0, 2, 3, 4, 5]


def test_lora_is_refused_where_rows_are_frozen_and_works_where_none_is() -> None:
    with pytest.raises(InputError, match="LoRA adds a change of low rank to every row"):
        PartialEmbedding(6, 3, trainable_rows=[1], lora_rank=2)
    with pytest.raises(InputError, match="LoRA adds a change of low rank to every row"):
        _layer().enable_lora(2)
    layer = PartialEmbedding(6, 3, lora_rank=2)
    assert layer(IDS).shape == (2, 3, 3)
    assert len(layer.trainable_variables) == 2


def in_a_schedule(layer: Any) -> None:
    KerasTables(keras.Sequential([layer])).check_rows(layer.name, np.array([1]))


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize(
    "freeze",
    [
        lambda layer: layer.freeze_rows([1]),
        lambda layer: layer.set_trainable_rows([1]),
        lambda layer: layer.reserve_rows([1]),
        lambda layer: layer.reserve_rows("all"),
        in_a_schedule,
    ],
    ids=["freeze", "set", "reserve", "reserve all", "schedule"],
)
def test_rows_of_a_layer_with_lora_are_not_frozen(freeze: Any, built: bool) -> None:
    layer = PartialEmbedding(6, 3, lora_rank=2)
    if built:
        layer.build()
    with pytest.raises(InputError, match="LoRA adds a change of low rank to every row"):
        freeze(layer)
    assert layer.trainable_rows.size == layer.reserved_rows.size == 6
    layer.build()
    assert layer.lora_enabled


@pytest.mark.parametrize(
    "train",
    [
        lambda layer: layer.unfreeze_rows([1]),
        lambda layer: layer.reserve_rows([1]),
        in_a_schedule,
        FrozenRowAudit,
    ],
    ids=["unfreeze", "reserve", "schedule", "audit"],
)
def test_no_row_of_a_quantized_layer_trains(train: Any) -> None:
    layer = _layer()
    layer.build()
    layer.quantize("int8")
    before = layer(IDS).numpy()
    with pytest.raises(InputError, match="quantize"):
        train(layer)
    assert layer(IDS).numpy().tobytes() == before.tobytes()


@pytest.mark.parametrize("rows", ["all", [1]], ids=str)
def test_a_table_may_be_a_list_and_is_one_of_real_numbers(rows: Any) -> None:
    layer = PartialEmbedding.from_matrix([[1.0, 2.0], [3.0, 4.0]], trainable_rows=rows)
    assert layer.get_weights()[0].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    for wrong in ([["a", "b"]], [[1.0], [1.0, 2.0]], np.ones((2, 2)) * 1j, np.ones(3), None):
        with pytest.raises(InputError, match="a table is a matrix of real numbers"):
            PartialEmbedding.from_matrix(wrong, trainable_rows=rows)


def test_moving_rows_inside_a_traced_function_is_refused() -> None:
    layer = _layer()
    with pytest.raises(InputError, match=r"outside of tf\.function"):
        tf.function(lambda: layer.freeze_rows([1]), autograph=False)()


def test_a_model_of_weights_that_do_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="one table of shape"):
        _layer().set_weights([MATRIX[:4]])
    with pytest.raises(InputError, match="one table of shape"):
        PartialEmbedding(6, 3, trainable_rows=[1], weights=[MATRIX[:4]])
    with pytest.raises(InputError, match="a table is a matrix"):
        PartialEmbedding.from_matrix(MATRIX[0])
    for layer in (keras.layers.Dense(2), keras.layers.ReversibleEmbedding(6, 3)):
        with pytest.raises(InputError, match=r"comes from a keras.*from_matrix, and tie a head"):
            PartialEmbedding.from_layer(layer)


def test_an_outer_layer_in_half_precision_changes_no_value_of_the_table() -> None:
    class Outer(keras.layers.Layer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(dtype="mixed_float16")
            self.table = _layer(dtype="float32")

        def call(self, ids: Any) -> Any:
            return self.table(ids)

    np.testing.assert_array_equal(Outer()(IDS), MATRIX[IDS])


def test_a_frozen_padding_row_is_never_among_those_that_train() -> None:
    layer = PartialEmbedding(5, 2, freeze_padding=True)
    assert layer.trainable_rows.tolist() == [1, 2, 3, 4]
    layer.set_trainable_rows([0, 2])
    assert layer.trainable_rows.tolist() == [2]
    again = PartialEmbedding.from_config(layer.get_config())
    assert again.freeze_padding
    again.unfreeze_rows([0])
    assert again.trainable_rows.tolist() == [2]


def test_a_table_may_be_dropped_while_a_graph_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", said.append)
    layer = _layer()
    layer(IDS)
    handle = layer.table_state.table.value.handle
    with tf.Graph().as_default():
        del layer
        gc.collect()
    assert said == []
    assert tf.raw_ops.ReadVariableOp(resource=handle, dtype=tf.float32).shape == (0,)
