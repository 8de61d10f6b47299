"""Fewer experts under the same router: experts that are used alike are merged, and their choices share the result.

MC-SMoE (arXiv:2310.01334), read with its released code: of each layer the most used experts are dominant; every other
one joins the dominant expert that it is most like; a group becomes the mean of its experts, weighted by usage; the router
is left as it is, and the choices of a group stand for one expert.

    "router"    likeness: the cosine of two experts' logits over the calibration tokens (the paper's choice)
    "outputs"   the cosine of their outputs over those tokens (Sub-MoE, arXiv:2506.23266)

Linear experts need no alignment: their products B_e A_e live in one basis (for FFN mixtures see `regrouping_blocks`). So a
group is merged as a sum of products, W = sum_e B_e Z_e [A_1; A_2; ..], and cut back to rank r where its output on the
group's own tokens suffers least. Z is

    "lstsq"   the least squares from calibration text, min sum_t |sum_e g_te E_e(x_t) - w_t W x_t|^2, w = sum_e g_te
    "usage"   the published mean: usage_e / sum usage on the diagonal. It loses about twice as much (`eval/results/shrink`)

Departures from the release: usage is the summed weight and not the count of choices, so that rules that use all experts can
be grouped; the number of groups is given by layer, where the release finds it with one threshold for all layers; there
is no further compression of the merged experts.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from moe_peft.config import FfnMoeConfig
from moe_peft.errors import nearest, refuse
from moe_peft.expert_groups import Groups, Sums, cosines, dominant_groups, merged_factors, output_products
from moe_peft.merge import Batch, observing, on_device
from moe_peft.regrouping_blocks import block_likeness, merged_blocks
from moe_peft.resizing import chosen_layers, reached_no_expert, refit, resizable_layers, together, with_counts
from moe_peft.routing import routing_dtype
from moe_peft.tuners.base import layer_place
from moe_peft.tuners.linear_moe import LinearMoeLinear, RoutedLora


SIMILARITIES = ("router", "outputs")
MERGES = ("lstsq", "usage")


class GroupedLayer(NamedTuple):
    """One line of what `group_experts` does.

    Attributes:
        layer: the module's name.
        groups: numbers of the experts before, the dominant one of each group first.
        share: of the layer's summed usage, what the dominant experts have.
    """

    layer: str
    groups: list[list[int]]
    share: float


def group_experts(
    model: PeftModel,
    calibration: Iterable[Batch],
    groups: int | dict[int, int],
    similarity: str = "router",
    merge: str = "lstsq",
    dry_run: bool = False,
    adapter_name: str = "default",
) -> list[GroupedLayer]:
    """Merge the experts of each layer into fewer, in place; the router and `num_experts` stay, `num_distinct_experts` is set.

    An expert that forms a group by itself keeps its weights bit for bit; so do router, shared and constant experts. An
    A that all experts share stays as it is too, and the mean of the Bs is exact. Experts that were frozen are free
    afterwards. Make a new optimizer before training on; balance goes on over the router's choices.

    Args:
        model: with a LINEAR_MOE or FFN_MOE adapter, active.
        calibration: batches for `model(**batch)`, read twice; a generator is kept in memory.
        groups: how many experts each layer is left with, for all or by layer number.
        similarity: "router" or "outputs"; see the module.
        merge: "lstsq" or "usage"; see the module.
        dry_run: return the table and change nothing.

    Returns:
        a line for each module, or FFN block, that loses experts.

    Raises:
        ValueError: unknown words, more groups than experts, no text, another adapter type, an adapter grouped before.
        RuntimeError: while a trainer runs on the model.
    """
    for field, value, allowed in (("similarity", similarity, SIMILARITIES), ("merge", merge, MERGES)):
        if value not in allowed:
            raise refuse(field, value, " or ".join(map(repr, allowed)), nearest(str(value), allowed))
    layers = resizable_layers(model, adapter_name, "Grouping experts")
    config = model.peft_config[adapter_name]
    _check_groupable(config)
    wanted = _wanted(model, groups, {name: layer.num_experts[adapter_name] for name, layer in layers.items()})
    smaller = {
        name: layers[name] for name, number in wanted.items() if number < layers[name].num_experts[adapter_name]
    }
    new_config = with_counts(model, config, wanted, "num_distinct_experts")
    batches = list(calibration)
    of_blocks = isinstance(config, FfnMoeConfig)
    likeness = block_likeness if of_blocks else _likeness
    found = {
        name: dominant_groups(usage, alike, wanted[name])
        for name, (usage, alike) in likeness(model, smaller, batches, adapter_name, similarity).items()
    }
    if of_blocks:
        merged = merged_blocks(model, smaller, batches, adapter_name, found, merge)
    else:
        merged = _merged(model, smaller, batches, adapter_name, found, merge)
    if not dry_run:
        config.num_distinct_experts = new_config.num_distinct_experts
        for name, layer in layers.items():
            _regroup(layer, adapter_name, new_config, merged.get(name), found.get(name))
    return [GroupedLayer(name, group.groups, group.share) for name, group in found.items()]


def _check_groupable(config: Any) -> None:
    """Refuse what has no choices to group by."""
    if config.routing in ("random", "given"):
        raise refuse("routing", config.routing, "one with a router", "No choice of a token could be grouped by.")


def _regroup(
    layer: Any, adapter_name: str, config: Any, merged: list[dict[str, Tensor]] | None, groups: Groups | None
) -> None:
    """Give the layer, or each linear of its block, the merged experts; without any, those that it had."""
    parts = together(layer)
    for part, new in zip(parts, merged or [{}] * len(parts), strict=True):
        refit(part, adapter_name, config, layer.num_experts[adapter_name], _with(new))
    if groups is not None:
        parts[0].experts(adapter_name).expert_map.copy_(groups.of)


def _wanted(model: PeftModel, groups: int | dict[int, int], counts: dict[str, int]) -> dict[str, int]:
    """Experts that each module is left with."""
    wanted = dict(counts)
    for name in chosen_layers(model, counts, groups if isinstance(groups, dict) else None, "groups"):
        place = layer_place(name)
        number = groups[place[1]] if isinstance(groups, dict) and place is not None else groups
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            allowed = "a whole number of at least 1, or such numbers by layer"
            raise refuse("groups", groups, allowed, "A quarter of the experts is what MC-SMoE keeps.")
        if number > counts[name]:
            raise refuse(
                "groups", groups, f"at most {counts[name]}, the experts of {name}", "Name fewer, or that layer not."
            )
        wanted[name] = number
    return wanted


@torch.no_grad()
def _read(
    model: PeftModel,
    layers: dict[str, LinearMoeLinear],
    batches: list[Batch],
    adapter_name: str,
    add: Callable[[str, RoutedLora, Tensor, Tensor, Tensor], None],
) -> None:
    """Call `add(name, experts, x, gates, logits)` with every layer's real tokens: `[T, d_in]`, `[T, E]`, `[T, E]`."""
    seen = 0

    def see(name: str, experts: RoutedLora, x: Tensor, y: Tensor, gates: Tensor, real: Tensor | None) -> None:
        nonlocal seen
        logits = experts._route(x, layers[name].context).router_logits[:, : experts.num_routed]
        x = x.reshape(-1, x.shape[-1])
        if real is not None:
            x, gates, logits = x[real], gates[real], logits[real]
        add(name, experts, x.to(routing_dtype(x.dtype)), gates[:, : experts.num_routed], logits)
        seen += len(x)

    with observing(model, layers, adapter_name, see):
        for batch in batches:
            model(**on_device(batch, model))
    if layers and not seen:
        raise reached_no_expert(adapter_name)


