"""Experts and domains by hand, in use: `with moe_peft.routing(disable=[...])` and `model.generate(..., domain="law")`.

What is asked stands in one context variable, so that it holds for the thread (or the asyncio task) that asked and for no
other: two requests served side by side do not see each other's. A thread that is started within the block does not
inherit it; a `domain` given to `generate` is set by the thread that generates.

It is for inference alone. In training the decision would have to be made again when a checkpointed layer is recomputed,
on another thread and after the block has ended; `expert_groups` and `task_types` are the means there.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar, Token
from typing import Any

from torch import Tensor, nn

from moe_peft.context import RoutingContext
from moe_peft.errors import refuse
from moe_peft.overrides import Override
from moe_peft.routing_asked import (
    Asked,
    Experts,
    See,
    by_layer,
    checked_domain,
    checked_floor,
    checked_top_k,
    checked_weights,
    joined,
)
from moe_peft.routing_places import contexts_of, in_training, overrides_of


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
                *(joined(mine, new) for mine, new in zip(whole[1:4], b[1:4], strict=True)),
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
    contexts = None if model is None else frozenset(map(id, contexts_of(model)))
    block = Asked(
        contexts,
        by_layer("disable", disable),
        by_layer("ablate", ablate),
        by_layer("force", force),
        checked_weights(weights or {}),
        checked_domain(domain),
        checked_top_k(top_k),
        checked_floor(gate_floor),
    )
    with _asking(block, model):
        yield


@contextmanager
def seeing(model: nn.Module, see: See) -> Iterator[None]:
    """Within the block, every decision of the model's routers in evaluation mode is shown to `see(router, routing)`."""
    with _asking(Asked(frozenset(map(id, contexts_of(model))), see=see), model):
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
        raise in_training()
    known = standing.by_router.get(id(context))
    if known is None and asked.changes:
        remedy = "Give it: `with moe_peft.routing(model, ...)`. Its layers were called without the model around them."
        raise refuse("model", None, "the model whose routers are meant", remedy)
    if known is not None and id(router) not in known:
        remedy = "Open the block again: the adapter was added within it."
        raise refuse("model", "changed", "as it was on entering `moe_peft.routing`", remedy)
    return (Override() if known is None else known[id(router)]), asked.see


def work_out(standing: Standing, model: nn.Module) -> None:
    """Find what each router of `model` is to do, once for each context.

    Raises:
        ValueError: see `routing`.
    """
    for context in contexts_of(model):
        if id(context) in standing.by_router:
            continue
        asked = standing.about(context)
        if not asked.changes:
            continue
        standing.by_router[id(context)] = overrides_of(asked, model, context)


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
            block = Asked(frozenset(map(id, contexts_of(module))), domain=checked_domain(domain))
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
        with ExitStack() as calls:
            for context in contexts_of(self.model):
                calls.enter_context(context.one_call(_columns_of(args, kwargs)))
            return self._generate(domain, args, kwargs)

    def _generate(self, domain: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
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


def _columns_of(args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Length of the prompts, 0 where no argument says it."""
    for value in (kwargs.get("inputs_embeds"), *args[:1], kwargs.get("input_ids"), kwargs.get("inputs")):
        if isinstance(value, Tensor) and value.dim() >= 2:
            return value.shape[1]
    return 0


def _check_rows(standing: Standing, model: nn.Module, rows: int) -> None:
    """Refuse a number of domains that is not that of the rows; within `generate`, rows may be beams."""
    for context in contexts_of(model):
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
