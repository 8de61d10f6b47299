"""A from the frozen weight: its principal right singular vectors, dealt out to the experts ("pissa").

PiSSA (arXiv:2404.02948) writes W = B A + W_res with the principal part in B A, and trains that beside the frozen
remainder. Here the frozen layer is never changed, and B starts at 0 as ever: A alone starts where W acts most. So a
fresh adapter changes nothing and nothing has to be converted back; what is lost is PiSSA's start of B. The rows are
orthonormal, times the length that rows have by default (1 / sqrt(3)) rather than the roots of the singular values:
`lora_alpha` and the learning rate keep their meaning.
"""

import math
from typing import Any

import torch
from torch import Tensor

from moe_peft.config import MoeConfig
from moe_peft.errors import refuse
from moe_peft.tuners.layer import MoeTunerLayer


OVERSAMPLED, ITERATIONS, SEED = 8, 8, 0


@torch.no_grad()
def start_from_principal(layer: MoeTunerLayer, experts: Any, config: MoeConfig) -> None:
    """Write the A of an adapter's experts where `init_weights` is "pissa" and no saved weights will follow.

    Args:
        layer: whose frozen weight is decomposed, dequantised by PEFT's backend where it is packed.
        experts: `lora_A [n, r, d_in]`. Expert e gets singular vectors e r ... (e + 1) r - 1, the shared experts the last
            ones. Where they run out, the next experts start over, each with its vectors turned at random.

    Raises:
        ValueError: if the backend cannot dequantise the weight.
    """
    if config.init_weights != "pissa" or experts.lora_A.is_meta or getattr(config, "weights_follow", False):
        return
    weight = _weight(layer)
    if weight.is_meta:
        return
    n, r, d_in = experts.lora_A.shape
    with torch.random.fork_rng(devices=[weight.device] if weight.device.type == "cuda" else []):
        torch.manual_seed(SEED)
        vectors = principal_directions(weight, min(n * r, d_in, weight.shape[0]))
        slices = [_slice(vectors, expert, r) for expert in range(n)]
    experts.lora_A.copy_(torch.stack(slices) / math.sqrt(3))


def principal_directions(weight: Tensor, count: int) -> Tensor:
    """The first right singular vectors of `weight [d_out, d_in]`, nearly: `[count, d_in]`, orthonormal, in fp32."""
    q = min(count + OVERSAMPLED, *weight.shape)
    return torch.svd_lowrank(weight.float(), q=q, niter=ITERATIONS)[2].T[:count]


def _slice(vectors: Tensor, expert: int, r: int) -> Tensor:
    """One expert's rows, `[r, d_in]`."""
    count = len(vectors)
    rows = torch.arange(expert * r, (expert + 1) * r, device=vectors.device)
    mine = vectors[rows % count]
    if int(rows[-1]) < count:
        return mine
    return torch.linalg.qr(torch.randn(r, r, device=vectors.device))[0] @ mine


def _weight(layer: MoeTunerLayer) -> Tensor:
    """The frozen weight as `[d_out, d_in]`."""
    base = layer.get_base_layer()
    try:
        weight = layer.get_base_weight()
    except (TypeError, NotImplementedError) as error:
        allowed = f"True or False for a base layer of type {type(base).__name__}"
        raise refuse("init_weights", "pissa", allowed, f"Its weight cannot be read: {error}") from error
    return weight.T if type(base).__name__ == "Conv1D" else weight
