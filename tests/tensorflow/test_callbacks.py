"""`RowUnfreezing` and `RowMonitor` in `fit`."""

import re
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_fits import IDS, TARGETS, VOCABULARY, Watch, fit, small_model

from partial_embedding import InputError, Vocabulary
from partial_embedding.callbacks.keras import RowMonitor, RowUnfreezing
from partial_embedding.monitor.record import read_record
from partial_embedding.tensorflow import (
    FrozenRowsMoved,
    PartialEmbedding,
    rowwise,
)

SCHEDULE = {"stages": [{"epoch": 0, "rows": [6, 7]}, {"epoch": 2, "rows": {"most_frequent": 4}}]}


class Recorder(keras.callbacks.Callback):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.tables: list[Any] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.tables.append(self.model.layers[0].get_weights()[0])


def test_the_best_epoch_is_restored_under_a_schedule_that_freezes_again() -> None:
    model, recorder = small_model(), Recorder()
    thaws = {"preset": {"chain_thaw": {"bands": 2}}}
    vocabulary = Vocabulary("abcdefgh", counts=[8, 7, 6, 5, 1, 1, 1, 1], missing=[7])

    class Fall(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            logs["told"] = [3.0, 1.0, 2.0][min(epoch, 2)]

    stopping = keras.callbacks.EarlyStopping(
        "told", mode="min", patience=2, restore_best_weights=True
    )
    unfreezing = RowUnfreezing(thaws, vocabulary=vocabulary, audit=True)
    fit(model, unfreezing, Fall(), recorder, stopping)
    assert stopping.best_epoch == 1
    (last,) = model.layers[0].get_weights()
    assert last.tobytes() == recorder.tables[1].tobytes() != recorder.tables[3].tobytes()


def test_an_epoch_in_the_middle_of_a_schedule_needs_no_epochs_before_it() -> None:
    model = small_model(reserve_rows="all")
    fit(model, RowUnfreezing(SCHEDULE, vocabulary=VOCABULARY), initial_epoch=3)
    assert model.layers[0].trainable_rows.tolist() == [0, 1, 2, 3]


def _watched(optimizer: Any, schedule: Any, **compiled: Any) -> list[list[int]]:
    """The rows before each batch of two epochs of eight."""
    model = small_model(trainable_rows="none", reserve_rows="all")
    model.compile(optimizer, "mse", **compiled)
    watch, ids = Watch(), np.arange(16).reshape(8, 2) % 8
    callbacks, settings = [RowUnfreezing(schedule), watch], {"batch_size": 1, "verbose": 0}
    model.fit(ids, np.full((8, 2, 1), 1000.0), epochs=2, callbacks=callbacks, **settings)
    return watch.rows


ACCUMULATES = {"gradient_accumulation_steps": 2}
LATE = {"stages": [{"step": 0, "rows": [1]}, {"step": 3, "rows": [2]}, {"step": 5, "rows": [3]}]}
HALF = {
    "stages": [
        {"share": 0, "rows": [1]},
        {"share": 0.25, "rows": [2]},
        {"share": 0.75, "rows": [2, 3, 4, 5], "grow": {"order": "ids", "increments": 2}},
    ]
}


@pytest.mark.parametrize(
    ("schedule", "settings", "compiled", "expected"),
    [
        (LATE, {}, {}, {0: [1], 3: [2], 5: [3]}),
        (LATE, {}, {"run_eagerly": True}, {0: [1], 3: [2], 5: [3]}),
        # Keras calls before batches 0, 2, 4, …
        (LATE, {}, {"steps_per_execution": 2}, {0: [1], 2: [2], 3: [3]}),
        (LATE, ACCUMULATES, {}, {0: [1], 6: [2], 10: [3]}),
        (HALF, {}, {}, {0: [1], 4: [2], 8: [2, 3], 12: [2, 3, 4, 5]}),
        (HALF, ACCUMULATES, {}, {0: [1], 4: [2], 8: [2, 3], 12: [2, 3, 4, 5]}),
        ({**LATE, "cycle": 7}, {}, {}, {0: [1], 3: [2], 5: [3], 7: [1], 10: [2], 12: [3], 14: [1]}),
    ],
)
def test_rows_move_before_the_batch_of_their_step(
    schedule: Any, settings: Any, compiled: Any, expected: dict[int, list[int]]
) -> None:
    rows = _watched(keras.optimizers.SGD(0.1, **settings), schedule, **compiled)
    began = {i: r for i, r in enumerate(rows) if not i or r != rows[i - 1]}
    assert began == expected


def test_steps_that_a_scaled_loss_skips_are_none() -> None:
    # The scaled gradients of the first steps are infinite, until the scale has fallen.
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1e-6), initial_scale=1e37)
    rows = _watched(optimizer, LATE)
    skipped = 16 - int(optimizer.iterations)
    assert 0 < skipped < 10
    assert rows.index([2]) == 3 + skipped
    assert rows.index([3]) == 5 + skipped


