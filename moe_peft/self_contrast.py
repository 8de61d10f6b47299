"""Self-contrast decoding (SCMoE, arXiv:2405.14507): the model against a weaker form of itself, as a logits processor.

    z = (1 + b) z_strong - b z_weak   where z_strong >= max z_strong + log a,   -inf elsewhere;   b = 0.5, a = 0.1

The strong pass is what `generate` does anyway. The weak one is, by `against`,

    "expert"   the routed experts replaced by the one of rank `rank` in the router's order, with the weight that those had
               together (SCMoE's; its rank 2 is `rank=2`)
    "base"     the frozen model without adapters
    "shared"   the shared experts alone, the routed ones left out

Each step is answered twice and two KV caches are kept: twice the time and the cache. The weak pass is a replay of the
strong one's inputs with a cache of its own, so padding, positions and whatever else a model is given are the same in
both. It has the structure of transformers' `UnbatchedClassifierFreeGuidanceLogitsProcessor`.
"""

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LogitsProcessor

from moe_peft.errors import nearest, refuse
from moe_peft.merge import routed_layers
from moe_peft.routing import Routing
from moe_peft.tuners.ffn_experts import FfnExperts
from moe_peft.tuners.linear_moe import RoutedLora


AGAINST = ("expert", "base", "shared")

_PLAIN = (
    "Self-contrast asks its second model once for each token of plain greedy decoding or sampling, and {}. Leave out "
    "`num_beams`, assisted and prompt-lookup decoding, and static caches; start each `generate` from the whole prompt."
)


class SelfContrast(LogitsProcessor):
    """Contrast a model with a weaker form of itself while it generates.

    ```python
    contrast = moe_peft.SelfContrast(model, against="base")
    model.generate(**inputs, logits_processor=[contrast])
    ```

    For greedy decoding and sampling, any batch, left-padded where rows differ, with or without a dynamic cache. One
    instance serves any number of calls of `generate`, one after the other.

    Args:
        model (`PeftModel`): the model that generates, with its adapter active.
        against (`str`, *optional*, defaults to `"base"`): "expert", "base" or "shared"; see the module.
        beta (`float`, *optional*, defaults to 0.5): how far to go from the weak model; 0 is the strong model alone.
        alpha (`float`, *optional*, defaults to 0.1): tokens less probable than this share of the best one's probability
            are left out. Above 0, at most 1, which leaves the best one.
        rank (`int`, *optional*): for "expert" alone, from 1, the router's first choice. Defaults to 2.

    Raises:
        ValueError: values out of range; an adapter without routed or without shared experts where those are asked for. In
            `generate`: beam search, assisted decoding, a static cache, a cache that was filled before.
    """

    def __init__(
        self,
        model: PeftModel,
        against: str = "base",
        beta: float = 0.5,
        alpha: float = 0.1,
        rank: int | None = None,
        adapter_name: str = "default",
    ) -> None:
        _check(model, against, beta, alpha, rank)
        self.model, self.against, self.beta, self.alpha = model, against, beta, alpha
        self.rank = 2 if rank is None else rank
        self.experts = _experts(model, against, self.rank, adapter_name)
        self.seen: list[dict[str, Any]] = []
        self.strong: Any = None
        self.own: Any = None
        self.tokens: Tensor | None = None
        self.asking = False
        watched = model.get_base_model()
        me = weakref.ref(self)

        def before(module: Any, args: tuple, kwargs: dict) -> None:
            contrast = me()
            if contrast is not None and not contrast.asking:
                contrast._watch(args, kwargs)

        weakref.finalize(self, watched.register_forward_pre_hook(before, with_kwargs=True).remove)

    def _watch(self, args: tuple, kwargs: dict) -> None:
        """Keep what the strong pass is given; an empty cache is the start of another call."""
        cache = kwargs.get("past_key_values")
        if getattr(cache, "is_compileable", False):
            raise ValueError(_PLAIN.format("this call has a static cache"))
        if cache is None:
            self.strong, self.seen = None, []
        elif cache is not self.strong:
            if cache.get_seq_length():
                raise ValueError(_PLAIN.format("this cache was filled before"))
            self.strong, self.own, self.seen, self.tokens = cache, copy.deepcopy(cache), [], None
        self.seen.append({"args": args, "kwargs": kwargs})

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The contrasted scores, `[B, V]`; `input_ids [B, S]` as `generate` passes them."""
        self._check_plain(input_ids, scores)
        weak = self._weak().to(scores)
        contrasted = (1 + self.beta) * scores - self.beta * weak
        unlikely = scores < scores.max(-1, keepdim=True).values + math.log(self.alpha)
        return contrasted.masked_fill(unlikely, float("-inf"))

    def _weak(self) -> Tensor:
        """The weak model's logits of the next token: its own pass over what the strong one was given since the last."""
        passes, self.seen, self.asking, out = self.seen, [], True, None
        try:
            with self._weaker():
                for given in passes:
                    kwargs = dict(given["kwargs"])
                    if self.strong is not None:
                        kwargs["past_key_values"] = self.own
                    out = self.model.get_base_model()(*given["args"], **kwargs)
        finally:
            self.asking = False
        assert out is not None  # `_check_plain` has seen a pass
        return out.logits[:, -1]

    def _weaker(self) -> Any:
        if self.against == "base":
            return self.model.disable_adapter()
        change = _shared_alone if self.against == "shared" else _only_of_rank(self.rank)
        return rerouted(self.experts, change) if self.experts else nullcontext()

    def _check_plain(self, input_ids: Tensor, scores: Tensor) -> None:
        if not self.seen:
            raise ValueError(_PLAIN.format("here the scores came without a pass of this model"))
        if self.tokens is not None and not torch.equal(input_ids[:, :-1], self.tokens):
            raise ValueError(_PLAIN.format("these tokens do not go on from the last ones"))
        if bool((scores.logsumexp(-1).abs() < 1e-4).all()):
            raise ValueError(_PLAIN.format("here the scores are log-probabilities, as in beam search"))
        self.tokens = input_ids if self.strong is not None else None


