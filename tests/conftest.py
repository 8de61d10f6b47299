"""Shared pieces of the tests: one thread, a tiny model made from a config, some tokens."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moe_peft  # noqa: F401  (registers the adapter types)


torch.set_num_threads(1)  # two threads are 5-10 times slower on small shared machines


def make_tiny_llama(seed: int = 0, layers: int = 4, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture
def tiny_llama():
    return make_tiny_llama()


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    return torch.randint(1, 100, (3, 10))
