"""`regrouping` for FFN mixtures: which experts of a block are alike, and what a group of them becomes on each linear.

All experts of a block are changes of one frozen block, unit by unit, so that nothing has to be aligned before it is
merged: MC-SMoE permutes the units of experts that have drifted apart, and these have not. A group is merged on every
linear by itself, as on a linear with a router of its own: for the linears that read the block's input on the tokens that
chose the group, for the last one on the hidden units that the group's own experts made of them, each slot for itself.
What the merged expert's units differ from those is not looked at.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from moe_peft.block_scores import block_changes, check_own_modules, observing_blocks
from moe_peft.expert_groups import Groups, Sums, cosines, merged_factors
from moe_peft.merge import Batch, on_device
from moe_peft.resizing import reached_no_expert, together
from moe_peft.routing import Routing, dense_weights, routing_dtype
from moe_peft.tuners.ffn_moe import FfnMoeLinear


Blocks = dict[str, FfnMoeLinear]
"""Name of the block -> the one of its linears that has the router."""


@torch.no_grad()
def block_likeness(
    model: PeftModel, layers: Blocks, batches: list[Batch], adapter_name: str, similarity: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Block -> (usage `[E]`, likeness `[E, E]` from -1 to 1), in fp64 on the CPU.

    Raises:
        ValueError: similarity "outputs" where the block is no module of its own.
    """
    if similarity == "outputs":
        check_own_modules(layers, "similarity", "outputs", "Group by the router: `similarity='router'`.")
    sums: dict[str, tuple[Any, Any]] = {}

    def see(name: str, layer: FfnMoeLinear, x: Tensor, routing: Routing, real: Tensor | None) -> None:
        number = layer.num_experts[adapter_name]
        if similarity == "router":
            logits = _counted(routing.router_logits[:, :number], real)
            inner = logits.T @ logits
        else:
            block = model.base_model.model.get_submodule(name)
            each = torch.stack(list(block_changes(block, layer, adapter_name, x, routing, real)[1])).flatten(1)
            inner = each @ each.T
        usage, products = sums.get(name, (0.0, 0.0))
        gates = _counted(dense_weights(routing)[:, :number], real)
        sums[name] = usage + gates.sum(0).double().cpu(), products + inner.double().cpu()

    if not layers:
        return {}
    with observing_blocks(model, layers, adapter_name, see):
        _read(model, batches)
    if not sums:
        raise reached_no_expert(adapter_name)
    return {name: (usage, cosines(products)) for name, (usage, products) in sums.items()}


@torch.no_grad()
def merged_blocks(
    model: PeftModel, layers: Blocks, batches: list[Batch], adapter_name: str, found: dict[str, Groups], merge: str
) -> dict[str, list[dict[str, Tensor]]]:
    """Block -> the new lora_A and lora_B of each of its linears, in the order of `together`."""
    if not layers:
        return {}
    sums = {name: [Sums() for _ in together(layer)] for name, layer in layers.items()}

    def see(name: str, layer: FfnMoeLinear, x: Tensor, routing: Routing, real: Tensor | None) -> None:
        tokens = _counted(x.reshape(-1, x.shape[-1]), real).to(routing_dtype(x.dtype))
        gates = _counted(dense_weights(routing)[:, : layer.num_experts[adapter_name]], real)
        for part, its in zip(together(layer)[:-1], sums[name], strict=False):
            its.add(part.experts(adapter_name), tokens, gates, found[name].groups)

    def see_hidden(name: str, last: FfnMoeLinear, h: Tensor) -> None:
        assert last.block is not None
        assert last.block.pending is not None
        routing = last.block.pending.routing
        h = h.reshape(-1, *h.shape[-2:]).to(routing_dtype(h.dtype))
        real = last.context.real_tokens(len(h))
        index = routing.top_k_index if routing.top_k_index is None else _counted(routing.top_k_index, real)
        slots = _counted(h, real), _counted(routing.top_k_weights, real), index
        sums[name][-1].add_slots(last.experts(adapter_name), *slots, found[name].groups)

    with observing_blocks(model, layers, adapter_name, see), _observing_hidden(layers, see_hidden):
        _read(model, batches)
    for its in sums.values():
        its[-1].usage = its[0].usage
    return {
        name: [
            merged_factors(part.experts(adapter_name), found[name].groups, part_sums, merge)
            for part, part_sums in zip(together(layer), sums[name], strict=True)
        ]
        for name, layer in layers.items()
    }


@contextmanager
def _observing_hidden(layers: Blocks, see: Any) -> Iterator[None]:
    """Call `see(name, last linear, h)` with the hidden units `[*, K, f]` of every slot: whoever watches a linear has the
    block run its own code, in which they stand."""
    handles = []
    try:
        for name, layer in layers.items():
            last = together(layer)[-1]
            handles.append(last.register_forward_pre_hook(lambda module, args, name=name: see(name, module, args[0])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _counted(tokens: Tensor, real: Tensor | None) -> Tensor:
    return tokens if real is None else tokens[real]


def _read(model: PeftModel, batches: list[Batch]) -> None:
    for batch in batches:
        model(**on_device(batch, model))
