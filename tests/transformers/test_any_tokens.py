"""Tokens of every kind, and models that are changed whole or not at all."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from oracle import assert_same_bits, rows_that_differ
from steps import take_steps
from tiny_language_models import (
    NEW,
    NEW_ROWS,
    TIED,
    V,
    inputs,
    language_model,
    tokenizer,
    with_new_tokens,
)
from torch import Tensor, nn

from partial_embedding import InputError
from partial_embedding.torch import PartialLinear, add_tokens
from partial_embedding.torch.row_files import load_rows, save_rows

USER, END = (tokenizers.AddedToken(name, special=True) for name in ("<|user|>", "<|end|>"))


def as_it_was(model: nn.Module, words: Any) -> Any:
    """A function that fails unless model and tokenizer are what they are now."""
    kinds = {name: type(module) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict(keep_vars=False).items()}
    learns = {name: p.requires_grad for name, p in model.named_parameters()}
    config, vocabulary = copy.deepcopy(model.config.to_dict()), dict(words.get_vocab())

    def check() -> None:
        assert {name: type(module) for name, module in model.named_modules()} == kinds
        assert {name: p.requires_grad for name, p in model.named_parameters()} == learns
        assert model.config.to_dict() == config
        assert words.get_vocab() == vocabulary
        for name, value in model.state_dict().items():
            if not value.is_meta:
                assert_same_bits(value, state[name], name)

    return check


# Tokens


def test_special_tokens_are_special_here_and_where_the_rows_are_loaded(tmp_path: Path) -> None:
    model, words = language_model("Llama"), tokenizer()
    rows = add_tokens(model, words, [USER, "quokkas", END])
    assert rows == [V, V + 1, V + 2]
    save_rows(model, tmp_path / "rows", words)
    other, fresh = language_model("Llama"), tokenizer()
    load_rows(other, tmp_path / "rows", fresh)
    text = "<|user|>the quokkas sat<|end|>"
    for its in (words, fresh):
        assert {"<|user|>", "<|end|>"} <= set(its.all_special_tokens)
        assert "quokkas" not in its.all_special_tokens
        ids = its(text)["input_ids"]
        assert [row for row in ids if row >= V] == [V, V + 1, V + 2]
        assert its.decode(ids, skip_special_tokens=True) == "the quokkas sat"
        assert its.eos_token == "[EOS]"
    words.save_pretrained(tmp_path / "words")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "words")
    assert again(text)["input_ids"] == words(text)["input_ids"]


def test_tokens_that_were_special_before_stay_so() -> None:
    model, words = language_model("Llama"), tokenizer()
    add_tokens(model, words, [USER])
    add_tokens(model, words, [END])
    assert {"<|user|>", "<|end|>"} <= set(words.all_special_tokens)


def test_tokens_have_spaces_and_take_them_in_as_they_say(tmp_path: Path) -> None:
    model, words = language_model("Llama"), tokenizer()
    greedy = tokenizers.AddedToken("<x>", lstrip=True, rstrip=True)
    tokens = ["on a mat", " cat", "    ", greedy]
    assert add_tokens(model, words, tokens) == [V, V + 1, V + 2, V + 3]
    save_rows(model, tmp_path / "rows", words)
    fresh = tokenizer()
    load_rows(language_model("Llama"), tmp_path / "rows", fresh)
    for text in ("the dog sat on a mat", "the cat", "a    dog", "a <x> dog"):
        assert fresh(text)["input_ids"] == words(text)["input_ids"]
        assert max(words(text)["input_ids"]) >= V, text
    assert words.decode(words("a <x> dog")["input_ids"]).count(" <x> ") < 2


def test_a_processor_gets_the_tokens_of_its_tokenizer(tmp_path: Path) -> None:
    words = tokenizer()
    processor = transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(), words)
    model = language_model("Whisper", tied=True)
    assert add_tokens(model, processor, NEW) == NEW_ROWS
    assert words.convert_tokens_to_ids(NEW) == NEW_ROWS
    save_rows(model, tmp_path / "rows", processor)
    fresh = transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(), tokenizer())
    load_rows(language_model("Whisper", tied=True), tmp_path / "rows", fresh)
    assert fresh.tokenizer.convert_tokens_to_ids(NEW) == NEW_ROWS
    with pytest.raises(InputError, match=r"a processor that has one. Received a str"):
        add_tokens(model, "words", ["wombat"])


@TIED
def test_tokens_that_only_the_tokenizer_has_get_rows(tied: bool) -> None:
    model, words = language_model("Llama", tied), tokenizer()
    words.add_tokens(["quokkas"])
    check = as_it_was(model, words)
    with pytest.raises(InputError, match=r"rows do not reach: 'quokkas'. Add them too"):
        add_tokens(model, words, ["numbat"])
    check()
    assert add_tokens(model, words, ["numbat", "quokkas"]) == [V + 1, V]
    assert model.lm_head.trainable_rows.tolist() == NEW_ROWS
    assert model.lm_head.weight.isfinite().all()


@TIED
def test_tables_grow_to_a_multiple_whose_free_rows_are_used_first(tied: bool) -> None:
    model, words = language_model("Llama", tied), tokenizer()
    assert add_tokens(model, words, NEW, pad_to_multiple_of=8) == NEW_ROWS
    weights = {id(w): w for w in (model.get_input_embeddings().weight, model.lm_head.weight)}
    assert {len(weight) for weight in weights.values()} == {V + 8} == {model.config.vocab_size}
    assert add_tokens(model, words, ["wombat"], pad_to_multiple_of=8) == [V + 2]
    assert {len(weight) for weight in weights.values()} == {V + 8}
    assert model.lm_head.out_features == model.get_input_embeddings().num_embeddings == V + 8
    with pytest.raises(InputError, match=r"whole number from 1 on. Received: 0"):
        add_tokens(model, words, ["bilby"], pad_to_multiple_of=0)


# What others do to the tables afterwards


def train(model: Any, words: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    take_steps(optimizer, lambda: model(**inputs(words, "the numbat sat on quokkas")).loss, 2)


@pytest.mark.parametrize("size", [V + 7, V + 1])
@TIED
def test_a_model_that_is_resized_afterwards_trains_the_same_rows(tied: bool, size: int) -> None:
    model, words = language_model("Llama", tied), tokenizer()
    model.requires_grad_(False)
    add_tokens(model, words, NEW)
    model.resize_token_embeddings(size, mean_resizing=False)
    rows = [row for row in NEW_ROWS if row < size]
    assert isinstance(model.lm_head, PartialLinear)
    assert model.lm_head.trainable_rows.tolist() == rows
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    words = tokenizer()
    words.add_tokens(["quokkas", "numbat"][: len(rows)])
    train(model, words)
    for name, parameter in model.named_parameters():
        moved = rows_that_differ(before[name], parameter)
        assert moved == (rows if parameter.requires_grad else []), name


def test_another_head_is_another_head() -> None:
    model, _ = with_new_tokens(tied=False)
    for head in (nn.Linear(8, 3), nn.Linear(8, V + 2, bias=False), nn.Identity()):
        model.lm_head = head
        assert type(model.lm_head) is type(head)


# Whole or not at all


def of_two_vocabularies() -> Any:
    model = language_model("Marian", tied=True)
    sizes = {**model.config.to_dict(), "share_encoder_decoder_embeddings": False}
    return transformers.MarianMTModel(transformers.MarianConfig(**sizes))


def of_two_sizes() -> Any:
    model = language_model("BERT to BERT", tied=True)
    model.decoder.resize_token_embeddings(V + 5, mean_resizing=False)
    return model


def with_additional_rows() -> Any:
    model = language_model("IDEFICS", tied=False)
    config = model.config
    config.additional_vocab_size = 2
    return transformers.IdeficsForVisionText2Text(config)


def with_a_wider_head() -> Any:
    config = transformers.MobileBertConfig(
        vocab_size=V,
        hidden_size=12,
        embedding_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=10,
        intra_bottleneck_size=4,
    )
    return transformers.MobileBertForMaskedLM(config)


def off_loaded() -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(language_model("Llama", tied=False), torch.device("cpu"))


def quantized() -> Any:
    class Params4bit(nn.Parameter):
        pass

    model = language_model("Llama", tied=False)
    model.lm_head.weight = Params4bit(model.lm_head.weight.data, False)
    return model


def quantized_by_torchao() -> Any:
    class AffineQuantizedTensor(Tensor):  # a parameter of it is of its class
        pass

    model = language_model("Llama", tied=False)
    weight = model.model.embed_tokens.weight.data.as_subclass(AffineQuantizedTensor)
    model.model.embed_tokens.weight = nn.Parameter(weight, requires_grad=False)
    return model


def quantized_by_gptq() -> Any:
    class TorchQuantLinear(nn.Module):  # packed integers, and no weight
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("qweight", torch.zeros(1, V, dtype=torch.int32))
            self.register_buffer("scales", torch.ones(1, V))

    model = language_model("Llama", tied=False)
    model.lm_head = TorchQuantLinear()
    return model


def without_words() -> Any:
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    return transformers.ViTModel(config)


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (of_two_vocabularies, r"MarianM.* whose encoder and decoder have a vocabulary each"),
        (of_two_sizes, r"EncoderDecoderModel whose encoder and decoder have a vocabulary each"),
        (with_additional_rows, r"num_additional_embeddings=2"),
        (with_a_wider_head, r"'weight' of the shape \(8, 16\) too"),
        (off_loaded, r"off-loaded between its uses"),
        (quantized, r"'lm_head', whose weight is a Params4bit"),
        (quantized_by_torchao, r"'model.embed_tokens', whose weight is a AffineQuantizedTensor"),
        (quantized_by_gptq, r"not quantized.*Received a TorchQuantLinear.*Load the head as it is"),
        (without_words, r"fits none"),
    ],
)
def test_a_model_that_cannot_be_served_whole_is_left_as_it_was(
    make_model: Any, message: str
) -> None:
    model, words = make_model(), tokenizer()
    check = as_it_was(model, words)
    with pytest.raises(InputError, match=message):
        add_tokens(model, words, NEW)
    check()


def test_nothing_changes_where_memory_ends_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = language_model("BERT", tied=False), tokenizer()
    check = as_it_was(model, words)
    made = []

    def cat(tensors: Any, *args: Any) -> Any:
        made.append(tensors)
        if len(made) == 3:
            raise MemoryError
        return torch.concatenate(tensors, *args)

    monkeypatch.setattr(torch, "cat", cat)
    with pytest.raises(MemoryError):
        add_tokens(model, words, NEW)
    monkeypatch.undo()
    check()
