"""Tiny random models of many architectures of `transformers`, and a tokenizer; no download."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from partial_embedding.torch import add_tokens
from partial_embedding.torch.table import PartialTable

WORDS = ("the", "cat", "dog", "sat", "on", "a", "mat", "and", "ran", "quo", "##kka", "##s", "num")
VOCABULARY = {token: i for i, token in enumerate(("[PAD]", "[UNK]", "[EOS]", *WORDS))}
V, D = len(VOCABULARY), 8
NEW = ["quokkas", "numbat"]
NEW_ROWS = [V, V + 1]
OLD_TEXT = "the cat sat on a mat and the dog ran"
NEW_TEXT = "the numbat sat on quokkas and a numbat ran"

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def tokenizer() -> Any:
    pieces = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]"
    )


_SPECIAL = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    **_SPECIAL,
}
# Of encoders and decoders in one model, as BART has them.
_TWO = {
    "vocab_size": V,
    "d_model": D,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **_SPECIAL,
}
_T5 = {
    "vocab_size": V,
    "d_model": D,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_AROUND = {"cls_token_id": 2, "sep_token_id": 2}
_GROUPED = {"num_key_value_heads": 1}
_HEADS_OF_4 = {**_GROUPED, "head_dim": 4}


# The name of the class of model, the configuration's, and what it has beside `_SIZES`; or, where it
# has a decoder too, all of it.
_BESIDE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BERT": ("BertLMHeadModel", "BertConfig", {"is_decoder": True}),
    "BERT, masked": ("BertForMaskedLM", "BertConfig", {}),
    "RoBERTa": ("RobertaForMaskedLM", "RobertaConfig", {"max_position_embeddings": 40}),
    "XLM-RoBERTa": ("XLMRobertaForMaskedLM", "XLMRobertaConfig", {"max_position_embeddings": 40}),
    "CamemBERT": ("CamembertForMaskedLM", "CamembertConfig", {"max_position_embeddings": 40}),
    "ELECTRA": ("ElectraForMaskedLM", "ElectraConfig", {"embedding_size": D}),
    "ALBERT": ("AlbertForMaskedLM", "AlbertConfig", {"embedding_size": 4}),
    "DeBERTa-v2": ("DebertaV2ForMaskedLM", "DebertaV2Config", {}),
    "MPNet": ("MPNetForMaskedLM", "MPNetConfig", {"max_position_embeddings": 40}),
    "ModernBERT": ("ModernBertForMaskedLM", "ModernBertConfig", _AROUND),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_GROUPED, "num_local_experts": 2}),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _HEADS_OF_4),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", _HEADS_OF_4),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", _HEADS_OF_4),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _HEADS_OF_4),
    "Phi": ("PhiForCausalLM", "PhiConfig", {}),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", {}),
    "StableLM": ("StableLmForCausalLM", "StableLmConfig", {**_GROUPED, "partial_rotary_factor": 1}),
    "OLMo 2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "SmolLM3": ("SmolLM3ForCausalLM", "SmolLM3Config", _GROUPED),
    "Granite": ("GraniteForCausalLM", "GraniteConfig", {}),
    "Cohere": ("CohereForCausalLM", "CohereConfig", {}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}),
    "StarCoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", _GROUPED),
    "Falcon": ("FalconForCausalLM", "FalconConfig", {}),
    "Mamba": ("MambaForCausalLM", "MambaConfig", {"state_size": 4}),
    "DistilBERT": ("DistilBertForMaskedLM", "DistilBertConfig", {"hidden_dim": 12}),
    "XLM": ("XLMWithLMHeadModel", "XLMConfig", {"n_langs": 1}),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {}),
    "GPT-J": ("GPTJForCausalLM", "GPTJConfig", {"rotary_dim": 4}),
    "CodeGen": ("CodeGenForCausalLM", "CodeGenConfig", {"num_attention_heads": 4, "rotary_dim": 2}),
    "BLOOM": ("BloomForCausalLM", "BloomConfig", {}),
    "OPT": ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 12, "word_embed_proj_dim": D}),
}
_WHOLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BART": ("BartForConditionalGeneration", "BartConfig", _TWO),
    "mBART": ("MBartForConditionalGeneration", "MBartConfig", _TWO),
    "Pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", _TWO),
    "M2M-100": ("M2M100ForConditionalGeneration", "M2M100Config", _TWO),
    "Marian": ("MarianMTModel", "MarianConfig", _TWO),
    "T5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "mT5": ("MT5ForConditionalGeneration", "MT5Config", _T5),
}


def _bert_to_bert(tied: bool) -> Any:
    encoder = transformers.BertConfig(**_SIZES)
    decoder = transformers.BertConfig(
        **_SIZES, is_decoder=True, add_cross_attention=True, tie_word_embeddings=tied
    )
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 2, 0
    config.tie_word_embeddings = tied
    return transformers.EncoderDecoderModel(config)


def _mllama(tied: bool) -> Any:
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    return transformers.MllamaForCausalLM(
        MllamaTextConfig(
            **_SIZES,
            num_key_value_heads=2,
            cross_attention_layers=[],
            tie_word_embeddings=False,  # of two sizes, which no tie can have
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )


def _whisper(tied: bool) -> Any:
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            **{**_TWO, "num_mel_bins": 4},
            max_source_positions=8,
            max_target_positions=32,
            tie_word_embeddings=tied,
        )
    )


def _llava(tied: bool) -> Any:
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**_SIZES, tie_word_embeddings=tied),
            vision_config=transformers.CLIPVisionConfig(
                hidden_size=8,
                intermediate_size=12,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=8,
                patch_size=4,
            ),
            image_token_index=1,
            tie_word_embeddings=tied,
        )
    )


def _idefics(tied: bool) -> Any:
    return transformers.IdeficsForVisionText2Text(
        transformers.IdeficsConfig(
            **_SIZES,
            additional_vocab_size=0,
            cross_layer_interval=1,
            vision_config={
                "embed_dim": 8,
                "image_size": 8,
                "patch_size": 4,
                "intermediate_size": 12,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
            use_resampler=False,
            freeze_text_layers=False,
            freeze_vision_layers=False,
            freeze_lm_head=False,
            tie_word_embeddings=tied,
        )
    )


COMPOSITE: dict[str, Callable[[bool], Any]] = {
    "BERT to BERT": _bert_to_bert,
    "Llama 3.2 Vision": _mllama,
    "Whisper": _whisper,
    "LLaVA": _llava,
    "IDEFICS": _idefics,
}
ARCHITECTURES = [*_BESIDE, *_WHOLE, *COMPOSITE]
# One of each way to have a table and a head.
FAMILIES = ("BERT", "GPT-2", "Llama", "T5", "Gemma 3")


def language_model(architecture: str, tied: bool = True) -> Any:
    torch.manual_seed(0)
    if architecture in COMPOSITE:
        model = COMPOSITE[architecture](tied)
    else:
        kind, config, sizes = (_BESIDE | _WHOLE)[architecture]
        if architecture in _BESIDE:
            sizes = _SIZES | sizes
        made = getattr(transformers, config)(**sizes, tie_word_embeddings=tied)
        for dropout in [name for name in vars(made) if "drop" in name]:
            if type(getattr(made, dropout)) is float:
                setattr(made, dropout, 0.0)
        model = getattr(transformers, kind)(made)
    with torch.no_grad():  # transformers begins small, where all logits are alike
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def with_new_tokens(architecture: str = "Llama", tied: bool = True) -> tuple[Any, Any]:
    """A model whose new rows train, and its tokenizer."""
    model, words = language_model(architecture, tied), tokenizer()
    assert add_tokens(model, words, NEW) == NEW_ROWS
    return model, words


def with_room(tied: bool) -> Any:
    """A plain model with as many rows as one with new tokens."""
    model = language_model("Llama", tied)
    model.resize_token_embeddings(V + len(NEW), mean_resizing=False)
    return model


def lora(**options: Any) -> Any:
    peft = pytest.importorskip("peft")
    given = {"target_modules": ["q_proj"], "r": 2, "init_lora_weights": False, **options}
    return peft.LoraConfig(**given, task_type="CAUSAL_LM")


def inputs(tokenizer: Any, text: str) -> dict[str, Tensor]:
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    return {"input_ids": ids, "labels": ids}


def batch(architecture: str, words: Any) -> dict[str, Tensor]:
    """One text with new tokens, as the architecture takes it."""
    given = inputs(words, NEW_TEXT)
    if architecture == "Whisper":
        features = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
        return {"input_features": features, "labels": given["labels"]}
    if architecture == "IDEFICS":
        pixels = torch.zeros(1, 1, 3, 8, 8)
        width = given["input_ids"].shape[1]
        return {**given, "pixel_values": pixels, "image_attention_mask": torch.ones(1, width, 1)}
    return given


def of_tables(model: Any) -> set[int]:
    """The ids of the parameters of which rows train."""
    tables = [module for module in model.modules() if isinstance(module, PartialTable)]
    return {id(parameter) for table in tables for parameter in table.parameters()}


def logits_of(model: Any, words: Any) -> Tensor:
    training = model.training
    with torch.no_grad():
        logits: Tensor = model.eval()(**inputs(words, NEW_TEXT)).logits
    model.train(training)
    return logits


# Of a Trainer that only trains: on the CPU, without saving and logging.
QUIET: dict[str, Any] = {
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_strategy": "no",
}


def training_arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(str(folder), **{**QUIET, **options})
