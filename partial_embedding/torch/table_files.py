"""What a table's `state_dict` holds, and what of it is loaded where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from partial_embedding.torch.origin import Origin, SavedRows
from partial_embedding.torch.shared_rows import SharedRows


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

    @property
    def saves_rows(self) -> bool:
        """Whether a `state_dict` holds the rows that ever trained in the place of all."""
        return self._shared.saves_rows

    @saves_rows.setter
    def saves_rows(self, alone: bool) -> None:
        self._shared.saves_rows = alone

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
