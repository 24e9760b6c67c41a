"""Measure the step of a large table side by side with what people use today.

    python benchmarks/run.py [--full] [--out runs/bench] [--only peers floor memory]

Contenders of one race take turns within one process, so that ratios hold although the machine's
speed drifts; memory is measured in a process for each. Writes results.json, report.md and pictures.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, Contender, Step, Work, batches_of
from ddp import COUNTS, measure_all
from heads import measure_heads
from overhead import measure_callbacks
from parts import measure_parts
from report import write_report

from partial_embedding.torch.row_gradient import RowGradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Enough to fill the device.
IDS = 65_536 if DEVICE == "cuda" else 4096
PEERS = (
    "dense",
    "masked",
    "copied_back",
    "sparse_adam",
    "peft",
    "two_tables",
    "ours",
    "lazy",
    "floor",
    "copying",
)
COUNTED_WITH = ("ours", "lazy", "floor", "lookup", "copying", "copying_lazy", "two_tables")
SCALED = ("ours", "lazy", "floor")
PARTS = ("forward", "backward", "update")
TURN = 0.03  # seconds of one turn, in which a fast step is timed several times
MOST_ROUNDS = 25
PROCESSES = 3  # for each figure of memory

_STATUS = Path("/proc/self/status")  # where Linux says what a process holds

Entry = tuple[str, Work]


@dataclass(frozen=True)
class Race:
    """Contenders that take turns.

    Args:
        name: In the results.
        entries: Keys of `CONTENDERS`, each with its task.
        full: Only in the long run.
    """

    name: str
    entries: list[Entry]
    full: bool = False


def races() -> Iterator[Race]:
    """What is measured, as data."""
    base = Work(device=DEVICE, ids=IDS)
    yield Race("peers", [(name, base) for name in PEERS])
    for optimizer in ("Adagrad", "SGD"):
        work = replace(base, optimizer=optimizer)
        names = ("fbgemm", "ours", "lazy", "floor")
        yield Race(f"fbgemm-{optimizer}", [(name, work) for name in names])
    for optimizer in ("AdamW", "SGD", "Adagrad", "Adam"):
        for trainable in (1000, 10_000, 100_000):
            work = replace(base, optimizer=optimizer, trainable=trainable)
            entries = [(name, work) for name in COUNTED_WITH]
            entries.append(("ours", replace(work, together=True)))
            yield Race(f"floor-{optimizer}-{trainable}", entries, full=optimizer == "Adam")
    sizes = [replace(base, rows=rows, trainable=1000) for rows in (10**4, 10**5, 10**6, 10**7)]
    entries = [(name, work) for work in sizes for name in ("ours", "lookup")]
    entries += [("dense", work) for work in sizes if work.rows <= base.rows]
    yield Race("vocabulary", entries)
    for name, works in scale(base).items():
        entries = [(contender, work) for work in works for contender in SCALED]
        yield Race(f"scale-{name}", entries, full=True)
    if base.device == "cuda":
        yield from _wide_races(base)
    work = replace(base, trainable=base.rows)
    yield Race("all-rows", [(n, work) for n in ("dense", "ours", "stages", "lazy", "copying")])

    few = ("floor", "ours", "lazy", "copying")
    others = {
        "alone": replace(base, share=1.0),
        "alone-1000": replace(base, share=1.0, trainable=1000),
        "zipf": replace(base, law="zipf"),
        "wide": replace(base, rows=100_000, width=768),
        "bfloat16": replace(base, dtype="bfloat16"),
    }
    for name, work in others.items():
        yield Race(name, [(contender, work) for contender in few], full=not name.startswith("al"))


def _wide_races(base: Work) -> Iterator[Race]:
    """Tasks that are large enough for a GPU's memory to be what they wait for."""
    for optimizer in ("AdamW", "SGD", "Adagrad"):
        large = replace(base, rows=10**7, trainable=10**6, optimizer=optimizer)
        fused = replace(large, fused=True)
        works = [large] if optimizer == "Adagrad" else [fused, large]  # which torch fuses on CPUs
        entries = [(name, work) for work in works for name in SCALED]
        entries.append(("ours", replace(works[0], together=True)))
        yield Race(f"bandwidth-{optimizer}", entries)


