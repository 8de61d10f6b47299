"""(x, A, B, Routing) -> what the experts add to the frozen layer's output.

The definition stands first, as a loop that can be held against the paper; the fast path computes the same function as
two dense products over the stacked experts, without loop, gather or host synchronisation:

    y + s * B_cat((A_cat x) * expand(weights))

Letters: T tokens, E experts, r rank of one expert, n = E * r, d_in and d_out the widths of the frozen layer.
Both factors are stored with the rank axis second, `lora_A [E, r, d_in]` and `lora_B [E, r, d_out]`: then stacking the
experts is a view, and no product needs a copy. Slice e gives the PEFT LoRA pair `lora_A[e]`, `lora_B[e].T`.
In rank space tokens are the last axis, `[n, T]`: an expert's weight then multiplies whole rows, and the products in
both directions take their operands as they lie in memory.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moe_peft.products import stacked_products
from moe_peft.routing import Routing


def lora_experts_naive(x: Tensor, lora_A: Tensor, lora_B: Tensor, routing: Routing) -> Tensor:
    """The definition: `out[t] = sum_k w[t, k] * B[e] A[e] x[t]` with `e = top_k_index[t, k]`.

    Args:
        x: `[T, d_in]`.
        lora_A: `[E, r, d_in]`, or `[1, r, d_in]` where all experts share it.
        lora_B: `[E, r, d_out]`.
        routing: its weights multiply the experts' outputs.

    Returns:
        `[T, d_out]`, not yet multiplied by the LoRA scale.
    """
    out = x.new_zeros(x.shape[0], lora_B.shape[-1])
    index = routing.top_k_index
    if index is None:
        index = torch.arange(lora_B.shape[0], device=x.device).expand(x.shape[0], -1)
    for expert, (A, B) in enumerate(zip(lora_A.expand(len(lora_B), -1, -1), lora_B, strict=True)):
        token, slot = torch.where(index == expert)
        weight = routing.top_k_weights[token, slot, None]
        out = out.index_add(0, token, (weight * (x[token] @ A.T @ B)).to(out.dtype))
    return out


class _DroppedIn(Function):
    """`x -> (A_cat dropout(x), R x)`: the router sees x whole. Saves x and the mask, not what the mask leaves of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, router: Tensor, p: float) -> tuple[Tensor, Tensor]:
        tokens = x.reshape(-1, x.shape[-1]).to(lora_A.dtype)
        dropped, mask = torch.native_dropout(tokens, p, True)
        ctx.save_for_backward(tokens, mask, lora_A, router)
        ctx.keep, ctx.shape = 1 / (1 - p), x.shape
        return lora_A.flatten(0, 1) @ dropped.T, (router @ tokens.T).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        tokens, mask, lora_A, router = ctx.saved_tensors
        dropped = torch.ops.aten.native_dropout_backward(tokens, mask, ctx.keep)
        grad_A, grad_router = (grads[0] @ dropped).view_as(lora_A), grads[1].T @ tokens
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.native_dropout_backward(grads[0].T @ lora_A.flatten(0, 1), mask, ctx.keep)
            grad_x = grad_x.addmm_(grads[1], router).view(ctx.shape)
        return grad_x, grad_A, grad_router, None


