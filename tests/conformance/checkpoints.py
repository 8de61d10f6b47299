"""Tiny models made from configs, in place of the checkpoints that PEFT's tests fetch from the Hub.

A name keeps the words by which upstream tells families apart ("gpt2", "OPT"). The folders are known when the tests are
collected and filled when the first one runs.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)


_folder = tempfile.TemporaryDirectory(prefix="moe_peft_conformance_")  # removed when the process ends
FOLDER = Path(_folder.name)

# Weights of standard deviation 0.1 rather than 0.02: at width 32 they give hidden states of order 1, as real models
# have. Upstream's tests ask that an adapter's effect be visible above 1e-4.
TOKENS = {"vocab_size": 1000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
GROUPED = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}


def _opt(layers: int, hidden: int) -> OPTConfig:
    return OPTConfig(
        **TOKENS,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        init_std=0.1,
        dropout=0.0,
    )


def _gpt2() -> GPT2Config:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.1, **dropout)


Recipe = tuple[type[PreTrainedModel], Callable[[], PretrainedConfig]]

DECODERS: dict[str, Recipe] = {
    "tiny-random-LlamaForCausalLM": (LlamaForCausalLM, lambda: LlamaConfig(**GROUPED)),
    "tiny-random-OPTForCausalLM": (OPTForCausalLM, lambda: _opt(2, 32)),
    "tiny-random-GPT2LMHeadModel": (GPT2LMHeadModel, _gpt2),
    "tiny-random-Qwen3ForCausalLM": (Qwen3ForCausalLM, lambda: Qwen3Config(**GROUPED, head_dim=8)),
    "tiny-random-Gemma3ForCausalLM": (
        Gemma3ForCausalLM,
        lambda: Gemma3TextConfig(**GROUPED, head_dim=8, query_pre_attn_scalar=8),
    ),
    "tiny-random-GPTNeoXForCausalLM": (
        GPTNeoXForCausalLM,
        lambda: GPTNeoXConfig(**SHAPE, intermediate_size=48, max_position_embeddings=128),
    ),
}

ENCODER = {**SHAPE, "intermediate_size": 48, "max_position_embeddings": 128}
CLASSIFIERS: dict[str, Recipe] = {
    "tiny-random-BertForSequenceClassification": (
        BertForSequenceClassification,
        lambda: BertConfig(**ENCODER, num_labels=3),
    ),
    "tiny-random-RobertaForSequenceClassification": (
        RobertaForSequenceClassification,
        lambda: RobertaConfig(**ENCODER, num_labels=3),
    ),
    "tiny-LlamaForSequenceClassification": (
        LlamaForSequenceClassification,
        lambda: LlamaConfig(**GROUPED, num_labels=1),
    ),
}

SEQ2SEQ: dict[str, Recipe] = {
    "tiny-random-T5ForConditionalGeneration": (
        T5ForConditionalGeneration,
        lambda: T5Config(
            vocab_size=1000, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
    ),
    "tiny-random-BartForConditionalGeneration": (
        BartForConditionalGeneration,
        lambda: BartConfig(
            **TOKENS,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=128,
            init_std=0.1,
            decoder_start_token_id=2,
        ),
    ),
}

# The quantisation tests count 24 target layers, so this one has opt-125m's depth.
QUANTISED: dict[str, Recipe] = {"opt-125m": (OPTForCausalLM, lambda: _opt(12, 64))}

LORA_ADAPTER = "tiny-opt-lora-revision"


def path(name: str) -> str:
    return str(FOLDER / name)


def write_all() -> None:
    for name, (model_class, make_config) in {**DECODERS, **SEQ2SEQ, **CLASSIFIERS, **QUANTISED}.items():
        torch.manual_seed(0)
        model_class(make_config()).save_pretrained(path(name))
    LoraConfig(target_modules=["q_proj"]).save_pretrained(path(LORA_ADAPTER))
