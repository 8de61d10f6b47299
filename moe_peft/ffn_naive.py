"""The definition of a mixture of feed-forward blocks, as a loop that can be held against the paper.

Every expert is computed whole, as often as a token visits it. `moe_peft.ffn` computes the same function.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_peft.ffn_block import FfnBlock
from moe_peft.routing import Routing


Linear = Callable[[Tensor], Tensor]


def ffn_experts_naive(
    x: Tensor,
    frozen_in: Sequence[Linear],
    frozen_out: Linear,
    lora_A_in: Sequence[Tensor],
    lora_B_in: Sequence[Tensor],
    lora_A_out: Tensor,
    lora_B_out: Tensor,
    routing: Routing,
    block: FfnBlock,
    scale: float,
) -> Tensor:
    """`y[t] = sum_k w[t, k] * O_e(x[t])` with `e = top_k_index[t, k]` (MixLoRA, arXiv:2404.15159).

    `O_e` is the block with `x -> W x + b + scale * B_e A_e x` for each of its linears; for an index >= E it is the
    frozen block.

    Args:
        x: `[T, d]`.
        frozen_in: the linears in, biases included: gate and up ("glu"), or one ("fused_glu", "mlp").
        frozen_out: the linear out, its bias included.
        lora_A_in: for each linear in `[E, r, d]`.
        lora_B_in: for each linear in `[E, r, width]`.
        lora_A_out: `[E, r, f]`.
        lora_B_out: `[E, r, d_out]`.
        routing: its weights multiply the experts' outputs.
        block: what is between the linears.
        scale: the LoRA scale.

    Returns:
        `[T, d_out]`.
    """
    num_experts = lora_A_out.shape[0]
    index = routing.top_k_index
    if index is None:
        index = torch.arange(num_experts, device=x.device).expand(x.shape[0], -1)
    out = x.new_zeros(x.shape[0], lora_B_out.shape[-1])
    for expert in range(num_experts + 1):
        token, slot = torch.where(index.clamp(max=num_experts) == expert)
        inputs = x[token]

        def adapted(linear: Linear, A: Tensor, B: Tensor, inputs: Tensor, expert: int = expert) -> Tensor:
            delta = scale * (inputs @ A[expert].T @ B[expert]) if expert < num_experts else 0
            return linear(inputs) + delta

        wide = [adapted(*factors, inputs) for factors in zip(frozen_in, lora_A_in, lora_B_in, strict=True)]
        if block.kind == "mlp":
            h = block.act(wide[0])
        else:
            gate, up = wide if block.kind == "glu" else wide[0].chunk(2, dim=-1)
            h = block.act(gate) * up
        whole = adapted(frozen_out, lora_A_out, lora_B_out, h)
        out = out.index_add(0, token, (routing.top_k_weights[token, slot, None] * whole).to(out.dtype))
    return out
