"""Tiny dense models, adapters written by hand, and the mixture by its definition: a loop over experts, nothing shared.

Nothing here uses `moe_peft.export`, so that a mistake there cannot hide here.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama tied, head_dim": ("llama", {"tie_word_embeddings": True, "head_dim": 24}),
    "llama attention_bias": ("llama", {"attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral window": ("mistral", {"sliding_window": 8}),
    "phi3": ("phi3", {"sliding_window": 8}),
    "phi3 full": ("phi3", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "seed_oss": ("seed_oss", {"attention_bias": True, "attention_out_bias": False, "head_dim": 16}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "granite": (
        "granite",
        {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2},
    ),
    "olmo2": ("olmo2", {}),
    "ernie4_5": ("ernie4_5", {"head_dim": 16}),
    "qwen3_5": (
        "qwen3_5_text",
        {
            "head_dim": 16,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    "cohere2": ("cohere2", {"sliding_window": 8, "logit_scale": 0.25}),
    "hunyuan": ("hunyuan_v1_dense", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16}),
}
"""Name -> model_type, config."""


def make_base(folder: Path, family: str = "llama", max_shard_size="50GB", **more) -> Path:
    """A random dense model on disk; norms and biases are random as well, so that a lost one is noticed."""
    torch.manual_seed(0)
    model_type, config = FAMILIES[family]
    values = {**SMALL, **config, **more}
    dtype = getattr(torch, values.pop("dtype", "float32"))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values), dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "A_log" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def make_adapter(folder: Path, base: Path, experts=4, r=4, seed=1, attention=True, **config) -> Path:
    """A random adapter in the layout of `ffn_moe`.

    Args:
        experts: one number, or one per layer; 0 is a layer without an adapter on its FFN.
        config: fields of its config.
    """
    generator = torch.Generator().manual_seed(seed)
    weights, tensors = load_whole(base), {}
    base_config = json.loads((base / "config.json").read_text())
    layers = base_config.get("text_config", base_config)["num_hidden_layers"]
    experts = [experts] * layers if isinstance(experts, int) else experts
    shared = config.get("num_shared_experts", 0)

    def random(*shape, scale):
        return scale * torch.randn(*shape, generator=generator)

    def lora(module, number):
        d_out, d_in = weights[f"{module}.weight"].shape
        key = f"base_model.model.{module}.ffn_moe_experts"
        tensors[f"{key}.lora_A"] = random(number, r, d_in, scale=d_in**-0.5)
        tensors[f"{key}.lora_B"] = random(number, r, d_out, scale=0.2)

    for layer, number in enumerate(experts):
        mlp = [n for n in linears(weights, layer) if ".mlp." in n]
        if number:
            for module in mlp:
                lora(module, number + shared)
            if number > 1:
                hidden = weights["model.embed_tokens.weight"].shape[1]
                key = f"base_model.model.{mlp[0]}.ffn_moe_experts"
                tensors[f"{key}.router"] = random(number, hidden, scale=0.3)
                if config.get("routing") == "sigmoid_top_k":
                    tensors[f"{key}.selection_bias"] = random(number, scale=0.1)
        if attention:
            for module in linears(weights, layer):
                if ".mlp." not in module:
                    lora(module, 1)
    top_k = {"top_k": 2} if config.get("routing", "softmax_top_k").endswith("_top_k") else {}
    most = max(experts)
    adapted = "|".join(str(layer) for layer, number in enumerate(experts) if number)
    ffn = rf"(.*\.({adapted})\.mlp\.(gate|up|gate_up|down)_proj)"
    written = {
        "peft_type": "FFN_MOE",
        "task_type": "CAUSAL_LM",
        "routing": "softmax_top_k",
        "num_experts": most if set(experts) <= {0, most} else [number or most for number in experts],
        "r": r,
        "lora_alpha": 8,
        "target_modules": ffn + r"|(.*attn\.(qkv|[a-z_]*proj)\w*)" if attention else ffn,
        "base_model_name_or_path": str(base),
        **top_k,
        **config,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(written))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def load_whole(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of safetensors."""
    return {
        name.replace("model.language_model.", "model."): tensor
        for path in sorted(folder.glob("model*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def linears(weights, layer: int) -> list[str]:
    """The linear layers of a decoder layer, the FFN's first one before its others."""
    order = {"gate_proj": 0, "gate_up_proj": 0, "up_proj": 1, "down_proj": 2}
    names = [
        name.removesuffix(".weight")
        for name, w in weights.items()
        if name.startswith(f"model.layers.{layer}.") and w.dim() == 2 and name.endswith(".weight")
    ]
    return sorted(names, key=lambda name: order.get(name.rsplit(".", 1)[-1], 3))


def routing_weights(logits, bias, config, k):
    """`[T, E]` by the definition of each rule, zero where a token does not go."""
    rule = config["routing"]
    if rule == "sigmoid_top_k":
        scores = logits.sigmoid()
        index = (scores + bias).topk(k).indices
    else:
        scores = logits.softmax(-1)
        index = scores.topk({"softmax": logits.shape[-1], "softmax_top_k": k}.get(rule, 1)).indices
    chosen = torch.zeros_like(scores).scatter(-1, index, scores.gather(-1, index))
    return chosen if rule == "top_1" else chosen / chosen.sum(-1, keepdim=True)


def naive_model(base: Path, adapter: Path, weights_of=None):
    """The backbone with the adapter on it, experts one by one.

    Args:
        weights_of: changes a frozen weight first, `[d_out, d_in]` to the same.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    modules = dict(model.named_modules())
    if weights_of is not None:
        for name, module in modules.items():
            if isinstance(module, torch.nn.Linear) and ".layers." in name:
                module.weight.data = weights_of(module.weight.data)

    def part(name, kind):
        return tensors.get(f"base_model.model.{name}.ffn_moe_experts.{kind}")

    def scale(r):
        return config["lora_alpha"] / (math.sqrt(r) if config.get("use_rslora") else r)

    for name, module in modules.items():
        A, B = part(name, "lora_A"), part(name, "lora_B")
        if A is not None and ".mlp." not in name:
            module.weight.data += scale(A.shape[1]) * B[0].T @ A[0]
    for name, module in modules.items():
        if name.endswith(".mlp"):
            module.forward = _naive_block(name, module, part, scale, config)
    return model


def _naive_block(name, mlp, part, scale, config):
    act = getattr(mlp, "act_fn", None) or mlp.activation_fn
    first = "gate_up_proj" if hasattr(mlp, "gate_up_proj") else "gate_proj"
    router = part(f"{name}.{first}", "router")
    bias = part(f"{name}.{first}", "selection_bias")
    shared = config.get("num_shared_experts", 0)

    def linear(kind, x, experts):
        y = F.linear(x, getattr(mlp, kind).weight)
        A, B = part(f"{name}.{kind}", "lora_A"), part(f"{name}.{kind}", "lora_B")
        for e in experts if A is not None else ():
            y = y + scale(A.shape[1]) * (x @ A[e].T) @ B[e]
        return y

    def expert(x, chosen):
        if first == "gate_up_proj":
            gate, up = linear(first, x, chosen).chunk(2, dim=-1)
        else:
            gate, up = linear("gate_proj", x, chosen), linear("up_proj", x, chosen)
        return linear("down_proj", act(gate) * up, chosen)

    def forward(x):
        total = part(f"{name}.{first}", "lora_A")
        total = 0 if total is None else total.shape[0]
        always = list(range(total - shared, total)) if total else []
        if router is None:
            return expert(x, list(range(total)))
        flat = x.reshape(-1, x.shape[-1])
        logits = config.get("router_scale", 1.0) * flat @ router.T
        weights = routing_weights(logits, bias, config, config.get("top_k"))
        y = torch.zeros_like(flat)
        for e in range(router.shape[0]):
            y = y + weights[:, e : e + 1] * expert(flat, [e, *always])
        return y.reshape(x.shape)

    return forward


@torch.no_grad()
def left_padded_logits(model, seed: int = 3) -> torch.Tensor:
    """Logits at the real tokens of a batch that is padded on the left."""
    torch.manual_seed(seed)
    ids = torch.randint(3, 100, (3, 20))
    mask = torch.ones_like(ids)
    mask[1, :6], mask[2, :13] = 0, 0
    return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


@torch.no_grad()
def greedy(model, seed: int = 4) -> list[list[int]]:
    """12 tokens behind a batch of prompts that is padded on the left."""
    torch.manual_seed(seed)
    ids = torch.randint(3, 100, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0
    )
    return out.tolist()
