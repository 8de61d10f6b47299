"""A router on each linear layer: MoLA (arXiv:2402.08562), LoRAMoE (arXiv:2312.09979), and the space around them.

    y = W x + s * (sum_{e chosen} g_e(x) B_e A_e x + sum_{j shared} B_j A_j x),     g = rule(c R x),     s = alpha / r

c is `router_scale`; shared experts are DeepSeekMoE's (arXiv:2401.06066) and absent by default. With one routed expert
there is nothing to route: the layer is a plain LoRA and can be merged.
"""

import math
from typing import Any, final

import torch
from torch import Tensor, nn

from moe_peft.attach import BalanceGradient, RouterState, RoutingContext, balanced, localized_step, switch_step
from moe_peft.config import LinearMoeConfig, MoeConfig
from moe_peft.experts import experts_out, stacked_in
from moe_peft.routing import DENSE_RULES, ROUTING_RULES, routing_dtype, with_shared
from moe_peft.tuners.base import MoeTuner, MoeTunerLayer


@final
class RoutedLora(nn.Module):
    """One adapter on one linear layer: its router and experts. A leaf whose own forward consumes its weights.

    Parameters, all of one dtype (FSDP2 asks for that; routing is computed in fp32 all the same):
        lora_A `[E + S, r, d_in]`, lora_B `[E + S, r, d_out]`, router `[E, d_in]`. The last S experts are shared: every
        token visits them with weight 1. With one routed expert there is no router.
    """

    def __init__(self, config: MoeConfig, d_in: int, d_out: int, num_experts: int, r: int) -> None:
        super().__init__()
        self.num_experts, self.num_shared, self.r = num_experts, config.num_shared_experts, r
        stacked = num_experts + self.num_shared
        self.lora_A = nn.Parameter(torch.empty(stacked, r, d_in))
        self.lora_B = nn.Parameter(torch.empty(stacked, r, d_out))
        self.router = nn.Parameter(torch.empty(num_experts, d_in)) if num_experts > 1 else None
        self.scaling = config.lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.dropout = config.lora_dropout
        self.rule = ROUTING_RULES[config.routing]
        self.top_k = num_experts if config.routing in DENSE_RULES else min(config.top_k or 1, num_experts)
        self.router_scale = config.router_scale
        self.coef = config.router_aux_loss_coef if config.balance != "none" else 0.0
        self.gradient: BalanceGradient | None = None
        if config.balance == "switch":
            self.gradient = switch_step
        elif config.balance == "localized":
            self.gradient = localized_step(config.balance_delta)
        self.state = RouterState()
        self.reset_parameters(config)

    def reset_parameters(self, config: MoeConfig) -> None:
        """A as `nn.Linear` draws it, B zero: a fresh adapter adds exactly nothing."""
        for expert in self.lora_A:
            nn.init.kaiming_uniform_(expert, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B) if config.init_weights else nn.init.normal_(self.lora_B, std=0.02)
        if self.router is None:
            return
        if config.router_init_std is None:
            # Divided, so that the logits start the same whatever the scale: it changes how fast they move, no more.
            bound = 1 / (self.router_scale * math.sqrt(self.router.shape[1]))
            nn.init.uniform_(self.router, -bound, bound)
        else:
            nn.init.normal_(self.router, std=config.router_init_std)

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
        dtype = _compute_dtype(x, self.lora_A)
        if self.router is None:
            hidden = self.lora_A.flatten(0, 1).to(dtype) @ self._dropped(x.reshape(-1, x.shape[-1]).to(dtype)).T
            weights = hidden.new_ones(hidden.shape[1], 1 + self.num_shared)
            return self._added(y, hidden, weights, None)
        hidden, logits = self._hidden_and_logits(x, dtype)
        logits = logits.to(routing_dtype(dtype))
        if self.router_scale != 1.0:
            logits = logits * self.router_scale
        logits = self._observed(logits, context)
        routing = with_shared(self.rule(logits, self.top_k), self.num_shared)
        return self._added(y, hidden, routing.top_k_weights, routing.top_k_index)

    def _hidden_and_logits(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`(hidden [n, T], logits [T, E])`."""
        A, R = self.lora_A, self.router
        assert R is not None
        # Training without gradient is the first pass of re-entrant checkpointing: it must round as the second one does.
        if self.training or torch.is_grad_enabled() or x.shape[:-1].numel() > 32:
            return stacked_in(x, A.to(dtype), R.to(dtype), self.dropout if self.training else 0.0)
        # For the few tokens of a decoding step, reading x twice is cheaper than copying the weights into one stack.
        tokens = x.reshape(-1, x.shape[-1]).to(dtype)
        return nn.functional.linear(tokens, A.flatten(0, 1).to(dtype)).T, nn.functional.linear(tokens, R.to(dtype))

    def _added(self, y: Tensor, hidden: Tensor, weights: Tensor, index: Tensor | None) -> Tensor:
        """`y` plus the weighted experts' output for `hidden [n, T]`."""
        flat = y.reshape(-1, y.shape[-1])
        out = experts_out(flat, hidden, self.lora_B.to(hidden.dtype), weights, index, self.scaling)
        return out.view(y.shape)

    def _dropped(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout) if self.training and self.dropout else x

    def _observed(self, logits: Tensor, context: RoutingContext) -> Tensor:
        """The logits, with the balance gradient attached in training and counted where somebody watches."""
        if self.training and torch.is_grad_enabled():
            if not (self.coef or context.watching):
                return logits
            real = context.real_tokens(logits.shape[0])
            typed = self.coef and self.gradient not in (None, switch_step)
            task_types = context.required_task_types() if typed else None
            return balanced(logits, self.state, self.rule, self.top_k, self.coef, self.gradient, real, task_types)
        if context.recording:
            routing = self.rule(logits, self.top_k)
            self.state.observe(routing, context.real_tokens(logits.shape[0]))
        return logits


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype


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
        self.linear_moe_experts[adapter_name] = experts
        self.r[adapter_name], self.num_experts[adapter_name] = r, num_experts
        self.scaling[adapter_name] = experts.scaling
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def holds(self, adapter_name: str) -> bool:
        return adapter_name in self.linear_moe_experts

    def add_experts_output(self, x: Tensor, y: Tensor, adapter_name: str) -> Tensor:
        return self.linear_moe_experts[adapter_name](x, y, self.context)

    def is_static(self, adapter_name: str) -> bool:
        return self.num_experts.get(adapter_name, 1) == 1

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        experts = self.linear_moe_experts[adapter_name]
        if not self.is_static(adapter_name):
            raise ValueError(f"Adapter '{adapter_name}' is routed: its delta depends on the token.")
        A, B = (factor.flatten(0, 1).to(routing_dtype(factor.dtype)) for factor in (experts.lora_A, experts.lora_B))
        delta = experts.scaling * (B.T @ A)
        if type(self.get_base_layer()).__name__ == "Conv1D":
            delta = delta.T
        return delta.to(self.get_base_weight().dtype)


class LinearMoeModel(MoeTuner):
    """Registered with PEFT as `LINEAR_MOE`; made by `get_peft_model(model, LinearMoeConfig(...))`."""

    prefix = "linear_moe_"
    tuner_layer_cls = LinearMoeLinear
    layer_cls = LinearMoeLinear
