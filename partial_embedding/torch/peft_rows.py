"""How `peft` knows the rows of a table: as a part of its adapters.

`peft` calls each `AuxiliaryTrainingWrapper` of a model when adapters are switched on and off, put
on, saved and taken off, and this is one, within the table: `disable_adapter()` then gives the rows
that they were, and adapters are saved with the rows, in the format of `peft`'s trainable tokens.

`transformers` has calls of its own (`add_adapter`, `disable_adapters`), which know of these only
the `ModulesToSaveWrapper`, and its `enable_adapters` none at all: there the rows follow its layers.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from partial_embedding.errors import InputError
from partial_embedding.torch.table import PartialTable

# The name of the part by which `peft` knows a table; its own wrapper has one of this name.
ADAPTER = "token_adapter"

# The rows of each parameter in peft's files, where those of weights have the name that its own
# trainable tokens have; and their ids.
_KEYS = {"weight": "trainable_tokens_delta", "bias": "trainable_tokens_bias"}
_IDS = "trainable_tokens_rows"

# One row for each id, by the parameter's name in the table.
Rows = dict[str, Tensor]


def meet(parent: nn.Module, name: str, part: nn.Module | None) -> nn.Module | None:
    """What takes a part's place that `peft` puts into a module; called for each part of any."""
    if isinstance(part, BaseTuner):
        stand_beside_adapters(part)
        # It has just put adapters on, and frozen all else.
        for module in part.modules():
            if isinstance(module, AdapterRows):
                module.let_learn()
    elif isinstance(parent, BaseTuner) and name == "model":
        stand_beside_adapters(part)
    elif isinstance(part, TrainableTokensWrapper):
        table = parent._modules.get(name)
        return serve_tokens(table, part) if isinstance(table, PartialTable) else None
    elif isinstance(part, PartialTable) and name in ("base_layer", "original_module"):
        know_wrapper(part, parent)
    return None


def stand_beside_adapters(model: Any) -> None:
    """Let `peft` know the tables of a model that it adapts, within its wrappers or without."""
    configs: dict[str, Any] | None = getattr(model, "peft_config", None)
    while isinstance(model, PeftModel | BaseTuner):
        model = model.base_model if isinstance(model, PeftModel) else model.model
    layer = _adapted_layer(model)
    if not any(hook is _follow_layers for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(_follow_layers)
    # Of a table that peft copies for each adapter it saves, shows and hides the copy itself.
    copied = {part for wrapper in model.modules() if _copies(wrapper) for part in wrapper.modules()}
    tables = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, PartialTable) and module not in copied
    ]
    tied = {id(part.weight) for part in copied if isinstance(part, PartialTable)}
    # Where a table is tied, peft looks for its rows in the embedding.
    tables.sort(key=lambda found: isinstance(found[1], nn.Linear))
    known: set[int] = {id(None)}
    for name, table in tables:
        own = [a for a in table.row_parameters if id(getattr(table, a)) not in known]
        known |= {id(getattr(table, attribute)) for attribute in own}
        part = table._modules.get(ADAPTER)
        if part is None and own:
            part = table._modules[ADAPTER] = AdapterRows(name, table, own)
            if layer is not None:
                part.check_set_adapter(layer.active_adapters)
                part.set_adapter(layer.active_adapters)
        if isinstance(part, AdapterRows):
            part.configs = configs if part.configs is None else part.configs
            if isinstance(table, nn.Embedding) and id(table.weight) in tied:
                part.no_place = ", beside a copy of the head that is tied to it"
                part.remedy = "Name both in modules_to_save, or neither."
    for module in list(model.modules()):
        for table in list(module._modules.values()):
            if isinstance(table, PartialTable):
                know_wrapper(table, module)


def know_wrapper(table: PartialTable, wrapper: nn.Module) -> None:
    """Serve a table that `peft` has put into a module of its own."""
    if _copies(wrapper):
        table._modules.pop(ADAPTER, None)
        vars(table)["is_copy"] = True  # of the two it is the one that is not to train
    if not isinstance(wrapper, BaseTunerLayer) or isinstance(wrapper, TrainableTokensLayer):
        return
    if isinstance(part := table._modules.get(ADAPTER), AdapterRows):
        part.no_place = ", in a layer that it adapts"
    if isinstance(table, nn.Embedding) and table.sparse:
        table.sparse = False
        warnings.warn(
            f"peft adapts an embedding by a matrix that gets no sparse gradient, so that the "
            f"{type(table).__name__} that it wraps gets a gradient of all its rows too, "
            f"{table.num_embeddings:,}×{table.embedding_dim:,} numbers in each step. Frozen rows "
            "stay exact; to save it, leave the embedding out of target_modules: its new rows learn "
            "without.",
            stacklevel=2,
        )


