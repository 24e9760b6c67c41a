"""What needs a process of its own; run by a test, with the name of a function and its arguments."""

import gc
import os
import sys
from itertools import cycle, islice
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


def leak(kinds: str, models: str) -> None:
    """Make, train, use and drop models of some kinds in turn, with tables of 80 MB."""
    from partial_embedding.tensorflow import PartialEmbedding, rowwise

    matrix = np.ones((500_000, 40), np.float32)
    ids = np.arange(100).reshape(20, 5)
    marks = []
    for kind in islice(cycle(kinds.split("-")), int(models)):
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


def load(*paths: str) -> None:
    """Open files without the import, then train while numbers are checked."""
    told = []
    for path in paths:
        try:
            keras.models.load_model(path)
        except (TypeError, ValueError) as error:
            told.append(str(error).replace("\n", " "))
    print(*told, sep=" | ", flush=True)
    import tensorflow as tf

    from partial_embedding.tensorflow import PartialEmbedding, rowwise

    tf.debugging.enable_check_numerics()
    layer = PartialEmbedding(12, 4, trainable_rows=[3, 5], reserve_rows=[3, 5, 7])
    model = keras.Sequential([keras.Input((5,), dtype="int64"), layer])
    for lazy in (False, True):
        model.compile(rowwise("adam", lazy=lazy), "mse")
        model.fit(np.arange(20).reshape(4, 5) % 12, np.zeros((4, 5, 4)), verbose=0)
    print("no complaint from rowwise, lazy")


{"leak": leak, "load": load}[sys.argv[1]](*sys.argv[2:])
