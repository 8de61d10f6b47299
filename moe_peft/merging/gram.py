"""The best linear map in place of a mixture, from sums over its input: export.md B, in the layer's whole input space.

A routed layer adds D(x) = B_cat (g(x) * A_cat x). Over the tokens of some text the linear map closest to it is

    W = E[D x'] G^-1 = B_cat (C G^-1),    G = E[x x'],    C = E[(g * A_cat x) x']

(RegMean, arXiv:2212.09849, generalised to soft gates). B_cat cancels from the normal equations, so the map has at most
the experts' total rank: a plain LoRA of that rank holds all of it. Directions that the text hardly visits are pulled
towards the usage mean diag(E[g]) A_cat by a ridge of alpha times the mean eigenvalue of G.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_peft.merge import Factors


class Gram:
    """`sum x x'` `[d, d]` in fp32, shared by all layers that read the same x; and how many tokens."""

    def __init__(self, d: int, device: torch.device) -> None:
        self.total = torch.zeros(d, d, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Tokens `x [T, d]` in fp32."""
        self.total.addmm_(x.T, x)
        self.tokens += len(x)

    def root(self, alpha: float) -> tuple[Tensor, float]:
        """The Cholesky factor L of `G + ridge I`, `[d, d]` in fp64, and the ridge: alpha times G's mean eigenvalue.

        The sum is used up: two matrices in fp64 are the most that is held.
        """
        G = self.total.double().div_(self.tokens)
        self.total = self.total.new_empty(0)
        mean = float(G.diagonal().mean())
        ridge = alpha * mean
        for jitter in (0.0, 1e-8, 1e-6, 1e-4):  # rounding of fp32 sums can leave G a little indefinite
            G.diagonal().add_(ridge if not jitter else jitter * mean)
            L, failed = torch.linalg.cholesky_ex(G)
            if not int(failed):
                return L, ridge
        raise ValueError(
            "The calibration text gives a layer inputs that are not finite: check the adapter and its base."
        )


class Cross:
    """`sum u x'` `[n, d]`, u being what stands before B_cat (or the output itself), and the sum of the gates `[n]`."""

    def __init__(self, n: int, d: int, device: torch.device) -> None:
        self.total = torch.zeros(n, d, device=device)
        self.gates = torch.zeros(n, dtype=torch.float64, device=device)

    def add(self, u: Tensor, x: Tensor) -> None:
        self.total.addmm_(u.T, x)


class Readout(NamedTuple):
    """`x -> B' M x`: M `[n, d]`, B `[n, d_out]`, in fp64."""

    M: Tensor
    B: Tensor


def least_squares(cross: Cross, tokens: int, prior: Tensor, L: Tensor, ridge: float) -> Tensor:
    """`M = (C + ridge P) (G + ridge I)^-1`, `[n, d]`, from `L L' = G + ridge I` and the prior P `[n, d]`."""
    C = cross.total.double().div_(tokens).add_(prior.double(), alpha=ridge)
    return torch.cholesky_solve(C.T, L).T


def truncated(readout: Readout, rank: int | None, L: Tensor | None = None) -> Factors:
    """The readout as two factors of at most `rank`, losing as little of its output as can be (reduced-rank regression).

    Args:
        rank: None keeps every direction of the readout.
        L: with `L L' = G`, so that the loss is that on the text; None weighs all inputs alike.
    """
    M, B = readout
    Q, R = torch.linalg.qr(B.double().T)  # [d_out, n]
    U, sigma, Vh = torch.linalg.svd(R @ M.double() @ L if L is not None else R @ M.double(), full_matrices=False)
    keep = min(rank or len(sigma), len(sigma))
    A = Vh[:keep]
    if L is not None:
        A = torch.linalg.solve_triangular(L, A, upper=False, left=False)  # A L = V', so that B A = (B V') L^-1
    # Both factors of about one size: distillation then moves them alike.
    size = sigma[:keep].sqrt()
    return balanced(Factors((size[:, None] * A).float(), (Q @ U[:, :keep] * size).float()))


def balanced(f: Factors) -> Factors:
    """The same product with row i of A as long as column i of B."""
    a, b = f.A.norm(dim=1).clamp(min=1e-20), f.B.norm(dim=0).clamp(min=1e-20)
    size = (b / a).sqrt()
    return Factors((f.A * size[:, None]).contiguous(), (f.B / size).contiguous())
