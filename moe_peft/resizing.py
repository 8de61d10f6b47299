"""What adding and pruning experts have in common: may this adapter change now, and how its layers get other experts.

A layer is given new experts as at its making, by the config with the new number, and the old tensors are then copied
row by row: whatever follows from the number (slots, load, buffers) is decided where it always is.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from moe_peft.allocation import expand
from moe_peft.bottleneck_config import BottleneckMoeConfig
from moe_peft.config import FfnMoeConfig, LinearMoeConfig
from moe_peft.domain_config import DomainMoeConfig
from moe_peft.errors import refuse
from moe_peft.frozen import freeze, frozen_experts
from moe_peft.merge import routed_layers
from moe_peft.rank_config import SELF, RankMoeConfig
from moe_peft.shard_config import ShardPoolConfig
from moe_peft.tuners.base import layer_place
from moe_peft.tuners.ffn_moe import FfnMoeLinear
from moe_peft.tuners.layer import MoeTunerLayer
from moe_peft.tuners.linear_moe import LinearMoeLinear


Config = TypeVar("Config", LinearMoeConfig, FfnMoeConfig)

ROWS_BY_EXPERT = ("lora_A", "lora_B", "router", "router_bias", "selection_bias")
"""Tensors whose first axis counts the routed experts first, then what stands behind them (shared, constant, null)."""

_FIXED_BY_NUMBER = {
    "expert_groups": "it names experts by their numbers",
    "balance_weights": "it has one weight for each expert",
    "num_distinct_experts": "its experts stand for groups of the router's choices",
}


def check_idle(layers: dict[str, MoeTunerLayer], adapter_name: str, doing: str) -> None:
    """Refuse to change weights that a trainer holds or that are merged.

    Args:
        layers: those that hold the adapter.
        doing: what is about to be done, as the start of a sentence ("Adding experts").

    Raises:
        RuntimeError: while a trainer runs on the model.
        ValueError: if the adapter is merged.
    """
    running = next(iter(layers.values())).context._running
    if running is not None and running():
        raise RuntimeError(
            f"{doing} gives adapter '{adapter_name}' new parameters, but a trainer is running on this model and its "
            "optimizer holds the old ones. Do it before `train()` or after it has returned, then train on."
        )
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(
            f"Adapter '{adapter_name}' is merged into the base weights. Call `model.unmerge_adapter()` before this: "
            f"{doing[0].lower() + doing[1:]} would leave the old experts in the base."
        )


def check_unnamed(config: Any, adapter_name: str, doing: str) -> None:
    """Refuse the types whose experts have names, and say how theirs come and go.

    Raises:
        ValueError: for DOMAIN_MOE and BOTTLENECK_MOE.
    """
    if isinstance(config, DomainMoeConfig):
        remedy = (
            "Make the adapter anew from the folders of its domains, one more or one fewer, which takes seconds and changes "
            'no expert: `moe_peft.from_loras({"law": "loras/law", ...}, base)`. A domain\'s folder is the LoRA that it was '
            "made of, or what `moe-peft export --to loras` writes."
        )
    elif isinstance(config, BottleneckMoeConfig):
        remedy = (
            "Train the new domain alone (`gate='none'`), then join the folders in a new adapter: "
            "`moe_peft.mixda.domains_config(folders)` and `load_domains(model, folders)`."
        )
    else:
        return
    raise ValueError(
        f"{doing} is for experts that have numbers; '{adapter_name}' is {config.peft_type.value}, whose experts have names. "
        + remedy
    )


Resizable = LinearMoeLinear | FfnMoeLinear
"""A layer whose number of experts can change; of an FFN block the linear that has its router."""


def resizable_layers(model: PeftModel, adapter_name: str, doing: str) -> dict[str, Any]:
    """The `Resizable` layers of an adapter that may change now: names as in `merge.routed_layers`, those of the blocks
    for FFN mixtures.

    Raises:
        ValueError: another adapter type, a merged adapter, a setting that names experts by number.
        RuntimeError: while a trainer runs.
    """
    layers = routed_layers(model, adapter_name)
    check_idle(layers, adapter_name, doing)
    config = model.peft_config[adapter_name]
    check_unnamed(config, adapter_name, doing)
    if not isinstance(config, (LinearMoeConfig, FfnMoeConfig)):
        why = "Its experts are not stacked pairs of factors with a router of their own."
        instead = "Train a new adapter with another `num_experts`."
        if isinstance(config, (RankMoeConfig, ShardPoolConfig)):
            instead = "Train a new adapter with another `r`."
        if isinstance(config, RankMoeConfig) and config.routing == SELF:
            instead = "`moe_peft.grow` gives it further ranks for a new task."
        raise ValueError(
            f"{doing} is for LINEAR_MOE and FFN_MOE adapters, and '{adapter_name}' is {config.peft_type.value}. {why} "
            + instead
        )
    for field, why in _FIXED_BY_NUMBER.items():
        if getattr(config, field, None) is not None:
            raise refuse(field, getattr(config, field), f"None where experts come or go: {why}", "Train without it.")
    if getattr(config, "router_scope", "linear") != "linear":
        raise refuse("router_scope", config.router_scope, "'linear' where experts come or go", "Train with that.")
    return {name: layer for name, layer in layers.items() if isinstance(layer, LinearMoeLinear)} | {
        _block_name(name): layer
        for name, layer in layers.items()
        if isinstance(layer, FfnMoeLinear) and layer.block is not None and layer.name == layer.block.names.ins[0]
    }


def reached_no_expert(adapter_name: str) -> ValueError:
    """What to say where a text should have been read and was not."""
    return ValueError(
        "The calibration text reached no expert. Give at least a few batches, and call "
        f"`model.set_adapter('{adapter_name}')` if another adapter is active."
    )


def _block_name(linear: str) -> str:
    """The block's name; that of its first linear where the linears stand in the decoder layer itself, as in OPT."""
    block = linear.rpartition(".")[0]
    return linear if block.rpartition(".")[2].isdigit() else block


