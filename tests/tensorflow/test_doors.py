"""Every way out of a model and back in carries the whole state of a partial table.

A run of eight steps, in which row 3 freezes and rows 7 and 8 join at step 4, is cut and goes on
through a door: it ends bit for bit where the uninterrupted run does.
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from partial_embedding import InputError
from partial_embedding.callbacks.keras import RowCheckpoint
from partial_embedding.tensorflow import (
    PartialEmbedding,
    plain_weights,
    rowwise,
    set_plain_weights,
)

NUM_ROWS, WIDTH, STEPS, STAGE = 12, 4, 8, 4
RESERVED = [3, 5, 7, 8]
MATRIX = np.random.default_rng(0).normal(size=(NUM_ROWS, WIDTH)).astype(np.float32)
IDS = np.random.default_rng(1).integers(0, NUM_ROWS, (STEPS, 4, 5))
TARGETS = np.random.default_rng(2).normal(size=(STEPS, 4, 2)).astype(np.float32)


KINDS: dict[str, Callable[[], Any]] = {
    "split": lambda: keras.optimizers.AdamW(0.1, weight_decay=0.1),
    "rowwise": lambda: rowwise(keras.optimizers.AdamW(0.1, weight_decay=0.1)),
    "lazy": lambda: rowwise(
        keras.optimizers.AdamW(
            keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5), weight_decay=0.1
        ),
        lazy=True,
    ),
}
# The steps that are made before the cut, and whether the rows of the next one are set already.
CUTS = {"before": (STAGE - 1, False), "at": (STAGE, True), "after": (STAGE + 2, False)}


def rows_at(step: int) -> list[int]:
    return [3, 5] if step < STAGE else [5, 7, 8]


def partial(**settings: Any) -> Any:
    rows = {"trainable_rows": [3, 5], "reserve_rows": RESERVED}
    return PartialEmbedding.from_matrix(MATRIX, name="words", **{**rows, **settings})


def network(layer: Any) -> Any:
    inputs = keras.Input((5,), dtype="int64")
    pooled = keras.layers.GlobalAveragePooling1D()(layer(inputs))
    head = keras.layers.Dense(2, name="head", kernel_initializer="ones")
    return keras.Model(inputs, head(pooled))


def fresh(kind: str) -> Any:
    model = network(partial())
    model.compile(KINDS[kind](), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def set_rows(model: Any, step: int) -> None:
    layer = model.get_layer("words")
    if layer.trainable_rows.tolist() != rows_at(step):
        layer.set_trainable_rows(rows_at(step))


def train(model: Any, first: int, last: int) -> None:
    for step in range(first, last):
        set_rows(model, step)
        model.train_on_batch(IDS[step], TARGETS[step])


def bits(model: Any) -> list[bytes]:
    return [array.tobytes() for array in plain_weights(model)]


def state(model: Any) -> list[bytes]:
    return bits(model) + [v.numpy().tobytes() for v in model.optimizer.variables]


@cache
def whole_run(kind: str, traced: bool) -> list[bytes]:
    model = fresh(kind)
    train(model, 0, STEPS)
    return state(model)


def by_checkpoint(hold: Callable[[Any], Any]) -> Callable[[Any, str, Path], Any]:
    def go(model: Any, kind: str, folder: Path) -> Any:
        path = hold(model).save(folder / "state")
        other = fresh(kind)
        hold(other).restore(path).assert_consumed()
        return other

    return go


def by_backup(model: Any, kind: str, folder: Path) -> Any:
    other = fresh(kind)
    backup, restore = (keras.callbacks.BackupAndRestore(folder) for _ in range(2))
    backup.set_model(model)
    restore.set_model(other)
    backup.on_epoch_end(0)
    restore.on_train_begin()
    return other


def by_file(make: Any, name: str) -> Callable[[Any, str, Path], Any]:
    def go(model: Any, kind: str, folder: Path) -> Any:
        keeps = make(folder / name, save_weights_only=name.endswith(".weights.h5"))
        keeps.set_model(model)
        keeps.on_epoch_end(0, {})
        if not keeps.save_weights_only:
            return keras.models.load_model(folder / name)
        other = fresh(kind)
        other.load_weights(folder / name)
        return other

    return go


def arrays_of(model: Any) -> tuple[list[Any], list[Any]]:
    return model.get_weights(), [v.numpy() for v in model.optimizer.variables]


def with_arrays(model: Any, weights: list[Any], variables: list[Any]) -> Any:
    model.set_weights(weights)
    model.optimizer.set_weights(variables)
    return model


def by_clone(model: Any, kind: str, folder: Path) -> Any:
    other = keras.models.clone_model(model)
    other.compile(KINDS[kind](), "mse")
    other.optimizer.build(other.trainable_variables)
    return with_arrays(other, *arrays_of(model))


def by_going_back(model: Any, kind: str, folder: Path) -> Any:
    arrays = arrays_of(model)
    model.get_layer("words").set_trainable_rows([8])
    model.fit(IDS[0], TARGETS[0], epochs=2, verbose=0)
    return with_arrays(model, *arrays)


DOORS: dict[str, Callable[[Any, str, Path], Any]] = {
    "tf.train.Checkpoint": by_checkpoint(
        lambda model: tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    ),
    # Keras models hold their optimizer.
    "tf.train.Checkpoint of a model": by_checkpoint(tf.train.Checkpoint),
    "BackupAndRestore": by_backup,
    ".keras": by_file(keras.callbacks.ModelCheckpoint, "model.keras"),
    ".weights.h5": by_file(keras.callbacks.ModelCheckpoint, "model.weights.h5"),
    "RowCheckpoint": by_file(RowCheckpoint, "model.weights.h5"),
    "set_weights": lambda model, kind, folder: with_arrays(fresh(kind), *arrays_of(model)),
    "clone_model": by_clone,
    "pickle": lambda model, kind, folder: pickle.loads(pickle.dumps(model)),
    "deepcopy": lambda model, kind, folder: copy.deepcopy(model),
    "going back": by_going_back,
}


@pytest.fixture
def traced(door: str, kind: str, cut: str) -> Iterator[bool]:
    """Whether steps are traced: takes a second, so of each door one case is, each in its turn."""
    turn = list(DOORS).index(door)
    traced = (list(KINDS)[turn % 3], list(CUTS)[turn // 3 % 3]) == (kind, cut)
    tf.config.run_functions_eagerly(not traced)
    yield traced
    tf.config.run_functions_eagerly(False)


@pytest.fixture
def eagerly() -> Iterator[None]:
    """Tracing takes longer than what is trained here, and is no part of it."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


