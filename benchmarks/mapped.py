"""Memory of a table that is opened where it lies: private bytes beside those of its rows alone.

    python benchmarks/mapped.py [--rows 2000000] [--dim 300] [--trainable 10000] [--report PATH]

The file is sparse: it is as large as the table and takes no room on the disk. Each figure is taken
in a process of its own, beyond what the imports and a first small step take. The floor is an
`nn.Embedding` of the trainable rows alone, in memory, with the same optimizer and batches; rows
that lie apart need their whole pages, which is added to it. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from partial_embedding import open_vectors
from partial_embedding.torch import PartialEmbedding, rowwise

STEPS, BATCH = 30, 4096
BYTES_A_ROW = 9  # what bookkeeping may take


def private() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("this kernel does not tell private memory")


def trainable(layout: str, num_rows: int, count: int) -> np.ndarray:
    if layout == "side by side":
        return np.arange(num_rows - count, num_rows)
    return np.sort(np.random.default_rng(0).permutation(num_rows)[:count])


def train(table: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> int:
    """The most private memory that was seen after a step."""
    most = 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        batch = ids[torch.randint(len(ids), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        table(batch).sub(1).pow(2).sum().backward()
        optimizer.step()
        most = max(most, private())
    return most


def measure(path: str, layout: str, contender: str, count: int) -> dict[str, float]:
    """What a child process prints: seconds to open the table, and bytes of private memory."""
    warm = PartialEmbedding(4, 8, trainable_rows=[1])
    train(warm, rowwise(torch.optim.AdamW(warm.parameters()), warm), torch.tensor([1]))
    num_rows, dim = open_vectors(path).shape
    rows = trainable(layout, num_rows, count)
    ids = torch.tensor(rows if contender == "mapped" else np.arange(count))
    before, start = private(), time.perf_counter()
    if contender == "mapped":
        table: nn.Module = PartialEmbedding.from_pretrained(
            torch.from_numpy(open_vectors(path)), trainable_rows=rows
        )
        seconds = time.perf_counter() - start
        opened = private() - before
        optimizer = rowwise(torch.optim.AdamW(table.parameters()), table)
    else:
        table = nn.Embedding(count, dim)
        seconds, opened = time.perf_counter() - start, private() - before
        optimizer = torch.optim.AdamW(table.parameters())
    return {"seconds": seconds, "opened": opened, "most": train(table, optimizer, ids) - before}


def beyond_rows(rows: np.ndarray, dim: int) -> int:
    """The bytes of the pages that hold rows, beyond the rows themselves."""
    start, page, width = 128, 4096, 4 * dim  # the header of the file is 128 bytes
    first, last = (start + rows * width) // page, (start + (rows + 1) * width - 1) // page
    most = int((last - first).max()) + 1
    pages = np.minimum(first[:, None] + np.arange(most), last[:, None])
    return len(np.unique(pages)) * page - len(rows) * width


def in_a_process(*arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    # Blocks that are let go return to the system at once, so that figures do not depend on luck.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return json.loads(done.stdout)


def report(num_rows: int, dim: int, count: int) -> str:
    lines = [
        "# Private memory of a mapped table",
        "",
        f"V = {num_rows:,}, D = {dim}, K = {count:,}, AdamW, {STEPS} steps of {BATCH:,} ids. The "
        f"table is {num_rows * dim * 4 / 1e6:,.0f} MB.",
        f"torch {torch.__version__}, {platform.machine()}. Made by `python benchmarks/mapped.py "
        "--report benchmarks/mapped.md`.",
        "",
        "| trainable rows | seconds to open | MB when opened | MB in training | floor, MB | "
        "(training - 9 bytes a row) / floor |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.npy"
        with path.open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, dim)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + 4 * num_rows * dim)
        for layout in ("scattered", "side by side"):
            mapped = in_a_process(path, layout, "mapped", count)
            alone = in_a_process(path, layout, "alone", count)
            floor = alone["most"] + beyond_rows(trainable(layout, num_rows, count), dim)
            ratio = (mapped["most"] - BYTES_A_ROW * num_rows) / floor
            lines.append(
                f"| {layout} | {mapped['seconds']:.3f} | {mapped['opened'] / 1e6:.1f} "
                f"| {mapped['most'] / 1e6:.1f} | {floor / 1e6:.1f} | {ratio:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--dim", type=int, default=300)
    parser.add_argument("--trainable", type=int, default=10_000)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure:
        path, layout, contender, count = arguments.measure
        print(json.dumps(measure(path, layout, contender, int(count))))
        return
    text = report(arguments.rows, arguments.dim, arguments.trainable)
    print(text)
    if arguments.report:
        arguments.report.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
