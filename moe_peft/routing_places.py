"""Where a model's routers are, what their experts are called, and what each of them is to do where something is asked.

`moe_peft.routing_asked` checks what was written by itself; here it is held against the routers that there are.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_peft.context import RoutingContext, contexts_in
from moe_peft.errors import nearest, refuse
from moe_peft.overrides import Override
from moe_peft.routing_asked import Asked, as_list


class Place(NamedTuple):
    """A router that decides, where it is, and what its experts are called."""

    layer: str
    router: Any
    names: list[str]
    named: bool
    active: bool
    adapter: str

    @property
    def domains(self) -> list[str] | None:
        """What `domain` may be here."""
        if self.named:
            return self.names
        groups = getattr(self.router, "expert_groups", None)
        return None if groups is None else [str(group) for group in range(len(groups))]


def overrides_of(asked: Asked, model: nn.Module, context: RoutingContext) -> dict[int, Override]:
    """What each router of `model` that shares `context` is to do, by the router's id.

    Raises:
        ValueError: see `moe_peft.routing`.
    """
    if model.training:
        raise in_training()
    places = _places(model, context)
    _check_known(asked, places)
    return {id(place.router): _override(asked, place) for place in places}


def _places(model: nn.Module, context: RoutingContext) -> list[Place]:
    places = []
    for name, layer in model.named_modules():
        if getattr(layer, "context", None) is not context or not hasattr(layer, "expert_names"):
            continue
        held = getattr(layer, layer.adapter_layer_names[0])  # type: ignore[index]
        for adapter in held:
            router = layer.experts(adapter)  # type: ignore[operator]
            if getattr(router, "decides", False):
                names = layer.expert_names(adapter)  # type: ignore[operator]
                named = names != [str(number) for number in range(len(names))]
                active = adapter in layer.active_adapters  # type: ignore[operator]
                places.append(
                    Place(name.removeprefix("base_model.model."), router, names, named, bool(active), adapter)
                )
    if not any(place.active for place in places):
        remedy = "Load or activate an adapter that routes: a plain LoRA and a single expert have nothing to choose."
        raise refuse("model", type(model).__name__, "a model with an active adapter that routes", remedy)
    return places


def places_of(model: nn.Module, adapter_name: str) -> list[Place]:
    """The routers of an active adapter that decide, in the order of the layers.

    Raises:
        ValueError: if it has none, or is not active.
    """
    places = [place for context in contexts_of(model) for place in _places(model, context)]
    found = [place for place in places if place.adapter == adapter_name and place.active]
    if not found:
        names = sorted({place.adapter for place in places if place.active})
        remedy = f"Active ones are: {', '.join(names)}."
        raise refuse("adapter_name", adapter_name, "an active adapter that routes", remedy)
    return found


def _at(place: Place, experts: Mapping[str, Sequence[int | str]]) -> list[int]:
    """The numbers of the experts that are meant at a place; those that it does not have are left out."""
    wanted = [e for layer, some in experts.items() if _matches(layer, place.layer) for e in some]
    found = (_number(expert, place.names) for expert in wanted)
    return sorted({number for number in found if number is not None})


def _number(expert: int | str, names: list[str]) -> int | None:
    if isinstance(expert, str):
        return names.index(expert) if expert in names else None
    return expert if 0 <= expert < len(names) else None


def _matches(key: str, layer: str) -> bool:
    return not key or f".{key}." in f".{layer}."


def _check_known(asked: Asked, places: list[Place]) -> None:
    """Refuse what no active router has."""
    active = [place for place in places if place.active]
    names = list(dict.fromkeys(name for place in active for name in place.names))
    for field, experts in (("disable", asked.disable), ("ablate", asked.ablate), ("force", asked.force)):
        for layer, some in experts.items():
            there = [place for place in active if _matches(layer, place.layer)]
            if not there:
                layers = list(dict.fromkeys(place.layer for place in active))
                allowed = f"a part of the name of a layer with a router, such as {layers[0]!r} or {layers[-1]!r}"
                raise refuse(field, layer, allowed, "Layers that follow another's router have none.")
            for expert in some:
                _check_expert(field, expert, there, names)
    for expert in asked.weights:
        _check_expert("weights", expert, active, names)
    if asked.top_k is not None:
        _check_slots(asked.top_k, [place.router for place in active])
    if asked.domain is None:
        return
    domains = list(dict.fromkeys(name for place in active for name in place.domains or ()))
    if not domains:
        remedy = "`domain_moe` names its experts; `force` and `weights` take numbers."
        raise refuse("domain", asked.domain, "left out where the adapter's experts have no names", remedy)
    for domain in as_list(asked.domain):
        if _number(domain, domains) is None:
            allowed = "one of " + ", ".join(map(repr, domains))
            raise refuse("domain", domain, allowed, nearest(str(domain), domains))


def _check_slots(top_k: int, routers: list[Any]) -> None:
    most = max((int(router.num_experts) for router in routers if _has_slots(router)), default=0)
    if not most:
        allowed = f"left out with `routing` = {routers[0].routing!r}, which has no slots"
        raise refuse("top_k", top_k, allowed, "`gate_floor` drops the experts of small weight.")
    if top_k > most:
        raise refuse("top_k", top_k, f"at most {most}, what the largest router chooses from", "Lower it.")


def _check_expert(field: str, expert: int | str, places: list[Place], names: list[str]) -> None:
    if all(_number(expert, place.names) is None for place in places):
        numbers = all(name.isdigit() for name in names)
        allowed = f"experts from 0 to {len(names) - 1}" if numbers else "of " + ", ".join(map(repr, names))
        remedy = "Count from 0." if numbers else nearest(str(expert), names)
        raise refuse(field, expert, allowed, remedy)


def _override(asked: Asked, place: Place) -> Override:
    """What a router is to do, checked against what it has."""
    router, device = place.router, next(place.router.parameters()).device
    choices = int(router.num_experts)
    disabled, ablated, forced = (_at(place, experts) for experts in (asked.disable, asked.ablate, asked.force))
    given = {n: float(w) for e, w in asked.weights.items() if (n := _number(e, place.names)) is not None}
    forced = sorted({*forced, *given})
    domains = None
    if asked.domain is not None and place.domains is not None:
        domains = [_number(domain, place.domains) for domain in as_list(asked.domain)]
        if any(d is None for d in domains) and not place.active:
            domains = None
        elif any(d is None for d in domains):
            raise refuse("domain", asked.domain, "names that all active adapters know", f"{place.layer} has others.")
    _check_room(asked, place, disabled, forced, given, domains)

    def mask(numbers: Iterable[int]) -> Tensor | None:
        return _mask(numbers, choices, device) if numbers else None

    weights = None
    if given:
        weights = torch.zeros(choices, dtype=torch.float64, device=device)
        weights[list(given)] = torch.tensor(list(given.values()), dtype=torch.float64, device=device)
    return Override(
        mask(disabled),
        mask(forced),
        mask(ablated),
        mask(given),
        weights,
        None if asked.top_k is None or not _has_slots(router) else min(asked.top_k, choices),
        asked.gate_floor,
        None if domains is None else torch.tensor(domains, device=device),
        len(disabled),
        len(forced),
    )


def _mask(numbers: Iterable[int], choices: int, device: torch.device) -> Tensor:
    mask = torch.zeros(choices, dtype=torch.bool, device=device)
    mask[list(numbers)] = True
    return mask


def _check_room(
    asked: Asked,
    place: Place,
    disabled: list[int],
    forced: list[int],
    given: dict[int, float],
    domains: list[Any] | None,
) -> None:
    """Refuse what cannot be done together at one router."""
    router, at = place.router, f"in {place.layer}"
    off = set(disabled)
    if len(off) == len(place.names):
        remedy = "For the base model alone use `with model.disable_adapter()`."
        raise refuse("disable", [place.names[n] for n in disabled], f"some of the {len(off)} experts {at}", remedy)
    if off & set(forced):
        both = [place.names[n] for n in sorted(off & set(forced))]
        raise refuse("force", both, "experts that are not disabled", "Take them out of `disable` or of `force`.")
    _check_groups(place, off, domains)
    if domains is not None and place.named:
        others = {"force": asked.force, "weights": asked.weights, "top_k": asked.top_k, "gate_floor": asked.gate_floor}
        for field, value in others.items():
            if value:
                raise refuse(
                    field, value, "left out with `domain`, which has chosen", f"Remove `{field}` or `domain`."
                )
    if not forced:
        return
    if _has_slots(router) or router.top_k == 1:
        slots = min(asked.top_k or router.top_k, router.num_experts)
        if len(forced) > slots:
            names = [place.names[n] for n in forced]
            allowed = f"at most {slots} experts, as a token has {slots} slots {at}"
            field = "weights" if set(forced) <= set(given) else "force"
            more = "Raise `top_k` as well, or name fewer." if _has_slots(router) else "Its rule takes one: name one."
            raise refuse(field, names, allowed, more)
    if router.routing == "sparsegen" and set(forced) - set(given):
        names = [place.names[n] for n in forced if n not in given]
        remedy = "Give `weights={expert: 0.5}`: by its rule an expert that it leaves out weighs 0."
        raise refuse("force", names, "left out with `routing` = 'sparsegen'", remedy)


def _check_groups(place: Place, off: set[int], domains: list[Any] | None) -> None:
    """Every domain and every group that may come has an expert left."""
    groups = getattr(place.router, "expert_groups", None)
    if place.named and domains is not None:
        gone = [place.names[d] for d in domains if d in off]
        if gone:
            raise refuse("domain", gone[0], "a domain whose expert is not disabled", "Take it out of `disable`.")
    if groups is None or not off:
        return
    for number, row in enumerate(groups[:, : len(place.names)].tolist()):
        asked_for = domains is None or number in domains
        if asked_for and all(expert in off for expert, allowed in enumerate(row) if allowed):
            names = [place.names[n] for n in sorted(off)]
            raise refuse("disable", names, f"some of the experts of group {number}", "It would have no expert left.")


def _has_slots(router: Any) -> bool:
    """Whether K means anything to its rule."""
    return router.routing not in _WITHOUT_SLOTS


_WITHOUT_SLOTS = frozenset(
    {"softmax", "all", "sparsegen", "random", "given", "top_1", "top_1_hard", "top_1_straight_through"}
)


def in_training() -> ValueError:
    remedy = "Call `model.eval()`. In training `expert_groups` and `task_types` say where rows may go."
    return refuse("training", True, "False within `moe_peft.routing` and with `domain`", remedy)


def contexts_of(model: nn.Module) -> list[RoutingContext]:
    found = contexts_in(model)
    if not found:
        remedy = "Give the PEFT model that holds the adapter."
        raise refuse("model", type(model).__name__, "a model with routed layers", remedy)
    return found
