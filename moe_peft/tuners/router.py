"""What every module with a router of its own shares: the weights that choose, the rule, the balance and the record."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from moe_peft.attach import (
    BalanceGradient,
    MicroBatch,
    RouterState,
    RoutingContext,
    balanced,
    localized_step,
    switch_step,
)
from moe_peft.config import MoeConfig
from moe_peft.routing import DENSE_RULES, Routing, RoutingRule, routing_dtype
from moe_peft.rules import TOP_1_RULES, null_pooled, switch_gradient_sigmoid, z_gradient


class _Anchored(Function):
    """Identity on weights that do not depend on the logits; backward reaches the logits all the same, with zeros.

    Without it nothing would lead from the loss to the router under "top_1_hard", and the balance gradient, which is added
    on the way back, would never be.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (logits,) = ctx.saved_tensors
        return None, torch.zeros_like(logits)


class Router(nn.Module):
    """One adapter on one layer or block, with a router. Abstract: a type adds the experts.

    Attributes:
        lora_A, lora_B: `[n, r, d_in]` and `[n, r, d_out]`, made by the type.
        router: `[N, d_in]`, or None where there is nothing to choose.
        num_experts: N, all that a token can choose from; null experts are the last.
        top_k: slots per token.
        visited: experts whose weights a token uses, at most.
        balances_load: whether the balance loss follows the load, which ranks then share.
        coef: of the balance loss, 0 where there is none.
        state: loads and sums of this router.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    router: nn.Parameter | None
    num_shared: int

    def set_up_router(
        self,
        config: MoeConfig,
        num_experts: int,
        d_in: int,
        rule: RoutingRule,
        z_coef: float = 0.0,
        num_null: int = 0,
        here: bool = True,
    ) -> None:
        """Make the router for `num_experts` choices; one needs none, and not `here` means that another module has it."""
        self.num_experts = num_experts
        self.router = nn.Parameter(torch.empty(num_experts, d_in)) if num_experts > 1 and here else None
        self.rule = rule
        self.top_k = _slots(config, num_experts)
        self.visited = min(self.top_k, num_experts - num_null)
        self.router_scale = config.router_scale
        self.balances_load = config.balance == "switch"
        self.needs_task_types = config.balance == "localized" and config.router_aux_loss_coef > 0
        self.coef = config.router_aux_loss_coef if config.balance != "none" else 0.0
        self.gradient = _gradient(config, num_null)
        if z_coef:
            terms = ((self.coef, self.gradient), (z_coef, _z_step))
            self.coef, self.gradient = 1.0, partial(_weighted_sum, terms=terms)
        self.state = RouterState()

    def reset_parameters(self, config: MoeConfig) -> None:
        """A as `nn.Linear` draws it, B zero: a fresh adapter changes nothing, whatever the router says."""
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
    def routes(self) -> bool:
        """Whether a token chooses here."""
        return self.router is not None

    def idle_parameters(self) -> int:
        """Parameters that a token does not use."""
        unused = len(self.lora_A) - self.num_shared - self.visited
        return unused * (self.lora_A[0].numel() + self.lora_B[0].numel())

    def current_rule(self) -> RoutingRule:
        """The rule with the settings that it has now."""
        return self.rule

    def routed(self, logits: Tensor, context: RoutingContext) -> Routing:
        """The routing of `logits [T, N]`, in fp32 or better, balanced in training and counted where somebody watches."""
        logits = logits.to(routing_dtype(logits.dtype))
        if self.router_scale != 1.0:
            logits = logits * self.router_scale
        rule = self.current_rule()
        logits = self.observed(logits, rule, context)
        routing = rule(logits, self.top_k)
        if logits.requires_grad and not routing.top_k_weights.requires_grad:
            routing = routing._replace(top_k_weights=_Anchored.apply(routing.top_k_weights, logits))
        return routing

    def observed(self, logits: Tensor, rule: RoutingRule, context: RoutingContext) -> Tensor:
        """The logits, with the balance gradient attached in training and counted where somebody watches."""
        if self.training and torch.is_grad_enabled():
            if not (self.coef or context.watching):
                return logits
            real = context.real_tokens(logits.shape[0])
            task_types = context.required_task_types() if self.needs_task_types else None
            settings = rule, self.top_k, self.coef, self.gradient
            return balanced(logits, self.state, *settings, real, task_types, context)
        if context.recording:
            self.state.observe(rule(logits, self.top_k), context.real_tokens(logits.shape[0]))
        return logits


def _slots(config: MoeConfig, num_experts: int) -> int:
    """K, the slots per token."""
    if config.routing in TOP_1_RULES:
        return 1
    return num_experts if config.routing in DENSE_RULES else min(config.top_k or num_experts, num_experts)


def _gradient(config: MoeConfig, num_null: int) -> BalanceGradient | None:
    if config.balance == "localized":
        return localized_step(config.balance_delta)
    if config.balance != "switch":
        return None
    if config.routing == "sigmoid_top_k":
        return _sigmoid_step
    return partial(_null_step, num_null=num_null) if num_null else switch_step


def _sigmoid_step(state: RouterState, batch: MicroBatch, rule: RoutingRule, top_k: int) -> Tensor:
    return switch_gradient_sigmoid(batch.routing.router_logits, batch.real, state.updated_load(batch.counts))


def _null_step(state: RouterState, batch: MicroBatch, rule: RoutingRule, top_k: int, num_null: int) -> Tensor:
    """AdaMoE's: null experts are all alike, so the loss does not care which of them is chosen."""
    counts = null_pooled(batch.counts, len(batch.counts) - num_null)
    return switch_step(state, batch._replace(counts=counts), rule, top_k)


def _z_step(state: RouterState, batch: MicroBatch, rule: RoutingRule, top_k: int) -> Tensor:
    return z_gradient(batch.routing.router_logits, batch.real)


def _weighted_sum(
    state: RouterState,
    batch: MicroBatch,
    rule: RoutingRule,
    top_k: int,
    terms: tuple[tuple[float, BalanceGradient | None], ...],
) -> Tensor:
    """Several losses as one; those without weight are left out."""
    parts = [coef * step(state, batch, rule, top_k) for coef, step in terms if coef and step is not None]
    return torch.stack(parts).sum(0)


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else the adapter's; fp64 stays."""
    if torch.is_autocast_enabled(x.device.type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype


def scaling(config: MoeConfig, r: int) -> float:
    """LoRA's scale for rank `r`."""
    return config.lora_alpha / (math.sqrt(r) if config.use_rslora else r)
