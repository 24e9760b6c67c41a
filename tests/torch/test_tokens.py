"""New tokens in language models of `transformers`: their rows learn, and nothing else of them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

import torch  # noqa: E402  # after the packages that may be missing
from oracle import assert_same_bits, rows_that_differ, same_bits, unchanged  # noqa: E402
from steps import take_steps  # noqa: E402
from tiny_language_models import (  # noqa: E402
    FAMILIES,
    NEW,
    NEW_ROWS,
    NEW_TEXT,
    OLD_TEXT,
    TIED,
    VOCABULARY,
    D,
    V,
    inputs,
    language_model,
    of_tables,
    tokenizer,
    with_new_tokens,
)
from torch import nn  # noqa: E402

from partial_embedding.errors import InputError  # noqa: E402
from partial_embedding.torch import (  # noqa: E402
    PartialEmbedding,
    PartialLinear,
    add_tokens,
    detach_rowwise,
    restore_embedding,
)
from partial_embedding.torch.table import PartialTable, tables_in  # noqa: E402

STEPS = 20
# A rate per step at which decay alone would move everything far.
ADAMW = {"lr": 0.05, "weight_decay": 0.1}

MODELS = pytest.mark.parametrize(
    ("family", "tied"),
    [
        pytest.param(family, tied, id=f"{family}-{'tied' if tied else 'untied'}")
        for family in FAMILIES
        for tied in (True, False)
    ],
)


def train(model: Any, words: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    take_steps(optimizer, lambda: model(**inputs(words, NEW_TEXT)).loss, STEPS)
    detach_rowwise(optimizer)


@MODELS
def test_only_the_new_rows_learn(family: str, tied: bool, tmp_path: Path) -> None:
    model, words = with_new_tokens(family, tied)
    tables = of_tables(model)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in tables)
    before = copy.deepcopy(model.state_dict())
    logits = model(**inputs(words, OLD_TEXT)).logits
    loss = model(**inputs(words, NEW_TEXT)).loss
    train(model, words)
    for name, parameter in model.named_parameters():
        moved = rows_that_differ(before[name], parameter)
        assert moved == (NEW_ROWS if id(parameter) in tables else []), name
    assert model(**inputs(words, NEW_TEXT)).loss < loss
    after = model(**inputs(words, OLD_TEXT)).logits
    assert_same_bits(after[..., :V], logits[..., :V], "logits of the old tokens")
    assert not same_bits(after[..., V:], logits[..., V:])

    for folder in (tmp_path / "partly trainable", tmp_path / "plain"):
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder).eval()
        assert not list(tables_in(loaded))
        again = transformers.AutoTokenizer.from_pretrained(folder)
        assert again.convert_tokens_to_ids(NEW) == NEW_ROWS
        with torch.no_grad():  # attention is another kernel where something learns
            expected = model(**inputs(words, NEW_TEXT)).logits
            assert_same_bits(loaded(**inputs(again, NEW_TEXT)).logits, expected, "logits")
        restore_embedding(model)


@MODELS
def test_input_and_head_are_partly_trainable_and_ties_stay(family: str, tied: bool) -> None:
    model, words = language_model(family, tied), tokenizer()
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight, was_tied = table.weight, table.weight is head.weight
    kind = type(table)
    add_tokens(model, words, NEW)
    assert model.get_input_embeddings() is table
    assert model.get_output_embeddings() is head
    assert isinstance(table, PartialEmbedding)
    assert isinstance(table, kind)
    assert isinstance(head, PartialLinear)
    assert table.weight is weight
    assert (head.weight is weight) == was_tied
    assert len(table.weight) == len(head.weight) == table.num_embeddings == V + 2
    assert table.trainable_rows.tolist() == head.trainable_rows.tolist() == NEW_ROWS
    assert words.convert_tokens_to_ids(NEW) == NEW_ROWS
    assert words.tokenize(NEW_TEXT)[1] == "numbat"
    # Every weight with a row for each token is a table, T5's other two embeddings too.
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.Linear) and len(module.weight) == V + 2:
            assert isinstance(module, PartialTable), name


# What new rows begin from


@pytest.mark.parametrize("family", ["GPT-2", "BERT"])
@TIED
def test_a_new_row_begins_as_the_mean_of_its_pieces(family: str, tied: bool) -> None:
    model, words = language_model(family, tied), tokenizer()
    before = copy.deepcopy(model.state_dict())
    add_tokens(model, words, NEW)
    pieces = [VOCABULARY[piece] for piece in ("quo", "##kka", "##s")]
    head = model.get_output_embeddings()
    for name, parameter in model.named_parameters():
        if id(parameter) in (id(model.get_input_embeddings().weight), *map(id, head.parameters())):
            torch.testing.assert_close(parameter[V], before[name][pieces].mean(0))
            # Its first piece is known and the rest is not: the tokenizer gives one unknown token.
            torch.testing.assert_close(parameter[V + 1], before[name].mean(0))
            assert_same_bits(parameter[:V], before[name], name)


def test_a_new_row_can_begin_around_the_mean() -> None:
    model, words = language_model("GPT-2"), tokenizer()
    before = model.get_input_embeddings().weight.detach().clone()
    with torch.random.fork_rng():
        add_tokens(model, words, [f"new{i}" for i in range(400)], init="mean")
    drawn = model.get_input_embeddings().weight.detach()[V:]
    expected = 1e-5 * torch.cov(before.T)
    assert (drawn - before.mean(0)).abs().max() < 0.02
    assert (torch.cov(drawn.T) - expected).norm() < 0.4 * expected.norm()


@TIED
def test_new_rows_can_be_given(tied: bool) -> None:
    model, words = language_model("Llama", tied), tokenizer()
    vectors = torch.randn(2, D)
    head = model.get_output_embeddings().weight.detach().clone()
    add_tokens(model, words, NEW, init=vectors)
    assert_same_bits(model.get_input_embeddings().weight[V:], vectors, "the vectors")
    if not tied:
        pieces = [VOCABULARY[piece] for piece in ("quo", "##kka", "##s")]
        torch.testing.assert_close(model.get_output_embeddings().weight[V], head[pieces].mean(0))


def test_a_table_that_has_room_keeps_its_size() -> None:
    model, words = language_model("GPT-2"), tokenizer()
    model.resize_token_embeddings(V + 8, mean_resizing=False)
    assert add_tokens(model, words, NEW) == NEW_ROWS
    assert len(model.get_input_embeddings().weight) == V + 8 == model.config.vocab_size
    assert model.lm_head.trainable_rows.tolist() == NEW_ROWS


def test_a_configuration_within_another_is_told_the_new_size() -> None:
    model, words = language_model("GPT-2"), tokenizer()
    model.config.text_config = copy.deepcopy(model.config)
    add_tokens(model, words, NEW)
    assert model.config.text_config.vocab_size == model.config.vocab_size == V + 2


def test_more_tokens_can_be_added_later() -> None:
    model, words = with_new_tokens("GPT-2")
    first = model.lm_head.weight[NEW_ROWS].detach().clone()
    assert add_tokens(model, words, ["wombat"]) == [V + 2]
    assert model.lm_head.trainable_rows.tolist() == [V + 2]
    assert_same_bits(model.lm_head.weight[NEW_ROWS], first, "the tokens added before")


# What is refused leaves model and tokenizer as they were


def without_a_table() -> Any:
    return nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("make", "tokens", "init", "message"),
    [
        (None, ["cat", "quokkas", "dog"], "pieces", r"not in the vocabulary\. Received 'cat', 'do"),
        (None, ["quokkas", "quokkas"], "pieces", r"Received 'quokkas' twice"),
        (None, "quokkas", "pieces", r"list of words\. Received: 'quokkas'"),
        (None, [], "pieces", r"list of words\. Received: \[\]"),
        (None, ["quokkas", ""], "pieces", r"a token is a word\. Received: ''"),
        (None, [3], "pieces", r"a token is a word\. Received: 3"),
        (None, NEW, "piece", r"init is 'pieces', 'mean' or vectors.*'piece'"),
        (None, NEW, torch.zeros(2, 3), r"\(2, 8\)\. Received: \(2, 3\)"),
        (without_a_table, NEW, "pieces", r"model of transformers\. Received a Linear"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(
    make: Callable[[], Any] | None, tokens: Any, init: Any, message: str
) -> None:
    model, words = make() if make else language_model("GPT-2"), tokenizer()
    with unchanged(model), pytest.raises(InputError, match=message):
        add_tokens(model, words, tokens, init)
    assert len(words) == V


def test_an_embedding_that_peft_adapts_does_not_grow() -> None:
    peft = pytest.importorskip("peft")
    model, words = language_model("Llama", tied=False), tokenizer()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["embed_tokens"], r=2))
    with pytest.raises(InputError, match=r"a Embedding wraps one, which does not grow"):
        add_tokens(adapted, words, NEW)
    assert len(words) == V


@MODELS
def test_new_names_the_rows_of_new_tokens_and_older_checkpoints_load(
    family: str, tied: bool
) -> None:
    model, words = language_model(family, tied), tokenizer()
    before = copy.deepcopy(model.get_input_embeddings().state_dict())
    add_tokens(model, words, NEW)
    for _, table in tables_in(model):
        table.set_trainable_rows("all")
        table.set_trainable_rows("new")
        assert table.trainable_rows.tolist() == NEW_ROWS
    table = model.get_input_embeddings()
    with torch.no_grad():
        table.weight.fill_(7.0)
    table.load_state_dict(before)
    assert_same_bits(table.weight[:V], before["weight"], "the old rows")
    assert (table.weight[V:] == 7.0).all()
