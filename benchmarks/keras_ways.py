"""Ways that were tried for one step in Keras, in turns within one process.

    python benchmarks/keras_ways.py [--fit]

V = 1,000,000, K = 1,000, D = 64 and 512 ids, as in `keras_step.py`. Each figure is the processor
time of one thread for a traced step, without what `fit` does around it: the median of turns, and
what it is above the step of a plain layer of K rows, the median of the differences within a turn.
With `--fit` it is a step of `fit`, and how many times that of the plain layer's.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from operator import sub, truediv
from typing import Any
from unittest.mock import patch

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"

import keras  # after the settings above
import numpy as np
import tensorflow as tf

from partial_embedding.tensorflow import PartialEmbedding, rowwise, sparse_update, table_state
from partial_embedding.tensorflow.lr_scale import RowScales
from partial_embedding.tensorflow.table_state import TableState

NUM_ROWS, TRAINABLE, WIDTH, IDS = 1_000_000, 1000, 64, 512
STEPS, TURNS = 40, 25
OPTIMIZERS = ("SGD", "Adam", "AdamW")


def by_element(condition: Any, x: Any, y: Any) -> Any:
    return tf.where(condition[:, tf.newaxis], x, y)


def pinned_at_once(state: Any, rows: Any) -> Any:
    return tf.where(state.is_unfrozen()[:, tf.newaxis], tf.convert_to_tensor(rows), state.kept())


def summed_backwards(variable: Any, slots: Any, others: Any, sparse: bool) -> Any:
    @tf.custom_gradient
    def carry(weights: Any, rows: Any) -> Any:
        number = variable.shape[0]
        return tf.identity(rows), lambda up: (tf.math.unsorted_segment_sum(up, slots, number), None)

    found = tf.gather(variable, tf.maximum(slots, 0))
    rows = tf.raw_ops.Select(condition=slots >= 0, x=found, y=others)
    return carry(tf.convert_to_tensor(variable), tf.stop_gradient(rows))


def one_rate(scales: Any, learning_rate: Any, ages: Any, slots: Any = None) -> Any:
    return tf.fill(tf.shape(ages), tf.cast(learning_rate, tf.float32))


by_elements = patch.object(tf.raw_ops, "Select", by_element)
# What is used, and what stands in its place while a step is traced.
WAYS: dict[str, tuple[str, Any]] = {
    "the rows alone": ("alone", None),
    "ours": ("ours", None),
    "rows chosen by `tf.where`, element by element": ("ours", by_elements),
    "the gradient summed without choosing backwards": (
        "ours",
        patch.object(table_state, "choose_rows", summed_backwards),
    ),
    "not asked whether all reserved rows are unfrozen": (
        "ours",
        patch.object(TableState, "pin", pinned_at_once),
    ),
    "never pinned": ("ours", patch.object(TableState, "pin", lambda state, rows: rows)),
    "ours, lazy": ("lazy", None),
    "static shapes, sorted, as under XLA": (
        "lazy",
        patch.object(sparse_update, "_is_compiled", lambda: True),
    ),
    "lazy, rows chosen by `tf.where`": ("lazy", by_elements),
    "lazy, one rate for all rows": ("lazy", patch.object(RowScales, "rates", one_rate)),
    "lazy, not filled up to whole vectors": ("lazy", patch.object(sparse_update, "_LANES", 1)),
}
USED = ("the rows alone", "ours", "ours, lazy")
COMPILED = {f"{name}, compiled by XLA": WAYS[name] for name in USED}


def steps_of(
    kind: str, optimizer: str, compiled: bool = False, fit: bool = False
) -> tuple[Any, Callable[[], object]]:
    """A model, and a function that makes some steps with it."""
    rows = {"trainable_rows": range(TRAINABLE), "reserve_rows": range(TRAINABLE)}
    plain = kind == "alone"
    layer: Any = (
        keras.layers.Embedding(TRAINABLE, WIDTH)
        if plain
        else PartialEmbedding(NUM_ROWS, WIDTH, **rows)
    )
    made = getattr(keras.optimizers, optimizer)()
    model = keras.Sequential([keras.Input((IDS,), dtype="int64"), layer])
    model.compile(rowwise(made, lazy=True) if kind == "lazy" else made, "mse")
    model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, TRAINABLE if plain else NUM_ROWS, (STEPS, 1, IDS))
    ids[..., ::2] = rng.integers(0, TRAINABLE, (STEPS, 1, IDS // 2))
    if fit:
        targets = np.zeros((STEPS, 1, IDS, WIDTH), np.float32)
        data = tf.data.Dataset.from_tensor_slices((ids, targets)).cache()
        model.fit(data, verbose=0)
        return model, lambda: model.fit(data, verbose=0)
    batches = [(tf.constant(one), tf.zeros((1, IDS, WIDTH))) for one in ids]
    step = tf.function(model.train_step, autograph=False, jit_compile=compiled or None)
    step(batches[0])

    def run() -> None:
        for batch in batches:
            step(batch)

    return model, run


def in_turns(runs: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Microseconds of a step, turn by turn."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(TURNS):
        for name, run in runs.items():
            start = time.process_time()
            run()
            found[name].append(1e6 * (time.process_time() - start) / STEPS)
    return found


def compare_ways(optimizer: str) -> dict[str, tuple[str, str]]:
    """Of each way, a step, and what it is above the rows alone."""
    models, runs = [], {}
    for name, (kind, way) in (WAYS | COMPILED).items():
        with way or nullcontext():
            model, runs[name] = steps_of(kind, optimizer, name in COMPILED)
        models.append(model)  # TensorFlow frees what nothing else holds
    found = in_turns(runs)
    return {
        name: _cells(times, found["the rows alone"], sub, "0f") for name, times in found.items()
    }


def compare_fits(optimizer: str) -> dict[str, tuple[str, str]]:
    """Of what is used, a step of `fit`, and how many times that of the rows alone."""
    runs = {name: steps_of(WAYS[name][0], optimizer, fit=True)[1] for name in USED}
    found = in_turns(runs)
    alone = found["the rows alone"]
    return {name: _cells(times, alone, truediv, "2f") for name, times in found.items()}


def _cells(times: list[float], alone: list[float], compare: Any, form: str) -> tuple[str, str]:
    compared = statistics.median(map(compare, times, alone))
    return f"{statistics.median(times):.0f}", f"{compared:.{form}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", action="store_true")
    fit = parser.parse_args().fit
    compared = "times the rows alone" if fit else "above the rows alone"
    print("| way |" + "".join(f" {name}, µs | {compared} |" for name in OPTIMIZERS))
    print("|---|" + "---:|---:|" * len(OPTIMIZERS))
    columns = [(compare_fits if fit else compare_ways)(optimizer) for optimizer in OPTIMIZERS]
    for way in columns[0]:
        print(f"| {way} |" + "".join(f" {' | '.join(column[way])} |" for column in columns))


if __name__ == "__main__":
    main()
