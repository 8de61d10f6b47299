"""Several plain LoRAs of one backbone as one plain LoRA, merged as the products that they are.

With W_i = B_i A_i the change that LoRA i makes, its scale included, and w_i its weight:

    "cat"         sum w_i W_i, exactly: the factors stand side by side, and the rank is the sum of the ranks
    "linear"      the same sum, cut to the wanted rank by its singular value decomposition
    "ties"        TIES (arXiv:2306.01708) on the W_i: of each the share `density` of largest entries, a sign elected for each
                  entry, the mean of those that agree; then cut to the wanted rank
    "knots_ties"  KnOTS (arXiv:2410.19735): [W_1 .. W_n] = U S [V_1 .. V_n], TIES on the S V_i, put back as U (..)

TIES itself is PEFT's (`peft.utils.merge_utils.ties`). PEFT's `add_weighted_adapter` is not used: "linear" and "ties" there
work on A and B apart, though only their products mean anything, and rank-stabilised scales come out too large.

"knots_ties" never forms a W: with B_cat = Q R and A_i' = Q_i R_i the decomposition is that of R blockdiag(R_i'), whose
sides are as long as all ranks together. "ties" forms the W of one layer at a time.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftConfig
from peft.utils.merge_utils import ties
from torch import Tensor

from moe_peft.errors import nearest, refuse
from moe_peft.merge import Factors, save_static
from moe_peft.plain_loras import Pair, PlainLora, fitted, read_lora


LORA_METHODS = ("ties", "knots_ties", "linear", "cat")
DENSITY = {"ties": 0.2, "knots_ties": 1.0}
"""What each method keeps where nothing is said: TIES's 20 %, and KnOTS's released configuration, which keeps all."""

SMALLEST = 1e-5
"""Singular values below this are left out of KnOTS's basis, as in its release."""

RECORD_FILE = "moe_peft_merge.json"


class MergedLoras(NamedTuple):
    """What `merge_loras` did.

    Attributes:
        names: of the LoRAs, in order.
        weights: theirs.
        ranks: module name -> rank of the result.
        errors: module name -> relative error (Frobenius) of the cut to that rank; 0 where nothing was cut.
        likeness: name -> cosine of the result and that LoRA's whole change, over all layers: 1 is the same direction.
    """

    names: list[str]
    weights: list[float]
    ranks: dict[str, int]
    errors: dict[str, float]
    likeness: dict[str, float]


