"""The page of any record, also of a poor one."""

from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")

from partial_embedding.monitor.page import main_metric, page
from partial_embedding.monitor.record import PlannedStage, RowRecord, Score
from partial_embedding.monitor.track import BandTrack, CohortTrack, MovedRow, RowTrack
from partial_embedding.schedule.messages import StageReport

HOSTILE = "<script>alert('&')</script>"


def track(**changes: object) -> RowTrack:
    given = {"trainable": [(0.0, 4)], "end": 3.0, **changes}
    return RowTrack(10, 1.0, **given)  # type: ignore[arg-type]


RECORDS = {
    "nothing": RowRecord(),
    "no_row": RowRecord({"words": RowTrack(10, 1.0)}),
    "no_plan": RowRecord({"words": track()}),
    "steps": RowRecord({"words": track(unit="step")}, scores=[Score(2.0, 4, {"val_loss": 0.5})]),
    "two_tables": RowRecord({"a": track(), "b": track()}),
    "unfrozen_again": RowRecord({"words": track(trainable=[(0.0, 4), (1.0, 0), (2.0, 4)])}),
    "many_cohorts": RowRecord(
        {
            "words": track(
                cohorts={
                    i: CohortTrack(i / 9, 1, [(i / 9, 0, 0, 0), (3, 1, 2, 3)]) for i in range(16)
                }
            )
        }
    ),
    "waits": RowRecord(
        {"words": track()},
        {"words": [PlannedStage("a plateau of loss", None, None, "all", 10)]},
    ),
}


@pytest.mark.parametrize("name", RECORDS, ids=list(RECORDS))
def test_a_page_is_made_of_any_record(name: str) -> None:
    html, pictures = page(RECORDS[name], name)
    assert html.count("<figure>") == len(pictures)
    HTMLParser().feed(html)


def test_what_a_run_is_called_and_holds_is_text_and_no_markup() -> None:
    record = RowRecord(
        {
            HOSTILE: track(
                cohorts={0: CohortTrack(0.0, 4, [(1.0, 0.1, 0.2, 0.3)])},
                bands={"seen_0": BandTrack(0, 0, 4, [(1.0, 0.1, 0.2, 0.3)])},
                moved=[MovedRow(HOSTILE, 1, 2.0, [HOSTILE], ["a"])],
            )
        },
        {HOSTILE: [PlannedStage(HOSTILE, "epoch", 0, HOSTILE, 4, notes=HOSTILE)]},
        [Score(1.0, 4, {HOSTILE: 1.0})],
        [StageReport(HOSTILE, 0, 6, 0)],
    )
    html, pictures = page(record, HOSTILE, settings=HOSTILE)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 8
    assert all("/" not in name for name in pictures)


def test_rows_that_moved_in_spite_of_the_audit_are_named() -> None:
    html, _ = page(RowRecord({"w": track()}, audit=[StageReport("w", 0, 6, 2)]), "a run")
    assert '<p class="bad">2 frozen rows changed a bit.</p>' in html


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["train_loss", "val_loss", "val_accuracy"], "val_accuracy"),
        (["train_accuracy", "val_loss"], "val_loss"),
        (["loss"], "loss"),
        ([], None),
    ],
)
def test_the_metric_that_tells_most_is_shown(names: list[str], chosen: str | None) -> None:
    assert main_metric([Score(1.0, 1, dict.fromkeys(names, 0.5))]) == chosen
