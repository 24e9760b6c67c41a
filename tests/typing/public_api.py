"""What type checkers and editors see of the public API: nothing here may be `Any`.

`make types` checks this file, it is never run. A line that must be refused carries a reason to be
ignored, which a checker reports where it finds nothing to ignore.
"""

from typing import assert_type

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from partial_embedding import Position, Rows, Schedule, Vocabulary
from partial_embedding import tensorflow as in_keras
from partial_embedding.torch import PartialEmbedding, PartialLinear, rowwise


def which() -> None:
    """Rows are named in every form that `Rows.parse` reads."""
    PartialEmbedding(10, 4, trainable_rows="all")
    PartialEmbedding(10, 4, trainable_rows=[3, 7])
    PartialEmbedding(10, 4, trainable_rows=range(5))
    PartialEmbedding(10, 4, trainable_rows=slice(-2, None))
    PartialEmbedding(10, 4, trainable_rows=np.array([True] * 10))
    PartialEmbedding(10, 4, trainable_rows=torch.tensor([3]))
    PartialEmbedding(10, 4, trainable_rows={"most_frequent": 0.2})
    PartialEmbedding(10, 4, trainable_rows=Rows.missing() | Rows.most_frequent(3))
    PartialEmbedding(10, 4, trainable_rows="al")  # type: ignore[arg-type]
    PartialEmbedding(10, 4, trainable_rows=3)  # type: ignore[arg-type]
    PartialEmbedding(10, 4, trainable_rows=[0.5])  # type: ignore[list-item]


def tables(vectors: Tensor) -> None:
    """Tables are modules with rows."""
    table = PartialEmbedding.from_pretrained(vectors, trainable_rows=[1])
    assert_type(table, PartialEmbedding)
    assert_type(table.trainable_rows, Tensor)
    table.unfreeze_rows([2])
    table.freeze_rows([1])
    table.set_trainable_rows(Rows.all())
    table.unfreeze_rows("every")  # type: ignore[arg-type]
    assert_type(PartialLinear(4, 10).trainable_rows, Tensor)
    optimizer = torch.optim.AdamW(table.parameters())
    assert_type(rowwise(optimizer, table), torch.optim.AdamW)


def when() -> None:
    """Schedules and vocabularies are plain values."""
    schedule = Schedule([{"epoch": 0, "rows": [7]}])
    assert_type(schedule.trainable_rows(Position(epoch=1)), Rows)
    assert_type(Rows.parse([1]).resolve(3), NDArray[np.int64])
    assert_type(Vocabulary(["a"]).tokens, tuple[str, ...])


def tables_in_keras(vectors: NDArray[np.float32]) -> None:
    """Keras publishes no types; what is named as in torch is typed as there."""
    table = in_keras.PartialEmbedding(10, 4, trainable_rows=[3], reserve_rows="all")
    assert_type(table.trainable_rows, NDArray[np.int64])
    assert_type(table.reserved_rows, NDArray[np.int64])
    table.set_trainable_rows(Rows.missing() | Rows.most_frequent(3))
    table.unfreeze_rows(range(5), lr_scale=0.5, warmup_steps=3)
    table.freeze_rows(np.array([True] * 10))
    table.reserve_rows({"most_frequent": 0.2})
    made = in_keras.PartialEmbedding.from_matrix(vectors, trainable_rows=slice(-2, None))
    assert_type(made, in_keras.PartialEmbedding)
    assert_type(in_keras.grow_table(None, "items", rows=2), list[int])
    in_keras.PartialEmbedding(10, 4, trainable_rows="al")  # type: ignore[arg-type]
    in_keras.PartialEmbedding(10, 4, reserve_rows=[0.5])  # type: ignore[list-item]
    table.unfreeze_rows("every")  # type: ignore[arg-type]
    in_keras.gradients.set_rows(None, 3, vectors)  # type: ignore[arg-type]
