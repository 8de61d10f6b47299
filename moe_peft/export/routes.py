"""From a dense backbone to the stock MoE models that compute the same with experts: data, and the few rules that read it."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_peft.export.gguf import llama_cpp_says
from moe_peft.export.targets import Target


if TYPE_CHECKING:
    from moe_peft.export.choose import Choice


Config = Mapping[str, Any]
"""A dense model's config, as `to_dict()` of transformers' class gives it: defaults filled in."""


class Route(NamedTuple):
    """From a dense family to a target.

    Attributes:
        target: its `model_type`.
        needs: names in `CHECKS` that must hold of the dense config.
        sets: config entries of the target, fixed or computed from the dense config.
        copies: config entries taken over, besides `COMMON`.
        pairs_adjacent: whether the rows of q and k are reordered, as the target rotates neighbours and the dense model
            rotates halves.
    """

    target: str
    needs: tuple[str, ...] = ()
    sets: Mapping[str, Any] = {}
    copies: tuple[str, ...] = ()
    pairs_adjacent: bool = False


COMMON = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters", "use_cache"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Config entries that every target takes over; nothing else is copied unless a route says so."""

NULLABLE = frozenset({"bos_token_id", "eos_token_id", "pad_token_id", "sliding_window"})
"""Those of them where None is a value of its own, and not the wish for the target's default."""


def _full_rotary(c: Config) -> bool:
    return (c.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0) == 1.0


CHECKS: dict[str, tuple[Callable[[Config], bool], str]] = {
    "no_attention_bias": (lambda c: not c.get("attention_bias"), "its attention has biases (`attention_bias`)"),
    "no_mlp_bias": (lambda c: not c.get("mlp_bias"), "its FFN has biases (`mlp_bias`)"),
    "no_use_bias": (lambda c: not c.get("use_bias"), "its linear layers have biases (`use_bias`)"),
    "no_out_bias": (
        lambda c: not c.get("attention_out_bias"),
        "its attention output has a bias (`attention_out_bias`)",
    ),
    "no_window": (lambda c: not c.get("sliding_window"), "its attention has a sliding window"),
    "no_sliding_layer": (
        lambda c: "sliding_attention" not in (c.get("layer_types") or ()),
        "some of its layers have a sliding window",
    ),
    "no_layer_types": (
        lambda c: len(set(c.get("layer_types") or ("full",))) == 1,
        "its layers differ in their attention (`layer_types`)",
    ),
    "full_rotary": (_full_rotary, "it rotates a part of each head only (`partial_rotary_factor`)"),
    "plain_rope": (
        lambda c: (c.get("rope_parameters") or {}).get("rope_type", "default") == "default",
        "it scales its positions (`rope_type`) in a way of its own",
    ),
    "usual_heads": (
        lambda c: c.get("head_dim") in (None, c["hidden_size"] // c["num_attention_heads"]),
        "its `head_dim` is not `hidden_size` / `num_attention_heads`, which vLLM assumes there",
    ),
    "attention_bias": (lambda c: bool(c.get("attention_bias")), "it has no `attention_bias`"),
}
"""name -> (what must hold of the dense config, what is said of a model where it does not)."""


def _head_scale(c: Config) -> float:
    return (c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]) ** -0.5


_LLAMA = ("no_mlp_bias", "no_window", "no_layer_types")
_PLAIN_MULTIPLIERS = {
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": _head_scale,
    "attention_bias": True,
}
_QWEN2_WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_LLAMA_ROUTES = (
    Route("mixtral", ("no_mlp_bias", "no_attention_bias", "no_layer_types"), copies=("sliding_window",)),
    Route("qwen2_moe", (*_LLAMA, "no_attention_bias", "usual_heads"), {"qkv_bias": False}),
    Route("ernie4_5_moe", (*_LLAMA, "no_attention_bias", "full_rotary"), pairs_adjacent=True),
    Route("glm4_moe", (*_LLAMA, "no_attention_bias"), {"attention_bias": False, "use_qk_norm": False}),
    Route("granitemoe", (*_LLAMA, "attention_bias", "usual_heads"), _PLAIN_MULTIPLIERS),
)