def merge_loras(
    loras: Mapping[str, str | Path] | Sequence[str | Path],
    output: str | Path,
    method: str = "ties",
    weights: Mapping[str, float] | Sequence[float] | None = None,
    density: float | None = None,
    rank: int | None = None,
    check_base: bool = True,
) -> MergedLoras:
    """Merge plain LoRAs that were trained apart, and write the result as a plain PEFT LoRA. No backbone is needed.

    A LoRA that has no factors for a module adds nothing there. All scales are in the factors written, whose own is 1.

    Args:
        loras: folders or Hub ids of two or more, by name or in order.
        output: a new or empty folder.
        method: see the module.
        weights: one for each LoRA, by name or in order. Defaults to 1 / n for "linear" and "cat", and to 1 for the others,
            which take a mean themselves.
        density: above 0, at most 1; for "ties" (default 0.2) and "knots_ties" (default 1.0).
        rank: of the result; by default the sum of the ranks for "cat" and "knots_ties", which is exact, and the largest rank
            for "linear" and "ties". Truncation is by the singular values of the merged change.
        check_base: refuse LoRAs whose configs name different base models. Names are compared without the path.

    Raises:
        ValueError: wrong arguments; a folder in use; LoRAs that cannot be merged (other base, other widths, DoRA, biases,
            further weights), everything about them in one message. Nothing is written then.
    """
    names, sources = _named(loras)
    _check(method, density, rank)
    given = _weights(weights, names, method)
    output = Path(output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise refuse("output", str(output), "a new or empty folder", "Nothing is overwritten: name another folder.")
    read = [read_lora(source) for source in sources]
    _check_fit(read, check_base)
    density = DENSITY.get(method) if density is None else density
    factors, errors = {}, {}
    for module in dict.fromkeys(module for lora in read for module in lora.pairs):
        pairs = [lora.pairs.get(module) for lora in read]
        merged, errors[module] = merged_pair(pairs, given, method, density, rank)
        factors[module] = Factors(merged.A.float(), merged.B.T.float().contiguous())
    ranks = {module: len(f.A) for module, f in factors.items()}
    likeness = {name: _cosine(lora, factors) for name, lora in zip(names, read, strict=True)}
    found = MergedLoras(names, given, ranks, errors, likeness)
    told = dict(zip(names, map(str, sources), strict=True))
    record = {"loras": told, "method": method, "density": density, **found._asdict()}
    base = next((lora.base for lora in read if lora.base), None)
    also = {RECORD_FILE: json.dumps(record, indent=1)}
    save_static(factors, output, base, also, PeftConfig.from_pretrained(str(sources[0])).task_type)
    return found


def merged_pair(
    pairs: Sequence[Pair | None], weights: Sequence[float], method: str, density: float | None, rank: int | None
) -> tuple[Pair, float]:
    """One layer's merged factors, and the relative error of cutting them; None is a LoRA without this layer."""
    there = [Pair(pair.A.double(), pair.B.double()) for pair in pairs if pair is not None]
    own = [weight for weight, pair in zip(weights, pairs, strict=True) if pair is not None]
    if method == "ties":
        dense = _ties([pair.B.T @ pair.A for pair in there], own, density or 1.0)
        whole = Pair(*_split(dense))
    elif method == "knots_ties":
        whole = _knots(there, own, density or 1.0)
    else:
        whole = Pair(
            torch.cat([pair.A for pair in there]),
            torch.cat([weight * pair.B for weight, pair in zip(own, there, strict=True)]),
        )
    if rank is None and method in ("ties", "linear"):
        rank = max(len(pair.A) for pair in there)
    return fitted(whole, rank or len(whole.A))


def _ties(deltas: list[Tensor], weights: list[float], density: float) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density .* no pruning")  # it is what was asked for
        return ties(deltas, torch.tensor(weights, dtype=deltas[0].dtype), density)


def _split(delta: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of a dense change `[d_out, d_in]`, of full rank."""
    return (delta, torch.eye(len(delta), dtype=delta.dtype)) if len(delta) <= delta.shape[1] else (
        torch.eye(delta.shape[1], dtype=delta.dtype), delta.T.contiguous())  # fmt: skip


def knots_parts(pairs: Sequence[Pair]) -> tuple[Tensor, list[Tensor]]:
    """U `[d_out, k]` and each LoRA's S V_i `[k, d_in]`, with `W_i = U (S V_i)`, without forming a W."""
    Q, R = torch.linalg.qr(torch.cat([pair.B for pair in pairs]).T)  # B_cat [d_out, n]
    sides = [torch.linalg.qr(pair.A.T) for pair in pairs]  # A_i' = Q_i R_i
    core = R @ torch.block_diag(*[right.T for _, right in sides])
    U, sigma, Vh = torch.linalg.svd(core, full_matrices=False)
    keep = sigma > SMALLEST
    parts = (sigma[keep, None] * Vh[keep]).split([side.shape[1] for side, _ in sides], dim=1)
    return Q @ U[:, keep], [part @ side.T for part, (side, _) in zip(parts, sides, strict=True)]


def _knots(pairs: Sequence[Pair], weights: list[float], density: float) -> Pair:
    U, parts = knots_parts(pairs)
    if not U.shape[1]:  # LoRAs that do nothing here
        return Pair(pairs[0].A, torch.zeros_like(pairs[0].B))
    return Pair(_ties(parts, weights, density), U.T.contiguous())


def _cosine(lora: PlainLora, factors: dict[str, Factors]) -> float:
    """Of two changes of a whole model, by their factors."""
    product = square = other = 0.0
    for module, merged in factors.items():
        other += float(((merged.B.T @ merged.B) * (merged.A @ merged.A.T)).sum())
        if module in lora.pairs:
            A, B = (factor.to(merged.A.dtype) for factor in lora.pairs[module])
            product += float(((B @ merged.B) * (A @ merged.A.T)).sum())
            square += float(((B @ B.T) * (A @ A.T)).sum())
    return max(-1.0, min(1.0, product / math.sqrt(square * other))) if square > 0 and other > 0 else 0.0


def _named(loras: Mapping[str, str | Path] | Sequence[str | Path]) -> tuple[list[str], list[str | Path]]:
    if isinstance(loras, (str, Path)) or len(loras) < 2:
        raise refuse("loras", loras, "two or more LoRAs, in a list or by name", "One alone has nothing to merge with.")
    if isinstance(loras, Mapping):
        return list(loras), list(loras.values())
    names = [Path(str(source)).name for source in loras]
    if len(set(names)) < len(names):
        names = [f"{number}: {source}" for number, source in enumerate(loras, 1)]
    return names, list(loras)


def _check(method: str, density: float | None, rank: int | None) -> None:
    if method not in LORA_METHODS:
        allowed = "one of " + ", ".join(map(repr, LORA_METHODS))
        raise refuse("method", method, allowed, nearest(str(method), LORA_METHODS))
    if density is not None and method not in DENSITY:
        raise refuse("density", density, f"left out with `method` = {method!r}", "Only TIES leaves entries out.")
    good = isinstance(density, (int, float)) and not isinstance(density, bool) and 0 < density <= 1
    if density is not None and not good:
        raise refuse("density", density, "above 0 and at most 1", "TIES keeps 0.2, KnOTS 1.0.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise refuse("rank", rank, "a whole number of at least 1, or None", "None cuts no more than it must.")


def _weights(weights: Mapping[str, float] | Sequence[float] | None, names: list[str], method: str) -> list[float]:
    if weights is None:
        return [1.0 if method in DENSITY else 1 / len(names)] * len(names)
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise refuse("weights", dict(weights), f"given for each of {', '.join(names)}, and no other", "Name all.")
        weights = [weights[name] for name in names]
    numbers = list(weights)
    if len(numbers) != len(names):
        raise refuse("weights", numbers, f"{len(names)} numbers, one for each LoRA", "Give them in the same order.")
    if any(isinstance(w, bool) or not isinstance(w, (int, float)) or not math.isfinite(w) for w in numbers):
        raise refuse("weights", numbers, "finite numbers", "1 / n each is their mean.")
    return [float(w) for w in numbers]


def _check_fit(loras: list[PlainLora], check_base: bool) -> None:
    """Everything that stands against merging them, at once."""
    problems = [f"{lora.name}: {problem}" for lora in loras for problem in lora.problems]
    problems += [f"{lora.name}: it has no factors at all" for lora in loras if not lora.pairs and not lora.problems]
    bases = {Path(lora.base).name: lora for lora in reversed(loras) if lora.base}
    if check_base and len(bases) > 1:
        first = next(lora for lora in loras if lora.base)
        problems += [
            f"{lora.name}: it was trained on {lora.base}, and {first.name} on {first.base} (`check_base=False` if they are "
            "the same)"
            for lora in loras
            if lora.base and Path(lora.base).name != Path(first.base or "").name
        ]
    widths: dict[str, tuple[tuple[int, int], str]] = {}
    for lora in loras:
        for module, pair in lora.pairs.items():
            size = pair.A.shape[1], pair.B.shape[1]
            first_size, first_name = widths.setdefault(module, (size, lora.name))
            if size != first_size:
                here, there = (f"from {d_in} to {d_out}" for d_in, d_out in (size, first_size))
                problems.append(f"{lora.name}: {module} goes {here}, and in {first_name} {there}")
    if problems:
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        lines = ["These LoRAs cannot be merged, and nothing was written:", *problems[:20], *more]
        raise ValueError("\n- ".join(lines))
