"""Pictures of a run, drawn from numbers alone."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from partial_embedding.monitor.track import CohortTrack, RowTrack

_INK, _FAINT, _FILL = "#22313f", "#8a97a3", "#4c78a8"
# The share of the width that the label of a stage needs; shorter stages go without one.
_ROOM = 0.2
_MOST_LABELS = 6


def row_picture(track: RowTrack) -> Figure:
    """Draw how many rows train and how far they went, over training.

    Args:
        track: What a `RowMonitor` saw.

    Returns:
        A figure of 1600 × 1000 pixels; save it with `savefig`.
    """
    figure = Figure(figsize=(8, 5), dpi=200, layout="constrained", facecolor="white")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    _draw_trainable(above, track)
    _draw_drift(below, track)
    for axes in (above, below):
        _dress(axes, track.end)
        for place, _ in track.trainable[1:]:
            axes.axvline(place, color=_FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    below.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    below.set_xlabel(f"{track.unit}s of training", color=_INK, fontsize=10)
    return figure


def trainable_picture(
    trainable: Sequence[tuple[float, int]], num_rows: int, end: float, unit: str
) -> Figure:
    """Draw how many rows will train, before any training.

    Args:
        trainable: Where in training, and how many rows train from there on.
        num_rows: The rows V of the table.
        end: Where training ends.
        unit: The unit of these places, `"epoch"` or `"step"`.

    Returns:
        A figure of 1600 × 600 pixels; save it with `savefig`.
    """
    figure = Figure(figsize=(8, 3), dpi=200, layout="constrained", facecolor="white")
    axes = figure.subplots()
    _draw_trainable(axes, RowTrack(num_rows, 1.0, unit, list(trainable), end=end))
    _dress(axes, end)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.set_xlabel(f"{unit}s of training", color=_INK, fontsize=10)
    return figure


def _dress(axes: Axes, end: float) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.set_xlim(0, max(end, 1e-9))


def _draw_trainable(axes: Axes, track: RowTrack) -> None:
    places = [place for place, _ in track.trainable] + [track.end]
    counts = [count for _, count in track.trainable] + [
        track.trainable[-1][1] if track.trainable else 0
    ]
    axes.fill_between(places, counts, step="post", color=_FILL, alpha=0.25, linewidth=0)
    axes.step(places, counts, where="post", color=_FILL, linewidth=2)
    for i, (place, count) in enumerate(track.trainable):
        last = i == len(track.trainable) - 1
        wide = places[i + 1] - place >= _ROOM * track.end
        if wide or last:
            axes.annotate(
                f"{count:,} rows ({100 * count / track.num_rows:.3g} %)",
                (place if wide else track.end, count),
                xytext=(5 if wide else -2, 4),
                textcoords="offset points",
                ha="left" if wide else "right",
                color=_INK,
                fontsize=9,
            )
    # Few rows of a large table get an axis of their own; the title says how many there are.
    most = max(counts)
    axes.set_ylim(0, 1.18 * track.num_rows if most > track.num_rows / 4 else 1.3 * most or 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_title(
        f"Trainable rows, of {track.num_rows:,} in the table", loc="left", color=_INK, fontsize=11
    )


def _draw_drift(axes: Axes, track: RowTrack) -> None:
    cohorts = list(track.cohorts.values())
    colors = colormaps["viridis"]
    for i, cohort in enumerate(cohorts):
        color = colors(0.85 * i / max(len(cohorts) - 1, 1))
        places, low, middle, high = zip(*cohort.drift, strict=True)
        axes.fill_between(places, low, high, color=color, alpha=0.18, linewidth=0)
        label = _label(cohort, track.unit) if _is_labelled(i, len(cohorts)) else None
        axes.plot(places, middle, color=color, linewidth=2, label=label)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(
        "How far rows moved since they were unfrozen, in lengths of a typical row\n",
        loc="left",
        color=_INK,
        fontsize=11,
    )
    axes.text(
        0, 1.02, "line: median; band: the middle 80 % of rows", transform=axes.transAxes,
        color=_FAINT, fontsize=9, va="bottom",
    )  # fmt: skip
    if cohorts:
        legend = axes.legend(fontsize=9, labelcolor=_INK, loc="upper left", framealpha=1)
        legend.get_frame().set_edgecolor("none")


def _is_labelled(i: int, of: int) -> bool:
    """Whether the legend names a cohort: all of a few, the ends of the scale of many."""
    return of <= _MOST_LABELS or i in (0, of - 1)


def _label(cohort: CohortTrack, unit: str) -> str:
    rows = "row" if cohort.size == 1 else "rows"
    return f"{cohort.size:,} {rows} trainable from {unit} {cohort.unfrozen_at:g}"
