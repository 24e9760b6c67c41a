"""Files of Keras models that hold the rows that trained, and the tables they are loaded into."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from partial_embedding import InputError
from partial_embedding.callbacks.keras import RowCheckpoint, RowUnfreezing
from partial_embedding.tensorflow import PartialEmbedding, grow_table, rowwise
from partial_embedding.tensorflow.row_files import rows_saved_alone

V, D = 1000, 4
SCHEDULE = {"stages": [{"epoch": 0, "rows": [1, 5]}, {"epoch": 2, "rows": [5, 9]}]}


def model_of(seed: int = 0, reserve: Any = (1, 5, 9)) -> Any:
    matrix = np.random.default_rng(seed).normal(size=(V, D)).astype(np.float32)
    layer = PartialEmbedding.from_matrix(
        matrix, trainable_rows=[1], reserve_rows=reserve, name="words"
    )
    keras.utils.set_random_seed(1)
    parts = [keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layer, *parts])
    model.compile(rowwise(keras.optimizers.Adam(0.1)), "mse")
    return model


def fit(model: Any, folder: Path) -> list[Any]:
    """The table as each epoch left it."""
    tables: list[Any] = []

    class Keep(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            tables.append(model.layers[0].get_weights()[0])

    ids = np.random.default_rng(3).integers(10, size=(24, 3))
    saving = RowCheckpoint(folder / "{epoch}.weights.h5")
    callbacks = [RowUnfreezing(SCHEDULE), Keep(), saving]
    model.fit(ids, np.ones(24), batch_size=8, epochs=4, verbose=0, callbacks=callbacks)
    return tables


Run = tuple[Path, Any, list[Any]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run: the folder of its files, the model, and the table as each epoch left it."""
    folder, model = tmp_path_factory.mktemp("trained"), model_of()
    tables = fit(model, folder)
    model.save_weights(folder / "whole.weights.h5")
    return folder, model, tables


def test_a_file_of_each_epoch_makes_the_table_of_then(trained: Run) -> None:
    folder, model, tables = trained
    for again in (model_of(), model):  # a new one, and the one that trained on
        for epoch, table in enumerate(tables):
            again.load_weights(folder / f"{epoch + 1}.weights.h5")
            assert np.array_equal(again.layers[0].get_weights()[0], table)
    whole, *rows = sorted(path.stat().st_size for path in folder.iterdir())[::-1]
    assert whole - max(rows) > 0.9 * V * D * 4


def test_a_file_of_rows_is_no_whole_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Received save_weights_only=False\. Leave it out"):
        RowCheckpoint(tmp_path / "model.keras", save_weights_only=False)


def test_files_outside_of_the_callback_are_whole(trained: Run) -> None:
    other = model_of(seed=1)
    other.load_weights(trained[0] / "whole.weights.h5")
    assert np.array_equal(other.layers[0].get_weights()[0], trained[2][-1])


def another_matrix() -> Any:
    return model_of(seed=1)


def two_rows_that_changed_places() -> Any:
    other = model_of()
    (matrix,) = other.layers[0].get_weights()
    matrix[[20, 21]] = matrix[[21, 20]]
    other.layers[0].set_weights([matrix])
    return other


@pytest.mark.parametrize("make", [another_matrix, two_rows_that_changed_places])
def test_another_table_is_refused_by_name_and_stays(make: Any, trained: Run) -> None:
    other = make()
    (before,) = other.layers[0].get_weights()
    with pytest.raises(ValueError, match=r"'words'.*same matrix"):  # Keras collects all errors
        other.load_weights(trained[0] / "4.weights.h5")
    assert np.array_equal(other.layers[0].get_weights()[0], before)


def test_rows_load_into_a_table_that_reserves_others_or_grew(trained: Run, tmp_path: Path) -> None:
    folder, _, tables = trained
    for reserve in ([1, 700], "all"):
        other = model_of(reserve=reserve)
        other.load_weights(folder / "4.weights.h5", skip_mismatch=True)
        assert np.array_equal(other.layers[0].get_weights()[0], tables[-1])
    grown = model_of()
    grow_table(grown, "words", 2, init=np.ones((2, D)))
    grown.load_weights(folder / "4.weights.h5", skip_mismatch=True)
    expected = np.concatenate([tables[-1], np.ones((2, D))])
    assert np.array_equal(grown.layers[0].get_weights()[0], expected)
    with rows_saved_alone(grown.layers[:1]):
        grown.save_weights(tmp_path / "grown.weights.h5")
    with pytest.raises(ValueError, match=rf"shape \({V + 2}, {D}\) for 'words' of the shape"):
        model_of().load_weights(tmp_path / "grown.weights.h5")


def test_rows_load_into_a_table_of_one_variable(tmp_path: Path) -> None:
    model = model_of()
    tables = fit(model, tmp_path)
    plain = PartialEmbedding.from_matrix(model_of().layers[0].get_weights()[0], name="words")
    whole = keras.Sequential([keras.Input((3,), dtype="int32"), plain, *model.layers[1:]])
    whole.load_weights(tmp_path / "4.weights.h5", skip_mismatch=True)
    assert np.array_equal(plain.get_weights()[0], tables[-1])
