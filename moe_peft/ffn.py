"""A mixture of whole feed-forward blocks (MixLoRA, arXiv:2404.15159): the part between the frozen linears.

Every expert is the frozen block with its own LoRA on each of the block's linears:

    G_e = Wg x + s Bg_e Ag_e x        U_e = Wu x + s Bu_e Au_e x        h_e = act(G_e) * U_e
    y = sum_e g_e (Wd h_e + s Bd_e Ad_e h_e)

What the experts share is computed once. G0 = Wg x and U0 = Wu x do not depend on e, and Wd is linear, so that

    y = Wd S + s * Bd_cat z        with  S = sum_e g_e h_e  and  z_e = Ad_e (g_e h_e)

The caller calls the frozen linears as they are, before and after. `mixed_hidden` is what lies between: (G0, U0) -> (S, z).
`out_product` adds the last term. The same sum as a loop over whole experts is `moe_peft.ffn_naive`.

Letters: T tokens, E experts, K slots per token, r rank of one expert, n = E * r, f width of the block's inside, m tokens
of one piece. Factors are stored as in `moe_peft.experts`: `[E, r, width]`; rank-space tensors are `[n, T]`.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moe_peft.ffn_block import FfnBlock, block_backward, halves
from moe_peft.ffn_pieces import Piece, Plan, add_to, chosen, pieces, raised, ranks_of, sorted_tokens, taken


Schedule = Literal["auto", "static", "sorted"]


def _shares(weights: Tensor) -> Tensor:
    """`[T, K]`: each weight by the sum of those up to it. Then `S + share * (h - S)` keeps S the mean of the h so far.

    This is the sum `g_1 h_1 + ... + g_K h_K` for weights that sum to 1, and bit for bit h where all h are equal.
    """
    return (weights / weights.cumsum(dim=1)).nan_to_num(0.0)


class _MixedHidden(Function):
    """(G0, U0, ...) -> (S, z). Saves what it was given and nothing of width f besides; backward computes h_e anew."""

    @staticmethod
    def forward(
        ctx: Any,
        block: FfnBlock,
        plan: Plan,
        normalised: bool,
        weights: Tensor,
        index: Tensor | None,
        kept: Tensor | None,
        lora_A_out: Tensor,
        *per_linear: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weights, index, kept, lora_A_out, *per_linear)
        ctx.block, ctx.plan = block, plan
        base, hidden, lora_B = _by_linear(per_linear)
        num_experts, r, width = lora_A_out.shape
        S = base[0].new_zeros(base[0].shape[0], width)
        z = lora_A_out.new_zeros(num_experts * r, S.shape[0])
        A = lora_A_out.to(S.dtype).flatten(0, 1)
        shares = (_shares(weights) if normalised else weights).to(S.dtype)
        with torch.autocast(S.device.type, enabled=False):
            for piece in pieces(plan, index, weights, num_experts, r):
                ranks = [ranks_of(rank, piece) for rank in hidden]
                wide = _lifted(base, ranks, lora_B, piece)
                gate, up = halves(block, wide)
                h = block.act(gate) if up is None else block.act(gate).mul_(up)
                seen = h if kept is None else h * taken(kept, piece.tokens)
                part = chosen(A[piece.rows] @ seen.T, piece).to(z.dtype)
                add_to(z[piece.rows], 1, piece.tokens, part * taken(weights[:, piece.slot], piece.tokens).to(z.dtype))
                if normalised and piece.slot:
                    h = h.sub_(taken(S, piece.tokens))
                if piece.slot or not normalised:  # the first share of a mean is 1
                    h = h.mul_(taken(shares[:, piece.slot], piece.tokens).unsqueeze(1))
                add_to(S, 0, piece.tokens, h)
        return S, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weights, index, kept, lora_A_out, *per_linear = ctx.saved_tensors
        base, hidden, lora_B = _by_linear(per_linear)
        num_experts, r, _ = lora_A_out.shape
        A = lora_A_out.to(base[0].dtype).flatten(0, 1)
        grad_S, grad_z = (grad.to(A.dtype) for grad in grads)
        out = _Gradients.zeros(weights, A, base, hidden, lora_B, any(ctx.needs_input_grad[7 : 7 + len(base)]))
        with torch.autocast(A.device.type, enabled=False):
            for piece in pieces(ctx.plan, index, weights, num_experts, r):
                weight = taken(weights[:, piece.slot], piece.tokens).to(A.dtype)
                ranks = [ranks_of(rank, piece) for rank in hidden]
                wide = _lifted(base, ranks, lora_B, piece)
                mask = None if kept is None else taken(kept, piece.tokens)
                grad_wide = _piece_backward(ctx.block, piece, wide, A, weight, grad_S, grad_z, mask, out)
                out.add(piece, ranks, lora_B, grad_wide)
                del wide, grad_wide  # or they would still be there beside those of the next piece
        return None, None, None, out.weights, None, None, *out.finished(lora_A_out, per_linear)


def _piece_backward(
    block: FfnBlock,
    piece: Piece,
    wide: list[Tensor],
    A: Tensor,
    weight: Tensor,
    grad_S: Tensor,
    grad_z: Tensor,
    mask: Tensor | None,
    out: "_Gradients",
) -> tuple[Tensor, ...]:
    """The gradients of a piece's G_e and U_e, which it may overwrite; those of its weights and of A go to `out`."""
    gate, up = halves(block, wide)
    act = block.act(gate)
    h = act if up is None else act * up
    rank_z = ranks_of(grad_z, piece)
    out.A[piece.rows].add_((rank_z * weight) @ (h if mask is None else h * mask))
    if mask is None:
        grad_mixed = raised(grad_S, piece.tokens, rank_z.T, A[piece.rows])  # of g_e h_e
    else:
        grad_mixed = (rank_z.T @ A[piece.rows]).mul_(mask).add_(taken(grad_S, piece.tokens))
    h = h * grad_mixed if up is None else h.mul_(grad_mixed)
    add_to(out.weights[:, piece.slot], 0, piece.tokens, h.sum(1, dtype=out.weights.dtype))
    del h
    return block_backward(block, grad_mixed.mul_(weight.unsqueeze(1)), gate, up, act)


