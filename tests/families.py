"""Tiny random models of the families whose FFN blocks `ffn_moe` takes, one of each shape of code."""

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OTHER_NAMES = {"n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64}
_NO_DROPOUT = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}

FAMILIES: dict[str, dict] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "phi3": {"resid_pdrop": 0.0},
    "phi": {"resid_pdrop": 0.0},
    "gpt_neox": {"hidden_dropout": 0.0},
    "olmo2": {},
    "granite": {},
    "starcoder2": {"residual_dropout": 0.0, "use_bias": True},
    "cohere2": {},
    "falcon": {"ffn_hidden_size": 64, "bias": True, "alibi": False, "new_decoder_architecture": False},
    "glm4": {"head_dim": 8},
    "gpt2": _OTHER_NAMES | _NO_DROPOUT,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "hidden_dropout": 0.0},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
}
"""model_type -> what differs from a tiny Llama; gpt2 and bloom have names of their own."""


def make_family(model_type: str, dtype: torch.dtype = torch.float32):
    """A tiny model in eval mode, the same in every call, with biases that are not zero."""
    settings = FAMILIES[model_type]
    if model_type not in ("gpt2", "bloom"):
        settings = _LLAMA_LIKE | settings
    config = CONFIG_MAPPING[model_type](**settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model
