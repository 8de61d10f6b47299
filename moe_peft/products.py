"""Several low-rank products of one input, computed as one: the input is read once instead of once per factor."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class _Stacked(Function):
    """`x -> F_1 x, F_2 x, ...`. Saves x and the factors, never their concatenation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        cast = x.to(factors[0].dtype)
        ctx.save_for_backward(x if x.element_size() < cast.element_size() else cast, *factors)
        out = torch.cat(factors) @ cast.reshape(-1, x.shape[-1]).T
        return out.split([factor.shape[0] for factor in factors])

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
        if any(ctx.needs_input_grad[1:]):
            together = grad @ x.reshape(-1, x.shape[-1]).to(grad.dtype)
            grad_factors = together.split([factor.shape[0] for factor in factors])
        return grad_x, *grad_factors


def stacked_products(x: Tensor, factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`F x` for every factor.

    Args:
        x: `[*, d]`, T tokens in all; cast to the dtype of the factors.
        factors: each `[n_i, d]`, all of one dtype.

    Returns:
        each `[n_i, T]`, tokens last.
    """
    return cast(Any, _Stacked).apply(x, *factors)