@contextmanager
def rerouted(experts: list[Any], change: Callable[[Routing, Any], Routing]) -> Iterator[None]:
    """While it lasts every router's decision passes through `change(routing, experts)`.

    The one place where this module reaches into routing; a general override can stand in for it.
    """

    def changed(module: Any) -> Callable[..., Routing]:
        routed = type(module).routed
        return lambda *args, **kwargs: change(routed(module, *args, **kwargs), module)

    for module in experts:
        module.routed = changed(module)
    try:
        yield
    finally:
        for module in experts:
            del module.routed


def _only_of_rank(rank: int) -> Callable[[Routing, Any], Routing]:
    """The expert of that rank in the order of the logits, with the summed weight of those that were chosen.

    Null and constant experts are not ranked. A selection bias is not looked at.
    """

    def change(routing: Routing, experts: Any) -> Routing:
        true = getattr(experts, "num_rows", experts.num_routed)
        index = routing.router_logits[:, :true].topk(rank, dim=-1).indices[:, -1:]
        return routing._replace(top_k_weights=routing.top_k_weights.sum(-1, keepdim=True), top_k_index=index)

    return change


def _shared_alone(routing: Routing, experts: Any) -> Routing:
    """No routed expert. In an FFN mixture that is a null expert, the frozen block: a weight of 0 would take that away."""
    total = routing.top_k_weights.sum(-1, keepdim=True)
    if isinstance(experts, FfnExperts):
        index = torch.full_like(total, experts.num_experts, dtype=torch.long)
        return routing._replace(top_k_weights=total, top_k_index=index)
    return routing._replace(top_k_weights=torch.zeros_like(routing.top_k_weights))


def _experts(model: PeftModel, against: str, rank: int, adapter_name: str) -> list[Any]:
    """The modules whose decision is changed."""
    if against == "base":
        return []
    modules = [layer.experts(adapter_name) for layer in routed_layers(model, adapter_name).values()]
    routing = [e for e in modules if isinstance(e, (RoutedLora, FfnExperts)) and getattr(e, "routes", False)]
    if not routing:
        raise refuse(
            "against",
            against,
            "'base' for an adapter whose layers route among no experts",
            "There is nothing to choose by rank or to leave out.",
        )
    shared = getattr(model.peft_config[adapter_name], "num_shared_experts", 0)
    if against == "shared" and not shared:
        raise refuse("against", against, "'expert' or 'base' without shared experts", "`num_shared_experts` is 0.")
    fewest = min(getattr(e, "num_rows", e.num_routed) for e in routing)
    if against == "expert" and rank > fewest:
        raise refuse("rank", rank, f"at most {fewest}, the experts of the smallest layer", "2 is SCMoE's.")
    return routing


def _check(model: Any, against: str, beta: float, alpha: float, rank: int | None) -> None:
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"`model` is a {type(model).__name__}, but must be a PeftModel: without an adapter nothing is weaker."
        )
    if against not in AGAINST:
        raise refuse("against", against, "one of " + ", ".join(map(repr, AGAINST)), nearest(str(against), AGAINST))

    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    if not number(beta) or beta < 0:
        raise refuse("beta", beta, "a number of at least 0", "SCMoE takes 0.5; 0 contrasts nothing.")
    if not number(alpha) or not 0 < alpha <= 1:
        raise refuse("alpha", alpha, "above 0 and at most 1", "SCMoE takes 0.1.")
    if rank is not None and against != "expert":
        raise refuse("rank", rank, f"left out with `against` = {against!r}", "It counts experts: use 'expert'.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise refuse("rank", rank, "a whole number of at least 1", "2 is SCMoE's.")
