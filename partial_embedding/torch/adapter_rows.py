"""How `peft` knows the rows of a table: as a part of its adapters.

`peft` calls each `AuxiliaryTrainingWrapper` of a model when adapters are switched on and off, put
on, saved and taken off, and this is one, within the table: `disable_adapter()` then gives the rows
that they were, and adapters are saved with the rows, in the format of `peft`'s trainable tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from partial_embedding.errors import InputError
from partial_embedding.torch.replace import ADAPTER
from partial_embedding.torch.table import PartialTable

# As in peft's own wrapper, of which this is the name of the rows.
ROWS = "trainable_tokens_delta"
# Ours: the ids, and what peft has no name for.
IDS, BIAS = "trainable_tokens_rows", "trainable_tokens_bias"


def stand_beside_adapters(model: Any) -> None:
    """Let `peft` know the tables of a model that it adapts.

    Args:
        model: The model, with or without `peft`'s wrappers around it.
    """
    configs: dict[str, Any] | None = getattr(model, "peft_config", None)
    while isinstance(model, PeftModel | BaseTuner):
        model = model.base_model if isinstance(model, PeftModel) else model.model
    tables = [(n, m) for n, m in model.named_modules() if isinstance(m, PartialTable)]
    # Where a table is tied, peft looks for its rows in the embedding.
    tables.sort(key=lambda found: isinstance(found[1], nn.Linear))
    known: set[int] = {id(None)}
    for name, table in tables:
        own = [a for a in table.row_parameters if id(getattr(table, a)) not in known]
        known |= {id(getattr(table, attribute)) for attribute in own}
        part = table._modules.get(ADAPTER)
        if part is None and own:
            part = table._modules[ADAPTER] = AdapterRows(name, table, own)
        if isinstance(part, AdapterRows):
            part.configs = configs if part.configs is None else part.configs


def let_rows_learn(model: nn.Module) -> None:
    """Let rows learn on where `peft` has just put adapters on, and frozen all else.

    Args:
        model: What `peft` has adapted.
    """
    for module in model.modules():
        if isinstance(module, AdapterRows):
            module.let_learn()


class AdapterRows(AuxiliaryTrainingWrapper):
    """What `peft` calls for one table. It has no parameters, and changes no key.

    Args:
        name: The table's name in the model.
        table: The table that it is a part of.
        attributes: The parameters whose rows it is about.
    """

    # `peft` gives what it unloads the weight of what was there.
    weight = None

    # The configurations of the adapters, by name.
    configs: dict[str, Any] | None = None

    def __init__(self, name: str, table: PartialTable, attributes: list[str]) -> None:
        nn.Module.__init__(self)
        self._name = name
        # In a list, past nn.Module's own way of setting attributes: no part of its own part.
        self._table = [table]
        self._attributes = attributes
        self._ids = torch.empty(0, dtype=torch.int64)
        self._base = {name: getattr(table, name).detach()[:0].clone() for name in attributes}
        self._trained: dict[str, Tensor] | None = None
        self._active_adapter: list[str] = []
        self._disable_adapters = False
        self._adapters: set[str] = set()
        self._learns = True
        table._shared.before_training.append(self._keep)
        self._keep(table.row_set.ids)

    def __getattr__(self, name: str) -> Any:
        # Not peft's, which looks into a module that is wrapped.
        return nn.Module.__getattr__(self, name)

    @property
    def table(self) -> Any:
        """The table that this is a part of."""
        return self._table[0]

    # The rows as they were

    def _keep(self, ids: Tensor) -> None:
        """Keep rows as they are, before they move; those that are kept stay as they were."""
        ids = ids.cpu()
        new = ids[~torch.isin(ids, self._ids)]
        self._ids = torch.cat([self._ids, new])
        for name, kept in self._base.items():
            rows = self._parameter(name)[new]
            self._base[name] = torch.cat([kept.to(rows), rows])

    def _parameter(self, name: str) -> Tensor:
        # Its data: a graph that was made before a look at the base model goes on afterwards.
        parameter: Tensor = getattr(self.table, name).data
        return parameter

    def enable_adapters(self, enabled: bool) -> None:
        """Put the rows as they were into the table, or those that were learned back.

        Args:
            enabled: Whether the adapters count.
        """
        self._disable_adapters = not enabled
        if enabled and self._trained is not None:
            trained, self._trained = self._trained, None
            self._write(trained)
        elif not enabled and self._trained is None:
            self._trained = {name: self._parameter(name)[self._ids] for name in self._attributes}
            self._write(self._base)

    def _write(self, rows: Mapping[str, Tensor]) -> None:
        for name, values in rows.items():
            parameter = self._parameter(name)
            parameter[self._ids.to(parameter.device)] = values.to(parameter)

    # What peft asks of it

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """The first name of a list."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        return next(iter(names), None)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Adapters are put on, for learning or for inference."""
        self._learns = not inference_mode
        self.let_learn()

    def let_learn(self) -> None:
        """Let the rows learn, unless all adapters are for inference."""
        if self._learns and len(self.table.row_set):
            for name in self._attributes:
                getattr(self.table, name).requires_grad_(True)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Nothing: the rows belong to no adapter alone."""

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Nothing: the rows belong to no adapter alone."""

    def _get_available_adapters(self) -> set[str]:
        return set()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The rows are merged already; a model that is only unloaded gets those that were."""
        self.enable_adapters(True)
        if not merge:
            self._write(self._base)
        return self

    # In peft's files

    def adapter_state_dict(  # type: ignore[override]  # as peft's own parts have it
        self, adapter_name: str, state_dict: Any
    ) -> dict[str, Tensor]:
        """The rows, as `peft` saves and reads them, and their ids."""
        ids = self._ids
        rows = self._trained or {name: self._parameter(name)[ids] for name in self._attributes}
        if not len(ids):
            return {}
        if "weight" in rows:
            self._name_rows(adapter_name)
        keys = {"weight": ROWS, "bias": BIAS}
        return {IDS: ids.clone(), **{keys[name]: values for name, values in rows.items()}}

    def _name_rows(self, adapter_name: str) -> None:
        """Write into an adapter's configuration which rows it has, for `peft` to read them."""
        config: Any = (self.configs or {}).get(adapter_name)
        if not hasattr(config, "trainable_token_indices"):
            warnings.warn(
                f"the adapter {adapter_name!r} is saved with the rows of {self._name!r}, but "
                f"{type(config).__name__} has no place for their ids: peft alone will not read "
                "them. Use save_rows too.",
                stacklevel=2,
            )
            return
        rows = config.trainable_token_indices or {}
        config.trainable_token_indices = {**rows, self._name: self._ids.tolist()}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """None: the keys are those of the file, and an adapter without them can be loaded."""
        return {}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Write the rows of an adapter into the table."""
        ids = state_dict.pop(f"{prefix}{IDS}", None)
        rows = state_dict.pop(f"{prefix}{ROWS}", None)
        bias = state_dict.pop(f"{prefix}{BIAS}", None)
        if ids is None and rows is not None:
            ids = self._ids  # an adapter that peft made
        for name, values in (("weight", rows), ("bias", bias)):
            if values is not None:
                parameter = self._parameter(name)
                if len(ids) != len(values) or (len(ids) and ids.max() >= len(parameter)):
                    raise InputError(
                        f"an adapter's rows fit the table. Received {len(values)} rows for "
                        f"{len(ids)} ids of {len(parameter)}."
                    )
                parameter[ids.to(parameter.device)] = values.to(parameter)
