"""What is measured of rows, as pure numbers: cohorts, bands, neighbours and the record."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from partial_embedding import InputError, Schedule, Vocabulary
from partial_embedding.monitor.neighbours import nearest, share_kept
from partial_embedding.monitor.record import (
    RowRecord,
    planned_points,
    planned_stages,
    read_record,
    write_record,
)
from partial_embedding.monitor.sampling import TableWatch
from partial_embedding.monitor.track import RowTrack, frequency_bands

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


def test_rows_that_wake_together_are_a_cohort_until_they_sleep() -> None:
    table = Table()
    watch = TableWatch(table, V)
    watch.note_rows(trainable(1, 2), 0.0)
    watch.note_rows(trainable(1, 2, 3), 1.0)
    watch.note_rows(trainable(2, 3), 2.0)
    watch.note_rows(trainable(1, 2, 3), 3.0)
    assert watch.track.trainable == [(0.0, 2), (1.0, 3), (2.0, 2), (3.0, 3)]
    assert [(c.unfrozen_at, c.size) for c in watch.track.cohorts.values()] == [
        (0, 2),
        (1, 1),
        (3, 1),
    ]
    assert watch.cohort_of[[0, 1, 2, 3]].tolist() == [-1, 2, 0, 1]
    table.values[1] += 1  # of the first cohort no longer
    numbers = watch.measure(4.0)
    assert numbers["cohort_0/drift_p90"] == 0
    assert numbers["cohort_2/drift_p10"] > 0
    assert numbers["rows_awake"] == 3


def test_a_measurement_reads_a_sample_whatever_the_size_of_the_table() -> None:
    reads = []
    for num_rows in (2_000, 200_000):
        table = Table(num_rows)
        watch = TableWatch(table, num_rows, size=50)
        watch.note_rows(trainable(*range(num_rows // 2), num_rows=num_rows), 0.0)
        table.read = 0
        watch.before_step()
        watch.measure(1.0)
        reads.append(table.read)
    assert reads[0] == reads[1] < 2_000


def test_many_cohorts_are_awake_and_few_are_followed() -> None:
    watch = TableWatch(Table(), V)
    for number in range(40):
        watch.note_rows(trainable(*range(number + 1)), float(number))
    assert len(watch.track.cohorts) == 16
    assert watch.measure(40.0)["rows_awake"] == 40
    norms = watch.gradient_norms(np.arange(V), np.ones(V))
    assert norms == dict.fromkeys(range(16), 1.0)


def test_a_restored_watch_goes_on_as_one_that_never_stopped() -> None:
    vocabulary = Vocabulary(map(str, range(V)), counts=range(V))
    table = Table()
    whole = TableWatch(table, V, vocabulary=vocabulary)
    whole.note_rows(trainable(*range(20)), 0.0)
    table.values[:20] += 0.5
    whole.measure(1.0)
    resumed = TableWatch(table, V, vocabulary=vocabulary)
    resumed.restore(whole.to_state())
    for watch in (whole, resumed):
        watch.note_rows(trainable(*range(30)), 1.0)
    table.values[10:40] -= 0.25
    assert whole.measure(2.0) == resumed.measure(2.0)
    assert whole.finish() == resumed.finish()


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


def test_neighbours_are_those_of_a_full_comparison() -> None:
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


def test_neighbours_that_stay_count_in_any_order() -> None:
    before = np.array([[1, 2, 3, 4]])
    assert share_kept(before, before[:, ::-1]) == 1.0
    assert share_kept(before, np.array([[4, 9, 8, 7]])) == 0.25


def test_the_rows_that_moved_most_come_first_with_their_neighbours() -> None:
    vocabulary = Vocabulary([f"w{i}" for i in range(V)], counts=[5] * V)
    table = Table()
    watch = TableWatch(table, V, vocabulary=vocabulary)
    table.values[7] = 100 * table.values[3]
    table.values[9] += 1
    track = watch.finish()
    assert [row.token for row in track.moved] == ["w7", "w9"]
    assert track.moved[0].after[0] == "w3"
    assert track.moved[0].count == 5
    assert len(track.moved[0].before) == 10


@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_tiny_tables_are_watched(num_rows: int) -> None:
    watch = TableWatch(Table(num_rows), num_rows, padding=0)
    watch.note_rows(trainable(*range(1, num_rows), num_rows=num_rows), 0.0)
    watch.before_step()
    numbers = watch.measure(1.0)
    assert numbers["rows_awake"] == max(num_rows - 1, 0)
    assert watch.finish().moved == []


# The record

GROWN = {
    "stages": [
        {"epoch": 0, "rows": {"range": [0, 4]}},
        {"epoch": 4, "rows": "all", "grow": "linear", "lr_scale": 0.5},
    ]
}


def test_growth_is_planned_part_by_part() -> None:
    (first, last) = planned_stages(Schedule.parse({**GROWN, "stages": GROWN["stages"]}), 12)
    assert (first.trainable, last.trainable) == (4, 12)
    points = planned_points([first, last], "epoch", end=8.0, epoch_steps=None)
    assert points[0] == (0.0, 4)
    assert points[-1] == (4.0, 12)
    counts = [count for _, count in points]
    assert counts == sorted(counts)
    assert len(counts) > 3
    assert last.notes == "grow: {shape: linear}, lr_scale: 0.5"


@pytest.mark.parametrize(
    ("start", "place"),
    [({"epoch": 3}, 3.0), ({"step": 30}, 3.0), ({"share": 0.5}, 4.0), ({"plateau": "loss"}, None)],
)
def test_a_stage_is_planned_in_any_unit(start: dict[str, Any], place: float | None) -> None:
    first = "step" if "step" in start else "share" if "share" in start else "epoch"
    schedule = Schedule([{first: 0, "rows": [1]}, {**start, "rows": "all"}])
    points = planned_points(planned_stages(schedule, 9), "epoch", end=8.0, epoch_steps=10)
    assert points == [(0.0, 1)] + ([(place, 9)] if place is not None else [])


def test_padding_is_not_planned() -> None:
    (stage,) = planned_stages(Schedule([{"epoch": 0, "rows": "all"}]), 9, padding=0)
    assert stage.trainable == 8


def test_a_long_list_of_ids_is_cut_short() -> None:
    (stage,) = planned_stages(Schedule([{"epoch": 0, "rows": list(range(0, 900, 2))}]), 900)
    assert len(stage.rows) < 200
    assert stage.trainable == 450


def full_record() -> RowRecord:
    watch = TableWatch(Table(), V, vocabulary=Vocabulary(map(str, range(V)), counts=range(V)))
    watch.note_rows(trainable(1, 2), 0.0)
    watch.before_step()
    watch.measure(1.0, 0.5, {0: 2.0}, {0: 0.1})
    plan = planned_stages(Schedule.parse(GROWN), V)
    record = RowRecord({"words": watch.finish()}, {"words": plan}, length=3, epoch_steps=2.5)
    record.add_score(1.0, {"val_loss": 0.25, "broken": float("nan")})
    return record


def test_a_record_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    record = full_record()
    write_record(tmp_path / "rows.json", record)
    assert read_record(tmp_path) == record == read_record(tmp_path / "rows.json")
    assert record.scores[0].metrics == {"val_loss": 0.25}
    assert record.scores[0].trainable == 2


def test_a_record_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read"):
        read_record(tmp_path)
    (tmp_path / "rows.json").write_text('{"format": 2}')
    with pytest.raises(InputError, match=r"Received: 2"):
        read_record(tmp_path)


def test_scores_stay_few() -> None:
    record = RowRecord({"words": RowTrack(3, 1.0)})
    for place in range(5000):
        record.add_score(float(place), {"loss": 1.0})
    assert len(record.scores) <= 1000
