"""Seconds until text vectors are a table: converted at the first start, and opened at the second.

    python benchmarks/text_vectors.py [--rows 400000] [--dim 100] [--report PATH]

Each start is a process of its own, whose time begins after the imports; the file of vectors is made
here, and the vocabulary has every twentieth of its words.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def start(path: str, cache: str, num_rows: int, dim: int) -> float:
    from partial_embedding.recipes.vectors import build_table, read_vectors
    from partial_embedding.rows.vocabulary import Vocabulary

    begun = time.perf_counter()
    vectors = read_vectors(Path(path), dim, cache)
    words = ["<pad>", *(f"w{i}" for i in range(0, num_rows, 20))]
    build_table(Vocabulary(words), vectors)
    return time.perf_counter() - begun


def write(path: Path, num_rows: int, dim: int) -> None:
    random = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(num_rows):
            values = " ".join(map(str, random.normal(size=dim).round(4)))
            file.write(f"w{i} {values}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--dim", type=int, default=100)
    parser.add_argument("--report", type=Path, help="write the table there too")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(start(*args.one, args.rows, args.dim))
        return
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.txt"
        write(path, args.rows, args.dim)
        size = path.stat().st_size / 1e6
        given = ["--rows", str(args.rows), "--dim", str(args.dim)]
        for _ in range(2):
            command = [sys.executable, __file__, *given, "--one", str(path), f"{folder}/cache"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds.append(float(done.stdout.splitlines()[-1]))
    lines = [
        "# Text vectors at the first and the second start",
        "",
        f"{args.rows:,} vectors of {args.dim} numbers, a text of {size:,.0f} MB, "
        f"{platform.machine()}. Made by `python benchmarks/text_vectors.py --report "
        "benchmarks/text_vectors.md`.",
        "",
        "| start | seconds |",
        "|---|---:|",
        f"| first, with the conversion | {seconds[0]:.2f} |",
        f"| second | {seconds[1]:.2f} |",
        "",
    ]
    print("\n".join(lines))
    if args.report:
        args.report.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
