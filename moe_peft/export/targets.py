"""The stock MoE models that an export may become: where their tensors lie on disk, and which routers they compute.

The facts are transformers 5.23's modeling files, and runs of vLLM 0.33 and llama.cpp (llama-cpp-python 0.3.36) on exported
folders. How a dense model gets to one of them is told by `routes`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


Dense = Callable[[Sequence[int], int], "dict[str, Any] | None"]
"""(dense layers, number of layers) -> the config entries that keep them dense, or None if that cannot be said."""

GATED_SHARED_SIZE = 256
"""Hidden units of a shared expert that adds nothing: vLLM refuses size 0, llama.cpp's K-quants want multiples of 256."""

PADDING_BIAS = -100.0
"""Selection bias of a padded expert. Scores lie in [0, 1], so it is never chosen; finite, as -inf breaks arithmetic."""


def _no_dense(layers: Sequence[int], total: int) -> dict[str, Any] | None:
    return None if layers else {}


def _listed(layers: Sequence[int], total: int) -> dict[str, Any] | None:
    return {"mlp_only_layers": list(layers), "decoder_sparse_step": 1}


def _typed(layers: Sequence[int], total: int) -> dict[str, Any] | None:
    return {"mlp_layer_types": ["dense" if i in layers else "sparse" for i in range(total)]}


def _first(layers: Sequence[int], total: int) -> dict[str, Any] | None:
    return {"first_k_dense_replace": len(layers)} if list(layers) == list(range(len(layers))) else None


def _outside_span(layers: Sequence[int], total: int) -> dict[str, Any] | None:
    sparse = [i for i in range(total) if i not in layers]
    if sparse != list(range(sparse[0], sparse[-1] + 1)):
        return None
    return {"moe_layer_start_index": sparse[0], "moe_layer_end_index": sparse[-1], "moe_layer_interval": 1}


class Target(NamedTuple):
    """A stock MoE model.

    Attributes:
        model_type, architecture: its names in config.json.
        gate: of the router's rows, behind "model.layers.N.".
        experts: linear -> name, with {e} for the expert; for fused ones, the name of all.
        num_experts, top_k: names of these config entries.
        score: of the router, "softmax" or "sigmoid".
        renormalised: the kinds of weights it computes; with both, `norm_topk_prob` says which.
        bias: the selection bias's name and rank; with one, layers may differ in their number of experts.
        fused: gate and up are one tensor, all experts in it.
        shared: None, "gated" (weight sigmoid(gate)) or "whole" (of an expert's size): a shared expert that it always has.
        gate_in_fp32: the router is kept in fp32 whatever the rest is.
        dense: how layers are kept dense.
        size: config entries that get the FFN's width.
        always: further config entries.
        caveats: what is known of servers.
        caveats_of_llama_cpp: what always stands against a GGUF file; `gguf` tells what depends on the model.
    """

    model_type: str
    architecture: str
    gate: str
    experts: Mapping[str, str]
    num_experts: str
    top_k: str = "num_experts_per_tok"
    score: str = "softmax"
    renormalised: tuple[bool, ...] = (True,)
    bias: tuple[str, int] | None = None
    fused: bool = False
    shared: str | None = None
    shared_name: str = ""
    gate_in_fp32: bool = False
    dense: Dense = _no_dense
    size: tuple[str, ...] = ("intermediate_size",)
    always: Mapping[str, Any] = {}
    caveats: tuple[str, ...] = ()
    caveats_of_llama_cpp: tuple[str, ...] = ()


