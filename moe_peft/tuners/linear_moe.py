"""A router on each linear layer: MoLA (arXiv:2402.08562), LoRAMoE (arXiv:2312.09979), and the space around them.

    y = W x + s * (sum_{e chosen} g_e(x) B_e A_e x + sum_{j shared} B_j A_j x) + sum_{c chosen} g_c(x) v_c
    g = rule(c R x),   s = alpha / r

c is `router_scale`; shared experts are DeepSeekMoE's (arXiv:2401.06066), constant ones (v_c) MoE++'s (arXiv:2410.07348),
both absent by default. With one routed expert there is nothing to route: the layer is a plain LoRA and can be merged.
"""

from typing import Any, final

import torch
from torch import Tensor, nn

from moe_peft.attach import RoutingContext
from moe_peft.balance import BY_ROW, LOAD_WINDOW
from moe_peft.bound_rules import scaling
from moe_peft.config import LinearMoeConfig, MoeConfig
from moe_peft.errors import refuse
from moe_peft.experts import experts_decoded, experts_out, stacked_in
from moe_peft.routing import Routing, dense_weights, routing_dtype, summed, with_shared
from moe_peft.rules import jittered
from moe_peft.tuners.base import MoeTuner, MoeTunerLayer, distinct_experts
from moe_peft.tuners.principal import start_from_principal
from moe_peft.tuners.router import Router, compute_dtype
from moe_peft.tuners.scopes import RouterUnit, unit_key


FEW_TOKENS = 32
"""Up to so many, a pass without gradient takes the shortest way rather than that of the least traffic."""


