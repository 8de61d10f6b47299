"""Experts and domains by hand, in use: `with moe_peft.routing(disable=[...])` and `model.generate(..., domain="law")`.

What is asked stands in one context variable, so that it holds for the thread (or the asyncio task) that asked and for no
other: two requests served side by side do not see each other's. A thread that is started within the block does not
inherit it; a `domain` given to `generate` is set by the thread that generates.

It is for inference alone. In training the decision would have to be made again when a checkpointed layer is recomputed,
on another thread and after the block has ended; `expert_groups` and `task_types` are the means there.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar, Token
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_peft.context import RoutingContext
from moe_peft.errors import nearest, refuse
from moe_peft.overrides import Override
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


class Standing:
    """All open blocks of a thread, and what they come to for each router, worked out once.

    Attributes:
        blocks: outermost first.
        rows: of the batch that `generate` was called with, or 0 outside it: within, beams and samples multiply the rows.
        by_router: context's id -> router's id -> what it is to do.
    """

    def __init__(self, blocks: tuple[Asked, ...], rows: int = 0) -> None:
        self.blocks, self.rows = blocks, rows
        self.by_router: dict[int, dict[int, Override]] = {}
        self._about: dict[int, Asked] = {}

    def about(self, context: RoutingContext) -> Asked:
        """The blocks about one model as one: an inner block adds to an outer one, and wins where both name one value."""
        if id(context) not in self._about:  # asked by every router in every pass
            self._about[id(context)] = self._joined_blocks(context)
        return self._about[id(context)]

    def _joined_blocks(self, context: RoutingContext) -> Asked:
        found = [b for b in self.blocks if b.contexts is None or id(context) in b.contexts]
        whole = Asked()
        for b in found:
            whole = Asked(
                None,
                *(_joined(mine, new) for mine, new in zip(whole[1:4], b[1:4], strict=True)),
                {**whole.weights, **b.weights},
                *(old if new is None else new for old, new in zip(whole[5:], b[5:], strict=True)),
            )
        return whole


_standing: ContextVar[Standing | None] = ContextVar("moe_peft_routing", default=None)
_lock = threading.Lock()
_open = 0


def _enter(standing: Standing) -> Token:
    global _open
    with _lock:
        _open += 1
        RoutingContext.controlled = True
    return _standing.set(standing)


def _leave(token: Token) -> None:
    global _open
    _standing.reset(token)
    with _lock:
        _open -= 1
        RoutingContext.controlled = _open > 0


@contextmanager
def routing(
    model: nn.Module | None = None,
    *,
    disable: Experts = (),
    ablate: Experts = (),
    force: Experts = (),
    weights: Mapping[int | str, float] | None = None,
    domain: int | str | Sequence[int | str] | None = None,
    top_k: int | None = None,
    gate_floor: float | None = None,
) -> Iterator[None]:
    """Within the block the routers decide as asked; in evaluation mode, on this thread.

    Experts are named as `layer.expert_names(adapter_name)` has them: "0", "1" ... (or 0, 1 ...) where the adapter gives no
    names. For `disable`, `ablate` and `force` a dict `{"layers.3": [0, 2]}` asks only the layers whose name contains its
    key as whole parts. Blocks may be nested: the inner adds to the outer.

    Args:
        model: with routed layers; None is every model that runs in the block. With it, what does not fit is refused on
            entering the block, without it by the model's first pass.
        disable: never chosen; the next expert takes the slot (MoTE, arXiv:2502.11096).
        ablate: chosen as ever, and add nothing: a hole (MoTE). In a mixture of FFN blocks, the frozen block alone.
        force: always among the chosen, with the weight that the rule gives them then.
        weights: expert -> its weight for every token, at least 0; such experts are forced. The others keep theirs.
        domain: the expert that answers, alone and with weight 1, or one name for each row of the batch. Needs named
            experts, or `expert_groups` (also those of `routing="given"`), whose numbers are the domains then.
        top_k: experts per token, in place of the adapter's.
        gate_floor: 0 to 1; chosen experts below this share of the token's largest weight are dropped, and the others
            share their weight.

    Raises:
        ValueError: an expert, a domain or a layer that there is not, no expert left, more forced than chosen, a weight
            that is negative or not finite, another number of domains than rows, or a model in training.
    """
    contexts = None if model is None else frozenset(map(id, _contexts(model)))
    block = Asked(
        contexts,
        _by_layer("disable", disable),
        _by_layer("ablate", ablate),
        _by_layer("force", force),
        _checked_weights(weights or {}),
        _checked_domain(domain),
        _checked_top_k(top_k),
        _checked_floor(gate_floor),
    )
    with _asking(block, model):
        yield


@contextmanager
def seeing(model: nn.Module, see: See) -> Iterator[None]:
    """Within the block, every decision of the model's routers in evaluation mode is shown to `see(router, routing)`."""
    with _asking(Asked(frozenset(map(id, _contexts(model))), see=see), model):
        yield


