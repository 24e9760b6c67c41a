"""Time and memory of one training step of a large table, side by side with what people use today.

    python benchmarks/torch_step.py [--rows 1000000] [--report benchmarks/torch_step.md]

Contenders take turns within one run, so that ratios hold although the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from partial_embedding.torch import PartialEmbedding, rowwise

WIDTH = 64
IDS = 4096
ROUNDS = 9

Step = Callable[[], None]


def tensor_bytes() -> int:
    """Bytes of all tensors alive, each storage counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def training(table: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        table(ids).pow(2).sum().backward()
        optimizer.step()

    return step


def contender(name: str, num_rows: int, trainable: int, ids: Tensor) -> Step:
    """One way to train the first `trainable` rows, or all, of a table of `num_rows`."""
    if name.startswith("ours"):
        table: nn.Embedding = PartialEmbedding(num_rows, WIDTH, trainable_rows=range(trainable))
        optimizer = torch.optim.AdamW(table.parameters())
        return training(table, rowwise(optimizer, table, lazy="lazy" in name), ids)
    if name == "floor: K rows alone":
        table = nn.Embedding(trainable, WIDTH)
        return training(table, torch.optim.AdamW(table.parameters()), ids[ids < trainable])
    if name == "sparse + SparseAdam, all rows":
        table = nn.Embedding(num_rows, WIDTH, sparse=True)
        return training(table, torch.optim.SparseAdam(table.parameters()), ids)
    table = nn.Embedding(num_rows, WIDTH)
    if name == "dense + masking hook":
        mask = (torch.arange(num_rows) < trainable).unsqueeze(1)
        table.weight.register_hook(lambda grad: torch.where(mask, grad, 0.0))
    return training(table, torch.optim.AdamW(table.parameters()), ids)


CONTENDERS = (
    "dense AdamW, all rows",
    "dense + masking hook",
    "sparse + SparseAdam, all rows",
    "ours, AdamW",
    "ours, AdamW, lazy",
    "floor: K rows alone",
)


def measure(num_rows: int, trainable: int) -> list[tuple[str, float, float]]:
    """Median milliseconds of a step, and bytes per row of the table beyond the table itself."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(num_rows, (IDS,), generator=generator)
    # Half of the ids are trainable, whatever their share of the table.
    ids[::2] = torch.randint(trainable, (IDS // 2,), generator=generator)
    steps, memory = {}, {}
    for name in CONTENDERS:
        before = tensor_bytes()
        steps[name] = contender(name, num_rows, trainable, ids)
        for _ in range(2):
            steps[name]()
        own = trainable if name.startswith("floor") else num_rows
        memory[name] = tensor_bytes() - before - own * WIDTH * 4
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    return [(n, statistics.median(times[n]), memory[n] / 2**20) for n in CONTENDERS]


def table_of(num_rows: int, trainable: int) -> list[str]:
    results = measure(num_rows, trainable)
    ours = next(ms for name, ms, _ in results if name == "ours, AdamW")
    lines = [
        f"V = {num_rows:,}, K = {trainable:,}",
        "",
        "| | times ours | ms a step | MiB beyond the table |",
        "|---|---:|---:|---:|",
    ]
    lines += [f"| {n} | {ms / ours:.1f} | {ms:.2f} | {mib:.1f} |" for n, ms, mib in results]
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--trainable", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--report", type=Path, help="write the tables to this Markdown file")
    args = parser.parse_args()
    lines = [
        "# One step of a large table",
        "",
        f"{IDS:,} ids a step, half of them trainable, D = {WIDTH}, fp32, AdamW unless named; "
        f"medians of {ROUNDS} rounds in which the contenders take turns.",
        f"torch {torch.__version__}, {torch.get_num_threads()} CPU thread(s), "
        f"{platform.machine()}. "
        "Made by `python benchmarks/torch_step.py --report benchmarks/torch_step.md`.",
        "",
    ]
    for num_rows in args.rows:
        for trainable in args.trainable:
            if trainable < num_rows:
                section = table_of(num_rows, trainable)
                print("\n".join(section), flush=True)
                lines += section
    if args.report:
        args.report.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