@final
class RoutedLora(Router):
    """One adapter on one linear layer: its router and experts. A leaf whose own forward consumes its weights.

    Parameters, all of one dtype (FSDP2 asks for that; routing is computed in fp32 all the same):
        lora_A `[E + S, r, d_in]`, or `[1, r, d_in]` where all experts share it; lora_B `[E + S, r, d_out]`. The last S
        experts are shared ones: every token visits them with weight 1.
        router `[E + C + N, d_router]`: the choices are E experts, C constant ones and N null ones, which add nothing. It
        is absent with one choice, where another layer's router decides, and where nothing is learned that chooses.
        constant `[C, d_out]`: what the constant experts add.
        expert_map `[num_rows]`, a buffer, where `group_experts` has merged experts: router row -> expert. Without it each
        of the first E rows is an expert, in order.
    """

    def __init__(
        self,
        config: MoeConfig,
        d_in: int,
        d_out: int,
        num_experts: int,
        r: int,
        d_router: int = 0,
        routes: bool = True,
        distinct: int | None = None,
    ) -> None:
        super().__init__()
        assert isinstance(config, LinearMoeConfig)
        own = num_experts if distinct is None else min(distinct, num_experts)
        self.num_shared, self.r, self.num_routed, self.num_rows = config.num_shared_experts, r, own, num_experts
        routed = num_experts > 1
        self.num_constant = config.num_constant_experts if routed else 0
        num_null = config.num_null_experts if routed else 0
        choices = num_experts + self.num_constant + num_null
        self.lora_A = nn.Parameter(torch.empty(1 if config.share_A else own + self.num_shared, r, d_in))
        self.lora_B = nn.Parameter(torch.empty(own + self.num_shared, r, d_out))
        shares = distinct is not None and routed
        self.register_buffer("expert_map", torch.arange(num_experts) % own if shares else None)
        self.constant = nn.Parameter(torch.zeros(self.num_constant, d_out)) if self.num_constant else None
        self.scaling, self.dropout, self.jitter = scaling(config, r), config.lora_dropout, config.router_jitter_noise
        self.set_up_router(config, choices, d_router or d_in, num_null=num_null, here=routes)
        # Then the kernel gets the weights of all experts: it knows no empty slots and no choices without low-rank weights.
        self.spreads = choices > num_experts or shares or config.routing == "top_p" or config.expert_groups is not None
        self.reset_parameters(config)

    def reset_parameters(self, config: MoeConfig) -> None:
        super().reset_parameters(config)
        if self.constant is not None:
            nn.init.zeros_(self.constant) if config.init_weights else nn.init.normal_(self.constant, std=0.02)

    @property
    def weight(self) -> Tensor:
        """What PEFT's FSDP policy looks for, to shard this module as a unit of its own."""
        return self.lora_B

    def forward(
        self, x: Tensor, y: Tensor | None, context: RoutingContext, routing: Routing | None = None
    ) -> Tensor | Routing:
        """`y` plus the experts' output for `x`; without `y`, the routing alone.

        Args:
            x: `[*, d_in]`; cast to the adapter's dtype, or to autocast's.
            y: `[*, d_out]`, the frozen layer's output; its shape and dtype are those of the result.
            context: of the model.
            routing: where another layer's router has decided.
        """
        if y is None:
            return self._route(x, context)
        dtype = compute_dtype(x, self.lora_A)
        if self.num_experts == 1 or self.router is None or routing is not None:
            return self._without_router(x, y, context, dtype, routing)
        # Training without gradient is the first pass of re-entrant checkpointing: it must round as the second one does.
        few = not (self.training or torch.is_grad_enabled()) and x.numel() <= FEW_TOKENS * x.shape[-1]
        if few and not self.spreads and len(self.lora_A) > 1:
            return self._decoded(x, y, context, dtype)
        dropout = self.dropout if self.training else 0.0
        hidden, logits = stacked_in(x, self.lora_A.to(dtype), self.router.to(dtype), dropout)
        if self.training and self.jitter:
            return self._added(y, hidden, self._route(x, context))
        return self._added(y, hidden, self.routed(logits, context, *self._seen(x)))

    def _route(self, x: Tensor, context: RoutingContext) -> Routing:
        """The routing of `x [*, d_router]` by itself."""
        assert self.router is not None
        dtype = compute_dtype(x, self.router)
        seen = jittered(x, self.jitter, self.training)
        logits = nn.functional.linear(seen.reshape(-1, x.shape[-1]).to(dtype), self.router.to(dtype))
        return self.routed(logits, context, *self._seen(seen))

    def stacked(self) -> tuple[Tensor, Tensor]:
        """`A [n, d_in]` and `B [n, d_out]` of all experts, the scale in B; an A that they share is repeated."""
        A = self.lora_A.expand(len(self.lora_B), -1, -1)
        return A.flatten(0, 1), self.scaling * self.lora_B.flatten(0, 1)

    def gates(self, x: Tensor, context: RoutingContext, routing: Routing | None = None) -> Tensor:
        """The weights that `forward` gives the experts with low-rank weights, `[T, E + S]`; its arguments are those."""
        tokens = x.numel() // x.shape[-1]
        if self.num_experts == 1:
            return x.new_ones(tokens, 1 + self.num_shared, dtype=routing_dtype(x.dtype))
        if routing is None:
            asked = self.router is not None
            routing = self._route(x, context) if asked else self.routed_without_logits(tokens, x, context)
        weights = self._of_experts(dense_weights(routing))
        return torch.cat((weights, weights.new_ones(tokens, self.num_shared)), dim=1)

    def _of_experts(self, every: Tensor) -> Tensor:
        """Of the weights of all choices `[T, N]` those of the routed experts, `[T, E]`: summed where they share one."""
        return summed(every[:, : self.num_rows], self.expert_map, self.num_routed)

    def _seen(self, x: Tensor) -> tuple[Tensor | None, int | None]:
        """What the routing needs of x beside its logits."""
        return x.reshape(-1, x.shape[-1]) if self.cosine else None, x.shape[0] if x.dim() == 3 else None

    def _without_router(
        self, x: Tensor, y: Tensor, context: RoutingContext, dtype: torch.dtype, routing: Routing | None
    ) -> Tensor:
        """`forward` where no router of this layer decides: a plain LoRA, "random", "given", or a layer that follows."""
        hidden = self.lora_A.flatten(0, 1).to(dtype) @ self._dropped(x.reshape(-1, x.shape[-1]).to(dtype)).T
        if routing is None and self.num_experts > 1:
            rows = x.shape[0] if x.dim() == 3 else None
            routing = self.routed_without_logits(hidden.shape[1], hidden, context, rows)
        if routing is None:
            one = hidden.new_ones(hidden.shape[1], 1, dtype=routing_dtype(dtype))
            routing = Routing(one, one, None)
        return self._added(y, hidden, routing)

    def _decoded(self, x: Tensor, y: Tensor, context: RoutingContext, dtype: torch.dtype) -> Tensor:
        """`forward` for a few tokens without gradient: reading x twice is cheaper than stacking the weights."""
        A, B, R = self.lora_A, self.lora_B, self.router
        assert R is not None
        if A.dtype != dtype:
            A, B, R = A.to(dtype), B.to(dtype), R.to(dtype)
        tokens = x.reshape(-1, x.shape[-1]).to(dtype)
        routing = self.routed(nn.functional.linear(tokens, R), context, *self._seen(x))
        gates = dense_weights(routing).to(dtype)
        if self.num_shared:
            gates = torch.cat((gates, gates.new_ones(gates.shape[0], self.num_shared)), dim=1)
        return experts_decoded(y.reshape(-1, y.shape[-1]), tokens, A, B, gates, self.scaling).view(y.shape)

    def _added(self, y: Tensor, hidden: Tensor, routing: Routing) -> Tensor:
        """`y` plus the weighted experts' output for `hidden [n, T]`."""
        flat = y.reshape(-1, y.shape[-1])
        if self.spreads:
            every = dense_weights(routing)
            if self.constant is not None:
                gates = every[:, self.num_rows : self.num_rows + self.num_constant].to(hidden.dtype)
                flat = flat + (gates @ self.constant.to(hidden.dtype)).to(flat.dtype)
            routing = routing._replace(top_k_weights=self._of_experts(every), top_k_index=None)
        weights, index = with_shared(routing, self.num_shared)[1:]
        out = experts_out(flat, hidden, self.lora_B.to(hidden.dtype), weights, index, self.scaling)
        return out.view(y.shape)

    def _dropped(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout) if self.training and self.dropout else x


