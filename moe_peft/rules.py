"""The further routing rules, null experts, and what a router needs beside its balance loss.

The rules are of the same form as those in `routing`, `(router_logits, top_k) -> Routing`, and join them in
`ROUTING_RULES` here. `make_rule` turns a name and its settings into such a function.

An index says where a token goes, and three ranges are told apart. With E experts and N null experts the logits have
E + N columns:

    index < E        an expert
    E <= index < E+N a null expert: the frozen layer alone. Chosen like an expert, and counted.
    index == E + N   an empty slot: nothing was chosen. Weight exactly 0, not counted, may occur several times in a row.

A kernel of whole blocks takes the frozen block times the slot's weight for every index of E or above; a kernel that adds
experts to a frozen layer skips those slots.

"Chosen" is told by the index alone and never by the weight: the weight of an expert that was chosen may underflow to 0,
and a null expert that was chosen usually weighs 0.

Letters: T tokens, E experts, N null experts, K slots per token.
"""

from functools import partial

import torch
from torch import Tensor

from moe_peft.balance import switch_gradient, switch_loss
from moe_peft.errors import nearest, refuse
from moe_peft.routing import ROUTING_RULES as FIRST_RULES
from moe_peft.routing import Routing, RoutingRule, routing_dtype


TOP_P = 0.8
"""The default of the config field `top_p`: that of MixLoRA's dynamic variant."""


# --- rules ---


def softmax_top_p(router_logits: Tensor, top_k: int, threshold: float = TOP_P) -> Routing:
    """The most probable experts that together reach the probability `threshold`, weighted by their probability.

    With p sorted downwards, expert i is kept where `p_1 + ... + p_(i-1) < threshold`, up to and including the first at
    which the sum reaches it (arXiv:2403.07652; MixLoRA's dynamic variant). The weights are not rescaled, as in
    both releases: they sum to at least `threshold` unless `top_k` cuts them short. The releases keep one expert more
    where a sum meets the threshold exactly; the paper's formula does not.

    The number of slots is the same for every token, so that nothing waits for the host. Slots that a token does not
    use are empty: index = number of columns, weight 0.

    Args:
        router_logits: `[T, E]`.
        top_k: at most so many experts; E or more is no limit. K = min(top_k, E).
        threshold: 0 < threshold <= 1; 1 keeps all.
    """
    num_experts = router_logits.shape[-1]
    probs, index = router_logits.softmax(dim=-1).topk(min(top_k, num_experts), dim=-1)
    if threshold >= 1:  # the sum may round to 1 before the last expert
        return Routing(router_logits, probs, index)
    before = torch.nn.functional.pad(probs.detach().cumsum(-1)[:, :-1], (1, 0))
    unused = before >= threshold
    return Routing(router_logits, probs.masked_fill(unused, 0.0), index.masked_fill(unused, num_experts))


def top_1_hard(router_logits: Tensor, top_k: int) -> Routing:
    """The most probable expert with weight 1 (the sparse path of LLaVA-MoLE, arXiv:2401.16160).

    The weight is a constant: **the task gives the router no gradient**, only a balance loss does. `top_k` plays no part.
    """
    index = router_logits.argmax(dim=-1, keepdim=True)
    return Routing(router_logits, torch.ones_like(index, dtype=router_logits.dtype), index)


def top_1_straight_through(router_logits: Tensor, top_k: int) -> Routing:
    """The most probable expert with weight `p / stop_gradient(p)`: the value is exactly 1, the gradient that of log p.

    What `top_1_hard` computes, and the router learns. `top_k` plays no part.
    """
    index = router_logits.argmax(dim=-1, keepdim=True)
    probs = router_logits.softmax(dim=-1).gather(-1, index)  # at least 1 / E, so the quotient is exactly 1
    return Routing(router_logits, probs / probs.detach(), index)


