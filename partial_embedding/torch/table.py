"""What makes a module's `weight` a partly trainable table: its row set, and hooks on the weight."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from partial_embedding.errors import InputError
from partial_embedding.rows import Rows
from partial_embedding.rows.rows import RowsLike
from partial_embedding.rows.vocabulary import Ids
from partial_embedding.schedule import RateScale
from partial_embedding.torch.engines import lost_weight, refuse_flat
from partial_embedding.torch.hooks import RowHook, hooks_on, tables_of
from partial_embedding.torch.origin import Origin
from partial_embedding.torch.rowset import RowSet, shown
from partial_embedding.torch.shards import check_sharding, is_lent, is_sharded
from partial_embedding.torch.shared_rows import SharedRows
from partial_embedding.torch.table_files import TableFiles
from partial_embedding.torch.unheld import await_a_step, no_longer_await

# What exists only in a living module: it is made anew for a copy or an unpickled one.
_WIRING = ("_averaged", "_hooked", "_shards", "_steppers", "awaits_average")


class Stepper(Protocol):
    """What steps a table's rows, and is asked before they get a rate of their own."""

    def check_rate_scale(self, rate_scale: RateScale) -> None:
        """Refuse what it cannot keep.

        Args:
            rate_scale: How fast rows would learn.
        """


