"""The page of any record, also of a poor one, and the pictures in it."""

import math
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree as ET

import pytest

pytest.importorskip("jinja2")

from partial_embedding import InputError
from partial_embedding.monitor.figures import Line, figure, standalone, trainable_figure
from partial_embedding.monitor.page import comparison, main_metric, page
from partial_embedding.monitor.record import RowRecord, Score
from partial_embedding.monitor.track import BandTrack, CohortTrack, MovedRow, RowTrack
from partial_embedding.schedule.messages import AuditResult
from partial_embedding.schedule.preview import Planned

HOSTILE = "<script>alert('&')</script>"
# An escape of terminals, a mark that turns the direction of text, and half a surrogate.
UNSEEN = "a\x1b[2J\u202eb\udc80\n"
SHOWN = r"a\x1b[2J\u202eb\udc80\n"
NAN = float("nan")


def track(**changes: Any) -> RowTrack:
    return RowTrack(10, 1.0, **{"trainable": [(0.0, 4)], "end": 3.0, **changes})


def planned(step: int, trainable: int, place: str = "a stage") -> Planned:
    return Planned(0, step, 0, place, trainable, trainable, 0, None, "")


COHORT = CohortTrack(0.0, 4, [(1.0, 0.1, 0.2, 0.3)])
RECORDS = {
    "nothing": RowRecord(),
    "no_row": RowRecord({"words": RowTrack(10, 1.0)}),
    "no_plan": RowRecord({"words": track()}),
    "epochs": RowRecord(
        {"words": track()}, scores=[Score(2.0, 4, {"val_loss": 0.5})], epoch_steps=5
    ),
    "two_tables": RowRecord({"a": track(), "b": track()}),
    "unfrozen_again": RowRecord({"words": track(trainable=[(0.0, 4), (1.0, 0), (2.0, 4)])}),
    "many_changes": RowRecord({"words": track(trainable=[(i / 9, i % 3) for i in range(2000)])}),
    "many_cohorts": RowRecord(
        {
            "words": track(
                cohorts={
                    i: CohortTrack(i / 9, 1, [(i / 9, 0, 0, 0), (3, 1, 2, 3)]) for i in range(16)
                }
            )
        }
    ),
    "waits": RowRecord({"words": track()}, plans={"words": [planned(0, 4)]}),
    "diverged": RowRecord(
        {
            "words": track(
                cohorts={0: CohortTrack(0.0, 4, [(0.0, 0, 0, 0), (1.0, NAN, NAN, NAN)])},
                bands={"seen_0": BandTrack(0, 0, 4, [(1.0, NAN, math.inf, math.inf)])},
            )
        },
        scores=[Score(1.0, 4, {})],
    ),
}


