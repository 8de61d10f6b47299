"""The mixture of feed-forward blocks where the block's own code runs between its linears.

`moe_peft.ffn` must know what lies between the linears. Where that is not known, every linear in gives each slot of a
token its own row (`fan_out`), the block's code works on `[T, K, f]` as it would on a longer batch, and the linear out
brings the slots together (`fan_in`). The frozen products are still paid once; the wide tensors are K times as large.

Letters as in `moe_peft.ffn`: T tokens, E experts, K slots, r rank of one expert, n = E * r, f width of the inside.
"""

import torch
from torch import Tensor


def fan_out(y: Tensor, hidden: Tensor, lora_B: Tensor, index: Tensor | None, num_slots: int, scale: float) -> Tensor:
    """`out[t, k] = y[t] + scale * B_e A_e x[t]` with `e = index[t, k]`; exactly y where B is zero.

    Args:
        y: `[T, f]`, what the frozen linear gave; the result is in its dtype.
        hidden: `[n, T]`, `A_cat x`.
        lora_B: `[E, r, f]`.
        index: `[T, K]`, a value >= E for the frozen linear alone, or None for every expert in order.
        num_slots: K.
        scale: the LoRA scale.

    Returns:
        `[T, K, f]`.

    Raises:
        ValueError: `num_slots` is not the number of columns of `index`, or not E where that is None.
    """
    num_experts, r, _ = lora_B.shape
    if num_slots != (num_experts if index is None else index.shape[1]):
        raise ValueError(f"`num_slots` is {num_slots}, but `index` and `lora_B` are for another number of slots.")
    hidden, lora_B = hidden.to(y.dtype), lora_B.to(y.dtype)
    # Contiguous, as the frozen block's own input to its activation is: some of torch's kernels round others differently.
    if index is None:
        delta = (hidden.view(num_experts, r, -1).transpose(1, 2) @ lora_B).transpose(0, 1).contiguous()
    else:
        by_slot = hidden.masked_fill(_others(index, num_experts, r), 0)
        delta = by_slot.permute(2, 0, 1) @ lora_B.flatten(0, 1)
    return y.unsqueeze(1) + scale * delta


def fan_in(
    h: Tensor, lora_A_out: Tensor, weights: Tensor, index: Tensor | None, *, normalised: bool
) -> tuple[Tensor, Tensor]:
    """`S = sum_k weights[:, k] * h[:, k]` and `z_e = Ad_e (g_e h_e)`, as `moe_peft.ffn.mixed_hidden` returns them.

    Args:
        h: `[T, K, f]`.
        lora_A_out: `[E, r, f]`.
        weights: `[T, K]`.
        index: `[T, K]`, a value >= E for a slot without expert, or None for every expert in order.
        normalised: promises that each token's weights sum to 1. S is then `h_1 + sum_k g_k (h_k - h_1)`: bit for bit
            h_1 where all are equal. The gradients are those of the sum.

    Returns:
        S `[T, f]` in the dtype of h, z `[n, T]` in that of `lora_A_out`.
    """
    num_experts, r, _ = lora_A_out.shape
    gates = weights.to(h.dtype).unsqueeze(2)
    if normalised:
        mixed = h[:, 0] + (gates[:, 1:] * (h[:, 1:] - h[:, :1])).sum(1)
        if gates.requires_grad:  # adds 0, and to each weight's gradient what the first slot's expert is worth
            total = gates.sum(1)
            mixed = mixed + (total - total.detach()) * h[:, 0]
    else:
        mixed = (gates * h).sum(1)
    A, by_slot = lora_A_out.to(h.dtype), h.permute(1, 2, 0)
    rows = weights.T.unsqueeze(1).to(lora_A_out.dtype)
    if index is None:
        return mixed, ((A @ by_slot).to(rows.dtype) * rows).flatten(0, 1)
    z = (A.flatten(0, 1) @ by_slot).to(rows.dtype).masked_fill(_others(index, num_experts, r), 0)
    return mixed, (z * rows).sum(0)


def _others(index: Tensor, num_experts: int, r: int) -> Tensor:
    """`[K, n, T]`: True in the rows of experts that a token did not choose in that slot."""
    experts = torch.arange(num_experts, device=index.device).repeat_interleave(r).unsqueeze(1)
    return index.T.unsqueeze(1) != experts