# Much as another door, so one cut is enough for every day.
ALIKE = ("tf.train.Checkpoint of a model", "RowCheckpoint")


@pytest.mark.parametrize(
    ("door", "kind", "cut"),
    [
        pytest.param(
            *case, marks=[pytest.mark.full] if case[0] in ALIKE and case[2] != "at" else []
        )
        for case in product(DOORS, KINDS, CUTS)
    ],
)
def test_a_run_that_goes_on_through_a_door_ends_where_the_whole_one_does(
    door: str,
    kind: str,
    cut: str,
    traced: bool,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    record_property("door", door)
    steps, is_set = CUTS[cut]
    model = fresh(kind)
    train(model, 0, steps)
    if is_set:
        set_rows(model, steps)
    at_cut = bits(model)
    other = DOORS[door](model, kind, tmp_path)
    assert bits(other) == at_cut
    train(other, steps, STEPS)
    assert state(other) == whole_run(kind, traced)
    assert other.get_layer("words").trainable_rows.tolist() == rows_at(STEPS)


def trained(kind: str = "rowwise") -> Any:
    model = fresh(kind)
    train(model, 0, STAGE + 2)
    return model


def plain_network() -> Any:
    return network(keras.layers.Embedding(NUM_ROWS, WIDTH, name="words"))


def through_layers(source: Any, target: Any, folder: Path) -> None:
    for one, other in zip(source.layers, target.layers, strict=True):
        other.set_weights(one.get_weights())


def through_a_file(name: str, **options: Any) -> Callable[[Any, Any, Path], None]:
    def go(source: Any, target: Any, folder: Path) -> None:
        (source.save_weights if ".weights" in name else source.save)(folder / name)
        target.load_weights(folder / name, **options)

    return go


EXCHANGES: dict[str, Callable[[Any, Any, Path], None]] = {
    "layers": through_layers,
    "weights file": through_a_file("model.weights.h5"),
    "old file": through_a_file("model.h5"),
    "old file by name": through_a_file("model.h5", by_name=True),
    "named way": lambda source, target, _: set_plain_weights(target, plain_weights(source)),
}


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_weights_go_to_a_plain_model_and_back(exchange: str, tmp_path: Path) -> None:
    source, plain, back = trained(), plain_network(), network(partial())
    EXCHANGES[exchange](source, plain, tmp_path)
    np.testing.assert_array_equal(plain(IDS[0]), source(IDS[0]))
    EXCHANGES[exchange](plain, back, tmp_path)
    assert bits(back) == bits(plain)
    assert back.get_layer("words").trainable_rows.tolist() == [3, 5]


def test_weights_of_another_model_are_refused_before_any_is_set() -> None:
    model = network(partial())
    before = plain_weights(model)
    with pytest.raises(InputError, match="of the same structure") as refused:
        set_plain_weights(model, before[:-1])
    assert "(12, 4)" in str(refused.value)
    # The remedy: from a model of the same structure.
    set_plain_weights(model, plain_network().get_weights())


@pytest.mark.usefixtures("eagerly")
def test_a_layer_is_copied_with_its_rows_and_values() -> None:
    layer = trained().get_layer("words")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.get_weights()[0].tobytes() == layer.get_weights()[0].tobytes()
        assert other.trainable_rows.tolist() == [5, 7, 8]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_gives_the_same_numbers_after_rows_froze_again(
    kind: str, tmp_path: Path
) -> None:
    model = trained(kind)
    tf.saved_model.save(model, str(tmp_path / "saved"))
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    serve = loaded.signatures["serving_default"]
    (served,) = serve(inputs=tf.constant(IDS[0])).values()
    np.testing.assert_array_equal(served, model(IDS[0]))

    def gradients() -> Any:
        with tf.GradientTape() as tape:
            for variable in serve.variables:
                tape.watch(variable)
            (served,) = serve(inputs=tf.constant(IDS[0])).values()
        return tape.gradient(served, serve.variables)

    if kind == "lazy":  # TensorFlow could not keep it
        with pytest.raises(ValueError, match="Tried to take gradients"):
            gradients()
    else:
        assert any(one is not None for one in gradients())


# Averages


def changed_rows(model: Any) -> list[int]:
    layer, rows = model.get_layer("words"), np.arange(NUM_ROWS)
    (table,) = layer.get_weights()
    assert layer(rows).numpy().tobytes() == table.tobytes()
    return [int(r) for r in rows if table[r].tobytes() != MATRIX[r].tobytes()]


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, rowwise], ids=["split", "rowwise"])
@pytest.mark.parametrize("swap", [False, True])
def test_averages_in_place_of_weights_leave_frozen_bits(swap: bool, wrap: Any) -> None:
    model = network(partial())
    model.compile(wrap(keras.optimizers.AdamW(0.1, weight_decay=0.5, use_ema=True)), "mse")
    callbacks = [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)] if swap else []
    validation = {"validation_data": (IDS[1], TARGETS[1])}
    model.fit(IDS[0], TARGETS[0], epochs=3, verbose=0, callbacks=callbacks, **validation)
    assert changed_rows(model) == [3, 5]


