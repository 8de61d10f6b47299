"""What every module with a router of its own shares: the weights that choose, the rule, the balance and the record.

Logits pass through a few steps, each of them absent unless asked for, in this order:

    bias, cosine -> activation -> scale (1 / temperature, scheduled) -> mean over the prompt -> mask by task type
    -> balance gradient attached -> rule (`moe_peft.rules`, `moe_peft.selection`)

In use, `moe_peft.routing` may ask for something else than the rule's choice (`moe_peft.overrides`).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from moe_peft.attach import RouterState, RoutingContext, balanced, remember_choice
from moe_peft.balance import BY_ROW
from moe_peft.balance_terms import updated_bias
from moe_peft.bound_rules import bind_rule, signal
from moe_peft.config import MoeConfig
from moe_peft.overrides import Override, chosen, overridden, reweighted
from moe_peft.routing import Routing, RoutingRule, routing_dtype
from moe_peft.routing_control import override_of, rows_of_domains
from moe_peft.row_types import several_in_a_row
from moe_peft.rules import TOP_1_RULES
from moe_peft.selection import ACTIVATIONS, at_random, evenly, given, only_allowed
from moe_peft.tuners.router_terms import Terms, balance_terms


KEPT_IN_FP32 = ("selection_bias", "null_threshold")
"""Buffers whose steps, or whose use in comparisons, are too fine for half precision."""


class Anchored(Function):
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
        router: `[N, d_in]`, or None where there is nothing to choose or nothing to learn. A buffer under `freeze_router`.
        router_bias: `[N]`, with `router_bias` alone.
        selection_bias: `[N]`, a buffer: added to the scores that choose and never to the weights.
        expert_groups: `[G, N]` bool, a buffer: where tokens of each type may go.
        num_experts: N, all that a token can choose from; null experts are the last.
        top_k: slots per token, at the end of its schedule.
        visited: experts whose weights a token uses, at most.
        chooses_freely: whether tokens differ in how many experts they choose that are not null.
        balances_load: whether the balance loss follows the load, which ranks then share.
        balances_bias: whether the selection bias is moved after each optimizer step.
        coef: of the balance loss, 0 where there is none.
        share: of the balance loss that each call counts, where one router is asked by many layers.
        state: loads and sums of this router.
        decides: whether it makes a choice, with a router's weights or without; others follow one that does.
        domains: the experts' names, where they have any.
        whole_blocks: whether each expert is a frozen block with a change of its own.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    router: Any
    router_bias: nn.Parameter | None
    selection_bias: Tensor | None
    expert_groups: Tensor | None
    num_shared: int
    share: float = 1.0
    decides: bool = False
    domains: list[str] | None = None
    whole_blocks: bool = False

    def set_up_router(
        self,
        config: MoeConfig,
        num_experts: int,
        d_in: int,
        rule: RoutingRule | None = None,
        num_null: int = 0,
        here: bool = True,
    ) -> None:
        """Make the router for `num_experts` choices; one needs none, and not `here` means that another module has it."""
        self.num_experts, self.num_null, self.routing = num_experts, num_null, config.routing
        learns = num_experts > 1 and here and config.routing not in ("random", "given")
        self.decides = num_experts > 1 and here
        self._make_weights(config, num_experts, d_in, learns)
        self.bound = bind_rule(config, num_null, rule)
        self.rule = self.bound()
        self.top_k, self.top_k_start = _slots(config, num_experts), config.top_k_start
        self.chooses_freely = config.routing == "top_p" or num_null > 0 and self.top_k < num_experts
        self.visited = min(self.top_k, _reachable(config, num_experts, num_null))
        self.router_scale, self.cosine = config.router_scale, config.scoring_func == "cosine"
        self.act = ACTIVATIONS[config.router_act] if config.router_act else None
        self.temperature_start, self.schedule_steps = config.router_temperature_start, config.schedule_steps
        self.by_sequence = config.router_granularity == "sequence" and learns
        self._set_balance(balance_terms(config, num_null))
        self.by_row = config.balance if config.balance in BY_ROW and config.router_aux_loss_coef else None
        self.state = RouterState()
        self.state.collects = self.balances_bias

    def _set_balance(self, terms: Terms) -> None:
        self.balances_load, self.balances_bias = terms.balances_load, terms.balances_bias
        self.needs_task_types, self.coef, self.gradient = terms.needs_task_types, terms.coef, terms.gradient
        self.bias_update_speed, self.target_active = terms.bias_update_speed, terms.target_active

    def _make_weights(self, config: MoeConfig, num_experts: int, d_in: int, learns: bool) -> None:
        weight = torch.empty(num_experts, d_in) if learns else None
        if weight is not None and config.freeze_router:
            self.register_buffer("router", weight)
        else:
            self.router = None if weight is None else nn.Parameter(weight)
        self.router_bias = nn.Parameter(torch.zeros(num_experts)) if config.router_bias and learns else None
        has_bias = learns and (config.balance == "bias" or config.routing == "sigmoid_top_k")
        self.register_buffer("selection_bias", torch.zeros(num_experts, dtype=torch.float32) if has_bias else None)
        groups = None
        if config.expert_groups is not None and num_experts > 1:
            groups = torch.zeros(len(config.expert_groups), num_experts, dtype=torch.bool)
            for row, experts in zip(groups, config.expert_groups, strict=True):
                row[experts] = True
                row[config.experts_of_layer(num_experts) :] = True  # constant and null experts are everybody's
        self.register_buffer("expert_groups", groups, persistent=False)  # the config has it

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        """As PyTorch's, but `KEPT_IN_FP32` stay so whatever the model is cast to."""
        kept = {name: buffer for name in KEPT_IN_FP32 if (buffer := self._buffers.get(name)) is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = moved.to(buffer.dtype) if buffer.is_meta else buffer.to(moved.device)
        return self

    def reset_parameters(self, config: MoeConfig) -> None:
        """A as `nn.Linear` draws it, B zero: a fresh adapter changes nothing, whatever the router says."""
        for expert in self.lora_A:
            nn.init.kaiming_uniform_(expert, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B) if config.init_weights else nn.init.normal_(self.lora_B, std=0.02)
        self.reset_router(config)

    def reset_router(self, config: MoeConfig) -> None:
        """Draw the rows of the router; its bias is zero."""
        if self.router_bias is not None:
            nn.init.zeros_(self.router_bias)
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
        unused = len(self.lora_B) - self.num_shared - self.visited
        own_A = self.lora_A[0].numel() if len(self.lora_A) > 1 else 0
        return max(unused, 0) * (own_A + self.lora_B[0].numel())

    def current_rule(self) -> RoutingRule:
        """The rule with the settings that it has now. `.to()` puts another tensor in a buffer's place."""
        return self.rule if self.selection_bias is None else self.bound(self.selection_bias)

    def move_bias(self, counts: Tensor) -> None:
        """One step of the selection bias; `counts [N + 1]` are the choices since the last one, then the tokens."""
        self.state.step_counts = None
        bias = self.selection_bias
        if bias is None:
            return
        counts, true = counts.to(bias.device), self.num_experts - self.num_null
        # Without tokens every load is what it should be, and the bias stays.
        bias.copy_(updated_bias(bias, counts[:-1], counts[-1], self.bias_update_speed, true, self.target_active))

    def slots(self, context: RoutingContext) -> int:
        """K, on its way from `top_k_start` to `top_k` while training."""
        if self.top_k_start is None or not self.training or context.step is None:
            return self.top_k
        start, done = min(self.top_k_start, self.num_experts), min(1.0, context.step / self.schedule_steps)
        return round(start + (self.top_k - start) * done)

    def scale(self, context: RoutingContext) -> float:
        """1 / temperature, on its way from 1 / `router_temperature_start` to `router_scale` while training."""
        if self.temperature_start is None or not self.training or context.step is None:
            return self.router_scale
        end, done = 1 / self.router_scale, min(1.0, context.step / self.schedule_steps)
        return 1 / (self.temperature_start + (end - self.temperature_start) * done)

    def routed(
        self, logits: Tensor, context: RoutingContext, x: Tensor | None = None, rows: int | None = None
    ) -> Routing:
        """The routing of `logits [T, N]`, in fp32 or better, balanced in training and counted where somebody watches.

        Args:
            logits: what the product with `router` gave.
            context: of the model.
            x: `[T, d_in]`, what the router saw; for cosine scores alone.
            rows: of how many rows the T tokens are, where the caller knows it; else the context may.
        """
        rows = rows or context.rows
        logits = self._signal(logits.to(routing_dtype(logits.dtype)), context, x)
        if self.by_sequence:
            logits = self._of_sequence(logits, context, rows)
        asked = override_of(self, context) if context.controlled else None
        if self.expert_groups is not None:
            types = self._asked_types(logits.shape[0], context, rows, asked)
            logits = only_allowed(logits, self.expert_groups, types)
        rule, top_k = self.current_rule(), self.slots(context)
        if asked is not None:
            return self._by_hand(logits, top_k, rule, asked, context, rows)
        logits = self.observed(logits, rule, context, rows, top_k)
        routing = rule(logits, top_k)
        remember_choice(routing)
        if logits.requires_grad and not routing.top_k_weights.requires_grad:
            routing = routing._replace(top_k_weights=Anchored.apply(routing.top_k_weights, logits))
        return routing

    def _by_hand(
        self, logits: Tensor, top_k: int, rule: RoutingRule, asked: Any, context: RoutingContext, rows: int
    ) -> Routing:
        """The routing as `moe_peft.routing` asks for it, counted and shown where somebody watches."""
        override, see = asked
        override: Override = override.to(logits.device)
        if override.domains is not None and self.expert_groups is None:
            domains = rows_of_domains(override.domains, logits.shape[0], rows)
            routing = reweighted(chosen(domains, self.num_experts, logits.dtype), override, self.whole_blocks)
        else:
            routing = overridden(logits, top_k, rule, override, self.whole_blocks)
        if context.recording:
            self.state.observe(routing, context.real_tokens(logits.shape[0]))
        if see is not None:
            see(self, routing)
        return routing

    def _signal(self, logits: Tensor, context: RoutingContext, x: Tensor | None) -> Tensor:
        seen = x if self.cosine else None
        return signal(logits, self.scale(context), self.router, seen, self.router_bias, self.act)

    def _of_sequence(self, logits: Tensor, context: RoutingContext, rows: int) -> Tensor:
        """Every token gets its row's mean over the prompt; the tokens that are generated keep what the prompt decided."""
        rows = rows or 1
        pinned = None if context.decoding is None else context.pinned.get(context.decoding, {}).get(id(self))
        tokens = logits.view(rows, -1, logits.shape[-1])
        if pinned is None or pinned.shape[0] != rows:
            seen = context.prompt_tokens(rows, tokens.shape[1], logits)
            pinned = (tokens * seen).sum(1) / seen.sum(1).clamp(min=1)
            context.pin(id(self), pinned)
        return pinned.unsqueeze(1).expand_as(tokens).reshape(logits.shape)

    def _types(self, tokens: int, context: RoutingContext, rows: int) -> Tensor:
        assert self.expert_groups is not None
        return context.types_of_tokens(tokens, len(self.expert_groups), rows)

    def _asked_types(self, tokens: int, context: RoutingContext, rows: int, asked: Any) -> Tensor:
        """The types of the tokens: by hand, or those of the samples."""
        if asked is None or asked[0].domains is None:
            return self._types(tokens, context, rows)
        return rows_of_domains(asked[0].domains, tokens, rows or context.rows)

    def routed_without_logits(
        self, tokens: int, like: Tensor, context: RoutingContext, rows: int | None = None
    ) -> Routing:
        """Under "random" and "given": no router has to be asked. `like` has the dtype and device of the weights."""
        like = like.new_empty((), dtype=routing_dtype(like.dtype))
        asked = override_of(self, context) if context.controlled else None
        if asked is not None:
            return self._without_logits_by_hand(tokens, like, context, asked, rows or 0)
        if self.routing == "given":
            assert self.expert_groups is not None
            return given(self.expert_groups, self._types(tokens, context, rows or 0).to(like.device), like.dtype)
        return at_random(tokens, self.num_experts, like) if self.training else evenly(tokens, self.num_experts, like)

    def _without_logits_by_hand(
        self, tokens: int, like: Tensor, context: RoutingContext, asked: Any, rows: int
    ) -> Routing:
        """`routed_without_logits` as `moe_peft.routing` asks for it: an equal share for each expert that may be used."""
        override, see = asked
        override: Override = override.to(like.device)
        groups = self.expert_groups
        if groups is None:  # "random", whose expectation is what it computes in use
            types = torch.zeros(tokens, dtype=torch.long, device=like.device)
            groups = torch.ones(1, self.num_experts, dtype=torch.bool, device=like.device)
        else:
            types = self._asked_types(tokens, context, rows, asked).to(like.device)
        if override.disabled is not None:
            groups = groups & ~override.disabled
        if override.forced is not None:
            groups = groups | override.forced
        routing = reweighted(given(groups, types, like.dtype), override, self.whole_blocks)
        if see is not None:
            see(self, routing)
        return routing

    def observed(
        self, logits: Tensor, rule: RoutingRule, context: RoutingContext, rows: int = 0, top_k: int | None = None
    ) -> Tensor:
        """The logits, with the balance gradient attached in training and counted where somebody watches."""
        top_k = top_k or self.top_k
        if self.training and torch.is_grad_enabled():
            if not (self.coef or context.watching or self.balances_bias):
                return logits
            if not logits.requires_grad:  # a frozen router, counted in backward all the same
                logits = logits + 0 * self.lora_A.flatten()[0].to(logits.dtype)
            real = context.real_tokens(logits.shape[0])
            task_types = self.sample_types(context)
            if context.packed and self.by_row and (self.by_row == "sequence" or task_types is None):
                raise several_in_a_row(self.by_row)
            settings = rule, top_k, self.coef * self.share, self.gradient
            return balanced(logits, self.state, *settings, real, task_types, context, rows)
        if context.recording:
            self.state.observe(rule(logits, top_k), context.real_tokens(logits.shape[0]))
        return logits

    def sample_types(self, context: RoutingContext) -> Tensor | None:
        """The task types that the losses on the logits see, `[B]` or `[B, S]`."""
        return context.required_task_types() if self.needs_task_types else context.task_types


def _slots(config: MoeConfig, num_experts: int) -> int:
    """K, the slots per token."""
    if config.routing in TOP_1_RULES:
        return 1
    return min(config.top_k or num_experts, num_experts)


def _reachable(config: MoeConfig, num_experts: int, num_null: int) -> int:
    """How many experts with weights one token may choose among: those of its group, where there are groups."""
    real = num_experts - num_null
    if config.expert_groups is None or num_experts == 1:
        return real
    everybodys = real - config.experts_of_layer(num_experts)  # constant experts
    return max(map(len, config.expert_groups)) + everybodys


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else the adapter's; fp64 stays."""
    if torch.is_autocast_enabled(x.device.type) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype
