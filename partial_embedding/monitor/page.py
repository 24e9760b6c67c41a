"""A run's record as one HTML page that needs nothing but itself, or several runs side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from partial_embedding.errors import InputError
from partial_embedding.monitor.figures import STYLE, Line, figure, lasting, ramp, trainable_figure
from partial_embedding.monitor.record import RowRecord, Score
from partial_embedding.monitor.track import Drift, MovedRow, RowTrack
from partial_embedding.rows.token_text import printable
from partial_embedding.schedule.messages import percent
from partial_embedding.schedule.preview import Planned

# A number of a metric gets better downwards if its name says so.
_LOWER_IS_BETTER = ("loss", "error", "perplexity", "mae", "mse")
_NONE = "-"
_QUANTILES = ("median", "10 to 90 %")


@dataclass(frozen=True)
class Table:
    """What a caption says, in columns, as it is shown."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    @cached_property
    def numeric(self) -> set[int]:
        """The columns of numbers, which stand at their right."""
        is_number = re.compile(r"[\d.,e%+ -]*( to [\d.]+)?").fullmatch
        return {i for i in range(len(self.columns)) if all(is_number(row[i]) for row in self.rows)}


@dataclass(frozen=True)
class Section:
    """What a page says of one thing; each part but the title may be left out."""

    title: str
    text: str = ""
    figure: str = ""
    tables: Sequence[Table] = ()
    moved: Sequence[MovedRow] = ()
    config: str = ""
    level: int = 2


def page(record: RowRecord, title: str, settings: str = "") -> str:
    """Make the page of a run, as HTML; its settings are shown as they are."""
    facts, sections = [], []
    for name, track in record.tables.items():
        several = len(record.tables) > 1
        what = f"rows of {name}" if several else "rows"
        facts.append((f"{track.count:,}", f"{what} trainable at the end, of {track.num_rows:,}"))
        sections += [Section(f"Table {name}", level=1)] if several else []
        sections += _of_table(name, track, record)
    if record.tables:
        facts.append((f"{record.end:g}", f"{record.unit}s of training"))
    if (metric := main_metric(record.scores)) is not None:
        facts.append((f"{_best(metric, record.scores).metrics[metric]:.4g}", f"best {metric}"))
    if record.audit:
        facts.append((f"{_changed(record):,}", "frozen rows that changed a bit"))
    return _html(title, facts, [*sections, _audit(record)], settings)


def comparison(records: Mapping[str, RowRecord], title: str) -> str:
    """Make one page of several runs by name, as HTML: what each reached, and with which rows."""
    units = {run.unit: name for name, run in records.items() if run.tables}
    if len(units) > 1:
        shown = ", ".join(f"{name} counts {unit}s" for unit, name in units.items())
        raise InputError(
            f"runs are compared over one unit of training. Received: {shown}. Compare those whose "
            "data has a length, or those whose data has none, among themselves."
        )
    unit = next(iter(units), "epoch")
    metric = main_metric([score for run in records.values() for score in run.scores]) or ""
    rows, lines = [], []
    for i, (name, run) in enumerate(records.items()):
        measured = [_NONE] * 3
        if scored := [score for score in run.scores if metric in score.metrics]:
            points = [(score.place, score.metrics[metric]) for score in scored]
            lines.append(Line(name, points, color=ramp(i, len(records)), dotted=True))
            best = _best(metric, scored)
            measured = [f"{best.metrics[metric]:.4g}", f"{best.place:g}", f"{points[-1][1]:.4g}"]
        trained, changed = percent(run.trainable, run.num_rows), f"{_changed(run):,}"
        rows.append([name, *measured, trained, f"{run.end:g}", changed if run.audit else _NONE])
    columns = ["run", "best", f"at {unit}", "last", "rows at the end", f"{unit}s", "frozen changed"]
    ends = "; ".join(f"{line.label}: {line.points[-1][1]:.4g}" for line in lines)
    drawn = lines and figure(
        lines, title=metric, alt=f"{metric} over training. At the end: {ends}.", unit=unit,
        end=max(run.end for run in records.values()), bottom=None,
    )  # fmt: skip
    about = f"{_readable(metric)} of {len(rows)} runs" if metric else f"{len(rows)} runs"
    table = Table(f"Best and last: {metric}" if metric else "No run was validated", columns, rows)
    return _html(title, [], [Section(about, figure=drawn or "", tables=[table])])


# Sections