def test_a_second_fit_begins_at_step_0_again_and_one_that_goes_on_does_not() -> None:
    model = small_model(reserve_rows="all")
    watches = []
    unfreezing = RowUnfreezing({"stages": [{"epoch": 0, "rows": [1]}, {"step": 3, "rows": [2]}]})
    for settings in ({"epochs": 2}, {"epochs": 1}, {"epochs": 2, "initial_epoch": 1}):
        watches.append(Watch())
        fit(model, unfreezing, watches[-1], **settings)
    assert [watch.rows for watch in watches] == [[[1]] * 3 + [[2]], [[1]] * 2, [[1], [2]]]


@pytest.mark.parametrize("metric", ["loss", "val_loss"])
def test_a_plateau_starts_a_stage_with_the_next_epoch(metric: str) -> None:
    # Nothing learns, so no epoch is an improvement on the first.
    model = small_model(keras.optimizers.SGD(0.0), True, trainable_rows=[1], reserve_rows="all")
    waits = {"monitor": metric, "patience": 2}
    schedule = {
        "stages": [
            {"epoch": 0, "rows": [1]},
            {"plateau": waits, "rows": [2]},
            {"epoch": 6, "rows": [3]},
        ]
    }
    watch, unfreezing = Watch(), RowUnfreezing(schedule)
    traces, step = [], model.train_step
    model.train_step = lambda data: (traces.append(1), step(data))[1]
    validation = (IDS, TARGETS) if metric == "val_loss" else None
    # A sum in another order can be an improvement in its last bit.
    settings = {"epochs": 7, "batch_size": 4, "shuffle": False, "validation_data": validation}
    fit(model, unfreezing, watch, **settings)
    assert watch.rows == [[1]] * 3 + [[2]] * 3 + [[3]]
    assert unfreezing.position.epoch == 6
    assert len(traces) == 1


def test_a_metric_that_is_not_logged_is_refused_with_what_was_logged() -> None:
    def wait(metric: str, **settings: Any) -> None:
        schedule = {"stages": [{"epoch": 0, "rows": [1]}, {"plateau": metric, "rows": [2]}]}
        fit(small_model(), RowUnfreezing(schedule), **{"epochs": 1, **settings})

    with pytest.raises(InputError, match=r"'lost'\. Received: \['loss'\]"):
        wait("lost")
    with pytest.raises(InputError, match=r"'val_loss'\. Received: \['loss'\]"):
        wait("val_loss")
    with pytest.raises(InputError, match=r"Received: epoch 1 to begin with, and 0 measured"):
        wait("loss", initial_epoch=1, epochs=2)
    wait("val_loss", validation_data=(IDS, TARGETS), validation_freq=2, epochs=2)


def test_a_share_of_data_of_unknown_length_is_refused() -> None:
    def batches() -> Any:
        while True:
            yield IDS, TARGETS

    with pytest.raises(InputError, match=r"unknown length\. .*pass steps_per_epoch="):
        small_model().fit(batches(), verbose=0, callbacks=[RowUnfreezing(HALF)])
    # Steps need no length.
    model, callbacks = small_model(), [RowUnfreezing(LATE)]
    data = tf.data.Dataset.from_generator(
        lambda: ((IDS, TARGETS) for _ in range(4)),
        output_types=("int64", "float32"),
        output_shapes=((4, 2), (4, 2, 1)),
    )
    model.fit(data, verbose=0, callbacks=callbacks)
    assert model.layers[0].trainable_rows.tolist() == [2]


def test_the_optimizer_is_asked_for_its_step_only_where_rows_may_change() -> None:
    class Counted(keras.optimizers.SGD):  # type: ignore[misc]
        asked = 0

        @property
        def iterations(self) -> Any:
            if tf.executing_eagerly():
                Counted.asked += 1
            return super().iterations

    _watched(Counted(0.1), LATE)
    # As each of two epochs begins and ends, twice at its last batch, at two stages and at the end.
    assert Counted.asked <= 12


