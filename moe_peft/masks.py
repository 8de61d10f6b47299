"""Which positions of a batch hold a token, read from the mask that an attention module receives."""

from typing import Any

import torch
from torch import Tensor


def real_from_mask(mask: Any, states: Tensor | None, past: int | None = None) -> Tensor | None:
    """Which positions hold a token, from whatever mask an attention module receives.

    Args:
        mask: None; `[B, S]`; `[B, heads, Q, K]` of bool or additive floats (a position is real when it may see itself);
            or a flex-attention BlockMask.
        states: the hidden states `[B, S, d]`, to know S when the mask covers cached positions as well.
        past: how many positions the cache holds before this pass. A static cache has empty places after the last token, so
            that the queries do not stand at the mask's end.

    Returns:
        `[B, S]` bool, or None when every position is real or the mask cannot tell.
    """
    if mask is None:
        return None
    if isinstance(mask, Tensor):
        if mask.dim() == 2:
            length = mask.shape[1] if states is None else states.shape[1]
            return mask[:, -length:].bool()
        if mask.dim() == 4:
            queries, keys = mask.shape[-2:]
            length = queries if states is None else states.shape[1]
            first = max(keys - length, 0)
            if past is not None and past + length <= keys:  # else a window: the last ones
                first = past
            if queries == 1 and states is not None:  # the same for all queries
                row = mask[:, 0, 0, first : first + length]
                return row if mask.dtype == torch.bool else row == 0
            diagonal = mask[:, 0].diagonal(offset=first, dim1=-2, dim2=-1)
            return diagonal if mask.dtype == torch.bool else diagonal == 0
        return None
    if hasattr(mask, "mask_mod") and states is not None:  # a BlockMask: ask it whether i may see i
        batch, length = states.shape[:2]
        rows = torch.arange(batch, device=states.device).unsqueeze(-1)
        positions = torch.arange(length, device=states.device).unsqueeze(0)
        return mask.mask_mod(rows, torch.zeros_like(rows), positions, positions).expand(batch, length)
    return None
