"""A `state_dict` that holds the rows that trained instead of their tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from partial_embedding.errors import InputError
from partial_embedding.torch.table import PartialTable


def check_checkpoint(checkpoint: object) -> str:
    """What a checkpoint is to hold of a table, `"table"` or `"rows"`; refuses all else."""
    if checkpoint not in ("table", "rows"):
        raise InputError(
            f"checkpoint is what of a table it holds, 'table' or 'rows'. Received: {checkpoint!r}. "
            "Take one of these."
        )
    return str(checkpoint)


def remember_origins(
    tables: Mapping[str, PartialTable], say: Callable[[str], Any], *, resumed: bool
) -> None:
    """Remember of tables, from here on, what their rows hold before they train.

    Args:
        tables: Tables by name, as they are before the first step.
        say: What takes a line for a table that is saved whole.
        resumed: Whether a checkpoint was loaded just now. Where that held a table whole, it is not
            known what another process will find in its place.
    """
    for name, table in tables.items():
        if resumed and table.origin is None:
            say(f"{name}: saved whole, as in the checkpoint that this run goes on from")
        else:
            table.remember_origin()


@contextmanager
def rows_saved_alone(tables: Iterable[PartialTable]) -> Iterator[None]:
    """Within it, a `state_dict` holds of each table the rows that ever trained, and no others.

    Loaded into the table as it was when its origin was remembered, in this process or another, they
    make it what it was when it was saved; into any other they are refused. A table whose origin is
    not known is saved whole.

    Args:
        tables: The tables.

    Example:
        >>> import torch
        >>> from partial_embedding.torch import PartialEmbedding
        >>> vectors = torch.randn(1000, 4)
        >>> table = PartialEmbedding.from_pretrained(vectors.clone(), trainable_rows=[7])
        >>> table.remember_origin()
        >>> table.weight.data[7] = 1.0  # as training would
        >>> with rows_saved_alone([table]):
        ...     saved = table.state_dict()
        >>> {key: tuple(value.shape) for key, value in saved.items()}
        {'weight.ids': (1,), 'weight.rows': (1, 4), 'weight.others': (3,)}
        >>> again = PartialEmbedding.from_pretrained(vectors.clone())
        >>> again.load_state_dict(saved)
        <All keys matched successfully>
        >>> torch.equal(again.weight, table.weight)
        True
    """
    tables = list(tables)
    before = [table.saves_rows for table in tables]
    for table in tables:
        table.saves_rows = True
    try:
        yield
    finally:
        for table, saved_alone in zip(tables, before, strict=True):
            table.saves_rows = saved_alone