def test_a_backup_that_is_no_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "row_unfreezing.json").write_text("[]")
    with pytest.raises(InputError, match=r"row_unfreezing\.json: the record of a run is the JSON"):
        fit(small_model(), RowUnfreezing(LATE, backup_dir=tmp_path), initial_epoch=1)


def test_a_vocabulary_may_be_a_plain_list_of_tokens() -> None:
    model = small_model()
    schedule = {"stages": [{"epoch": 0, "rows": {"tokens": ["b", "h"]}}]}
    fit(model, RowUnfreezing(schedule, vocabulary=list("abcdefgh")), epochs=1)
    assert model.layers[0].trainable_rows.tolist() == [1, 7]


def test_the_record_of_a_run_and_that_of_a_monitor_share_a_folder(tmp_path: Path) -> None:
    waits = {"stages": [{"epoch": 0, "rows": [1]}, {"plateau": "loss", "rows": [2]}]}
    for epochs in (2, 4):
        callbacks = RowUnfreezing(waits, backup_dir=tmp_path), RowMonitor(tmp_path)
        fit(small_model(), *callbacks, epochs=epochs, initial_epoch=epochs - 2)
    assert read_record(tmp_path).tables.keys() == {"words"}


def test_a_pace_needs_an_optimizer_that_keeps_it() -> None:
    schedule = {"stages": [{"epoch": 0, "rows": [6]}, {"epoch": 1, "rows": [7], "lr_scale": 0.5}]}
    rule = r"words: stages\[1\]: lr_scale and warmup_steps .* AdamW\. Compile"
    with pytest.raises(InputError, match=rule):
        fit(small_model(keras.optimizers.AdamW()), RowUnfreezing(schedule))
    unbuilt = keras.Sequential([PartialEmbedding(8, 2, reserve_rows="all", name="words")])
    unbuilt.compile(rowwise(keras.optimizers.SGD(0.1)), "mse")
    with pytest.raises(InputError, match=r"in a built model"):
        unbuilt.fit(IDS, np.ones((4, 2, 2)), verbose=0, callbacks=[RowUnfreezing(schedule)])


