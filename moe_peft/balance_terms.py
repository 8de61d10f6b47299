"""Further balance losses as definitions, each with its value when balanced and when collapsed.

The gradients that training takes are those of the definitions, by autograd (`loss_step` in `attach`): what a student
reads is what is trained. Closed forms exist where they are worth it (`balance`, `rules`).

Letters: T tokens in B rows, E experts.
"""

import torch
from torch import Tensor

from moe_peft.routing import Routing, assignments, dense_weights


def _mask(router_logits: Tensor, real: Tensor | None) -> Tensor:
    ones = router_logits.new_ones(router_logits.shape[0])
    return ones if real is None else real.to(ones.dtype)


def cv2_loss(routing: Routing, real: Tensor | None = None) -> Tensor:
    """`var(I) / mean(I)^2` of the importance `I_e = sum_t g[t, e]` (Shazeer et al., arXiv:1701.06538, eq. 7).

    0 when all experts get the same weight in sum, E - 1 when one gets all (the variance is that of a population). It
    looks at the weights, not at the choice, so it also works where every token visits every expert.

    Args:
        routing: of T tokens.
        real: `[T]` bool, False for padding.
    """
    importance = _mask(routing.router_logits, real) @ dense_weights(routing)
    return importance.var(unbiased=False) / (importance.mean().square() + 1e-10)


def sequence_loss(routing: Routing, rows: int, real: Tensor | None = None) -> Tensor:
    """The Switch loss of each row by itself, averaged over the rows (DeepSeek-V3, arXiv:2412.19437, eq. 17-20).

    1 when every row uses its experts evenly; E / K when each row sends all its tokens to the same K. It keeps one sequence
    from filling one expert, and so forbids experts for whole domains: the opposite of the default.

    Args:
        routing: of `T = rows * S` tokens in row-major order.
        rows: B.
        real: `[T]` bool. Rows without a real token do not count.
    """
    num_experts = routing.router_logits.shape[-1]
    mask = _mask(routing.router_logits, real).view(rows, -1, 1)
    tokens = mask.sum(1).clamp(min=1)
    chosen = (assignments(routing).view(rows, -1, num_experts) * mask).sum(1)
    load = chosen / chosen.sum(-1, keepdim=True).clamp(min=1)
    probs = (routing.router_logits.softmax(-1).view(rows, -1, num_experts) * mask).sum(1) / tokens
    by_row = num_experts * (load.detach() * probs).sum(-1)
    seen = (mask.sum((1, 2)) > 0).to(by_row.dtype)
    return (by_row * seen).sum() / seen.sum().clamp(min=1)


def token_entropy(router_logits: Tensor, real: Tensor | None = None) -> Tensor:
    """The mean over the real tokens of the entropy of the softmax, in nats (arXiv:2403.07652, eq. 6).

    log E when undecided, 0 when certain. Under "top_p" it is what keeps the number of experts small: without it the number
    only grows.
    """
    log_probs = router_logits.log_softmax(-1)
    mask = _mask(router_logits, real)
    return -((log_probs.exp() * log_probs).sum(-1) * mask).sum() / mask.sum().clamp(min=1)


def information_loss(router_logits: Tensor, groups: Tensor, num_groups: int, real: Tensor | None = None) -> Tensor:
    """Minus the mutual information of group and expert, `sum_g w_g H(p_g) - H(p)`, in nats (Mod-Squad, arXiv:2212.08066).

    p_g is the mean probability of the group's real tokens, w_g the group's share of them, p the mean over all. 0 when all
    groups use the experts alike, -log(min(G, E)) when each group of equal size has experts of its own: balanced over
    all, specialised within.

    Args:
        router_logits: `[T, E]`.
        groups: `[T]`, whole numbers from 0 to G - 1: task types, or rows.
        num_groups: G.
        real: `[T]` bool.
    """
    probs, mask = router_logits.softmax(-1), _mask(router_logits, real)
    members = torch.nn.functional.one_hot(groups, num_groups).to(probs.dtype) * mask.unsqueeze(-1)
    size = members.sum(0)
    by_group = (members.T @ probs) / size.clamp(min=1).unsqueeze(-1)
    share = size / size.sum().clamp(min=1)
    overall = share @ by_group
    return (share * _entropy(by_group)).sum() - _entropy(overall)


def label_loss(router_logits: Tensor, labels: Tensor, real: Tensor | None = None) -> Tensor:
    """Cross-entropy of the logits against the sample's own expert, the mean over the real tokens, in nats (MeteoRA,
    arXiv:2405.13053).

    0 when every token is certain of its sample's expert, log N when undecided.

    Args:
        router_logits: `[T, N]`.
        labels: `[T]`, whole numbers from 0 to N - 1.
        real: `[T]` bool.
    """
    mask = _mask(router_logits, real)
    of_label = router_logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return -(of_label * mask).sum() / mask.sum().clamp(min=1)


def label_gradient(router_logits: Tensor, labels: Tensor, real: Tensor | None = None) -> Tensor:
    """The gradient of `label_loss` with respect to the logits in closed form, `[T, N]`: (softmax - one-hot) / T'."""
    mask = _mask(router_logits, real)
    gradient = router_logits.softmax(-1)
    gradient = gradient.scatter_add(-1, labels.unsqueeze(-1), -torch.ones_like(gradient[:, :1]))
    return gradient * (mask / mask.sum().clamp(min=1)).unsqueeze(-1)


def _entropy(probs: Tensor) -> Tensor:
    return -(probs * probs.clamp(min=1e-30).log()).sum(-1)


def updated_bias(
    bias: Tensor, counts: Tensor, tokens: Tensor, speed: float, num_true: int, target_active: float | None = None
) -> Tensor:
    """The selection bias after an optimizer step, `[E + N]` (loss-free balancing, arXiv:2408.15664, algorithm 1).

    `b_e += speed * sign(mean load - load_e)`, then centred and kept within `BIAS_LIMIT`. With a target, the load that an
    expert should have is `target_active / E` of the tokens, and the null experts' biases stay: the controller then steers
    how many experts a token visits on average.

    Departures from the paper: centring (torchtitan does so) and the limit, for with sigmoid or softmax scores of at most 1
    a bias beyond it could never be outvoted.

    Args:
        bias: `[E + N]`.
        counts: `[E + N]`, how often each was chosen in the step, over all ranks and micro-batches.
        tokens: scalar, how many tokens those were.
        speed: at least 0.
        num_true: E.
        target_active: average number of experts per token to aim at, or None for equal loads.
    """
    if target_active is None:
        return (bias + speed * _centred((counts.mean() - counts).sign())).clamp(-BIAS_LIMIT, BIAS_LIMIT)
    wanted = tokens * target_active / num_true
    step = (wanted - counts).sign()
    step[num_true:] = 0
    return (bias + speed * step).clamp(-BIAS_LIMIT, BIAS_LIMIT)


BIAS_LIMIT = 2.0
"""How far the selection bias may go from 0."""


def _centred(step: Tensor) -> Tensor:
    return step - step.mean()