def _of_table(name: str, track: RowTrack, record: RowRecord) -> list[Section]:
    sections = [_schedule(name, track, record)]
    if track.moved:
        text = (
            f"Among {track.sampled:,} rows that were sampled. A neighbour that is new is marked; "
            "one that is gone is struck out."
        )
        sections.append(Section("The tokens that moved most", text, moved=track.moved))
    if (metric := main_metric(record.scores)) is not None:
        sections.append(_scores(metric, record))
    if any(cohort.drift for cohort in track.cohorts.values()):
        sections.append(_cohorts(track, record.unit))
    # Bands of a table that stood still would be drawn as one line at 0.
    if any(high for band in track.bands.values() for *_, high in band.drift):
        sections.append(_bands(track, record.unit))
    return sections


def _schedule(name: str, track: RowTrack, record: RowRecord) -> Section:
    title, unit = "The schedule, as planned and as it happened", record.unit
    planned, config = record.plans.get(name, []), record.schedules.get(name, "")
    plan = [(step.step / (record.epoch_steps or 1), step.trainable) for step in planned]
    if not any(count for _, count in [*track.trainable, *plan]):
        return Section(title, "No row of this table was to train, and none did.", config=config)
    end = max(track.end, float(record.length or 0) if unit == "epoch" else 0.0)
    lines, tables = [Line("as it happened", lasting(track.trainable, track.end), stepped=True)], []
    if plan:
        points = lasting(plan, end)
        lines.append(Line("as planned", points, (), "var(--second)", stepped=True, dashed=True))
        rows = [_planned_row(step, track.num_rows) for step in planned]
        columns = ["planned", "rows", "share", "join", "leave", "of the tokens", "rate"]
        used = [i for i in range(7) if i < 3 or any(row[i] != _NONE for row in rows)]
        shown = [[row[i] for i in used] for row in rows]
        tables.append(Table("As planned", [columns[i] for i in used], shown))
    rows = [[f"{p:g}", f"{n:,}", percent(n, track.num_rows)] for p, n in track.trainable]
    tables.append(Table("As it happened", [f"from {unit}", "rows", "share"], rows))
    said = "; ".join(f"{count:,} from {unit} {place:g}" for place, count in track.trainable[:20])
    alt = f"Trainable rows in {name} over training: {said}."
    drawn = trainable_figure(lines, track.num_rows, end, unit, alt)
    return Section(title, figure=drawn, tables=tables, config=config)


def _planned_row(step: Planned, num_rows: int) -> list[str]:
    return [
        step.place,
        f"{step.trainable:,}",
        percent(step.trainable, num_rows),
        f"{step.joining:,}" if step.joining else _NONE,
        f"{step.leaving:,}" if step.leaving else _NONE,
        _NONE if step.covered is None else f"{100 * step.covered:.1f} %",
        step.rate or _NONE,
    ]


def _scores(metric: str, record: RowRecord) -> Section:
    scored = [score for score in record.scores if metric in score.metrics]
    points = [(score.place, score.metrics[metric]) for score in scored]
    # The rows that trained before a validation are what it measured.
    starts = [0.0, *(score.place for score in scored)]
    shares = [score.trainable / max(record.num_rows, 1) for score in scored]
    drawn = figure(
        [Line(metric, points, color="var(--second)", dotted=True)],
        title=metric,
        alt=f"{metric} over training, from {points[0][1]:.4g} to {points[-1][1]:.4g}, over the "
        "share of trainable rows.",
        unit=record.unit,
        end=record.end,
        bottom=None,
        shade=lasting(list(zip(starts, shares, strict=False)), starts[-1]),
    )
    rows = []
    for trainable in dict.fromkeys(score.trainable for score in scored):
        within = [score for score in scored if score.trainable == trainable]
        spread = (within[0], _best(metric, within), within[-1])
        numbers = [f"{score.metrics[metric]:.4g}" for score in spread]
        share = percent(trainable, record.num_rows)
        rows.append([f"{trainable:,}", share, str(len(within)), *numbers])
    columns = ["trainable rows", "share", "validations", "first", "best", "last"]
    return Section(
        f"{_readable(metric)} against trainable rows",
        "Shaded: the share of all rows that trained, up to the full height.",
        drawn,
        [Table(metric, columns, rows)],
    )


def _cohorts(track: RowTrack, unit: str) -> Section:
    drifts, rows = {}, []
    for number, cohort in track.cohorts.items():
        since = f"{unit} {cohort.unfrozen_at:g}"
        drifts[f"{cohort.size:,} trainable from {since}"] = cohort.drift
        last = {key: series[-1][1] for key, series in cohort.numbers.items() if series}
        keys = ("update_ratio", "gradient_norm", "lr")
        numbers = [f"{last[key]:.3g}" if key in last else _NONE for key in keys]
        kept = f"{100 * last['neighbours_kept']:.0f} %" if "neighbours_kept" in last else _NONE
        size = f"{cohort.size:,}"
        rows.append([str(number), since, size, *_quantiles(cohort.drift), *numbers, kept])
    columns = ["cohort", "from", "rows", *_QUANTILES, "update", "gradient", "lr", "kept"]
    return Section(
        "How far rows moved since they were unfrozen",
        "Line: the median; band: the middle 80 % of rows, in lengths of a typical row.",
        _drift(drifts, track, unit, "Rows that were unfrozen together"),
        [Table("The last measurement of each cohort", columns, rows)],
    )


