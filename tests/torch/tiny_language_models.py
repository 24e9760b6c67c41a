"""Tiny random language models of `transformers`, and a tokenizer, without a download."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

WORDS = ("the", "cat", "dog", "sat", "on", "a", "mat", "and", "ran", "quo", "##kka", "##s", "num")
VOCABULARY = {token: i for i, token in enumerate(("[PAD]", "[UNK]", "[EOS]", *WORDS))}
V, D = len(VOCABULARY), 8
NEW = ["quokkas", "numbat"]
NEW_ROWS = [V, V + 1]
OLD_TEXT = "the cat sat on a mat and the dog ran"
NEW_TEXT = "the numbat sat on quokkas and a numbat ran"

Config = transformers.PretrainedConfig


def tokenizer() -> Any:
    pieces = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]"
    )


SPECIAL_TOKENS = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    **SPECIAL_TOKENS,
}


def bert(tied: bool) -> Config:
    return transformers.BertConfig(
        **SIZES,
        is_decoder=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        tie_word_embeddings=tied,
    )


def gpt2(tied: bool) -> Config:
    return transformers.GPT2Config(
        vocab_size=V,
        n_embd=D,
        n_layer=1,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=tied,
        **SPECIAL_TOKENS,
    )


def llama(tied: bool) -> Config:
    return transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)


def t5(tied: bool) -> Config:
    return transformers.T5Config(
        vocab_size=V,
        d_model=D,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        tie_word_embeddings=tied,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )


def gemma3(tied: bool) -> Config:
    return transformers.Gemma3TextConfig(
        **SIZES, num_key_value_heads=1, head_dim=4, tie_word_embeddings=tied
    )


FAMILIES: dict[str, tuple[Any, Any]] = {
    "BERT": (bert, transformers.BertLMHeadModel),
    "GPT-2": (gpt2, transformers.GPT2LMHeadModel),
    "Llama": (llama, transformers.LlamaForCausalLM),
    "T5": (t5, transformers.T5ForConditionalGeneration),
    "Gemma 3": (gemma3, transformers.Gemma3ForCausalLM),
}


def language_model(family: str, tied: bool = True) -> Any:
    config_of, kind = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config_of(tied)).eval()
    with torch.no_grad():  # transformers begins small, where all logits are alike
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def inputs(tokenizer: Any, text: str) -> dict[str, Tensor]:
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    return {"input_ids": ids, "labels": ids}


def training_arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    """Arguments of a Trainer that only trains: on the CPU, without saving and logging."""
    quiet: dict[str, Any] = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    return transformers.TrainingArguments(str(folder), **{**quiet, **options})