class _Gradients(NamedTuple):
    """The gradients while they are summed over the pieces, those of factors in fp32 at least."""

    weights: Tensor
    A: Tensor
    base: list[Tensor] | None
    hidden: list[Tensor]
    lora_B: list[Tensor]

    @classmethod
    def zeros(
        cls,
        weights: Tensor,
        A: Tensor,
        base: Sequence[Tensor],
        hidden: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        of_base: bool,
    ) -> "_Gradients":
        def sums(t: Tensor) -> Tensor:
            return torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32))

        return cls(
            torch.zeros_like(weights),
            sums(A),
            [torch.zeros_like(t) for t in base] if of_base else None,
            [torch.zeros_like(t) for t in hidden],
            [sums(t) for t in lora_B],
        )

    def add(self, piece: Piece, ranks: list[Tensor], lora_B: list[Tensor], grad_wide: Sequence[Tensor]) -> None:
        """What one piece adds, given the gradients of its `G_e`, `U_e`."""
        for i, grad in enumerate(grad_wide):
            self.lora_B[i][piece.rows].add_(ranks[i] @ grad)
            add_to(self.hidden[i][piece.rows], 1, piece.tokens, chosen(lora_B[i][piece.rows] @ grad.T, piece))
            if self.base is not None:
                add_to(self.base[i], 0, piece.tokens, grad)

    def finished(self, lora_A_out: Tensor, per_linear: Sequence[Tensor]) -> list[Tensor | None]:
        """In the order and dtypes of the inputs `(lora_A_out, *base, *hidden, *lora_B)`."""
        count = len(self.hidden)
        base = self.base or [None] * count
        hidden = [t.to(of.dtype) for t, of in zip(self.hidden, per_linear[count:], strict=False)]
        lora_B = [t.to(of.dtype).view_as(of) for t, of in zip(self.lora_B, per_linear[2 * count :], strict=True)]
        return [self.A.to(lora_A_out.dtype).view_as(lora_A_out), *base, *hidden, *lora_B]


def _lifted(base: Sequence[Tensor], ranks: Sequence[Tensor], lora_B: Sequence[Tensor], piece: Piece) -> list[Tensor]:
    """What the linears give a piece with its experts' LoRA: G_e, U_e."""
    return [
        raised(wide, piece.tokens, rank.T, B[piece.rows]) for wide, rank, B in zip(base, ranks, lora_B, strict=True)
    ]


def _by_linear(per_linear: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[Tensor], list[Tensor]]:
    """The frozen outputs, the rank-space tensors and the stacked B `[n, width]`, all in the dtype of the first."""
    count = len(per_linear) // 3
    base = per_linear[:count]
    hidden = [t.to(base[0].dtype) for t in per_linear[count : 2 * count]]
    return base, hidden, [t.to(base[0].dtype).flatten(0, 1) for t in per_linear[2 * count :]]


