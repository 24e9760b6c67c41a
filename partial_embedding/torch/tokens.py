"""New tokens for a language model of `transformers`, of which only the rows learn."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from partial_embedding.errors import InputError
from partial_embedding.torch.replace import check_replaceable, train_only
from partial_embedding.torch.vocabulary_tables import VocabularyTables

Init = Literal["pieces", "mean"] | Tensor

# How much of the table's covariance a row drawn around the mean gets; from the article cited below.
_SPREAD = 1e-5


def add_tokens(
    model: nn.Module,
    tokenizer: Any,
    tokens: Sequence[Any],
    init: Init = "pieces",
    *,
    pad_to_multiple_of: int | None = None,
    sparse: bool = True,
) -> list[int]:
    """Add tokens to a model and its tokenizer, and train their rows alone.

    All tables of the vocabulary grow where they have to, inputs and heads, tied or not; exactly the
    new rows of each are trainable from here on, with their entries of a head's bias, and `"new"`
    names them in schedules. Then train as always, with LoRA put on before or after. Parameters
    other than the tables train or not as they did.

    Args:
        model: A `transformers` model, or one that `peft` has wrapped.
        tokenizer: Its tokenizer, or its processor, which gets the tokens.
        tokens: The new tokens, strings or `tokenizers.AddedToken`s; those with `special=True`
            become special tokens. Tokens that the tokenizer has already, and the model has not,
            are taken too.
        init: What new rows begin from: `"pieces"`, the mean of the rows of the pieces that the
            tokenizer has made of the token so far; `"mean"`, a draw around the mean of all rows,
            with their covariance made small (Hewitt 2021,
            https://nlp.stanford.edu/~johnhew/vocab-expansion.html); or vectors for the input,
            shape (n, D), while all other tables begin from the pieces.
        pad_to_multiple_of: Where tables have to grow, let them have a multiple of so many rows, as
            kernels like it; tokens that are added later take the rows that are free.
        sparse: Give the tables sparse gradients.

    Returns:
        The row of each token, in the order of the tokens.

    Raises:
        InputError: A token is empty, occurs twice or has a row already; the vectors do not fit; or
            the model has no tables that can grow or be partly trainable. Model and tokenizer are
            then as they were.

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
    tables = VocabularyTables(model)
    for table in tables.tables:
        check_replaceable(model, table, sparse)
    tokenizer = tokenizer_of(tokenizer)
    names = _names(tokens)
    check_init(init, ("pieces", "mean"))
    rows = _rows_to_be(tokenizer, tokens, names, len(tables.input.weight))
    count = _growth(tables, max(rows) + 1, pad_to_multiple_of)
    if count:
        tables.check_can_change()
    known = min(len(tokenizer), tables.num_rows)
    pieces = [pieces_of(tokenizer, name, known) for name in names]
    begun = _beginnings(tables, known, pieces, init)

    sizes = [len(table.weight) for table in tables.tables]
    if count:
        tables.grow(count)
    put_into(tokenizer, tokens)
    with torch.no_grad():
        for (table, attribute), values in begun.items():
            parameter = getattr(table, attribute)
            parameter[rows] = values.to(parameter)
    new = np.unique(np.array(rows, np.int64))
    for table, size in zip(tables.tables, sizes, strict=True):
        train_only(model, table, new, sparse)
        table.note_growth(size, new)
    return rows


# The tokenizer


def tokenizer_of(tokenizer: Any) -> Any:
    """A tokenizer, or that of a processor; refuses what is neither."""
    for found in (tokenizer, getattr(tokenizer, "tokenizer", None)):
        if callable(getattr(found, "add_tokens", None)):
            return found
    raise InputError(
        "tokens are added to a tokenizer of transformers, or a processor that has one. Received a "
        f"{type(tokenizer).__name__}. Pass one of these."
    )


def put_into(tokenizer: Any, tokens: Iterable[Any]) -> None:
    """Add tokens, strings or `AddedToken`s, to a tokenizer, special ones as such."""
    for special, some in groupby(tokens, lambda token: bool(getattr(token, "special", False))):
        if special:
            # As an added token alone it would not be one of `all_special_tokens`.
            tokenizer.add_special_tokens(
                {"extra_special_tokens": list(some)}, replace_extra_special_tokens=False
            )
        else:
            tokenizer.add_tokens(list(some))


def _names(tokens: object) -> list[str]:
    if isinstance(tokens, str) or not isinstance(tokens, Sequence) or not tokens:
        raise InputError(f"tokens are a list of words. Received: {tokens!r}. For one write [word].")
    names: list[Any] = [getattr(token, "content", token) for token in tokens]
    for i, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise InputError(f"a token is a word. Received: {tokens[i]!r}. Leave it out.")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise InputError(f"each token is added once. Received {twice!r} twice. Drop one.")
    return names


def _rows_to_be(
    tokenizer: Any, tokens: Sequence[Any], names: list[str], num_rows: int
) -> list[int]:
    """The rows that tokens will have: tried on a copy, since a tokenizer takes nothing back."""
    known = tokenizer.get_vocab()
    if present := [name for name in names if known.get(name, num_rows) < num_rows]:
        raise InputError(
            f"new tokens are not in the vocabulary. Received {', '.join(map(repr, present))}, "
            "which are. Train their rows with replace_embedding."
        )
    grown = copy.deepcopy(tokenizer)
    put_into(grown, tokens)
    vocabulary = grown.get_vocab()
    if lost := [name for name in names if name not in vocabulary]:
        raise InputError(
            f"a tokenizer takes a token as it is. Received {lost[0]!r}, which the "
            f"{type(tokenizer).__name__} changes or leaves out. Write it as that gives it back."
        )
    without = sorted(
        (row, name) for name, row in vocabulary.items() if row >= num_rows and name not in names
    )
    if without:
        listed = ", ".join(repr(name) for _, name in without[:6])
        raise InputError(
            f"each token has a row. Received a tokenizer with {len(without)} that the model's "
            f"{num_rows} rows do not reach: {listed}. Add them too; list them among the tokens."
        )
    return [vocabulary[name] for name in names]


def _growth(tables: VocabularyTables, num_rows: int, multiple: int | None) -> int:
    """How many rows the tables lack; their sizes may differ, and go on differing by as much."""
    if multiple is not None and (type(multiple) is not int or multiple < 1):
        raise InputError(
            f"pad_to_multiple_of is a whole number from 1 on. Received: {multiple!r}. 8 suits GPUs."
        )
    if num_rows <= tables.num_rows:
        return 0
    return -(-num_rows // (multiple or 1)) * (multiple or 1) - tables.num_rows


# What new rows begin from


def _beginnings(
    tables: VocabularyTables, known: int, pieces: list[list[int]], init: Init
) -> dict[tuple[Any, str], Tensor]:
    """The first values of the new rows, for each parameter that has such rows."""
    begun: dict[tuple[Any, str], Tensor] = {}
    for table, attribute in tables.parameters():
        parameter = getattr(table, attribute)
        if isinstance(init, Tensor) and table is tables.input:
            check_vectors(init, len(pieces), parameter)
            begun[table, attribute] = init
        elif isinstance(init, str) and init == "mean":
            begun[table, attribute] = _drawn(parameter.detach()[:known].float(), len(pieces))
        else:
            begun[table, attribute] = means_of_pieces(parameter.detach()[:known], pieces)
    return begun


def pieces_of(tokenizer: Any, text: str, known: int) -> list[int]:
    """The rows of a text's pieces that a tokenizer knows, below `known`."""
    pieces = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [piece for piece in pieces if piece != tokenizer.unk_token_id and piece < known]


def means_of_pieces(rows: Tensor, pieces: list[list[int]]) -> Tensor:
    """The mean, float32, of each token's pieces, or of all rows where a token has none."""
    every = None if all(pieces) else rows.float().mean(0)
    return torch.stack([rows[own].float().mean(0) if own else every for own in pieces])  # type: ignore[misc]  # there is one where it is needed


def check_init(init: object, names: tuple[str, ...]) -> None:
    """Refuse what rows cannot begin from: neither a tensor nor one of these names."""
    if not isinstance(init, Tensor) and init not in names:
        listed = ", ".join(map(repr, names))
        raise InputError(
            f"init is {listed} or vectors, a tensor. Received: {init!r}. Take one of these."
        )


def check_vectors(vectors: Tensor, count: int, weight: Tensor) -> None:
    """Refuse vectors that are not one for each of `count` new rows."""
    if vectors.shape != (count, weight.shape[1]):
        raise InputError(
            f"init has a vector for each token, {(count, weight.shape[1])}. Received: "
            f"{tuple(vectors.shape)}. Give them that shape."
        )


def _drawn(rows: Tensor, count: int) -> Tensor:
    """Draws around the mean of some rows, with a share of their covariance."""
    mean = rows.mean(0)
    # A random sum of what rows differ by has their covariance, also where it is singular.
    weights = torch.randn(count, len(rows), device=rows.device)
    spread: Tensor = weights @ (rows - mean) * (_SPREAD / max(1, len(rows) - 1)) ** 0.5
    return mean + spread
