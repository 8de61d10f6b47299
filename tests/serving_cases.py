"""Adapters to be served: one for each kind of layer and rule, with routers that do choose; and how to save one."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from families import make_family
from peft import get_peft_model

from moe_peft import FfnMoeConfig, LinearMoeConfig, RankMoeConfig


SOME = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "mola": ("llama", LinearMoeConfig, {"layers_to_transform": [1]}),
    "qkv-only": ("llama", LinearMoeConfig, {"target_modules": ["q_proj"], "routing": "top_1"}),
    "loramoe": ("qwen2", LinearMoeConfig, {"routing": "softmax", "use_rslora": True, "num_experts": "1:4"}),
    "top_p-shared": ("llama", LinearMoeConfig, {"routing": "top_p", "top_p": 0.5, "num_shared_experts": 1}),
    "null-constant": (
        "qwen3",
        LinearMoeConfig,
        {"num_null_experts": 2, "num_constant_experts": 1, "top_k": 3, "layers_to_transform": [0]},
    ),
    "share-A-block": ("llama", LinearMoeConfig, {"share_A": True, "router_scope": "block", "router_scale": 0.5}),
    "group-bias": (
        "llama",
        LinearMoeConfig,
        {"router_scope": "group", "routing": "sigmoid_top_k", "balance": "bias", "num_experts": "3:4"},
    ),
    "cosine-act-bias": (
        "llama",
        LinearMoeConfig,
        {"routing": "all", "scoring_func": "cosine", "router_scale": 4.0, "router_bias": True, "router_act": "tanh"},
    ),
    "sparsegen": ("llama", LinearMoeConfig, {"routing": "sparsegen", "sparsegen_lambda": 0.2}),
    "grouped": ("llama", LinearMoeConfig, {"num_distinct_experts": 3, "num_shared_experts": 1, "num_null_experts": 1}),
    "grouped-constant": ("llama", LinearMoeConfig, {"num_distinct_experts": 2, "num_constant_experts": 1, "routing": "all"}),
    "smora": ("qwen3", RankMoeConfig, {"r": 16, "rank_partition": 2, "bias_in_gates": True}),
    "moram": ("llama", RankMoeConfig, {"r": 8, "routing": "self_activated", "threshold": 0.1, "frozen_r": [4]}),
    "mixlora": ("llama", FfnMoeConfig, {"target_modules": "all-linear"}),
    "mixlora-top_1": ("qwen3", FfnMoeConfig, {"routing": "top_1", "num_shared_experts": 1}),
    "mixlora-null": ("phi", FfnMoeConfig, {"num_null_experts": 2, "routing": "top_k", "norm_topk_prob": False, "top_k": 3}),
    "mixlora-fused": ("phi3", FfnMoeConfig, {"routing": "top_p", "layers_to_transform": [0], "target_modules": ["gate_up_proj", "down_proj"]}),
    "mixlora-grouped": ("llama", FfnMoeConfig, {"num_distinct_experts": 2, "num_shared_experts": 1, "num_null_experts": 1, "top_k": 4}),
    "mixlora-grouped-all": ("qwen3", FfnMoeConfig, {"num_distinct_experts": [3, 2], "routing": "softmax"}),
}  # fmt: skip
"""Name -> family, config class, what is asked for."""


def make_case(name: str, dtype: torch.dtype = torch.float64):
    """`(base model, PEFT model)`, the same in every call; the adapter is large enough to change the logits by much."""
    family, config_cls, settings = CASES[name]
    base = make_family(family, dtype)
    defaults = {"r": 4, "init_weights": False}
    if config_cls is not RankMoeConfig:
        defaults["num_experts"] = 4
    if config_cls is not FfnMoeConfig:
        defaults["target_modules"] = SOME
    torch.manual_seed(5)
    config = config_cls(**defaults | settings)
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).eval()
    for key, tensor in model.state_dict().items():
        part = key.rpartition(".")[2]
        if part in ("router", "constant", "router_bias", "frozen_A", "frozen_B"):
            tensor.normal_(std=0.5)
        if part == "expert_map":
            tensor.copy_(tensor.flip(0).roll(1))
        if part == "selection_bias":
            tensor.normal_(std=0.1)
    return base, model


def save_case(name: str, folder: Path, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Save base and adapter below `folder`; returns the routed logits of `tokens.json` there."""
    base, model = make_case(name, dtype)
    base.save_pretrained(folder / "base")
    model.save_pretrained(str(folder / "adapter"))
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (2, 40))
    (folder / "tokens.json").write_text(json.dumps(ids.tolist()))
    with torch.no_grad():
        return model(ids).logits