@final
class LinearMoeLinear(MoeTunerLayer):
    """A frozen linear layer with routed LoRA experts added to its output."""

    adapter_layer_names = ("linear_moe_experts",)
    other_param_names = ("r", "num_experts", "scaling")

    def __init__(self, base_layer: nn.Module, context: RoutingContext, quantization: dict[str, Any]) -> None:
        super().__init__(base_layer, context, quantization)
        self.linear_moe_experts = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.num_experts: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.units: dict[str, RouterUnit] = {}  # by adapter, where another scope than "linear" is asked for

    def update_layer(self, adapter_name: str, config: LinearMoeConfig, num_experts: int, r: int) -> None:
        """Give the adapter its experts on this layer."""
        routes, d_router = self._joins(adapter_name, config, num_experts)
        distinct = distinct_experts(config, self.place)
        experts = RoutedLora(config, self.in_features, self.out_features, num_experts, r, d_router, routes, distinct)
        start_from_principal(self, experts, config)
        self.linear_moe_experts[adapter_name] = experts
        self.r[adapter_name], self.num_experts[adapter_name] = r, num_experts
        self.scaling[adapter_name] = experts.scaling
        self.context.wants_prompt |= config.router_granularity == "sequence"
        self.context.wants_rows |= config.balance in BY_ROW
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _joins(self, adapter_name: str, config: LinearMoeConfig, num_experts: int) -> tuple[bool, int]:
        """Whether this layer has the router of its unit, and how wide that is where it is not the layer's own input."""
        scope = config.router_scope
        if scope == "linear" or num_experts == 1 and config.num_null_experts + config.num_constant_experts == 0:
            return True, 0
        if scope == "model" and not self.context.embedding_width:
            raise refuse(
                "router_scope",
                scope,
                "another scope where the model has no `get_input_embeddings` with an `embedding_dim`",
                "Use 'block', which needs nothing of the model.",
            )
        unit = self.context.units.setdefault((scope, unit_key(scope, *self.place)), RouterUnit(scope))
        self.units[adapter_name] = unit
        if unit.join(adapter_name, self):
            self.context.wants_embeddings |= scope == "model"
            return True, self.context.embedding_width if scope == "model" else 0
        first = unit.first[adapter_name]
        assert isinstance(first, LinearMoeLinear)
        if first.num_experts[adapter_name] != num_experts:
            raise refuse(
                "router_scope",
                scope,
                f"'linear' or 'block' where `num_experts` = {config.num_experts!r} differs between the layers of one {scope}",
                "One decision can only choose among equally many experts: give them the same number.",
            )
        if scope == "model":
            router = first.experts(adapter_name)
            router.share, router.state.window = (
                1 / unit.members[adapter_name],
                LOAD_WINDOW * unit.members[adapter_name],
            )
        return False, 0

    def holds(self, adapter_name: str) -> bool:
        return adapter_name in self.r  # read faster than the module itself, and PEFT keeps both

    def add_experts_output(self, x: Tensor, y: Tensor, adapter_name: str) -> Tensor:
        experts = self.linear_moe_experts[adapter_name]
        if adapter_name not in self.units:
            return experts(x, y, self.context)
        return experts(x, y, self.context, self._shared_routing(x, adapter_name))

    def _shared_routing(self, x: Tensor, adapter_name: str) -> Routing:
        unit = self.units[adapter_name]
        first = unit.first[adapter_name]
        assert isinstance(first, LinearMoeLinear)
        if unit.scope == "model":
            # Asked anew by each layer, so that a recomputed layer does not reach into another one's graph.
            return first.linear_moe_experts[adapter_name](self.context.required_embeddings(x), None, self.context)
        if first is not self:
            return unit.take(adapter_name, x.numel() // x.shape[-1])
        routing = self.linear_moe_experts[adapter_name](x, None, self.context)
        unit.hand_on(adapter_name, routing)
        return routing

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        unit = self.units.pop(adapter_name, None)
        if unit is not None:
            unit.leave(adapter_name)

    def is_static(self, adapter_name: str) -> bool:
        if adapter_name not in self.r:
            return True
        experts = self.experts(adapter_name)
        return experts.num_experts == 1 or experts.routing == "random"

    def expert_factors(self, adapter_name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Expert -> the one LoRA that it is: A `[r, d_in]` and B `[r, d_out]`, all scales in B, with the shared experts,
        which every token gets, stacked below its own ranks."""
        experts = self.experts(adapter_name)
        A, B = experts.stacked()
        A, B = (rows.view(len(experts.lora_B), experts.r, -1) for rows in (A, B))
        first, names = experts.num_routed, self.expert_names(adapter_name)
        of = range(first) if experts.expert_map is None else experts.expert_map.tolist()
        return {
            name: (torch.cat((A[e], *A[first:])), torch.cat((B[e], *B[first:])))
            for e, name in zip(of, names, strict=True)
        }

    def static_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """As for a plain LoRA; under "random" the experts' mean, which is what it computes in use."""
        experts = self.experts(adapter_name)
        if experts.routing != "random" or experts.num_experts == 1:
            return super().static_factors(adapter_name)
        A, B = (factor.to(routing_dtype(factor.dtype)) for factor in experts.stacked())
        weights = B.new_full((len(experts.lora_B),), 1 / experts.num_routed)
        weights[experts.num_routed :] = 1
        return A, weights.repeat_interleave(experts.r).unsqueeze(-1) * B


class LinearMoeModel(MoeTuner):
    """Registered with PEFT as `LINEAR_MOE`; made by `get_peft_model(model, LinearMoeConfig(...))`."""

    prefix = "linear_moe_"
    tuner_layer_cls = LinearMoeLinear
    layer_cls = LinearMoeLinear

    def _prepare_model(self, peft_config: LinearMoeConfig, model: nn.Module) -> None:
        if peft_config.router_scope != "linear" and getattr(
            getattr(model, "config", None), "is_encoder_decoder", False
        ):
            raise refuse(
                "router_scope",
                peft_config.router_scope,
                "'linear' for an encoder-decoder",
                "Its cross-attention reads two sequences at once, and one decision cannot be about both.",
            )
        super()._prepare_model(peft_config, model)
