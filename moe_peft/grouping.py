"""Sums of gradients by cell of a linear's inputs, and what groups of cells would gain from changes of their own.

With x a token's input, g the loss gradient at its output, and sums over the tokens of a group:

    G = sum g x^T,   L = sum |x|^2 g g^T,   R = sum |g|^2 x x^T,   t = tr L = tr R
    gain of rank r = 1/2 sum over i <= r of sigma_i(M)^2,   M = sqrt(t) L^-1/2 G R^-1/2

L (x) R / t is the Kronecker product that approximates the empirical Fisher matrix, sum (g x^T)(g x^T)^T, after one power
iteration (arXiv:2406.17748). With it as curvature the gain is how far the best change of rank r lowers the loss to second
order, in nats: 1/2 for each token in agreement with the others, whatever the scale of its gradient, and 0 for tokens
that pull in opposite ways. All sums add up over cells, so every grouping is evaluated without reading text again.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


DAMPING = 1.0
"""Added to the eigenvalues of L and R, as a share of their mean. With much less, groups of few tokens of unequal scale seem
to gain more than the 1/2 nat that a token has to give."""


class Sums(NamedTuple):
    """The sums of one linear by cell or group, n of them; k_out and k_in are its sketched widths.

    Attributes:
        G: `[2, n, k_out, k_in]`, by half of the text.
        L: `[n, k_out, k_out]`, of all text.
        R: `[n, k_in, k_in]`.
        counts: `[2, n]` tokens.
    """

    G: Tensor
    L: Tensor
    R: Tensor
    counts: Tensor

    def grouped(self, groups: Tensor) -> "Sums":
        """Joined as `groups [m, n]` of 0 and 1 says."""
        G = torch.einsum("mn,hnoi->hmoi", groups, self.G)
        L, R = (torch.einsum("mn,nij->mij", groups, C) for C in (self.L, self.R))
        return Sums(G, L, R, self.counts @ groups.T)

    def whole(self, half: int) -> Tensor:
        """`[n, k_out, k_in]`: the sums of a half, scaled up to the tokens of both."""
        scale = self.counts.sum(0) / self.counts[half].clamp(min=1)
        return self.G[half] * scale[:, None, None]


def fitted_gain(sums: Sums, half: int) -> Tensor:
    """`[n]` gain of any rank, on the half that it is fitted to: 1/2 t tr(L^-1 G R^-1 G^T)."""
    G = sums.whole(half)
    right = torch.linalg.solve(_damped(sums.R), G.mT).mT
    return 0.5 * _trace(sums.L) * (torch.linalg.solve(_damped(sums.L), G) * right).sum((-2, -1))


def held_out_gain(sums: Sums, half: int) -> Tensor:
    """`[n, min(k_out, k_in)]` gain of rank 1, 2, ...: singular vectors of a half, met by the M of the other half.

    Without agreement between the halves it is 0 on average, however many groups there are; of one sample it may fall.
    """
    left, right = _inverse_root(sums.L), _inverse_root(sums.R)
    here, there = (left @ sums.whole(h) @ right for h in (half, 1 - half))
    U, sigma, Vh = torch.linalg.svd(here, full_matrices=False)
    met = sigma * torch.einsum("nok,noi,nki->nk", U, there, Vh)
    return 0.5 * _trace(sums.L)[:, None] * met.cumsum(1)


def join(parts: Sequence[Sums], half: int, most: int) -> list[Tensor]:
    """Join cells into groups, always the two whose joining gives up least of the fitted gain, as Ward does.

    Args:
        parts: the sums by cell of each linear that the groups are for.

    Returns:
        For 1..`most` groups, the memberships `[groups, cells]` of 0 and 1.
    """
    cells = parts[0].counts.shape[1]
    groups = list(torch.eye(cells, dtype=parts[0].G.dtype))
    alone = _fitted(parts, torch.stack(groups), half).tolist()
    lost: dict[tuple[int, int], float] = {}  # by number of group; numbers are not used again
    new, live, found = range(cells), list(range(cells)), {}
    while True:
        pairs = [(a, b) for b in new for a in live if a < b]
        if pairs:
            together = _fitted(parts, torch.stack([groups[a] + groups[b] for a, b in pairs]), half).tolist()
            lost.update({(a, b): alone[a] + alone[b] - t for (a, b), t in zip(pairs, together, strict=True)})
        if len(live) <= most:
            found[len(live)] = torch.stack([groups[i] for i in live])
        if len(live) == 1:
            return [found[min(n, cells)] for n in range(1, most + 1)]
        a, b = min(lost, key=lambda pair: lost[pair])
        groups.append(groups[a] + groups[b])
        alone.append(alone[a] + alone[b] - lost[a, b])
        live = [i for i in live if i not in (a, b)] + [len(groups) - 1]
        new = [len(groups) - 1]
        lost = {pair: value for pair, value in lost.items() if not {a, b} & set(pair)}


def gain_table(parts: Sequence[Sums], most: int) -> Tensor:
    """`[most, ranks]` held-out gain of 1..`most` groups and of rank 1, 2, ..., summed over linears, in nats."""
    ranks = max(min(sums.G.shape[-2:]) for sums in parts)
    table = torch.zeros(most, ranks, dtype=parts[0].G.dtype)
    for half in (0, 1):
        for n, groups in enumerate(join(parts, half, most)):
            for sums in parts:
                gain = 0.5 * held_out_gain(sums.grouped(groups), half).sum(0)
                table[n] += torch.cat((gain, gain[-1:].expand(ranks - len(gain))))
    return table


def _fitted(parts: Sequence[Sums], groups: Tensor, half: int) -> Tensor:
    return torch.stack([fitted_gain(sums.grouped(groups), half) for sums in parts]).sum(0)


def _trace(C: Tensor) -> Tensor:
    return C.diagonal(dim1=-2, dim2=-1).sum(-1)


def _damped(C: Tensor) -> Tensor:
    ridge = DAMPING * _trace(C) / C.shape[-1] + 1e-30  # a cell may be empty
    return C + ridge[:, None, None] * torch.eye(C.shape[-1], dtype=C.dtype)


def _inverse_root(C: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(_damped(C))
    return (vectors / values.clamp(min=1e-30).sqrt()[:, None, :]) @ vectors.mT