def leave_adapters(model: nn.Module) -> None:
    """Take from a model what `stand_beside_adapters` put there."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _follow_layers]:
            del hooks[key]
        if isinstance(module, PartialTable):
            module._modules.pop(ADAPTER, None)
            vars(module).pop("_before_training", None)


def _copies(wrapper: nn.Module) -> bool:
    return isinstance(wrapper, ModulesToSaveWrapper) and not isinstance(wrapper, AdapterRows)


def _adapted_layer(model: nn.Module) -> Any:
    return next((part for part in model.modules() if isinstance(part, BaseTunerLayer)), None)


def _follow_layers(model: nn.Module, args: Any) -> None:
    """Show the rows that go with what the layers of a model do, before each use of it."""
    if (layer := _adapted_layer(model)) is None:
        return
    for module in model.modules():
        if not isinstance(module, AdapterRows):
            continue
        module.configs = module.configs or getattr(model, "peft_config", None)
        if module.disable_adapters != layer.disable_adapters:
            module.enable_adapters(not layer.disable_adapters)


def serve_tokens(table: PartialTable, wrapper: Any) -> nn.Module:
    """Let a table itself, which is returned, serve the trainable tokens of a wrapper around it."""
    part = table._modules.get(ADAPTER)
    if isinstance(part, AdapterRows):
        for adapter, ids in wrapper.token_adapter.token_indices.items():
            learn = wrapper.token_adapter.trainable_tokens_delta[adapter].requires_grad
            part.take(adapter, torch.tensor(ids, dtype=torch.int64, device="cpu"), learn)
    return table


class AdapterRows(ModulesToSaveWrapper):
    """What `peft` calls for one table. It has no parameters, and changes no key.

    The rows that learned belong to the adapter that was active meanwhile, and an adapter that is
    added later begins with the rows as they are, as its own copy.

    Args:
        name: The table's name in the model.
        table: The table that it is a part of.
        attributes: The parameters whose rows it is about.
    """

    # `peft` gives what it unloads the weight of what was there.
    weight = None

    # Where peft's configurations have no place for the ids of rows, and what helps.
    no_place = ""
    remedy = "Use save_rows too."

    # The configurations of the adapters, by name.
    configs: dict[str, Any] | None = None

    def __init__(self, name: str, table: PartialTable, attributes: list[str]) -> None:
        nn.Module.__init__(self)
        self._name = name
        # In a list, past nn.Module's own way of setting attributes: no part of its own part.
        self._table = [table]
        self._ids = torch.empty(0, dtype=torch.int64, device="cpu")
        # The rows as they were before any adapter, and those of adapters that are not shown.
        self._base: Rows = {name: getattr(table, name).detach()[:0].clone() for name in attributes}
        self._hidden: dict[str, Rows] = {}
        # What peft's own configurations say that adapters have.
        self._theirs: dict[str, Tensor] = {}
        # Whose rows the table has now; None is the base model.
        self._shown: str | None = None
        self._active_adapter: list[str] = []
        self._adapters: set[str] = set()
        self._disable_adapters = False
        self._learns = True
        # Told of rows that train, before they move.
        vars(table).setdefault("_before_training", []).append(self._keep)
        self._keep(table.row_set.ids)

    def __getattr__(self, name: str) -> Any:
        # Not peft's, which looks into a module that is wrapped.
        return nn.Module.__getattr__(self, name)

    # Rows in the table, and beside it

    def _keep(self, ids: Tensor) -> None:
        """Keep rows as they are, before they move; those that are kept stay as they were."""
        ids = ids.cpu()
        new = ids[~torch.isin(ids, self._ids)]
        if not len(new):
            return
        for name in self._base:
            joining = self._data(name)[new]
            for rows in (self._base, *self._hidden.values()):
                rows[name] = torch.cat([rows[name].to(joining), joining])
        self._ids = torch.cat([self._ids, new])

    def _data(self, name: str) -> Tensor:
        # Its data: a graph that was made before a look at the base model goes on afterwards.
        parameter: Tensor = getattr(self._table[0], name).data
        return parameter

    def _read(self) -> Rows:
        return {name: self._data(name)[self._ids] for name in self._base}

    def _write(self, rows: Rows) -> None:
        for name, values in rows.items():
            data = self._data(name)
            data[self._ids.to(data.device)] = values.to(data)

    def _show(self, adapter: str | None) -> None:
        """Let the table have an adapter's rows, or those of the base model."""
        if adapter == self._shown:
            return
        if self._shown is not None:
            self._hidden[self._shown] = self._read()
        self._shown = adapter
        self._write(self._base if adapter is None else self._hidden.pop(adapter))

    def take(self, adapter: str, ids: Tensor, learn: bool) -> None:
        """Serve the trainable tokens of an adapter, which may be more than those that train."""
        self._theirs[adapter] = ids
        self._keep(ids)
        table = self._table[0]
        if learn and not table.row_set.is_trainable(ids.to(table.row_set.device)).all():
            table.unfreeze_rows(ids)

    def let_learn(self) -> None:
        """Let the rows learn, unless all adapters are for inference."""
        table = self._table[0]
        if self._learns and len(table.row_set):
            for name in self._base:
                getattr(table, name).requires_grad_(True)

    # What peft asks of it

    @property
    def modules_to_save(self) -> set[str]:  # type: ignore[override]  # only asked what it has
        """The adapters that have rows of their own, of which `peft` makes no weighted sums."""
        return {*self._adapters, *(self.configs or {})} if len(self._ids) else set()

    def register_forward_pre_hook(self, hook: Any, **options: Any) -> Any:
        """Refuse a batch of several adapters, before which `peft` calls this."""
        names = set(getattr(hook, "keywords", {}).get("adapter_names", ()))
        if len(self._ids) and names - {self._shown or "__base__"}:
            raise InputError(
                f"a batch takes the rows of one adapter. Received adapter_names {sorted(names)} "
                f"while {self._name!r} has the rows of {self._shown or '__base__'!r}. Call the "
                "model once for each: after set_adapter(name), or within disable_adapter()."
            )
        return super().register_forward_pre_hook(hook, **options)

    def enable_adapters(self, enabled: bool) -> None:
        """Show the rows of the active adapter, or those of the base model."""
        self._disable_adapters = not enabled
        self._show(next(iter(self._active_adapter), None) if enabled else None)

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """The first of some adapters, which `set_adapter` is called with."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        self._adapters |= {*names, *(self.configs or {})}
        return next(iter(names), None)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Show the rows of an adapter, for learning or for inference."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._active_adapter = names
        self._learns = not inference_mode
        for name in self._adapters - {*self._hidden, self._shown}:
            self._hidden[name] = self._read()
        self.enable_adapters(not self._disable_adapters)
        self.let_learn()

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Forget an adapter's rows."""
        self._adapters.discard(adapter_name)
        self._active_adapter = [n for n in self._active_adapter if n != adapter_name]
        self._active_adapter = self._active_adapter or list(new_active_adapters or [])
        self.enable_adapters(not self._disable_adapters)
        self._hidden.pop(adapter_name, None)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Nothing: a weight learns for whichever adapter is active."""

    def _get_available_adapters(self) -> set[str]:
        return set()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The rows are merged already; a model that is only unloaded gets those that were."""
        self.enable_adapters(merge)
        return self

    # In peft's files

    def adapter_state_dict(  # type: ignore[override]  # as peft's own parts have it
        self, adapter_name: str, state_dict: Any
    ) -> dict[str, Tensor]:
        """An adapter's rows, as `peft` saves and reads them, and their ids."""
        if not len(self._ids):
            return {}
        rows = self._read() if adapter_name == self._shown else self._hidden[adapter_name]
        if "weight" in rows:
            self._name_rows(adapter_name)
        return {_IDS: self._ids.clone(), **{_KEYS[name]: rows[name] for name in rows}}

    def _name_rows(self, adapter_name: str) -> None:
        """Write into an adapter's configuration which rows it has, for `peft` to read them."""
        config: Any = (self.configs or {}).get(adapter_name)
        if self.no_place or not hasattr(config, "trainable_token_indices"):
            warnings.warn(
                f"the adapter {adapter_name!r} is saved with the rows of {self._name!r}, but "
                f"{type(config).__name__} has no place for their ids{self.no_place}: peft alone "
                f"will not read them. {self.remedy}",
                stacklevel=2,
            )
            return
        rows = config.trainable_token_indices or {}
        if not isinstance(rows, dict):  # the short way to name those of the input
            rows = {} if adapter_name in self._theirs else {"embed_tokens": rows}
        config.trainable_token_indices = {**rows, self._name: self._ids.tolist()}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """None: the keys are those of the file, and an adapter without them can be loaded."""
        self._loading = adapter_name
        return {}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take the rows of an adapter from a file."""
        ids = self._theirs.get(self._loading, self._ids)  # peft's own files have none
        ids = state_dict.pop(f"{prefix}{_IDS}", ids)
        loaded = {name: state_dict.pop(f"{prefix}{_KEYS[name]}", None) for name in self._base}
        loaded = {name: values for name, values in loaded.items() if values is not None}
        count = len(self._data("weight" if "weight" in self._base else "bias"))
        for values in loaded.values():
            if len(ids) != len(values) or (len(ids) and ids.max() >= count):
                raise InputError(
                    f"an adapter's rows fit the table. Received {len(values)} rows of "
                    f"{self._name!r} for {len(ids)} ids of {count}. Export it again."
                )
        if not loaded:
            return
        self._keep(ids)
        # Each place in `loaded` of a row that is kept.
        order = {row: place for place, row in enumerate(self._ids.tolist())}
        found = [order[row] for row in ids.tolist()]
        places = torch.tensor(found, dtype=torch.int64, device="cpu")
        rows = self._read() if self._loading == self._shown else self._hidden[self._loading]
        for name, values in loaded.items():
            rows[name][places] = values.to(rows[name])
        if self._loading == self._shown:
            self._write(rows)