ROUTES: dict[str, tuple[Route, ...]] = {
    "llama": _LLAMA_ROUTES,
    "mistral": _LLAMA_ROUTES[:4],
    "phi3": (
        Route("mixtral", ("full_rotary", "plain_rope"), copies=("sliding_window",)),
        Route("glm4_moe", ("full_rotary", "plain_rope", "no_window"), {"attention_bias": False, "use_qk_norm": False}),
    ),
    "qwen2": (
        Route("qwen2_moe", (), {"qkv_bias": True}, _QWEN2_WINDOW),
        Route("glm4_moe", ("no_sliding_layer",), {"attention_bias": True, "use_qk_norm": False}),
    ),
    "seed_oss": (
        Route(
            "qwen2_moe",
            ("no_out_bias", "no_mlp_bias"),
            {"qkv_bias": lambda c: c["attention_bias"], "use_sliding_window": False},
        ),
    ),
    "qwen3": (
        Route("qwen3_moe", ("no_sliding_layer",), {"use_sliding_window": False}, ("attention_bias",)),
        Route("glm4_moe", ("no_sliding_layer", "no_attention_bias"), {"attention_bias": False, "use_qk_norm": True}),
    ),
    "granite": (
        Route(
            "granitemoe",
            ("no_mlp_bias",),
            copies=(
                *("attention_bias", "embedding_multiplier", "logits_scaling", "residual_multiplier"),
                "attention_multiplier",
            ),
        ),
    ),
    "olmo2": (Route("flex_olmo", copies=("attention_bias",)),),
    "ernie4_5": (Route("ernie4_5_moe", ("no_use_bias",)),),
    "qwen3_5_text": (
        Route(
            "qwen3_5_moe_text",
            copies=(
                *("attention_bias", "layer_types", "linear_conv_kernel_dim", "linear_key_head_dim"),
                *("linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads"),
            ),
        ),
    ),
    "cohere2": (
        Route(
            "cohere2_moe",
            copies=("attention_bias", "layer_norm_eps", "layer_types", "logit_scale", "sliding_window"),
        ),
    ),
    "hunyuan_v1_dense": (Route("hunyuan_v1_moe", copies=("attention_bias",)),),
}
"""Dense `model_type` -> the ways out, best known to servers first."""

LANGUAGE_MODEL = dict.fromkeys(("qwen3_5", "qwen3_5_text"), "model.language_model.")
"""Models that also see, but of which `AutoModelForCausalLM` makes the language model alone -> the prefix of its tensors.
Saved again it keeps that prefix. Only the language model is exported."""


class Split(NamedTuple):
    """One matrix of the target inside a fused one of the dense model: the rows from `start` to `stop`."""

    name: str
    start: int
    stop: int


def splits(config: Config) -> dict[str, tuple[Split, ...]]:
    """Fused linear of the dense model, within its layer -> what it is made of; only Phi-3 has any."""
    if config["model_type"] != "phi3":
        return {}
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    q = config["num_attention_heads"] * head
    kv = config["num_key_value_heads"] * head
    f = config["intermediate_size"]
    return {
        "self_attn.qkv_proj": (
            Split("self_attn.q_proj", 0, q),
            Split("self_attn.k_proj", q, q + kv),
            Split("self_attn.v_proj", q + kv, q + 2 * kv),
        ),
        "mlp.gate_up_proj": (Split("mlp.gate_proj", 0, f), Split("mlp.up_proj", f, 2 * f)),
    }


def caveats_of(target: Target, renormalised: bool, config: Config, choice: "Choice | None" = None) -> list[str]:
    """What somebody who serves the folder must know, in sentences without a full stop.

    Args:
        target: what the adapter becomes.
        renormalised: whether the weights of the chosen experts sum to 1.
        config: of the dense model.
        choice: how the experts lie in the layers, which llama.cpp minds.
    """
    said = [*target.caveats, *llama_cpp_says(target, renormalised, config, choice)]
    if target.model_type == "qwen2_moe" and len(set(config.get("layer_types") or ("full",))) > 1:
        said.append("vLLM's class gives its layers no window of their own; transformers does")
    if target.model_type in ("qwen2_moe", "granitemoe") and not CHECKS["usual_heads"][0](config):
        said.append("its `head_dim` is unusual, which vLLM does not read for this model")
    return said
