"""What one adapter holds on one linear layer of an FFN block, and the block's router on the first of them."""

from typing import Any, final

import torch
from torch import Tensor, nn

from moe_peft.attach import RoutingContext
from moe_peft.bound_rules import scaling, sums_to_one
from moe_peft.config import FfnMoeConfig
from moe_peft.experts import experts_out
from moe_peft.ffn import out_product
from moe_peft.ffn_fan import fan_in, fan_out
from moe_peft.routing import Routing, grouped
from moe_peft.rules import jittered
from moe_peft.tuners.router import Router, compute_dtype


@final
class FfnExperts(Router):
    """One adapter on one linear. A leaf whose own forward consumes its weights, as FSDP1 and ZeRO-3 want.

    Parameters, all of one dtype:
        lora_A `[E + S, r, d_in]`, lora_B `[E + S, r, d_out]`. The last S experts are shared: every token gets them.
        router `[E + N, d_in]`, router_bias `[E + N]`: on the linear of a block that reads its input first. N null
        experts are the frozen block alone.
        selection_bias `[E]`, a buffer: under "sigmoid_top_k" it is added to the scores that choose, not to the weights.
        expert_map `[num_rows]`, a buffer beside the router, where `group_experts` has merged experts: router row -> expert.
        Without it each of the first E rows is an expert, in order.

    Attributes:
        num_rows: of the router's choices those that are experts.
        coupled: whether a router chooses among these experts; without one they are a plain LoRA.
    """

    whole_blocks = True

    def __init__(
        self,
        config: FfnMoeConfig,
        d_in: int,
        d_out: int,
        num_experts: int,
        r: int,
        in_block: bool,
        routes: bool,
        distinct: int | None = None,
    ) -> None:
        super().__init__()
        self.num_rows, self.r = num_experts if in_block else 1, r
        self.num_routed = self.num_rows if distinct is None else min(distinct, self.num_rows)
        self.num_shared = config.num_shared_experts if in_block else 0
        num_null = config.num_null_experts if in_block else 0
        choices = self.num_rows + num_null
        self.coupled = in_block and choices > 1
        self.lora_A = nn.Parameter(torch.empty(self.num_routed + self.num_shared, r, d_in))
        self.lora_B = nn.Parameter(torch.empty(self.num_routed + self.num_shared, r, d_out))
        shares = distinct is not None and routes and self.coupled
        self.register_buffer("expert_map", torch.arange(self.num_rows) % self.num_routed if shares else None)
        self.scaling, self.dropout = scaling(config, r), config.lora_dropout
        self.normalised, self.jitter = sums_to_one(config), config.router_jitter_noise
        self.set_up_router(config, choices, d_in, num_null=num_null, here=routes)
        self.reset_parameters(config)

    @property
    def weight(self) -> Tensor:
        """What PEFT's FSDP policy looks for, to shard this module as a unit of its own."""
        return self.lora_B

    def forward(self, step: str, *args: Any) -> Any:
        """`add`, `route`, `fan_out` or `fan_in`: called through the module, so that hooks see to its weights."""
        return getattr(self, step)(*args)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """`y [*, d_out]` plus all experts' output for `x [*, d_in]`, as a plain LoRA."""
        return self.added(y, self.hidden(x), 0)

    def route(self, x: Tensor, context: RoutingContext) -> Routing:
        """The routing of `x [*, d_in]`, over the experts that have weights of their own."""
        rows = x.shape[0] if x.dim() == 3 else None
        if self.router is None:
            return self.routed_without_logits(x.numel() // x.shape[-1], self.lora_A, context, rows)
        seen = jittered(x.reshape(-1, x.shape[-1]), self.jitter, self.training)
        tokens = seen.to(compute_dtype(x, self.router))
        logits = nn.functional.linear(tokens, self.router.to(tokens.dtype))
        return self.of_experts(self.routed(logits, context, seen, rows))

    def of_experts(self, routing: Routing) -> Routing:
        """A routing over the router's choices as one over the experts."""
        return routing if self.expert_map is None else grouped(routing, self.expert_map, self.num_routed)

    def fan_out(self, x: Tensor, y: Tensor, routing: Routing) -> Tensor:
        """Per slot: `y [*, f]` plus the chosen expert's output for `x [*, d]`: `[*, K, f]`."""
        hidden = self.hidden(x)
        y = self.added(y, hidden, self.num_routed)
        flat, rows = y.reshape(-1, y.shape[-1]), self.num_routed * self.r
        B = self.lora_B[: self.num_routed].to(hidden.dtype)
        slots = fan_out(flat, hidden[:rows], B, routing.top_k_index, routing.top_k_weights.shape[1], self.scaling)
        return slots.view(*y.shape[:-1], *slots.shape[1:])

    def fan_in(self, h: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """The gated sum `[*, f]` of the slots' hidden units `h [*, K, f]`, and the rank-space `[E * r, T]` beside it."""
        flat = h.reshape(-1, *h.shape[-2:])
        A = self.lora_A[: self.num_routed].to(compute_dtype(h, self.lora_A))
        weights, index = routing.top_k_weights, routing.top_k_index
        mixed, z = fan_in(flat, A, weights, index, normalised=self.normalised)
        if self.training and self.dropout:  # the frozen layer sees the hidden units whole
            z = fan_in(self.dropped(flat), A, weights, index, normalised=self.normalised)[1]
        return mixed.view(*h.shape[:-2], h.shape[-1]), z

    def back(self, mixed: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """`y [*, d]` plus what routed and shared experts of the last linear add."""
        if self.num_shared:
            y = self.added(y, self.hidden(mixed, self.num_routed), self.num_routed, whole=False)
        B = self.lora_B[: self.num_routed].to(z.dtype)
        return out_product(y.reshape(-1, y.shape[-1]), z, B, self.scaling).view(y.shape)

    def dropped(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout) if self.training and self.dropout else x

    def hidden(self, x: Tensor, first: int = 0) -> Tensor:
        """`A x` of the experts from `first` on, `[n, T]`."""
        dtype = compute_dtype(x, self.lora_A)
        tokens = self.dropped(x.reshape(-1, x.shape[-1]).to(dtype))
        return self.lora_A[first:].flatten(0, 1).to(dtype) @ tokens.T

    def added(self, y: Tensor, hidden: Tensor, first: int, whole: bool = True) -> Tensor:
        """`y` plus the experts from `first` on with weight 1; `hidden` holds all experts' rows, or theirs alone."""
        B = self.lora_B[first:]
        if not len(B):
            return y
        flat = y.reshape(-1, y.shape[-1])
        rows = hidden[first * self.r :] if whole else hidden
        ones = rows.new_ones(rows.shape[1], len(B))
        return experts_out(flat, rows, B.to(rows.dtype), ones, None, self.scaling).view(y.shape)
