"""What makes a module's `weight` a partly trainable table: its row set and the gradient hook."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from partial_embedding.errors import InputError
from partial_embedding.rows import Rows
from partial_embedding.rows.vocabulary import Ids
from partial_embedding.schedule import RateScale
from partial_embedding.torch.origin import Origin, SavedRows
from partial_embedding.torch.rowset import RowSet, shown

# What exists only in a living module: it is made anew for a copy or an unpickled one.
_WIRING = ("_hooked", "_rate_checks", "_wrapper", "is_averaged")


@dataclass(eq=False)
class _Shared:
    """Which rows of a weight train: one object for all tables that have this weight.

    None stands for "every row but padding", for which no bookkeeping exists.
    """

    row_set: RowSet | None = None
    padding_row: int | None = None
    # What the weight held before its rows trained, where that is remembered, and whether a
    # `state_dict` then holds no more than the rows that did.
    origin: Origin | None = None
    saves_rows: bool = False
    # Called with the rows that train, before they move.
    before_training: list[Callable[[Tensor], None]] = field(default_factory=list)


class PartialTable(nn.Module):
    """A mix-in that freezes rows of `weight`, a parameter of shape (V, D).

    It stands before the module class that owns the weight. The row set is neither a parameter nor a
    buffer, so the `state_dict` is that of the plain module. It belongs to the weight, as
    `requires_grad` does: tables that are tied have one. Where one of them had frozen rows before
    they were tied, these are frozen in all.
    """

    weight: nn.Parameter

    # The parameters whose rows the row set is about.
    row_parameters: ClassVar[tuple[str, ...]] = ("weight",)

    _shared: _Shared
    _hooked: nn.Parameter | None = None
    _warned: bool = False

    # Whether the gradient of now is that of all processes, where `ddp.average` made it so.
    is_averaged: bool = False

    # Which rows train

    @property
    def trainable_rows(self) -> Tensor:
        """The ids of the rows that train, rising, int64, shape (K,)."""
        return self.row_set.ids.clone()

    def set_trainable_rows(self, rows: object, *, rate_scale: RateScale | None = None) -> None:
        """Train exactly these rows from the next step on.

        Rows that trained before and still do keep their optimizer state and their rate_scale; rows
        that join begin as if training had just started; rows that leave keep their values from here
        on.

        Args:
            rows: `"all"`, `"none"`, ids, a boolean mask of length V, a `range`, a `slice` or
                `Rows`. The padding row never trains, also when it is among them.
            rate_scale: How fast the rows learn that join, for as long as they train; None is the
                optimizer's own rate. A table that is made with `trainable_rows="none"` has no rows
                that trained before.

        Raises:
            InputError: The rows do not fit the table, or its optimizer cannot keep a rate_scale.

        Example:
            >>> from partial_embedding import Position, Schedule
            >>> from partial_embedding.torch import PartialEmbedding
            >>> stages = [{"step": 0, "rows": [7]}, {"step": 2, "rows": [2, 7], "lr_scale": 0.5}]
            >>> schedule, table = Schedule(stages), PartialEmbedding(10, 4, trainable_rows="none")
            >>> for step in range(3):
            ...     now = schedule.state_at(Position(step=step))
            ...     rows, rate_scale = schedule.rows_at(now), schedule.rate_scale_at(now)
            ...     table.set_trainable_rows(rows, rate_scale=rate_scale)
            ...     # … and the step of an optimizer that `rowwise` prepared
            >>> table.trainable_rows, list(table.rate_scales.values())
            (tensor([2, 7]), [RateScale(lr_scale=0.5, warmup_steps=0)])
        """
        self.set_trainable_ids(self._resolve(rows), rate_scale)

    def unfreeze_rows(self, rows: object, *, rate_scale: RateScale | None = None) -> None:
        """Train these rows too, as a cohort of their own.

        Args:
            rows: As for `set_trainable_rows`.
            rate_scale: Likewise.

        Raises:
            InputError: As for `set_trainable_rows`.
        """
        ids = np.union1d(self.row_set.ids.cpu().numpy(), self._resolve(rows))
        self.set_trainable_ids(ids, rate_scale)

    def freeze_rows(self, rows: object) -> None:
        """Stop training these rows; they lose their optimizer state.

        Args:
            rows: As for `set_trainable_rows`.

        Raises:
            InputError: The rows do not fit the table.
        """
        self.set_trainable_ids(np.setdiff1d(self.row_set.ids.cpu().numpy(), self._resolve(rows)))

    @property
    def _row_set(self) -> RowSet | None:
        return self._shared.row_set

    @_row_set.setter
    def _row_set(self, row_set: RowSet | None) -> None:
        self._shared.row_set = row_set
        if row_set is None:
            return
        if self._shared.origin is not None:
            self._shared.origin.include(self.weight, row_set.ids)
        for told in self._shared.before_training:
            told(row_set.ids)

    @property
    def row_set(self) -> RowSet:
        """The rows that train, by cohort, on the device of the weight."""
        weight, rows = self.weight, self._row_set
        # A meta device would forget the ids; they wait on the CPU until there is a real weight.
        device = torch.device("cpu") if weight.is_meta else weight.device
        if rows is not None and rows.num_rows == weight.shape[0] and rows.device == device:
            return rows
        self._row_set = self._row_set_for(weight.shape[0]).to(device)
        return self._row_set

    @row_set.setter
    def row_set(self, row_set: RowSet) -> None:
        self._row_set = row_set

    def _row_set_for(self, num_rows: int) -> RowSet:
        rows = self._row_set
        if rows is None:
            return RowSet(num_rows, {0: self._all_ids()}, 1)
        if rows.num_rows == num_rows:
            return rows
        # Whoever resized the vocabulary did so on the weight alone (transformers does).
        nothing_frozen = len(rows) == self._most_trainable(rows.num_rows)
        rows = rows.resized_to(num_rows)
        return rows.changed_to(self._all_ids().to(rows.device)) if nothing_frozen else rows

    @property
    def rate_scales(self) -> Mapping[int, RateScale]:
        """How fast cohorts learn, by number, where that is not the optimizer's own rate."""
        return {} if self._row_set is None else self.row_set.rate_scales

    @property
    def has_frozen_rows(self) -> bool:
        """Whether some row other than padding does not train."""
        if self._row_set is None:
            return False
        return len(self.row_set) < self._most_trainable(self.weight.shape[0])

    def _most_trainable(self, num_rows: int) -> int:
        return num_rows - (self._padding_row() is not None)

    def _all_ids(self) -> Tensor:
        # Named, since the default device may be the meta device, which would forget the ids.
        ids = torch.arange(self.weight.shape[0], device="cpu")
        return ids[ids != self._padding_row()] if self._padding_row() is not None else ids

    def _padding_row(self) -> int | None:
        # A head has none of its own, and may be tied to a table that has one.
        own: int | None = getattr(self, "padding_idx", None)
        return self._shared.padding_row if own is None else own

    def _resolve(self, rows: object) -> Ids:
        if isinstance(rows, Tensor):
            rows = rows.detach().cpu().numpy()
        return Rows.parse(rows).resolve(self.weight.shape[0])

    def set_trainable_ids(self, ids: Ids, rate_scale: RateScale | None = None) -> None:
        """Train exactly these rows, given as `Rows.resolve` gives them; there may be none.

        Args:
            ids: Sorted ids without duplicates, int64, shape (K,).
            rate_scale: How fast the rows learn that join.

        Raises:
            InputError: The table's optimizer cannot keep the rate_scale.
        """
        self.check_rate_scale(rate_scale)
        ids = ids[ids != self._padding_row()]
        if self._row_set is None and len(ids) == self._most_trainable(self.weight.shape[0]):
            return  # every row trains already, with no bookkeeping to keep
        if self._row_set is None:
            # Those that stay are the first cohort. All rows, which leave, are not written down.
            of_first = {0: torch.tensor(ids, device="cpu")}
            self.row_set = RowSet(self.weight.shape[0], of_first, 1)
            return
        before = self.row_set
        self.row_set = before.changed_to(torch.tensor(ids, device=before.device), rate_scale)

    def check_rate_scale(self, rate_scale: RateScale | None) -> None:
        """Refuse a rate_scale that the table's optimizer cannot keep.

        Args:
            rate_scale: How fast rows would learn.

        Raises:
            InputError: It is none, or the optimizer cannot keep it.
        """
        if rate_scale is not None and not isinstance(rate_scale, RateScale):
            raise InputError(
                "a rate_scale is a partial_embedding.schedule.RateScale. "
                f"Received: {rate_scale!r}. Write "
                "RateScale(lr_scale=0.5), for example."
            )
        if rate_scale is None:
            return
        for table in {self, *_tables_with(self.weight)}:
            for answer in table.__dict__.get("_rate_checks", {}).values():
                if (check := answer()) is not None:
                    check(rate_scale)

    # The gradient hook, and all that can make a hook disappear

    def _wire(self) -> None:
        """Hook the gradient of what is now `weight`, and no longer that of what was."""
        weight = self._parameters.get("weight")
        if weight is None:
            return
        rows = self.__dict__.setdefault("_shared", _Shared())
        if self._hooked is not None and self._hooked is not weight:
            self._unhook()
            # No longer tied to whoever has the old weight.
            rows = self.__dict__["_shared"] = replace(rows, padding_row=None, origin=None)
        rows.padding_row = self._padding_row()
        for other in _tables_with(weight):
            if other is not self:
                self._share_rows_with(other)
        self._hook_up(weight)

    def take_weight(self) -> None:
        """Begin to freeze rows: for a module whose class was changed after it was made."""
        self._wire()

    def leave_weight(self) -> None:
        """Stop freezing rows: for a module whose class is about to be changed back."""
        self._unhook()
        for name in ("_shared", "_warned", *_WIRING):
            self.__dict__.pop(name, None)

    def _share_rows_with(self, other: PartialTable) -> None:
        if self.has_frozen_rows and not other.has_frozen_rows:
            other.row_set = self.row_set
        padding, self.__dict__["_shared"] = self._padding_row(), other._shared
        if padding is not None:
            other._shared.padding_row = padding
        if (rows := other._row_set) is not None:
            other.row_set = rows.changed_to(rows.ids[rows.ids != other._padding_row()])

    def _check_tie(self, weight: nn.Parameter | None) -> None:
        own = self._parameters.get("weight")
        if weight is None or own is None or not self.has_frozen_rows:
            return
        for other in _tables_with(weight):
            ids = self.trainable_rows
            if other.has_frozen_rows and not torch.equal(ids, other.trainable_rows.to(ids.device)):
                raise InputError(
                    "tables that are tied train the same rows. Received a "
                    f"{type(other).__name__} that trains {shown(other.trainable_rows)} and a "
                    f"{type(self).__name__} that trains {shown(ids)}. Set both alike."
                )

    def _unhook(self) -> None:
        if self._hooked is not None:
            for hook in self._hooks_on(self._hooked):
                hook.detach()

    def _hook_up(self, weight: nn.Parameter) -> None:
        if not (weight.is_floating_point() or weight.is_complex()):
            return
        if not self._hooks_on(weight):
            # A tensor takes a hook only while it requires gradients, and keeps it when it does not.
            requires_grad = weight.requires_grad
            weight.requires_grad_(True)
            # A weak reference: the weight may outlive the module, and must not keep it alive.
            hook = _DropFrozenRows(weakref.ref(self))
            hook.handle = weight.register_hook(hook)
            weight.requires_grad_(requires_grad)
        # Past nn.Module's own way of setting attributes, which would register a parameter.
        self.__dict__["_hooked"] = weight

    def _hooks_on(self, weight: nn.Parameter) -> list[_DropFrozenRows]:
        return [hook for hook in _hooks_of(weight) if hook.table() is self]

    def _weight_in_use(self) -> Tensor | None:
        """A masked stand-in for a weight that is not the module's own, or None.

        `torch.func.functional_call` puts other tensors in the place of the parameters for one call.
        """
        weight: Tensor = self.weight
        if weight is self._hooked:
            return None
        if isinstance(weight, nn.Parameter):
            # Perhaps for this one call, so what was hooked before stays so: its backward may come.
            self._hook_up(weight)
            return None
        if not self.has_frozen_rows:
            return None
        return torch.where(self.row_set.mask.unsqueeze(-1), weight, weight.detach())

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Hook a new weight; torch's own way of setting an attribute comes by here too.

        Args:
            name: The parameter's name.
            param: The parameter.

        Raises:
            InputError: It is the weight of a table that trains other rows.
        """
        if name == "weight":
            self._check_tie(param)
        super().register_parameter(name, param)
        if name == "weight":
            self._wire()

    # What a file holds

    @property
    def origin(self) -> Origin | None:
        """What the table held before its rows trained, where that is remembered."""
        return self._shared.origin

    def remember_origin(self) -> None:
        """Remember, from here on, what rows hold before they train."""
        if self._shared.origin is None:
            origin = self._shared.origin = Origin(self.weight)
            every = self._row_set is None
            origin.include(self.weight, self._all_ids() if every else self.row_set.ids)

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
        if self._shared.saves_rows and self._shared.origin is not None:
            saved = SavedRows.of(self.weight, self._shared.origin)
            saved.put_into(destination, f"{prefix}weight")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        name = f"{prefix}weight"
        if (saved := SavedRows.taken_from(state_dict, name)) is not None:
            origin = self._shared.origin or Origin(self.weight)
            saved.restore(self.weight, origin, name)
            self._shared.origin = origin
            state_dict[name] = self.weight  # which torch then copies to itself, and does nothing
        elif name in state_dict:
            self._shared.origin = None  # what it held before is of no use for another table
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _WIRING}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's own
        self._wire()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        self._wire()
        return self

    def extra_repr(self) -> str:
        """The plain module's description, and how many rows train."""
        every = self._most_trainable(self.weight.shape[0])  # counted without making bookkeeping
        count = every if self._row_set is None else len(self.row_set)
        return f"{super().extra_repr()}, trainable_rows={count}"


