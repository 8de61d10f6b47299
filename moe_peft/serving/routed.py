"""Routed layers for a server: the frozen linear, its low-rank experts and their router, from torch and the core alone.

The same functions compute here as in training: `bound_rules` makes the rule, `experts` and `ffn` hold the products. Only
what training needs is absent: no dropout, no balance, no mask of padding (a server has none), no choice between paths by
the number of tokens, so that one compiled graph serves every length.

All weights are plain parameters of the module that uses them. A server that puts its own class in the place of every
`nn.Linear`, sharded by name, then finds the frozen ones and no others.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_peft.bound_rules import bind_rule, rank_scaling, scaling, signal
from moe_peft.experts import experts_out
from moe_peft.rank_rules import own_logits, rank_top_k, self_activated
from moe_peft.routing import Routing, dense_weights, routing_dtype, summed
from moe_peft.selection import ACTIVATIONS


Shapes = dict[str, tuple[int, ...]]
"""Part -> shape, of one linear's tensors."""


def frozen(shape: tuple[int, ...], like: Tensor) -> nn.Parameter:
    """A parameter that is not trained, of the dtype and device of a frozen weight."""
    return nn.Parameter(like.new_empty(shape), requires_grad=False)


class Routes(nn.Module):
    """A router: tokens to a `Routing`.

    Parameter: router `[N, d]`. Buffers, which no cast of the model reaches before they are loaded: router_bias `[N]`,
    selection_bias `[N]`, expert_map (where choices share experts: each one's expert, the null and constant ones left out).
    """

    def __init__(self, config: Any, shapes: Shapes, like: Tensor) -> None:
        super().__init__()
        self.router = frozen(shapes["router"], like)
        for name in ("router_bias", "selection_bias"):
            empty = torch.zeros(shapes[name], dtype=torch.float32) if name in shapes else None
            self.register_buffer(name, empty)
        empty = torch.zeros(shapes["expert_map"], dtype=torch.long) if "expert_map" in shapes else None
        self.register_buffer("expert_map", empty)
        self.bound = bind_rule(config, config.num_null_experts)
        self.top_k = min(config.top_k or len(self.router), len(self.router))
        self.scale, self.cosine = config.router_scale, config.scoring_func == "cosine"
        self.act = ACTIVATIONS[config.router_act] if config.router_act else None

    def forward(self, tokens: Tensor) -> Routing:
        """The routing of `tokens [T, d]`, in fp32 or better."""
        logits = nn.functional.linear(tokens, self.router)
        logits = logits.to(routing_dtype(logits.dtype))
        seen = tokens if self.cosine else None
        logits = signal(logits, self.scale, self.router, seen, self.router_bias, self.act)
        return self.bound(self.selection_bias)(logits, self.top_k)


class Decision:
    """What the first of several layers has decided, for the others that follow it in the same pass."""

    routing: Routing | None = None


class RoutedLinear(nn.Module):
    """A frozen linear with experts. Abstract: a type says what weight each expert has.

    Parameters: lora_A `[n, r, d_in]`, or `[1, r, d_in]` where all share it; lora_B `[n, r, d_out]`.
    """

    def __init__(self, base_layer: nn.Module, shapes: Shapes) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = (frozen(shapes[part], base_layer.weight) for part in ("lora_A", "lora_B"))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        tokens = x.reshape(-1, x.shape[-1]).to(self.lora_A.dtype)
        return self.added(y.reshape(-1, y.shape[-1]), tokens).view(y.shape)

    def added(self, y: Tensor, tokens: Tensor) -> Tensor:
        """`y [T, d_out]` plus the experts' output for `tokens [T, d_in]`."""
        raise NotImplementedError


