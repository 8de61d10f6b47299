"""More experts for a trained adapter, the old ones untouched (MoExtend, arXiv:2408.03511).

What a new expert does at first depends on its start. With u the old logits, g the old weights, b `router_bias_start`,
and a layer that uses all experts ("softmax"):

    "zero"       B = 0, A fresh, a router row of zeros: the routed output is multiplied by Z / (Z + exp b), Z = sum exp u.
    a copy of e  weights and router row, with b = 0: it becomes (sum g_i E_i + g_e E_e) / (1 + g_e).

Where a rule selects, a token whose choice does not change computes exactly what it did. A copy is chosen along with its
source and takes the last of its other slots; no row without a bias can keep every token's choice. With a bias
(`router_bias=True` in the config) and b low enough no choice changes, and the output is kept bit for bit; the expert then
waits for balancing or training to raise it.

MoExtend trains the routers first, grows the half of the layers whose loads moved most, and adds a calibration net on the
weights. Growing the layers is what this does; the bias takes the net's place; which layers, and the stages, are the
caller's.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from moe_peft.config_checks import check_flags
from moe_peft.errors import nearest, refuse
from moe_peft.frozen import freeze
from moe_peft.merge import Batch
from moe_peft.pruning import expert_scores
from moe_peft.resizing import chosen_layers, rebuild, resizable_layers, together, with_counts


STARTS = ("zero", "most_used")


def add_experts(
    model: PeftModel,
    n: int = 1,
    layers: Iterable[int] | None = None,
    init_from: str | int = "zero",
    freeze_old: bool = False,
    calibration: Iterable[Batch] | None = None,
    router_bias_start: float = 0.0,
    adapter_name: str = "default",
) -> dict[str, int]:
    """Give layers of a LINEAR_MOE adapter, or blocks of an FFN_MOE one, `n` further routed experts, in place; the config's
    `num_experts` follows.

    Old experts and their router rows are kept bit for bit. Make a new optimizer before training on.

    Args:
        model: with the adapter.
        n: how many experts each layer gets.
        layers: numbers of the layers that grow; by default all.
        init_from: "zero"; the number of the expert to copy; or "most_used", the one that got most of the load in training,
            or on the `calibration` text where that is given. See the module for what each does to the output.
        freeze_old: hold the old experts and their router rows still (`freeze_experts`).
        calibration: batches for `model(**batch)`, for "most_used" alone.
        router_bias_start: what is added to a new expert's logits at first (to its source's bias, for a copy). Other than
            0 it needs a router with a bias.

    Returns:
        name of the module, or of the block -> how many experts it has now.

    Raises:
        ValueError: wrong arguments, another adapter type, a merged adapter, a layer with one expert and no router.
        RuntimeError: while a trainer runs on the model.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise refuse("n", n, "a whole number of at least 1", "MoExtend adds 1.")
    check_flags(freeze_old=freeze_old)
    if calibration is not None and init_from != "most_used":
        raise refuse(
            "calibration", "given", "left out", "It finds the expert to copy: set `init_from` to 'most_used'."
        )
    found = resizable_layers(model, adapter_name, "Adding experts")
    _check_bias(router_bias_start, found, adapter_name)
    grown = chosen_layers(model, found, layers, "layers")
    counts = {name: layer.num_experts[adapter_name] for name, layer in found.items()}
    for name in grown:
        _check_start(init_from, name, counts[name])
    wanted = {name: count + n * (name in grown) for name, count in counts.items()}
    config = with_counts(model, model.peft_config[adapter_name], wanted)
    sources = _sources(model, {name: found[name] for name in grown}, init_from, calibration, adapter_name)
    model.peft_config[adapter_name].num_experts = config.num_experts
    for name in grown:
        made = rebuild(found[name], adapter_name, config, [*range(counts[name]), *[sources[name]] * n])
        for experts in made:
            if init_from == "zero":
                _reset(experts, counts[name], n)
            if freeze_old:
                freeze(experts, range(counts[name]))
        if router_bias_start:
            made[0].router_bias.data[counts[name] : counts[name] + n] += router_bias_start
    return wanted


