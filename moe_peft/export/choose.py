"""Which target an adapter can become on its backbone, and how each layer's experts lie in it; or why none will do."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_peft.errors import nearest, refuse
from moe_peft.export.adapter import FfnAdapter, Rule
from moe_peft.export.routes import CHECKS, COMMON, NULLABLE, ROUTES, Route
from moe_peft.export.targets import TARGETS, Target


MOST_CLONES = 4
"""Layers of unequal size are evened out by clones up to this multiple of the largest; more is no export worth having."""

Slots = tuple[int | None, ...]
"""Which of the adapter's experts stands in each place of a layer; None is padding that is never chosen."""

WAYS_OUT = (
    "Train with routing='sigmoid_top_k', which exports for llama, mistral, phi3, qwen2 and qwen3 with any number of "
    "experts per layer; or serve the adapter routed."
)


class Choice(NamedTuple):
    """What an export will be.

    Attributes:
        target, route: where it goes, and how.
        num_experts, top_k: of the exported model, one number for all layers.
        slots: layer -> its experts, for the layers that are mixtures.
        uniform: those of them whose experts are all the same, so that their router is zero.
        dense: the layers that stay dense.
        renormalised: whether the weights of the chosen experts sum to 1.
        notes: what was done that somebody might not expect, in sentences without a full stop.
    """

    target: Target
    route: Route
    num_experts: int
    top_k: int
    slots: Mapping[int, Slots]
    uniform: frozenset[int]
    dense: tuple[int, ...]
    renormalised: bool
    notes: tuple[str, ...]


def choose(config: Mapping[str, Any], adapter: FfnAdapter, target: str = "auto") -> Choice:
    """The first target that computes exactly what the adapter does, with the fewest copies of experts.

    Args:
        config: of the dense model.
        adapter: its experts.
        target: a target's `model_type`, or "auto".

    Raises:
        ValueError: unknown target, a dense model without a twin, or a mixture that no target computes, with the reason
            for each.
    """
    if target != "auto" and target not in TARGETS:
        known = ["auto", *TARGETS]
        raise refuse("target", target, "'auto' or one of " + ", ".join(map(repr, TARGETS)), nearest(target, known))
    family = config["model_type"]
    if family not in ROUTES:
        raise ValueError(
            f"'{family}' is a dense model without a twin: no stock MoE model computes its blocks. These have one: "
            f"{', '.join(ROUTES)}. For others, serve the adapter routed, or train a router on each linear layer ('mola', say), "
            "of which `moe-peft merge` makes a static LoRA with a measured loss."
        )
    routes = [route for route in ROUTES[family] if target in ("auto", route.target)]
    if not routes:
        reachable = ", ".join(repr(route.target) for route in ROUTES[family])
        raise refuse(
            "target", target, f"{reachable} or 'auto' for a {family} model", "Other targets compute other blocks."
        )
    counts = [_count(adapter, layer) for layer in range(config["num_hidden_layers"])]
    if max(counts) <= 1:
        raise ValueError(
            f"Every layer of '{adapter.folder}' has one expert, so there is nothing to route: it is a plain LoRA. Load it "
            "and call `merge_and_unload`."
        )
    found, reasons = [], {}
    for route in routes:
        outcome = _try(route, config, adapter.rule, counts)
        if isinstance(outcome, str):
            reasons[route.target] = outcome
        else:
            found.append(outcome)
    if not found:
        tried = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"No stock MoE model computes this adapter on a {family} model exactly ({tried}). {WAYS_OUT}")
    return min(found, key=lambda choice: sum(len(slots) for slots in choice.slots.values()))


def _count(adapter: FfnAdapter, layer: int) -> int:
    """Experts that a layer's router chooses from; 1 where there is no router, 0 where there is no adapter."""
    if layer in adapter.routed:
        return adapter.routed[layer]
    return int(any(f".layers.{layer}.mlp." in module for module in adapter.linears))


