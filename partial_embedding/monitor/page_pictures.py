"""The pictures of a report, in light and dark, wide and narrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from partial_embedding.monitor.record import Score
from partial_embedding.monitor.track import Drift, RowTrack

_MOST_LABELS = 8


@dataclass(frozen=True)
class Look:
    """How a picture looks.

    Args:
        ink: The color of text.
        faint: The color of axes.
        accent: The color of what is drawn once.
        second: The color of what is drawn beside it.
        ramp: The part of the color map that is legible on the background.
        narrow: Whether the picture is for a phone.
    """

    ink: str
    faint: str
    accent: str
    second: str
    ramp: tuple[float, float]
    narrow: bool = False


LIGHT = Look("#22313f", "#8a97a3", "#2f6690", "#c8553d", (0.0, 0.82))
DARK = Look("#e3e9ee", "#7d8a96", "#7fb7e0", "#f2937c", (0.38, 1.0))


def schedule_picture(
    track: RowTrack, planned: Sequence[tuple[float, int]], end: float, look: Look
) -> Figure:
    """Draw the trainable rows over training, as planned and as it happened.

    Args:
        track: What happened.
        planned: Where in training, and how many rows should be trainable from there on.
        end: Where the plan ends.
        look: How it looks.
    """
    figure, axes = _figure(look, height=3.0)
    places = [place for place, _ in track.trainable] + [track.end]
    counts = [count for _, count in track.trainable] + [
        track.trainable[-1][1] if track.trainable else 0
    ]
    axes.fill_between(places, counts, step="post", color=look.accent, alpha=0.25, linewidth=0)
    axes.step(places, counts, where="post", color=look.accent, linewidth=2, label="as it happened")
    if planned:
        plan_places = [place for place, _ in planned] + [end]
        plan_counts = [count for _, count in planned] + [planned[-1][1]]
        axes.step(
            plan_places, plan_counts, where="post", color=look.second, linewidth=1.6,
            linestyle=(0, (4, 3)), label="as planned",
        )  # fmt: skip
    axes.set_ylim(0, 1.15 * max(1, *counts, *(count for _, count in planned)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    _dress(axes, max(track.end, end if planned else 0.0), track.unit, look)
    axes.set_ylabel("trainable rows", color=look.ink)
    _legend(axes, look, columns=2)
    return figure


def drift_picture(
    lines: Mapping[str, Drift], end: float, unit: str, look: Look, marks: Sequence[float] = ()
) -> Figure:
    """Draw how far groups of rows went.

    Args:
        lines: For each group its measurements.
        end: Where training ended.
        unit: The unit of places in training.
        look: How it looks.
        marks: Where rows were unfrozen.
    """
    figure, axes = _figure(look, height=3.6)
    low, high = look.ramp
    drawn = {label: points for label, points in lines.items() if points}
    for i, (label, points) in enumerate(drawn.items()):
        color = colormaps["viridis"](low + (high - low) * i / max(len(drawn) - 1, 1))
        places, below, middle, above = zip(*points, strict=True)
        axes.fill_between(places, below, above, color=color, alpha=0.14, linewidth=0)
        labelled = len(drawn) <= _MOST_LABELS or i in (0, len(drawn) - 1)
        axes.plot(places, middle, color=color, linewidth=2, label=label if labelled else None)
    for place in marks:
        axes.axvline(place, color=look.faint, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.set_ylim(bottom=0)
    _dress(axes, end, unit, look)
    axes.set_ylabel("distance, in typical rows", color=look.ink)
    if drawn:
        _legend(axes, look, columns=1 if look.narrow else 2)
    return figure


def score_picture(
    scores: Sequence[Score], metric: str, num_rows: int, track: RowTrack, look: Look
) -> Figure:
    """Draw what validations measured over the share of rows that trained.

    Args:
        scores: What validations measured.
        metric: The name of the number to draw.
        num_rows: The rows of all tables together.
        track: Where in training a table's rows were unfrozen.
        look: How it looks.
    """
    figure, axes = _figure(look, height=3.0)
    shares = axes.twinx()
    shares.set_facecolor("none")
    points = [score for score in scores if metric in score.metrics]
    places = [0.0, *(score.place for score in points)]
    trainable = [score.trainable / max(num_rows, 1) for score in points]
    shares.fill_between(
        places, [*trainable[:1], *trainable], step="pre", color=look.accent, alpha=0.18, linewidth=0
    )
    shares.set_ylim(0, 1.0)
    shares.yaxis.set_major_formatter(PercentFormatter(1.0))
    shares.yaxis.set_major_locator(MaxNLocator(4))
    shares.set_ylabel("trainable rows", color=look.accent)
    axes.plot(
        [score.place for score in points], [score.metrics[metric] for score in points],
        color=look.second, linewidth=2, marker="o", markersize=3.5, clip_on=False,
    )  # fmt: skip
    axes.set_zorder(shares.get_zorder() + 1)
    for one in (shares, axes):
        _dress(one, track.end, track.unit, look)
    shares.spines["left"].set_visible(False)
    axes.set_ylabel(metric.replace("$", r"\$"), color=look.second)  # no formula
    return figure


def _figure(look: Look, height: float) -> tuple[Figure, Axes]:
    # A narrow picture is drawn at the size of a phone, so that its text stays legible there.
    size = (3.9, height) if look.narrow else (8.0, height)
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.subplots()
    axes.set_facecolor("none")
    return figure, axes


def _dress(axes: Axes, end: float, unit: str, look: Look) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(look.faint)
    axes.tick_params(colors=look.ink, labelsize=9)
    axes.set_xlim(0, max(end, 1e-9))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6 if look.narrow else 12))
    axes.set_xlabel(f"{unit}s of training", color=look.ink, fontsize=9.5)


def _legend(axes: Axes, look: Look, columns: int) -> None:
    # Above the axes, where it hides nothing.
    axes.legend(
        fontsize=9, labelcolor=look.ink, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns,
        frameon=False, borderaxespad=0.2,
    )  # fmt: skip
