"""Files that hold trained rows alone: our own, and those of PEFT's trainable tokens."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from partial_embedding.errors import InputError
from partial_embedding.files import write_atomically
from partial_embedding.torch.rows_by_name import (
    PEFT_PREFIX,
    Parts,
    Path_,
    check_parts,
    parameters_of,
    plain_name,
    read_tensors,
    trained_rows,
    write_parts,
)
from partial_embedding.torch.shards import is_first, rows_of
from partial_embedding.torch.tokens import put_into, tokenizer_of
from partial_embedding.torch.vocabulary_tables import VocabularyTables

_FORMAT = "partial_embedding rows 1"
_PEFT_NAME = "trainable_tokens_delta"


def save_rows(model: nn.Module, path: Path_, tokenizer: Any = None) -> None:
    """Write the trainable rows of a model's tables, and nothing else, to a safetensors file.

    Where processes share a table all of them call this; the rows are gathered in chunks, and the
    first process writes.

    Args:
        model: A model with partly trainable tables. Whether `peft` has wrapped it makes no
            difference to the file.
        path: The file. Its folder must exist.
        tokenizer: The model's tokenizer or processor. With it, the file knows the tokens of its
            rows, and is refused by a tokenizer with other ones.

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
    rows, parameters = trained_rows(model), parameters_of(model)
    tensors: dict[str, Tensor] = {}
    for key, ids in rows.items():
        tensors[key] = rows_of(parameters[key], ids)
        tensors[f"{key}:rows"] = ids.cpu().clone()  # a bias has those of its weight
    about = {
        "format": _FORMAT,
        "num_rows": json.dumps({key: len(parameters[key]) for key in rows}),
    }
    if tokenizer is not None:
        about |= _tokens_of(tokenizer_of(tokenizer), torch.cat(list(rows.values())).unique())
    if not all(is_first(parameters[key]) for key in rows):
        return
    with write_atomically(path) as temporary:
        save_file(tensors, temporary, about)


def load_rows(
    model: nn.Module, path: Path_, tokenizer: Any = None, *, overwrite: bool = False
) -> dict[str, list[int]]:
    """Write the rows of a file into a model, partly trainable or plain.

    Args:
        model: A model of the kind that the rows come from, wrapped by `peft` or not.
        path: A file that `save_rows` wrote.
        tokenizer: The model's tokenizer or processor. Tokens of the file that it lacks are added to
            it, special ones as such, and the tables grow, where that gives them the rows that they
            have in the file.
        overwrite: Write over rows that another file has brought.

    Returns:
        The rows that were written, by the parameter's name.

    Raises:
        InputError: The file is not one of these, belongs to another model or vocabulary, or has
            other values for rows of another file. Model and tokenizer are then as they were.
        OSError: The file cannot be read.

    Example:
        >>> import tempfile
        >>> from partial_embedding.torch import PartialEmbedding
        >>> trained = nn.Sequential(PartialEmbedding(10, 4, trainable_rows=[7]))
        >>> model = nn.Sequential(nn.Embedding(10, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_rows(trained, f"{folder}/rows.safetensors")
        ...     load_rows(model, f"{folder}/rows.safetensors")
        {'0.weight': [7]}
        >>> torch.equal(model[0].weight[7], trained[0].weight[7])
        True
    """
    tensors, about = read_tensors(path)
    if about.get("format") != _FORMAT:
        raise InputError(
            f"{path}: rows come from a file that save_rows wrote. Received another. Name one."
        )
    sizes = _json_of(path, about, "num_rows", _size)
    named = {part for key in sizes for part in (key, f"{key}:rows")}
    if not named or named != tensors.keys():
        odd = min(named ^ tensors.keys(), default=None)
        raise InputError(
            f"{path}: a file has rows and ids of each table, and no more. Received "
            f"{'nothing' if odd is None else repr(odd)}. Save it again."
        )
    parts = {key: (tensors[f"{key}:rows"], tensors[key]) for key in sizes}
    missing: list[Any] = []
    if tokenizer is not None:
        tokenizer = tokenizer_of(tokenizer)
        missing = _missing_tokens(path, about, tokenizer)
    may_grow = bool(missing)
    count = check_parts(model, path, parts, sizes, may_grow=may_grow, overwrite=overwrite)
    if count:
        VocabularyTables(model).grow(count)
    put_into(tokenizer, missing)
    return write_parts(model, parts)


