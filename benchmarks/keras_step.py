"""One `fit` step of a Keras embedding, by vocabulary, trainable rows and optimizer.

`python benchmarks/keras_step.py` prints a Markdown table. Each contender is a process of its own.
Those of one vocabulary and optimizer take turns, for five rounds of 20 steps; the table has the
shortest, per step, and the peak of the process's memory beyond what the imports take.

"the rows alone" is a plain layer of K rows, on the same ids mapped to them. Below the table stands
how ours compares with it at the largest vocabulary, and whether that meets the target.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

WIDTH, IDS, STEPS, ROUNDS = 64, 512, 20, 5
OPTIMIZERS = ("SGD", "Adam", "AdamW")
VOCABULARIES = (10_000, 100_000, 1_000_000)
# The most that ours may take of the step of a plain layer of K rows: at K = 1,000, and at any K.
TARGET, LAZY_TARGET = 1.1, 1.2


def contend(kind: str, num_rows: int, trainable: int, optimizer: str) -> None:
    """Say when ready, then time 20 steps for each line that is read, then say the memory."""
    import keras
    import numpy as np
    import tensorflow as tf

    from partial_embedding.tensorflow import PartialEmbedding, rowwise

    class Masked(keras.layers.Layer):  # type: ignore[misc]
        def build(self, shape: Any) -> None:
            self.table = self.add_weight((num_rows, WIDTH), name="embeddings")
            self.mask = tf.constant(np.arange(num_rows)[:, None] < trainable, tf.float32)

        def call(self, ids: Any) -> Any:
            kept = tf.stop_gradient((1 - self.mask) * self.table)
            return tf.gather(kept + self.mask * self.table, ids)

    before = _peak()
    rows = {"trainable_rows": range(trainable), "reserve_rows": range(trainable)}
    layer = {
        "plain": lambda: keras.layers.Embedding(num_rows, WIDTH),
        "masked": Masked,
        "the rows alone": lambda: keras.layers.Embedding(trainable, WIDTH),
        "ours": lambda: PartialEmbedding(num_rows, WIDTH, **rows),
        "ours, lazy": lambda: PartialEmbedding(num_rows, WIDTH, **rows),
    }[kind]()
    made = getattr(keras.optimizers, optimizer)()
    model = keras.Sequential([keras.Input((IDS,), dtype="int64"), layer])
    model.compile(rowwise(made, lazy=True) if kind == "ours, lazy" else made, "mse")
    model.optimizer.build(model.trainable_variables)
    # As many tokens of trainable rows as of others, as when a frequent vocabulary learns.
    rng = np.random.default_rng(0)
    ids = rng.integers(0, num_rows, (STEPS, 1, IDS))
    ids[..., ::2] = rng.integers(0, trainable, (STEPS, 1, IDS // 2))
    if kind == "the rows alone":
        ids %= trainable
    targets = np.zeros((STEPS, 1, IDS, WIDTH), np.float32)
    data = tf.data.Dataset.from_tensor_slices((ids, targets)).cache()
    model.fit(data, verbose=0)
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        model.fit(data, verbose=0)
        print((time.perf_counter() - start) / STEPS * 1e3, flush=True)
    print(_peak() - before)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _cases(num_rows: int) -> list[tuple[str, int, int]]:
    shares = [k for k in (1000, 100_000, num_rows) if k <= num_rows]
    kinds = ("the rows alone", "ours", "ours, lazy")
    ours = [(kind, num_rows, k) for k in dict.fromkeys(shares) for kind in kinds]
    return [("plain", num_rows, num_rows), ("masked", num_rows, 1000), *ours]


def compare(cases: list[tuple[str, int, int]], optimizer: str) -> list[tuple[float, float]]:
    """Milliseconds per step and MiB of each case."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    contenders = []
    for case in cases:
        command = [sys.executable, __file__, "--one", *map(str, case), optimizer]
        contender = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        _next_line(contender)
        contenders.append(contender)
    rounds = []
    for _ in range(ROUNDS):
        times = []
        for contender in contenders:
            contender.stdin.write("\n")  # type: ignore[union-attr]
            contender.stdin.flush()  # type: ignore[union-attr]
            times.append(float(_next_line(contender)))
        rounds.append(times)
    memory = [float(contender.communicate()[0]) for contender in contenders]
    return list(zip(map(min, zip(*rounds, strict=True)), memory, strict=True))


def judged(
    cases: list[tuple[str, int, int]], columns: list[list[tuple[float, float]]]
) -> Iterator[str]:
    """A line for each of our cases that has a target."""
    for index, (kind, _, trainable) in enumerate(cases):
        if kind != "ours, lazy" and (kind, trainable) != ("ours", 1000):
            continue
        target = TARGET if kind == "ours" else LAZY_TARGET
        alone = cases.index(("the rows alone", cases[index][1], trainable))
        ratios = [column[index][0] / column[alone][0] for column in columns]
        told = ", ".join(
            f"{optimizer} {ratio:.2f} {'met' if ratio <= target else 'missed'}"
            for optimizer, ratio in zip(OPTIMIZERS, ratios, strict=True)
        )
        yield f"- {kind}, K = {trainable:,}, at most {target}: {told}"


def _next_line(contender: "subprocess.Popen[str]") -> str:
    line: str = contender.stdout.readline()  # type: ignore[union-attr]
    if not line:
        raise SystemExit(f"a contender ended early: {contender.args}")
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=4, help="kind, rows, trainable rows, optimizer")
    parser.add_argument("--vocabulary", type=int, action="append", help="by default all three")
    arguments = parser.parse_args()
    if arguments.one:
        kind, num_rows, trainable, optimizer = arguments.one
        contend(kind, int(num_rows), int(trainable), optimizer)
        return
    print("| table | V | K | " + " | ".join(f"{o}, ms | MiB" for o in OPTIMIZERS) + " |")
    print("|---|---|---|" + "---|---|" * len(OPTIMIZERS))
    for vocabulary in arguments.vocabulary or VOCABULARIES:
        cases = _cases(vocabulary)
        columns = [compare(cases, optimizer) for optimizer in OPTIMIZERS]
        for (kind, num_rows, trainable), *row in zip(cases, *columns, strict=True):
            cells = [f"{milliseconds:.2f} | {mebibytes:.0f}" for milliseconds, mebibytes in row]
            print(f"| {kind} | {num_rows:,} | {trainable:,} | " + " | ".join(cells) + " |")
    # Of the last vocabulary.
    print("\nAgainst the rows alone:\n", *judged(cases, columns), sep="\n")


if __name__ == "__main__":
    main()
