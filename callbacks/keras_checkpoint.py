"""A checkpoint of Keras that holds the rows that trained instead of their tables."""

from __future__ import annotations

from typing import Any

import keras

from partial_embedding.errors import InputError
from partial_embedding.tensorflow.models import tables_in
from partial_embedding.tensorflow.row_files import rows_saved_alone


class RowCheckpoint(keras.callbacks.ModelCheckpoint):
    """`keras.callbacks.ModelCheckpoint` with files that follow the rows, and not the vocabulary.

    Of each partial table a file holds the reserved rows and a fingerprint of all others; whatever
    else the weights and the optimizer have is saved as always. Load it with
    `model.load_weights(path)` into a model whose tables are made as they were made for the run;
    another table is refused. Files that Keras writes by itself, with `model.save`,
    `ModelCheckpoint` or `BackupAndRestore`, hold tables whole.

    Args:
        filepath: As for `ModelCheckpoint`; it ends in `.weights.h5`.
        **options: Likewise, but for `save_weights_only`, which is true.

    Raises:
        InputError: Whole models are asked for.

    Example:
        >>> RowCheckpoint("{epoch}.weights.h5").save_weights_only
        True
    """

    def __init__(self, filepath: Any, **options: Any) -> None:
        if not options.setdefault("save_weights_only", True):
            raise InputError(
                "a file of rows is loaded into a model that has the others, and is none itself. "
                "Received save_weights_only=False. Leave it out, or use "
                "keras.callbacks.ModelCheckpoint."
            )
        super().__init__(filepath, **options)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Save, if that is due."""
        with rows_saved_alone(tables_in(self.model).values()):
            super().on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Save, if that is due."""
        with rows_saved_alone(tables_in(self.model).values()):
            super().on_epoch_end(epoch, logs)