def scale(base: Work) -> dict[str, list[Work]]:
    """Tasks of all sizes, by what grows."""
    few = replace(base, trainable=1000)
    rows = [replace(few, rows=10**power) for power in (4, 5, 6, 7)]
    if base.device == "cpu":
        rows.append(replace(few, rows=10**8, mapped=True))
    large = replace(base, rows=2_000_000)
    return {
        "rows": rows,
        "trainable": [replace(large, trainable=10**power) for power in (2, 3, 4, 5, 6)],
        "ids": [replace(base, ids=ids) for ids in (512, 4096, 65_536)],
    }


def memory_entries(full: bool) -> list[Entry]:
    """What is measured in a process of its own."""
    base = Work(device=DEVICE, ids=IDS)
    entries = [(name, base) for name in PEERS if name != "copying"]
    works = [replace(base, trainable=100_000)]
    if full:
        works += itertools.chain.from_iterable(scale(base).values())
    entries += [(name, work) for work in works for name in SCALED]
    return list(dict.fromkeys(entries))


# Time


def marks() -> tuple[Callable[[], None], Callable[[], list[float]]]:
    """A function that takes the time, and one that gives the milliseconds between its calls."""
    taken: list[Any] = []
    if DEVICE == "cuda":

        def mark() -> None:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            taken.append(event)

        def spans() -> list[float]:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in itertools.pairwise(taken)]

        return mark, spans
    # With one thread, the time that it computed: other programs then matter less.
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    return (
        lambda: taken.append(now()),
        lambda: [1e3 * (b - a) for a, b in itertools.pairwise(taken)],
    )


def timed(step: Step) -> list[float]:
    """Milliseconds of each part of one step."""
    mark, spans = marks()
    step(mark)
    return spans()


def run_race(race: Race, seconds: float) -> list[dict[str, Any]]:
    """Let the contenders take turns, in another order each round, for about this time."""
    entries = [entry for entry in race.entries if CONTENDERS[entry[0]].installed]
    steps = [CONTENDERS[name].build(work) for name, work in entries]
    for step in steps:
        step()
        step()
    found: list[list[list[float]]] = [[] for _ in steps]
    start, rounds = time.perf_counter(), 0
    while rounds < 5 or (time.perf_counter() - start < seconds and rounds < MOST_ROUNDS):
        rounds += 1
        for i in random.Random(rounds).sample(range(len(steps)), len(steps)):
            turn = sum(timed(steps[i]))  # warms the caches, and is not counted
            for _ in range(max(1, min(5, int(1e3 * TURN / turn)))):
                found[i].append(timed(steps[i]))
    return [
        {"contender": name, "work": asdict(work), "rounds": rounds, **_summary(times)}
        for (name, work), times in zip(entries, found, strict=True)
    ]


def _summary(times: list[list[float]]) -> dict[str, float]:
    whole = [sum(parts) for parts in times]
    low, middle, high = statistics.quantiles(whole, n=4)
    parts = map(statistics.median, zip(*times, strict=True))
    return {"ms": middle, "low": low, "high": high, **dict(zip(PARTS, parts, strict=True))}


# Memory


