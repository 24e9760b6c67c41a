"""Files that hold trained rows alone: our own, and those of PEFT's trainable tokens."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from partial_embedding.errors import InputError
from partial_embedding.files import write_atomically
from partial_embedding.torch.rowset import shown
from partial_embedding.torch.table import row_parameters_in
from partial_embedding.torch.tokens import grow

_FORMAT = "partial_embedding rows 1"
_PEFT_PREFIX = "base_model.model."
_PEFT_NAME = "trainable_tokens_delta"

Path_ = str | os.PathLike[str]


def save_rows(model: nn.Module, path: Path_, tokenizer: Any = None) -> None:
    """Write the trainable rows of a model's tables, and nothing else, to a safetensors file.

    Args:
        model: A model with partly trainable tables.
        path: The file. Its folder must exist.
        tokenizer: The model's tokenizer. With it, the file knows the tokens of its rows, and is
            refused by a tokenizer with other ones.

    Raises:
        InputError: The model has no partly trainable table, or the tokenizer has fewer tokens than
            the tables have trained rows.
        OSError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> from partial_embedding.torch import PartialEmbedding
        >>> model = nn.Sequential(PartialEmbedding(10, 4, trainable_rows=[7]))
        >>> plain = nn.Sequential(nn.Embedding(10, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_rows(model, f"{folder}/rows.safetensors")
        ...     load_rows(plain, f"{folder}/rows.safetensors")
        {'0.weight': [7]}
        >>> torch.equal(model[0].weight[7], plain[0].weight[7])
        True
    """
    rows = _trained(model)
    tensors: dict[str, Tensor] = {}
    for key, ids in rows.items():
        tensors[key] = model.get_parameter(key).detach()[ids].cpu().contiguous()
        tensors[f"{key}:rows"] = ids.cpu().clone()  # a bias has those of its weight
    about = {
        "format": _FORMAT,
        "num_rows": json.dumps({key: len(model.get_parameter(key)) for key in rows}),
    }
    if tokenizer is not None:
        ids = torch.cat(list(rows.values())).unique().tolist()
        if ids and ids[-1] >= len(tokenizer):
            raise InputError(
                f"each trained row is a token's. Received row {ids[-1]} and a tokenizer of "
                f"{len(tokenizer)} tokens. Pass the tokenizer that the tokens were added to."
            )
        names = tokenizer.convert_ids_to_tokens(ids)
        about["tokens"] = json.dumps(dict(zip(map(str, ids), names, strict=True)))
        about["vocabulary"] = _digest(tokenizer, set(names))
    with write_atomically(path) as temporary:
        save_file(tensors, temporary, about)


def load_rows(model: nn.Module, path: Path_, tokenizer: Any = None) -> dict[str, list[int]]:
    """Write the rows of a file into a model, partly trainable or plain.

    Args:
        model: A model of the kind that the rows come from.
        path: A file that `save_rows` wrote.
        tokenizer: The model's tokenizer. Tokens of the file that it lacks are added to it, and the
            tables grow, where that gives them the rows that they have in the file.

    Returns:
        The rows that were written, by the parameter's name.

    Raises:
        InputError: The file is not one of these, or belongs to another model or vocabulary. Model
            and tokenizer are then as they were.
        OSError: The file cannot be read.
    """
    tensors, about = _read(path)
    if about.get("format") != _FORMAT:
        raise InputError(f"{path}: rows come from a file that save_rows wrote. Received another.")
    sizes: dict[str, int] = json.loads(about["num_rows"])
    tokens = {int(row): token for row, token in json.loads(about.get("tokens", "{}")).items()}
    missing = _missing_tokens(path, about, tokens, tokenizer)
    parts = {key: (tensors[f"{key}:rows"], tensors[key]) for key in sizes}
    _check_parts(model, path, parts, sizes, may_grow=bool(missing))
    if missing:
        tokenizer.add_tokens(missing)
        grow(model, max(sizes.values()))
    return _write(model, parts)


def export_peft(model: nn.Module, folder: Path_) -> None:
    """Write the trainable rows as an adapter of PEFT's trainable tokens.

    PEFT, and servers that read its adapters, load it onto the original model with its tables grown
    to the same size.

    Args:
        model: A model with partly trainable tables that train the same rows.
        folder: Where `adapter_config.json` and `adapter_model.safetensors` go; made if missing.

    Raises:
        InputError: Tables train different rows, or a head's bias trains, for which PEFT's format
            has no place.
        OSError: A file cannot be written.
    """
    rows = _trained(model)
    if biases := [key for key in rows if not key.endswith(".weight")]:
        raise InputError(
            f"PEFT's trainable tokens have no bias. Received {biases[0]!r}, whose rows train. Use "
            "save_rows."
        )
    first, *others = rows.values()
    if any(not torch.equal(first, ids) for ids in others):
        raise InputError(
            "an adapter trains the same rows of each table. Received different ones for "
            f"{', '.join(rows)}. Use save_rows."
        )
    modules = [key.removesuffix(".weight") for key in rows]
    config = {
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "init_weights": True,
        "peft_type": "TRAINABLE_TOKENS",
        "target_modules": modules,
        "task_type": None,
        "token_indices": first.tolist(),
    }
    tensors = {
        f"{_PEFT_PREFIX}{name}.{_PEFT_NAME}": model.get_parameter(f"{name}.weight")
        .detach()[first]
        .cpu()
        for name in modules
    }
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with write_atomically(place / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    with write_atomically(place / "adapter_config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def import_peft(model: nn.Module, folder: Path_) -> dict[str, list[int]]:
    """Write the rows of an adapter of PEFT's trainable tokens into a model.

    Args:
        model: The model that the adapter was trained on, with its tables grown to the same size.
        folder: The adapter, of trainable tokens or of LoRA with `trainable_token_indices`, of which
            the tokens alone are read.

    Returns:
        The rows that were written, by the parameter's name.

    Raises:
        InputError: The folder holds no trainable tokens, or those of another model. The model is
            then as it was.
        OSError: A file cannot be read.
    """
    place = Path(folder)
    try:
        config = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: adapter_config.json is JSON. Received: {error}.") from None
    indices = config.get("token_indices") or config.get("trainable_token_indices")
    tensors, _ = _read(place / "adapter_model.safetensors")
    parts = {}
    for key, values in tensors.items():
        if not key.endswith(f".{_PEFT_NAME}") or not indices:
            continue
        name = key.removeprefix(_PEFT_PREFIX).removesuffix(f".{_PEFT_NAME}")
        name = name.removesuffix(".token_adapter")
        own = indices
        if isinstance(indices, dict):
            own = next(i for end, i in indices.items() if f".{name}".endswith(f".{end}"))
        parts[f"{name}.weight"] = torch.tensor(own), values
    if not parts:
        raise InputError(
            f"{place}: an adapter with trainable tokens is meant. Received a "
            f"{config.get('peft_type')} adapter without."
        )
    _check_parts(model, place, parts, {}, may_grow=False)
    return _write(model, parts)


# What trains, and what tokens it stands for


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The trainable rows of each parameter, by its name in the `state_dict`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rows = {
        names[id(parameter)]: table.row_set.ids
        for _, table, parameter in row_parameters_in(model)
        if table.has_frozen_rows
    }
    if not any(map(len, rows.values())):
        raise InputError(
            "saved rows are those of a partly trainable table. Received a "
            f"{type(model).__name__} in which all rows train, or none. Save its state_dict."
        )
    return rows


def _digest(tokenizer: Any, without: set[str]) -> str:
    vocabulary = tokenizer.get_vocab()
    known = sorted((row, token) for token, row in vocabulary.items() if token not in without)
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _missing_tokens(
    path: Path_, about: dict[str, str], tokens: dict[int, str], tokenizer: Any
) -> list[str]:
    """The file's tokens that a tokenizer lacks, in the order in which it is to get them."""
    if tokenizer is None:
        return []
    if not tokens:
        raise InputError(
            f"{path}: a tokenizer is compared with the tokens of the file. Received a file without "
            "tokens. Leave the tokenizer out, or pass it to save_rows too."
        )
    vocabulary = tokenizer.get_vocab()
    missing = [token for _, token in sorted(tokens.items()) if token not in vocabulary]
    expected = {token: len(tokenizer) + i for i, token in enumerate(missing)}
    for row, token in sorted(tokens.items()):
        here = expected.get(token, vocabulary.get(token))
        if here != row:
            raise InputError(
                f"{path}: rows belong to one vocabulary. Received a tokenizer in which {token!r} "
                f"has row {here} and not {row}. Pass the tokenizer that they were trained with."
            )
    if _digest(tokenizer, set(tokens.values())) != about["vocabulary"]:
        raise InputError(
            f"{path}: rows belong to one vocabulary. Received a tokenizer with other tokens. Pass "
            "the one that they were trained with."
        )
    return missing


# Reading and writing


def _read(path: Path_) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path}: a safetensors file is meant. Received: {error}.") from None


def _check_parts(
    model: nn.Module,
    path: Path_,
    parts: dict[str, tuple[Tensor, Tensor]],
    sizes: dict[str, int],
    may_grow: bool,
) -> None:
    known = dict(model.named_parameters(remove_duplicate=False))
    for key, (ids, values) in parts.items():
        if key not in known:
            raise InputError(
                f"{path}: rows belong to one model. Received a {type(model).__name__} without "
                f"{key!r}."
            )
        here = known[key]
        if here.shape[1:] != values.shape[1:]:
            raise InputError(
                f"{path}: {key!r} has rows of shape {tuple(values.shape[1:])}. Received a model "
                f"where they are {tuple(here.shape[1:])}."
            )
        size = sizes.get(key, len(here))
        if (len(here) != size and not (may_grow and len(here) < size)) or ids.max() >= size:
            raise InputError(
                f"{path}: {key!r} had {sizes.get(key, 'more')} rows, of which {shown(ids)} are "
                f"here. Received a model with {len(here)}. Pass the tokenizer too, so that its "
                "tables grow, or the model of that vocabulary."
            )


@torch.no_grad()
def _write(model: nn.Module, parts: dict[str, tuple[Tensor, Tensor]]) -> dict[str, list[int]]:
    for key, (ids, values) in parts.items():
        parameter = model.get_parameter(key)
        parameter[ids.to(parameter.device)] = values.to(parameter)
    return {key: ids.tolist() for key, (ids, _) in parts.items()}
