"""What was aimed at, and what came out of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from contenders import CONTENDERS, STATES, Work
from ddp import WAYS

Results = dict[str, Any]
Measured = dict[str, Any]

COUNTED = (1000, 10_000, 100_000)
OPTIMIZERS = ("AdamW", "SGD", "Adagrad")
# Under these a gradient of zero moves nothing, and the rows that are stepped are those touched.
RESTING = ("SGD", "Adagrad")


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
            named = ", ".join([entry["contender"], *task_words(entry["work"])])
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
            named = "; ".join([CONTENDERS[entry["contender"]].name, *task_words(entry["work"])])
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


def task_words(work: Measured) -> list[str]:
    """What a task is, in words, but for what is as usual."""
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
