"""From measured figures to a report: targets, tables, pictures, and the section of the README.

python benchmarks/report.py benchmarks/results.json --readme README.md
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, STATES, Work
from ddp import WAYS
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Results = dict[str, Any]
Measured = dict[str, Any]

BEGIN, END = "<!-- benchmarks: make bench-readme -->", "<!-- /benchmarks -->"
COUNTED = (1000, 10_000, 100_000)
OPTIMIZERS = ("AdamW", "SGD", "Adagrad")
# Under these a gradient of zero moves nothing, and the rows that are stepped are those touched.
RESTING = ("SGD", "Adagrad")
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


# Targets


@dataclass(frozen=True)
class Target:
    """What was aimed at, and what came out.

    Args:
        what: The figure, in words.
        figure: Its value.
        limit: What it may be at most, or must be at least.
        at_least: Which of the two.
    """

    what: str
    figure: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure is on the right side."""
        return self.figure >= self.limit if self.at_least else self.figure <= self.limit

    def row(self) -> str:
        """A row of a Markdown table."""
        sign = "≥" if self.at_least else "≤"
        verdict = "met" if self.met else "**missed**"
        return f"| {self.what} | {self.figure:.3g} | {sign} {self.limit:.3g} | {verdict} |"


def one(results: Results, race: str, contender: str, **work: Any) -> Measured:
    """What was measured of one contender in a race."""
    found = [
        entry
        for entry in results["races"].get(race, [])
        if entry["contender"] == contender
        and all(entry["work"][key] == value for key, value in work.items())
    ]
    return found[0]


def _has(results: Results, race: str, *contenders: str) -> bool:
    there = {entry["contender"] for entry in results["races"].get(race, [])}
    return there >= set(contenders)


def targets(results: Results) -> Iterator[Target]:
    """All targets of which the figures were measured."""
    # A GPU waits for calls where a CPU waits for memory, so that it has an aim of its own.
    on_cpu = results["machine"]["device"] == "CPU"
    yield from _cpu_targets(results) if on_cpu else _bandwidth_targets(results)
    if _has(results, "vocabulary", "ours", "lookup"):
        small, large = (
            one(results, "vocabulary", "ours", rows=rows)["ms"]
            - one(results, "vocabulary", "lookup", rows=rows)["ms"]
            for rows in (10**4, 10**7)
        )
        yield Target("step without reading at V = 10,000,000 over V = 10,000", large / small, 1.15)
    for entry in results.get("memory", []):
        if entry["contender"] in ("ours", "lazy"):
            same = [e for e in results["memory"] if e["work"] == entry["work"]]
            floor = next(e for e in same if e["contender"] == "floor")
            bound = 1.2 * floor["peak"] + 9 * entry["work"]["rows"]
            named = ", ".join([entry["contender"], *_task(entry["work"])])
            yield Target(
                f"peak memory over 1.2 × floor + 9 B a row: {named}", entry["peak"] / bound, 1.0
            )
    if callbacks := results.get("callbacks"):
        for way, limit in (("`RowUnfreezing`", 2.0), ("both", 3.0)):
            added = 100 * (callbacks[way]["ratio"] - 1)
            yield Target(f"added to a step of Lightning's `fit`, %: {way}", added, limit)
    if parts := results.get("parts"):
        yield from _part_targets(parts)
    if heads := results.get("heads"):
        what = "new tokens, V = 256,000, D = 2,048: step over the frozen model's passes"
        yield Target(what, heads["ours"] / heads["plain"], 1.1)
    yield from _traffic_targets(results.get("ddp", []))


def _cpu_targets(results: Results) -> Iterator[Target]:
    """Aims of time against other ways to make the step."""
    for optimizer in OPTIMIZERS:
        for trainable in COUNTED:
            yield from _step_targets(results, optimizer, trainable)
    for name, ours, limit in (
        ("dense", "ours", 100),
        ("peft", "ours", 30),
        ("sparse_adam", "lazy", 2),
    ):
        if _has(results, "peers", name):
            ratio = one(results, "peers", name)["ms"] / one(results, "peers", ours)["ms"]
            yield Target(
                f"{CONTENDERS[name].name} over {CONTENDERS[ours].name}", ratio, limit, True
            )
    for optimizer in ("Adagrad", "SGD"):
        race = f"fbgemm-{optimizer}"
        if _has(results, race, "fbgemm"):
            ratio = one(results, race, "fbgemm")["ms"] / one(results, race, "lazy")["ms"]
            yield Target(f"FBGEMM over ours, lazy: {optimizer}", ratio, 1.0, True)


