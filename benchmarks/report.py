"""From measured figures to a report: tables, pictures, and the section of the README.

python benchmarks/report.py benchmarks/results.json --readme README.md
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from contenders import CONTENDERS
from ddp import WAYS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from targets import Measured, Results, one, targets, task_words

BEGIN, END = "<!-- benchmarks: make bench-readme -->", "<!-- /benchmarks -->"
# What grows in the pictures of all sizes, and in which contenders.
SCALES = {
    "rows": "rows of the table, V",
    "trainable": "rows that train, K",
    "ids": "ids of a step",
}
SHORT = {"rows": "V", "trainable": "K", "ids": "ids"}
SCALED = ("ours", "lazy", "floor")
UNITS = {"ms": 1, "peak": 2**20}
_INK, _FAINT = "#22313f", "#8a97a3"


# Tables


def race_table(entries: list[Measured], ours: Measured) -> list[str]:
    """Ratios first, then times, in Markdown."""
    lines = [
        "| | times ours | ms (middle half) | forward | backward | update |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    tasks = [task_words(entry["work"]) for entry in entries]
    for e, task in zip(entries, tasks, strict=True):
        own = [part for part in task if not all(part in other for other in tasks)]
        named = "; ".join([CONTENDERS[e["contender"]].name, *own])
        lines.append(
            f"| {named} | {e['ms'] / ours['ms']:.2f} | {e['ms']:.2f} ({e['low']:.2f} to "
            f"{e['high']:.2f}) | {e['forward']:.2f} | {e['backward']:.2f} | {e['update']:.2f} |"
        )
    return lines


def memory_table(entries: list[Measured]) -> list[str]:
    """MiB beyond the table, in Markdown."""
    lines = [
        "| | K | MiB of tensors after a step | MiB of the process at its peak |",
        "|---|---:|---:|---:|",
    ]
    for e in entries:
        alive, peak = (f"{e[key] / 2**20:.1f}" for key in ("alive", "peak"))
        named = CONTENDERS[e["contender"]].name
        lines.append(f"| {named} | {e['work']['trainable']:,} | {alive} | {peak} |")
    return lines


def traffic_table(entries: list[Measured]) -> list[str]:
    """What processes send, in Markdown."""
    lines = ["| | V | K | KiB sent | ms |", "|---|---:|---:|---:|---:|"]
    for e in entries:
        work = e["work"]
        lines.append(
            f"| {WAYS[e['way']]} | {work['rows']:,} | {work['trainable']:,} "
            f"| {e['bytes'] / 1024:,.0f} | {e['ms']:.1f} |"
        )
    return lines


def _where(results: Results) -> str:
    here = results["machine"]
    if here["device"] != "CPU":
        return f"{here['device']}, by its own clock, torch {here['torch']}"
    one_thread = "1 CPU thread (the time that it computed)"
    threads = one_thread if here["threads"] == 1 else f"{here['threads']} CPU threads"
    return f"{here['processor']}, {threads}, torch {here['torch']}"


def _of_bandwidth(results: Results) -> list[str]:
    if "bandwidth" not in results:
        return []
    return [
        "",
        f"Its memory moves {results['bandwidth'] / 1e12:.2f} TB/s, read and written, in a copy",
        "within it. The share of that is the bytes that a step cannot leave alone (ids, what is",
        "looked up, the gradient, and rows, gradient and state of the update, each once), over the",
        "bytes that could have been moved in its time.",
    ]


def _report(results: Results) -> list[str]:
    made_by = "make bench" if results["machine"]["device"] == "CPU" else "make bench-gpu"
    lines = [
        "# The step of a large table, side by side",
        "",
        f"Made by `{made_by}`. Contenders take turns within one process; medians, and in",
        "brackets the middle half. Unless said otherwise: 4,096 ids a step (65,536 on a GPU),",
        "drawn uniformly, half of them trainable; D = 64, float32; the rows that train lie",
        "scattered over the table. A step is the lookup, the backward pass of a given gradient,",
        "and the update.",
        "",
        "The bound of a step is made of what was measured in the same race: reading all ids of the",
        "batch from the large table, the floor's backward pass and update of the K rows, and one",
        "gather and scatter of the rows that are stepped (with `lazy`, of their state too).",
        "",
        f"Measured on {_where(results)}.",
        *_of_bandwidth(results),
        *(f"Not installed: {name}." for name in results["missing"]),
        "",
        "| target | figure | aim | |",
        "|---|---:|---:|---|",
        *(target.row() for target in targets(results)),
        "",
    ]
    for name, entries in results["races"].items():
        ours = next((e for e in entries if e["contender"] == "ours"), entries[0])
        lines += [
            f"## {name}",
            "",
            ", ".join(task_words(ours["work"])),
            "",
            *race_table(entries, ours),
            "",
        ]
    if memory := results.get("memory"):
        lines += ["## memory beyond the table", ""]
        lines += [*memory_table(memory), ""]
    if ddp := results.get("ddp"):
        lines += [
            "## two processes",
            "",
            "What each of two processes under DDP sends in a step, as the network interface counts",
            "it, and how long the step takes, by the clock; AdamW, gloo. A head that is tied to a",
            "table, for one, makes its gradient dense.",
            "",
            *traffic_table(ddp),
            "",
        ]
    return lines


# Pictures


def _figure(columns: int = 1, rows: int = 1) -> tuple[Figure, list[list[Axes]]]:
    size = (7, 4.4) if columns == 1 else (4.4 * columns, 3.4 * rows)
    figure = Figure(figsize=size, dpi=160, layout="constrained", facecolor="white")
    grid = figure.subplots(rows, columns, squeeze=False, sharey="row").tolist()
    for axes in itertools.chain.from_iterable(grid):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_FAINT)
        axes.tick_params(colors=_INK, labelsize=9)
    return figure, grid


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", color=_INK, fontsize=11)
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)


def _curves(axes: Axes, entries: list[Measured], key: str, value: str = "ms") -> None:
    axes.set(xscale="log", yscale="log")
    for name in dict.fromkeys(entry["contender"] for entry in entries):
        mine = [e for e in entries if e["contender"] == name]
        mine.sort(key=lambda entry: entry["work"][key])
        places = [e["work"][key] for e in mine]
        figures = [e[value] / UNITS[value] for e in mine]
        line, *_ = axes.plot(places, figures, marker="o", label=CONTENDERS[name].name)
        if value == "ms":
            low, high = ([e[side] for e in mine] for side in ("low", "high"))
            axes.fill_between(places, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=9, labelcolor=_INK, frameon=False)


def _scale(results: Results) -> Figure:
    """Time in the first row and memory in the second, over V, K and the ids."""
    figure, grid = _figure(columns=len(SCALES), rows=2)
    for column, (key, title) in enumerate(SCALES.items()):
        entries = results["races"][f"scale-{key}"]
        tasks = [entry["work"] for entry in entries]
        held = [entry for entry in results["memory"] if entry["work"] in tasks]
        held = [entry for entry in held if entry["contender"] in SCALED]
        fixed = (f"{short} = {tasks[0][name]:,}" for name, short in SHORT.items() if name != key)
        _label(grid[0][column], ", ".join(fixed), "", "" if column else "ms a step")
        _label(grid[1][column], "", title, "" if column else "MiB beyond the table, at the peak")
        _curves(grid[0][column], entries, key)
        _curves(grid[1][column], held, key, "peak")
    _legend(grid[0][0])
    return figure


def _memory(entries: list[Measured]) -> Figure:
    """The peak of each contender of the first task."""
    first = [entry for entry in entries if entry["work"] == entries[0]["work"]]
    rows, trainable = (first[0]["work"][key] for key in ("rows", "trainable"))
    figure, [[axes]] = _figure()
    _label(axes, "", "MiB at the peak of the process", "")
    axes.set_xscale("log")
    peaks = [entry["peak"] / UNITS["peak"] for entry in first]
    names = [CONTENDERS[entry["contender"]].name for entry in first]
    bars = axes.barh(names, peaks, color="#4c78a8")
    axes.bar_label(bars, fmt="%.0f", padding=3, color=_INK, fontsize=9)
    axes.set_xlim(1, 4 * max(peaks))
    title = f"Memory beyond the table, V = {rows:,}, K = {trainable:,}"
    axes.set_title(title, loc="right", color=_INK, fontsize=11)
    axes.invert_yaxis()
    return figure


def pictures(results: Results) -> Iterator[tuple[str, Figure]]:
    """Time against V beside a dense table, all sizes of ours, and memory."""
    races = results["races"]
    if entries := races.get("vocabulary"):
        figure, [[axes]] = _figure()
        title = f"A step against the size of the table, K = {entries[0]['work']['trainable']:,}"
        _label(axes, title, "rows of the table, V", "ms a step")
        _curves(axes, entries, "rows")
        _legend(axes)
        yield "time-v.png", figure
    if "memory" in results and all(f"scale-{key}" in races for key in SCALES):
        yield "scale.png", _scale(results)
    if memory := results.get("memory"):
        yield "memory.png", _memory(memory)


def write_report(results: Results, folder: Path) -> str:
    """Write report.md and the pictures, and give the report back.

    Args:
        results: What `run.py` measured.
        folder: Where to.
    """
    lines = _report(results)
    if (folder / "limits.md").exists():
        lines += ["Where a target is missed, and why: [limits.md](limits.md).", ""]
    for name, figure in pictures(results):
        figure.savefig(folder / name)
        lines += [f"![{name.removesuffix('.png')}]({name})", ""]
    text = "\n".join(lines)
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


# The README


# What people use, in their words, and whether frozen rows keep their bits there.
README_ROWS = {
    "masked": ("`nn.Embedding`, gradient masked", "no"),
    "copied_back": ("`nn.Embedding`, frozen rows copied back after each step", "yes"),
    "peft": ("PEFT's trainable tokens", "yes"),
    "ours": ("**`PartialEmbedding`**", "yes"),
    "lazy": ("**`PartialEmbedding`**, `rowwise(optimizer, lazy=True)`", "yes"),
}


def readme_section(results: Results) -> str:
    """What the README says of performance."""
    ours = one(results, "peers", "ours")
    measured = {entry["contender"]: entry["ms"] for entry in results["races"]["peers"]}
    rows = [
        f"| {what} | {exact} | {measured[name]:.1f} | {measured[name] / ours['ms']:.1f} |"
        for name, (what, exact) in README_ROWS.items()
        if name in measured
    ]
    return "\n".join(
        [
            f"One step of AdamW, {ours['work']['ids']:,} ids, D = {ours['work']['width']}, "
            f"{ours['work']['rows']:,} rows of which {ours['work']['trainable']:,} train, on",
            f"{_where(results)}:",
            "",
            "| | frozen rows keep their bits | ms | times |",
            "|---|---|---:|---:|",
            *rows,
            "",
            "Memory, other sizes, optimizers and peers, and Keras: "
            "[benchmarks](benchmarks/report.md). `make bench`",
            "measures again.",
        ]
    )


def write_readme(results: Results, readme: Path) -> None:
    """Put the section between its two marks.

    Args:
        results: What `run.py` measured.
        readme: The file with the marks.
    """
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    section = f"{BEGIN}\n{readme_section(results)}\n{END}"
    readme.write_text(before + section + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--readme", type=Path, help="also write the section of this file")
    args = parser.parse_args()
    results = json.loads(args.results.read_text(encoding="utf-8"))
    write_report(results, args.results.parent)
    if args.readme:
        write_readme(results, args.readme)


if __name__ == "__main__":
    main()
