"""A `state_dict` that holds the rows that trained instead of their tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from partial_embedding.torch.table import tables_in


def remember_origins(model: nn.Module) -> None:
    """Remember of all tables, from here on, what their rows hold before they train.

    Args:
        model: The model, as it is before the first step.
    """
    for _, table in tables_in(model):
        table.remember_origin()


@contextmanager
def rows_saved_alone(model: nn.Module) -> Iterator[None]:
    """Within it, a `state_dict` holds of each table the rows that ever trained, and no others.

    Loaded into the table as it was when `remember_origins` was called, in this process or another,
    they make it what it was when it was saved; into any other it is refused. A table whose origin
    is not known is saved whole.

    Args:
        model: The model.

    Example:
        >>> import torch
        >>> from partial_embedding.torch import PartialEmbedding
        >>> vectors = torch.randn(1000, 4)
        >>> table = PartialEmbedding.from_pretrained(vectors.clone(), trainable_rows=[7])
        >>> remember_origins(table)
        >>> table.weight.data[7] = 1.0  # as training would
        >>> with rows_saved_alone(table):
        ...     saved = table.state_dict()
        >>> {key: tuple(value.shape) for key, value in saved.items()}
        {'weight.ids': (1,), 'weight.rows': (1, 4), 'weight.others': (3,)}
        >>> again = PartialEmbedding.from_pretrained(vectors.clone())
        >>> again.load_state_dict(saved)
        <All keys matched successfully>
        >>> torch.equal(again.weight, table.weight)
        True
    """
    tables = [table for _, table in tables_in(model)]
    before = [table.saves_rows for table in tables]
    for table in tables:
        table.saves_rows = True
    try:
        yield
    finally:
        for table, saved_alone in zip(tables, before, strict=True):
            table.saves_rows = saved_alone
