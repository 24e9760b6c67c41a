"""The parameters of which only rows train: weights of tables, and the biases of heads."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from partial_embedding.schedule import RateScale
from partial_embedding.torch.rowset import RowSet
from partial_embedding.torch.table import PartialTable


@dataclass(eq=False)
class RowParameter:
    """A parameter with one entry, or row, for each row of a table, such as the bias of a head.

    Args:
        table: The table whose row set counts.
        attribute: The parameter's name in it.
    """

    table: PartialTable
    attribute: str

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, shape (V, …)."""
        parameter: nn.Parameter = getattr(self.table, self.attribute)
        return parameter

    @property
    def row_set(self) -> RowSet:
        """The rows that train."""
        return self.table.row_set

    @row_set.setter
    def row_set(self, row_set: RowSet) -> None:
        self.table.row_set = row_set

    def ask_about_rates(self, check: Callable[[RateScale], None] | None) -> None:
        """Ask an optimizer, for as long as it exists, before rows get a rate_scale.

        Args:
            check: A method that raises where it cannot keep the rate_scale; None asks no more.
        """
        checks = self.table.__dict__.setdefault("_rate_checks", {})
        checks.pop(self.attribute, None)
        if check is not None:
            checks[self.attribute] = weakref.WeakMethod(check)


def row_parameters_in(model: nn.Module) -> Iterator[tuple[str, RowParameter]]:
    """The parameters of a model of which only rows train, each once, with names for messages.

    Args:
        model: Any module.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        for attribute in module.row_parameters if isinstance(module, PartialTable) else ():
            parameter = getattr(module, attribute)
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                named = name if attribute == "weight" else f"{name}.{attribute}".lstrip(".")
                yield named, RowParameter(module, attribute)
