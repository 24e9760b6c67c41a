"""`RowMonitor` in `fit`: the numbers of the Lightning callback, under the same names."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

pytest.importorskip("tensorboard")  # TensorFlow writes no summaries without

from cohorts import TwoOptimizers

from partial_embedding import InputError, Vocabulary
from partial_embedding.callbacks.keras import RowMonitor, RowUnfreezing
from partial_embedding.monitor.record import read_record
from partial_embedding.tensorflow import PartialEmbedding, grow_table, rowwise
from partial_embedding.tensorflow.table_state import TableState

V, D, RATE = 8, 4, 0.125
IDS = np.array([[6, 7], [6, 0], [6, 7], [6, 0]])
SCHEDULE = {"stages": [{"epoch": 0, "rows": [6, 7]}, {"epoch": 2, "rows": {"most_frequent": 4}}]}
VOCABULARY = Vocabulary("abcdefgh", counts=[80, 70, 60, 50, 1, 1, 1, 1])


class Summed(keras.layers.Layer):  # type: ignore[misc]
    """Each element of a looked-up row gets the gradient 1."""

    def call(self, rows: Any) -> Any:
        return keras.ops.sum(rows, axis=(1, 2))[:, None]


def network(optimizer: Any, traced: bool = False, **rows: Any) -> Any:
    layer = PartialEmbedding.from_matrix(np.ones((V, D)), name="words", **rows)
    model = keras.Sequential([keras.Input((2,), dtype="int64"), layer, Summed()])
    model.compile(optimizer, lambda _, value: keras.ops.sum(value), run_eagerly=not traced)
    return model


def train(model: Any, *callbacks: Any) -> None:
    settings = {"epochs": 4, "batch_size": 2, "shuffle": False, "verbose": 0}
    model.fit(IDS, np.zeros((4, 1)), callbacks=list(callbacks), **settings)


def fit(folder: Path, traced: bool = False, **options: Any) -> tuple[RowMonitor, Any]:
    keras.utils.set_random_seed(0)
    rows = {"trainable_rows": [6, 7], "reserve_rows": "all"}
    model = network(rowwise(keras.optimizers.SGD(RATE)), traced, **rows)
    unfreezing = RowUnfreezing(SCHEDULE, vocabulary=VOCABULARY, audit=True)
    monitor = RowMonitor(folder, vocabulary=VOCABULARY, unfreezing=unfreezing, **options)
    train(model, unfreezing, monitor)
    return monitor, model


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RowMonitor]:
    """A run that is measured once an epoch."""
    folder = tmp_path_factory.mktemp("usual")
    return folder, fit(folder, traced=True)[0]


@pytest.fixture(scope="module")
def each_step(tmp_path_factory: pytest.TempPathFactory) -> tuple[RowMonitor, Any]:
    """A run that is measured at each step, and its model."""
    return fit(tmp_path_factory.mktemp("each_step"), every_n_steps=1)


def logged(folder: Path) -> dict[str, list[float]]:
    numbers: dict[str, list[float]] = {}
    (file,) = folder.glob("events*")
    for event in tf.compat.v1.train.summary_iterator(str(file)):
        for value in event.summary.value:
            numbers.setdefault(value.tag, []).append(float(tf.make_ndarray(value.tensor)))
    return numbers


@pytest.mark.parametrize(
    "options",
    [
        *({"every_n_steps": wrong} for wrong in (0, -1, 1.5, None)),
        *({"sample": wrong} for wrong in (0, -1, "all")),
        {"unfreezing": SCHEDULE},
    ],
    ids=str,
)
def test_what_would_measure_nothing_is_refused_at_once(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(InputError, match=f"^{name} is "):
        RowMonitor("logs", **options)


def test_data_of_unknown_length_is_measured_by_steps(tmp_path: Path) -> None:
    data = tf.data.Dataset.from_tensor_slices((IDS, np.zeros((4, 1)))).batch(2)
    model = network("sgd", trainable_rows=[6, 7], reserve_rows="all")
    # A stage of the second epoch.
    unfreezing = RowUnfreezing({"stages": [{"epoch": 0, "rows": [6]}, {"step": 2, "rows": [7]}]})
    callbacks = [unfreezing, monitor := RowMonitor(tmp_path, unfreezing=unfreezing)]
    unknown = data.filter(lambda ids, targets: True)
    model.fit(unknown, epochs=2, verbose=0, callbacks=callbacks)
    assert monitor.tracks["words"].trainable == [(0.0, 1), (2.0, 1)]
    assert [step.trainable for step in read_record(tmp_path).plans["words"]] == [1, 1]


def test_a_file_is_no_folder_of_logs(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    with pytest.raises(InputError, match="log_dir is a folder"):
        fit(tmp_path / "logs")


def test_a_model_that_was_not_compiled_is_measured(tmp_path: Path) -> None:
    layer = PartialEmbedding(V, D, trainable_rows=[6], name="words")
    monitor = RowMonitor(tmp_path, every_n_steps=1)
    monitor.set_params({"epochs": 1, "steps": 1})
    monitor.set_model(keras.Sequential([keras.Input((2,)), layer]))
    monitor.on_train_begin()
    monitor.on_train_batch_begin(0)
    layer.write_rows(np.array([6]), np.ones((1, D)))  # what a step of one's own does
    monitor.on_train_batch_end(0)
    assert logged(tmp_path)["words/trainable_rows"] == [1]


def test_a_plan_knows_the_rows_by_which_a_table_grew(tmp_path: Path) -> None:
    model = network("sgd", trainable_rows=[6])
    grow_table(model, "words", 3)
    unfreezing = RowUnfreezing({"stages": [{"epoch": 0, "rows": "new"}]})
    train(model, unfreezing, RowMonitor(tmp_path, unfreezing=unfreezing))
    assert [step.trainable for step in read_record(tmp_path).plans["words"]] == [3]


def test_it_logs_the_numbers_of_each_cohort_and_band(usual: tuple[Path, RowMonitor]) -> None:
    folder, monitor = usual
    numbers = logged(folder)
    assert numbers["words/trainable_rows"] == [2, 2, 4, 4]
    assert numbers["words/tokens_covered"] == pytest.approx(
        [2 / 264, 2 / 264, 260 / 264, 260 / 264]
    )
    track = monitor.tracks["words"]
    assert track.trainable == [(0.0, 2), (2.0, 4)]
    assert [(cohort.unfrozen_at, cohort.size) for cohort in track.cohorts.values()] == [
        (0.0, 2),
        (2.0, 4),
    ]
    assert numbers["words/cohort_0/lr"] == pytest.approx([RATE] * 2)
    # Row 6 occurs twice and row 7 once in each of two batches of an epoch, until both are frozen.
    distances = np.array([2, 1]) * 2 * 2 * RATE * D**0.5 / track.typical_length
    expected = np.quantile(distances, [0.1, 0.5, 0.9])
    for name, value in zip(("p10", "p50", "p90"), expected, strict=True):
        assert numbers[f"words/cohort_0/drift_{name}"][1] == pytest.approx(value, rel=1e-4)
    assert numbers["words/cohort_1/drift_p90"][-1] > 0
    assert numbers["words/seen_1_to_9/drift_p90"][-1] > numbers["words/seen_10_to_99/drift_p10"][0]
    assert "words/tokens_that_train" not in numbers  # Keras shows callbacks no batches
    # Each time that a row occurs in a batch adds 1 to each element of its gradient.
    assert numbers["words/cohort_0/gradient_norm"] == pytest.approx([(D * (2**2 + 1)) ** 0.5] * 2)
    assert numbers["words/cohort_1/gradient_norm"] == pytest.approx([D**0.5] * 2)


def test_the_update_ratio_is_that_of_one_step(each_step: tuple[RowMonitor, Any]) -> None:
    monitor, _ = each_step
    # In each batch row 6 occurs twice and row 7 once, and every element goes down by the rate.
    gone = np.array([[2.0], [1.0]]) * RATE * np.ones(D)
    before = np.ones((2, D))
    expected = []
    for _ in range(4):  # in the third epoch they are frozen
        expected.append(np.linalg.norm(gone) / np.linalg.norm(before))
        before -= gone
    ratios = [ratio for _, ratio in monitor.tracks["words"].cohorts[0].numbers["update_ratio"]]
    assert ratios == pytest.approx(expected)


def test_the_record_holds_plan_scores_and_audit(usual: tuple[Path, RowMonitor]) -> None:
    record = read_record(usual[0])
    assert [step.trainable for step in record.plans["words"]] == [2, 4]
    assert [result.changed for result in record.audit] == [0, 0]
    assert [score.place for score in record.scores] == [1.0, 2.0, 3.0, 4.0]
    assert "loss" in record.scores[0].metrics
    assert (record.length, record.epoch_steps) == (4, 2)
    assert record.tables["words"].moved[0].token == "g"


def test_a_page_is_made_of_a_run_of_keras(usual: tuple[Path, RowMonitor]) -> None:
    pytest.importorskip("jinja2")
    from partial_embedding.recipes.report_command import report_command

    report_command([str(usual[0])])
    html = (usual[0] / "report.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 4
    assert "No frozen row changed a bit." in html


def test_it_changes_no_bit_of_training(each_step: tuple[RowMonitor, Any], tmp_path: Path) -> None:
    _, rarely = fit(tmp_path, every_n_steps=10**6)
    for one, other in zip(each_step[1].get_weights(), rarely.get_weights(), strict=True):
        assert np.array_equal(one, other)


def test_a_cohort_with_an_lr_scale_has_another_rate(tmp_path: Path) -> None:
    slow = {"epoch": 2, "rows": {"most_frequent": 4}, "lr_scale": 0.5, "warmup_steps": 4}
    optimizer = rowwise(keras.optimizers.SGD(RATE))
    model = network(optimizer, True, trainable_rows=[6, 7], reserve_rows="all")
    optimizer.build(model.trainable_variables)
    unfreezing = RowUnfreezing({"stages": [SCHEDULE["stages"][0], slow]}, vocabulary=VOCABULARY)
    train(model, unfreezing, monitor := RowMonitor(tmp_path, every_n_steps=1))
    cohorts = monitor.tracks["words"].cohorts
    assert [rate for _, rate in cohorts[0].numbers["lr"]] == [RATE] * 4
    assert [rate for _, rate in cohorts[1].numbers["lr"]] == [
        RATE * 0.5 * share for share in (0.25, 0.5, 0.75, 1.0)
    ]


def test_rows_are_read_where_they_were_set_or_a_step_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    read = TableState.trainable_rows.fget

    def counted(state: TableState) -> Any:
        reads.append(1)
        return read(state)

    model = network("sgd", True, trainable_rows=[1], reserve_rows=[1, 2])
    layer = model.layers[0]
    moves = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: batch == 7 and layer.set_trainable_rows([1, 2])
    )
    monitor = RowMonitor(tmp_path, every_n_steps=100)
    monkeypatch.setattr(TableState, "trainable_rows", property(counted))
    ids = np.tile(IDS, (5, 1))
    model.fit(ids, np.zeros((20, 1)), batch_size=1, verbose=0, callbacks=[moves, monitor])
    # Before the first batch, twice in setting them and once after, and before the last batch.
    assert len(reads) <= 5
    assert monitor.tracks["words"].trainable == [(0.0, 1), (7 / 20, 2)]


@pytest.mark.parametrize("by_map", [False, True])
def test_among_several_optimizers_it_measures_that_of_the_table(
    by_map: bool, tmp_path: Path
) -> None:
    layer = PartialEmbedding(V, D, trainable_rows=[6, 7], name="words")
    inputs = keras.Input((2,), dtype="int64")
    outputs = keras.layers.Dense(1)(keras.layers.Flatten()(layer(inputs)))
    table, rest = keras.optimizers.SGD(RATE), keras.optimizers.SGD(0.5)
    if by_map:
        chosen = keras.optimizers.OptimizerMap(rest, {".*embeddings": table})
        model = keras.Model(inputs, outputs)
        model.compile(rowwise(keras.optimizers.MultiOptimizer(chosen)), "mse")
    else:
        model = TwoOptimizers(inputs, outputs)
        model.of_table, model.of_rest = rowwise(table), rest
        model.compile("adam", "mse")
    monitor = RowMonitor(tmp_path, every_n_steps=1)
    model.fit(IDS, np.ones((4, 1)), batch_size=2, epochs=2, verbose=0, callbacks=[monitor])
    numbers = monitor.tracks["words"].cohorts[0].numbers
    # Before the first step nothing tells which of two optimizers will step the table.
    assert [value for _, value in numbers["lr"]] == [RATE] * (4 if by_map else 3)
    assert len(numbers["gradient_norm"]) == 4
