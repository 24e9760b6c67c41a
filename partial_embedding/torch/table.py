"""What makes a module's `weight` a partly trainable table: hooks on it, wherever it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from partial_embedding.errors import InputError
from partial_embedding.torch.hooks import (
    RowHook,
    close_passage,
    goes_by_rows,
    hooks_on,
)
from partial_embedding.torch.rowset import shown
from partial_embedding.torch.shards import check_sharding, is_lent, is_sharded
from partial_embedding.torch.shared_rows import SharedRows
from partial_embedding.torch.table_files import leave_rows_alone, load_rows_alone
from partial_embedding.torch.trainable_rows import TrainableRows, used_frozen, waiting

# What exists only in a living module: it is made anew for a copy or an unpickled one.
_WIRING = (
    "_averaged",
    "_hooked",
    "_passage",
    "_shards",
    "_steppers",
    "awaits_average",
)


class PartialTable(TrainableRows):
    """A mix-in that freezes rows of `weight`, a parameter of shape (V, D).

    It stands before the module class that owns the weight. The row set is neither a parameter nor a
    buffer, so the `state_dict` is that of the plain module. It belongs to the weight, as
    `requires_grad` does: tables that are tied have one. Where one of them had frozen rows before
    they were tied, these are frozen in all.
    """

    if TYPE_CHECKING:  # jit.script reads annotations, and knows few
        weight: nn.Parameter
        sparse: bool
        _hooked: Mapping[str, nn.Parameter]

    _hooked = MappingProxyType({})

    # Of its properties jit.script can make nothing.
    __jit_unused_properties__ = (
        *(name for name, value in vars(TrainableRows).items() if isinstance(value, property)),
    )

    # Tensors in these it would make attributes, which stay behind when the module moves.
    __jit_ignored_attributes__ = ("_hooked", "_passage")

    def gives_sparse_gradient(self) -> bool:
        """Whether the weight gets a gradient of the trainable rows alone."""
        if self.is_sharded:  # engines that shard reduce dense gradients
            return False
        # A compiler cannot add sparse gradients of several uses.
        return self.sparse and not (self._shared.is_tied and torch.compiler.is_compiling())

    # The hooks, and all that can make a hook disappear

    def attach(self) -> None:
        """Hook the gradient of what is now `weight`, and no longer that of what was."""
        if not any(self._parameters.get(n) is not None for n in ("weight", "weight_orig")):
            return
        close_passage(self)
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
        if (padding := getattr(self, "padding_idx", None)) is not None:
            rows.padding_row = padding
        for other in list(tables_of(weight)):
            if other is not self:
                self._share_rows_with(other)
        for name in self.row_parameters:
            if (parameter := self.row_parameter(name)) is not None:
                self._hook_up(name, parameter)
        self._shared.is_tied = any(table is not self for table in tables_of(weight))
        if rows.row_set is not None:
            waiting.add(self)  # a copy, too

    def is_attached_to(self, parameter: nn.Parameter) -> bool:
        """Whether rows of a parameter are frozen wherever it is used."""
        return any(one is parameter for one in self._hooked.values())

    def detach(self) -> None:
        """Stop freezing rows: for a module whose class is about to be changed back."""
        for name in list(self._hooked):
            self._unhook(name)
        for name in ("_shared", "_before_training", "is_copy", *_WIRING):
            self.__dict__.pop(name, None)
        waiting.discard(self)

    def _tied(self) -> set[TrainableRows]:
        """The living tables of the same weight, which the hooks on it know."""
        return {self, *tables_of(self.leaf_weight)}

    def _share_rows_with(self, other: PartialTable) -> None:
        if self.has_frozen_rows and not other.has_frozen_rows:
            other.row_set = self.row_set
        padding, self.__dict__["_shared"] = self.padding_row, other._shared
        other._set_padding_row(other.padding_row if padding is None else padding)

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
        if (hook := self._hook_on(self._hooked[name])) is not None:
            hook.remove()
        # Past nn.Module's own way of setting attributes, here and below.
        self.__dict__["_hooked"] = {n: one for n, one in self._hooked.items() if n != name}

    def _hook_up(self, name: str, parameter: nn.Parameter) -> None:
        if (hook := self._hook_for(parameter)) is not None:
            hook.rows = self._shared
            self.__dict__["_hooked"] = {**self._hooked, name: parameter}

    def _hook_for(self, parameter: nn.Parameter) -> RowHook | None:
        """The hook on a parameter, put there if there is none; integers take none."""
        if not (parameter.is_floating_point() or parameter.is_complex()):
            return None
        return self._hook_on(parameter) or RowHook(self, parameter)

    def _hook_on(self, parameter: nn.Parameter) -> RowHook | None:
        return next((hook for hook in hooks_on(parameter) if hook.is_of(self)), None)

    def _weight_in_use(self) -> Tensor | None:
        """A masked stand-in for a weight that is not the module's own parameter, or None.

        `torch.func.functional_call` puts other tensors in the place of the parameters for one call,
        and pruning computes the weight.
        """
        # Not `self.weight`, which a graph that is traced would hold as a step of its own, and which
        # some parametrizations change each time that it is read.
        weight = self._parameters.get("weight")
        if weight is not None and (weight is self._hooked.get("weight") or self.is_sharded):
            looks = torch.is_grad_enabled() and not torch.compiler.is_compiling()
            if looks and not weight.requires_grad:
                used_frozen.add(self)
            return None
        if isinstance(weight, nn.Parameter) and torch.compiler.is_exporting():
            return None  # nothing is trained in a graph
        if isinstance(weight, nn.Parameter):
            # Perhaps for this one call, so what was hooked before stays so: its backward may come.
            # It may be another model's, so it is masked on its way here, and not where it is. If
            # it is to stay, an optimizer will find it by its hook.
            self._hook_for(weight)
            learns = weight.requires_grad and torch.is_grad_enabled()
            if not learns or (getattr(self, "sparse", False) and goes_by_rows(weight, self)):
                return None
        if not self.has_frozen_rows:
            return None
        if weight is None and self._hook_on(self.leaf_weight) is None:
            self._hook_up("weight", self.leaf_weight)  # a copy, which parametrizations make alone
        in_use: Tensor = self.weight
        return torch.where(self.row_set.mask.unsqueeze(-1), in_use, in_use.detach())

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Hook a new weight; torch's own way of setting an attribute comes by here too."""
        shard = self._shards.get(name)
        if shard is not None and param is not None and is_lent(param, shard, self):
            super().register_parameter(name, param)
            self._hook_for(param)  # which is the same one in each pass
            return
        if name == "weight":
            self._check_tie(param)
        super().register_parameter(name, param)
        if name in self.row_parameters:
            self.attach()

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 puts its shards past `register_parameter` where this is nn.Module's own method.
        super().__setattr__(name, value)
        if name == "padding_idx" and "_shared" in vars(self):
            self._set_padding_row(value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _WIRING}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's own
        self.__dict__["is_copy"] = True
        self.attach()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with self._rewired():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._shared.saves_rows:
            leave_rows_alone(self, destination, prefix)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any
    ) -> None:
        with self._rewired():
            load_rows_alone(self, state_dict, prefix)
            super()._load_from_state_dict(state_dict, prefix, *args, **options)

    @contextmanager
    def _rewired(self) -> Iterator[None]:
        """Hook parameters anew after what may swap their insides, as torch's future does."""
        parameters = list(self.hookable_parameters())
        tied = {self, *(table for one in parameters for table in tables_of(one))}
        for table in tied:
            close_passage(table)
        try:
            yield
        finally:
            for one in parameters:
                # A swap leaves these with the tensor, where nothing calls them until they are set.
                one._backward_hooks = one._backward_hooks
                one._post_accumulate_grad_hooks = one._post_accumulate_grad_hooks
            for table in tied:
                table.attach()

    def extra_repr(self) -> str:
        """The plain module's description, and how many rows train."""
        every = self._most_trainable(self.leaf_weight.shape[0])  # counted without bookkeeping
        count = every if self._row_set is None else len(self.row_set)
        return f"{super().extra_repr()}, trainable_rows={count}"


def tables_of(parameter: Tensor) -> Iterator[PartialTable]:
    """The living tables whose rows a parameter holds."""
    for hook in hooks_on(parameter):
        if isinstance(table := hook.table, PartialTable):
            yield table


def tables_in(model: nn.Module) -> Iterator[tuple[str, PartialTable]]:
    """The tables of a model with their names; of those that are tied, only the first."""
    for name, table, parameter in row_parameters_in(model):
        if parameter is table.leaf_weight:
            yield name, table


def check_model(model: object) -> None:
    """Refuse what is no module."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"a model is a torch.nn.Module. Received a {type(model).__name__}. Pass the model "
            "itself."
        )


def row_parameters_in(model: nn.Module) -> Iterator[tuple[str, PartialTable, nn.Parameter]]:
    """The parameters of a model of which only rows train, each once, with names for messages."""
    check_model(model)
    seen: set[int] = set()
    for name, module in model.named_modules():
        for attribute in module.row_parameters if isinstance(module, PartialTable) else ():
            parameter = module.row_parameter(attribute)
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                named = name if attribute == "weight" else f"{name}.{attribute}".lstrip(".")
                yield named, module, parameter