def export_peft(model: Any, folder: Path_) -> None:
    """Write the trainable rows as an adapter of PEFT's trainable tokens.

    PEFT, and servers that read its adapters, load it onto the original model with its tables grown
    to the same size. Of a model that `peft` has adapted, adapter and rows become one, as they do in
    its own `save_pretrained`.

    Args:
        model: A model with partly trainable tables.
        folder: Where `adapter_config.json` and `adapter_model.safetensors` go; made if missing.

    Raises:
        InputError: No table is partly trainable, or rows of a head's bias train, for which PEFT's
            format has no place.
        OSError: A file cannot be written.

    Example:
        >>> import os, tempfile
        >>> from partial_embedding.torch import PartialEmbedding
        >>> model = nn.Sequential(PartialEmbedding(10, 4, trainable_rows=[7]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_peft(model, folder)
        ...     sorted(os.listdir(folder))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    rows = trained_rows(model)
    if biases := [key for key in rows if not key.endswith(".weight")]:
        raise InputError(
            f"PEFT's trainable tokens have no bias. Received {biases[0]!r}, whose rows train. Use "
            "save_rows."
        )
    if hasattr(model, "get_base_model"):
        # The whole tables are left out: their rows that learned are in the adapter.
        model.save_pretrained(folder, save_embedding_layers=False)
        return
    # An adapter of LoRA without any: of PEFT's two places for tokens the one that can be one of
    # several adapters of a model with a tied head, and in which each table has rows of its own.
    names = [key.removesuffix(".weight") for key in rows]
    config = {
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "peft_type": "LORA",
        "r": 1,
        "target_modules": "dummy-target-modules",
        "task_type": None,
        "trainable_token_indices": {name: rows[f"{name}.weight"].tolist() for name in names},
    }
    parameters = parameters_of(model)
    tensors = {
        f"{PEFT_PREFIX}{name}.token_adapter.{_PEFT_NAME}": rows_of(
            parameters[f"{name}.weight"], rows[f"{name}.weight"]
        )
        for name in names
    }
    if not all(is_first(parameters[f"{name}.weight"]) for name in names):
        return
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with write_atomically(place / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    with write_atomically(place / "adapter_config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def import_peft(
    model: nn.Module, folder: Path_, *, overwrite: bool = False
) -> dict[str, list[int]]:
    """Write the rows of an adapter of PEFT's trainable tokens into a model.

    Args:
        model: The model that the adapter was trained on, with its tables grown to the same size.
        folder: The adapter, of trainable tokens or of LoRA with `trainable_token_indices`, of which
            the tokens alone are read.
        overwrite: As for `load_rows`.

    Returns:
        The rows that were written, by the parameter's name.

    Raises:
        InputError: The folder holds no trainable tokens, or those of another model. The model is
            then as it was.
        OSError: A file cannot be read.

    Example:
        >>> import tempfile
        >>> from partial_embedding.torch import PartialEmbedding
        >>> model = nn.Sequential(PartialEmbedding(10, 4, trainable_rows=[7]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_peft(model, folder)
        ...     import_peft(nn.Sequential(nn.Embedding(10, 4)), folder)
        {'0.weight': [7]}
    """
    place = Path(folder)
    config = _config_in(place)
    indices = config.get("token_indices") or config.get("trainable_token_indices")
    tensors, _ = read_tensors(place / "adapter_model.safetensors")
    parts: Parts = {}
    for key, values in tensors.items():
        if not key.endswith(f".{_PEFT_NAME}") or not indices:
            continue
        name = key.removesuffix(f".{_PEFT_NAME}").removesuffix(".token_adapter")
        name = plain_name(f"{name}.weight").removesuffix(".weight")
        own = indices
        if isinstance(indices, dict):
            own = next((i for end, i in indices.items() if f".{name}".endswith(f".{end}")), None)
        if not (isinstance(own, list) and all(type(i) is int for i in own)):
            raise InputError(
                f"{place}: each table has its ids, whole numbers. Received {own!r} for {name!r}. "
                "Get it again."
            )
        parts[f"{name}.weight"] = torch.tensor(own, dtype=torch.int64, device="cpu"), values
    if not parts:
        raise InputError(
            f"{place}: an adapter with trainable tokens is meant. Received a "
            f"{config.get('peft_type')} adapter without. For others use peft."
        )
    check_parts(model, place, parts, {}, may_grow=False, overwrite=overwrite)
    return write_parts(model, parts)


def _config_in(place: Path) -> dict[str, Any]:
    try:
        config = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError as error:  # no text, or no JSON
        config = error
    if not isinstance(config, dict):
        raise InputError(
            f"{place}: adapter_config.json is an object in JSON. Received: {config}. Get it again."
        )
    return config


# What tokens rows stand for


def _tokens_of(tokenizer: Any, rows: Tensor) -> dict[str, str]:
    """What a file says of its rows' tokens."""
    ids = rows.tolist()
    if ids and ids[-1] >= len(tokenizer):
        raise InputError(
            f"each trained row is a token's. Received row {ids[-1]} and a tokenizer of "
            f"{len(tokenizer)} tokens. Pass the tokenizer that the tokens were added to."
        )
    names = tokenizer.convert_ids_to_tokens(ids)
    # How each is found in texts, and whether it is special.
    added = {row: token for row, token in tokenizer.added_tokens_decoder.items() if row in ids}
    return {
        "tokens": json.dumps(dict(zip(map(str, ids), names, strict=True))),
        "added": json.dumps({str(row): token.__getstate__() for row, token in added.items()}),
        "vocabulary": _digest(tokenizer.get_vocab(), set(names)),
    }


def _digest(vocabulary: Mapping[str, int], without: set[str]) -> str:
    known = sorted((row, token) for token, row in vocabulary.items() if token not in without)
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _missing_tokens(path: Path_, about: dict[str, str], tokenizer: Any) -> list[Any]:
    """The file's tokens that a tokenizer lacks, in the order in which it is to get them."""
    if "tokens" not in about:
        raise InputError(
            f"{path}: a tokenizer is compared with the tokens of the file. Received a file without "
            "tokens. Leave the tokenizer out, or pass it to save_rows too."
        )
    # Not at the top: it comes with the tokenizer.
    from tokenizers import AddedToken

    names = _json_of(path, about, "tokens", lambda row, name: (int(row), str(name)))
    added = _json_of(path, about, "added", lambda row, how: (int(row), AddedToken(**how)))
    known = tokenizer.get_vocab()
    missing = [added.get(row, name) for row, name in sorted(names.items()) if name not in known]
    # Tried on a copy, since a tokenizer takes nothing back.
    grown = copy.deepcopy(tokenizer)
    put_into(grown, missing)
    vocabulary = grown.get_vocab()
    for row, name in sorted(names.items()):
        if vocabulary.get(name) != row:
            raise InputError(
                f"{path}: rows belong to one vocabulary. Received a tokenizer in which {name!r} "
                f"has row {vocabulary.get(name)} and not {row}. Pass the tokenizer that they were "
                "trained with."
            )
    if _digest(vocabulary, set(names.values())) != about.get("vocabulary"):
        raise InputError(
            f"{path}: rows belong to one vocabulary. Received a tokenizer with other tokens. Pass "
            "the one that they were trained with."
        )
    return missing


def _json_of(
    path: Path_, about: Mapping[str, str], name: str, read: Callable[[str, Any], tuple[Any, Any]]
) -> dict[Any, Any]:
    """What a file says of its rows under a name, entry by entry."""
    try:
        return dict(read(*entry) for entry in json.loads(about[name]).items())
    except (AttributeError, KeyError, TypeError, ValueError):  # another thing than save_rows writes
        raise InputError(
            f"{path}: a file of rows says {name!r} of them, an object in JSON. Received: "
            f"{about.get(name)!r}. Write it with save_rows."
        ) from None


def _size(key: str, num_rows: object) -> tuple[str, int]:
    if type(num_rows) is not int:
        raise TypeError
    return key, num_rows