def svgs(html: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", html, re.DOTALL)


@pytest.mark.parametrize("name", RECORDS, ids=list(RECORDS))
def test_a_page_is_made_of_any_record(name: str) -> None:
    html = page(RECORDS[name], name)
    HTMLParser().feed(html)
    for svg in svgs(html):
        # A browser draws nothing of a path with a number that is none.
        assert not [d for d in re.findall(r'\b(?:d|x|y|cx|cy)="([^"]*)"', svg) if "n" in d]
        ET.fromstring(svg)


def test_what_a_run_is_called_and_holds_is_text_and_no_markup() -> None:
    record = RowRecord(
        {
            HOSTILE: track(
                cohorts={0: COHORT},
                bands={"seen_0": BandTrack(0, 0, 4, [(1.0, 0.1, 0.2, 0.3)])},
                moved=[MovedRow(HOSTILE, 1, 2.0, [HOSTILE], ["a"])],
            )
        },
        {HOSTILE: HOSTILE},
        {HOSTILE: [planned(0, 4, HOSTILE)]},
        [Score(1.0, 4, {HOSTILE: 1.0})],
        [AuditResult(HOSTILE, 0, 6, 0)],
    )
    for html in (
        page(record, HOSTILE, settings=HOSTILE),
        comparison({HOSTILE: record, "b": record}, HOSTILE),
    ):
        assert "<script" not in html
        assert html.count("&lt;script&gt;") > 5


def test_what_would_not_be_seen_is_shown_escaped() -> None:
    record = RowRecord(
        {UNSEEN: track(moved=[MovedRow(UNSEEN, 1, 2.0, [UNSEEN], [UNSEEN])])},
        scores=[Score(1.0, 4, {UNSEEN: 1.0})],
        audit=[AuditResult(UNSEEN, 0, 6, 0)],
    )
    for html in (page(record, UNSEEN, settings=UNSEEN), comparison({UNSEEN: record}, UNSEEN)):
        assert SHOWN in html
        assert not set("\x1b\u202e\udc80") & set(html)
        html.encode()


def test_rows_that_moved_in_spite_of_the_audit_are_named() -> None:
    html = page(RowRecord({"w": track()}, audit=[AuditResult("w", 0, 6, 2)]), "a run")
    assert "2 frozen rows changed a bit." in html
    assert "No frozen row" not in html


def test_a_frozen_run_has_no_empty_pictures() -> None:
    frozen = RowRecord(
        {
            "words": track(
                trainable=[(0.0, 0)],
                bands={"seen_0": BandTrack(0, 0, 4, [(1.0, 0, 0, 0), (3.0, 0, 0, 0)])},
            )
        },
        plans={"words": [planned(0, 0)]},
    )
    html = page(frozen, "frozen")
    assert svgs(html) == []
    assert "No row of this table was to train, and none did." in html


def test_tokens_that_moved_come_before_what_explains_them() -> None:
    moved = [MovedRow("zyzzyva", 1, 2.0, ["old"], ["new"])]
    record = RowRecord(
        {"words": track(moved=moved, cohorts={0: COHORT})}, scores=[Score(1.0, 4, {"loss": 1.0})]
    )
    html = page(record, "a run")
    assert html.index("zyzzyva") < html.index("Loss against") < html.index("How far rows moved")
    assert "<s>old</s>" in html
    assert "<mark>new</mark>" in html


def heights(svg: str, which: str) -> list[float]:
    """The heights at which a stepped line runs, as shares of the picture's frame."""
    path = re.search(rf'class="{which}" d="([^"]*)"', svg)
    assert path is not None
    return [round((246 - float(y)) / 212, 3) for y in re.findall(r"[MV](?:\S+ )?([\d.]+)", path[1])]


def test_growth_is_drawn_as_it_was_planned() -> None:
    plan = [planned(step, trainable) for step, trainable in ((0, 2), (5, 4), (10, 6), (20, 10))]
    (svg,) = svgs(page(RowRecord({"words": track()}, plans={"words": plan}, epoch_steps=5), "a"))
    assert heights(svg, "curve dashed") == [0.2, 0.4, 0.6, 1.0, 1.0]
    assert heights(svg, "curve") == [0.4, 0.4]


def labels(svg: str) -> list[str]:
    """The numbers at the left, from below."""
    return re.findall(r'dy=".35em" text-anchor="end">([^<]*)<', svg)


@pytest.mark.parametrize(
    ("num_rows", "trainable", "expected"),
    [
        (3774, 3773, ["0", "1,000", "2,000", "3,000", "3,774"]),
        (3774, 1000, ["0", "1,000", "2,000", "3,000", "3,774"]),
        (400_000, 2182, ["0", "500", "1,000", "1,500", "2,000", "2,500"]),
        (1_234_567, 1_200_000, ["0", "500k", "1M", "1.235M"]),
        (1, 1, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
    ],
)
def test_an_axis_ends_at_the_tables_size_unless_few_rows_train(
    num_rows: int, trainable: int, expected: list[str]
) -> None:
    line = Line("rows", [(0, trainable), (3, trainable)], stepped=True)
    assert labels(trainable_figure([line], num_rows, 3.0, "epoch", "rows")) == expected


@pytest.mark.parametrize("points", [[], [(0, 5)], [(0, 5), (1, 5)], [(0, 0), (2, 1e9)], [(0, -3)]])
@pytest.mark.parametrize("bottom", [0.0, None])
@pytest.mark.parametrize("end", [0.0, 0.5, 1e6])
def test_a_picture_is_drawn_of_any_numbers(points: Any, bottom: float | None, end: float) -> None:
    line = Line("a", points, [(x, y, y) for x, y in points], dotted=True)
    svg = figure([line], title="n", alt="n", unit="step", end=end, bottom=bottom)
    ET.fromstring(standalone(svg))


def test_long_lines_are_drawn_with_few_points() -> None:
    line = Line("a", [(i, i % 7) for i in range(100_000)])
    assert len(figure([line], title="n", alt="n", unit="step", end=1e5)) < 20_000


# Several runs

RUNS = {
    "frozen": RowRecord(
        {"words": track(trainable=[(0.0, 0)])}, scores=[Score(1.0, 0, {"acc": 0.5})]
    ),
    "all": RowRecord(
        {"words": track(trainable=[(0.0, 10)])},
        scores=[Score(1.0, 10, {"acc": 0.75}), Score(3.0, 10, {"acc": 0.625})],
        audit=[AuditResult("words", 0, 0, 0)],
    ),
    "unmeasured": RowRecord({"words": track()}),
}


def test_several_runs_share_one_table_and_one_picture() -> None:
    html = comparison(RUNS, "three runs")
    (svg,) = svgs(html)
    assert svg.count('class="curve"') == 2
    assert html.count("<table>") == 1
    cells = [re.findall(r"<td[^>]*>([^<]*)", row) for row in re.findall(r"<tr>(.*)</tr>", html)]
    assert cells[1:] == [
        ["frozen", "0.5", "1", "0.5", "0.0 %", "3", "-"],
        ["all", "0.75", "1", "0.625", "100.0 %", "3", "0"],
        ["unmeasured", "-", "-", "-", "40.0 %", "3", "-"],
    ]


def test_runs_in_different_units_are_not_compared() -> None:
    epochs = RowRecord({"words": track()}, epoch_steps=5)
    with pytest.raises(InputError, match="all counts steps, other counts epochs"):
        comparison({"all": RUNS["all"], "other": epochs}, "two runs")


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
