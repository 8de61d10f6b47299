"""Routing -> scalar: what keeps the experts in use, as definitions, and the gradients that training takes.

Every definition states its value when balanced and when collapsed. Nothing here knows how a gradient reaches a
trainer (`attach`) or where the logits come from (`routing`).
"""

import torch
from torch import Tensor

from moe_peft.errors import refuse
from moe_peft.routing import Routing, assignments, dense_weights


BALANCES = ("switch", "switch_local", "sequence", "bias", "cv2", "mi", "localized", "none")
"""The values of the config field `balance`."""

BY_ROW = ("sequence", "mi")
"""Those that compare the rows of a batch, "mi" only where the samples have no task types."""

LOAD_WINDOW = 10
"""About how many micro-batches the load of an expert is averaged over (the decay of a running sum is 1 - 1/LOAD_WINDOW).

A micro-batch of one or two sequences would otherwise be asked to use every expert, which forbids experts from
specialising (arXiv:2501.11873, "Demons in the Detail").
"""


def expert_counts(routing: Routing, real: Tensor | None) -> Tensor:
    """How many real tokens chose each expert, `[E]`.

    Args:
        routing: of T tokens.
        real: `[T]` bool, False for padding; None means that every token is real.
    """
    chosen = assignments(routing)
    return chosen.sum(0) if real is None else real.to(chosen.dtype) @ chosen


def mean_probability(router_logits: Tensor, real: Tensor | None) -> Tensor:
    """The softmax probability of each expert, averaged over the real tokens: `[E]`, summing to 1."""
    probs = router_logits.softmax(dim=-1)
    if real is None:
        return probs.mean(0)
    mask = real.to(probs.dtype)
    return (mask @ probs) / mask.sum().clamp(min=1)


def switch_loss(routing: Routing, real: Tensor | None = None, load: Tensor | None = None) -> Tensor:
    """`E * sum_e f_e P_e` (Switch Transformers, arXiv:2101.03961, eq. 4-6), f normalised over the K slots.

    1 when the experts are used evenly, whatever K is; E / K when every token picks the same K experts with all its
    probability. transformers' Mixtral does not divide by K: its value, and so its coefficient's effect, is K times
    ours.

    Args:
        routing: of T tokens.
        real: `[T]` bool, False for padding.
        load: `[E]`, the share of all slots that each expert got, summing to 1. Default: the share in this routing.
            The global-batch form (arXiv:2501.11873) passes the load of a larger batch. It carries no gradient.

    Returns:
        a scalar with gradient to the logits through P.
    """
    if load is None:
        counts = expert_counts(routing, real)
        load = counts / counts.sum().clamp(min=1)
    mean = mean_probability(routing.router_logits, real)
    return mean.shape[0] * (load.detach() * mean).sum()


def switch_gradient(router_logits: Tensor, real: Tensor | None, load: Tensor, probs: Tensor | None = None) -> Tensor:
    """The gradient of `switch_loss` with respect to the logits in closed form, `[T, E]`.

    With p the softmax of a token's logits and T' the number of real tokens, the derivative of
    `E * sum_e f_e mean_t p[t, e]` is `(E / T') * p * (f - <p, f>)`; the row of a padding token is zero.
    """
    probs = router_logits.softmax(dim=-1) if probs is None else probs
    centred = probs * (load - (probs @ load).unsqueeze(-1))
    if real is None:
        return centred * (load.shape[0] / max(centred.shape[0], 1))
    mask = real.to(probs.dtype)
    return centred * (mask * (load.shape[0] / mask.sum().clamp(min=1))).unsqueeze(-1)


def localized_loss(
    routing: Routing, task_types: Tensor, delta: float, real: Tensor | None = None, variant: str = "cv2"
) -> Tensor:
    """LoRAMoE's localized balancing constraint (arXiv:2312.09979, eq. 5-8): dispersion of the weighted expert importance.

    `Q[m, e]` sums the weights that sample m gives expert e; `Z = I * Q` with I = 1 + delta where the expert's type
    equals the sample's and 1 - delta elsewhere. Experts of the second half have type 0, those of the first half type 1.
    Minimising the dispersion makes Z constant, hence Q proportional to 1 / I: **the half multiplied by 1 + delta ends
    up with less weight**, (1 - delta) / (1 + delta) of the other. The released code does the same; the labels of the
    halves, not the separation, are what this inverts. A test holds the direction.

    0 when Z is constant. Departures: padding is excluded, and Q is divided by the sample's number of real tokens, so
    that long samples do not dominate (the released code does neither).

    Args:
        routing: of T = B * S tokens in row-major order, usually dense.
        task_types: `[B]`, 0 for world knowledge, 1 for other tasks.
        delta: 0 <= delta < 1.
        real: `[T]` bool, False for padding.
        variant: "cv2" for variance / mean^2 (released code), "var_over_mean" for variance / mean (paper).

    Raises:
        ValueError: if the tokens cannot be divided into that many rows.
    """
    weights = dense_weights(routing)
    rows, num_experts = task_types.shape[0], weights.shape[-1]
    if weights.shape[0] % rows:
        raise refuse(
            "task_types",
            list(task_types.shape),
            f"of the shape of one number per row: {weights.shape[0]} tokens are not {rows} rows of equal length",
            "With packing or padding-free batches one row holds several samples: turn both off.",
        )
    weights = weights.view(rows, -1, num_experts)
    if real is None:
        importance = weights.mean(1)
    else:
        mask = real.view(rows, -1, 1).to(weights.dtype)
        importance = (weights * mask).sum(1) / mask.sum(1).clamp(min=1)
    expert_types = (torch.arange(num_experts, device=weights.device) < num_experts // 2).to(task_types.dtype)
    same = expert_types == task_types.unsqueeze(-1)
    weighted = importance * (1 - delta + 2 * delta * same.to(weights.dtype))
    mean, variance = weighted.mean(), weighted.var()
    return variance / (mean.square() + 1e-10) if variant == "cv2" else variance / (mean + 1e-10)
