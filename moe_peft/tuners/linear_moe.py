"""A router on each linear layer: MoLA (arXiv:2402.08562), LoRAMoE (arXiv:2312.09979), and the space around them.

    y = W x + s * (sum_{e chosen} g_e(x) B_e A_e x + sum_{j shared} B_j A_j x),     g = rule(c R x),     s = alpha / r

c is `router_scale`; shared experts are DeepSeekMoE's (arXiv:2401.06066) and absent by default. With one routed expert
there is nothing to route: the layer is a plain LoRA and can be merged.
"""

from typing import Any, final

import torch
from torch import Tensor, nn

from moe_peft.attach import RoutingContext
from moe_peft.config import LinearMoeConfig, MoeConfig
from moe_peft.experts import experts_decoded, experts_out, stacked_in
from moe_peft.routing import ROUTING_RULES, dense_weights, with_shared
from moe_peft.tuners.base import MoeTuner, MoeTunerLayer
from moe_peft.tuners.principal import start_from_principal
from moe_peft.tuners.router import Router, compute_dtype, scaling


FEW_TOKENS = 32
"""Up to so many, a pass without gradient takes the shortest way rather than that of the least traffic."""


@final
class RoutedLora(Router):
    """One adapter on one linear layer: its router and experts. A leaf whose own forward consumes its weights.

    Parameters, all of one dtype (FSDP2 asks for that; routing is computed in fp32 all the same):
        lora_A `[E + S, r, d_in]`, lora_B `[E + S, r, d_out]`, router `[E, d_in]`. The last S experts are shared: every
        token visits them with weight 1. With one routed expert there is no router.
    """

    def __init__(self, config: MoeConfig, d_in: int, d_out: int, num_experts: int, r: int) -> None:
        super().__init__()
        self.num_shared, self.r = config.num_shared_experts, r
        self.lora_A = nn.Parameter(torch.empty(num_experts + self.num_shared, r, d_in))
        self.lora_B = nn.Parameter(torch.empty(num_experts + self.num_shared, r, d_out))
        self.scaling, self.dropout = scaling(config, r), config.lora_dropout
        self.set_up_router(config, num_experts, d_in, ROUTING_RULES[config.routing])
        self.reset_parameters(config)

    @property
    def weight(self) -> Tensor:
        """What PEFT's FSDP policy looks for, to shard this module as a unit of its own."""
        return self.lora_B

    def forward(self, x: Tensor, y: Tensor, context: RoutingContext) -> Tensor:
        """`y` plus the experts' output for `x`.

        Args:
            x: `[*, d_in]`; cast to the adapter's dtype, or to autocast's.
            y: `[*, d_out]`, the frozen layer's output; its shape and dtype are those of the result.
        """
        dtype = compute_dtype(x, self.lora_A)
        if self.router is None:
            hidden = self.lora_A.flatten(0, 1).to(dtype) @ self._dropped(x.reshape(-1, x.shape[-1]).to(dtype)).T
            weights = hidden.new_ones(hidden.shape[1], 1 + self.num_shared)
            return self._added(y, hidden, weights, None)
        # Training without gradient is the first pass of re-entrant checkpointing: it must round as the second one does.
        if not (self.training or torch.is_grad_enabled()) and x.numel() <= FEW_TOKENS * x.shape[-1]:
            return self._decoded(x, y, context, dtype)
        dropout = self.dropout if self.training else 0.0
        hidden, logits = stacked_in(x, self.lora_A.to(dtype), self.router.to(dtype), dropout)
        routing = with_shared(self.routed(logits, context), self.num_shared)
        return self._added(y, hidden, routing.top_k_weights, routing.top_k_index)

    def _decoded(self, x: Tensor, y: Tensor, context: RoutingContext, dtype: torch.dtype) -> Tensor:
        """`forward` for a few tokens without gradient: reading x twice is cheaper than stacking the weights."""
        A, B, R = self.lora_A, self.lora_B, self.router
        assert R is not None
        if A.dtype != dtype:
            A, B, R = A.to(dtype), B.to(dtype), R.to(dtype)
        tokens = x.reshape(-1, x.shape[-1]).to(dtype)
        routing = self.routed(nn.functional.linear(tokens, R), context)
        gates = dense_weights(routing).to(dtype)
        if self.num_shared:
            gates = torch.cat((gates, gates.new_ones(gates.shape[0], self.num_shared)), dim=1)
        return experts_decoded(y.reshape(-1, y.shape[-1]), tokens, A, B, gates, self.scaling).view(y.shape)

    def _added(self, y: Tensor, hidden: Tensor, weights: Tensor, index: Tensor | None) -> Tensor:
        """`y` plus the weighted experts' output for `hidden [n, T]`."""
        flat = y.reshape(-1, y.shape[-1])
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

    def update_layer(self, adapter_name: str, config: LinearMoeConfig, num_experts: int, r: int) -> None:
        """Give the adapter its experts on this layer."""
        experts = RoutedLora(config, self.in_features, self.out_features, num_experts, r)
        start_from_principal(self, experts, config)
        self.linear_moe_experts[adapter_name] = experts
        self.r[adapter_name], self.num_experts[adapter_name] = r, num_experts
        self.scaling[adapter_name] = experts.scaling
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def holds(self, adapter_name: str) -> bool:
        return adapter_name in self.r  # read faster than the module itself, and PEFT keeps both

    def add_experts_output(self, x: Tensor, y: Tensor, adapter_name: str) -> Tensor:
        return self.linear_moe_experts[adapter_name](x, y, self.context)

    def is_static(self, adapter_name: str) -> bool:
        return self.num_experts.get(adapter_name, 1) == 1


class LinearMoeModel(MoeTuner):
    """Registered with PEFT as `LINEAR_MOE`; made by `get_peft_model(model, LinearMoeConfig(...))`."""

    prefix = "linear_moe_"
    tuner_layer_cls = LinearMoeLinear
    layer_cls = LinearMoeLinear
