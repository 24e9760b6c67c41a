"""Rows of a model by the names of its parameters: those that train, and those that a file brings.

Names are those in the model itself, whatever is wrapped around it. Rows that are brought are
checked first, all of them, and then written.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from partial_embedding.errors import InputError, check_flags
from partial_embedding.torch.rowset import shown
from partial_embedding.torch.shards import put_rows, rows_that_differ
from partial_embedding.torch.table import check_model, row_parameters_in

# What `peft` puts before the names of the model that it wraps.
PEFT_PREFIX = "base_model.model."

# Under which a parameter remembers the rows that files have brought.
_LOADED = "_rows_of_files"

Path_ = str | os.PathLike[str]
# Ids and values of rows, by the parameter's name in the model itself.
Parts = dict[str, tuple[Tensor, Tensor]]


def plain_name(name: str) -> str:
    """A parameter's name in the model itself, whatever is wrapped around it or the model."""
    return name.replace("_orig_mod.", "").removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model, by their names in the model itself."""
    check_model(model)
    named = model.named_parameters(remove_duplicate=False)
    return {plain_name(name): parameter for name, parameter in named}


def trained_rows(model: nn.Module) -> dict[str, Tensor]:
    """The trainable rows of each parameter, by its name in the model itself."""
    names = {id(own): name for name, own in reversed(parameters_of(model).items())}
    rows = {
        names[id(parameter)]: table.row_set.ids
        for _, table, parameter in row_parameters_in(model)
        if table.has_frozen_rows
    }
    if copied := [name for name in rows if ".modules_to_save." in name]:
        raise InputError(
            "saved rows are those of a model's own tables. Received one in which peft has a copy "
            f"for each adapter, {copied[0]!r}. Call save_pretrained, which saves copies whole; or "
            "merge_and_unload first."
        )
    if not any(map(len, rows.values())):
        raise InputError(
            "saved rows are those of a partly trainable table. Received a "
            f"{type(model).__name__} in which all rows train, or none. Save its state_dict."
        )
    return rows


# Of files


def read_tensors(path: Path_) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and what it says of them."""
    try:
        # Older releases of safetensors put what they read on the default device, the user's.
        with torch.device("cpu"), safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(
            f"{path}: a safetensors file is meant. Received: {error}. "
            "Check the path, or get it again."
        ) from None


def check_parts(
    model: nn.Module,
    path: Path_,
    parts: Parts,
    sizes: dict[str, Any],
    *,
    may_grow: bool,
    overwrite: bool,
) -> int:
    """Refuse rows that do not fit the model, and say by how many rows its tables have to grow."""
    check_flags(overwrite=overwrite)
    known = parameters_of(model)
    lacking = set()
    for key, (ids, values) in parts.items():
        if key not in known:
            raise InputError(
                f"{path}: rows belong to one model. Received a {type(model).__name__} without "
                f"{key!r}. Pass the one that they were saved of."
            )
        here = known[key]
        if here.shape[1:] != values.shape[1:]:
            raise InputError(
                f"{path}: {key!r} has rows of shape {tuple(values.shape[1:])}. Received a model "
                f"where they are {tuple(here.shape[1:])}. Pass the one that they were saved of."
            )
        is_one_each = ids.shape == values.shape[:1] and len(ids.unique()) == len(ids)
        if ids.dtype != torch.int64 or not is_one_each:
            raise InputError(
                f"{path}: each row of {key!r} has one id, an int64. Received {len(values)} rows "
                f"and {ids.dtype} ids of shape {tuple(ids.shape)}: {shown(ids.flatten())}. "
                "Save them again."
            )
        size = sizes.get(key, len(here))
        lacking.add(size - len(here))
        too_small = size != len(here) and not (may_grow and len(here) < size)
        if too_small or (len(ids) and not 0 <= ids.min() <= ids.max() < size):
            raise InputError(
                f"{path}: {key!r} had {sizes.get(key, 'more')} rows, of which {shown(ids)} are "
                f"here. Received a model with {len(here)}. Pass the tokenizer too, so that its "
                "tables grow, or the model of that vocabulary."
            )
    for key, (ids, values) in parts.items():
        for other, (its_ids, its_values) in parts.items():
            if known[other] is known[key] and not (
                torch.equal(ids, its_ids) and torch.equal(values, its_values)
            ):
                raise InputError(
                    f"{path}: tables that are tied have the same rows. Received others for "
                    f"{key!r} than for {other!r}. Pass a model in which they are not tied."
                )
    if len(lacking) > 1:
        raise InputError(
            f"{path}: all tables grow by as many rows. Received a model whose tables lack "
            f"{', '.join(map(str, sorted(lacking)))}. Pass the model that they were trained with."
        )
    for key, (ids, values) in parts.items():
        brought = vars(known[key]).get(_LOADED)
        if brought is None or overwrite:
            continue
        again = torch.isin(ids, brought)
        both = rows_that_differ(known[key], ids[again], values[again])
        if len(both):
            raise InputError(
                f"{path}: rows of two files are not the same ones. Received {shown(both)} of "
                f"{key!r}, which another file has brought. Pass overwrite=True to replace them."
            )
    return int(max(lacking, default=0))


def write_parts(model: nn.Module, parts: Parts) -> dict[str, list[int]]:
    """Write rows that were checked, which are returned by the parameter's name."""
    known = parameters_of(model)
    for key, (ids, values) in parts.items():
        parameter = known[key]
        put_rows(parameter, ids, values)
        brought = vars(parameter).get(_LOADED, ids)
        vars(parameter)[_LOADED] = torch.cat([brought, ids]).unique()
    return {key: ids.tolist() for key, (ids, _) in parts.items()}