def held_bytes(most: bool = False) -> int:
    """Bytes that this process holds, or has held at most since `forget_peak`."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() if most else torch.cuda.memory_allocated()
    # Not `getrusage`, in which a new process begins with the peak of the one that started it.
    fields = (line.split() for line in _STATUS.read_text(encoding="utf-8").splitlines())
    return next(int(f[1]) * 1024 for f in fields if f[0] == ("VmHWM:" if most else "VmRSS:"))


def forget_peak() -> None:
    """Let the peak begin at what is held now."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def tensor_bytes() -> int:
    """Bytes of all tensors alive that Python knows, each storage counted once."""
    storages = {}
    for thing in gc.get_objects():
        # A gradient by rows has no memory but that of the tensors in it.
        if isinstance(thing, torch.Tensor) and type(thing) is not RowGradient:
            if thing.layout != torch.strided:
                continue
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure_memory(name: str, work: Work) -> dict[str, Any]:
    """Bytes beyond the table: of tensors alive after a step, and of the process at its peak."""
    build = CONTENDERS[name].build
    # Code that is loaded at its first use is no memory of the step, and batches are the task's.
    build(replace(work, rows=2000, trainable=1000, ids=64))()
    kept = batches_of(work, "all"), batches_of(work, "trainable")
    gc.collect()
    forget_peak()
    held, alive = held_bytes(), tensor_bytes()
    step = build(work)
    for _ in range(3):
        step()
    gc.collect()
    table = 0 if name == "floor" else work.table_bytes
    in_memory = 0 if work.mapped else table
    del kept
    return {
        "contender": name,
        "work": asdict(work),
        "alive": tensor_bytes() - alive - table,
        "peak": held_bytes(most=True) - held - in_memory,
    }


def memory_in_processes(name: str, work: Work) -> dict[str, Any]:
    """What `measure_memory` gives in fresh processes: the median of their peaks.

    What an allocator keeps of large blocks that are given back differs from process to process.
    """
    command = [sys.executable, __file__, "--one", name, json.dumps(asdict(work))]
    found = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(PROCESSES)
    ]
    return {**found[0], "peak": statistics.median(one["peak"] for one in found)}


def copied_in_a_second() -> float:
    """Bytes that a GPU reads and writes in a second while it copies from its memory to it."""
    source = torch.ones(2**28, device=DEVICE)
    target = torch.empty_like(source)
    mark, spans = marks()
    for _ in range(20):
        mark()
        target.copy_(source)
    mark()
    return 2 * source.nbytes / (1e-3 * statistics.median(spans()))


# All of it


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    named = [line for line in _cpuinfo() if line.startswith("model name")]
    return {
        "processor": named[0].partition(":")[2].strip() if named else platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def missing() -> list[str]:
    """Contenders that can't run here, by name."""
    return [_named(one) for one in CONTENDERS.values() if not one.installed]


def _named(one: Contender) -> str:
    return f"{one.name} (no module {one.needs})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="more tasks and more rounds")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names of races")
    parser.add_argument("--seconds", type=float, help="for each race; 8, or 40 in the long run")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure_memory(args.one[0], Work(**json.loads(args.one[1])))))
        return
    torch.set_num_threads(args.threads)
    seconds = args.seconds or (40 if args.full else 8)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.json"
    # A run of a part replaces that part of what was measured before.
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"races": {}}
    results |= {"machine": machine(), "missing": missing()}

    def wanted(name: str) -> bool:
        return any(name.startswith(only) for only in args.only)

    def keep() -> None:
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    for race in races():
        if wanted(race.name) and (args.full or not race.full):
            print(race.name, flush=True)
            results["races"][race.name] = run_race(race, seconds)
            keep()
            gc.collect()
    if wanted("memory") and (DEVICE == "cuda" or _STATUS.exists()):
        print("memory", flush=True)
        entries = [e for e in memory_entries(args.full) if CONTENDERS[e[0]].installed]
        # A GPU counts its bytes itself; a CPU's are those of a process.
        measured = measure_memory if DEVICE == "cuda" else memory_in_processes
        results["memory"] = [measured(*entry) for entry in entries]
    if wanted("bandwidth") and DEVICE == "cuda":
        results["bandwidth"] = copied_in_a_second()
    if wanted("callbacks") and DEVICE == "cpu":
        print("callbacks", flush=True)
        results["callbacks"] = measure_callbacks(rounds=80 if args.full else 40)
    if wanted("parts") and DEVICE == "cpu":
        print("parts", flush=True)
        results["parts"] = measure_parts()
    if wanted("heads"):
        print("heads", flush=True)
        rounds = 7 if args.full or DEVICE == "cuda" else 3
        results["heads"] = measure_heads(256_000, 2048, rounds, DEVICE)
    if wanted("ddp") and DEVICE == "cpu" and COUNTS.exists():
        print("ddp", flush=True)
        results["ddp"] = measure_all(Work())
    keep()
    print(write_report(results, args.out))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
