"""Trains with a schedule and a backup, kills itself where told, and prints the end; for a test.

Arguments: the folder of the backup, the epoch to die in (-1 for none), the batch to die before or
"end" for the end of the epoch, "record" or "weights" for what is written first there, and "plain",
"rowwise" or "rate_scales" for the optimizer.
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
from partial_embedding.tensorflow import PartialEmbedding, rowwise

folder, fatal_epoch, fatal_place, first, kind = sys.argv[1:]
STAGES: list[dict[str, Any]] = [
    {"epoch": 0, "rows": [3, 5], "lr_scale": 0.5},
    # In the middle of epoch 1.
    {"step": 6, "rows": [1, 3, 5, 7], "lr_scale": 0.25, "warmup_steps": 9},
    # No loss falls by so much, so this begins with epoch 4.
    {
        "plateau": {"monitor": "val_loss", "patience": 2, "min_delta": 100},
        "rows": {"range": [0, 8]},
        "warmup_steps": 7,
    },
    {"step": 26, "rows": [2, 3]},
    # A part every other step, from the middle of epoch 6 on.
    {
        "step": 36,
        "rows": {"range": [0, 10]},
        "grow": {"order": "ids", "increments": 5},
        "lr_scale": 2,
    },
]
RATE_KEYS = ("lr_scale", "warmup_steps")
if kind != "rate_scales":
    STAGES = [{k: v for k, v in stage.items() if k not in RATE_KEYS} for stage in STAGES]
SCHEDULE = {"stages": STAGES}


class Death(keras.callbacks.Callback):  # type: ignore[misc]
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.die_at(str(batch))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.die_at("end")

    def die_at(self, place: str) -> None:
        if (self.epoch, place) == (int(fatal_epoch), fatal_place):
            os.kill(os.getpid(), signal.SIGKILL)


rng = np.random.default_rng(0)
ids, targets = rng.integers(0, 12, (16, 3)), rng.normal(size=(16, 1)).astype(np.float32)
matrix = rng.normal(size=(12, 4)).astype(np.float32)
model = keras.Sequential(
    [
        keras.Input((3,), dtype="int64"),
        PartialEmbedding.from_matrix(matrix),
        keras.layers.Flatten(),
        keras.layers.Dense(1, kernel_initializer="ones"),
    ]
)
optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1)
if kind != "plain":
    optimizer = rowwise(optimizer)
model.compile(optimizer, "mse")
callbacks = [
    RowUnfreezing(SCHEDULE, audit=True, backup_dir=folder),
    Death(),
    keras.callbacks.BackupAndRestore(folder),
]
model.fit(
    ids,
    targets,
    validation_data=(ids[:4], targets[:4]),
    epochs=10,
    batch_size=4,
    shuffle=False,
    verbose=0,
    callbacks=callbacks if first == "record" else callbacks[::-1],
)
state = [w for layer in model.layers for w in layer.get_weights()]
state += [v.numpy() for v in model.optimizer.variables]
print(hashlib.sha256(b"".join(array.tobytes() for array in state)).hexdigest())