def mixed_hidden(
    base: tuple[Tensor, ...],
    hidden: tuple[Tensor, ...],
    lora_B: tuple[Tensor, ...],
    lora_A_out: Tensor,
    weights: Tensor,
    index: Tensor | None,
    block: FfnBlock,
    scale: float,
    *,
    normalised: bool,
    schedule: Schedule = "auto",
    chunk: int = 512,
    kept: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`S = sum_e g_e h_e`, the input of the frozen linear out, and `z_e = Ad_e (g_e h_e)`, that of its LoRA factors B.

    The caller's frozen linear out adds its bias once, the mixture `sum_e g_e` times: where weights do not sum to 1, the
    caller adds `(sum_e g_e - 1) * bias`.

    Wide arithmetic is in the dtype of `base`, also where the adapter is in fp32: what is added to a rounded G0 gains
    nothing from more digits. Gradients of factors are summed in fp32 at least. Autocast has no effect.

    Args:
        base: what the frozen linears in gave: `[T, f]` each of gate and up, or one `[T, f]` ("mlp"), or one `[T, 2f]`
            ("fused_glu").
        hidden: for each of them `A_cat x`, `[n, T]`.
        lora_B: for each of them `[E, r, width]`.
        lora_A_out: `[E, r, f]`.
        weights: `[T, K]`, at least fp32.
        index: `[T, K]` int64, no expert twice in a row, or None for every expert in order (K == E). A value >= E is a
            slot without expert: the frozen block alone, which has no part in z.
        block: what is between the linears.
        scale: the LoRA scale.
        normalised: promises that each token's weights sum to 1. S is then a running mean, so that with B == 0 it is
            bit for bit what the frozen block computes, if `act` gives equal values for equal arguments (torch's fp32
            kernels for CPUs may not, at widths that no vector divides). Gradients are those of the sum in either case.
        schedule: "static" has fixed shapes and never waits for the device: each slot multiplies rank matrices that are
            zero outside the chosen expert. "sorted" groups tokens by expert after one wait and does active work only.
            "auto" is "sorted" on CPUs, outside `torch.compile`.
        chunk: tokens that are worked on at a time; bounds the wide temporaries. All at once under `torch.compile`.
        kept: `[T, f]` bool, False where dropout hides a hidden unit from A; the frozen linear sees S whole. One mask for
            all slots of a token.
        dropout: the share that `kept` hides, at least 0 and below 1.

    Returns:
        S `[T, f]` in the dtype of `base`, z `[n, T]` in that of `lora_A_out`.

    Raises:
        ValueError: the number of linears is not that of the block's kind, `weights` has not a column per expert where
            `index` is None, `schedule` is unknown, or `chunk` < 1.
    """
    num_experts = lora_A_out.shape[0]
    linears = 2 if block.kind == "glu" else 1
    if not len(base) == len(hidden) == len(lora_B) == linears:
        raise ValueError(
            f'A "{block.kind}" block has {linears} linear(s) in, but `base`, `hidden` and `lora_B` have '
            f"{len(base)}, {len(hidden)} and {len(lora_B)}."
        )
    if index is None and weights.shape[1] != num_experts:
        raise ValueError(f"Without `index`, `weights` needs {num_experts} columns, not {weights.shape[1]}.")
    if schedule not in ("auto", "static", "sorted") or chunk < 1:
        raise ValueError(f'`schedule` is "{schedule}" and `chunk` {chunk}; see the docstring for what they may be.')
    compiling = torch.compiler.is_compiling()
    if schedule == "auto":
        schedule = "sorted" if weights.device.type == "cpu" and not compiling and num_experts > 1 else "static"
    plan = Plan(0 if compiling else chunk, None)
    if schedule == "sorted" and index is not None:
        index, counts = sorted_tokens(index, num_experts)
        plan = Plan(chunk, counts)
    if kept is not None:
        lora_A_out = lora_A_out / (1 - dropout)
    scaled = [rank * scale for rank in hidden]  # not inside: there `torch.compile` takes no number that may change
    return cast(Any, _MixedHidden).apply(
        block, plan, normalised, weights, index, kept, lora_A_out, *base, *scaled, *lora_B
    )


class _OutProduct(Function):
    """`y + z^T B_cat`. Saves z and B."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, lora_B: Tensor) -> Tensor:
        ctx.save_for_backward(z, lora_B)
        with torch.autocast(y.device.type, enabled=False):
            return torch.addmm(y, z.T.to(y.dtype), lora_B.flatten(0, 1).to(y.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        z, lora_B = ctx.saved_tensors
        (grad_y,) = grads
        with torch.autocast(grad_y.device.type, enabled=False):
            grad_z = (lora_B.flatten(0, 1).to(grad_y.dtype) @ grad_y.T).to(z.dtype)
            grad_B = (z.to(grad_y.dtype) @ grad_y).to(lora_B.dtype).view_as(lora_B)
        return grad_y if ctx.needs_input_grad[0] else None, grad_z, grad_B


def out_product(y: Tensor, z: Tensor, lora_B_out: Tensor, scale: float) -> Tensor:
    """`y + scale * sum_e z_e^T Bd_e`, out of place, computed in the dtype of y.

    Args:
        y: `[T, d_out]`, what the frozen linear out made of S.
        z: `[n, T]` from `mixed_hidden`.
        lora_B_out: `[E, r, d_out]`.
        scale: the LoRA scale.

    Returns:
        `[T, d_out]` in the dtype of y.
    """
    return cast(Any, _OutProduct).apply(y, z * scale, lora_B_out)
