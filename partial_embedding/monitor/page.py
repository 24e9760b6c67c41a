"""A run's record as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from html import escape

from matplotlib import rc_context
from matplotlib.figure import Figure

from partial_embedding.monitor.page_pictures import (
    DARK,
    LIGHT,
    Look,
    drift_picture,
    schedule_picture,
    score_picture,
)
from partial_embedding.monitor.page_style import STYLE
from partial_embedding.monitor.record import PlannedStage, RowRecord, Score, planned_points
from partial_embedding.monitor.track import Drift, MovedRow, RowTrack

Draw = Callable[[Look], Figure]

# A number of a metric gets better downwards if its name says so.
_LOWER_IS_BETTER = ("loss", "error", "perplexity", "mae", "mse")


def page(record: RowRecord, title: str, settings: str = "") -> tuple[str, dict[str, bytes]]:
    """Make the page of a run.

    Args:
        record: What was seen of the run.
        title: What the page is called, such as the folder of the run.
        settings: The run's configuration, to be shown as it is.

    Returns:
        The HTML, and the pictures as PNG files by name.

    Example:
        >>> record = RowRecord({"words": RowTrack(10, 1.0, trainable=[(0, 4)])})
        >>> html, pictures = page(record, "a run")
        >>> html.startswith("<!doctype html>"), sorted(pictures)
        (True, ['report-words-schedule.png'])
    """
    pictures: dict[str, bytes] = {}
    parts = [_head(record, title)]
    for name, track in record.tables.items():
        plan = record.plans.get(name, [])
        several = len(record.tables) > 1
        parts.append(f"<section>{_titled(f'Table {name}', 2)}" if several else "<section>")
        parts.append(_schedule(name, track, plan, record, pictures))
        if record.scores:
            parts.append(_scores(name, track, record, pictures))
        if any(cohort.drift for cohort in track.cohorts.values()):
            parts.append(_cohorts(name, track, pictures))
        if any(band.drift for band in track.bands.values()):
            parts.append(_bands(name, track, pictures))
        if track.moved:
            parts.append(_moved(track))
        parts.append("</section>")
    parts.append(_audit(record))
    parts.append(_notes(record, settings))
    body = "\n".join(parts)
    html = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        # Without it a browser asks the folder of the page for one.
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
    return html, pictures


# Sections


def _head(record: RowRecord, title: str) -> str:
    facts = []
    for name, track in record.tables.items():
        trainable = track.trainable[-1][1] if track.trainable else 0
        of_which = f"rows of {name}" if len(record.tables) > 1 else "rows"
        facts.append((f"{trainable:,}", f"{of_which} trainable at the end, of {track.num_rows:,}"))
    if record.tables:
        track = next(iter(record.tables.values()))
        facts.append((f"{track.end:g}", f"{track.unit}s of training"))
    if (metric := main_metric(record.scores)) is not None:
        best = _best(metric, record.scores)
        facts.append((f"{best.metrics[metric]:.4g}", f"best {metric}"))
    if record.audit:
        changed = sum(report.changed for report in record.audit)
        facts.append((f"{changed:,}", "frozen rows that changed a bit"))
    cards = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(number)}</dd></div>" for number, what in facts
    )
    return f"<header><h1>{escape(title)}</h1>\n<dl>{cards}</dl></header>"


def _schedule(
    name: str,
    track: RowTrack,
    plan: Sequence[PlannedStage],
    record: RowRecord,
    pictures: dict[str, bytes],
) -> str:
    end = _planned_end(track, record)
    points = planned_points(plan, track.unit, end, record.epoch_steps)
    happened = "; ".join(
        f"{count:,} from {track.unit} {place:g}" for place, count in track.trainable
    )
    picture = _picture(
        partial(schedule_picture, track, points, end),
        f"report-{name}-schedule.png",
        f"Trainable rows in {name} over training: {happened}."
        + (" A dashed line shows the plan." if points else ""),
        pictures,
    )
    text = _titled("The schedule, as planned and as it happened") + picture
    if plan:
        rows = [
            [str(i), s.start, s.rows, f"{s.trainable:,}", _percent(s.trainable, track.num_rows)]
            for i, s in enumerate(plan)
        ]
        columns = ["stage", "planned from", "rows", "trainable rows", "share of the table"]
        if any(stage.notes for stage in plan):
            columns.append("notes")
            rows = [[*row, stage.notes] for row, stage in zip(rows, plan, strict=True)]
        text += _table(
            columns,
            rows,
            "Planned stages",
            numbers={3, 4},
        )
    return text + _table(
        [f"from {track.unit}", "trainable rows", "share of the table"],
        [
            [f"{place:g}", f"{count:,}", _percent(count, track.num_rows)]
            for place, count in track.trainable
        ],
        "What happened",
        numbers={0, 1, 2},
    )


def _scores(name: str, track: RowTrack, record: RowRecord, pictures: dict[str, bytes]) -> str:
    metric = main_metric(record.scores)
    if metric is None:
        return ""
    num_rows = sum(one.num_rows for one in record.tables.values())
    scored = [score for score in record.scores if metric in score.metrics]
    picture = _picture(
        lambda look: score_picture(record.scores, metric, num_rows, track, look),
        f"report-{name}-score.png",
        f"{metric} over training, from {scored[0].metrics[metric]:.4g} to "
        f"{scored[-1].metrics[metric]:.4g}, over the share of trainable rows.",
        pictures,
    )
    rows = []
    for trainable in dict.fromkeys(score.trainable for score in scored):
        within = [score for score in scored if score.trainable == trainable]
        numbers = [score.metrics[metric] for score in within]
        best = _best(metric, within).metrics[metric]
        spread = [f"{value:.4g}" for value in (numbers[0], best, numbers[-1])]
        rows.append([f"{trainable:,}", _percent(trainable, num_rows), str(len(within)), *spread])
    columns = ["trainable rows", "share", "validations", "first", "best", "last"]
    return (
        _titled(f"{_readable(metric)} against trainable rows")
        + picture
        + _table(columns, rows, metric, numbers=set(range(6)))
    )


def _cohorts(name: str, track: RowTrack, pictures: dict[str, bytes]) -> str:
    lines = {
        f"{cohort.size:,} trainable from {track.unit} {cohort.unfrozen_at:g}": cohort.drift
        for cohort in track.cohorts.values()
    }
    picture = _drift(
        lines, track, f"report-{name}-cohorts.png", "Rows that were unfrozen together", pictures
    )
    rows: list[list[str]] = []
    for number, cohort in track.cohorts.items():
        last = {key: series[-1][1] for key, series in cohort.numbers.items() if series}
        rows.append(
            [
                str(number),
                f"{track.unit} {cohort.unfrozen_at:g}",
                f"{cohort.size:,}",
                *_quantiles(cohort.drift),
                *(
                    f"{last[key]:.3g}" if key in last else "-"
                    for key in ("update_ratio", "gradient_norm", "lr")
                ),
                f"{100 * last['neighbours_kept']:.0f} %" if "neighbours_kept" in last else "-",
            ]
        )
    columns = [
        "cohort", "unfrozen", "rows", "10 %", "median", "90 %", "update ratio", "gradient norm",
        "lr", "neighbours kept",
    ]  # fmt: skip
    return (
        _titled("How far rows moved since they were unfrozen")
        + "<p>Line: the median; band: the middle 80 % of rows. Distances are divided by the length "
        "of a typical row.</p>"
        + picture
        + _table(columns, rows, "The last measurement of each cohort", numbers={0, *range(2, 10)})
    )


def _bands(name: str, track: RowTrack, pictures: dict[str, bytes]) -> str:
    labels = {key: _band_label(band.low, band.high) for key, band in track.bands.items()}
    lines = {
        f"{labels[key]} ({band.size:,} {'row' if band.size == 1 else 'rows'})": band.drift
        for key, band in track.bands.items()
    }
    picture = _drift(
        lines, track, f"report-{name}-frequency.png", "Rows by how often they occur", pictures
    )
    rows = [
        [labels[key], f"{band.size:,}", *_quantiles(band.drift)]
        for key, band in track.bands.items()
    ]
    columns = ["in the training data", "rows", "10 %", "median", "90 %"]
    return (
        _titled("Drift by frequency")
        + "<p>How far rows are from where training began, trainable or not.</p>"
        + picture
        + _table(columns, rows, "At the end, in lengths of a typical row", numbers={1, 2, 3, 4})
    )


def _moved(track: RowTrack) -> str:
    rows = "".join(_moved_row(row) for row in track.moved)
    return (
        _titled("The tokens that moved most")
        + f"<p>Among {track.watched:,} rows that were watched. A neighbour that is new is "
        "<mark>marked</mark>; one that is gone is <s>struck out</s>.</p>"
        f'<ol class="moved">{rows}</ol>'
    )


def _moved_row(row: MovedRow) -> str:
    before = " ".join(
        f"<span>{escape(token)}</span>" if token in row.after else f"<s>{escape(token)}</s>"
        for token in row.before
    )
    after = " ".join(
        f"<span>{escape(token)}</span>" if token in row.before else f"<mark>{escape(token)}</mark>"
        for token in row.after
    )
    seen = "" if row.count is None else f", seen {row.count:,} times"
    kept = len(set(row.before) & set(row.after))
    return (
        f"<li><h3>{escape(row.token)}</h3><p>moved {row.distance:.2f} typical rows{seen}, "
        f"{kept} of {len(row.before)} neighbours kept</p>"
        f"<dl><dt>before</dt><dd>{before}</dd><dt>after</dt><dd>{after}</dd></dl></li>"
    )


def _audit(record: RowRecord) -> str:
    if not record.audit:
        return (
            "<section>" + _titled("The audit") + "<p>This run was not audited. "
            "<code>RowUnfreezing(…, audit=True)</code> compares the bits of frozen rows.</p>"
            "</section>"
        )
    changed = sum(report.changed for report in record.audit)
    verdict = (
        "No frozen row changed a bit." if not changed else f"{changed:,} frozen rows changed a bit."
    )
    rows = [
        [report.table, str(report.stage), f"{report.frozen:,}", f"{report.changed:,}"]
        for report in record.audit
    ]
    return (
        "<section>"
        + _titled("The audit")
        + f'<p class="{"good" if not changed else "bad"}">{verdict}</p>'
        + _table(
            ["table", "stage", "frozen rows", "changed a bit"],
            rows,
            "Frozen rows of each stage that ended",
            numbers={1, 2, 3},
        )
        + "</section>"
    )


def _notes(record: RowRecord, settings: str) -> str:
    shown = (
        f"<details><summary>Settings of the run</summary><pre>{escape(settings)}</pre></details>"
        if settings
        else ""
    )
    return (
        "<footer><p>Measured on a sample of rows. Update ratio: how far rows went in one step, "
        "divided by their length. Gradient norm: of the cohort's rows, before clipping. Neighbours "
        "kept: the share of the ten nearest neighbours by cosine, among the watched rows, that "
        f"rows had when they were unfrozen.</p>{shown}</footer>"
    )


# Numbers


def main_metric(scores: Sequence[Score]) -> str | None:
    """The number that tells most of what validations measured.

    Args:
        scores: What validations measured.

    Returns:
        The name of an accuracy of the validation side if there is one, else of whatever it
        measured, else of any number; None where there is none.

    Example:
        >>> main_metric([Score(1.0, 5, {"val_loss": 0.5, "train_accuracy": 0.9, "val_accuracy": 0.8})])
        'val_accuracy'
    """  # noqa: E501  # a line that is copied stays one line
    names = dict.fromkeys(name for score in scores for name in score.metrics)
    ranked = sorted(names, key=lambda name: ("val" not in name, "acc" not in name))
    return ranked[0] if ranked else None


def _best(metric: str, scores: Sequence[Score]) -> Score:
    scored = [score for score in scores if metric in score.metrics]
    lower = any(word in metric for word in _LOWER_IS_BETTER)
    return (min if lower else max)(scored, key=lambda score: score.metrics[metric])


def _planned_end(track: RowTrack, record: RowRecord) -> float:
    if track.unit == "epoch" and record.length is not None:
        return max(track.end, float(record.length))
    return track.end


def _quantiles(drift: Drift) -> list[str]:
    return [f"{share:.2f}" for share in drift[-1][1:]] if drift else ["-", "-", "-"]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole if whole else 0:.1f} %"


def _band_label(low: int, high: int | None) -> str:
    if high == low:
        return "never" if not low else f"{low:,} times"
    return f"{low:,} times or more" if high is None else f"{low:,} to {high:,} times"


def _readable(metric: str) -> str:
    text = metric.replace("_", " ").replace("val ", "validation ")
    return text[:1].upper() + text[1:]


# HTML


def _titled(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def _table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str, numbers: set[int]
) -> str:
    """A table that can be scrolled sideways where it is wider than the screen."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if i in numbers else ''}{' scope=col' if tag == 'th' else ''}>"
            f"{escape(value)}</{tag}>"
            for i, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="wide" tabindex="0"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{cells('th', columns)}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _drift(
    lines: Mapping[str, Drift],
    track: RowTrack,
    file: str,
    what: str,
    pictures: dict[str, bytes],
) -> str:
    ends = "; ".join(f"{label}: median {d[-1][2]:.2f}" for label, d in lines.items() if d)
    marks = [place for place, _ in track.trainable[1:]]
    return _picture(
        lambda look: drift_picture(lines, track.end, track.unit, look, marks),
        file,
        f"{what}, and how far they moved over training. At the end, in typical rows: {ends}.",
        pictures,
    )


