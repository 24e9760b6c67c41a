"""What a table's `state_dict` holds, and what of it is loaded where.

It is the plain module's, or holds the rows that ever trained alone. What is loaded may be either;
or whole, and from before the table grew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from partial_embedding.errors import InputError
from partial_embedding.torch.origin import Origin, SavedRows
from partial_embedding.torch.trainable_rows import TrainableRows


def leave_rows_alone(table: TrainableRows, state_dict: dict[str, Any], prefix: str) -> None:
    """Let a `state_dict` hold no more of a table than the rows that ever trained, if known."""
    weight, origin = state_dict.get(f"{prefix}weight"), table._shared.origin
    if weight is not None and origin is not None:
        SavedRows.of(weight, origin).put_into(state_dict, f"{prefix}weight")


def load_rows_alone(table: TrainableRows, state_dict: dict[str, Any], prefix: str) -> None:
    """Load what torch could not, and let it find the parameter itself in the place of that."""
    name, weight = f"{prefix}weight", table._parameters.get("weight")
    shared = table._shared
    if weight is not None and (saved := SavedRows.taken_from(state_dict, name)) is not None:
        origin = shared.origin or Origin(weight)
        saved.restore(weight, origin, name, shared.earlier_sizes)
        shared.origin = origin
        state_dict[name] = weight  # which torch then copies to itself, and does nothing
    elif name in state_dict:
        shared.origin = None  # what it held before is of no use for another table
    for attribute in table.row_parameters:
        key, parameter = f"{prefix}{attribute}", table._parameters.get(attribute)
        whole = state_dict.get(key)
        if parameter is None or not isinstance(whole, Tensor) or not whole.dim():
            continue
        # From before the table grew: into the rows that it had then.
        if len(whole) in shared.earlier_sizes and whole.shape[1:] == parameter.shape[1:]:
            with torch.no_grad():
                parameter[: len(whole)] = whole.to(parameter)
            state_dict[key] = parameter


# What a checkpoint holds


def check_checkpoint(checkpoint: object) -> str:
    """What a checkpoint is to hold of a table, `"table"` or `"rows"`; refuses all else."""
    if checkpoint not in ("table", "rows"):
        raise InputError(
            f"checkpoint is what of a table it holds, 'table' or 'rows'. Received: {checkpoint!r}. "
            "Take one of these."
        )
    return str(checkpoint)


def remember_origins(
    tables: Mapping[str, TrainableRows], say: Callable[[str], Any], *, resumed: bool
) -> None:
    """Remember of tables, from here on, what their rows hold before they train.

    Args:
        tables: Tables by name, as they are before the first step.
        say: What takes a line for a table that is saved whole.
        resumed: Whether a checkpoint was loaded just now. Where that held a table whole, it is not
            known what another process will find in its place.
    """
    for name, table in tables.items():
        if resumed and table._shared.origin is None:
            say(f"{name}: saved whole, as in the checkpoint that this run goes on from")
        else:
            table.remember_origin()


@contextmanager
def rows_saved_alone(tables: Iterable[TrainableRows]) -> Iterator[None]:
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
    with ExitStack() as undo:
        for table in tables:
            shared = table._shared
            undo.callback(setattr, shared, "saves_rows", shared.saves_rows)
            shared.saves_rows = True
        yield
