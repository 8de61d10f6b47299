"""What a frozen feed-forward block does between its linears, forward and backward."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn


Kind = Literal["glu", "fused_glu", "mlp"]

_aten: Any = torch.ops.aten

ACT_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda grad, x: _aten.silu_backward(grad, x),
    "gelu": lambda grad, x: _aten.gelu_backward(grad, x),
    "gelu_tanh": lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"),
    "relu": lambda grad, x: _aten.threshold_backward(grad, x, 0),
}
"""Activations whose derivative is one operator: name -> (gradient of act(x), x) -> gradient of x."""

_ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
}


class FfnBlock(NamedTuple):
    """What a frozen feed-forward block does between its linears. Made by `ffn_block`.

    Attributes:
        kind: "glu" is `act(gate) * up`; "fused_glu" the same where one linear gives `[gate | up]` (Phi-3, GLM-4);
            "mlp" is `act(x)`, one linear in.
        act: elementwise, `[*] -> [*]`; it is called in both passes.
        act_name: key of `ACT_BACKWARD`, or "" where backward asks autograd.
    """

    kind: Kind
    act: Callable[[Tensor], Tensor]
    act_name: str = ""


def ffn_block(kind: Kind, act: Callable[[Tensor], Tensor]) -> FfnBlock:
    """An `FfnBlock` whose activation is recognised by what it computes: libraries have many classes for one function.

    Raises:
        ValueError: `kind` is none of "glu", "fused_glu", "mlp".
    """
    if kind not in ("glu", "fused_glu", "mlp"):
        raise ValueError(f'`kind` is "{kind}"; it must be "glu", "fused_glu" or "mlp".')
    if isinstance(act, nn.Module) and act.state_dict():
        return FfnBlock(kind, act)  # what is learned may change
    grid = torch.linspace(-9, 9, 361, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        value = act(grid.clone())
        names = [name for name, f in _ACTS.items() if torch.allclose(f(grid), value, rtol=1e-9, atol=1e-9)]
    return FfnBlock(kind, act, names[0] if names else "")


def halves(block: FfnBlock, wide: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """(gate, up) from what the linears gave; up is None where the block has none."""
    if block.kind == "fused_glu":
        gate, up = wide[0].chunk(2, dim=-1)
        return gate, up
    return wide[0], wide[1] if block.kind == "glu" else None


def _act_backward(block: FfnBlock, grad: Tensor, x: Tensor) -> Tensor:
    if block.act_name:
        return ACT_BACKWARD[block.act_name](grad, x)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(block.act(leaf), leaf, grad)[0]


def block_backward(
    block: FfnBlock, grad_h: Tensor, gate: Tensor, up: Tensor | None, act: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of what the linears gave. Overwrites `grad_h` and `up`."""
    if up is None:
        return (_act_backward(block, grad_h, gate),)
    grads = _act_backward(block, up.mul_(grad_h), gate), grad_h.mul_(act)
    return (torch.cat(grads, dim=1),) if block.kind == "fused_glu" else grads
