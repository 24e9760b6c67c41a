"""Another tokenizer for a language model: rows that both share stay, and the others learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from partial_embedding.errors import InputError
from partial_embedding.torch.replace import check_replaceable, train_only, users_of
from partial_embedding.torch.table import PartialTable
from partial_embedding.torch.tokens import (
    check_init,
    check_vectors,
    means_of_pieces,
    pieces_of,
    tokenizer_of,
)
from partial_embedding.torch.vocabulary_tables import VocabularyTables, configurations_in

Init = str | Tensor

# What a token is for, which two tokenizers may write differently.
_ROLES = ("unk", "pad", "bos", "eos", "cls", "sep", "mask")


def transfer_vocabulary(
    model: Any,
    old_tokenizer: Any,
    new_tokenizer: Any,
    init: Init = "pieces",
    *,
    sparse: bool = True,
) -> list[int]:
    """Move a language model to another tokenizer, of another language or field.

    Rows of tokens that both tokenizers have are copied to their new places, and start frozen; so
    are those of special tokens of the same purpose. All others begin from what the old tokenizer
    made of them, and train. A schedule may wake the shared ones later, by their frequency in the
    new texts: to train new embeddings before the rest of a model keeps what it has learned
    (Minixhofer et al. 2022, https://arxiv.org/abs/2112.06598; Dobler and de Melo 2023,
    https://arxiv.org/abs/2305.14481).

    Args:
        model: A `transformers` model, or one that `peft` has wrapped.
        old_tokenizer: Its tokenizer or processor.
        new_tokenizer: The one that it gets; the ids of special tokens in the model's
            configurations become those of this one.
        init: What rows of tokens begin from that only the new tokenizer has: `"pieces"`, the mean
            of the rows of their old pieces; or vectors for the input, shape (n, D), in the order of
            the rows, while all other tables begin from the pieces.
        sparse: Give the tables sparse gradients.

    Returns:
        The rows that train, rising.

    Raises:
        InputError: The vectors do not fit, the tokenizers have nothing in common, or the model has
            no tables that can change their size or be partly trainable, or counts positions from a
            row of padding that the new tokenizer has elsewhere. The model is then as it was.

    Example:
        >>> import transformers
        >>> from tokenizers import Tokenizer, models
        >>> def tokenizer(*words):
        ...     rows = {word: i for i, word in enumerate(("[UNK]", *words))}
        ...     words = Tokenizer(models.WordLevel(rows, "[UNK]"))
        ...     return transformers.PreTrainedTokenizerFast(
        ...         tokenizer_object=words, unk_token="[UNK]"
        ...     )
        >>> config = transformers.GPT2Config(vocab_size=3, n_embd=4, n_layer=1, n_head=1)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> cat = model.lm_head.weight[1].detach().clone()
        >>> transfer_vocabulary(model, tokenizer("cat", "dog"), tokenizer("gato", "perro", "cat"))
        [1, 2]
        >>> model.lm_head, torch.equal(model.lm_head.weight[3], cat)
        (PartialLinear(in_features=4, out_features=4, bias=False, trainable_rows=2), True)
    """
    old_tokenizer, new_tokenizer = tokenizer_of(old_tokenizer), tokenizer_of(new_tokenizer)
    tables = VocabularyTables(model)
    for table in tables.tables:
        check_replaceable(model, table, sparse)
    tables.check_can_change()
    check_init(init, ("pieces",))
    sizes = [len(table.weight) for table in tables.tables]
    if len(set(sizes)) > 1:
        raise InputError(
            "a vocabulary is replaced in tables of one size. Received a "
            f"{type(model).__name__} whose tables have {', '.join(map(str, sizes))} rows. Resize "
            "them to one first."
        )
    source = _sources(old_tokenizer, new_tokenizer, tables.num_rows)
    fresh = (source < 0).nonzero().flatten()
    if len(fresh) == len(source):
        raise InputError(
            "two tokenizers share some tokens, of which the rows are copied. Received two that "
            "share none. Make a new model of the new tokenizer."
        )
    _check_positions(model, source)
    if isinstance(init, Tensor):
        check_vectors(init, len(fresh), tables.input.weight)
    pieces = _old_pieces(old_tokenizer, new_tokenizer, fresh.tolist(), tables.num_rows)

    def rows_of_new(rows: Tensor) -> Tensor:
        made = rows[source.clamp(min=0).to(rows.device)]
        if len(fresh):
            made[fresh.to(rows.device)] = means_of_pieces(rows, pieces).to(made)
        return made

    tables.change(rows_of_new)
    if isinstance(init, Tensor):
        weight = tables.input.weight.data
        weight[fresh.to(weight.device)] = init.to(weight)
    _move_ids(model, tables, source, new_tokenizer)
    if getattr(model, "peft_config", None):
        # Not at the top: peft is an optional package, and loads many others.
        from partial_embedding.torch.peft_rows import leave_adapters

        leave_adapters(model)  # whose rows are other tokens'; `train_only` stands beside them anew
    for table in tables.tables:
        if isinstance(table, PartialTable):
            table.forget_rows()
        train_only(model, table, fresh.numpy().astype(np.int64), sparse)
    rising: list[int] = fresh.tolist()
    return rising


def _sources(old: Any, new: Any, num_rows: int) -> Tensor:
    """The old row of each new one, or -1, int64, shape (V,)."""
    before, after = old.get_vocab(), new.get_vocab()
    source = torch.full((max(after.values()) + 1,), -1, device="cpu")
    for name, row in after.items():
        if before.get(name, num_rows) < num_rows:
            source[row] = before[name]
    for role in _ROLES:
        was, now = (getattr(its, f"{role}_token_id", None) for its in (old, new))
        if was is not None and now is not None and was < num_rows:
            source[now] = was
    return source


def _check_positions(model: Any, source: Tensor) -> None:
    """Refuse to move the padding of a model that counts positions from its row."""
    for name, module in model.named_modules():
        row = getattr(module, "padding_idx", None)
        if row is None or "position" not in name.rpartition(".")[2]:
            continue
        if row >= len(source) or source[row] != row:
            raise InputError(
                "positions are counted from the row of the padding, in models such as RoBERTa. "
                f"Received a {type(model).__name__} with {name!r}, and a tokenizer that has no "
                f"padding in row {row}. Make one that has it there."
            )


def _old_pieces(old: Any, new: Any, rows: list[int], num_rows: int) -> list[list[int]]:
    pieces = []
    for name in new.convert_ids_to_tokens(rows):
        # A piece of a word says so by a mark that is not part of it; bytes that are no character
        # alone tell nothing.
        text = "" if name is None else new.convert_tokens_to_string([name]).removeprefix("##")
        pieces.append([] if "\ufffd" in text else pieces_of(old, text, num_rows))
    return pieces


# What else of a model speaks of tokens by their ids


def _move_ids(model: Any, tables: VocabularyTables, source: Tensor, new: Any) -> None:
    moved = {old: row for row, old in enumerate(source.tolist()) if old >= 0}
    # Each once: a head that is tied and has a bias is a table, too.
    for user in {user for table in tables.tables for _, user in users_of(model, table)}:
        if getattr(user, "padding_idx", None) is not None:
            user.padding_idx = moved.get(user.padding_idx)  # type: ignore[assignment]
    for config in configurations_in(model):
        for name, value in list(vars(config).items()):
            if not name.endswith(("_token_id", "_token_ids")):
                continue
            own = getattr(new, name, None)
            if isinstance(value, list):
                setattr(config, name, [moved[row] for row in value if row in moved])
            elif isinstance(value, int):
                setattr(config, name, moved.get(value) if own is None else own)
