"""What needs a process of its own; run by a test, with the name of one of these functions."""

import gc
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras  # after the setting above
import numpy as np


def memory() -> int:
    """The process's memory, in MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def leak(kind: str) -> None:
    """Make, train, use and drop twenty models with tables of 40 MB."""
    from partial_embedding.tensorflow import PartialEmbedding, rowwise

    matrix = np.random.default_rng(0).normal(size=(250_000, 40)).astype(np.float32)
    ids = np.arange(100).reshape(20, 5)
    marks = []
    for _ in range(20):
        model = keras.Sequential(
            [
                keras.Input((5,), dtype="int64"),
                PartialEmbedding.from_matrix(matrix, trainable_rows=range(1000)),
                keras.layers.GlobalAveragePooling1D(),
                keras.layers.Dense(1),
            ]
        )
        optimizer: Any = keras.optimizers.Adam()
        model.compile(optimizer if kind == "split" else rowwise(optimizer, kind == "lazy"), "mse")
        model.fit(ids, np.zeros(20), verbose=0)
        model.predict(ids, verbose=0)
        del model, optimizer
        keras.backend.clear_session()
        marks.append(memory())
    print(marks[-1] - marks[2])


def numerics(kind: str) -> None:
    """Train while TensorFlow looks for numbers that are none."""
    import tensorflow as tf

    from partial_embedding.tensorflow import PartialEmbedding, rowwise

    tf.debugging.enable_check_numerics()
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int64"),
            PartialEmbedding(12, 4, trainable_rows=[3, 5], reserve_rows=[3, 5, 7]),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )
    model.compile(rowwise("adam", lazy=kind == "lazy"), "mse")
    model.fit(np.arange(20).reshape(4, 5) % 12, np.zeros(4), verbose=0)
    print("no complaint")


def load(path: str) -> None:
    """Open a file without the import."""
    try:
        keras.models.load_model(path)
    except (TypeError, ValueError) as error:
        print(str(error).replace("\n", " "))


{"leak": leak, "numerics": numerics, "load": load}[sys.argv[1]](sys.argv[2])
