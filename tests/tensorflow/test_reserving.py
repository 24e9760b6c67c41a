"""`RowUnfreezing` alone tells a layer which rows to reserve, and refuses what cannot train."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from cohorts import TwoOptimizers
from small_fits import IDS, NUM_ROWS, TARGETS, VOCABULARY, WIDTH, Watch, fit, small_model

from partial_embedding import InputError
from partial_embedding.callbacks.keras import RowUnfreezing
from partial_embedding.tensorflow import PartialEmbedding, grow_table, rowwise

STAGES = {"stages": [{"epoch": 0, "rows": [6, 7]}, {"epoch": 1, "rows": {"most_frequent": 2}}]}


def run(model: Any, schedule: Any = STAGES) -> list[int]:
    """Train two epochs along a schedule, and give the rows that moved."""
    return fit(model, RowUnfreezing(schedule, vocabulary=VOCABULARY, audit=True), epochs=2)


@pytest.mark.parametrize("lazy", [None, False, True])
def test_the_schedule_alone_reserves_what_it_will_ever_train(lazy: bool | None) -> None:
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    optimizer = optimizer if lazy is None else rowwise(optimizer, lazy=lazy)
    model = small_model(optimizer, traced=True)
    (table,) = model.layers[0].get_weights()
    assert run(model) == [0, 1, 6, 7]
    layer = model.layers[0]
    assert layer.reserved_rows.tolist() == [0, 1, 6, 7]
    assert [tuple(v.shape) for v in layer.trainable_variables] == [(4, WIDTH)]
    assert layer.get_weights()[0][2:6].tobytes() == table[2:6].tobytes()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_table_that_was_built_whole_is_reserved_at_half_precision_too(policy: str) -> None:
    model = small_model(dtype=policy)
    assert run(model) == [0, 1, 6, 7]
    assert model.layers[0](IDS).dtype == model.layers[0].compute_dtype


def test_it_reserves_before_a_backup_is_read(tmp_path: Any) -> None:
    def callbacks() -> list[Any]:
        return [
            keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False),
            RowUnfreezing(STAGES, vocabulary=VOCABULARY, backup_dir=tmp_path),
        ]

    fit(model := small_model(), *callbacks(), epochs=1)
    fit(resumed := small_model(), *callbacks(), epochs=2)
    fit(model, *callbacks(), initial_epoch=1, epochs=2)
    assert resumed.layers[0].trainable_rows.tolist() == [0, 1]


def test_a_model_that_has_predicted_predicts_what_it_learns() -> None:
    model = small_model(traced=True)
    before = model.predict(IDS, verbose=0)
    run(model)
    after = model.predict(IDS, verbose=0)
    assert (before != after).any()
    np.testing.assert_array_equal(after, model(IDS))


@pytest.mark.parametrize(
    "change",
    [run, lambda model: grow_table(model, "words", 1)],
    ids=["reserves", "grows"],
)
def test_other_models_of_a_table_that_changed_fail_until_they_are_traced_anew(change: Any) -> None:
    model = small_model(rowwise("adam"), traced=True)
    layer = model.layers[0]
    other = keras.Sequential([keras.Input((2,), dtype="int64"), layer, keras.layers.Dense(1)])
    other.compile("adam", "mse")
    vectors = keras.Model(model.inputs, layer.output)
    fit(other)
    vectors.predict(IDS, verbose=0)
    change(model)
    (table,) = layer.get_weights()
    with pytest.raises(tf.errors.InvalidArgumentError, match="words"):
        fit(other)
    with pytest.raises(tf.errors.InvalidArgumentError, match="words"):
        vectors.predict(IDS, verbose=0)
    assert layer.get_weights()[0].tobytes() == table.tobytes()
    # The remedy.
    other.compile("adam", "mse")
    assert fit(other) == np.intersect1d(IDS, layer.trainable_rows).tolist()
    vectors.compile()
    np.testing.assert_array_equal(vectors.predict(IDS, verbose=0), layer(IDS))


def test_a_table_whose_rows_all_train_throughout_stays_a_plain_one() -> None:
    model = small_model()
    run(model, {"stages": [{"epoch": 0, "rows": "all"}]})
    assert [v.name for v in model.layers[0].variables] == ["embeddings"]


def test_rows_that_a_layer_was_told_to_reserve_are_not_added_to() -> None:
    model = small_model(trainable_rows=[6], reserve_rows=[6, 7])
    with pytest.raises(InputError, match=r"stages\[1\]\.rows: .*among the 2 reserved ones"):
        run(model)


def test_it_is_too_late_once_an_optimizer_was_built_for_the_table() -> None:
    model = small_model()
    fit(model)
    with pytest.raises(InputError, match="it is a plain one"):
        run(model)
    # The remedy.
    again = small_model(reserve_rows="all")
    fit(again)
    assert run(again) == [0, 1, 6, 7]


def test_an_optimizer_that_was_built_without_the_table_is_refused() -> None:
    model = small_model()
    model.layers[0].trainable = False
    fit(model)
    model.layers[0].trainable = True
    with pytest.raises(InputError, match=r"Adam that was built without it\. Compile the model"):
        run(model)
    model.compile("adam", "mse", run_eagerly=True)
    assert run(model) == [0, 1, 6, 7]


@pytest.mark.parametrize("built", [False, True])
def test_a_layer_reserves_rows_and_freezes_all_others(built: bool) -> None:
    layer = PartialEmbedding(NUM_ROWS, WIDTH, trainable_rows=[1, 2, 5])
    if built:
        layer.build()
        layer.trainable_variables[0].assign_add(np.ones((3, WIDTH)))
        (table,) = layer.get_weights()
    layer.reserve_rows([2, 5, 7])
    layer.build()
    assert layer.trainable_rows.tolist() == [2, 5]
    assert [tuple(v.shape) for v in layer.trainable_variables] == [(3, WIDTH)]
    assert len(layer.weights) == 3
    if built:
        assert layer.get_weights()[0].tobytes() == table.tobytes()
    layer.unfreeze_rows([7])
    with pytest.raises(InputError, match="among the 3 reserved ones"):
        layer.unfreeze_rows([1])


# Who counts the steps


@pytest.mark.parametrize("unit", ["step", "share"])
def test_steps_are_those_of_the_optimizer_that_steps_the_table(unit: str) -> None:
    layer = PartialEmbedding(NUM_ROWS, WIDTH, name="words")
    inputs = keras.Input((2,), dtype="int64")
    model = TwoOptimizers(inputs, keras.layers.Dense(1)(layer(inputs)))
    model.of_table, model.of_rest = rowwise("adam"), keras.optimizers.SGD()
    model.compile(loss="mse", run_eagerly=True)
    at = {"step": 3, "share": 0.75}[unit]
    stages = {"stages": [{unit: 0, "rows": [6]}, {unit: at, "rows": [6, 7]}]}
    callbacks = [RowUnfreezing(stages), watch := Watch()]
    model.fit(IDS, TARGETS, epochs=2, batch_size=2, verbose=0, callbacks=callbacks)
    assert watch.rows == [[6]] * 3 + [[6, 7]]


def test_a_loop_of_ones_own_drives_the_callback_of_a_model_that_was_not_compiled() -> None:
    layer = PartialEmbedding(NUM_ROWS, WIDTH, name="words")
    model = keras.Sequential([keras.Input((2,), dtype="int64"), layer])
    callback = RowUnfreezing({"stages": [{"epoch": 0, "rows": [6]}, {"epoch": 1, "rows": [7]}]})
    callback.set_model(model)
    callback.on_train_begin()
    optimizer = keras.optimizers.SGD(1.0)
    (before,) = layer.get_weights()
    for epoch in range(2):
        callback.on_epoch_begin(epoch)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(IDS))
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        callback.on_epoch_end(epoch)
    callback.on_train_end()
    moved = (before - layer.get_weights()[0] > 0.5).all(axis=1)
    assert np.flatnonzero(moved).tolist() == [6, 7]
    stepped = RowUnfreezing({"stages": [{"step": 0, "rows": [6]}, {"step": 1, "rows": [7]}]})
    stepped.set_model(model)
    with pytest.raises(InputError, match="make the optimizer an attribute"):
        stepped.on_train_begin()
    model.own_optimizer = optimizer
    stepped.on_train_begin()