def test_parameters_elsewhere_are_told_where_they_are_known(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for layers in ([keras.Input((2,), dtype="int64")], []):
        table = PartialEmbedding(8, 2, name="words")
        model = keras.Sequential([*layers, table, keras.layers.Dense(1)])
        model.compile("adam", "mse", run_eagerly=True)
        model.fit(IDS, TARGETS, callbacks=[RowUnfreezing(SCHEDULE, vocabulary=VOCABULARY)])
    lines = [line for line in capsys.readouterr().out.splitlines() if "rows train (" in line]
    # Keras builds a model without an input in its first step.
    told = "words: 2 of 8 rows train (4 of 16 parameters)"
    assert lines == [f"{told}, 3 parameters elsewhere", told]


def test_growing_rows_are_reserved_told_and_audited(capsys: pytest.CaptureFixture[str]) -> None:
    stages = [{"epoch": 0, "rows": [6, 7]}, {"epoch": 3, "rows": "all", "grow": {"order": "ids"}}]
    fit(small_model(), RowUnfreezing({"stages": stages}, audit=True))
    towards = "of 3 towards stage 1"
    assert capsys.readouterr().out.splitlines()[1:] == [
        "words: stage 0 from epoch 0: 2 rows train, 25.0 % of the table",
        f"words: stage 0 from epoch 1, increment 1 {towards}: 4 rows train, 50.0 % of the table",
        f"words: stage 0 from epoch 2, increment 2 {towards}: 6 rows train, 75.0 % of the table",
        "words: stage 1 from epoch 3: 8 rows train, 100.0 % of the table",
        "audit: words: frozen rows by stage: 6, 0; changed a bit: 0",
    ]
    unknown = {"stages": [stages[0], {**stages[1], "grow": {"order": ["a", "nobody"]}}]}
    with pytest.raises(InputError, match=r"words: stages\[1\]\.rows: .*nobody"):
        fit(small_model(), RowUnfreezing(unknown, vocabulary=VOCABULARY))


def test_the_audit_names_rows_that_were_written_from_outside() -> None:
    class Vandal(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            (matrix,) = self.model.layers[0].get_weights()
            matrix[[1, 6]] += 1
            self.model.layers[0].set_weights([matrix])

    with pytest.raises(FrozenRowsMoved, match=r"words: 1 frozen row changed by step 1: 1\. Most"):
        fit(small_model(), RowUnfreezing(SCHEDULE, vocabulary=VOCABULARY, audit=1), Vandal())


def test_tables_may_have_schedules_of_their_own() -> None:
    model, schedule = small_model(), {"stages": [{"epoch": 0, "rows": [5]}]}
    assert fit(model, RowUnfreezing({"words": schedule})) == [5]
    with pytest.raises(InputError, match=r"\['words'\]. Received: 'other'"):
        fit(model, RowUnfreezing({"other": schedule}))


def test_two_tables_of_one_name_are_refused() -> None:
    def towers(second: str) -> Any:
        inputs = keras.Input((2,), dtype="int64")
        layers = [PartialEmbedding(8, 2, name=name) for name in ("words", second)]
        parts = [keras.Sequential([layer, keras.layers.Flatten()]) for layer in layers]
        model = keras.Model(inputs, keras.layers.add([part(inputs) for part in parts]))
        model.compile("sgd", "mse")
        return model

    fit = {"epochs": 1, "verbose": 0, "callbacks": [RowUnfreezing({"stages": [LATE["stages"][0]]})]}
    with pytest.raises(InputError, match=r"a name of its own\. Received 'words' twice"):
        towers("words").fit(IDS, np.ones((4, 4)), **fit)
    towers("items").fit(IDS, np.ones((4, 4)), **fit)  # the remedy


def test_each_model_is_asked_for_its_own_vocabulary() -> None:
    callback = RowUnfreezing({"stages": [{"epoch": 0, "rows": {"most_frequent": 2}}]})
    for counts, expected in [([9, 8, 1, 1, 1, 1, 1, 1], [0, 1]), ([1] * 6 + [8, 9], [6, 7])]:
        model = small_model()
        model.vocabulary = Vocabulary("abcdefgh", counts=counts)
        fit(model, callback, epochs=1)
        assert model.layers[0].trainable_rows.tolist() == expected


def test_what_does_not_fit_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"words: stages\[1\]\.rows: .*counts"):
        fit(small_model(), RowUnfreezing(SCHEDULE))
    narrow = small_model(trainable_rows=[6, 7], reserve_rows=[6, 7])
    with pytest.raises(InputError, match=r"words: stages\[1\]\.rows: .*reserve_rows"):
        fit(narrow, RowUnfreezing(SCHEDULE, vocabulary=VOCABULARY))
    plain = keras.Sequential([keras.Input((2,)), keras.layers.Embedding(8, 2)])
    plain.compile("sgd", "mse")
    for callback in (RowUnfreezing(SCHEDULE), RowMonitor(tmp_path)):
        with pytest.raises(InputError, match=r"ing rows needs a PartialEmbedding .*from_layer"):
            fit(plain, callback)
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def finish(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """What a run that nothing stopped prints, for each kind of optimizer."""

    @cache
    def finish(kind: str, start: Callable[..., Any]) -> str:
        folder = tmp_path_factory.mktemp("whole")
        run = start("run_schedule.py", folder, -1, "end", "record", kind)
        output, errors = run.communicate()
        assert run.returncode == 0, errors[-3000:]
        return str(output)

    return finish


@pytest.mark.parametrize(
    ("epoch", "place", "first", "kind"),
    [
        # Between the two files, where the record is one epoch ahead, and where it comes second.
        (3, "end", "record", "rate_scales"),
        pytest.param(3, "end", "weights", "rate_scales", marks=pytest.mark.full),
        pytest.param(1, "3", "weights", "rate_scales", marks=pytest.mark.full),
        pytest.param(4, "0", "record", "plain", marks=pytest.mark.full),
        pytest.param(6, "end", "weights", "rowwise", marks=pytest.mark.full),
        pytest.param(8, "2", "weights", "rate_scales", marks=pytest.mark.full),
    ],
)
def test_a_killed_run_ends_bit_for_bit_where_the_whole_one_does(
    epoch: int,
    place: str,
    first: str,
    kind: str,
    start: Callable[..., Any],
    finish: Callable[..., str],
    tmp_path: Path,
) -> None:
    killed = start("run_schedule.py", tmp_path, epoch, place, first, kind)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    resumed = start("run_schedule.py", tmp_path, -1, "end", first, kind)
    got, errors = resumed.communicate()
    assert resumed.returncode == 0, errors[-3000:]
    expected = finish(kind, start).splitlines()
    assert got.splitlines()[-1] == expected[-1]
    began = epoch + (place == "end" and first == "weights")
    stages = [line for line in got.splitlines() if ": stage " in line]
    assert re.search(rf"from step {4 * began}\b", stages[0])
    assert stages[1:] == [line for line in expected if ": stage " in line][1 - len(stages) :]