@contextmanager
def _asking(block: Asked, model: nn.Module | None) -> Iterator[None]:
    outer = _standing.get()
    standing = Standing((*(() if outer is None else outer.blocks), block), 0 if outer is None else outer.rows)
    if model is not None:
        work_out(standing, model)
    token = _enter(standing)
    try:
        yield
    finally:
        _leave(token)


def override_of(router: Any, context: RoutingContext) -> tuple[Override, See | None] | None:
    """What this thread asks of a router, or None. Read only while `RoutingContext.controlled`.

    Raises:
        ValueError: in training; or where the model was not given and its own forward has not been called.
    """
    standing = _standing.get()
    if standing is None:
        return None
    asked = standing.about(context)
    if not asked.changes and asked.see is None:
        return None
    if router.training and asked.changes:
        raise _in_training()
    known = standing.by_router.get(id(context))
    if known is None and asked.changes:
        remedy = "Give it: `with moe_peft.routing(model, ...)`. Its layers were called without the model around them."
        raise refuse("model", None, "the model whose routers are meant", remedy)
    if known is not None and id(router) not in known:
        remedy = "Open the block again: the adapter was added within it."
        raise refuse("model", "changed", "as it was on entering `moe_peft.routing`", remedy)
    return (Override() if known is None else known[id(router)]), asked.see


# --- the model's side ---


class ModelControl:
    """On one model: takes `domain` out of the arguments of its forward and of `generate`, and works out what is asked.

    Its hooks and its `generate` are bound methods, so that a deep copy of the model has its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tokens = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.model, self.tokens = values["model"], threading.local()

    @classmethod
    def install(cls, model: nn.Module) -> None:
        """On a model that has none yet."""
        if any(isinstance(getattr(hook, "__self__", None), cls) for hook in model._forward_pre_hooks.values()):
            return
        control = cls(model)
        model.register_forward_pre_hook(control.before, with_kwargs=True)
        model.register_forward_hook(control.after, always_call=True)
        # transformers' generate knows no arguments but those of the model's own code.
        if hasattr(type(model), "generate") and "generate" not in model.__dict__:
            model.generate = control.generate

    @classmethod
    def release(cls, model: nn.Module) -> None:
        """Take everything off again, for when the model gets its linear layers back."""
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), cls):
                    del hooks[key]
                    model._forward_pre_hooks_with_kwargs.pop(key, None)
                    model._forward_hooks_always_called.pop(key, None)
        if isinstance(getattr(model.__dict__.get("generate"), "__self__", None), cls):
            del model.__dict__["generate"]

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if not RoutingContext.controlled and "domain" not in kwargs:
            return None
        domain = kwargs.pop("domain", None)
        standing = _standing.get()
        if domain is not None:
            block = Asked(frozenset(map(id, _contexts(module))), domain=_checked_domain(domain))
            standing = Standing((*(standing.blocks if standing else ()), block), standing.rows if standing else 0)
            self._pushed().append(_enter(standing))
        else:
            self._pushed().append(None)
        if standing is not None:
            try:
                work_out(standing, module)
                _check_rows(standing, module, _rows_of(args, kwargs))
            except BaseException:
                self.after(module, args, None)
                raise
        return args, kwargs

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        pushed = self._pushed()
        if pushed and (token := pushed.pop()) is not None:
            _leave(token)

    def _pushed(self) -> list[Token | None]:
        if not hasattr(self.tokens, "pushed"):
            self.tokens.pushed = []
        return self.tokens.pushed

    def generate(self, *args: Any, domain: Any = None, **kwargs: Any) -> Any:
        """transformers' `generate`, with `domain` as in `moe_peft.routing`: a name, or one for each row of the prompts."""
        own = type(self.model).generate
        if domain is None and _standing.get() is None:
            return own(self.model, *args, **kwargs)
        with nullcontext() if domain is None else routing(self.model, domain=domain):
            standing = _standing.get()
            assert standing is not None
            rows = _rows_of(args, kwargs)
            _check_rows(standing, self.model, rows)
            inside = Standing(standing.blocks, rows or -1)
            inside.by_router = standing.by_router
            token = _enter(inside)
            try:
                return own(self.model, *args, **kwargs)
            finally:
                _leave(token)


