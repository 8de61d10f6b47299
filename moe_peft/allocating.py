"""Experts and rank for each layer, from data: as much measured gain as a budget of parameters buys.

`moe_peft.allocate(model, batches, config)` measures what every layer has to gain (`gain`), then buys step by step, always
the expert (or the rank) with the most gain per parameter, until nothing more fits. Gains are made concave first; where
steps cost alike, as with experts in the equal layers of a decoder, that is the best allocation there is. The result is a
config with plain lists: training knows nothing of where they come from.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from moe_peft.adapted_layers import Costs, find_sites, layer_costs, without_weights
from moe_peft.allocation import expand, parse
from moe_peft.budget import count_config
from moe_peft.config import MoeConfig
from moe_peft.errors import nearest, refuse
from moe_peft.gain import Batch, Progress, Site, measure_gain


CHOICES = ("experts", "rank", "both")
"""What `allocate` may choose."""


class Layer(NamedTuple):
    """What one adapted layer can have; n numbers of experts by m ranks.

    Attributes:
        number: in the model.
        experts, ranks: the choices, ascending.
        gain: `[n][m]` nats per token, concave in either direction, as it was used.
        cost: `[n][m]` trained parameters.
    """

    number: int
    experts: list[int]
    ranks: list[int]
    gain: list[list[float]]
    cost: list[list[int]]


class Allocated(NamedTuple):
    """What `allocate` found.

    Attributes:
        config: the config with `num_experts` or `r`, or both, as lists.
        budget: what was to be spent at most, and
        trainable: what is: every parameter that the config trains.
        chosen: the budgeted fields, "experts", "rank" or "both".
        layers: the adapted ones, in order.
        picks: for each of them the chosen place in `gain`.
    """

    config: MoeConfig
    budget: int
    trainable: int
    chosen: str
    layers: list[Layer]
    picks: list[tuple[int, int]]


def allocate(
    model: nn.Module,
    batches: Iterable[Batch],
    config: PeftConfig,
    budget: int | str | None = None,
    choose: str = "experts",
    min_experts: int | None = None,
    max_experts: int | None = None,
    max_rank: int | None = None,
    progress: Progress | None = None,
) -> Allocated:
    """Choose the number of experts, or the rank, or both, of every layer by measured gain.

    Args:
        model: the backbone, without an adapter; 4-bit or not. It is left as it was.
        batches: calibration text as keyword arguments for `model`, with `labels`, in random order. A few hundred rows of
            the training mix.
        config: of a type with experts in each layer; what is not chosen stays.
        budget: trained parameters, at most; or what they would cost with another allocation of experts, "=5:5:5:5". By
            default what `config` costs as it is.
        choose: "experts", "rank" or "both". The scale of an expert is `lora_alpha / r` with the `r` of its layer.
        min_experts: of a layer; by default the fewest that the config allows, for which `top_k` counts.
        max_experts: of a layer; by default 8, or the most that the config names if that is more.
        max_rank: of a layer; by default twice the largest that the config names. The smallest is 1.
        progress: called with (batches done, batches in all).

    Returns:
        The config, and what it was chosen from.

    Raises:
        ValueError: a budget or bound that cannot be met, text without labels or too little of it, a config without
            experts per layer, or targets that lie in no numbered layer.
    """
    config = _checked(model, config, choose)
    skeleton = without_weights(model)
    sites, total = find_sites(skeleton, config)
    numbers = sorted({site.layer for site in sites})
    experts = [_experts(config, n, total, choose, min_experts, max_experts) for n in numbers]
    ranks = [_ranks(config, n, total, choose, max_rank) for n in numbers]
    costs, fixed = layer_costs(skeleton, config, numbers, experts, ranks)
    wanted = _wanted(skeleton, config, budget)
    _check_budget(wanted, budget, fixed, costs, choose)
    tables = measure_gain(model, batches, sites, max(map(max, experts)), progress)
    layers = [
        Layer(n, e, r, _gains(sites, tables, n, e, r), c)
        for n, e, r, c in zip(numbers, experts, ranks, costs, strict=True)
    ]
    picks = buy([layer.gain for layer in layers], costs, wanted - fixed)
    found = _written(config, choose, layers, picks, total)
    return Allocated(found, wanted, count_config(skeleton, found).trainable, choose, layers, picks)


def _checked(model: nn.Module, config: PeftConfig, choose: str) -> MoeConfig:
    if not isinstance(config, MoeConfig) or config.num_experts is None:  # each rank is an expert in the latter
        kind = getattr(config, "peft_type", config)
        kind = getattr(kind, "value", kind)
        raise refuse(
            "config", kind, "of a type with experts in each layer", "Give a LinearMoeConfig or an FfnMoeConfig."
        )
    if choose not in CHOICES:
        raise refuse("choose", choose, "one of " + ", ".join(map(repr, CHOICES)), nearest(str(choose), CHOICES))
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("The model carries an adapter already. Give the backbone alone: `model.unload()` returns it.")
    return config


def _experts(
    config: MoeConfig, layer: int, total: int, choose: str, fewest: int | None, most: int | None
) -> list[int]:
    """The numbers of experts that a layer may have."""
    now = expand(config.num_experts, total, "num_experts")[layer]
    if choose == "rank":
        for name, value in (("min_experts", fewest), ("max_experts", most)):
            if value is not None:
                raise refuse(name, value, "left out with `choose` = 'rank'", "Experts stay as the config says there.")
        return [now]
    top = max(8, *parse(config.num_experts, "num_experts")) if most is None else _count(most, "max_experts")
    low = 1 if fewest is None else _count(fewest, "min_experts")
    allowed = [n for n in range(1, top + 1) if _is_allowed(config, n)]
    found = [n for n in allowed if n >= low]
    if fewest is not None and (not found or low < allowed[0]):
        ends = f"{allowed[0]} to {allowed[-1]}" if allowed else "of what the config allows"
        raise refuse(
            "min_experts", fewest, f"{ends} here (`top_k` = {config.top_k}, `max_experts` = {top})", "Change it."
        )
    if not found:
        raise refuse(
            "max_experts", top, f"at least as many as the config needs (`top_k` = {config.top_k})", "Raise it."
        )
    return found


def _ranks(config: MoeConfig, layer: int, total: int, choose: str, most: int | None) -> list[int]:
    """The ranks that a layer may have."""
    if choose == "experts":
        if most is not None:
            raise refuse(
                "max_rank", most, "left out with `choose` = 'experts'", "The rank stays as the config says there."
            )
        return [expand(config.r, total, "r")[layer]]
    return list(range(1, 1 + (2 * max(parse(config.r, "r")) if most is None else _count(most, "max_rank"))))


def _count(value: int, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refuse(name, value, "a whole number of at least 1", "Leave it out for a default.")
    return value


def _is_allowed(config: MoeConfig, num_experts: int) -> bool:
    try:
        replace(config, num_experts=num_experts)
    except ValueError:
        return False
    return True


def _wanted(skeleton: nn.Module, config: MoeConfig, budget: int | str | None) -> int:
    """The budget in parameters."""
    if budget is None:
        return count_config(skeleton, config).trainable
    if isinstance(budget, str) and budget.startswith("="):
        pattern = budget[1:].strip()
        return count_config(
            skeleton, replace(config, num_experts=int(pattern) if pattern.isdecimal() else pattern)
        ).trainable
    text = str(budget).replace("_", "").replace(",", "")
    if isinstance(budget, (bool, float)) or not text.isdecimal() or int(text) < 1:
        raise refuse(
            "budget",
            budget,
            "a number of parameters, or an allocation of experts behind an equals sign that it is to cost as much as",
            "Write 190000 or '=5:5:5:5'.",
        )
    return int(text)


def _check_budget(wanted: int, written: Any, fixed: int, costs: Costs, choose: str) -> None:
    least, most = (fixed + sum(row[end][end] for row in costs) for end in (0, -1))
    shown = wanted if written is None else written
    spent = f" ({wanted:,} parameters)" if isinstance(written, str) and written.startswith("=") else ""
    if wanted < least:
        raise refuse(
            "budget", shown, f"at least {least}, what the least of everything costs{spent}",
            "Raise it, lower `r`, or adapt fewer modules.",
        )  # fmt: skip
    if wanted > most:
        more = {"experts": "`max_experts`", "rank": "`max_rank`", "both": "`max_experts` or `max_rank`"}[choose]
        raise refuse(
            "budget", shown, f"at most {most}, what the most of everything costs{spent}", f"Lower it, or raise {more}."
        )


def _gains(
    sites: list[Site], tables: list[Tensor], layer: int, experts: list[int], ranks: list[int]
) -> list[list[float]]:
    """`[n][m]` gain of a layer, concave in the number of experts and then in the rank."""
    gain = torch.zeros(len(experts), len(ranks), dtype=torch.float64)
    for site, table in zip(sites, tables, strict=True):
        if site.layer == layer:
            rows = torch.tensor([min(n, table.shape[0]) - 1 for n in experts])
            columns = torch.tensor([min(r, table.shape[1]) - 1 for r in ranks])
            gain += table.cpu()[rows][:, columns]
    by_experts = torch.tensor([concave(experts, column) for column in gain.T.tolist()]).T
    return [concave(ranks, row) for row in by_experts.tolist()]


def concave(x: Sequence[int], y: Sequence[float]) -> list[float]:
    """The closest curve to `y` that never falls and rises less and less: its slopes, pooled where they grow, at least 0.

    >>> concave([2, 3, 4, 5], [0.0, 1.0, 4.0, 3.5])
    [0.0, 2.0, 4.0, 4.0]
    """
    pools: list[tuple[float, int, int]] = []  # rise, width, points
    for i in range(1, len(x)):
        pools.append((y[i] - y[i - 1], x[i] - x[i - 1], 1))
        while len(pools) > 1 and pools[-1][0] * pools[-2][1] > pools[-2][0] * pools[-1][1]:
            (a, b, c), (d, e, f) = pools.pop(), pools.pop()
            pools.append((a + d, b + e, c + f))
    slopes = [max(0.0, rise / width) for rise, width, points in pools for _ in range(points)]
    found = [float(y[0])]
    for i, slope in enumerate(slopes, start=1):
        found.append(found[-1] + slope * (x[i] - x[i - 1]))
    return found


def buy(gains: Sequence[list[list[float]]], costs: Costs, budget: int) -> list[tuple[int, int]]:
    """Where to stand in each layer's `[n][m]` grid: from (0, 0), the step of most gain per parameter that still fits.

    Where gains are equal (0 at the end), the layer that costs least so far comes first, which spreads them evenly.
    """
    picks = [(0, 0)] * len(gains)
    left = budget - sum(cost[0][0] for cost in costs)
    while True:
        steps = []
        for layer, (n, m) in enumerate(picks):
            gain, cost = gains[layer], costs[layer]
            for step in ((n + 1, m), (n, m + 1)):
                if step[0] < len(cost) and step[1] < len(cost[0]):
                    price = cost[step[0]][step[1]] - cost[n][m]
                    if price <= left:
                        worth = (gain[step[0]][step[1]] - gain[n][m]) / max(price, 1)
                        steps.append((worth, -cost[n][m], -layer, price, step))
        if not steps:
            return picks
        _, _, layer, price, step = max(steps)
        picks[-layer] = step
        left -= price


def _written(
    config: MoeConfig, choose: str, layers: list[Layer], picks: list[tuple[int, int]], total: int
) -> MoeConfig:
    """The config with plain lists; a layer that is not adapted gets the smallest number, which nothing reads."""
    experts, ranks = [min(layers[0].experts)] * total, [min(layers[0].ranks)] * total
    for layer, (n, m) in zip(layers, picks, strict=True):
        experts[layer.number], ranks[layer.number] = layer.experts[n], layer.ranks[m]
    fields = {"num_experts": experts} if choose != "rank" else {}
    return replace(config, **fields, **({"r": ranks} if choose != "experts" else {}))
