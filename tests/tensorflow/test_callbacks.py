"""`RowUnfreezing` in `fit`."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from partial_embedding import InputError, Vocabulary  # noqa: E402
from partial_embedding.callbacks.keras import RowUnfreezing  # noqa: E402
from partial_embedding.tensorflow import FrozenRowsMoved, PartialEmbedding  # noqa: E402

IDS = np.arange(8).reshape(4, 2)
SCHEDULE = {"stages": [{"epoch": 0, "rows": [6, 7]}, {"epoch": 2, "rows": {"most_frequent": 4}}]}
VOCABULARY = Vocabulary("abcdefgh", counts=[8, 7, 6, 5, 1, 1, 1, 1])


def _model(**settings: Any) -> Any:
    settings = {"trainable_rows": "all", "reserve_rows": "all", "name": "words", **settings}
    layer = PartialEmbedding(8, 2, **settings)
    model = keras.Sequential([keras.Input((2,), dtype="int64"), layer, keras.layers.Dense(1)])
    model.compile(keras.optimizers.AdamW(0.1), "mse")
    return model


def _fit(model: Any, *callbacks: Any, epochs: int = 4) -> None:
    model.fit(
        IDS, np.ones((4, 2, 1)), epochs=epochs, batch_size=2, verbose=0, callbacks=list(callbacks)
    )


class Recorder(keras.callbacks.Callback):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.tables: list[Any] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.tables.append(self.model.layers[0].get_weights()[0])


def test_each_epoch_trains_the_rows_of_its_stage() -> None:
    model, recorder = _model(), Recorder()
    start = model.layers[0].get_weights()[0]
    _fit(model, RowUnfreezing(SCHEDULE, VOCABULARY), recorder)
    changed = [
        np.flatnonzero((after != before).any(axis=1)).tolist()
        for before, after in zip([start, *recorder.tables], recorder.tables, strict=False)
    ]
    assert changed == [[6, 7], [6, 7], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_each_stage_is_said_once_and_the_audit_at_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _fit(_model(), RowUnfreezing(SCHEDULE, VOCABULARY, audit=1))
    assert capsys.readouterr().out.splitlines() == [
        "words: 2 of 8 rows train (4 of 16 parameters), 3 parameters elsewhere",
        "words: stage 0 from epoch 0: 2 rows train, 25.0 % of the table, 6.7 % of training tokens",
        "words: stage 1 from epoch 2: 4 rows train, 50.0 % of the table, 86.7 % of training tokens",
        "audit: words: frozen rows by stage: 6, 4; changed a bit: 0",
    ]


def test_an_epoch_in_the_middle_of_a_schedule_needs_no_epochs_before_it() -> None:
    model = _model()
    model.fit(
        IDS,
        np.ones((4, 2, 1)),
        initial_epoch=3,
        epochs=4,
        verbose=0,
        callbacks=[RowUnfreezing(SCHEDULE, VOCABULARY)],
    )
    assert model.layers[0].trainable_rows.tolist() == [0, 1, 2, 3]


def test_a_schedule_traces_the_training_step_once() -> None:
    model, traces = _model(), []
    step = model.train_step

    def counted(data: Any) -> Any:
        traces.append(1)
        return step(data)

    model.train_step = counted
    _fit(model, RowUnfreezing(SCHEDULE, VOCABULARY), epochs=2)
    before = len(traces)
    _fit(model, RowUnfreezing(SCHEDULE, VOCABULARY), epochs=4)
    assert before >= 1
    assert len(traces) == before


def test_the_audit_names_rows_that_were_written_from_outside() -> None:
    class Vandal(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            (matrix,) = self.model.layers[0].get_weights()
            matrix[[1, 6]] += 1
            self.model.layers[0].set_weights([matrix])

    with pytest.raises(FrozenRowsMoved, match=r"words: 1 frozen rows changed by step 1: 1\. Most"):
        _fit(_model(), RowUnfreezing(SCHEDULE, VOCABULARY, audit=1), Vandal())


def test_tables_may_have_schedules_of_their_own() -> None:
    model = keras.Sequential(
        [
            keras.Input((2,), dtype="int64"),
            PartialEmbedding(8, 2, reserve_rows="all", name="words"),
        ]
    )
    model.compile("sgd", "mse")
    schedule = {"words": {"stages": [{"epoch": 0, "rows": [5]}]}}
    model.fit(IDS, np.ones((4, 2, 2)), verbose=0, callbacks=[RowUnfreezing(schedule)])
    assert model.layers[0].trainable_rows.tolist() == [5]
    with pytest.raises(InputError, match=r"\['words'\]. Received: 'other'"):
        _fit(model, RowUnfreezing({"other": schedule["words"]}))


def test_what_does_not_fit_is_refused_before_the_first_step() -> None:
    with pytest.raises(InputError, match=r"words: stages\[1\]\.rows: .*counts"):
        _fit(_model(), RowUnfreezing(SCHEDULE))
    narrow = _model(trainable_rows=[6, 7], reserve_rows=[6, 7])
    with pytest.raises(InputError, match=r"words: stages\[1\]\.rows: .*reserve_rows"):
        _fit(narrow, RowUnfreezing(SCHEDULE, VOCABULARY))
    with pytest.raises(InputError, match=r"stages\[0\]\.rows: .*reserve_rows='all'"):
        _fit(_model(reserve_rows=None), RowUnfreezing(SCHEDULE, VOCABULARY))
    plain = keras.Sequential([keras.layers.Embedding(8, 2), keras.layers.Dense(1)])
    plain.compile("sgd", "mse")
    with pytest.raises(InputError, match="needs a PartialEmbedding"):
        _fit(plain, RowUnfreezing(SCHEDULE))


@pytest.mark.parametrize(
    ("epoch", "batch", "optimizer"),
    [
        pytest.param(2, 0, "plain", marks=pytest.mark.full),
        pytest.param(3, 2, "plain", marks=pytest.mark.full),
        (3, 2, "rowwise"),
        pytest.param(5, 1, "rowwise", marks=pytest.mark.full),
    ],
)
def test_a_killed_run_ends_bit_for_bit_where_the_whole_one_does(
    epoch: int, batch: int, optimizer: str, start: Callable[..., Any], tmp_path: Path
) -> None:
    whole = start("run_schedule.py", tmp_path / "whole", -1, -1, optimizer)
    killed = start("run_schedule.py", tmp_path / "killed", epoch, batch, optimizer)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    resumed = start("run_schedule.py", tmp_path / "killed", -1, -1, optimizer)
    (expected, errors), (got, _) = whole.communicate(), resumed.communicate()
    assert whole.returncode == resumed.returncode == 0, errors[-3000:]
    assert got.splitlines()[-1] == expected.splitlines()[-1]
    stages = [line for line in got.splitlines() if ": stage " in line]
    assert f"from epoch {epoch}:" in stages[0]  # it did not begin again
