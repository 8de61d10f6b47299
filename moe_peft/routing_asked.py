"""What a user asks of the routers by hand, as a value, and the checks of what was written: see `moe_peft.routing`."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from moe_peft.errors import refuse
from moe_peft.routing import Routing


Experts = Sequence[int | str] | Mapping[str, Sequence[int | str]]
"""Names or numbers of experts; or layer -> those, for some layers alone."""

See = Callable[[Any, Routing], None]
"""Called with a router and its decision."""


class Asked(NamedTuple):
    """One `with` block.

    Attributes:
        contexts: whose models it is about, by id; None is every model.
        disable, ablate, force: layer (or "" for all) -> experts.
        weights: expert -> weight.
        domain: one name for all rows, or one for each.
        see: where decisions are shown to, for `expert_trace`.
    """

    contexts: frozenset[int] | None = None
    disable: Mapping[str, Sequence[int | str]] = {}
    ablate: Mapping[str, Sequence[int | str]] = {}
    force: Mapping[str, Sequence[int | str]] = {}
    weights: Mapping[int | str, float] = {}
    domain: int | str | Sequence[int | str] | None = None
    top_k: int | None = None
    gate_floor: float | None = None
    see: See | None = None

    @property
    def changes(self) -> bool:
        """Whether anything is asked beside looking."""
        return any(v is not None and v != {} for v in self[1:-1])


def by_layer(field: str, experts: Any) -> dict[str, Sequence[int | str]]:
    if isinstance(experts, Mapping):
        parts = {str(layer): _checked_experts(field, some) for layer, some in experts.items()}
        return {layer: some for layer, some in parts.items() if some}
    some = _checked_experts(field, experts)
    return {"": some} if some else {}


def _checked_experts(field: str, experts: Any) -> list[int | str]:
    listed = isinstance(experts, (list, tuple, set, frozenset, range))
    if not listed or any(isinstance(e, bool) or not isinstance(e, (int, str)) for e in experts):
        example = f"Write `{field}=[{experts!r}]`." if isinstance(experts, (int, str)) else "Write ['law'] or [0, 2]."
        raise refuse(field, experts, "a list of names or numbers of experts", example)
    return list(experts)


def checked_weights(weights: Any) -> dict[int | str, float]:
    if not isinstance(weights, Mapping):
        raise refuse("weights", weights, "a dict from experts to weights", "Write {'law': 0.7, 'code': 0.3}.")
    _checked_experts("weights", list(weights))
    for expert, weight in weights.items():
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            allowed = f"a finite number of at least 0 for {expert!r}"
            raise refuse("weights", weight, allowed, "1 is the whole of what the expert adds.")
    return dict(weights)


def checked_domain(domain: Any) -> int | str | tuple[int | str, ...] | None:
    if domain is None or isinstance(domain, str) or (isinstance(domain, int) and not isinstance(domain, bool)):
        return domain
    names = domain if isinstance(domain, (list, tuple)) else ()
    if not names or any(isinstance(d, bool) or not isinstance(d, (int, str)) for d in names):
        raise refuse("domain", domain, "a name, or a list with one for each row", "Write 'law' or ['law', 'code'].")
    return tuple(names)


def checked_top_k(top_k: Any) -> int | None:
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise refuse("top_k", top_k, "a whole number of at least 1", "Leave it out for the adapter's own.")
    return top_k


def checked_floor(floor: Any) -> float | None:
    number = isinstance(floor, (int, float)) and not isinstance(floor, bool)
    if floor is not None and not (number and 0 <= floor <= 1):
        raise refuse(
            "gate_floor", floor, "a number from 0 to 1", "0.2 drops experts below a fifth of the largest weight."
        )
    return floor


def as_list(domain: Any) -> list[int | str]:
    return [domain] if isinstance(domain, (int, str)) else list(domain)


def joined(
    a: Mapping[str, Sequence[int | str]], b: Mapping[str, Sequence[int | str]]
) -> dict[str, Sequence[int | str]]:
    return {layer: [*a.get(layer, ()), *b.get(layer, ())] for layer in {**a, **b}}
