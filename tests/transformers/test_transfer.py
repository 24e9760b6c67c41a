"""Another tokenizer for a language model."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from oracle import assert_alike, assert_same_bits, rows_that_differ, unchanged
from steps import take_steps
from tiny_language_models import (
    TIED,
    VOCABULARY,
    D,
    V,
    inputs,
    language_model,
    lora,
    tokenizer,
)
from tokenizers import Tokenizer, models, pre_tokenizers

from partial_embedding import InputError
from partial_embedding.torch import add_tokens, replace_embedding, transfer_vocabulary
from partial_embedding.torch.optimizer import prepared

OTHERS = ("<s>", "<unk>", "<pad>", "quokka", "mat", "##s", "cat", "quokkas", "sun", "the")
# Rows of the other tokenizer, and where they were.
SHARED = {0: 2, 1: 1, 2: 0, 4: 9, 5: 14, 6: 4, 9: 3}
FRESH = [3, 7, 8]


def other_tokenizer() -> Any:
    rows = {name: row for row, name in enumerate(OTHERS)}
    pieces = Tokenizer(models.WordPiece(rows, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces, eos_token="<s>", unk_token="<unk>", pad_token="<pad>"
    )


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "BERT", "T5"])
@TIED
def test_shared_rows_are_copied_and_the_others_begin_from_their_pieces(
    family: str, tied: bool
) -> None:
    model = language_model(family, tied)
    before = copy.deepcopy(model.state_dict())
    assert transfer_vocabulary(model, tokenizer(), other_tokenizer()) == FRESH
    kept = 0
    for name, value in model.state_dict().items():
        old = before[name]
        if len(value) == len(old):
            assert_same_bits(value, old, name)
            continue
        kept += 1
        assert len(value) == len(OTHERS)
        for row, source in SHARED.items():
            assert_same_bits(value[[row]], old[[source]], name)
        pieces = [VOCABULARY[piece] for piece in ("quo", "##kka")]
        torch.testing.assert_close(value[3], old[pieces].mean(0))
        pieces.append(VOCABULARY["##s"])
        torch.testing.assert_close(value[7], old[pieces].mean(0))
        torch.testing.assert_close(value[8], old.mean(0))  # of no piece that is known
    assert kept >= 2
    config = model.config
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (len(OTHERS), 0, 2)
    assert model.generation_config.eos_token_id == 0
    assert model.get_input_embeddings().padding_idx in {2, None}


@TIED
def test_only_others_learn_until_the_shared_ones_are_unfrozen(tied: bool, tmp_path: Path) -> None:
    model, words = language_model("Llama", tied), other_tokenizer()
    transfer_vocabulary(model, tokenizer(), words)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    for rows in (FRESH, [0, *FRESH, 9]):
        for table in tables:
            table.set_trainable_rows(rows)
        take_steps(optimizer, lambda: model(**inputs(words, "the quokkas sun cat quokka")).loss, 2)
        for name, parameter in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                assert rows_that_differ(before[name], parameter) == rows, name
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    given = inputs(words, "the quokkas sun")
    assert_same_bits(loaded(**given).logits, model(**given).logits, "logits")


def test_vectors_can_be_given() -> None:
    model, vectors = language_model("Llama", tied=False), torch.randn(3, D)
    transfer_vocabulary(model, tokenizer(), other_tokenizer(), vectors)
    assert_same_bits(model.get_input_embeddings().weight[FRESH], vectors, "the vectors")
    assert rows_that_differ(model.lm_head.weight[FRESH], vectors) == [0, 1, 2]


def test_rows_that_learned_before_are_other_tokens_and_begin_anew() -> None:
    model, words = language_model("Llama"), other_tokenizer()
    table = model.get_input_embeddings()
    replace_embedding(model, table, trainable_rows=FRESH)
    table.note_growth(V - 1, np.array(FRESH))
    optimizer = torch.optim.AdamW(model.parameters())
    take_steps(optimizer, lambda: model(**inputs(tokenizer(), "the cat")).loss, 2)
    transfer_vocabulary(model, tokenizer(), words)
    assert table.new_rows is None
    take_steps(optimizer, lambda: model(**inputs(words, "the quokkas")).loss, 1)
    handle = prepared(optimizer)
    assert handle is not None
    (cohort,) = handle.tables[id(table.weight)].cohorts.values()
    assert (cohort.ids.tolist(), cohort.state["step"].item()) == (FRESH, 1)


def test_an_adapter_from_before_has_no_rows_of_the_tokens_of_then() -> None:
    peft = pytest.importorskip("peft")
    model, words = language_model("Llama"), tokenizer()
    add_tokens(model, words, ["numbat"])
    adapted = peft.get_peft_model(model, lora())
    transfer_vocabulary(adapted, words, other_tokenizer())
    weight = model.get_input_embeddings().weight
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW(adapted.parameters())
    take_steps(optimizer, lambda: adapted(**inputs(other_tokenizer(), "the quokkas")).loss, 1)
    assert rows_that_differ(before, weight) == FRESH
    with adapted.disable_adapter():
        assert rows_that_differ(before, weight) == []
    assert rows_that_differ(before, weight) == FRESH


@pytest.mark.parametrize("family", ["Llama", "RoBERTa"])
def test_the_same_tokenizer_changes_nothing(family: str) -> None:
    model = language_model(family)
    before = copy.deepcopy(model.state_dict())
    assert transfer_vocabulary(model, tokenizer(), tokenizer()) == []
    assert_alike(model, before)


def test_a_smaller_model_takes_new_tokens_again() -> None:
    model, words = language_model("Llama"), other_tokenizer()
    transfer_vocabulary(model, tokenizer(), words)
    assert add_tokens(model, words, ["numbat"]) == [len(OTHERS)]


def of_other_words() -> Any:
    words = Tokenizer(models.WordLevel({"alpha": 0, "beta": 1}))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words)


@pytest.mark.parametrize(
    ("architecture", "words", "init", "message"),
    [
        ("Llama", other_tokenizer, "mean", r"init is 'pieces' or vectors.*: 'mean'"),
        ("Llama", other_tokenizer, torch.zeros(2, D), r"\(3, 8\)\. Received: \(2, 8\)"),
        ("Llama 3.2 Vision", other_tokenizer, "pieces", r"tables of one size. .* 24, 16 rows"),
        ("Llama", of_other_words, "pieces", r"share none. Make a new model"),
        ("RoBERTa", other_tokenizer, "pieces", r"'roberta.*position.*no padding in row 0\."),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_is_as_it_was(
    architecture: str, words: Any, init: Any, message: str
) -> None:
    model = language_model(architecture, tied=False)
    with unchanged(model), pytest.raises(InputError, match=message):
        transfer_vocabulary(model, tokenizer(), words(), init)
    assert len(model.get_input_embeddings().weight) in (V, V + 8)
