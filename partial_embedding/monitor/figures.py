"""Pictures of numbers over training, as SVG that browsers draw in light and dark.

A picture is plain text, so that a page needs nothing beside it, and so that what made a run need
not be able to draw. Colors are variables of the style sheet; text grows on narrow screens, where
the whole picture shrinks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from partial_embedding.rows.token_text import printable

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 640, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 16, 34, 34
# No more than can be told apart, and a few points for each pixel.
_MOST_NAMED, _MOST_POINTS = 8, 400

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #22313f; --soft: #566472; --page: #fdfdfb; --line: #d8dedd;
  --accent: #2f6690; --second: #c8553d; --tone: 36%;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e3e9ee; --soft: #a3b0bb; --page: #14191e; --line: #36424c;
    --accent: #7fb7e0; --second: #f2937c; --tone: 68%;
  }
}
svg.chart { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
.chart text { fill: var(--soft); }
.chart .grid { stroke: var(--line); }
.chart .mark { stroke: var(--soft); stroke-dasharray: 3 4; }
.chart .curve { fill: none; stroke: var(--own); stroke-width: 2; stroke-linejoin: round; }
.chart .dashed { stroke-dasharray: 6 4; }
.chart .band { fill: var(--own); opacity: .15; }
.chart .shade { fill: var(--accent); opacity: .2; }
.chart circle { fill: var(--own); }
@media (max-width: 600px) { svg.chart { font-size: 21px; } }
"""


@dataclass(frozen=True)
class Line:
    """What is drawn of one thing over training: its numbers, and between which most of it lies."""

    label: str
    points: Points
    band: Sequence[tuple[float, float, float]] = ()
    color: str = "var(--accent)"
    stepped: bool = False  # a number holds until the next one
    dashed: bool = False
    dotted: bool = False  # its points are marked

    def finite(self) -> Line:
        """The line without what a run that diverged has measured."""
        points = [point for point in self.points if all(map(math.isfinite, point))]
        band = [point for point in self.band if all(map(math.isfinite, point))]
        return replace(self, points=points, band=band)


def ramp(i: int, of: int) -> str:
    """The color of one of several things that have an order.

    Example:
        >>> ramp(0, of=3), ramp(2, of=3)
        ('hsl(265 55% var(--tone))', 'hsl(65 55% var(--tone))')
    """
    return f"hsl({265 - 200 * i / max(of - 1, 1):.0f} 55% var(--tone))"


