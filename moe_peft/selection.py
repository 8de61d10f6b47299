"""Routing as free choices: how experts are scored, which are kept, how their weights are scaled, which are allowed.

`rules` names the points of this space that papers use; here is the space. Every rule takes logits and returns a
`Routing`, so that any choice works with any kernel of experts.

Letters: T tokens, E experts, N null experts (the last columns of the logits), K slots per token.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moe_peft.routing import Routing, RoutingRule
from moe_peft.rules import ROUTING_RULES


SCORES = ("softmax", "sigmoid", "cosine")
"""The values of `scoring_func`. "cosine" is a softmax whose logits are cosines, which the router itself makes."""

ACTIVATIONS = {"tanh": torch.tanh, "gelu": torch.nn.functional.gelu, "sigmoid": torch.sigmoid}
"""The values of `router_act`. An activation before the softmax gives the router its usual rate of learning back where a
temperature is learned as well ("Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?")."""

MASKED = -1e30
"""The logit of an expert that a token may not visit: finite, so that 0 times its logarithm is 0; its score is 0."""


DENSE_ROUTINGS = frozenset({"softmax", "all", "sparsegen", "random", "given"})
"""Values of `routing` under which a token may use every expert of its layer, so that no number of slots is given."""

ROUTINGS = (*ROUTING_RULES, "top_k", "all", "sparsegen", "random", "given")
"""The values of the config field `routing`: the names of `rules`, and the free forms of this file."""


class Selection(NamedTuple):
    """What `select` does.

    Attributes:
        scoring_func: "softmax" over all columns, or "sigmoid" of each.
        select: "all", "top_k" or "top_p".
        norm_topk_prob: divide the kept scores by their sum.
        routed_scaling_factor: multiplies the weights at last (DeepSeek-V2, arXiv:2405.04434).
        top_p: for "top_p", the probability that the kept experts reach.
        num_null: N. Null experts are chosen like others, weigh 0 beside true ones, and do not count in the sum.
    """

    scoring_func: str = "softmax"
    select: str = "top_k"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    top_p: float = 1.0
    num_null: int = 0


def select(router_logits: Tensor, top_k: int, how: Selection, selection_bias: Tensor | None = None) -> Routing:
    """Score, keep, scale.

    1. `s = scoring_func(logits)`.
    2. Kept are: all; the `top_k` largest of `s + bias`; or, by falling `s + bias`, experts as long as the sum of the `s`
       before them is below `top_p`, at most `top_k`. The bias gets no gradient and steers the choice alone (DeepSeek-V3,
       arXiv:2412.19437, eq. 16). Masked columns are never kept: their slots stay empty (index E + N, weight 0).
    3. Weights are the kept s, 0 for null experts, divided by their sum if so asked, times `routed_scaling_factor`.

    A token that keeps null experts alone gives them all its weight, as in `rules.softmax_top_k_null`.

    Args:
        router_logits: `[T, E + N]`, masked ones at `MASKED`.
        top_k: 1 <= K <= E + N.
        how: the choices.
        selection_bias: `[E + N]` or None.
    """
    columns = router_logits.shape[-1]
    scores = router_logits.sigmoid() if how.scoring_func == "sigmoid" else router_logits.softmax(dim=-1)
    if how.select == "all":
        return Routing(router_logits, _scaled(scores, None, columns, how), None)
    masked = router_logits <= MASKED / 2
    biased = scores.detach() if selection_bias is None else scores.detach() + selection_bias.detach().to(scores.dtype)
    index = biased.masked_fill(masked, float("-inf")).topk(top_k, dim=-1).indices
    kept, unused = scores.gather(-1, index), masked.gather(-1, index)
    if how.select == "top_p" and how.top_p < 1:  # the sum may round to 1 before the last expert
        before = torch.nn.functional.pad(kept.detach().cumsum(-1)[:, :-1], (1, 0))
        unused = unused | (before >= how.top_p)
    index = index.masked_fill(unused, columns)
    return Routing(router_logits, _scaled(kept.masked_fill(unused, 0.0), index, columns, how), index)


def _scaled(kept: Tensor, index: Tensor | None, columns: int, how: Selection) -> Tensor:
    """Step 3 of `select`; the 1e-20 is that of transformers' DeepSeek and GLM routers."""
    if how.num_null and index is not None:
        null = index >= columns - how.num_null
        kept = kept.masked_fill(null & ~null.all(-1, keepdim=True), 0.0)
    if how.norm_topk_prob:
        kept = kept / (kept.sum(-1, keepdim=True) + 1e-20)
    return kept * how.routed_scaling_factor if how.routed_scaling_factor != 1.0 else kept


