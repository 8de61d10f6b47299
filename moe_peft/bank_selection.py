"""Which LoRAs of a bank go together: good on the shots, and unlike each other (Rocket, arXiv:2408.15915).

First the M best by the sum of two ranks, by reasoning perplexity and by accuracy. Then, of all subsets of N of these, the
one with the highest rank score plus diversity, where diversity is the inverse of the mean pairwise cosine similarity of
the LoRAs' flattened weights. The paper does not say on which scale the two are added. Here both lie between 0 and 1: the
rank score is the mean over the subset, 1 for a LoRA that is first in both ranks and 0 for one that is last in both; the
inverse of a cosine below `SMALL` counts as that of `SMALL` (LoRAs trained from different seeds are nearly orthogonal, and
the inverse of noise would decide alone, of a negative one even backwards), and the most diverse subset has 1.
"""

import itertools
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from moe_peft.bank import WEIGHTS_FILE
from moe_peft.bank_scores import Score
from moe_peft.errors import refuse


SMALL = 0.05
"""Cosines below it are all alike."""

MOST_SUBSETS = 1_000_000


class Choice(NamedTuple):
    """What was chosen, and of what.

    Attributes:
        chosen: names, the best first.
        candidates: names of the M best by rank, the best first.
        ranks: name -> rank by perplexity and rank by accuracy, 1 for the best; equal values share their mean rank.
        cosines: `[M, M]`, of the candidates' flattened weights.
        rank_score, diversity: of the chosen, 0..1 each.
    """

    chosen: list[str]
    candidates: list[str]
    ranks: dict[str, tuple[float, float]]
    cosines: Tensor
    rank_score: float
    diversity: float


def mean_ranks(values: Sequence[float]) -> list[float]:
    """1 for the smallest; equal values share the mean of the ranks that they take up."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


def rank(scores: Sequence[Score]) -> dict[str, tuple[float, float]]:
    """name -> rank by perplexity and rank by accuracy, the LoRA with the smallest sum first.

    Where sums are equal the lower perplexity comes first, then the name.
    """
    pairs = zip(mean_ranks([s.perplexity for s in scores]), mean_ranks([-s.accuracy for s in scores]), strict=True)
    found = dict(zip([s.name for s in scores], pairs, strict=True))
    order = sorted(scores, key=lambda s: (sum(found[s.name]), s.perplexity, s.name))
    return {s.name: found[s.name] for s in order}


def cosine_similarity(first: Path, second: Path) -> float:
    """The definition: of two LoRAs' weights, every A and B flattened and put one behind the other.

    Where ranks differ the missing rows of A and columns of B count as zeros, as do the weights of a layer that only one
    of them has. The factors are taken as they are saved, without the LoRAs' scales.

    Args:
        first, second: folders of plain LoRAs.

    Returns:
        -1..1; 0 where one of them is all zeros.
    """
    with safe_open(first / WEIGHTS_FILE, "pt") as a, safe_open(second / WEIGHTS_FILE, "pt") as b:
        names = sorted({*a.keys(), *b.keys()})
        parts = []
        for name in names:
            pair = [file.get_tensor(name).double() if name in file.keys() else torch.zeros(1, 1) for file in (a, b)]  # noqa: SIM118
            rows, columns = (max(one.shape[axis] for one in pair) for axis in (0, 1))
            grown = [torch.zeros(rows, columns, dtype=torch.float64) for _ in pair]
            for big, one in zip(grown, pair, strict=True):
                big[: one.shape[0], : one.shape[1]] = one
            parts.append(torch.stack(grown).flatten(1))
    x, y = torch.cat(parts, dim=1)
    norms = float(x.norm() * y.norm())
    return float(x @ y) / norms if norms else 0.0


@torch.no_grad()
def cosine_similarities(folders: Sequence[Path]) -> Tensor:
    """`cosine_similarity` of all pairs, `[M, M]` in fp64. Each file is read once, and of all of them one tensor at a time."""
    products = torch.zeros(len(folders), len(folders), dtype=torch.float64)
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(folder / WEIGHTS_FILE, "pt")) for folder in folders]
        has = [set(file.keys()) for file in files]
        for name in sorted(set().union(*has)):
            who = [i for i, names in enumerate(has) if name in names]
            parts = [files[i].get_tensor(name) for i in who]
            for (m, i), (n, j) in itertools.combinations_with_replacement(enumerate(who), 2):
                products[i, j] += _overlap(parts[m], parts[n])
    products = products + products.triu(1).T
    norms = products.diagonal().sqrt()
    return torch.where(products == 0, products, products / norms.outer(norms).clamp_min(torch.finfo(norms.dtype).tiny))


def _overlap(first: Tensor, second: Tensor) -> float:
    """The inner product, where the smaller is filled up with zeros."""
    rows, columns = (min(first.shape[axis], second.shape[axis]) for axis in (0, 1))
    return float((first[:rows, :columns].double() * second[:rows, :columns].double()).sum())


def inverse_similarity(cosines: Tensor, subset: Sequence[int]) -> float:
    """1 / the mean cosine of the pairs in the subset, not below `SMALL`; of one LoRA alone, as of orthogonal ones."""
    pairs = [float(cosines[i, j]) for i, j in itertools.combinations(subset, 2)]
    return 1 / max(sum(pairs) / len(pairs), SMALL) if pairs else 1 / SMALL


def choose(
    scores: Sequence[Score], folders: dict[str, Path], number: int = 4, candidates: int = 8, use_diversity: bool = True
) -> Choice:
    """The best subset, by trying all.

    Args:
        scores: of every LoRA.
        folders: name -> folder.
        number: N, how many to choose.
        candidates: M, of how many by rank; fewer if there are no more.
        use_diversity: False chooses by rank alone.

    Raises:
        ValueError: fewer LoRAs than `number`, or more subsets than can be tried.
    """
    if not 1 <= number <= len(scores):
        raise refuse(
            "select",
            number,
            f"a whole number from 1 to {len(scores)}, as many LoRAs as can be used",
            "Ask for fewer, or add some.",
        )
    if candidates < number:
        raise refuse("candidates", candidates, f"at least `select` = {number}", "The paper chooses 4 of the best 8.")
    ranks = rank(scores)
    best = list(ranks)[:candidates]
    if math.comb(len(best), number) > MOST_SUBSETS:
        raise refuse(
            "candidates",
            candidates,
            f"so few that they have at most {MOST_SUBSETS:,} subsets of {number}",
            "All of them are tried. The paper takes 8.",
        )
    worst = max(len(scores) - 1, 1)
    score = [1 - (sum(ranks[name]) - 2) / (2 * worst) for name in best]
    cosines = cosine_similarities([folders[name] for name in best])
    subsets = list(itertools.combinations(range(len(best)), number))
    diversities = [inverse_similarity(cosines, subset) for subset in subsets]
    most = max(diversities)

    def value(found: tuple[tuple[int, ...], float]) -> float:
        return sum(score[i] for i in found[0]) / number + (found[1] / most if use_diversity else 0)

    subset, diversity = max(zip(subsets, diversities, strict=True), key=value)
    mean = sum(score[i] for i in subset) / number
    return Choice([best[i] for i in subset], best, ranks, cosines, mean, diversity / most)