def _bands(track: RowTrack, unit: str) -> Section:
    drifts, rows = {}, []
    for band in track.bands.values():
        label = f"{band.low:,} times or more" if band.high is None else "never"
        if band.high:
            label = f"{band.low:,} to {band.high:,} times"
        drifts[f"{label} ({band.size:,} {'row' if band.size == 1 else 'rows'})"] = band.drift
        rows.append([label, f"{band.size:,}", *_quantiles(band.drift)])
    return Section(
        "Drift by frequency",
        "How far rows are from where training began, trainable or not.",
        _drift(drifts, track, unit, "Rows by how often they occur"),
        [Table("In the training data", ["occur", "rows", *_QUANTILES], rows)],
    )


def _drift(drifts: Mapping[str, Drift], track: RowTrack, unit: str, what: str) -> str:
    lines = []
    for i, (label, drift) in enumerate(drifts.items()):
        middle = [(place, middle) for place, _, middle, _ in drift]
        band = [(place, low, high) for place, low, _, high in drift]
        lines += [Line(label, middle, band, ramp(i, len(drifts)))] if drift else []
    ends = "; ".join(f"{line.label}: median {line.points[-1][1]:.2f}" for line in lines)
    return figure(
        lines,
        title="distance, in typical rows",
        alt=f"{what}, and how far they moved over training. At the end, in typical rows: {ends}.",
        unit=unit,
        end=track.end,
        marks=[place for place, _ in track.trainable[1:]],
    )


def _audit(record: RowRecord) -> Section:
    if not record.audit:
        # A run that was interrupted may be audited, and have none to show.
        text = "RowUnfreezing(…, audit=True) compares frozen rows' bits at the end of each stage."
        return Section("The audit", f"No stage was audited to its end. {text}")
    changed = _changed(record)
    verdict = (
        f"{changed:,} frozen rows changed a bit." if changed else "No frozen row changed a bit."
    )
    columns = ["table", "stage", "frozen rows", "changed a bit"]
    rows = [[a.table, str(a.stage), f"{a.frozen:,}", f"{a.changed:,}"] for a in record.audit]
    return Section("The audit", verdict, "", [Table("Each stage that ended", columns, rows)])


# Numbers


def main_metric(scores: Sequence[Score]) -> str | None:
    """The number that tells most: an accuracy of the validation side, if it was measured.

    Else it is any other number of that side, else any number at all.

    Example:
        >>> main_metric([Score(1.0, 5, {"val_loss": 0.5, "train_accuracy": 0.9, "val_accuracy": 0.8})])
        'val_accuracy'
    """  # noqa: E501  # a line that is copied stays one line
    names = dict.fromkeys(name for score in scores for name in score.metrics)
    return min(names, key=lambda name: ("val" not in name, "acc" not in name), default=None)


def _best(metric: str, scores: Sequence[Score]) -> Score:
    scored = [score for score in scores if metric in score.metrics]
    lower = any(word in metric for word in _LOWER_IS_BETTER)
    return (min if lower else max)(scored, key=lambda score: score.metrics[metric])


def _changed(record: RowRecord) -> int:
    return sum(result.changed for result in record.audit)


def _quantiles(drift: Drift) -> list[str]:
    if not drift:
        return [_NONE, _NONE]
    _, low, middle, high = drift[-1]
    return [f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]


def _readable(metric: str) -> str:
    text = metric.replace("_", " ").replace("val ", "validation ")
    return text[:1].upper() + text[1:]


# HTML


def _html(
    title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section], settings: str = ""
) -> str:
    # What a run is called and what its tokens are is text: markup in it is escaped, and so is what
    # would not be seen, or would move what is around it.
    environment = Environment(
        loader=PackageLoader("partial_embedding.monitor", ""),
        autoescape=True,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = [replace(section, figure=Markup(section.figure)) for section in sections]
    return environment.get_template("page.html.j2").render(
        title=title, facts=facts, sections=drawn, settings=settings, style=Markup(STYLE)
    )


def _printable(value: Any) -> Any:
    return printable(value) if type(value) is str else value