def freeze_experts(
    model: PeftModel, experts: Iterable[int], layers: Iterable[int] | None = None, adapter_name: str = "default"
) -> None:
    """Hold these routed experts and their router rows still, and no others; an empty list frees all.

    Their gradients are zero, so that no optimizer moves them. What moves weights without a gradient still does: use no
    weight decay, and an optimizer that has no momentum from before. Not saved with the adapter: call it again after
    loading. Not for FSDP and ZeRO-3, which raise in the first backward pass.

    Args:
        experts: their numbers.
        layers: numbers of layers; by default all.

    Raises:
        ValueError: an expert that a layer does not have; another adapter type.
    """
    found = resizable_layers(model, adapter_name, "Freezing experts")
    numbers = list(experts)
    chosen = chosen_layers(model, found, layers, "layers")
    for name in chosen:
        have = found[name].num_experts[adapter_name]
        if any(isinstance(e, bool) or not isinstance(e, int) or not 0 <= e < have for e in numbers):
            raise refuse("experts", numbers, f"numbers from 0 to {have - 1}, the experts of {name}", "Counted from 0.")
    for name in chosen:
        for layer in together(found[name]):
            freeze(layer.experts(adapter_name), numbers)


def _check_bias(start: float, layers: dict[str, Any], adapter_name: str) -> None:
    if isinstance(start, bool) or not isinstance(start, (int, float)) or not math.isfinite(start):
        raise refuse("router_bias_start", start, "a number", "-10 makes it as good as never chosen at first.")
    without = [n for n, layer in layers.items() if getattr(layer.experts(adapter_name), "router_bias", None) is None]
    if start and without:
        remedy = "Leave it out, or train the adapter with `router_bias=True`."
        raise refuse("router_bias_start", start, f"0 where the router has no bias, as in {without[0]}", remedy)


def _check_start(init_from: str | int, name: str, count: int) -> None:
    if isinstance(init_from, int) and not isinstance(init_from, bool):
        if not 0 <= init_from < count:
            raise refuse("init_from", init_from, f"from 0 to {count - 1}, the experts of {name}", "Counted from 0.")
    elif init_from not in STARTS:
        allowed = "'zero', 'most_used' or the number of an expert"
        raise refuse("init_from", init_from, allowed, nearest(str(init_from), STARTS))
    if count == 1:
        raise ValueError(
            f"{name} has one expert and no router that could share tokens with a second. Start a new adapter from it: "
            "`moe_peft.init_experts_from_lora` takes a plain LoRA."
        )


def _sources(
    model: PeftModel,
    layers: dict[str, Any],
    init_from: str | int,
    calibration: Iterable[Batch] | None,
    adapter_name: str,
) -> dict[str, int]:
    """Which expert each module copies; 0 where the copy is written over."""
    if init_from != "most_used":
        return dict.fromkeys(layers, 0 if isinstance(init_from, str) else init_from)
    if calibration is not None:
        scores = expert_scores(model, calibration, "usage", adapter_name)
        return {name: int(scores[name].argmax()) for name in layers}
    loads = {}
    for name, layer in layers.items():
        state = layer.experts(adapter_name).state
        loads[name] = state.load if state.load is not None else state.counts
        if loads[name] is None:
            raise refuse(
                "init_from",
                init_from,
                "'zero' or a number where the routers have seen no text",
                "The load of a trained adapter is not saved with it: give `calibration` batches to measure it.",
            )
    return {name: int(load[: layer.num_experts[adapter_name]].argmax())
            for (name, load), layer in zip(loads.items(), layers.values(), strict=True)}  # fmt: skip


@torch.no_grad()
def _reset(experts: Any, first: int, n: int) -> None:
    """B = 0, a fresh A as at the start of training, and a router row of zeros."""
    new = slice(first, first + n)
    experts.lora_B[new] = 0
    if len(experts.lora_A) > 1:  # one A that all experts share stays
        for expert in experts.lora_A[new]:
            nn.init.kaiming_uniform_(expert, a=math.sqrt(5))
    for rows in (
        getattr(experts, "router", None),
        getattr(experts, "router_bias", None),
        getattr(experts, "selection_bias", None),
    ):
        if rows is not None:
            rows[new] = 0