class LoraExperts(RoutedLinear):
    """`linear_moe` on one linear, and the plain LoRA that `ffn_moe` has outside the blocks.

    Attributes:
        routes: the router, or None where there is one expert or another layer decides.
        decision: shared with the layers that follow this one's router, or that this one follows.
        last: nobody asks for the decision after this layer.
    """

    def __init__(self, base_layer: nn.Module, config: Any, shapes: Shapes) -> None:
        super().__init__(base_layer, shapes)
        num_experts, r, _ = shapes["lora_B"]
        self.num_shared = min(config.num_shared_experts, num_experts - 1)
        self.num_routed = num_experts - self.num_shared
        self.scaling = scaling(config, r)
        self.num_rows = shapes.get("expert_map", (self.num_routed,))[0]
        self.constant = frozen(shapes["constant"], self.lora_A) if "constant" in shapes else None
        self.routes = Routes(config, shapes, self.lora_A) if "router" in shapes else None
        self.decision: Decision | None = None
        self.last = False

    def added(self, y: Tensor, tokens: Tensor) -> Tensor:
        hidden = self.lora_A.flatten(0, 1) @ tokens.T
        gates = hidden.new_ones(hidden.shape[1], self.num_routed)
        every = self._routed(tokens)
        if every is not None:
            expert_map = None if self.routes is None else self.routes.expert_map
            gates = summed(every[:, : self.num_rows], expert_map, self.num_routed).to(hidden.dtype)
        if self.constant is not None and every is not None:
            chosen = every[:, self.num_rows : self.num_rows + len(self.constant)].to(hidden.dtype)
            y = y + (chosen @ self.constant).to(y.dtype)
        if self.num_shared:
            gates = torch.cat((gates, gates.new_ones(len(gates), self.num_shared)), dim=1)
        return experts_out(y, hidden, self.lora_B, gates, None, self.scaling)

    def _routed(self, tokens: Tensor) -> Tensor | None:
        """The weights of all choices, `[T, N]`; None where there is nothing to choose."""
        if self.decision is None:
            return None if self.routes is None else dense_weights(self.routes(tokens))
        if self.routes is not None:
            self.decision.routing = self.routes(tokens)
        routing = self.decision.routing
        assert routing is not None
        if self.last:
            self.decision.routing = None
        return dense_weights(routing)


class RankExperts(RoutedLinear):
    """`rank_moe` on one linear: R = F + r ranks, of which the first F are of earlier tasks, with their scale in B."""

    def __init__(self, base_layer: nn.Module, config: Any, shapes: Shapes) -> None:
        new, self.num_frozen = shapes["lora_A"][0], shapes.get("frozen_A", (0,))[0]
        ranks = new + self.num_frozen
        whole = {part: (ranks, 1, shapes[part][2]) for part in ("lora_A", "lora_B")}
        super().__init__(base_layer, whole)
        self.scaling, self.top_k = rank_scaling(config, new), min(config.top_k or ranks, ranks)
        self.partition, self.bias_in_gates = config.rank_partition, config.bias_in_gates
        self.temperature, lowest = config.temperature, config.threshold
        self.lowest = None if lowest is None else lowest / config.temperature
        self.scale = config.router_scale
        self.router = frozen(shapes["router"], self.lora_A) if "router" in shapes else None
        bias = torch.zeros(shapes["selection_bias"], dtype=torch.float32) if "selection_bias" in shapes else None
        self.register_buffer("selection_bias", bias)
        self.alone = ranks == 1 and not self.num_frozen and lowest is None

    def added(self, y: Tensor, tokens: Tensor) -> Tensor:
        hidden = self.lora_A.flatten(0, 1) @ tokens.T
        gates = self.gates(tokens, hidden)
        return experts_out(y, hidden, self.lora_B, gates.to(hidden.dtype), None, 1.0)

    def gates(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """What multiplies each rank's output, `[T, R]`, its scale included."""
        scales = hidden.new_full((hidden.shape[0],), self.scaling, dtype=routing_dtype(hidden.dtype))
        scales[: self.num_frozen] = 1.0
        if self.alone:
            return scales.expand(hidden.shape[1], -1)
        return dense_weights(self._routing(tokens, hidden)) * scales

    def _routing(self, tokens: Tensor, hidden: Tensor) -> Routing:
        if self.router is None:
            responses = hidden.T.to(routing_dtype(hidden.dtype))
            return self_activated(own_logits(responses, self.temperature), self.top_k, self.lowest)
        logits = nn.functional.linear(tokens, self.router)
        logits = logits.repeat_interleave(self.partition, 1) if self.partition > 1 else logits
        logits = signal(logits.to(routing_dtype(logits.dtype)), self.scale)
        return rank_top_k(logits, self.top_k, self.selection_bias, self.bias_in_gates)


def hosted(parent: nn.Module, names: Any, forward: Callable[..., Any] | None = None) -> None:
    """Give `parent` a class of its own, by which it differs from its like that have no experts, or have them elsewhere.

    vLLM looks at one module of each class and children's names, and treats all others of that class alike: it would fuse
    projections that have become routed.

    Args:
        parent: its class changes in place.
        names: of its children that carry experts.
        forward: of the new class, where it is not the old one's.
    """
    kind, key = type(parent), tuple(sorted(names))
    if (kind, key) not in _hosts:
        own = {"__module__": kind.__module__} | ({} if forward is None else {"forward": forward})
        _hosts[kind, key] = type(f"MoePeft{kind.__name__}", (kind,), own)
    parent.__class__ = _hosts[kind, key]


_hosts: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}