def sigmoid_top_k(router_logits: Tensor, top_k: int, selection_bias: Tensor | None = None) -> Routing:
    """Each expert scored by itself, `s = sigmoid(logit)`; the `top_k` largest `s + bias`, weighted by `s / sum of kept s`.

    DeepSeek-V3 (arXiv:2412.19437, eq. 13-16) and transformers' GLM-4-MoE router, whose 1e-20 in the denominator is kept
    so that an export computes the same. The bias steers the choice and never enters the weight; it gets no gradient.

    Args:
        router_logits: `[T, E]`.
        top_k: 1 <= K <= E.
        selection_bias: `[E]`, or None for 0.
    """
    scores = router_logits.sigmoid()
    ranked = scores.detach() if selection_bias is None else scores.detach() + selection_bias.detach()
    index = ranked.topk(top_k, dim=-1).indices
    kept = scores.gather(-1, index)
    return Routing(router_logits, kept / (kept.sum(-1, keepdim=True) + 1e-20), index)


def softmax_top_k_null(router_logits: Tensor, top_k: int, num_null: int = 0) -> Routing:
    """`softmax_top_k` where the last `num_null` columns are null experts (AdaMoE, arXiv:2406.13233).

    The `top_k` largest of all E + N are chosen. The weights are normalised over the *true* experts among them, and the
    null ones weigh 0. A token with null experts only gives them all the weight: it gets the frozen layer, whole. So the
    weights sum to 1 for every token, also where an expert is a whole block and a missing weight would shrink it.

    On average a token visits `K * E / (E + N)` true experts where the router is balanced. With a single true expert
    its weight is 1 and the task gives the router no gradient from that token: choose K large enough.

    Done on the logits, not on finished weights: true experts far below a null one would have underflowed to 0 / 0.

    Args:
        router_logits: `[T, E + N]`, the null experts last.
        top_k: 1 <= K <= E + N.
        num_null: N.
    """
    kept, index = router_logits.topk(top_k, dim=-1)
    null = index >= router_logits.shape[-1] - num_null
    some_true = ~null.all(-1, keepdim=True)
    return Routing(router_logits, kept.masked_fill(null & some_true, float("-inf")).softmax(dim=-1), index)


ROUTING_RULES: dict[str, RoutingRule] = {
    **FIRST_RULES,
    "top_p": softmax_top_p,
    "top_1_hard": top_1_hard,
    "top_1_straight_through": top_1_straight_through,
    "sigmoid_top_k": sigmoid_top_k,
}
"""The value of the config field `routing` -> the rule with its default settings; `routing` alone has the first three."""

TOP_K_RULES = frozenset({"softmax_top_k", "sigmoid_top_k"})
"""Rules that select `top_k` experts and rescale their weights: with `top_k` = 1 the weight would always be 1."""

TOP_1_RULES = frozenset({"top_1", "top_1_hard", "top_1_straight_through"})
"""Rules that select one expert, whatever `top_k` is."""

NORMALISED_RULES = frozenset({"softmax", "top_1_hard", "top_1_straight_through"}) | TOP_K_RULES
"""Rules whose weights sum to 1 for every token: with equal experts the output is that of one of them."""


def make_rule(
    name: str, *, top_p: float | None = None, selection_bias: Tensor | None = None, num_null: int = 0
) -> RoutingRule:
    """The rule of that name with its settings bound. It can be pickled and deep-copied.

    A bias that lives in a buffer has to be bound anew whenever it is used: `.to()` replaces the buffer, and the rule
    would go on with the old one.

    Args:
        name: a key of `ROUTING_RULES`.
        top_p: for "top_p" alone, 0 < top_p <= 1; None for `TOP_P`.
        selection_bias: `[E]`, for "sigmoid_top_k" alone.
        num_null: for "softmax_top_k" alone; the last so many logits are null experts.

    Raises:
        ValueError: if the name is unknown, or a setting belongs to another rule.
    """
    if name not in ROUTING_RULES:
        allowed = "one of " + ", ".join(repr(rule) for rule in ROUTING_RULES)
        raise refuse("routing", name, allowed, nearest(str(name), ROUTING_RULES))
    for setting, given, owner in (
        ("top_p", top_p is not None, "top_p"),
        ("selection_bias", selection_bias is not None, "sigmoid_top_k"),
        ("num_null", num_null != 0, "softmax_top_k"),
    ):
        if given and name != owner:
            raise refuse("routing", name, f"{owner!r} where `{setting}` is given", f"Leave `{setting}` out.")
    if top_p is not None:
        return partial(softmax_top_p, threshold=top_p)
    if selection_bias is not None:
        return partial(sigmoid_top_k, selection_bias=selection_bias)
    if num_null:
        return partial(softmax_top_k_null, num_null=num_null)
    return ROUTING_RULES[name]