def together(layer: Resizable) -> list[Any]:
    """The layers that hold parts of the same experts: the linears of an FFN block, that with the router first; else this
    one alone."""
    if isinstance(layer, FfnMoeLinear) and layer.block is not None:
        return [layer.block.layers[name] for name in layer.block.names.all]
    return [layer]


def chosen_layers(model: PeftModel, names: Iterable[str], numbers: Iterable[int] | None, field: str) -> list[str]:
    """Those of the modules that lie in the layers of these numbers, in order; all for None.

    Raises:
        ValueError: a number without an adapted module.
    """
    names = list(names)
    if numbers is None:
        return names
    found = {name: layer_place(name) for name in names}
    there = {place[1] for place in found.values() if place is not None}
    allowed = f"numbers of layers with this adapter: {', '.join(map(str, sorted(there))) or 'there are none'}"
    remedy = "Leave it out to take every layer." if field == "layers" else "One number takes every layer."
    if not isinstance(numbers, Iterable):
        raise refuse(field, numbers, f"a list of {allowed}", remedy)
    wanted = set(numbers)
    if not wanted or not wanted <= there:
        raise refuse(field, sorted(wanted), allowed, remedy)
    return [name for name, place in found.items() if place is not None and place[1] in wanted]


def with_counts(model: PeftModel, config: Config, counts: dict[str, int], field: str = "num_experts") -> Config:
    """The config for these numbers of experts by module, checked as at its making; nothing is changed yet.

    Args:
        field: the field that counts them.

    Raises:
        ValueError: whatever the config refuses; numbers that it cannot say, as it counts by layer.
    """
    if len(set(counts.values())) == 1:
        return replace(config, **{field: next(iter(counts.values()))})
    per_layer: dict[str, list[int]] = {}
    for name, count in counts.items():
        place = layer_place(name)
        if place is None:
            raise ValueError(
                f"'{name}' has no layer number in its name, so `{field}` cannot say that it has {count} experts and "
                "others have not. Change all layers alike."
            )
        if place[0] not in per_layer:
            container = model.base_model.model.get_submodule(place[0])
            per_layer[place[0]] = expand(config.num_experts, len(list(container.children())), "num_experts")
        per_layer[place[0]][place[1]] = count
    for name, count in counts.items():
        place = layer_place(name)
        if place is not None and per_layer[place[0]][place[1]] != count:
            raise ValueError(f"`{field}` counts by layer, and the modules of layer {place[1]} would differ.")
    lists = list(per_layer.values())
    if any(numbers != lists[0] for numbers in lists):
        raise ValueError(
            f"The model has several lists of layers ({', '.join(sorted(per_layer))}), and one list of `{field}` "
            "cannot say how they would differ. Change all layers alike."
        )
    return replace(config, **{field: lists[0]})


@torch.no_grad()
def rebuild(layer: Resizable, adapter_name: str, config: Config, sources: Sequence[int]) -> list[Any]:
    """Give the layer `len(sources)` routed experts, number i with the weights that `sources[i]` had, bit for bit.

    Shared, constant and null experts stay. The state of the router starts anew. The random stream is left alone.

    Returns:
        the new experts' modules, one for each layer of `together`.
    """
    before, made = layer.num_experts[adapter_name], []
    for part in together(layer):
        old = part.experts(adapter_name)
        new = refit(part, adapter_name, config, len(sources), lambda name, old: _taken(name, old, sources, before))
        frozen = frozen_experts(old)
        freeze(new, [i for i, source in enumerate(sources) if source in frozen and source not in sources[:i]])
        made.append(new)
    return made


@torch.no_grad()
def refit(
    layer: Resizable,
    adapter_name: str,
    config: Config,
    number: int,
    taken: Callable[[str, Tensor], Tensor],
) -> Any:
    """Make the layer's adapter anew for `number` choices, each tensor `taken(name, old tensor)`.

    The state of the router starts anew. The random stream is left alone.
    """
    old = layer.experts(adapter_name)
    trained = {id(p): p.requires_grad for p in layer.parameters()}
    with torch.random.fork_rng(devices=[]):
        layer.update_layer(adapter_name, replace(config, init_weights=True), number, layer.r[adapter_name])
    new = layer.experts(adapter_name).train(old.training)
    for parameter in layer.parameters():
        parameter.requires_grad_(trained.get(id(parameter), parameter.requires_grad))
    there = _tensors(new)
    for name, tensor in _tensors(old).items():
        if name in there:  # a single expert has no router
            there[name].data = taken(name, tensor)
            there[name].requires_grad_(tensor.requires_grad)
    return new


def _tensors(experts: nn.Module) -> dict[str, Any]:
    return dict(experts.named_parameters(recurse=False)) | dict(experts.named_buffers(recurse=False))


def _taken(name: str, tensor: Tensor, sources: Sequence[int], before: int) -> Tensor:
    if name not in ROWS_BY_EXPERT or len(tensor) < before:  # one A for all experts
        return tensor.detach().clone()
    index = torch.tensor([*sources, *range(before, len(tensor))], device=tensor.device)
    return tensor.detach()[index]
