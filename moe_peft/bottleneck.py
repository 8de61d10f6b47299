"""Bottleneck experts beside a frozen linear layer: the definition, and the same as two dense products.

    out[t] = sum_j w[t, j] (U_j GELU(V_j x[t] + c_j) + b_j)

Letters: T tokens, n experts, m the width of one, d_in and d_out the widths of the frozen layer. Both factors are stored
with the narrow axis second, `down [n, m, d_in]` and `up [n, m, d_out]`: stacking the experts is then a view.
"""

import torch
from torch import Tensor, nn


def bottleneck_experts_naive(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, weights: Tensor
) -> Tensor:
    """The definition, an expert at a time; arguments as in `bottleneck_experts`."""
    out = x.new_zeros(x.shape[0], up.shape[-1])
    for j in range(len(down)):
        hidden = nn.functional.gelu(x @ down[j].T + down_bias[j])
        out = out + weights[:, j, None] * (hidden @ up[j] + up_bias[j])
    return out


def bottleneck_experts(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, weights: Tensor | None
) -> Tensor:
    """What the experts add to the frozen layer's output.

    Args:
        x: `[T, d_in]`, of the experts' dtype.
        down: `[n, m, d_in]`, V.
        down_bias: `[n, m]`, c.
        up: `[n, m, d_out]`, the columns of U as rows.
        up_bias: `[n, d_out]`, b.
        weights: `[T, n]`, or None for 1 everywhere.

    Returns:
        `[T, d_out]`, of the experts' dtype.
    """
    hidden = nn.functional.gelu(nn.functional.linear(x, down.flatten(0, 1), down_bias.flatten()))
    if weights is None:
        return torch.addmm(up_bias.sum(0), hidden, up.flatten(0, 1))
    weights = weights.to(hidden.dtype)
    gated = (hidden.view(len(x), *down_bias.shape) * weights.unsqueeze(-1)).flatten(1)
    return torch.addmm(weights @ up_bias, gated, up.flatten(0, 1))


def gate_logits(
    x: Tensor, weights: list[Tensor], biases: list[Tensor] | None, dropout: float = 0.0, training: bool = False
) -> Tensor:
    """The logits of a gate.

    Args:
        x: `[T, d_in]`.
        weights: of its linear layers. With biases, ReLU stands between the layers and dropout before each (MixDA's
            code). Without, a sigmoid between the two (the paper's `W_u sigmoid(W_d q)`; its sigma is read as that).
        biases: one for each layer, or None.
        dropout, training: of the first kind.

    Returns:
        `[T, sources]`.
    """
    if biases is None:
        return nn.functional.linear(nn.functional.linear(x, weights[0]).sigmoid(), weights[1])
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = nn.functional.relu(x) if number else x
        x = nn.functional.linear(nn.functional.dropout(x, dropout, training), weight, bias)
    return x


def pooled(x: Tensor, seen: Tensor, last: bool) -> Tensor:
    """What a gate of whole sequences looks at.

    Args:
        x: `[B, S, d]`.
        seen: `[B, S, 1]` of 0 and 1, the tokens that it may look at; in a row without any it sees zeros.
        last: the last of them; otherwise their mean.

    Returns:
        `[B, d]`.
    """
    if last:
        position = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=torch.float32).view(1, -1, 1)
        chosen = (position * seen).argmax(1, keepdim=True) == (position.long() - 1)
        return torch.where(chosen & seen.bool(), x, 0).sum(1)
    seen = seen.to(x.dtype)
    return torch.where(seen > 0, x, 0).sum(1) / seen.sum(1).clamp(min=1)