def _picture(draw: Draw, file: str, alt: str, pictures: dict[str, bytes]) -> str:
    """A picture in light and dark, wide and narrow, of which the browser takes what fits."""
    file = re.sub(r"[^\w.-]", "_", file)  # layers may have any name
    pictures[file] = _saved(draw(LIGHT), "png", facecolor="white")
    narrow, dark = "(max-width: 600px)", "(prefers-color-scheme: dark)"
    sources = [
        (f"{narrow} and {dark}", replace(DARK, narrow=True)),
        (narrow, replace(LIGHT, narrow=True)),
        (dark, DARK),
    ]
    made = "".join(
        f'<source media="{media}" srcset="{_as_url(draw(look))}">' for media, look in sources
    )
    return (
        f'<figure><picture>{made}<img src="{_as_url(draw(LIGHT))}" alt="{escape(alt)}">'
        "</picture></figure>"
    )


def _as_url(figure: Figure) -> str:
    svg = _saved(figure, "svg")
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _saved(figure: Figure, kind: str, facecolor: str = "none") -> bytes:
    file = io.BytesIO()
    # Without a date and random names within a picture, the same run gives the same page.
    metadata = {"Date": None} if kind == "svg" else {}
    with rc_context({"svg.hashsalt": "rows"}):
        figure.savefig(file, format=kind, facecolor=facecolor, metadata=metadata)
    return file.getvalue()
