"""What a table's `state_dict` holds, and what of it is loaded where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from partial_embedding.errors import InputError
from partial_embedding.torch.origin import Origin, SavedRows
from partial_embedding.torch.shared_rows import SharedRows

if TYPE_CHECKING:
    from partial_embedding.torch.table import PartialTable


class TableFiles(nn.Module):
    """A mix-in: a `state_dict` is the plain module's, or holds the rows that ever trained alone.

    What is loaded may be either; or whole, and from before the table grew.
    """

    if TYPE_CHECKING:  # jit.script reads annotations, and knows few
        row_parameters: ClassVar[tuple[str, ...]]
        _shared: SharedRows

    @property
    def origin(self) -> Origin | None:
        """What the table held before its rows trained, where that is remembered."""
        return self._shared.origin

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight, origin = self._parameters.get("weight"), self._shared.origin
        if self._shared.saves_rows and origin is not None and weight is not None:
            SavedRows.of(weight, origin).put_into(destination, f"{prefix}weight")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        name, weight = f"{prefix}weight", self._parameters.get("weight")
        if weight is not None and (saved := SavedRows.taken_from(state_dict, name)) is not None:
            origin = self._shared.origin or Origin(weight)
            saved.restore(weight, origin, name, self._shared.earlier_sizes)
            self._shared.origin = origin
            state_dict[name] = weight  # which torch then copies to itself, and does nothing
        elif name in state_dict:
            self._shared.origin = None  # what it held before is of no use for another table
        for attribute in self.row_parameters:
            self._load_before_growth(state_dict, f"{prefix}{attribute}", attribute)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _load_before_growth(self, state_dict: dict[str, Any], key: str, attribute: str) -> None:
        """Load what was saved before the table grew into the rows that it had then."""
        parameter, saved = self._parameters.get(attribute), state_dict.get(key)
        if parameter is None or not isinstance(saved, Tensor) or not saved.dim():
            return
        if len(saved) in self._shared.earlier_sizes and saved.shape[1:] == parameter.shape[1:]:
            with torch.no_grad():
                parameter[: len(saved)] = saved.to(parameter)
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
    weights = [table._shared for table in tables]
    before = [weight.saves_rows for weight in weights]
    for weight in weights:
        weight.saves_rows = True
    try:
        yield
    finally:
        for weight, saved_alone in zip(weights, before, strict=True):
            weight.saves_rows = saved_alone
