"""What was tried on a GPU, whose memory a step of many rows waits for: `make bench-gpu`.

    python benchmarks/gpu_ways.py [--report benchmarks/gpu/ways.md]

Each figure is the median of turns, by the GPU's own clock.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from contenders import Work, floor, ours
from run import marks
from torch import Tensor
from torch.nn.functional import embedding

from partial_embedding.torch.blocks import Blocks
from partial_embedding.torch.rowcopy import is_wide, read_rows, write_rows

Way = Callable[[], object]
TURNS = 30
# Rows of the table, columns, rows that are gathered, dtype.
SIZES = (
    (10_000_000, 64, 1_000_000, torch.float32),
    (1_000_000, 50, 100_000, torch.float32),
    (1_000_000, 768, 100_000, torch.float32),
    (256_000, 2048, 100_000, torch.bfloat16),
)
LARGE = Work(rows=10**7, trainable=10**6, ids=65_536, device="cuda")


def measured(ways: dict[str, Way]) -> dict[str, float]:
    """Median milliseconds of each way, the ways taking turns."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(TURNS + 3):  # the first ones warm up
        for name, way in ways.items():
            mark, spans = marks()
            mark()
            way()
            mark()
            if turn >= 3:
                found[name] += spans()
    return {name: statistics.median(spans) for name, spans in found.items()}


def gathering(table: Tensor, rows: Tensor) -> dict[str, Way]:
    """From the table to rows side by side."""
    into = table.index_select(0, rows)
    every = rows.unsqueeze(1).expand(-1, table.shape[1])
    ways: dict[str, Way] = {
        "`index_select` into kept memory": partial(read_rows, table, rows, None, into),
        "`index_select` into new memory": partial(table.index_select, 0, rows),
        "by indexing": lambda: table[rows],
        "`embedding`": lambda: embedding(rows, table),
        "`gather`": lambda: table.gather(0, every),
    }
    if is_wide(table):
        wide = table.view(torch.complex128)
        ways["`index_select`, 16 bytes an element"] = lambda: wide.index_select(0, rows)
    return ways


def scattering(table: Tensor, rows: Tensor) -> dict[str, Way]:
    """From rows side by side to the table."""
    values = table.index_select(0, rows)
    return {
        "as it is done: 16 bytes an element, if they fit": partial(
            write_rows, table, rows, None, values
        ),
        "`index_copy_`": lambda: table.index_copy_(0, rows, values),
        "`index_put_`": lambda: table.index_put_((rows,), values),
    }


def updating(fused: bool) -> Iterator[tuple[str, Callable[[], Way]]]:
    """Steps of AdamW, each made when its turn comes, since each has a table of its own."""
    work = replace(LARGE, fused=fused)

    def in_parts(rows: int) -> Way:
        step = ours(work)

        def call() -> None:
            with patch.object(Blocks, "_height", lambda self, group: rows):
                step()

        return call

    yield "all rows at once", partial(ours, work)
    for rows in (2**14, 2**16, 2**18):
        yield f"parts of {rows:,} rows", partial(in_parts, rows)
    yield "rows that lie side by side", partial(ours, replace(work, together=True))
    yield "floor: the K rows alone", partial(floor, work)


def report() -> str:
    """All of it, as Markdown."""
    lines = [
        "# Ways that were tried on a GPU",
        "",
        "Made by `python benchmarks/gpu_ways.py`; the first way of each table is the one that is",
        f"used. {torch.cuda.get_device_name()}, torch {torch.__version__}.",
    ]
    for height, width, count, dtype in SIZES:
        table = torch.full((height, width), 0.01, dtype=dtype, device="cuda")
        rows = torch.randperm(height, device="cuda")[:count].sort().values
        moved = 2 * count * width * table.itemsize
        for title, make in (("Gather", gathering), ("Scatter", scattering)):
            kind = str(dtype).removeprefix("torch.")
            lines += [
                "",
                f"## {title} {count:,} of {height:,} rows, D = {width:,}, {kind}",
                "",
                "| way | ms | TB/s, read and written |",
                "|---|---:|---:|",
            ]
            for name, ms in measured(make(table, rows)).items():
                lines.append(f"| {name} | {ms:.3f} | {moved / ms / 1e9:.2f} |")
        del table
    for fused in (True, False):
        title = "fused" if fused else "with its defaults"
        lines += ["", f"## A step of AdamW, {title}: {LARGE.trainable:,} of {LARGE.rows:,} rows"]
        lines += ["", "| way | ms |", "|---|---:|"]
        for name, make_way in updating(fused):
            lines.append(f"| {name} | {measured({name: make_way()})[name]:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("A GPU is needed. Received none.")
    text = report()
    print(text)
    if args.report:
        args.report.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