def _rows_of(args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Rows of the batch, 0 where no argument says it."""
    names = ("input_ids", "inputs", "inputs_embeds", "input_features", "attention_mask", "decoder_input_ids")
    for value in (*args[:1], *(kwargs.get(name) for name in names)):
        if isinstance(value, Tensor) and value.dim() >= 2:
            return value.shape[0]
    return 0


def _check_rows(standing: Standing, model: nn.Module, rows: int) -> None:
    """Refuse a number of domains that is not that of the rows; within `generate`, rows may be beams."""
    for context in _contexts(model):
        domain = standing.about(context).domain
        if domain is None or isinstance(domain, (int, str)) or not rows:
            continue
        fits = rows % len(domain) == 0 if standing.rows else rows == len(domain)
        if not fits:
            raise _wrong_rows(list(domain), rows)


def _wrong_rows(domains: list[Any], rows: int) -> ValueError:
    remedy = "Give one name for all rows, or each row its own; beams and samples of a row follow it."
    return refuse("domain", domains, f"one name, or {rows} names, one per row of the batch", remedy)


def rows_of_domains(domains: Tensor, tokens: int, rows: int) -> Tensor:
    """`domains [B]` spread over the tokens, `[tokens]`; with beams or samples, each counts for all of its row.

    Args:
        domains: one for each row, or a single one.
        tokens: T.
        rows: of how many rows the tokens are, or 0 where it is not known.

    Raises:
        ValueError: if the rows are not as many, nor a multiple.
    """
    if len(domains) == 1:
        return domains.expand(tokens)
    rows = rows or len(domains)
    if rows % len(domains) or tokens % rows:
        raise _wrong_rows(domains.tolist(), rows)
    return domains.repeat_interleave(tokens // len(domains))


# --- what is asked, for each router ---


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


def work_out(standing: Standing, model: nn.Module) -> None:
    """Find what each router of `model` is to do, once for each context.

    Raises:
        ValueError: see `routing`.
    """
    for context in _contexts(model):
        if id(context) in standing.by_router:
            continue
        asked = standing.about(context)
        if not asked.changes:
            continue
        if model.training:
            raise _in_training()
        places = _places(model, context)
        _check_known(asked, places)
        standing.by_router[id(context)] = {id(place.router): _override(asked, place) for place in places}


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
    places = [place for context in _contexts(model) for place in _places(model, context)]
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
    for domain in _as_list(asked.domain):
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
        domains = [_number(domain, place.domains) for domain in _as_list(asked.domain)]
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
            raise refuse("force", names, allowed, "Raise `top_k` as well, or force fewer.")
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


def _in_training() -> ValueError:
    remedy = "Call `model.eval()`. In training `expert_groups` and `task_types` say where rows may go."
    return refuse("training", True, "False within `moe_peft.routing` and with `domain`", remedy)


# --- what was written ---


def _by_layer(field: str, experts: Any) -> dict[str, Sequence[int | str]]:
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


def _checked_weights(weights: Any) -> dict[int | str, float]:
    if not isinstance(weights, Mapping):
        raise refuse("weights", weights, "a dict from experts to weights", "Write {'law': 0.7, 'code': 0.3}.")
    _checked_experts("weights", list(weights))
    for expert, weight in weights.items():
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            allowed = f"a finite number of at least 0 for {expert!r}"
            raise refuse("weights", weight, allowed, "1 is the whole of what the expert adds.")
    return dict(weights)


def _checked_domain(domain: Any) -> int | str | tuple[int | str, ...] | None:
    if domain is None or isinstance(domain, str) or (isinstance(domain, int) and not isinstance(domain, bool)):
        return domain
    names = domain if isinstance(domain, (list, tuple)) else ()
    if not names or any(isinstance(d, bool) or not isinstance(d, (int, str)) for d in names):
        raise refuse("domain", domain, "a name, or a list with one for each row", "Write 'law' or ['law', 'code'].")
    return tuple(names)


def _checked_top_k(top_k: Any) -> int | None:
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise refuse("top_k", top_k, "a whole number of at least 1", "Leave it out for the adapter's own.")
    return top_k


def _checked_floor(floor: Any) -> float | None:
    number = isinstance(floor, (int, float)) and not isinstance(floor, bool)
    if floor is not None and not (number and 0 <= floor <= 1):
        raise refuse(
            "gate_floor", floor, "a number from 0 to 1", "0.2 drops experts below a fifth of the largest weight."
        )
    return floor


def _as_list(domain: Any) -> list[int | str]:
    return [domain] if isinstance(domain, (int, str)) else list(domain)


def _joined(
    a: Mapping[str, Sequence[int | str]], b: Mapping[str, Sequence[int | str]]
) -> dict[str, Sequence[int | str]]:
    return {layer: [*a.get(layer, ()), *b.get(layer, ())] for layer in {**a, **b}}


def _contexts(model: nn.Module) -> list[RoutingContext]:
    found = {id(c): c for m in model.modules() if isinstance(c := getattr(m, "context", None), RoutingContext)}
    if not found:
        remedy = "Give the PEFT model that holds the adapter."
        raise refuse("model", type(model).__name__, "a model with routed layers", remedy)
    return list(found.values())