def tables_in(model: nn.Module) -> Iterator[tuple[str, PartialTable]]:
    """The tables of a model with their names; of those that are tied, only the first.

    Args:
        model: Any module.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, PartialTable) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            yield name, module


def _hooks_of(weight: nn.Parameter) -> list[_DropFrozenRows]:
    hooks = list((weight._backward_hooks or {}).values())
    return [hook for hook in hooks if isinstance(hook, _DropFrozenRows)]


def _tables_with(weight: nn.Parameter) -> Iterator[PartialTable]:
    for hook in _hooks_of(weight):
        table = hook.table()
        if table is not None and table._parameters.get("weight") is weight:
            yield table


class _DropFrozenRows:
    """The gradient hook: frozen rows leave a sparse gradient and are zero in a dense one."""

    handle: torch.utils.hooks.RemovableHandle

    def __init__(self, table: weakref.ref[PartialTable]) -> None:
        self.table = table

    def detach(self) -> None:
        """Take the hook off its weight."""
        self.handle.remove()

    def __call__(self, grad: Tensor | None) -> Tensor | None:
        owner = self.table()
        if owner is not None:
            owner.is_averaged = False
        if grad is None or owner is None or not owner.has_frozen_rows:
            return grad  # autograd may hand a hook None
        rows = owner.row_set.to(grad.device)
        if grad.layout == torch.sparse_coo:
            # Not coalesced: that would sort all ids, and change the order of the sums.
            ids, values = grad._indices(), grad._values()
            kept = rows.is_trainable(ids[0]).nonzero().flatten()
            if len(kept) == ids.shape[1]:
                return grad
            return torch.sparse_coo_tensor(
                ids.index_select(1, kept),
                values.index_select(0, kept),
                grad.shape,
                check_invariants=False,
            )
        # Selected, not multiplied: inf * 0 is NaN.
        return torch.where(rows.mask.unsqueeze(-1), grad, grad.new_zeros(()))


def _warn_of_drift(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Warn once of an optimizer that moves frozen rows; runs before every step of every one."""
    served = getattr(getattr(optimizer, "_rowwise", None), "tables", ())
    hooks = (
        hook
        for group in optimizer.param_groups
        for param in group["params"]
        if id(param) not in served
        for hook in _hooks_of(param)
    )
    for hook in hooks:
        table = hook.table()
        if table is not None and table.has_frozen_rows and not table._warned:
            table._warned = True
            warnings.warn(
                f"{type(optimizer).__name__} steps a {type(table).__name__} whose frozen rows have "
                "zero gradients, but weight decay, momentum and the like still move them. Call "
                "partial_embedding.torch.rowwise(optimizer, model) once, or add the RowUnfreezing "
                "callback to the Trainer.",
                stacklevel=4,
            )


# Once for the process: a hook for each table would be removed while torch iterates over them.
register_optimizer_step_pre_hook(_warn_of_drift)