def _try(route: Route, config: Mapping[str, Any], rule: Rule, counts: Sequence[int]) -> Choice | str:
    """The choice, or the reason against it."""
    target = TARGETS[route.target]
    for check in route.needs:
        holds, otherwise = CHECKS[check]
        if not holds(config):
            return otherwise
    if rule.score != target.score:
        return f"its router takes a {target.score}, not a {rule.score}"
    if rule.renormalised not in target.renormalised:
        return "it rescales the weights of the chosen experts to sum to 1, which 'top_1' does not"
    plain = [layer for layer, n in enumerate(counts) if n <= 1]
    dense = plain if target.dense(plain, len(counts)) is not None else []
    if plain and not dense and not rule.renormalised:
        return f"it has no dense layers, and layer {plain[0]} has no router"
    sizes = sorted({n for n in counts if n > 1})
    total = math.lcm(*sizes) if rule.top_k is None else sizes[-1]
    if total > MOST_CLONES * sizes[-1]:
        return f"its layers have {sizes} experts, and evening them out would take {total} in each"
    slots: dict[int, Slots] = {}
    for layer, n in enumerate(counts):
        if layer not in dense:
            placed = _place(n, total, rule, target)
            if placed is None:
                return (
                    f"its router has no selection bias, so that all layers need the same number of experts, and they have "
                    f"{', '.join(map(str, sizes))}"
                )
            slots[layer] = placed
    return Choice(
        target=target,
        route=route,
        num_experts=total,
        top_k=rule.top_k or total,
        slots=slots,
        uniform=frozenset(layer for layer in plain if layer not in dense),
        dense=tuple(dense),
        renormalised=rule.renormalised,
        notes=_notes(plain, dense, slots, rule, target),
    )


def _place(n: int, total: int, rule: Rule, target: Target) -> Slots | None:
    """`n` experts in `total` places, so that the function stays the same; None if that cannot be done.

    Equal experts share their weight: the router gives clones equal logits. That is exact when all experts are visited,
    when one is visited with weight 1, or when all are the same. Padding needs a bias that keeps it from being chosen: a
    row of a linear router cannot be smaller than others for every input.
    """
    if n == total:
        return tuple(range(n))
    if n <= 1 and rule.renormalised:
        return (0,) * total
    if rule.top_k is None and total % n == 0:
        return tuple(i // (total // n) for i in range(total))
    if rule.top_k == 1 and rule.renormalised:
        return (*range(n), *((0,) * (total - n)))
    if target.bias is not None:
        return (*range(n), *((None,) * (total - n)))
    return None


def _notes(
    plain: Sequence[int], dense: Sequence[int], slots: Mapping[int, Slots], rule: Rule, target: Target
) -> tuple[str, ...]:
    said = []
    if dense:
        said.append(f"layers {_ranges(dense)} have no router and stay dense")
    elif plain:
        said.append(
            f"layers {_ranges(plain)} have no router, but {target.model_type} has no dense layers there: each holds equal "
            "experts, at full size"
        )
    padded = [layer for layer, s in slots.items() if None in s]
    if padded:
        said.append(f"layers {_ranges(padded)} are padded with experts that are never chosen")
    cloned = [layer for layer, s in slots.items() if layer not in plain and len(set(s)) < len(s) and None not in s]
    if cloned:
        said.append(f"layers {_ranges(cloned)} hold clones, so that all layers have as many experts")
    if rule.top_k is None:
        said.append("every token visits every expert, so that the exported FFN costs as much as all of them")
    return tuple(said)


def _ranges(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` -> "0-2, 5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def config_entries(config: Mapping[str, Any], choice: Choice) -> dict[str, Any]:
    """The target's config, by whitelist.

    Args:
        config: of the dense model; what is not named by the tables is left behind (quantisation, code, paths).
    """
    target, route = choice.target, choice.route
    named = [key for key in (*COMMON, *route.copies) if key in config]
    entries = {key: config[key] for key in named if config[key] is not None or key in NULLABLE}
    entries |= dict.fromkeys(target.size, config["intermediate_size"])
    entries |= {key: value(config) if callable(value) else value for key, value in route.sets.items()}
    entries |= {**target.always, **(target.dense(choice.dense, config["num_hidden_layers"]) or {})}
    entries |= {target.num_experts: choice.num_experts, target.top_k: choice.top_k}
    if len(target.renormalised) > 1:
        entries["norm_topk_prob"] = choice.renormalised
    return entries
