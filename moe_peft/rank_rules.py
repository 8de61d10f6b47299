"""How a token chooses among the ranks of one LoRA: definitions as loops over tokens and ranks, and the rules.

`rank_top_k` is SMoRA's (arXiv:2501.15103), with a learned router; `own_logits` and `self_activated` are MoRAM's
(arXiv:2506.21035), where a rank's own response is its score. Rank i is an expert of rank 1, the pair of row i of A and
row i of B, so that the kernels for experts serve ranks as they are.

Letters: T tokens, R ranks, K ranks that a token uses.
"""

import torch
from torch import Tensor

from moe_peft.routing import Routing, softmax_top_k
from moe_peft.rules import sigmoid_top_k


def smora_naive(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    router: Tensor,
    top_k: int,
    selection_bias: Tensor | None = None,
    bias_in_gates: bool = False,
) -> Tensor:
    """The definition of SMoRA: `out[t] = sum_i gate_i (a_i x[t]) b_i` over the `top_k` ranks i of token t.

    `z_i = sigmoid(router[i // part] x[t])`, chosen by `z_i + bias_i`, `gate_i = K z_i / (sum of the chosen z)`; with
    `bias_in_gates` the gates are made from `z_i + bias_i` as well, as the released code does.

    Args:
        x: `[T, d_in]`.
        lora_A: `[R, d_in]`.
        lora_B: `[R, d_out]`.
        router: `[R / part, d_in]`; neighbouring ranks share a row.
        selection_bias: `[R]`, or None for 0.

    Returns:
        `[T, d_out]`, not yet multiplied by the scale.
    """
    ranks, rows = lora_A.shape[0], router.shape[0]
    rows_out: list[Tensor] = []
    for token in x:
        scores = [torch.sigmoid(router[i * rows // ranks] @ token) for i in range(ranks)]
        biased = scores if selection_bias is None else [z + b for z, b in zip(scores, selection_bias, strict=True)]
        chosen = sorted(range(ranks), key=lambda i: -float(biased[i].detach()))[:top_k]
        gates = biased if bias_in_gates else scores
        total = torch.stack([gates[i] for i in chosen]).sum()
        parts = [top_k * gates[i] / total * (lora_A[i] @ token) * lora_B[i] for i in chosen]
        rows_out.append(torch.stack(parts).sum(0))
    return torch.stack(rows_out)


def moram_naive(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, top_k: int, temperature: float, threshold: float | None = None
) -> Tensor:
    """The definition of MoRAM: with `P = A x[t]` and `n = P / |P|`, the `top_k` largest n, sign included, are chosen and
    weighted by `softmax(n / temperature)` over the chosen; those with `n < threshold` then add nothing, and the others
    keep their weights.

    Args:
        x: `[T, d_in]`.
        lora_A: `[R, d_in]`.
        lora_B: `[R, d_out]`.
        threshold: None in training.

    Returns:
        `[T, d_out]`, not yet multiplied by the scale.
    """
    rows_out: list[Tensor] = []
    for token in x:
        responses = torch.stack([key @ token for key in lora_A])
        share = responses / responses.square().sum().sqrt().clamp(min=1e-8)
        chosen = sorted(range(len(lora_A)), key=lambda i: -float(share[i].detach()))[:top_k]
        powers = torch.stack([torch.exp(share[i] / temperature) for i in chosen])
        kept = [threshold is None or float(share[i].detach()) >= threshold for i in chosen]
        parts = [
            power / powers.sum() * responses[i] * lora_B[i] * keep
            for i, power, keep in zip(chosen, powers, kept, strict=True)
        ]
        rows_out.append(torch.stack(parts).sum(0))
    return torch.stack(rows_out)


def rank_top_k(
    router_logits: Tensor, top_k: int, selection_bias: Tensor | None = None, bias_in_gates: bool = False
) -> Routing:
    """`rules.sigmoid_top_k` with weights that sum to K rather than to 1 (see `smora_naive`).

    Args:
        router_logits: `[T, R]`; ranks that share a row of the router have equal columns.
        top_k: 1 <= K <= R.
        selection_bias: `[R]`, or None for 0; gets no gradient.
        bias_in_gates: the weights are made from the biased scores too.
    """
    if not bias_in_gates or selection_bias is None:
        routing = sigmoid_top_k(router_logits, top_k, selection_bias)
        return routing._replace(top_k_weights=routing.top_k_weights * top_k)
    kept, index = (router_logits.sigmoid() + selection_bias.detach()).topk(top_k, dim=-1)
    return Routing(router_logits, kept * (top_k / kept.sum(-1, keepdim=True)), index)


def own_logits(responses: Tensor, temperature: float) -> Tensor:
    """A rank's share of the response over the temperature: `P / max(|P|, 1e-8) / temperature`.

    Args:
        responses: P `[T, R]`, at least fp32.
        temperature: above 0.
    """
    norm = responses.square().sum(-1, keepdim=True).clamp(min=1e-16).sqrt()  # its gradient at 0 is 0
    return responses / (temperature * norm)


def self_activated(router_logits: Tensor, top_k: int, lowest: float | None = None) -> Routing:
    """`routing.softmax_top_k` without the chosen ranks whose logit is below `lowest`; the others keep their weights.

    Args:
        router_logits: of `own_logits`, `[T, R]`.
        top_k: 1 <= K <= R.
        lowest: threshold over temperature, or None. The slots below it are empty: index R, weight 0.
    """
    routing = softmax_top_k(router_logits, top_k)
    if lowest is None or routing.top_k_index is None:
        return routing
    cut = router_logits.gather(-1, routing.top_k_index) < lowest
    weights, index = (
        routing.top_k_weights.masked_fill(cut, 0.0),
        routing.top_k_index.masked_fill(cut, router_logits.shape[-1]),
    )
    return Routing(router_logits, weights, index)
