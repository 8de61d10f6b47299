"""How the tokens of a mixture of feed-forward blocks are cut into pieces, and how a piece is read and written.

Letters as in `moe_peft.ffn`; m tokens of one piece.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """How the work is cut into pieces. Holds no tensor: those that belong to it are saved with the others."""

    chunk: int  # 0: all tokens in one piece
    counts: list[list[int]] | None  # [K][E + 1], tokens per slot and expert, if sorted


class Piece(NamedTuple):
    """Some tokens in one slot, and the experts among which theirs are."""

    slot: int
    tokens: slice | Tensor  # which rows of the wide tensors
    rows: slice  # which rows of rank space; none for the frozen block alone
    others: Tensor | None  # [n, m], True in the rows of experts that the token did not choose; None if it chose all


def _slices(tokens: int, chunk: int) -> list[slice]:
    if not chunk or tokens <= chunk:
        return [slice(None)]  # without the number of tokens, so that a compiled graph serves any
    return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]


def pieces(plan: Plan, index: Tensor | None, weights: Tensor, num_experts: int, r: int) -> Iterator[Piece]:
    """All pieces, a token's slots in order. Within a piece no token comes twice.

    Args:
        index: `[T, K]` for the static schedule, `[K, T]` from `sorted_tokens` for the other, None for every expert.
    """
    if plan.counts is not None and index is not None:
        for slot, counts in enumerate(plan.counts):
            for expert, tokens in enumerate(index[slot].split(counts)):
                rows = slice(expert * r, (expert + 1) * r) if expert < num_experts else slice(0, 0)
                yield from (Piece(slot, part, rows, None) for part in tokens.split(plan.chunk) if part.shape[0])
        return
    experts = torch.arange(num_experts, device=weights.device).repeat_interleave(r).unsqueeze(1)
    for tokens in _slices(weights.shape[0], plan.chunk):
        for slot in range(weights.shape[1]):
            if index is None:
                yield Piece(slot, tokens, slice(slot * r, (slot + 1) * r), None)
            else:
                yield Piece(slot, tokens, slice(None), index[tokens, slot] != experts)


def sorted_tokens(index: Tensor, num_experts: int) -> tuple[Tensor, list[list[int]]]:
    """For each slot the tokens in order of their expert, `[K, T]`, and how many go to each; the host waits once."""
    experts = index.T.clamp(max=num_experts)  # the last group is the frozen block alone
    counts = experts.new_zeros(experts.shape[0], num_experts + 1)
    counts.scatter_add_(1, experts, torch.ones_like(experts))
    return experts.argsort(dim=1, stable=True), counts.tolist()


def ranks_of(hidden: Tensor, piece: Piece) -> Tensor:
    """A piece's part of a rank-space tensor `[n, T]`, zero in the rows of experts that a token did not choose."""
    part = hidden[piece.rows]
    part = part[:, piece.tokens] if isinstance(piece.tokens, slice) else part.index_select(1, piece.tokens)
    return chosen(part, piece)


def chosen(part: Tensor, piece: Piece) -> Tensor:
    return part if piece.others is None else part.masked_fill(piece.others, 0)


def taken(t: Tensor, tokens: slice | Tensor) -> Tensor:
    """`t[tokens]`. Not written so: indexing by a tensor may be by a mask, for which graphs and tracers must provide."""
    return t[tokens] if isinstance(tokens, slice) else t.index_select(0, tokens)


def raised(wide: Tensor, tokens: slice | Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`wide[tokens] + left @ right`, in memory of its own."""
    if isinstance(tokens, slice):
        return torch.addmm(wide[tokens], left, right)
    return wide.index_select(0, tokens).addmm_(left, right)


def add_to(total: Tensor, dim: int, tokens: slice | Tensor, part: Tensor) -> None:
    if isinstance(tokens, slice):
        (total[:, tokens] if dim else total[tokens]).add_(part)
    else:
        total.index_add_(dim, tokens, part.to(total.dtype))
