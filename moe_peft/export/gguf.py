"""Whether an export becomes a GGUF file, and answers alike in llama.cpp; or why not, and what is nearest.

Each sentence is a run of llama-cpp-python 0.3.36 on tiny exports (`tests/test_gguf.py`): its converter on the folder, then
the logits of both in fp32. Where they agree they do so to 1e-5 of the largest logit. What llama.cpp hard-codes is in its
src/models/*.cpp, what it drops in conversion/*.py. Read there and not run: 'linear' and 'yarn' on other models than Mixtral,
and Cohere 2's positions.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moe_peft.export.targets import Target


if TYPE_CHECKING:
    from moe_peft.export.choose import Choice


ALIKE = "llama.cpp's converter takes the folder, and llama.cpp answers alike"

# Target -> ways of scaling positions that its converter writes down, as transformers names them.
_ROPE = {
    "mixtral": ("default", "linear", "yarn", "llama3"),
    "cohere2_moe": ("default",),
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe", "granitemoe", "ernie4_5_moe", "glm4_moe"), ("default", "linear", "yarn")
    ),
}
_NO_DENSE = ("qwen2_moe", "qwen3_moe")
_DENSE_FIRST = ("ernie4_5_moe", "cohere2_moe")
_NO_WINDOW = ("mixtral", "qwen2_moe")
_USUAL_HEADS = ("qwen2_moe", "granitemoe")
_TO_MIXTRAL = ("llama", "mistral", "phi3")
_ELSEWHERE = "Serve it with transformers or vLLM"
_EQUAL = "the same number of experts in every layer and routing='softmax_top_k'"


def llama_cpp_says(
    target: Target, renormalised: bool, config: Mapping[str, Any], choice: "Choice | None" = None
) -> list[str]:
    """What stands against a GGUF, each with what is nearest; or, if nothing does and `choice` is given, that it works.

    Args:
        target: what the adapter becomes.
        renormalised: whether the weights of the chosen experts sum to 1.
        config: of the dense model.
        choice: how the experts lie in the layers. Without it, what depends on that is not said.

    Returns:
        sentences without a full stop.
    """
    said = [
        *target.caveats_of_llama_cpp,
        *_weights(target, renormalised, config, choice),
        *_layers(target, choice),
        *_positions(target, config),
        *_attention(target, config),
    ]
    return [ALIKE] if not said and choice is not None else said


def _weights(target: Target, renormalised: bool, config: Mapping[str, Any], choice: "Choice | None") -> list[str]:
    """llama.cpp fixes for each model whether weights are renormalised. A file that was trained otherwise loads, and is wrong."""
    every = choice is not None and choice.top_k == choice.num_experts  # their weights sum to 1 either way
    if target.model_type == "qwen2_moe" and renormalised and not every:
        if config["model_type"] in _TO_MIXTRAL:
            nearest = "export with target='mixtral'"
        else:
            nearest = "train with routing='top_1' or 'softmax'"
        return [
            "llama.cpp ignores `norm_topk_prob` for this model and would be wrong; transformers and vLLM honour it. For "
            f"llama.cpp, {nearest}"
        ]
    if target.model_type == "qwen3_moe" and not renormalised and not every:
        return [
            "llama.cpp always renormalises for this model and would be wrong; transformers and vLLM honour the flag. For "
            "llama.cpp, train with routing='softmax_top_k' or 'top_1_hard'"
        ]
    return []


def _layers(target: Target, choice: "Choice | None") -> list[str]:
    if choice is None or not choice.dense:
        return []
    if target.model_type in _NO_DENSE:
        return [
            "llama.cpp's converter fails on it, as it knows this model with experts in every layer only. For llama.cpp, "
            "train with at least two experts in every layer"
        ]
    first, last = min(choice.slots), max(choice.slots)
    behind = [layer for layer in choice.dense if layer > first]
    if target.model_type in _DENSE_FIRST and behind:
        return [
            "llama.cpp does not load it, as it knows dense layers of this model at the start only. For llama.cpp, train with "
            f"at least two experts in all layers from {first} to {max(last, *behind)}"
        ]
    return []


def _positions(target: Target, config: Mapping[str, Any]) -> list[str]:
    """The converter of each model writes down some ways of scaling positions, and drops others without a word."""
    rope = (config.get("rope_parameters") or {}).get("rope_type", "default")
    kind = target.model_type
    if kind not in _ROPE or rope in _ROPE[kind]:
        return []
    if rope == "dynamic":
        return [
            "llama.cpp's converter drops the scaling of positions ('dynamic') and would be wrong on texts longer than the model "
            "was first trained on. For llama.cpp, keep them shorter"
        ]
    if kind == "granitemoe" and rope == "llama3":
        return [f"llama.cpp's converter fails on the scaling of positions ('{rope}') of this model. {_ELSEWHERE}"]
    nearest = (
        f"For llama.cpp, train with {_EQUAL}: that becomes a Mixtral, which keeps it"
        if rope == "llama3"
        else _ELSEWHERE
    )
    return [f"llama.cpp's converter drops the scaling of positions ('{rope}') and would be wrong. {nearest}"]


def _attention(target: Target, config: Mapping[str, Any]) -> list[str]:
    said = []
    kind = target.model_type
    window = config.get("sliding_window")
    if kind in _NO_WINDOW and window and window < config.get("max_position_embeddings", 0):
        said.append(
            f"llama.cpp knows no sliding window for this model and would be wrong on texts of more than {window} tokens. For "
            "llama.cpp, keep them shorter"
        )
    heads = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if kind in _USUAL_HEADS and heads * config["num_attention_heads"] != config["hidden_size"]:
        said.append(
            "llama.cpp does not load it, as it takes `head_dim` of this model for `hidden_size` / `num_attention_heads`. "
            "Serve it with transformers"
        )
    if kind == "qwen2_moe" and config.get("tie_word_embeddings"):
        said.append(
            "llama.cpp does not load it, as it wants this model's output head apart from its embeddings. For llama.cpp, save "
            "the dense model untied first, with a copy of its embeddings as `lm_head`"
        )
    if kind == "qwen3_moe" and config.get("attention_bias"):
        said.append("llama.cpp does not load it, as it knows this model without attention biases. " + _ELSEWHERE)
    return said
