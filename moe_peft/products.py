"""Several low-rank products of one input, computed as one: the input is read once instead of once per factor."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class _Stacked(Function):
    """`x -> F_1 x, F_2 x, ...`, the first `joined` of them in one piece. Saves x and the factors, never their
    concatenation, and makes no gradient for a factor that is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, joined: int, *factors: Tensor) -> tuple[Tensor, ...]:
        cast = x.to(factors[0].dtype)
        ctx.save_for_backward(x if x.element_size() < cast.element_size() else cast, *factors)
        out = torch.cat(factors) @ cast.reshape(-1, x.shape[-1]).T
        rows = [factor.shape[0] for factor in factors]
        return out.split([sum(rows[:joined]), *rows[joined:]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *factors = ctx.saved_tensors
        grad = torch.cat(grads)
        grad_x = None
        grad_factors: tuple[Tensor | None, ...] = (None,) * len(factors)
        if ctx.needs_input_grad[0]:
            # Made in the shape of x, not viewed: autograd may then add the frozen layer's gradient to it in place.
            grad_x = (grad.T.view(*x.shape[:-1], grad.shape[0]) @ torch.cat(factors)).to(x.dtype)
        needed = ctx.needs_input_grad[2:]
        if any(needed):
            rows = [factor.shape[0] for factor in factors]
            if not all(needed):
                grad = torch.cat([g for g, need in zip(grad.split(rows), needed, strict=True) if need])
            together = grad @ x.reshape(-1, x.shape[-1]).to(grad.dtype)
            parts = iter(together.split([n for n, need in zip(rows, needed, strict=True) if need]))
            grad_factors = tuple(next(parts) if need else None for need in needed)
        return grad_x, None, *grad_factors


def stacked_products(x: Tensor, factors: tuple[Tensor, ...], joined: int = 1) -> tuple[Tensor, ...]:
    """`F x` for every factor.

    Args:
        x: `[*, d]`, T tokens in all; cast to the dtype of the factors.
        factors: each `[n_i, d]`, all of one dtype.
        joined: so many of the first factors give one result, which spares a copy where they lie apart. At least 1.

    Returns:
        each `[n_i, T]`, tokens last; the first `[n_1 + ... + n_joined, T]`.
    """
    return cast(Any, _Stacked).apply(x, joined, *factors)