@pytest.mark.usefixtures("eagerly")
def test_averages_by_hand_leave_frozen_bits() -> None:
    model = fresh("rowwise")
    kept = [v.numpy() for v in model.trainable_variables]
    for step in range(3):
        train(model, step, step + 1)
        for average, variable in zip(kept, model.trainable_variables, strict=True):
            average += (variable.numpy() * 1.1 - average) / 3  # which rounds equal numbers
    for average, variable in zip(kept, model.trainable_variables, strict=True):
        variable.assign(average)
    assert changed_rows(model) == [3, 5]
    # Rows that begin to train begin at what they hold, whatever the average was.
    model.get_layer("words").set_trainable_rows([7])
    assert changed_rows(model) == [3, 5]


@pytest.mark.usefixtures("eagerly")
def test_weights_of_the_whole_model_can_be_averaged() -> None:
    one, other = trained(), trained()
    train(other, STAGE + 2, STEPS)
    mean = [(a + b) / 2 for a, b in zip(one.get_weights(), other.get_weights(), strict=True)]
    expected = [(a + b) / 2 for a, b in zip(plain_weights(one), plain_weights(other), strict=True)]
    one.set_weights(mean)
    for got, wanted in zip(plain_weights(one), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


# Models that use the table as one variable


class Tied(keras.layers.Layer):  # type: ignore[misc]
    """A head that keeps the table of an embedding."""

    def __init__(self, table: Any, **settings: Any) -> None:
        super().__init__(**settings)
        self.table = table

    def call(self, hidden: Any) -> Any:
        return keras.ops.matmul(hidden, keras.ops.transpose(self.table))


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_keeps_the_table_has_no_weight_of_its_own(kind: str, tmp_path: Path) -> None:
    def tied(layer: Any) -> Any:
        layer.build()
        inputs = keras.Input((5,), dtype="int64")
        return keras.Model(inputs, Tied(layer.embeddings, name="head")(layer(inputs)))

    model = tied(partial())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(KINDS[kind](), loss)
    model.fit(IDS[0], IDS[0], epochs=2, verbose=0)
    assert changed_rows(model) == [3, 5]
    assert model.get_layer("head").weights == []
    assert [array.shape for array in plain_weights(model)] == [(NUM_ROWS, WIDTH)]
    path = tf.train.Checkpoint(model=model).save(tmp_path / "state")
    other = tied(partial())
    other.compile(KINDS[kind](), loss)
    other.optimizer.build(other.trainable_variables)
    tf.train.Checkpoint(model=other).restore(path).assert_consumed()
    np.testing.assert_array_equal(other(IDS[0]), model(IDS[0]))
    tf.saved_model.save(model, str(tmp_path / "saved"))


@pytest.mark.parametrize("kind", KINDS)
def test_adversarial_steps_perturb_the_table_and_take_it_back(kind: str) -> None:
    class Adversarial(keras.Model):  # type: ignore[misc]
        def train_step(self, data: Any) -> Any:
            ids, targets = data
            table = self.get_layer("words").embeddings
            with tf.GradientTape() as tape:
                loss = self.compute_loss(y=targets, y_pred=self(ids, training=True))
            step = tf.convert_to_tensor(tape.gradient(loss, table)) * 8.0
            table.assign_add(step)
            with tf.GradientTape() as tape:
                loss = self.compute_loss(y=targets, y_pred=self(ids, training=True))
            gradients = tape.gradient(loss, self.trainable_variables)
            table.assign_sub(step)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
            return {"loss": loss}

    model = network(partial())
    model = Adversarial(model.inputs, model.outputs)
    model.compile(KINDS[kind](), "mse")
    model.fit(IDS[0], TARGETS[0], epochs=2, verbose=0)
    assert changed_rows(model) == [3, 5]
