"""What a config would adapt in a model, layer by layer, and what that costs; nothing is injected into the model itself."""

import copy
from dataclasses import replace
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from moe_peft.allocation import parse
from moe_peft.budget import count_config
from moe_peft.config import MoeConfig
from moe_peft.gain import Site
from moe_peft.tuners.base import MoeTunerLayer, layer_place


Costs = list[list[list[int]]]
"""Trained parameters, `[layer][numbers of experts][ranks]`."""


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device."""
    empty: dict[int, Any] = {}
    for parameter in model.parameters():
        empty[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        empty[id(buffer)] = torch.empty_like(buffer, device="meta")
    for module in model.modules():  # bitsandbytes' 8-bit layers keep their weight in a state as well
        for held in getattr(getattr(module, "state", None), "__dict__", {}).values():
            if isinstance(held, torch.Tensor):
                empty[id(held)] = torch.empty_like(held, device="meta")
    return copy.deepcopy(model, empty)


def find_sites(skeleton: nn.Module, config: MoeConfig) -> tuple[list[Site], int]:
    """What the config would adapt, by router; and how many layers the model has.

    Raises:
        ValueError: if a target lies in no numbered layer, or targets lie in several lists of layers.
    """
    blocks: dict[int, list[tuple[str, Any]]] = {}
    lists = set()
    for name, module in _adapted(skeleton, config, 0, 0):
        place = layer_place(name)
        if place is None:
            raise ValueError(
                f"The target '{name}' has no layer number in its name, so no layer could be given experts for it. Exclude "
                f"that module: `exclude_modules=['{name.rsplit('.', 1)[-1]}']`."
            )
        lists.add(place[0])
        block = getattr(module, "block", None)
        blocks.setdefault(id(module if block is None else block), []).append((name, module))
    if len(lists) > 1:
        raise ValueError(
            f"The targets lie in {len(lists)} lists of layers ({', '.join(sorted(lists))}), and one list of numbers is "
            "written for one of them. Narrow `target_modules` or `exclude_modules` to one."
        )
    total = len(list(skeleton.get_submodule(lists.pop()).children()))
    return [_site(members) for members in blocks.values()], total


def _site(members: list[tuple[str, Any]]) -> Site:
    first, module = members[0]
    number = (layer_place(first) or ("", 0))[1]
    block = getattr(module, "block", None)
    if block is None:
        return Site(number, (first,), routed=not hasattr(module, "block"))
    names = {module.name: name for name, module in members}
    return Site(number, tuple(names[name] for name in block.names.all), len(block.names.ins))


def _adapted(skeleton: nn.Module, config: MoeConfig, experts: int, r: int) -> list[tuple[str, MoeTunerLayer]]:
    """The config's layers by module name, with these numbers everywhere (0: any)."""
    chosen = replace(config, num_experts=experts or max(parse(config.num_experts, "num_experts")), r=r or 1)
    chosen.inference_mode = False
    adapted = get_peft_model(copy.deepcopy(skeleton), chosen, low_cpu_mem_usage=True)
    named = [
        (n.removeprefix("base_model.model."), m) for n, m in adapted.named_modules() if isinstance(m, MoeTunerLayer)
    ]
    return named


def layer_costs(
    skeleton: nn.Module, config: MoeConfig, numbers: list[int], experts: list[list[int]], ranks: list[list[int]]
) -> tuple[Costs, int]:
    """Trained parameters of each layer, `[layer][n][m]`, and those that lie in none (`modules_to_save`).

    Every number of experts is counted at ranks 1 and 2; with the rank, parameters grow in a straight line.
    """

    def counted(n: int, r: int) -> dict[int, int]:
        of_layer = dict.fromkeys(numbers, 0)
        for name, module in _adapted(skeleton, config, n, r):
            of_layer[(layer_place(name) or ("", 0))[1]] += sum(
                p.numel() for p in module.parameters() if p.requires_grad
            )
        return of_layer

    line = {n: (counted(n, 1), counted(n, 2)) for n in sorted({n for row in experts for n in row})}

    def cost(layer: int, n: int, r: int) -> int:
        one, two = (at[layer] for at in line[n])
        return one + (r - 1) * (two - one)

    costs = [
        [[cost(layer, n, r) for r in rs] for n in es] for layer, es, rs in zip(numbers, experts, ranks, strict=True)
    ]
    any_n = experts[0][0]
    whole = count_config(skeleton, replace(config, num_experts=any_n, r=1)).trainable
    return costs, whole - sum(line[any_n][0].values())
