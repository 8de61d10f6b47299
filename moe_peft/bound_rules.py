"""From an adapter's settings to what its routers compute with: scale, signal and rule, in training and in a server alike.

`config` is anything with the fields of `MoeConfig`: the config itself, or what a server reads from `adapter_config.json`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from moe_peft.routing import RoutingRule
from moe_peft.rules import NORMALISED_RULES, make_rule
from moe_peft.selection import Selection, selection_rule, sparsegen


def scaling(config: Any, r: int) -> float:
    """LoRA's scale for rank `r`."""
    return config.lora_alpha / (math.sqrt(r) if config.use_rslora else r)


def rank_scaling(config: Any, r: int) -> float:
    """`lora_alpha` over the number of ranks that share the weight: k where the gates sum to k, r where they sum to 1."""
    return scaling(config, r if config.routing == "self_activated" else min(config.top_k or r, r))


def signal(
    logits: Tensor,
    scale: float,
    router: Tensor | None = None,
    x: Tensor | None = None,
    bias: Tensor | None = None,
    act: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What the rule sees of `logits [T, N]`: as cosines, with the bias, through the activation, scaled; in this order.

    Args:
        logits: what the product with `router` gave, at least fp32.
        scale: 1 / temperature.
        router, x: `[N, d]` and `[T, d]`, for cosine scores alone.
        bias: `[N]` or None.
        act: or None.
    """
    if x is not None:
        assert router is not None
        norms = x.to(logits.dtype).norm(dim=-1, keepdim=True) * router.to(logits.dtype).norm(dim=-1)
        logits = logits / norms.clamp(min=1e-12)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if act is not None:
        logits = act(logits)
    return logits if scale == 1.0 else logits * scale


def bind_rule(config: Any, num_null: int, own: RoutingRule | None = None) -> Callable[..., RoutingRule]:
    """A function from the selection bias (or nothing) to the rule that the config names, or to a type's own."""
    if own is not None:
        return partial(_without_bias, own)
    if config.routing == "sparsegen":
        return partial(_without_bias, partial(sparsegen, sparsity=config.sparsegen_lambda or 0.0))
    if config.routing in ("random", "given"):
        return partial(_without_bias, make_rule("softmax"))  # never asked
    how = selection_of(config, num_null)
    if how is not None:
        return partial(selection_rule, how)
    if config.routing == "sigmoid_top_k":
        return _sigmoid_rule
    return partial(_without_bias, make_rule(config.routing, top_p=config.top_p, num_null=num_null))


def selection_of(config: Any, num_null: int) -> Selection | None:
    """The choices of `selection`, or None where a rule of `rules` says it all and is the shorter way."""
    scoring = "sigmoid" if config.scoring_func == "sigmoid" or config.routing == "sigmoid_top_k" else "softmax"
    plain = config.routed_scaling_factor == 1.0 and config.balance != "bias" and config.expert_groups is None
    plain &= not (num_null and scoring == "sigmoid")  # the named rule knows no null experts
    if config.routing in ("top_k", "all"):
        return Selection(
            scoring, config.routing, bool(config.norm_topk_prob), config.routed_scaling_factor, 1.0, num_null
        )
    if plain or config.routing in ("top_1_hard", "top_1_straight_through"):
        return None
    keep = {"softmax": "all", "top_p": "top_p"}.get(config.routing, "top_k")
    normalise = config.routing in ("softmax_top_k", "sigmoid_top_k")
    return Selection(scoring, keep, normalise, config.routed_scaling_factor, config.top_p or 1.0, num_null)


def sums_to_one(config: Any) -> bool:
    """Whether the weights of every token sum to 1, so that with equal experts the output is that of one of them."""
    normalised = config.routing in NORMALISED_RULES or bool(config.norm_topk_prob)
    softmax_all = config.routing == "all" and config.scoring_func != "sigmoid"
    always = config.routing in ("sparsegen", "random", "given")
    return config.routed_scaling_factor == 1.0 and (normalised or softmax_all or always)


def _without_bias(rule: RoutingRule, selection_bias: Tensor | None = None) -> RoutingRule:
    return rule


def _sigmoid_rule(selection_bias: Tensor | None = None) -> RoutingRule:
    return make_rule("sigmoid_top_k", selection_bias=selection_bias)
