"""Which experts of a layer form a group, and the one expert that a group becomes: the arithmetic of `regrouping`.

Letters: E experts, r rank of one, n = r times the experts of a group, T tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """How one layer is grouped: the experts of each group, its dominant first; each choice's group `[N]`; the share."""

    groups: list[list[int]]
    of: Tensor
    share: float


def dominant_groups(usage: Tensor, likeness: Tensor, number: int) -> Groups:
    """The `number` most used are dominant; every other expert joins the dominant one that it is most like."""
    dominant = usage.argsort(descending=True, stable=True)[:number].sort().values
    of = likeness[:, dominant].argmax(1)
    of[dominant] = torch.arange(number)
    groups = [[int(d)] for d in dominant]
    for expert in range(len(usage)):
        if expert not in dominant.tolist():
            groups[int(of[expert])].append(expert)
    total = float(usage.sum())
    return Groups(groups, of, float(usage[dominant].sum()) / total if total else 1.0)


class Sums:
    """What merging one layer's groups needs; h holds the hidden values of a group's experts, n ranks in all.

    S `[n, n]` = sum w^2 h h', M `[n, n]` = sum w (g * h) h', by group; usage `[E]` = sum g.
    """

    def __init__(self) -> None:
        self.S: dict[int, Tensor] = {}
        self.M: dict[int, Tensor] = {}
        self.usage: Tensor = torch.zeros(())

    def add(self, experts: Any, x: Tensor, gates: Tensor, groups: list[list[int]]) -> None:
        A = experts.lora_A.to(x.dtype).expand(len(experts.lora_B), -1, -1)
        gates = gates.to(x.dtype)
        for number, group in enumerate(groups):
            hidden = x @ A[group].flatten(0, 1).T
            weighted = hidden * gates[:, group].repeat_interleave(experts.r, dim=1)
            shared = hidden * gates[:, group].sum(1, keepdim=True)
            self.S[number] = self.S.get(number, 0.0) + (shared.T @ shared).double()
            self.M[number] = self.M.get(number, 0.0) + (weighted.T @ shared).double()
        self.usage = self.usage.to(gates.device) + gates.sum(0).double()

    def add_slots(
        self, experts: Any, h: Tensor, weights: Tensor, index: Tensor | None, groups: list[list[int]]
    ) -> None:
        """As `add`, where each expert that a token has chosen reads hidden units of its own: `h [T, K, d_in]`."""
        A = experts.lora_A.to(h.dtype)
        if index is None:
            index = torch.arange(weights.shape[1], device=h.device).expand(len(h), -1)
        for number, group in enumerate(groups):
            its = index.unsqueeze(-1) == torch.tensor(group, device=h.device)  # [T, K, experts of the group]
            gates = weights.to(h.dtype).unsqueeze(-1) * its
            hidden = h @ A[group].flatten(0, 1).T
            shared = (hidden * gates.sum(-1, keepdim=True)).flatten(0, 1)
            weighted = (hidden * gates.repeat_interleave(experts.r, dim=-1)).flatten(0, 1)
            self.S[number] = self.S.get(number, 0.0) + (shared.T @ shared).double()
            self.M[number] = self.M.get(number, 0.0) + (weighted.T @ shared).double()


@torch.no_grad()
def merged_factors(experts: Any, groups: list[list[int]], sums: Sums, merge: str) -> dict[str, Tensor]:
    """The lora_A and lora_B of one linear after its groups have become an expert each; shared experts stay behind them."""
    n, one_A = experts.num_routed, len(experts.lora_A) == 1
    old_A, old_B = experts.lora_A.double(), experts.lora_B.double()
    new_A, new_B = [], []
    for number, group in enumerate(groups):
        shares = shares_of(sums.usage, group)
        if one_A or len(group) == 1:
            a, b = old_A[0 if one_A else group[0]], torch.einsum("e,erd->rd", shares, old_B[group])
        else:
            mean = torch.diag(shares.repeat_interleave(experts.r))
            Z = mean if merge == "usage" else least_squares(sums.S[number], sums.M[number], mean)
            a, b = cut(old_A[group].flatten(0, 1), old_B[group].flatten(0, 1), Z, sums.S[number], experts.r)
        new_A.append(a)
        new_B.append(b)
    A = old_A if one_A else torch.cat((torch.stack(new_A), old_A[n:]))
    return {"lora_A": A.to(experts.lora_A), "lora_B": torch.cat((torch.stack(new_B), old_B[n:])).to(experts.lora_B)}


def cosines(products: Tensor) -> Tensor:
    """Inner products `[E, E]` as cosines; 0 for what has no length."""
    norms = products.diagonal().clamp(min=1e-30).sqrt()
    return products / norms / norms.unsqueeze(1)


def shares_of(usage: Tensor, group: list[int]) -> Tensor:
    """Of the group's usage what each of its experts has; equal where no token came."""
    of_group = usage[group]
    total = of_group.sum()
    return of_group / total if total > 0 else torch.full_like(of_group, 1 / len(group))


def least_squares(S: Tensor, M: Tensor, mean: Tensor, ridge: float = 1e-4) -> Tensor:
    """`M S^-1`, drawn to the mean where the text says little."""
    weight = ridge * S.diagonal().mean().clamp(min=1e-12)
    damped = S + weight * torch.eye(len(S), dtype=S.dtype, device=S.device)
    return torch.linalg.solve(damped, M + weight * mean, left=False)


def cut(A: Tensor, B: Tensor, Z: Tensor, S: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The rank-r factors a `[r, d_in]`, b `[r, d_out]` whose `b' a x` is closest to `B' Z A x` where A x has moments S.

    Args:
        A, B: `[n, d_in]` and `[n, d_out]`, fp64.
        Z: `[n, n]`.
        S: `[n, n]`, of A x over the tokens that count.
    """
    values, vectors = torch.linalg.eigh(S)
    values = values.clamp(min=1e-6 * float(values.mean().clamp(min=1e-12)))  # the text may not span A x
    root, inverse_root = vectors * values.sqrt(), (vectors / values.sqrt()).T  # root @ root.T = S
    Q, R = torch.linalg.qr(B.T)
    U, sigma, Vh = torch.linalg.svd(R @ Z @ root, full_matrices=False)
    a, b = Vh[:r] @ inverse_root @ A, (Q @ U[:, :r] * sigma[:r]).T
    size = (b.norm(dim=1) / a.norm(dim=1).clamp(min=1e-30)).clamp(min=1e-30).sqrt().unsqueeze(1)
    a, b = a * size, b / size  # as large as each other, so that both can go on learning
    missing = r - len(a)
    return torch.cat((a, A[:missing])) if missing > 0 else a, torch.nn.functional.pad(b, (0, 0, 0, max(missing, 0)))


def output_products(experts: Any, x: Tensor) -> Tensor:
    """`sum_t <E_i(x_t), E_j(x_t)>` of the routed experts, `[E, E]`; no output is ever formed."""
    n = experts.num_routed
    A, B = experts.lora_A.to(x.dtype).expand(len(experts.lora_B), -1, -1)[:n], experts.lora_B[:n].to(x.dtype)
    hidden = torch.einsum("td,erd->ter", x, A)
    moments = torch.einsum("tir,tjs->irjs", hidden, hidden)
    return torch.einsum("irjs,ird,jsd->ij", moments, B, B)
