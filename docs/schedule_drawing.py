"""Draws schedules: which words train at which time, by how frequent they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from partial_embedding import Schedule, Vocabulary
from partial_embedding.schedule.preview import boundaries

ROOT = Path(__file__).resolve().parents[1]
WORDS, MISSING, BANDS = 6000, 600, 50
EPOCHS, STEPS = 10, 80
_WIDTH, _HEIGHT = 600, 150
_STRIP = (_HEIGHT + 6.0, _HEIGHT + 14.0)  # the missing words have a strip of their own


def vocabulary() -> Vocabulary:
    """Words by Zipf's law, of which the rarest tenth has no pre-trained vector."""
    counts = (1e6 / np.arange(1, WORDS + 1)).astype(int)
    missing = range(WORDS - MISSING, WORDS)
    return Vocabulary([f"word{i}" for i in range(WORDS)], counts=counts, missing=missing)


def draw(schedule: Schedule) -> str:
    """An SVG in the colours of the page: time from left to right, frequent words above.

    Args:
        schedule: For a table of 6,000 words and ten epochs of 80 steps.
    """
    words = vocabulary()
    new = np.arange(WORDS - 20, WORDS)  # for a schedule of rows by which a table grew
    places, states = zip(*boundaries(schedule, EPOCHS, STEPS), strict=True)
    begins = [place.step / STEPS for place in places]
    ends = [*begins[1:], float(EPOCHS)]
    trains = []
    for state, begin, end in zip(states, begins, ends, strict=True):
        rows = schedule.rows_at(state).resolve(WORDS, words, new=new)
        mask = np.zeros(WORDS, np.float32)
        mask[rows] = 1
        shares = [*mask[:-MISSING].reshape(BANDS, -1).mean(1), mask[-MISSING:].mean()]
        for (top, bottom), share in _merged(shares):
            trains.append(_rectangle(begin, end, top, bottom, f'opacity="{share:.2f}"'))
    tables = [_rectangle(0, EPOCHS, 0, _HEIGHT), _rectangle(0, EPOCHS, *_STRIP)]
    names = [("frequent", 12), ("rare", _HEIGHT - 8), ("missing", _HEIGHT + 15)]
    ticks = [(epoch, _WIDTH * epoch // EPOCHS) for epoch in range(0, EPOCHS + 1, 2)]
    return "".join(
        [
            f'<svg class="schedule" role="img" viewBox="-84 -4 {_WIDTH + 114} {_HEIGHT + 40}" ',
            'xmlns="http://www.w3.org/2000/svg">',
            f'<g class="table">{"".join(tables)}</g><g class="trains">{"".join(trains)}</g>',
            *(f'<text class="name" x="-6" y="{y}">{name}</text>' for name, y in names),
            *(f'<text x="{x}" y="{_HEIGHT + 32}">{epoch}</text>' for epoch, x in ticks),
            f'<text x="{_WIDTH * 9 // 10}" y="{_HEIGHT + 32}">epoch</text></svg>',
        ]
    )


def _merged(shares: Sequence[float]) -> Iterator[tuple[tuple[float, float], float]]:
    """Bands of words that train alike, as one: where they begin and end, and what share trains."""
    bands = groupby(enumerate(shares[:BANDS]), key=lambda band: band[1])
    for share, group in bands:
        places = [band for band, _ in group]
        if share:
            yield (_HEIGHT * places[0] / BANDS, _HEIGHT * (places[-1] + 1) / BANDS), share
    if shares[BANDS]:
        yield _STRIP, shares[BANDS]


def _rectangle(begin: float, end: float, top: float, bottom: float, more: str = "") -> str:
    x, width = _WIDTH * begin / EPOCHS, _WIDTH * (end - begin) / EPOCHS
    return (
        f'<rect x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{bottom - top:.1f}" {more}/>'
    )


def schedule_drawings() -> str:
    """Each file in `configs/schedules`: what it says of itself, its drawing and its YAML."""
    parts = []
    for path in sorted((ROOT / "configs/schedules").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        said = [line for line in lines if line.startswith("#")]
        body = "\n".join(lines[len(said) :])
        about = " ".join(line.lstrip("# ") for line in said)
        title = path.stem.replace("_", " ").capitalize()
        link = f"[{path.name}](../configs/schedules/{path.name})"
        figure = f'<figure markdown="0">{draw(Schedule.parse(path))}</figure>'
        parts.append(f"### {title}\n\n{about} {link}\n\n{figure}\n\n```yaml\n{body}\n```")
    return "\n\n".join(parts)
