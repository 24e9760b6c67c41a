"""A small language model, trained here on given texts, to try things out without a download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

# Token ids, which of them are no padding, and which count in the loss, each of shape (B, L), int64.
TokenBatch = dict[str, Tensor]

_WIDTH = 64
_TOKENS = 600
_LENGTH = 64
_BATCH = 32


def small_language_model(texts: Sequence[str], steps: int = 300, seed: int = 0) -> tuple[Any, Any]:
    """Train a tokenizer and a Llama of two layers with a tied head on texts.

    300 steps take less than a minute on two cores. Random numbers of the process are left alone.

    Example:
        >>> model, tokenizer = small_language_model(["the cat sat", "the dog ran"], steps=2)
        >>> tokenizer.tokenize("the cat")
        ['the', 'cat']
        >>> model.lm_head.weight is model.model.embed_tokens.weight
        True
    """
    tokenizer = small_tokenizer(texts)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=2 * _WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=2 * _LENGTH,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        model = transformers.LlamaForCausalLM(config)
        _train(model, [tokenizer(text)["input_ids"][:_LENGTH] for text in texts], steps)
    return model.train(False), tokenizer


def small_tokenizer(texts: Sequence[str], num_tokens: int = _TOKENS) -> Any:
    """Train a fast tokenizer of `transformers`, of so many tokens at most."""
    # No word pieces: their training numbers pieces differently in each process.
    pieces = Tokenizer(models.BPE(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens, special_tokens=["[PAD]", "[UNK]"], show_progress=False
    )
    pieces.train_from_iterator(texts, trainer)
    make: Any = transformers.PreTrainedTokenizerFast
    return make(tokenizer_object=pieces, unk_token="[UNK]", pad_token="[PAD]")


def _train(model: Any, rows: list[list[int]], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        chosen = torch.randint(len(rows), (_BATCH,)).tolist()
        optimizer.zero_grad()
        model(**batch_of([rows[i] for i in chosen])).loss.backward()
        optimizer.step()


def batch_of(rows: Sequence[Sequence[int]]) -> TokenBatch:
    """A batch of texts, given the ids of each; of the labels, padding is -100."""
    width = max(2, *map(len, rows))  # a loss of the next token needs two
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