def figure(
    lines: Sequence[Line],
    *,
    title: str,
    alt: str,
    unit: str,
    end: float,
    bottom: float | None = 0.0,
    top: float | None = None,
    shade: Points = (),
    marks: Sequence[float] = (),
) -> str:
    """Draw lines over training, as an HTML figure that holds an SVG, with a legend for several.

    Its numbers go from the bottom, or about the least of the lines, to the top, or about the
    greatest. A shade is of a share of the height, from a place in training on; `alt` is for those
    who cannot see the picture.

    Example:
        >>> html = figure([Line("a", [(0, 1), (2, 3)])], title="n", alt="a", unit="epoch", end=2)
        >>> html.startswith("<figure><svg"), "epochs of training" in html
        (True, True)
    """
    lines = [line.finite() for line in lines]
    numbers = [y for line in lines for _, *ys in (*line.points, *line.band) for y in ys]
    least, most = min(numbers, default=0.0), max(numbers, default=0.0)
    room = 0.06 * (most - least) or 0.5 * abs(most) or 0.5
    frame = _Frame(
        end or 1.0,
        least - room if bottom is None else min(bottom, least),
        most + room if top is None else top,
    )
    ticks = _ticks(frame.bottom, frame.top, 5)
    if top is not None:  # it means something, such as the size of a table
        ticks = [*(tick for tick in ticks if tick < 0.9 * top), top]
    parts = [
        f'<figure><svg class="chart" xmlns="http://www.w3.org/2000/svg" role="img" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}"><title>{_text(alt)}</title>',
        f'<text x="0" y="16">{_text(title)}</text>',
    ]
    for tick in ticks:
        y = frame.y(tick)
        parts.append(
            f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>'
            f'<text x="{_LEFT - 8}" y="{y}" dy=".35em" text-anchor="end">{_short(tick)}</text>'
        )
    for tick in _ticks(0.0, frame.end, 8, whole=end >= 2):
        parts.append(
            f'<text x="{frame.x(tick)}" y="{_HEIGHT - _BOTTOM}" dy="1.2em" '
            f'text-anchor="middle">{_short(tick)}</text>'
        )
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="16" text-anchor="end">{unit}s of training</text>')
    if shade:
        height = frame.top - frame.bottom
        shares = [(x, frame.bottom + share * height) for x, share in _fewer(shade)]
        path, floor = frame.path(shares, stepped=True), frame.y(frame.bottom)
        parts.append(f'<path class="shade" d="{path}V{floor}H{frame.x(shares[0][0])}Z"/>')
    for place in marks:
        x = frame.x(place)
        parts.append(f'<path class="mark" d="M{x} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
    for line in lines:
        parts.append(f'<g style="--own:{line.color}">{_drawn(line, frame)}</g>')
    return "".join(parts) + f"</svg>{_legend(lines)}</figure>"


def trainable_figure(lines: Sequence[Line], num_rows: int, end: float, unit: str, alt: str) -> str:
    """Draw how many of a table's rows train; what is below the first line is shaded.

    The picture ends at the rows V of the table, unless few of them train.
    """
    most = max((count for line in lines for _, count in line.points), default=0) or 1
    top = float(num_rows)
    if most <= num_rows / 4:
        step = _step(most, 5)
        top = step * math.ceil(most / step)
    shade = [(place, count / top) for place, count in lines[0].points]
    title = f"trainable rows, of {num_rows:,}"
    return figure(lines, title=title, alt=alt, unit=unit, end=end, top=top, shade=shade)


def lasting(points: Sequence[tuple[float, float]], end: float) -> Points:
    """Numbers that hold until the next one, up to the end."""
    return [*points, (end, points[-1][1])] if points else []


def standalone(html: str) -> str:
    """The picture of a figure as a file of its own."""
    head, _, rest = html[html.index("<svg") : html.index("</svg>")].partition("<title>")
    return f"{head}<style>{STYLE}svg {{ background: var(--page); }}</style><title>{rest}</svg>\n"


def _legend(lines: Sequence[Line]) -> str:
    if len(lines) < 2:
        return ""
    # All of a few, the ends of the scale of many.
    named = lines if len(lines) <= _MOST_NAMED else [lines[0], lines[-1]]
    entries = (
        f'<span style="--own:{line.color}"><i{" class=dashed" * line.dashed}></i>'
        f"{_text(line.label)}</span>"
        for line in named
    )
    return f"<figcaption>{''.join(entries)}</figcaption>"


@dataclass(frozen=True)
class _Frame:
    """Where numbers lie in a picture."""

    end: float
    bottom: float
    top: float

    def x(self, place: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * min(place / self.end, 1.0), 1)

    def y(self, number: float) -> float:
        share = (number - self.bottom) / (self.top - self.bottom)
        return round(_HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share, 1)

    def path(self, points: Points, stepped: bool = False) -> str:
        places = [(self.x(x), self.y(y)) for x, y in points]
        joint = "H{}V{}" if stepped else "L{} {}"
        return "M{} {}".format(*places[0]) + "".join(joint.format(*xy) for xy in places[1:])


def _drawn(line: Line, frame: _Frame) -> str:
    text = ""
    if band := _fewer(line.band):
        around = [(x, low) for x, low, _ in band] + [(x, high) for x, _, high in reversed(band)]
        text += f'<path class="band" d="{frame.path(around)}Z"/>'
    if points := _fewer(line.points):
        look = "curve dashed" if line.dashed else "curve"
        text += f'<path class="{look}" d="{frame.path(points, line.stepped)}"/>'
    if line.dotted:
        text += "".join(f'<circle cx="{frame.x(x)}" cy="{frame.y(y)}" r="3"/>' for x, y in points)
    return text


def _fewer(points: Sequence[Any]) -> Sequence[Any]:
    every = len(points) // _MOST_POINTS + 1
    return [*points[:-1:every], *points[-1:]]


def _ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Round numbers in a range, about as many as wanted."""
    step = max(_step(high - low, most), 1.0 if whole else 0.0)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _step(length: float, most: int) -> float:
    """A round number that goes about as often into a length as wanted."""
    step = 10.0 ** math.floor(math.log10(length / most))
    return step * next(factor for factor in (1, 2, 5, 10) if step * factor * most >= length * 0.99)


def _text(text: str) -> str:
    return escape(printable(text))


def _short(number: float) -> str:
    if number >= 1e6:
        return f"{number / 1e6:.4g}M"
    if number >= 1e4:
        return f"{number / 1e3:.4g}k"
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"
