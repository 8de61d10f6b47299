"""(x, A, B, Routing) -> what the experts add to the frozen layer's output.

The definition stands first, as a loop that can be held against the paper; the fast path computes the same function as
two dense products over the stacked experts, without loop, gather or host synchronisation:

    y + s * B_cat((A_cat x) * expand(weights))

Letters: T tokens, E experts, r rank of one expert, n = E * r, d_in and d_out the widths of the frozen layer.
Both factors are stored with the rank axis second, `lora_A [E, r, d_in]` and `lora_B [E, r, d_out]`: then stacking the
experts is a view, and no product needs a copy. Slice e gives the PEFT LoRA pair `lora_A[e]`, `lora_B[e].T`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from moe_peft.routing import Routing


def lora_experts_naive(x: Tensor, lora_A: Tensor, lora_B: Tensor, routing: Routing) -> Tensor:
    """The definition: `out[t] = sum_k w[t, k] * B[e] A[e] x[t]` with `e = top_k_index[t, k]`.

    Args:
        x: `[T, d_in]`.
        lora_A: `[E, r, d_in]`.
        lora_B: `[E, r, d_out]`.
        routing: its weights multiply the experts' outputs.

    Returns:
        `[T, d_out]`, not yet multiplied by the LoRA scale.
    """
    out = x.new_zeros(x.shape[0], lora_B.shape[-1])
    index = routing.top_k_index
    if index is None:
        index = torch.arange(lora_A.shape[0], device=x.device).expand(x.shape[0], -1)
    for expert, (A, B) in enumerate(zip(lora_A, lora_B, strict=True)):
        token, slot = torch.where(index == expert)
        weight = routing.top_k_weights[token, slot, None]
        out = out.index_add(0, token, (weight * (x[token] @ A.T @ B)).to(out.dtype))
    return out


class _StackedIn(Function):
    """`x -> (A_cat x, R x)` in one product. Saves x and the two factors, never their concatenation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, lora_A, router)
        both = x @ torch.cat((lora_A, router)).T
        hidden, logits = both.split((lora_A.shape[0], router.shape[0]), dim=1)
        return hidden, logits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_A, router = ctx.saved_tensors
        grad = torch.cat(grads, dim=1)
        grad_x = grad @ torch.cat((lora_A, router)) if ctx.needs_input_grad[0] else None
        grad_A = grad_router = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_A, grad_router = (grad.T @ x).split((lora_A.shape[0], router.shape[0]))
        return grad_x, grad_A, grad_router


class _ExpertsOut(Function):
    """`y + B_cat(hidden * expand(weights))`. Saves the rank-space tensors only: nothing of width d_out."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, hidden: Tensor, lora_B: Tensor, weights: Tensor, index: Tensor | None) -> Tensor:
        num_experts, r, d_out = lora_B.shape
        gates = weights.to(hidden.dtype)
        if index is not None:
            gates = hidden.new_zeros(hidden.shape[0], num_experts).scatter_(1, index, gates)
        ctx.save_for_backward(hidden, lora_B, gates, index)
        ctx.weights_dtype = weights.dtype
        gated = (hidden.view(-1, num_experts, r) * gates.unsqueeze(-1)).view(-1, num_experts * r)
        return torch.addmm(y, gated, lora_B.view(-1, d_out))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, lora_B, gates, index = ctx.saved_tensors
        (grad_y,) = grads
        num_experts, r, d_out = lora_B.shape
        hidden, gates = hidden.view(-1, num_experts, r), gates.unsqueeze(-1)
        grad_gated = (grad_y @ lora_B.view(-1, d_out).T).view_as(hidden)
        grad_hidden = (grad_gated * gates).view(-1, num_experts * r)
        grad_B = None
        if ctx.needs_input_grad[2]:
            grad_B = ((hidden * gates).view(-1, num_experts * r).T @ grad_y).view_as(lora_B)
        grad_weights = None
        if ctx.needs_input_grad[3]:
            grad_weights = (hidden * grad_gated).sum(-1, dtype=ctx.weights_dtype)
            if index is not None:
                grad_weights = grad_weights.gather(1, index)
        return (grad_y if ctx.needs_input_grad[0] else None), grad_hidden, grad_B, grad_weights, None


def stacked_in(x: Tensor, lora_A: Tensor, router: Tensor) -> tuple[Tensor, Tensor]:
    """The experts' hidden values and the router's logits from one product over x.

    Args:
        x: `[T, d_in]`.
        lora_A: `[E, r, d_in]`, contiguous.
        router: `[E, d_in]`.

    Returns:
        `(hidden [T, E * r], router_logits [T, E])`, in the dtype of x.
    """
    return _StackedIn.apply(x, lora_A.flatten(0, 1), router)


def experts_out(y: Tensor, hidden: Tensor, lora_B: Tensor, weights: Tensor, index: Tensor | None) -> Tensor:
    """`y + sum_e weights[:, e] * (hidden_e @ lora_B[e])`, out of place.

    Args:
        y: `[T, d_out]`, the frozen layer's output; must have the dtype of `hidden`.
        hidden: `[T, E * r]`.
        lora_B: `[E, r, d_out]`, contiguous.
        weights: `[T, K]`, the LoRA scale already in them.
        index: `[T, K]` or None for all experts in order.

    Returns:
        `[T, d_out]`.
    """
    return _ExpertsOut.apply(y, hidden, lora_B, weights, index)
