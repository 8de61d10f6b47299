"""What a hand on the router does to one decision: experts switched off, left as a hole, forced, weighted, cut.

In the order in which they act on `logits [T, N]` and a rule of `rules`, `selection` or `rank_rules`:

    disable   the logit is out of the choice, and the next expert takes the slot
    force     the expert has one of the slots; the others choose among the slots that are left
    (the rule gives every chosen expert its weight)
    floor     chosen experts below `floor` times the token's largest weight are dropped, the others share their weight
    weights   the weight of an expert is the number given
    ablate    the expert was chosen and adds nothing: a hole

`disable` and `ablate` are the two switches of MoTE (arXiv:2502.11096); the floor is the pruning in use of MC-MoE
(arXiv:2410.06270). Where an expert is a whole FFN block, what is taken from it or given to it is its own change of the
block: the frozen block keeps its part.

Letters: T tokens, N choices of the router, K slots.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moe_peft.rank_rules import self_activated
from moe_peft.routing import Routing, RoutingRule, assignments, softmax_top_k, top_1
from moe_peft.rules import softmax_top_p
from moe_peft.selection import MASKED, Selection


class Override(NamedTuple):
    """What is asked of one router. None is nothing.

    Attributes:
        disabled, forced, ablated: `[N]` bool.
        given: `[N]` bool, whose weight is given; a part of `forced`.
        weights: `[N]`, those weights and 0 elsewhere.
        top_k: slots instead of the adapter's.
        floor: 0 to 1.
        domains: `[B]` int64, one for each row of the batch, or one for all: experts, or task types where the adapter has
            groups of experts.
        num_disabled, num_forced: how many, so that nothing waits for the device.
    """

    disabled: Tensor | None = None
    forced: Tensor | None = None
    ablated: Tensor | None = None
    given: Tensor | None = None
    weights: Tensor | None = None
    top_k: int | None = None
    floor: float | None = None
    domains: Tensor | None = None
    num_disabled: int = 0
    num_forced: int = 0

    def to(self, device: torch.device) -> "Override":
        """With its tensors there."""
        return Override(*(value.to(device) if isinstance(value, Tensor) else value for value in self))


def overridden(logits: Tensor, top_k: int, rule: RoutingRule, asked: Override, whole_blocks: bool = False) -> Routing:
    """The rule's decision as `asked`.

    Args:
        logits: `[T, N]`, masked ones at `selection.MASKED`.
        top_k: K of the adapter.
        rule: of the adapter.
        asked: on the device of the logits.
        whole_blocks: each expert is a frozen block with a change of its own, so that an index of N is that block alone.

    Returns:
        a routing whose `router_logits` are those with disabled experts masked. It may have a slot more than K.
    """
    top_k = asked.top_k or top_k
    if asked.disabled is not None:
        logits, rule = _hidden(logits, rule, asked.disabled)
        top_k = min(top_k, logits.shape[-1] - asked.num_disabled)
    routing = rule(logits, top_k) if asked.forced is None else _forced(logits, top_k, rule, asked)
    return reweighted(routing, asked, whole_blocks)


def reweighted(routing: Routing, asked: Override, whole_blocks: bool = False) -> Routing:
    """What acts after the choice: floor, weights, holes. The arguments are those of `overridden`."""
    if asked.floor is not None:
        routing = _floored(routing, asked.floor, asked.forced)
    if asked.given is None and asked.ablated is None:
        return routing
    if whole_blocks:
        return _changed_blocks(routing, asked)
    weights = routing.top_k_weights
    if asked.given is not None and asked.weights is not None:
        weights = torch.where(_at(asked.given, routing), _at(asked.weights.to(weights.dtype), routing), weights)
    if asked.ablated is not None:
        weights = weights.masked_fill(_at(asked.ablated, routing), 0.0)
    return routing._replace(top_k_weights=weights)


def chosen(domains: Tensor, num_experts: int, dtype: torch.dtype) -> Routing:
    """Each token to the one expert of its domain, with weight 1.

    Args:
        domains: `[T]` int64.
        num_experts: N.
        dtype: of the weights.
    """
    index = domains.unsqueeze(-1)
    logits = torch.full((len(index), num_experts), MASKED, dtype=dtype, device=index.device).scatter_(-1, index, 0.0)
    return Routing(logits, torch.ones_like(index, dtype=dtype), index)


def _hidden(logits: Tensor, rule: RoutingRule, away: Tensor) -> tuple[Tensor, RoutingRule]:
    """Logits and rule for which the experts `away [N]` or `[T, N]` are not there: a selection bias must not bring them
    back."""
    bias = getattr(rule, "keywords", {}).get("selection_bias")
    if bias is not None:
        rule = partial(rule, selection_bias=bias.masked_fill(away, float("-inf")))
    return logits.masked_fill(away, MASKED), rule


def _forced(logits: Tensor, top_k: int, rule: RoutingRule, asked: Override) -> Routing:
    """What the rule chooses, the last of it giving way to the forced experts; then the rule weighs all that stay, so that
    a forced expert weighs what it would weigh had the token chosen it."""
    assert asked.forced is not None
    keep = asked.forced.expand_as(logits)
    first = rule(logits, top_k)
    if first.top_k_index is None:
        keep = torch.ones_like(keep)
    elif top_k > asked.num_forced:  # the slots of a rule are in order, the best first
        other = ~_at(asked.forced, first)
        other = other & (other.cumsum(-1) <= top_k - asked.num_forced)
        slots = first.top_k_index.masked_fill(~other, logits.shape[-1])
        keep = keep | assignments(first._replace(top_k_index=slots)).bool()
    uncut, of_all = _uncut(rule)
    stay, stay_rule = _hidden(logits, uncut, ~keep)
    routing = stay_rule(stay, top_k)
    weights, index = routing.top_k_weights, routing.top_k_index
    if of_all:
        weights = weights * logits.softmax(-1).masked_fill(~keep, 0.0).sum(-1, keepdim=True)
    if index is not None:
        unused = ~torch.nn.functional.pad(keep, (0, 1)).gather(-1, index)
        weights, index = weights.masked_fill(unused, 0.0), index.masked_fill(unused, logits.shape[-1])
    return Routing(logits, weights, index)


def _uncut(rule: RoutingRule) -> tuple[RoutingRule, bool]:
    """The rule without a threshold that could drop a forced expert; and whether its weights are probabilities among all
    experts, which hiding some of them would raise."""
    base, settings = getattr(rule, "func", rule), dict(getattr(rule, "keywords", {}))
    how: Selection | None = settings.get("how")
    if base is softmax_top_p:
        return softmax_top_k, True
    if base is self_activated:
        return self_activated, False
    if how is None:
        return rule, base is top_1
    if how.select == "top_p":
        settings["how"] = how._replace(select="top_k")
        rule = partial(base, **settings)
    return rule, how.scoring_func == "softmax" and not how.norm_topk_prob


def _floored(routing: Routing, floor: float, forced: Tensor | None) -> Routing:
    """Without the chosen experts below `floor` times the largest weight; the sum of the weights stays."""
    weights = routing.top_k_weights
    dropped = weights < floor * weights.amax(-1, keepdim=True)
    if forced is not None:
        dropped = dropped & ~_at(forced, routing)
    kept = weights.masked_fill(dropped, 0.0)
    total = weights.sum(-1, keepdim=True)
    return routing._replace(top_k_weights=kept * (total / (kept.sum(-1, keepdim=True) + 1e-20)))


def _changed_blocks(routing: Routing, asked: Override) -> Routing:
    """Weights and holes where an expert is a whole block: what an expert loses or gets is the frozen block's."""
    weights, index, columns = routing.top_k_weights, routing.top_k_index, routing.router_logits.shape[-1]
    if index is None:
        index = torch.arange(columns, device=weights.device).expand_as(weights)
    explicit = routing._replace(top_k_index=index)
    if asked.given is not None and asked.weights is not None:
        wanted = torch.where(_at(asked.given, explicit), _at(asked.weights.to(weights.dtype), explicit), weights)
        rest = weights.sum(-1, keepdim=True) - wanted.sum(-1, keepdim=True)
        weights = torch.cat((wanted, rest), -1)
        index = torch.cat((index, torch.full_like(index[:, :1], columns)), -1)
        explicit = Routing(routing.router_logits, weights, index)
    if asked.ablated is not None:
        index = index.masked_fill(_at(asked.ablated, explicit), columns)
    return Routing(routing.router_logits, weights, index)


def _at(values: Tensor, routing: Routing) -> Tensor:
    """`values [N]` at the slots of a routing, `[T, K]`; 0 at empty ones."""
    if routing.top_k_index is None:
        return values.expand_as(routing.top_k_weights)
    return torch.cat((values, values.new_zeros(1)))[routing.top_k_index]