def selection_rule(how: Selection, selection_bias: Tensor | None = None) -> RoutingRule:
    """`select` as a rule. A bias that lives in a buffer is bound anew whenever it is used, as `.to()` replaces it."""
    return partial(select, how=how, selection_bias=selection_bias)


def sparsegen(router_logits: Tensor, top_k: int, sparsity: float = 0.0) -> Routing:
    """The point of the simplex nearest to the logits, made sparse: `argmin_g |g - u|^2 - sparsity * |g|^2`.

    Closed form (LD-MoLE, arXiv:2509.25684; Laha et al., arXiv:1810.11975): with u sorted downwards, K is the largest j
    with `(1 - sparsity) + j u_j > u_1 + ... + u_j`, `tau = (u_1 + ... + u_K - (1 - sparsity)) / K`, and
    `g_e = max(0, (u_e - tau) / (1 - sparsity))`. It sums to 1, has exact zeros, and is differentiable almost everywhere:
    each token has as many experts as it needs, and the task trains the router through all that are kept and through the
    threshold. `top_k` plays no part.

    Departure: LD-MoLE predicts the sparsity of each token by a small MLP; here it is one number.

    Args:
        router_logits: `[T, E]`.
        sparsity: below 1. Towards 1 one expert is left, far below 0 all are used.
    """
    room = 1.0 - sparsity
    logits = router_logits - router_logits.amax(
        -1, keepdim=True
    )  # a shift changes nothing, and masked ones stay finite
    ordered = logits.detach().clamp(min=-1e6).sort(dim=-1, descending=True).values
    count = torch.arange(1, logits.shape[-1] + 1, device=logits.device, dtype=logits.dtype)
    kept = (room + count * ordered > ordered.cumsum(-1)).sum(-1, keepdim=True)
    support = logits >= ordered.gather(-1, kept - 1)
    tau = (logits.masked_fill(~support, 0.0).sum(-1, keepdim=True) - room) / support.sum(-1, keepdim=True)
    return Routing(router_logits, ((logits - tau) / room).clamp(min=0.0), None)


def only_allowed(router_logits: Tensor, groups: Tensor, types: Tensor) -> Tensor:
    """The logits, with `MASKED` where a token's type may not go.

    Args:
        router_logits: `[T, E]`.
        groups: `[G, E]` bool; row t says where tokens of type t may go.
        types: `[T]`, whole numbers from 0 to G - 1.
    """
    return router_logits.masked_fill(~groups[types], MASKED)


def given(groups: Tensor, types: Tensor, dtype: torch.dtype) -> Routing:
    """Each token shared equally by the experts of its type: routing by label, without a router.

    Args:
        groups: `[G, E]` bool, at least one True in each row.
        types: `[T]`.
        dtype: of the weights.
    """
    weights = groups[types].to(dtype)
    weights = weights / weights.sum(-1, keepdim=True)
    return Routing(torch.zeros_like(weights), weights, None)


def at_random(tokens: int, num_experts: int, like: Tensor) -> Routing:
    """One expert for each token, drawn evenly, with weight 1 (THOR, arXiv:2110.04260).

    From torch's default generator, whose state checkpointing restores: recomputation draws the same experts.
    """
    index = torch.randint(num_experts, (tokens, 1), device=like.device)
    logits = like.new_zeros(tokens, num_experts)
    return Routing(logits, logits.new_ones(tokens, 1), index)


def evenly(tokens: int, num_experts: int, like: Tensor) -> Routing:
    """The expectation of `at_random`: every expert with weight 1 / E."""
    logits = like.new_zeros(tokens, num_experts)
    return Routing(logits, logits + 1 / num_experts, None)
