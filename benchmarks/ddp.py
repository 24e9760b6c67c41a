"""What two processes under DDP send each other for a table in one step."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from contenders import Work, drawn
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from partial_embedding.torch import PartialEmbedding, rowwise

PROCESSES, STEPS, SKIPPED = 2, 7, 2
WAYS = {
    "plain": "DDP, dense nn.Embedding",
    "dense_by_row": "ours, dense gradient",
    "sparse_by_row": "ours",
}
# Where Linux counts what went through each network interface.
COUNTS = Path("/proc/net/dev")


class Net(nn.Module):
    """A table, and a parameter that stays with DDP."""

    def __init__(self, way: str, work: Work) -> None:
        super().__init__()
        table, rows = work.table(), drawn(work).rows
        if way == "plain":
            self.table: nn.Embedding = nn.Embedding.from_pretrained(table, freeze=False)
        else:
            self.table = PartialEmbedding.from_pretrained(
                table, sparse="sparse" in way, trainable_rows=rows
            )
        self.scale = nn.Parameter(torch.ones(work.width))

    def forward(self, ids: Tensor) -> Tensor:
        """Look rows up."""
        return self.table(ids) * self.scale


def step_of(way: str, work: Work) -> Callable[[Tensor, Tensor], None]:
    """A training step on ids and the gradient of what they give."""
    net = Net(way, work)
    ddp = DistributedDataParallel(net)
    optimizer = work.optimizer_of(net.parameters())
    if way != "plain":
        rowwise(optimizer, net)

    def step(ids: Tensor, gradient: Tensor) -> None:
        optimizer.zero_grad()
        ddp(ids).backward(gradient)
        optimizer.step()

    return step


def sent() -> int:
    """Bytes that went out by the loopback interface since the machine started."""
    lines = COUNTS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def measure_one(rank: int, store: str, way: str, work: Work) -> dict[str, Any]:
    """Bytes that one process sends in a step, and the step's milliseconds."""
    torch.set_num_threads(1)
    file_store = dist.FileStore(store, PROCESSES)
    dist.init_process_group("gloo", store=file_store, rank=rank, world_size=PROCESSES)
    step, made = step_of(way, work), drawn(work)
    spans, sizes, touched = [], [], []
    for turn in range(STEPS):
        # Not the same ids in each process.
        ids, gradient = made.batches[(2 * turn + rank) % len(made.batches)]
        touched.append(len(ids[torch.isin(ids, made.rows)].unique()))
        dist.barrier()
        before, start = sent(), time.perf_counter()
        step(ids, gradient)
        spans.append(1e3 * (time.perf_counter() - start))
        dist.barrier()
        sizes.append((sent() - before) / PROCESSES)
        dist.barrier()
    return {
        "way": way,
        "work": asdict(work),
        "bytes": statistics.median(sizes[SKIPPED:]),
        "touched": statistics.median(touched[SKIPPED:]),
        "ms": statistics.median(spans[SKIPPED:]),
    }


def measure(way: str, work: Work) -> dict[str, Any]:
    """What `measure_one` gives in the first of two fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        task = [str(Path(folder, "store")), way, json.dumps(asdict(work))]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), *task],
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(PROCESSES)
        ]
        said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a process of the way {way!r} failed")
    return json.loads(said[0].splitlines()[-1])


def measure_all(base: Work) -> list[dict[str, Any]]:
    """All ways, for tables of two sizes and two numbers of rows that train.

    Args:
        base: The task, of which V and K are replaced.
    """
    base = replace(base, device="cpu")
    sizes = [(10**5, 1000), (10**5, 10_000), (10**6, 1000), (10**6, 10_000)]
    works = [replace(base, rows=rows, trainable=trainable) for rows, trainable in sizes]
    return [measure(way, work) for work in works for way in WAYS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rank", type=int)
    parser.add_argument("store")
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("work", type=json.loads)
    args = parser.parse_args()
    print(json.dumps(measure_one(args.rank, args.store, args.way, Work(**args.work))), flush=True)
    os._exit(0)  # threads of the process group may abort an interpreter that ends with them


if __name__ == "__main__":
    main()