class PartialTable(TableFiles):
    """A mix-in that freezes rows of `weight`, a parameter of shape (V, D).

    It stands before the module class that owns the weight. The row set is neither a parameter nor a
    buffer, so the `state_dict` is that of the plain module. It belongs to the weight, as
    `requires_grad` does: tables that are tied have one. Where one of them had frozen rows before
    they were tied, these are frozen in all.
    """

    if TYPE_CHECKING:  # jit.script reads annotations, and knows few
        weight: nn.Parameter
        _shared: SharedRows
        _hooked: Mapping[str, nn.Parameter]
        _shards: Mapping[str, nn.Parameter]

    # The parameters with an entry for each row.
    row_parameters: ClassVar[tuple[str, ...]] = ("weight",)

    # Whether backward left a gradient here since `ddp.average` last made it that of all processes.
    awaits_average = False

    # Whether the table was made by copying another, as teachers and references are, and no rows of
    # it were set since: nobody has said that it is to train.
    is_copy = False

    _hooked = MappingProxyType({})

    # The row parameters of which this process has some rows. While a pass runs FSDP2 puts whole
    # ones in their places, which are not what is stepped, saved or looked at.
    _shards = MappingProxyType({})

    # Nor can it make anything of these.
    __jit_unused_properties__ = (
        "trainable_rows",
        "row_set",
        "_row_set",
        "rate_scales",
        "has_frozen_rows",
        "padding_row",
        "leaf_weight",
        "has_leaf_weight",
        "is_sharded",
        "new_rows",
        "earlier_sizes",
        "origin",
        "saves_rows",
    )

    # Which rows train

    @property
    def trainable_rows(self) -> Tensor:
        """The ids of the rows that train, rising, int64, shape (K,)."""
        return self.row_set.ids.clone()

    def set_trainable_rows(
        self, rows: RowsLike, *, lr_scale: float = 1.0, warmup_steps: int = 0
    ) -> None:
        """Train exactly these rows from the next step on.

        Rows that trained before and still do keep their optimizer state and their rate; rows that
        join begin as if training had just started; rows that leave keep their values from here on.

        Args:
            rows: `"all"`, `"none"`, ids, a boolean mask of length V, a `range`, a `slice` or
                `Rows`. The padding row never trains, also when it is among them.
            lr_scale: What the optimizer's rate is multiplied by for the rows that join, for as long
                as they train. A table that is made with `trainable_rows="none"` has no rows that
                trained before.
            warmup_steps: The steps in which their rate rises to that; 0 for none.

        Raises:
            InputError: The rows do not fit the table, or its optimizer cannot keep such a rate.

        Example:
            >>> from partial_embedding.torch import PartialEmbedding
            >>> table = PartialEmbedding(10, 4, trainable_rows=[7])
            >>> table.set_trainable_rows([2, 7], lr_scale=0.5)
            >>> table.trainable_rows, list(table.rate_scales.values())
            (tensor([2, 7]), [RateScale(lr_scale=0.5, warmup_steps=0)])
        """
        self.set_trainable_ids(self._resolve(rows), RateScale(lr_scale, warmup_steps))

    def unfreeze_rows(
        self, rows: RowsLike, *, lr_scale: float = 1.0, warmup_steps: int = 0
    ) -> None:
        """Train these rows too, as a cohort of their own.

        Args:
            rows: As for `set_trainable_rows`.
            lr_scale: Likewise.
            warmup_steps: Likewise.

        Raises:
            InputError: As for `set_trainable_rows`.
        """
        ids = np.union1d(self.row_set.ids.cpu().numpy(), self._resolve(rows))
        self.set_trainable_ids(ids, RateScale(lr_scale, warmup_steps))

    def freeze_rows(self, rows: RowsLike) -> None:
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
        await_a_step(self)
        if self._shared.origin is not None:
            self._shared.origin.include(self.leaf_weight, row_set.ids)
        for told in self._shared.before_training:
            told(row_set.ids)

    @property
    def row_set(self) -> RowSet:
        """The rows that train, by cohort, on the device of the weight."""
        weight, rows = self.leaf_weight, self._row_set
        # A meta device would forget the ids; they wait on the CPU until there is a real weight.
        device = torch.device("cpu") if weight.is_meta else weight.device
        if rows is not None and rows.num_rows == weight.shape[0] and rows.device == device:
            return rows
        refuse_flat(weight, self)
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
        return len(self.row_set) < self._most_trainable(self.leaf_weight.shape[0])

    @property
    def new_rows(self) -> Ids | None:
        """The rows by which the table grew last, sorted, or None."""
        return self._shared.new_rows

    @property
    def earlier_sizes(self) -> tuple[int, ...]:
        """How many rows there were each time before the table grew."""
        return self._shared.earlier_sizes

    def note_growth(self, earlier_size: int, new_rows: Ids) -> None:
        """Know that rows were added.

        Args:
            earlier_size: How many rows there were before; as many as now, where rows that were
                there already got a meaning.
            new_rows: The rows that are new, sorted, int64.
        """
        if earlier_size != self.leaf_weight.shape[0]:
            self._shared.earlier_sizes += (earlier_size,)
        self._shared.new_rows = new_rows

    def _most_trainable(self, num_rows: int) -> int:
        # While a graph is traced the size of an axis is a tensor, which takes no bool away.
        return num_rows - int(self.padding_row is not None)

    def _all_ids(self) -> Tensor:
        # Named, since the default device may be the meta device, which would forget the ids.
        ids = torch.arange(self.leaf_weight.shape[0], device="cpu")
        return ids[ids != self.padding_row] if self.padding_row is not None else ids

    @property
    def padding_row(self) -> int | None:
        """The row that never trains, if there is one."""
        # A head has none of its own, and may be tied to a table that has one.
        own: int | None = getattr(self, "padding_idx", None)
        return self._shared.padding_row if own is None else own

    def _resolve(self, rows: RowsLike) -> Ids:
        refuse_flat(self.leaf_weight, self)
        if isinstance(rows, Tensor):
            rows = rows.detach().cpu().numpy()
        return Rows.parse(rows).resolve(self.leaf_weight.shape[0], new=self._shared.new_rows)

    def set_trainable_ids(self, ids: Ids, rate_scale: RateScale | None = None) -> None:
        """Train exactly these rows, given as `Rows.resolve` gives them; there may be none.

        Args:
            ids: Sorted ids without duplicates, int64, shape (K,).
            rate_scale: How fast the rows learn that join.

        Raises:
            InputError: The table's optimizer cannot keep the rate_scale, or its weight is sharded
                in a way that cannot be served.
        """
        self.check_rate_scale(rate_scale)
        self.__dict__["is_copy"] = False  # past nn.Module, which looks for parameters
        ids = ids[ids != self.padding_row]
        for parameter in self._shards.values():
            check_sharding(parameter, self)
        if self._row_set is None and len(ids) == self._most_trainable(self.leaf_weight.shape[0]):
            return  # every row trains already, with no bookkeeping to keep
        if self._row_set is None:
            # Those that stay are the first cohort. All rows, which leave, are not written down.
            of_first = {0: torch.tensor(ids, device="cpu")}
            self.row_set = RowSet(self.leaf_weight.shape[0], of_first, 1)
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
        for table in {self, *tables_of(self.leaf_weight)}:
            for stepper in table.__dict__.get("_steppers", ()):
                stepper.check_rate_scale(rate_scale)

    def stepped_by(self, stepper: Stepper) -> None:
        """Ask an optimizer, for as long as it exists, before rows get a rate of their own.

        Args:
            stepper: What steps the rows.
        """
        # By a weak reference: a table does not keep its optimizers alive.
        self.__dict__.setdefault("_steppers", weakref.WeakSet()).add(stepper)

    def no_longer_stepped_by(self, stepper: Stepper) -> None:
        """Ask it no more.

        Args:
            stepper: What `stepped_by` was given.
        """
        self.__dict__.get("_steppers", weakref.WeakSet()).discard(stepper)

    # The hooks, and all that can make a hook disappear

    @property
    def leaf_weight(self) -> nn.Parameter:
        """The parameter that `weight` is, or that it is computed from.

        Pruning and parametrizations, such as `spectral_norm`, put the parameter aside.

        Raises:
            InputError: There is none with the same rows.
        """
        weight = self._find_leaf_weight()
        if weight is None:
            raise lost_weight(self)
        return weight

    @property
    def has_leaf_weight(self) -> bool:
        """Whether there is one parameter with the rows of the weight."""
        return self._find_leaf_weight() is not None

    def _find_leaf_weight(self) -> nn.Parameter | None:
        for weight in (self._shards.get("weight"), self._parameters.get("weight")):
            if weight is not None:
                return weight
        if (computed := self._modules.get("parametrizations")) is not None:
            return computed._modules["weight"]._parameters.get("original")  # type: ignore[union-attr]
        return self._parameters.get("weight_orig")

    def owns(self, parameter: nn.Parameter | None) -> bool:
        """Whether a parameter is one of those with an entry for each row, now.

        Args:
            parameter: Any parameter.
        """
        own = [self.row_parameter(name) for name in self.row_parameters]
        if self._shards:
            own += [self._parameters.get(name) for name in self.row_parameters]
        return parameter is not None and any(parameter is one for one in own)

    def row_parameter(self, name: str) -> nn.Parameter | None:
        """The parameter that one of `row_parameters` names, if there is one."""
        if name == "weight":
            return self.leaf_weight
        return self._shards.get(name, self._parameters.get(name))

    @property
    def is_sharded(self) -> bool:
        """Whether this process has some rows of the weight only."""
        return "weight" in self._shards

    def _wire(self) -> None:
        """Hook the gradient of what is now `weight`, and no longer that of what was."""
        if not any(self._parameters.get(n) is not None for n in ("weight", "weight_orig")):
            return
        self._find_shards()
        weight = self.leaf_weight
        rows = self.__dict__.setdefault("_shared", SharedRows())
        before = self._hooked.get("weight", weight)
        for name in self.row_parameters:
            if name in self._hooked and self._hooked[name] is not self.row_parameter(name):
                self._unhook(name)
        if before is not weight:
            # No longer tied to whoever has the old weight.
            rows = self.__dict__["_shared"] = replace(rows, padding_row=None, origin=None)
        rows.padding_row = self.padding_row
        for other in list(tables_of(weight)):
            if other is not self:
                self._share_rows_with(other)
        for name in self.row_parameters:
            if (parameter := self.row_parameter(name)) is not None:
                self._hook_up(name, parameter)
        if rows.row_set is not None and not self.is_copy:
            await_a_step(self)

    def attach(self) -> None:
        """Begin to freeze rows: for a module whose class was changed after it was made."""
        self._wire()

    def detach(self) -> None:
        """Stop freezing rows: for a module whose class is about to be changed back."""
        for name in list(self._hooked):
            self._unhook(name)
        for name in ("_shared", *_WIRING):
            self.__dict__.pop(name, None)
        no_longer_await(self)

    def _share_rows_with(self, other: PartialTable) -> None:
        if self.has_frozen_rows and not other.has_frozen_rows:
            other.row_set = self.row_set
        padding, self.__dict__["_shared"] = self.padding_row, other._shared
        if padding is not None:
            other._shared.padding_row = padding
        if (rows := other._row_set) is not None:
            other.row_set = rows.changed_to(rows.ids[rows.ids != other.padding_row])

    def _check_tie(self, weight: nn.Parameter | None) -> None:
        own = self._parameters.get("weight")
        if weight is None or own is None or not self.has_frozen_rows:
            return
        for other in tables_of(weight):
            ids = self.trainable_rows
            if other.has_frozen_rows and not torch.equal(ids, other.trainable_rows.to(ids.device)):
                raise InputError(
                    "tables that are tied train the same rows. Received a "
                    f"{type(other).__name__} that trains {shown(other.trainable_rows)} and a "
                    f"{type(self).__name__} that trains {shown(ids)}. Set both alike."
                )

    def _find_shards(self) -> None:
        found = {
            name: parameter
            for name in self.row_parameters
            if (parameter := self._parameters.get(name)) is not None and is_sharded(parameter)
        }
        if found or self._shards:
            for parameter in found.values() if self.has_frozen_rows else ():
                check_sharding(parameter, self)
            self.__dict__["_shards"] = found

    def _unhook(self, name: str) -> None:
        self._take_hooks_off(self._hooked[name])
        self._set_hooked({key: value for key, value in self._hooked.items() if key != name})

    def _take_hooks_off(self, parameter: nn.Parameter) -> None:
        for hook in self._hooks_on(parameter):
            hook.remove()

    def _hook_up(self, name: str, parameter: nn.Parameter) -> None:
        if not (parameter.is_floating_point() or parameter.is_complex()):
            return
        if not self._hooks_on(parameter):
            RowHook(self, parameter)
        self._set_hooked({**self._hooked, name: parameter})

    def _set_hooked(self, hooked: Mapping[str, nn.Parameter]) -> None:
        # Past nn.Module's own way of setting attributes.
        self.__dict__["_hooked"] = hooked

    def _hooks_on(self, parameter: nn.Parameter) -> list[RowHook]:
        return [hook for hook in hooks_on(parameter) if hook.is_of(self)]

    def _weight_in_use(self) -> Tensor | None:
        """A masked stand-in for a weight that is not the module's own parameter, or None.

        `torch.func.functional_call` puts other tensors in the place of the parameters for one call,
        and pruning computes the weight.
        """
        # Not `self.weight`, which a graph that is traced would hold as a step of its own, and which
        # some parametrizations change each time that it is read.
        weight = self._parameters.get("weight")
        if weight is not None and (weight is self._hooked.get("weight") or self.is_sharded):
            return None
        if isinstance(weight, nn.Parameter) and torch.compiler.is_exporting():
            return None  # nothing is trained in a graph
        if isinstance(weight, nn.Parameter):
            # Perhaps for this one call, so what was hooked before stays so: its backward may come.
            self._hook_up("weight", weight)
            return None
        if not self.has_frozen_rows:
            return None
        if weight is None and not self._hooks_on(self.leaf_weight):
            self._hook_up("weight", self.leaf_weight)  # a copy, which parametrizations make alone
        in_use: Tensor = self.weight
        return torch.where(self.row_set.mask.unsqueeze(-1), in_use, in_use.detach())

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Hook a new weight; torch's own way of setting an attribute comes by here too.

        Args:
            name: The parameter's name.
            param: The parameter.

        Raises:
            InputError: It is the weight of a table that trains other rows.
        """
        shard = self._shards.get(name)
        if shard is not None and param is not None and is_lent(param, shard, self):
            super().register_parameter(name, param)
            if not self._hooks_on(param):
                RowHook(self, param)  # which is the same one in each pass
            return
        if name == "weight":
            self._check_tie(param)
        super().register_parameter(name, param)
        if name in self.row_parameters:
            self._wire()

    def remember_origin(self) -> None:
        """Remember, from here on, what rows hold before they train; see `TableFiles`.

        Raises:
            InputError: Processes share the table.
        """
        if self.is_sharded:
            raise InputError(
                "rows are saved alone of a table that is whole in each process. Received a "
                f"{type(self).__name__} whose weight is sharded. Save it whole, with "
                "checkpoint='table'."
            )
        if self._shared.origin is None:
            origin = self._shared.origin = Origin(self.leaf_weight)
            every = self._row_set is None
            origin.include(self.leaf_weight, self._all_ids() if every else self.row_set.ids)

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 puts its shards past `register_parameter` where this is nn.Module's own method.
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _WIRING}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's own
        self.__dict__["is_copy"] = True
        self._wire()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # torch swaps the insides of sharded parameters, and refuses it where a hook refers to one.
        tied: list[PartialTable] = []
        for shard in self._shards.values():
            tied += tables_of(shard)
            for table in tied:
                table._take_hooks_off(shard)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        self._wire()
        for table in tied:
            table._wire()
        return self

    def extra_repr(self) -> str:
        """The plain module's description, and how many rows train."""
        every = self._most_trainable(self.leaf_weight.shape[0])  # counted without bookkeeping
        count = every if self._row_set is None else len(self.row_set)
        return f"{super().extra_repr()}, trainable_rows={count}"


def tables_in(model: nn.Module) -> Iterator[tuple[str, PartialTable]]:
    """The tables of a model with their names; of those that are tied, only the first.

    Args:
        model: Any module.
    """
    for name, table, parameter in row_parameters_in(model):
        if parameter is table.leaf_weight:
            yield name, table


def row_parameters_in(model: nn.Module) -> Iterator[tuple[str, PartialTable, nn.Parameter]]:
    """The parameters of a model of which only rows train, each once, with names for messages.

    Args:
        model: Any module.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        for attribute in module.row_parameters if isinstance(module, PartialTable) else ():
            parameter = module.row_parameter(attribute)
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                named = name if attribute == "weight" else f"{name}.{attribute}".lstrip(".")
                yield named, module, parameter
