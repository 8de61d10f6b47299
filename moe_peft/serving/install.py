"""Puts an adapter's routed layers into a model, and its weights into the layers."""

import torch
from torch import Tensor, nn

from moe_peft.errors import refuse
from moe_peft.ffn_names import block_among
from moe_peft.serving.adapter import Adapter
from moe_peft.serving.blocks import mix
from moe_peft.serving.routed import Decision, LoraExperts, RankExperts, hosted
from moe_peft.tuners.scopes import unit_key


def install(model: nn.Module, adapter: Adapter) -> dict[str, str]:
    """Wrap every linear that the adapter names; its weights are not read yet.

    Args:
        model: of transformers, with its head or without; changed in place.
        adapter: that fits it.

    Returns:
        the adapter's names of the linears -> the model's own.

    Raises:
        ValueError: if a linear is not there, of another width, or in a block whose code is not known. Then nothing has
            been changed.
    """
    places = {module: _place(model, module) for module in adapter.shapes}
    _check_widths(model, adapter, places)
    by_parent: dict[str, dict[str, str]] = {}
    for module, place in places.items():
        parent, _, name = place.rpartition(".")
        by_parent.setdefault(parent, {})[name] = module
    for parent_name, children in by_parent.items():
        parent = model.get_submodule(parent_name)
        shapes = {name: adapter.shapes[module] for name, module in children.items()}
        mixes = adapter.kind == "ffn_moe" and any("router" in parts for parts in shapes.values())
        if mixes:
            names = block_among({name: (parts["lora_A"][2], parts["lora_B"][2]) for name, parts in shapes.items()})
            if names is None or set(names.all) != set(shapes):
                allowed = "the linears of one FFN block"
                remedy = "Save the adapter again with this version of moe_peft."
                raise refuse(f"the experts at '{parent_name}'", sorted(shapes), allowed, remedy)
            mix(parent, parent_name, names, adapter.config, shapes)
            continue
        kind = RankExperts if adapter.kind == "rank_moe" else LoraExperts
        for name in children:
            setattr(parent, name, kind(getattr(parent, name), adapter.config, shapes[name]))
        hosted(parent, children)
        scope = getattr(adapter.config, "router_scope", "linear")
        if scope != "linear":
            _share_decisions(parent, children, scope)
    return places


def _place(model: nn.Module, module: str) -> str:
    """The model's own name of a linear, without the prefix of the class with a head where the model has none.

    Raises:
        ValueError: if there is no such linear.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for place in (module, module.removeprefix(prefix)):
        try:
            found = model.get_submodule(place)
        except AttributeError:
            continue
        if isinstance(found, nn.Linear):
            return place
    raise ValueError(
        f"The adapter has experts for '{module}', but {type(model).__name__} has no linear layer of that name. Serve the base "
        "model that the adapter was trained on."
    )


def _check_widths(model: nn.Module, adapter: Adapter, places: dict[str, str]) -> None:
    for module, place in places.items():
        linear, parts = model.get_submodule(place), adapter.shapes[module]
        has, wants = (linear.in_features, linear.out_features), (parts["lora_A"][2], parts["lora_B"][2])
        if has != wants:
            raise ValueError(
                f"The adapter's experts for '{module}' lead from {wants[0]} to {wants[1]} units, the model's layer from "
                f"{has[0]} to {has[1]}. Serve the base model that the adapter was trained on."
            )


def _share_decisions(parent: nn.Module, adapted: dict[str, str], scope: str) -> None:
    """Join the linears that follow one router, the first of them in the model's order."""
    units: dict[str, list[LoraExperts]] = {}
    for name, child in parent.named_children():
        if name in adapted and isinstance(child, LoraExperts):
            units.setdefault(unit_key(scope, "", name), []).append(child)
    for layers in units.values():
        if layers[0].routes is None or any(layer.routes is not None for layer in layers[1:]):
            continue  # a single expert each
        decision = Decision()
        for layer in layers:
            layer.decision = decision
        layers[-1].last = True


def load(model: nn.Module, adapter: Adapter, places: dict[str, str]) -> set[str]:
    """Fill the routed layers from the adapter's file.

    Parameters keep the dtype and device that the model has given them; biases of a router keep the dtype they were stored
    in, since a rounded one chooses otherwise.

    Args:
        model, adapter, places: as `install` had and gave them.

    Returns:
        the names of the parameters, in the model.
    """
    loaded = set()
    for module, place in places.items():
        layer, tensors = model.get_submodule(place), adapter.tensors(module)
        for part in ("lora_A", "lora_B"):  # ranks of earlier tasks come first
            tensors[part] = _joined(tensors.pop(f"frozen_{part[-1]}", None), tensors[part])
        for part, tensor in tensors.items():
            owner = layer if hasattr(layer, part) else layer.routes
            name = part if owner is layer else f"routes.{part}"
            held = getattr(owner, part)
            if isinstance(held, nn.Parameter):
                held.data.copy_(tensor)
                loaded.add(f"{place}.{name}")
            else:
                setattr(owner, part, tensor.to(held.device))
    return loaded


def _joined(earlier: Tensor | None, new: Tensor) -> Tensor:
    return new if earlier is None else torch.cat((earlier.to(new.dtype), new))