def _step_targets(results: Results, optimizer: str, trainable: int) -> Iterator[Target]:
    """A step against what no way of keeping one table can leave out, and against two tables."""
    race = f"floor-{optimizer}-{trainable}"
    if not _has(results, race, "ours", "lazy", "lookup", "two_tables"):
        return
    floor, reading = one(results, race, "floor"), one(results, race, "lookup")["ms"]
    task = f"{optimizer}, K = {trainable:,}"
    for name in ("ours", "lazy"):
        few = name == "lazy" or (optimizer in RESTING and trainable > floor["work"]["ids"])
        copying = one(results, race, "copying_lazy" if few else "copying")["ms"]
        bound = reading + floor["backward"] + floor["update"] + copying
        step = one(results, race, name, together=False)["ms"]
        how = "lazy, " if name == "lazy" else ""
        alone = step / floor["ms"]
        yield Target(
            f"step over its bound: {how}{task} ({alone:.2f} of the floor)", step / bound, 1.15
        )
    by_hand = one(results, race, "two_tables")["ms"]
    yield Target(
        f"step over two tables by hand: {task}",
        one(results, race, "ours", together=False)["ms"] / by_hand,
        1.0,
    )


def least_bytes(work: Measured) -> float:
    """Bytes that no way to make a step can leave alone.

    Ids are read; what is looked up is read and written; the gradient of the entries that train is
    read, and summed by row; a row that is stepped, its gradient and its state are read, and it and
    its state are written.
    """
    task = Work(**work)
    entries = task.share * task.ids
    stepped: float = task.trainable
    if task.optimizer in RESTING and task.trainable > task.ids:  # as many as uniform ids touch
        stepped *= 1 - (1 - 1 / task.trainable) ** entries
    touched = 8 * task.ids + (2 * task.ids + entries) * task.row_bytes
    return touched + stepped * task.row_bytes * (4 + 2 * STATES[task.optimizer])


def _bandwidth_targets(results: Results) -> Iterator[Target]:
    """The share of what a GPU's memory moves in that time which a step needed."""
    for optimizer in OPTIMIZERS:
        for entry in results["races"].get(f"bandwidth-{optimizer}", []):
            if entry["contender"] == "lazy":
                continue
            needed = least_bytes(entry["work"]) / results["bandwidth"]
            named = "; ".join([CONTENDERS[entry["contender"]].name, *_task(entry["work"])])
            share = needed / (1e-3 * entry["ms"])
            yield Target(f"share of the memory's bandwidth: {named}", share, 0.7, True)


def _part_targets(parts: Measured) -> Iterator[Target]:
    """What a step, a preparation and a stage change cost by themselves."""
    around, gradient, change = parts["around a step"], parts["gradient"], parts["stage change"]
    what = "µs that a step of 64 ids takes longer than the floor, K = 100"
    yield Target(what, around["ours"] - around["floor"], 60)
    what = "step over one with a sparse gradient as torch made it, K = 1,000"
    yield Target(what, gradient["ours"] / gradient["sparse"], 1.03)
    yield Target("ms to prepare an optimizer, at most", max(parts["preparing"].values()), 50)
    what = "stage change by 100,000 rows over one pass over them"
    yield Target(what, change["change"] / change["pass"], 3.0)


def _traffic_targets(entries: list[Measured]) -> Iterator[Target]:
    """That what processes send follows the rows."""
    smallest = min((e["work"]["rows"] for e in entries), default=0)
    for e in entries:
        if e["way"] not in ("dense_by_row", "sparse_by_row") or e["work"]["rows"] == smallest:
            continue
        work = e["work"]
        small = next(
            one["bytes"]
            for one in entries
            if one["way"] == e["way"] and one["work"] == {**work, "rows": smallest}
        )
        dense = e["way"] == "dense_by_row"
        own = (work["trainable"] if dense else e["touched"]) * Work(**work).row_bytes
        named = f"{WAYS[e['way']]}, K = {work['trainable']:,}"
        rows = "the K rows" if dense else "the rows touched"
        yield Target(f"bytes sent over those of {rows}: {named}", e["bytes"] / own, 1.1)
        sizes = f"V = {work['rows']:,} over V = {smallest:,}"
        yield Target(f"bytes sent, {sizes}: {named}", e["bytes"] / small, 1.1)


# Tables


def _task(work: Measured) -> list[str]:
    parts = [f"V = {work['rows']:,}", f"K = {work['trainable']:,}", work["optimizer"]]
    default = asdict(Work())
    spelled = {"ids": "{:,} ids", "width": "D = {}", "share": "{:.0%} of the ids trainable"}
    spelled |= {
        "law": "{}",
        "dtype": "{}",
        "together": "rows side by side",
        "mapped": "mapped",
        "fused": "fused",
    }
    parts += [text.format(work[key]) for key, text in spelled.items() if work[key] != default[key]]
    return parts


def race_table(entries: list[Measured], ours: Measured) -> list[str]:
    """Ratios first, then times, in Markdown."""
    lines = [
        "| | times ours | ms (middle half) | forward | backward | update |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    tasks = [_task(entry["work"]) for entry in entries]
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
    lines = [
        "# The step of a large table, side by side",
        "",
        "Made by `make bench`. Contenders take turns within one process; medians, and in",
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
            ", ".join(_task(ours["work"])),
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
