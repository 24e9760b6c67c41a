"""One `fit` step of a Keras embedding, by vocabulary, trainable rows and optimizer.

`python benchmarks/keras_step.py` prints a Markdown table. Each figure comes from a process of its
own: the shortest of three runs of 20 steps, per step, and the peak of its memory beyond what the
imports take.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

WIDTH, IDS, STEPS = 64, 512, 20
OPTIMIZERS = ("SGD", "Adam", "AdamW")
VOCABULARIES = (10_000, 100_000, 1_000_000)


def measure(kind: str, num_rows: int, trainable: int, optimizer: str) -> tuple[float, float]:
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
    targets = np.zeros((STEPS, 1, IDS, WIDTH), np.float32)
    data = tf.data.Dataset.from_tensor_slices((ids, targets)).cache()
    model.fit(data, verbose=0)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        model.fit(data, verbose=0)
        seconds.append(time.perf_counter() - start)
    return min(seconds) / STEPS * 1e3, _peak() - before


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _cases(largest: int) -> list[tuple[str, int, int]]:
    cases = []
    for num_rows in (v for v in VOCABULARIES if v <= largest):
        cases += [("plain", num_rows, num_rows), ("masked", num_rows, 1000)]
        for trainable in (k for k in (1000, 100_000, num_rows) if k <= num_rows):
            for kind in ("ours", "ours, lazy"):
                if (kind, num_rows, trainable) not in cases:
                    cases.append((kind, num_rows, trainable))
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=4, help="kind, rows, trainable rows, optimizer")
    parser.add_argument("--largest", type=int, default=VOCABULARIES[-1])
    arguments = parser.parse_args()
    if arguments.one:
        kind, num_rows, trainable, optimizer = arguments.one
        print(*measure(kind, int(num_rows), int(trainable), optimizer))
        return
    print("| table | V | K | " + " | ".join(f"{o}, ms | MiB" for o in OPTIMIZERS) + " |")
    print("|---|---|---|" + "---|---|" * len(OPTIMIZERS))
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for kind, num_rows, trainable in _cases(arguments.largest):
        cells = []
        for optimizer in OPTIMIZERS:
            case = [kind, str(num_rows), str(trainable), optimizer]
            command = [sys.executable, __file__, "--one", *case]
            run = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            )
            milliseconds, mebibytes = map(float, run.stdout.split()[-2:])
            cells += [f"{milliseconds:.2f}", f"{mebibytes:.0f}"]
        print(f"| {kind} | {num_rows:,} | {trainable:,} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