_QWEN_EXPERTS = {name: f"mlp.experts.{{e}}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
_MIXTRAL_EXPERTS = {
    name: f"block_sparse_moe.experts.{{e}}.{short}.weight"
    for name, short in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
}
_GRANITE_EXPERTS = {
    "gate_proj": "block_sparse_moe.input_linear.weight",
    "up_proj": "block_sparse_moe.input_linear.weight",
    "down_proj": "block_sparse_moe.output_linear.weight",
}
_MOE_SIZE = ("intermediate_size", "moe_intermediate_size")
_BACKEND = "vLLM runs it through its transformers backend only"

TARGETS: dict[str, Target] = {
    target.model_type: target
    for target in (
        Target(
            "mixtral",
            "MixtralForCausalLM",
            "block_sparse_moe.gate.weight",
            _MIXTRAL_EXPERTS,
            "num_local_experts",
            always={"router_jitter_noise": 0.0},
        ),
        Target(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            "mlp.gate.weight",
            _QWEN_EXPERTS,
            "num_experts",
            renormalised=(True, False),
            shared="gated",
            shared_name="mlp.shared_expert",
            dense=_listed,
            size=_MOE_SIZE,
            always={"shared_expert_intermediate_size": GATED_SHARED_SIZE},
        ),
        Target(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            "mlp.gate.weight",
            _QWEN_EXPERTS,
            "num_experts",
            renormalised=(True, False),
            dense=_listed,
            size=_MOE_SIZE,
        ),
        Target(
            "granitemoe",
            "GraniteMoeForCausalLM",
            "block_sparse_moe.router.layer.weight",
            _GRANITE_EXPERTS,
            "num_local_experts",
            fused=True,
        ),
        Target(
            "flex_olmo",
            "FlexOlmoForCausalLM",
            "mlp.gate.weight",
            _QWEN_EXPERTS,
            "num_experts",
            renormalised=(True, False),
            caveats=(_BACKEND,),
            caveats_of_llama_cpp=("llama.cpp does not know this model. Serve it with transformers or vLLM",),
        ),
        Target(
            "ernie4_5_moe",
            "Ernie4_5_MoeForCausalLM",
            "mlp.gate.weight",
            _QWEN_EXPERTS,
            "moe_num_experts",
            top_k="moe_k",
            bias=("mlp.moe_statics.e_score_correction_bias", 2),
            gate_in_fp32=True,
            dense=_outside_span,
            size=_MOE_SIZE,
            always={"moe_num_shared_experts": 0, "use_bias": False},
            caveats_of_llama_cpp=(
                "llama.cpp's converter takes this model with a sentencepiece file (`tokenizer.model`) only. If the base model "
                "has none, train with the same number of experts in every layer, which becomes a Mixtral",
            ),
        ),
        Target(
            "glm4_moe",
            "Glm4MoeForCausalLM",
            "mlp.gate.weight",
            _QWEN_EXPERTS,
            "n_routed_experts",
            score="sigmoid",
            bias=("mlp.gate.e_score_correction_bias", 1),
            shared="whole",
            shared_name="mlp.shared_experts",
            dense=_first,
            size=_MOE_SIZE,
            always={
                "n_shared_experts": 1,
                "n_group": 1,
                "topk_group": 1,
                "routed_scaling_factor": 1.0,
                "norm_topk_prob": True,
                "num_nextn_predict_layers": 0,
                "partial_rotary_factor": 1.0,
            },
            caveats_of_llama_cpp=(
                "llama.cpp's converter asks for GLM's special tokens, and fails with another tokenizer. For llama.cpp, train "
                "with routing='softmax_top_k', or 'top_1' on Qwen2",
            ),
        ),
        Target(
            "qwen3_5_moe_text",
            "Qwen3_5MoeForCausalLM",
            "mlp.gate.weight",
            _QWEN_EXPERTS,
            "num_experts",
            shared="gated",
            shared_name="mlp.shared_expert",
            size=("moe_intermediate_size",),
            always={"shared_expert_intermediate_size": GATED_SHARED_SIZE},
            caveats=("not tried with vLLM",),
            caveats_of_llama_cpp=(
                "llama.cpp's converter takes the folder with `--no-mtp` only; then llama.cpp answers alike",
            ),
        ),
        Target(
            "cohere2_moe",
            "Cohere2MoeForCausalLM",
            "mlp.gate.weight",
            _QWEN_EXPERTS,
            "num_experts",
            dense=_typed,
            size=("intermediate_size", "prefix_dense_intermediate_size"),
            # With a pattern of 1, dense layers would rotate positions where Cohere 2 does not.
            always={
                "num_shared_experts": 0,
                "expert_selection_fn": "softmax",
                "prefix_dense_sliding_window_pattern": 4,
            },
            caveats=("vLLM's class of that name knows sigmoid routers only, so that it would be wrong there",),
        ),
        Target(
            "hunyuan_v1_moe",
            "HunYuanMoEV1ForCausalLM",
            "mlp.gate.wg.weight",
            _QWEN_EXPERTS,
            "num_experts",
            top_k="moe_topk",
            shared="whole",
            shared_name="mlp.shared_mlp",
            gate_in_fp32=True,
            caveats=(_BACKEND,),
            caveats_of_llama_cpp=(
                "llama.cpp's converter fails on the config that transformers writes for this model. Serve it with transformers "
                "or vLLM",
            ),
        ),
    )
}