def _likeness(
    model: PeftModel, layers: dict[str, LinearMoeLinear], batches: list[Batch], adapter_name: str, similarity: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name -> (usage `[E]`, likeness `[E, E]` from -1 to 1), in fp64 on the CPU."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(name: str, experts: RoutedLora, x: Tensor, gates: Tensor, logits: Tensor) -> None:
        inner = (logits.T @ logits) if similarity == "router" else output_products(experts, x)
        usage, products = sums.get(name, (0.0, 0.0))
        sums[name] = usage + gates.sum(0).double().cpu(), products + inner.double().cpu()

    _read(model, layers, batches, adapter_name, add)
    return {name: (usage, cosines(products)) for name, (usage, products) in sums.items()}


def _merged(
    model: PeftModel,
    layers: dict[str, LinearMoeLinear],
    batches: list[Batch],
    adapter_name: str,
    found: dict[str, Groups],
    merge: str,
) -> dict[str, list[dict[str, Tensor]]]:
    """Module name -> its new lora_A and lora_B, as the one part that it has."""
    sums = {name: Sums() for name in layers}

    def add(name: str, experts: RoutedLora, x: Tensor, gates: Tensor, logits: Tensor) -> None:
        sums[name].add(experts, x, gates, found[name].groups)

    _read(model, layers, batches, adapter_name, add)
    return {
        name: [merged_factors(layer.experts(adapter_name), found[name].groups, sums[name], merge)]
        for name, layer in layers.items()
    }


def _with(new: dict[str, Tensor]) -> Callable[[str, Tensor], Tensor]:
    """Tensors for `refit`: the new ones by name, the rest as they were."""
    return lambda name, old: new.get(name, old).detach().clone()