# --- null experts ---


def null_pooled(load: Tensor, num_experts: int) -> Tensor:
    """The load `[E + N]` with that of the null experts replaced by their mean; its sum stays.

    With it the balance loss does not care which of the null experts, all alike, is chosen (AdaMoE, arXiv:2406.13233). The
    release takes the mean over the wrong axis, so that it changes nothing there.
    """
    true, null = load[:num_experts], load[num_experts:]
    return torch.cat((true, null.mean(0, keepdim=True).expand_as(null))) if null.numel() else load


# --- balance under sigmoid scores ---


def probabilities(name: str, router_logits: Tensor) -> Tensor:
    """What the rule takes for each expert's probability, `[T, E]`, summing to 1: P of the balance loss is its mean.

    The softmax; under "sigmoid_top_k" `s / sum(s)` with s the sigmoid scores (DeepSeek-V3, arXiv:2412.19437, eq. 17-20),
    computed as the softmax of log s, which is the same and cannot become 0 / 0.
    """
    return _log_scores(router_logits).softmax(-1) if name == "sigmoid_top_k" else router_logits.softmax(-1)


def _log_scores(router_logits: Tensor) -> Tensor:
    return torch.nn.functional.logsigmoid(router_logits)


def switch_loss_sigmoid(routing: Routing, real: Tensor | None = None, load: Tensor | None = None) -> Tensor:
    """`switch_loss` with `probabilities("sigmoid_top_k", logits)` for the softmax; its values are the same when balanced
    and when collapsed. The arguments are those of `switch_loss`."""
    return switch_loss(routing._replace(router_logits=_log_scores(routing.router_logits)), real, load)


def switch_gradient_sigmoid(router_logits: Tensor, real: Tensor | None, load: Tensor) -> Tensor:
    """The gradient of `switch_loss_sigmoid` with respect to the logits in closed form, `[T, E]`.

    With q = s / sum(s) = softmax(log s) and T' the number of real tokens it is `(E / T') * q * (f - <q, f>) * (1 - s)`:
    that of `switch_loss` at log s, times `d log s / d logit = 1 - s`.
    """
    return switch_gradient(_log_scores(router_logits), real, load) * (-router_logits).sigmoid()


# --- z-loss and jitter ---


def z_loss(router_logits: Tensor, real: Tensor | None = None) -> Tensor:
    """The mean over the real tokens of `logsumexp(logits)^2` (ST-MoE, arXiv:2202.08906, eq. 5); keeps the logits small.

    `log(E)^2` for logits of 0; 0 at best, with all logits at -log(E). It means nothing for sigmoid scores, which have no
    common denominator.

    Args:
        router_logits: `[T, E]`.
        real: `[T]` bool, False for padding; None means that every token is real.
    """
    squares = router_logits.logsumexp(-1).square()
    if real is None:
        return squares.sum() / max(squares.shape[0], 1)
    mask = real.to(squares.dtype)
    return (squares * mask).sum() / mask.sum().clamp(min=1)


def z_gradient(router_logits: Tensor, real: Tensor | None = None) -> Tensor:
    """The gradient of `z_loss` with respect to the logits in closed form, `[T, E]`: `(2 / T') * logsumexp * softmax`."""
    gradient = 2 * router_logits.logsumexp(-1, keepdim=True) * router_logits.softmax(-1)
    if real is None:
        return gradient / max(gradient.shape[0], 1)
    mask = real.to(gradient.dtype)
    return gradient * (mask / mask.sum().clamp(min=1)).unsqueeze(-1)


def jittered(x: Tensor, noise: float, training: bool) -> Tensor:
    """What the router sees: x times numbers drawn from U(1 - noise, 1 + noise), in training only.

    Never in place, so that the experts see x as it is. (MixLoRA's code changes x itself, and one release does so in
    inference too.)

    Args:
        x: `[*, d]`.
        noise: 0 <= noise < 1; 0 returns x itself.
        training: False returns x itself.

    Returns:
        as x. The factors are drawn in fp32 or better: in bf16 all of 0.99 to 1.01 is five numbers.
    """
    if not training or noise == 0:
        return x
    factors = torch.empty(x.shape, dtype=routing_dtype(x.dtype), device=x.device).uniform_(1 - noise, 1 + noise)
    return (x * factors).to(x.dtype)
