"""Trains with a schedule and a backup, kills itself where told, and prints the end; for a test.

Arguments: the folder of the backup, the epoch and the batch to die in (-1 for none), and "rowwise"
or "plain" for the optimizer.
"""

import hashlib
import os
import signal
import sys
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras  # after the setting above
import numpy as np

from partial_embedding.callbacks.keras import RowUnfreezing
from partial_embedding.tensorflow import PartialEmbedding, rowwise, schedule_rows

folder, fatal_epoch, fatal_batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
STAGES = [
    {"epoch": 0, "rows": [3, 5]},
    {"epoch": 2, "rows": [1, 3, 7]},
    {"epoch": 4, "rows": {"range": [0, 8]}},
    {"epoch": 5, "rows": [2]},
]
SCHEDULE = {"stages": STAGES}


class Death(keras.callbacks.Callback):  # type: ignore[misc]
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if (self.epoch, batch) == (fatal_epoch, fatal_batch):
            os.kill(os.getpid(), signal.SIGKILL)


rng = np.random.default_rng(0)
ids, targets = rng.integers(0, 12, (16, 3)), rng.normal(size=(16, 1)).astype(np.float32)
matrix = rng.normal(size=(12, 4)).astype(np.float32)
model = keras.Sequential(
    [
        keras.Input((3,), dtype="int64"),
        PartialEmbedding.from_matrix(
            matrix, trainable_rows=[3, 5], reserve_rows=schedule_rows(SCHEDULE, 12)
        ),
        keras.layers.Flatten(),
        keras.layers.Dense(1, kernel_initializer="ones"),
    ]
)
optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1)
model.compile(rowwise(optimizer) if "rowwise" in sys.argv else optimizer, "mse")
callbacks = [
    RowUnfreezing(SCHEDULE, audit=True),
    keras.callbacks.BackupAndRestore(folder),
    Death(),
]
model.fit(ids, targets, epochs=6, batch_size=4, shuffle=False, verbose=0, callbacks=callbacks)
state = [w for layer in model.layers for w in layer.get_weights()]
state += [v.numpy() for v in model.optimizer.variables]
print(hashlib.sha256(b"".join(array.tobytes() for array in state)).hexdigest())
