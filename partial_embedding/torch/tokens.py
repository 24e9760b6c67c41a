"""New tokens for a language model of `transformers`, of which only the rows learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from partial_embedding.errors import InputError
from partial_embedding.torch.replace import check_replaceable, find_table, train_only

Init = Literal["pieces", "mean"] | Tensor

# How much of the table's covariance a row drawn around the mean gets; from the article cited below.
_SPREAD = 1e-5


def add_tokens(
    model: nn.Module,
    tokenizer: Any,
    tokens: Sequence[str],
    init: Init = "pieces",
    *,
    sparse: bool = True,
) -> list[int]:
    """Add tokens to a model and its tokenizer, and train their rows alone.

    The tables grow where they have to, input and head, tied or not; exactly the new rows of both
    are trainable from here on, with their entries of the head's bias. Prepare the optimizer with
    `rowwise`. Parameters other than the tables train or not as they did; where LoRA is added to
    them, do so first, since `peft` freezes all that it does not add.

    Args:
        model: A `transformers` model, or one that `peft` has wrapped.
        tokenizer: Its tokenizer, which gets the tokens.
        tokens: The new tokens.
        init: What new rows begin from: `"pieces"`, the mean of the rows of the pieces that the
            tokenizer has made of the token so far; `"mean"`, a draw around the mean of all rows,
            with their covariance made small (Hewitt 2021,
            https://nlp.stanford.edu/~johnhew/vocab-expansion.html); or vectors for the input,
            shape (n, D), while a head that is not tied begins from the pieces.
        sparse: Give the tables sparse gradients. Hugging Face's `Trainer` needs False: it measures
            the norm of all gradients.

    Returns:
        The row of each token, in the order of the tokens.

    Raises:
        InputError: A token is empty, occurs twice or is in the vocabulary already; the vectors do
            not fit; or the model has no tables that can grow or be partly trainable. Model and
            tokenizer are then as they were.

    Example:
        >>> import transformers
        >>> from tokenizers import Tokenizer, models
        >>> words = Tokenizer(models.WordLevel({"[UNK]": 0, "cat": 1, "dog": 2}, "[UNK]"))
        >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
        >>> config = transformers.GPT2Config(vocab_size=3, n_embd=4, n_layer=1, n_head=1)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> add_tokens(model, tokenizer, ["quokka", "numbat"])
        [3, 4]
        >>> model.lm_head.weight is model.transformer.wte.weight, model.lm_head.trainable_rows
        (True, tensor([3, 4]))
    """
    tables = _tables(model)
    for table in tables:
        check_replaceable(model, table, sparse)
    _check_tokens(tokenizer, tokens)
    if not isinstance(init, Tensor) and init not in ("pieces", "mean"):
        raise InputError(f"init is 'pieces', 'mean' or vectors, a tensor. Received: {init!r}.")
    _check_room(model, tables[0], len(tokenizer) + len(tokens))
    known = len(tokenizer)
    begun = _beginnings(tables, known, _pieces(tokenizer, tokens, known), init)

    tokenizer.add_tokens(list(tokens))
    rows: list[int] = tokenizer.convert_tokens_to_ids(list(tokens))
    grow(model, max(rows) + 1)
    with torch.no_grad():
        for (table, attribute), values in begun.items():
            parameter = getattr(table, attribute)
            parameter[rows] = values.to(parameter)
    for table in tables:
        train_only(model, table, np.unique(np.array(rows, np.int64)), sparse)
    return rows


def grow(model: Any, num_rows: int) -> None:
    """Give a model's tables at least so many rows; what new rows hold is not said.

    Args:
        model: A `transformers` model.
        num_rows: The rows that are needed. Tables that have more, as some models do, keep them.
    """
    if model.get_input_embeddings().weight.shape[0] >= num_rows:
        return
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    # transformers makes another head where it is not tied, of parameters that no optimizer knows,
    # and ties the two biases of an untied BERT, which then cannot be saved. So what was there goes
    # back to its place, with the new values.
    resized = dict(model.named_parameters(remove_duplicate=False))
    taken: set[int] = set()
    for path, parameter in parameters.items():
        if (new := resized[path]) is not parameter:
            parameter.data = new.data.clone() if id(new) in taken else new.data
            taken.add(id(new))
    for path, module in modules.items():
        if (new := model.get_submodule(path)) is not module:
            size = "num_embeddings" if isinstance(module, nn.Embedding) else "out_features"
            setattr(module, size, getattr(new, size))
            _put(model, path, module)
    for path, parameter in parameters.items():
        if model.get_parameter(path) is not parameter:
            _put(model, path, parameter)


def _put(model: nn.Module, path: str, value: Any) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, value)


def _tables(model: Any) -> list[Any]:
    """The input embedding, and the output head where there is one."""
    if not callable(getattr(model, "get_input_embeddings", None)):
        raise InputError(
            "tokens are added to a model of transformers. Received a "
            f"{type(model).__name__}. For another model call replace_embedding."
        )
    table, head = find_table(model, None), model.get_output_embeddings()
    if head is None:
        return [table]
    inner = [module for module in head.modules() if isinstance(module, nn.Linear)]
    if not inner:
        raise InputError(
            "an output head is a linear layer. Received a "
            f"{type(head).__name__}. For such a model call replace_embedding."
        )
    return [table, find_table(model, inner[0])]


# Checks


def _check_tokens(tokenizer: Any, tokens: object) -> None:
    if isinstance(tokens, str) or not isinstance(tokens, Sequence) or not tokens:
        raise InputError(f"tokens are a list of words. Received: {tokens!r}.")
    known = tokenizer.get_vocab()
    for i, token in enumerate(tokens):
        if not isinstance(token, str) or not token.strip():
            raise InputError(f"a token is a word. Received: {token!r}.")
        if token in tokens[:i]:
            raise InputError(f"each token is added once. Received {token!r} twice. Drop one.")
    if present := [token for token in tokens if token in known]:
        raise InputError(
            f"new tokens are not in the vocabulary. Received {', '.join(map(repr, present))}, "
            "which are. Train their rows with replace_embedding."
        )


def _check_room(model: Any, table: Any, num_rows: int) -> None:
    if table.weight.shape[0] >= num_rows:
        return
    embedding = model.get_input_embeddings()
    if embedding is not table or not callable(getattr(model, "resize_token_embeddings", None)):
        raise InputError(
            f"the tables grow to {num_rows} rows. Received a {type(model).__name__} whose input "
            f"embedding is a {type(embedding).__name__}, which does not grow. Leave the embedding "
            "out of what peft adapts."
        )


# What new rows begin from


def _pieces(tokenizer: Any, tokens: Sequence[str], known: int) -> list[list[int]]:
    """For each token the rows of its pieces, or all rows where the tokenizer knows none."""
    found = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    return [
        [piece for piece in pieces if piece != tokenizer.unk_token_id] or list(range(known))
        for pieces in found
    ]


def _beginnings(
    tables: list[Any], known: int, pieces: list[list[int]], init: Init
) -> dict[tuple[Any, str], Tensor]:
    """The first values of the new rows, for each parameter that has such rows, once."""
    begun: dict[tuple[Any, str], Tensor] = {}
    seen: set[int] = set()
    for table in tables:
        for attribute in ("weight", "bias"):
            parameter = getattr(table, attribute, None)
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_input = table is tables[0]
            begun[table, attribute] = (
                _given(init, len(pieces), parameter)
                if isinstance(init, Tensor) and is_input
                else _drawn(parameter.detach()[:known].float(), len(pieces))
                if init == "mean"
                else torch.stack([parameter.detach()[own].float().mean(0) for own in pieces])
            )
    return begun


def _given(vectors: Tensor, count: int, weight: Tensor) -> Tensor:
    if vectors.shape != (count, weight.shape[1]):
        raise InputError(
            f"init has a vector for each token, {(count, weight.shape[1])}. Received: "
            f"{tuple(vectors.shape)}."
        )
    return vectors


def _drawn(rows: Tensor, count: int) -> Tensor:
    """Draws around the mean of some rows, with a share of their covariance."""
    mean = rows.mean(0)
    # A random sum of what rows differ by has their covariance, also where it is singular.
    weights = torch.randn(count, len(rows), device=rows.device)
    spread: Tensor = weights @ (rows - mean) * (_SPREAD / max(1, len(rows) - 1)) ** 0.5
    return mean + spread
