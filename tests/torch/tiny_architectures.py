"""Tiny models of many architectures of `transformers`, all with the vocabulary of one tokenizer."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from tiny_language_models import NEW_TEXT, SIZES, D, V, inputs
from torch import Tensor

_SPECIAL = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
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
_GROUPED = {"num_key_value_heads": 1}
_HEADS_OF_4 = {**_GROUPED, "head_dim": 4}
_N = {"vocab_size": V, "n_embd": D, "n_layer": 1, "n_head": 2, "n_positions": 32, **_SPECIAL}

# The name of the class of model, the configuration's, and what it has beside `SIZES`; or, where the
# configuration has other names for its sizes, all of it.
_BESIDE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BERT": ("BertForMaskedLM", "BertConfig", {}),
    "RoBERTa": ("RobertaForMaskedLM", "RobertaConfig", {"max_position_embeddings": 40}),
    "XLM-RoBERTa": ("XLMRobertaForMaskedLM", "XLMRobertaConfig", {"max_position_embeddings": 40}),
    "CamemBERT": ("CamembertForMaskedLM", "CamembertConfig", {"max_position_embeddings": 40}),
    "ELECTRA": ("ElectraForMaskedLM", "ElectraConfig", {"embedding_size": D}),
    "ALBERT": ("AlbertForMaskedLM", "AlbertConfig", {"embedding_size": 4}),
    "DeBERTa-v2": ("DebertaV2ForMaskedLM", "DebertaV2Config", {}),
    "MPNet": ("MPNetForMaskedLM", "MPNetConfig", {"max_position_embeddings": 40}),
    "ModernBERT": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {"cls_token_id": 2, "sep_token_id": 2},
    ),
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
}
_WHOLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "DistilBERT": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {
            "vocab_size": V,
            "dim": D,
            "hidden_dim": 12,
            "n_layers": 1,
            "n_heads": 2,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
        },
    ),
    "XLM": (
        "XLMWithLMHeadModel",
        "XLMConfig",
        {
            "vocab_size": V,
            "emb_dim": D,
            "n_layers": 1,
            "n_heads": 2,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
            "n_langs": 1,
        },
    ),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", _N),
    "GPT-J": ("GPTJForCausalLM", "GPTJConfig", {**_N, "rotary_dim": 4}),
    "CodeGen": ("CodeGenForCausalLM", "CodeGenConfig", {**_N, "n_head": 4, "rotary_dim": 2}),
    "BLOOM": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": V, "hidden_size": D, "n_layer": 1, "n_head": 2, **_SPECIAL},
    ),
    "OPT": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": V,
            "hidden_size": D,
            "ffn_dim": 12,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": D,
            **_SPECIAL,
        },
    ),
    "BART": ("BartForConditionalGeneration", "BartConfig", _TWO),
    "mBART": ("MBartForConditionalGeneration", "MBartConfig", _TWO),
    "Pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", _TWO),
    "M2M-100": ("M2M100ForConditionalGeneration", "M2M100Config", _TWO),
    "Marian": ("MarianMTModel", "MarianConfig", _TWO),
    "T5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "mT5": ("MT5ForConditionalGeneration", "MT5Config", _T5),
}


def _bert_to_bert(tied: bool) -> Any:
    sizes = {**SIZES, "intermediate_size": 12}
    encoder = transformers.BertConfig(**sizes)
    decoder = transformers.BertConfig(
        **sizes, is_decoder=True, add_cross_attention=True, tie_word_embeddings=tied
    )
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 2, 0
    config.tie_word_embeddings = tied
    return transformers.EncoderDecoderModel(config)


def _mllama(tied: bool) -> Any:
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    return transformers.MllamaForCausalLM(
        MllamaTextConfig(
            **{**SIZES, "intermediate_size": 12},
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
            text_config=transformers.LlamaConfig(
                **{**SIZES, "intermediate_size": 12}, tie_word_embeddings=tied
            ),
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
            **{**SIZES, "intermediate_size": 12},
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


_COMPOSITE: dict[str, Callable[[bool], Any]] = {
    "BERT to BERT": _bert_to_bert,
    "Llama 3.2 Vision": _mllama,
    "Whisper": _whisper,
    "LLaVA": _llava,
    "IDEFICS": _idefics,
}
ARCHITECTURES = [*_BESIDE, *_WHOLE, *_COMPOSITE]


def make(architecture: str, tied: bool) -> Any:
    torch.manual_seed(0)
    if architecture in _COMPOSITE:
        model = _COMPOSITE[architecture](tied)
    else:
        whole = architecture in _WHOLE
        kind, config, sizes = (_WHOLE if whole else _BESIDE)[architecture]
        if not whole:
            sizes = {**SIZES, "intermediate_size": 12, **sizes}
        made = getattr(transformers, config)(**sizes, tie_word_embeddings=tied)
        for dropout in [name for name in vars(made) if "drop" in name]:
            if type(getattr(made, dropout)) is float:
                setattr(made, dropout, 0.0)
        model = getattr(transformers, kind)(made)
    with torch.no_grad():  # transformers begins small, where all logits are alike
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


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