class _ExpertsOut(Function):
    """`y + scale * B_cat(hidden * expand(weights))`. Saves the rank-space tensors only: nothing of width d_out."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, hidden: Tensor, lora_B: Tensor, weights: Tensor, index: Tensor | None, scale: float
    ) -> Tensor:
        gates = _gates(weights, index, lora_B.shape[0], hidden.dtype)
        ctx.save_for_backward(hidden, lora_B, gates, index)
        ctx.scale, ctx.weights_dtype = scale, weights.dtype
        return _product_added(y, _gated(hidden, gates, lora_B.shape[1]), lora_B, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, lora_B, gates, index = ctx.saved_tensors
        grad_y = grads[0].to(hidden.dtype)
        grad_gated = _scaled_product(lora_B.flatten(0, 1), grad_y.T, ctx.scale)
        grad_B = grad_weights = None
        if ctx.needs_input_grad[2]:
            grad_B = _scaled_product(_gated(hidden, gates, lora_B.shape[1]), grad_y, ctx.scale).view_as(lora_B)
        if ctx.needs_input_grad[3]:
            r, tokens = lora_B.shape[1], hidden.shape[1]
            products = hidden.view(len(hidden) // r, r, tokens) * grad_gated.view(len(lora_B), r, tokens)
            grad_weights = products.sum(1, dtype=ctx.weights_dtype).T
            if index is not None:
                grad_weights = grad_weights.gather(1, index)
        grad_hidden = _gated(grad_gated, gates, lora_B.shape[1])
        if len(hidden) < len(grad_hidden):  # one A for all experts
            grad_hidden = grad_hidden.view(len(lora_B), *hidden.shape).sum(0)
        return (grads[0] if ctx.needs_input_grad[0] else None), grad_hidden, grad_B, grad_weights, None, None


def _gates(weights: Tensor, index: Tensor | None, num_experts: int, dtype: torch.dtype) -> Tensor:
    """The weights of `[T, K]` slots as one row per expert, `[E, T]`."""
    rows = weights.T.to(dtype)
    if index is None:
        return rows
    return rows.new_zeros(num_experts, rows.shape[1]).scatter_(0, index.T, rows)


def _gated(hidden: Tensor, gates: Tensor, r: int) -> Tensor:
    """Each expert's r rows of `hidden [E * r, T]`, or the r rows that all share, times its row of `gates [E, T]`."""
    num_experts, tokens = gates.shape
    by_expert = hidden.view(len(hidden) // r, r, tokens)
    return (by_expert * gates.unsqueeze(1)).reshape(num_experts * r, tokens)


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`scale * a @ b` in one kernel."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _product_added(y: Tensor, gated: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """`y [T, d_out]` plus the scaled product of `gated [E * r, T]` and the stacked B, in the dtype of y."""
    if y.dtype == gated.dtype:
        return torch.addmm(y, gated.T, lora_B.flatten(0, 1), alpha=scale)
    return (y + _scaled_product(gated.T, lora_B.flatten(0, 1), scale)).to(y.dtype)


def stacked_in(x: Tensor, lora_A: Tensor, router: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """The experts' hidden values and the router's logits from one product over x.

    Args:
        x: `[*, d_in]`, T tokens in all; cast to the dtype of the factors.
        lora_A: `[E, r, d_in]`, contiguous.
        router: `[E, d_in]`; shared experts have no row here, so it may have fewer than `lora_A`.
        dropout: probability with which the experts, but not the router, see a value of x as 0.

    Returns:
        `(hidden [E * r, T], router_logits [T, E])`, in the dtype of the factors.
    """
    if dropout:
        return cast(Any, _DroppedIn).apply(x, lora_A, router, dropout)
    hidden, logits = stacked_products(x, (lora_A.flatten(0, 1), router))
    return hidden, logits.T


def experts_out(
    y: Tensor, hidden: Tensor, lora_B: Tensor, weights: Tensor, index: Tensor | None, scale: float = 1.0
) -> Tensor:
    """`y + scale * sum_e weights[:, e] * (hidden_e @ lora_B[e])`, out of place.

    Args:
        y: `[T, d_out]`, the frozen layer's output; its dtype is that of the result.
        hidden: `[E * r, T]`, or `[r, T]` where all experts share one A (HydraLoRA, arXiv:2404.19245).
        lora_B: `[E, r, d_out]`, contiguous, of the dtype of `hidden`.
        weights: `[T, K]`.
        index: `[T, K]` or None for all experts in order.
        scale: the LoRA scale.

    Returns:
        `[T, d_out]`.
    """
    if torch.is_grad_enabled():
        return cast(Any, _ExpertsOut).apply(y, hidden, lora_B, weights, index, scale)
    gates = _gates(weights, index, lora_B.shape[0], hidden.dtype)
    return _product_added(y, _gated(hidden, gates, lora_B.shape[1]), lora_B, scale)


def experts_decoded(
    y: Tensor, tokens: Tensor, lora_A: Tensor, lora_B: Tensor, gates: Tensor, scale: float = 1.0
) -> Tensor:
    """`y + scale * sum_e gates[:, e] * (tokens @ lora_A[e].T @ lora_B[e])` for a few tokens, without gradient.

    The time of a decoding step goes into calls rather than arithmetic: tokens are the first axis throughout, so that
    nothing is transposed, and nothing is kept.

    Args:
        y: `[T, d_out]`, the frozen layer's output; its dtype is that of the result.
        tokens: `[T, d_in]`, of the factors' dtype.
        lora_A: `[E, r, d_in]`, contiguous.
        lora_B: `[E, r, d_out]`, contiguous.
        gates: `[T, E]`, zero for an expert that a token does not visit.
        scale: the LoRA scale.

    Returns:
        `[T, d_out]`.
    """
    hidden = nn.functional.linear(tokens, lora_A.flatten(0, 1))
    hidden.view(len(hidden), *lora_A.shape[:2]).mul_(gates.unsqueeze(-1))
    if y.dtype == hidden.dtype:
        return torch.addmm(y, hidden, lora_B.flatten(0, 1), alpha=scale)
    return (y + _scaled_product(hidden, lora_B.flatten(0, 1), scale)).to(y.dtype)
