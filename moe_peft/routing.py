"""From router logits to a `Routing`: which experts a token visits, and with what weight.

Knows nothing of experts, losses or layers. A rule is a function `(router_logits, top_k) -> Routing`; adding one to
`ROUTING_RULES` makes it a value of the config field `routing`.

Letters: T tokens, E experts, K slots per token (the number of experts that a token visits).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """The result of routing: a value, not a module. Any rule makes it, any expert kernel takes it.

    Attributes:
        router_logits: `[T, E]`, at least fp32.
        top_k_weights: `[T, K]`, same dtype as the logits; multiplies the expert's *output*.
        top_k_index: `[T, K]` int64, no expert twice in a row; None means every expert in order (K == E). An index of E
            is a slot that the token leaves empty, with weight 0 (`rules`).
    """

    router_logits: Tensor
    top_k_weights: Tensor
    top_k_index: Tensor | None


RoutingRule = Callable[[Tensor, int], Routing]


def routing_dtype(dtype: torch.dtype) -> torch.dtype:
    """Routing is done in fp32, or in fp64 where the caller computes in fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def softmax_top_k(router_logits: Tensor, top_k: int) -> Routing:
    """Softmax over all experts, keep the `top_k` largest, rescale them to sum to 1 (Mixtral, MoLA, MixLoRA).

    Computed as a softmax over the kept logits, which is the same function: the common denominator cancels.

    Args:
        router_logits: `[T, E]`.
        top_k: 1 <= K <= E.
    """
    kept, index = router_logits.topk(top_k, dim=-1)
    return Routing(router_logits, kept.softmax(dim=-1), index)


def softmax(router_logits: Tensor, top_k: int) -> Routing:
    """Every expert, weighted by its softmax probability (LoRAMoE, arXiv:2312.09979). `top_k` plays no part."""
    return Routing(router_logits, router_logits.softmax(dim=-1), None)


def top_1(router_logits: Tensor, top_k: int) -> Routing:
    """The most probable expert, weighted by its probability, not rescaled (Switch Transformers, arXiv:2101.03961 eq. 2).

    Rescaling would make the weight exactly 1, and the task loss would give the router no gradient.
    """
    weights, index = router_logits.softmax(dim=-1).topk(1, dim=-1)
    return Routing(router_logits, weights, index)


ROUTING_RULES: dict[str, RoutingRule] = {
    "softmax_top_k": softmax_top_k,
    "softmax": softmax,
    "top_1": top_1,
}
"""The value of the config field `routing` -> the rule."""

DENSE_RULES = frozenset({"softmax"})
"""Rules under which every token visits every expert."""


def with_shared(routing: Routing, num_shared: int) -> Routing:
    """Every token also visits `num_shared` experts that stand behind the routed ones, with weight 1 (DeepSeekMoE,
    arXiv:2401.06066). For the experts' kernel only: balance losses look at the routed experts alone."""
    if num_shared == 0:
        return routing
    tokens, num_experts = routing.router_logits.shape
    ones = routing.top_k_weights.new_ones(tokens, num_shared)
    weights = torch.cat((routing.top_k_weights, ones), dim=1)
    if routing.top_k_index is None:
        return routing._replace(top_k_weights=weights)
    shared = torch.arange(num_experts, num_experts + num_shared, device=ones.device).expand(tokens, -1)
    return routing._replace(top_k_weights=weights, top_k_index=torch.cat((routing.top_k_index, shared), dim=1))


def dense_weights(routing: Routing) -> Tensor:
    """The weights spread over all experts, `[T, E]`, zero where a token does not go."""
    if routing.top_k_index is None:
        return routing.top_k_weights
    return _spread(routing, routing.top_k_weights)


def grouped(routing: Routing, expert_map: Tensor, num_experts: int) -> Routing:
    """The same choices where several stand for one expert (`moe_peft.regrouping`): its weight is the sum of theirs.

    The logits stay those of the choices. An expert that a token chose more than once keeps the first of its slots; the
    others become empty ones, so that no expert comes twice.

    Args:
        routing: over N choices, of which the first `len(expert_map)` are experts and the others null ones.
        expert_map: int64, choice -> expert.
        num_experts: how many experts the map leads to, at most as many as it has entries.

    Returns:
        over these experts; an index of `len(expert_map)` or above is no expert, as before.
    """
    weights, index = routing.top_k_weights, routing.top_k_index
    last, choices = len(expert_map) - 1, routing.router_logits.shape[-1]
    if index is None and choices == len(expert_map):
        return routing._replace(top_k_weights=summed(weights, expert_map, num_experts))
    if index is None:
        index = torch.arange(choices, device=weights.device).expand(len(weights), -1)
    merged = torch.where(index > last, index, expert_map[index.clamp(max=last)])
    equal = merged.unsqueeze(2) == merged.unsqueeze(1)  # [T, K, K]
    again = equal.tril(-1).any(-1)
    of_experts = (equal * weights.unsqueeze(1)).sum(-1).masked_fill(again, 0.0)
    return routing._replace(top_k_weights=of_experts, top_k_index=merged.masked_fill(again, choices))


def summed(weights: Tensor, expert_map: Tensor | None, num_experts: int) -> Tensor:
    """Of each choice's weight `[T, N]` each expert's, `[T, E]`: the sum where several choices stand for one, in whatever
    order; without a map each choice is an expert of its own."""
    if expert_map is None:
        return weights
    return weights.new_zeros(len(weights), num_experts).index_add(1, expert_map, weights)


def assignments(routing: Routing) -> Tensor:
    """How often each token chose each expert, `[T, E]` of 0 and 1 in the logits' dtype, without gradient."""
    if routing.top_k_index is None:
        return torch.ones_like(routing.router_logits)
    return _spread(routing, torch.ones_like(routing.top_k_weights))


def _spread(routing: Routing, values: Tensor) -> Tensor:
    """Each slot's value in its expert's column, `[T, E]`. One column more takes those of empty slots and is cut off."""
    tokens, num_experts = routing.router_logits.shape
    assert routing.top_k_index is not None
    return values.new_zeros(tokens, num_experts + 1).scatter_(-1, routing.top_k_index, values)[:, :num_experts]
