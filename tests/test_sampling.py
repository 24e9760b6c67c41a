"""What is measured of rows, as pure numbers: cohorts, bands, neighbours and the record."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from partial_embedding import InputError, Schedule, Vocabulary
from partial_embedding.monitor import sampling
from partial_embedding.monitor.record import (
    RowRecord,
    RunRecorder,
    Score,
    read_record,
    write_record,
)
from partial_embedding.monitor.sampling import TableSample, nearest, share_kept
from partial_embedding.monitor.track import frequency_bands
from partial_embedding.schedule.messages import AuditResult

V, D = 60, 5


class Table:
    """A table that counts how many rows were read of it."""

    def __init__(self, num_rows: int = V) -> None:
        self.values = np.random.default_rng(0).normal(size=(num_rows, D)).astype(np.float32)
        self.read = 0

    def __call__(self, ids: Any) -> Any:
        self.read += len(ids)
        return self.values[ids]


def trainable(*ids: int, num_rows: int = V) -> Any:
    mask = np.zeros(num_rows, np.bool_)
    mask[list(ids)] = True
    return mask


def test_rows_that_join_together_are_a_cohort_until_they_leave() -> None:
    table = Table()
    sample = TableSample(table, V)
    sample.note_rows(trainable(1, 2), 0.0)
    sample.note_rows(trainable(1, 2, 3), 1.0)
    sample.note_rows(trainable(2, 3), 2.0)
    sample.note_rows(trainable(1, 2, 3), 3.0)
    assert sample.track.trainable == [(0.0, 2), (1.0, 3), (2.0, 2), (3.0, 3)]
    assert [(c.unfrozen_at, c.size) for c in sample.track.cohorts.values()] == [
        (0, 2),
        (1, 1),
        (3, 1),
    ]
    assert sample.cohort_of[[0, 1, 2, 3]].tolist() == [-1, 2, 0, 1]
    assert sample.measure(3.5)["cohort_0/neighbours_kept"] == 1.0  # those of row 2
    table.values[1] += 1  # of the first cohort no longer
    numbers = sample.measure(4.0)
    assert numbers["cohort_0/drift_p90"] == 0
    assert numbers["cohort_2/drift_p10"] > 0
    assert numbers["trainable_rows"] == 3


def test_a_measurement_reads_a_sample_whatever_the_size_of_the_table() -> None:
    reads = []
    for num_rows in (2_000, 200_000):
        table = Table(num_rows)
        sample = TableSample(table, num_rows, size=50)
        sample.note_rows(trainable(*range(num_rows // 2), num_rows=num_rows), 0.0)
        table.read = 0
        sample.before_step()
        sample.measure(1.0)
        reads.append(table.read)
    assert reads[0] == reads[1] < 2_000


def test_many_cohorts_train_and_few_are_followed() -> None:
    sample = TableSample(Table(), V)
    for number in range(40):
        sample.note_rows(trainable(*range(number + 1)), float(number))
    assert len(sample.track.cohorts) == 16
    assert sample.measure(40.0)["trainable_rows"] == 40
    norms = sample.gradient_norms(np.arange(V), np.ones(V))
    assert norms == dict.fromkeys(range(16), 1.0)


def test_bands_hold_each_row_once_and_padding_never() -> None:
    counts = np.array([0, 0, 1, 9, 10, 99, 100, 10**5, 10**7])
    bands = frequency_bands(counts, np.arange(1, 9))
    assert {name: ids.tolist() for name, (_, ids) in bands.items()} == {
        "seen_0": [1],
        "seen_1_to_9": [2, 3],
        "seen_10_to_99": [4, 5],
        "seen_100_to_999": [6],
        "seen_100000_or_more": [7, 8],
    }


@pytest.mark.parametrize("products", [1, 7 * D * 9, 2**18])
def test_neighbours_are_those_of_a_full_comparison(
    products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_PRODUCTS_ALONE", products)
    vectors = Table().values
    found = nearest(vectors[:7], vectors, 10, np.arange(7))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for row in range(7):
        cosines = unit @ unit[row]
        expected = [i for i in np.argsort(-cosines) if i != row][:10]
        assert found[row].tolist() == expected


def test_fewer_rows_than_neighbours_are_all_neighbours() -> None:
    vectors = np.eye(3)
    assert sorted(nearest(vectors[:1], vectors, 10, np.array([0]))[0]) == [1, 2]
    assert nearest(vectors[:1], vectors[:1], 10, np.array([0])).shape == (1, 0)
    assert nearest(np.zeros((1, 3)), vectors, 2, np.array([-1])).shape == (1, 2)
    assert share_kept(np.zeros((1, 0)), np.zeros((1, 0))) == 1.0


def test_a_row_that_leaves_all_its_neighbours_keeps_none() -> None:
    values = np.repeat(np.eye(2, dtype=np.float32), [21, 20], axis=0)
    values[:, 1] += np.linspace(0, 0.1, 41)
    sample = TableSample(lambda ids: values[ids], 41)
    sample.note_rows(trainable(0, num_rows=41), 0.0)
    assert sample.measure(1.0)["cohort_0/neighbours_kept"] == 1.0
    values[0] = values[40]
    assert sample.measure(2.0)["cohort_0/neighbours_kept"] == 0.0  # itself is none


def test_neighbours_that_stay_count_in_any_order() -> None:
    before = np.array([[1, 2, 3, 4]])
    assert share_kept(before, before[:, ::-1]) == 1.0
    assert share_kept(before, np.array([[4, 9, 8, 7]])) == 0.25


def test_the_rows_that_moved_most_come_first_with_their_neighbours() -> None:
    vocabulary = Vocabulary([f"w{i}" for i in range(V)], counts=[5] * V)
    table = Table()
    sample = TableSample(table, V, vocabulary=vocabulary)
    table.values[7] = 100 * table.values[3]
    table.values[9] += 1
    track = sample.finish()
    assert [row.token for row in track.moved] == ["w7", "w9"]
    assert track.moved[0].after[0] == "w3"
    assert track.moved[0].count == 5
    assert len(track.moved[0].before) == 10


@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_tiny_tables_are_sampled(num_rows: int) -> None:
    sample = TableSample(Table(num_rows), num_rows, padding=0)
    sample.note_rows(trainable(*range(1, num_rows), num_rows=num_rows), 0.0)
    sample.before_step()
    numbers = sample.measure(1.0)
    assert numbers["trainable_rows"] == max(num_rows - 1, 0)
    assert sample.finish().moved == []


# The record

GROWN = {
    "stages": [
        {"epoch": 0, "rows": {"range": [0, 4]}},
        {"epoch": 4, "rows": "all", "grow": {"order": "ids"}, "lr_scale": 0.5},
    ]
}


class Moving:
    """What a `RowUnfreezing` shows of itself."""

    vocabulary = None

    def __init__(self, schedule: Any, audit: list[AuditResult] | None = None) -> None:
        self.schedules: dict[str | None, Schedule] = {None: Schedule.parse(schedule)}
        self.audit_results = audit or []


def recorded(
    schedule: Any, num_rows: int = 12, padding: int | None = None, **options: Any
) -> RowRecord:
    """The record of a run of 8 epochs of 10 steps."""
    run = RunRecorder(**{"length": 8, "epoch_steps": 10, **options})
    sample = run.add_table("words", Table(num_rows), num_rows, padding)
    sample.track.end = 8.0 if run.unit == "epoch" else 80.0
    return run.finished(Moving(schedule))


def steps_of(record: RowRecord) -> list[tuple[int, int]]:
    return [(step.step, step.trainable) for step in record.plans["words"]]


def test_growth_is_planned_as_it_will_be() -> None:
    record = recorded(GROWN)
    assert steps_of(record) == [(0, 4), (10, 6), (20, 8), (30, 10), (40, 12)]
    assert [step.rate for step in record.plans["words"]] == ["", *["lr × 0.5"] * 4]
    assert record.schedules["words"].splitlines()[1] == "- {epoch: 0, rows: {range: [0, 4, null]}}"


def test_a_plateau_is_planned_where_it_comes_at_the_latest() -> None:
    waits = {"plateau": {"monitor": "loss", "max_wait": 5}, "rows": "all"}
    record = recorded({"stages": [{"epoch": 0, "rows": [1]}, waits]}, 9)
    assert steps_of(record) == [(0, 1), (50, 9)]


def test_a_run_of_unknown_length_is_planned_in_the_steps_it_made() -> None:
    stages = [{"step": 0, "rows": [1]}, {"step": 30, "rows": "all"}, {"step": 90, "rows": [1]}]
    assert steps_of(recorded({"stages": stages}, epoch_steps=None)) == [(0, 1), (30, 12)]


def test_padding_is_not_planned() -> None:
    record = recorded({"stages": [{"epoch": 0, "rows": "all"}]}, 9, padding=0)
    assert steps_of(record) == [(0, 8)]


def test_a_long_list_of_ids_is_cut_short() -> None:
    record = recorded({"stages": [{"epoch": 0, "rows": list(range(0, 900, 2))}]}, 900)
    assert len(record.schedules["words"]) < 200
    assert steps_of(record) == [(0, 450)]


def full_record() -> RowRecord:
    vocabulary = Vocabulary(map(str, range(V)), counts=range(V))
    run = RunRecorder(3, 3, vocabulary=vocabulary)
    sample = run.add_table("words", Table(), V)
    sample.note_rows(trainable(1, 2), 0.0)
    sample.before_step()
    sample.measure(1.0, 0.5, {0: 2.0}, {0: 0.1})
    run.add_score({"val_loss": 0.25, "broken": float("nan")})
    return run.finished(Moving(GROWN, [AuditResult("words", 0, 58, 0)]))


def test_a_record_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    record = full_record()
    write_record(tmp_path / "rows.json", record)
    assert read_record(tmp_path) == record == read_record(tmp_path / "rows.json")
    assert record.scores == [Score(1.0, 2, {"val_loss": 0.25})]
    assert record.audit == [AuditResult("words", 0, 58, 0)]


def test_a_restored_recorder_goes_on_as_one_that_never_stopped() -> None:
    table, vocabulary = Table(), Vocabulary(map(str, range(V)), counts=range(V))
    whole = RunRecorder(3, 3, vocabulary=vocabulary)
    samples = [whole.add_table("words", table, V)]
    samples[0].note_rows(trainable(*range(20)), 0.0)
    table.values[:20] += 0.5
    samples[0].measure(1.0)
    whole.add_score({"loss": 2.0})
    # What was sampled before is sampled on, however many rows of others will be.
    resumed = RunRecorder(3, 3, size=10, vocabulary=vocabulary, restored=whole.to_state())
    samples.append(resumed.add_table("words", table, V))
    for sample in samples:
        sample.note_rows(trainable(*range(30)), 1.0)
    table.values[10:40] -= 0.25
    measured = []
    for run, sample in zip((whole, resumed), samples, strict=True):
        measured.append(sample.measure(2.0))
        run.add_score({"loss": 1.0})
    assert measured[0] == measured[1]
    assert resumed.finished() == whole.finished()
    assert len(resumed.finished().scores) == 2


def test_a_record_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read"):
        read_record(tmp_path)
    (tmp_path / "rows.json").write_text('{"format": 2}')
    with pytest.raises(InputError, match=r"Received: 2"):
        read_record(tmp_path)


def test_long_runs_leave_short_records() -> None:
    run = RunRecorder()
    sample = run.add_table("words", Table(), V)
    for step in range(3000):
        sample.note_rows(trainable(step % V), float(step))
        sample.track.token_share.append((step, 1.0))
        sample.track.end = float(step)
        run.add_score({"loss": 1.0})
        sample.track.thin()
    record = run.finished()
    track = record.tables["words"]
    for points in (record.scores, track.trainable, track.token_share):
        assert 400 < len(points) <= 1000
    assert track.trainable[0] == (0, 1)
    assert track.trainable[-1] == (2999, 1)
    assert record.scores[-1].place == 2999
