"""One LoRA on each linear layer, of which each rank is an expert: SMoRA (arXiv:2501.15103), MoRAM (arXiv:2506.21035).

    y = W x + s * sum_{i chosen} g_i(x) b_i (a_i x)

"sigmoid_top_k": g from a router on x, summing to k; s = alpha / k. "self_activated": g from the responses a_i x
themselves, summing to 1; s = alpha / r. The latter grow: ranks of earlier tasks are kept frozen, with their scale
folded into B, and take part in the competition. Two dense products whatever is chosen: at rank 64 they cost less than
any gather.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any, final

import torch
from torch import Tensor, nn

from moe_peft.attach import RoutingContext
from moe_peft.bound_rules import rank_scaling
from moe_peft.experts import experts_decoded, experts_out, stacked_in
from moe_peft.products import stacked_products
from moe_peft.rank_config import SELF, RankMoeConfig
from moe_peft.rank_rules import own_logits, rank_top_k, self_activated
from moe_peft.routing import Routing, RoutingRule, dense_weights, routing_dtype
from moe_peft.tuners.base import MoeTuner, MoeTunerLayer
from moe_peft.tuners.linear_moe import FEW_TOKENS
from moe_peft.tuners.router import Router, compute_dtype


@final
class RankExperts(Router):
    """One adapter on one linear layer. A leaf whose own forward consumes its weights.

    Parameters, all of one dtype (F frozen ranks, "self_activated" alone; R = F + r):
        lora_A `[r, 1, d_in]`, lora_B `[r, 1, d_out]`. router `[r / rank_partition, d_in]`, or None.
        frozen_A `[F, 1, d_in]`, frozen_B `[F, 1, d_out]`, or None: never trained, whatever PEFT switches on. Parameters
        and not buffers, as DDP sends buffers at each pass and TRL copies parameters alone into its reference adapter.
    Buffer:
        selection_bias `[r]` under `balance="bias"`, or None: added to the scores that choose. fp32 whatever the dtype of
        the model, since its steps are small.
    """

    def __init__(self, config: RankMoeConfig, d_in: int, d_out: int, num_frozen: int, r: int) -> None:
        super().__init__()
        self.num_shared, self.r = 0, 1
        self.self_activated, self.dropout = config.routing == SELF, config.lora_dropout
        self.temperature, self.bias_in_gates = config.temperature, config.bias_in_gates
        self.lowest = None if config.threshold is None else config.threshold / (config.temperature or 1.0)
        self.num_frozen = num_frozen
        self.frozen_A = self._frozen(torch.zeros(num_frozen, 1, d_in)) if num_frozen else None
        self.frozen_B = self._frozen(torch.zeros(num_frozen, 1, d_out)) if num_frozen else None
        self._set_up(config, d_in, d_out, r)
        if config.balance != "bias":
            self.selection_bias = None

    def _set_up(self, config: RankMoeConfig, d_in: int, d_out: int, r: int) -> None:
        """Make `r` ranks to be trained beside the frozen ones."""
        self.lora_A, self.lora_B = nn.Parameter(torch.empty(r, 1, d_in)), nn.Parameter(torch.empty(r, 1, d_out))
        self.scaling = rank_scaling(config, r)
        ranks = r + self.num_frozen
        self.set_up_router(config, ranks, d_in, rank_top_k, here=not self.self_activated)
        self.decides = ranks > 1  # by their responses, where there is no router
        self.top_k = self.visited = min(config.top_k or ranks, ranks)
        self.partition = config.rank_partition
        if self.router is not None and self.partition > 1:
            self.router = nn.Parameter(torch.empty(ranks // self.partition, d_in))
        self.reset_parameters(config)

    @staticmethod
    def _frozen(weight: Tensor) -> nn.Parameter:
        return nn.Parameter(weight, requires_grad=False)

    @property
    def static(self) -> bool:
        """Whether every token gets the same linear map: a single rank that nothing switches off."""
        return self.num_experts == 1 and self.num_frozen == 0 and self.lowest is None

    @property
    def weight(self) -> Tensor:
        """What PEFT's FSDP policy looks for, to shard this module as a unit of its own."""
        return self.lora_B

    @property
    def routes(self) -> bool:
        return self.num_experts > 1

    def idle_parameters(self) -> int:
        """Trainable ones that a token does not use, at most `top_k` of the ranks being new. A rank that scores itself
        is used up to its response by every token."""
        per_rank = self.lora_B.shape[-1] + (0 if self.self_activated else self.lora_A.shape[-1])
        return max(len(self.lora_A) - self.visited, 0) * per_rank

    def freeze_earlier(self) -> None:
        """Switch the ranks of earlier tasks off again after everything in the adapter was switched on."""
        for weight in (self.frozen_A, self.frozen_B):
            if weight is not None:
                weight.requires_grad_(False)

    def current_rule(self) -> RoutingRule:
        # Bound anew each time: `.to()` puts another tensor in the buffer's place, and training knows no threshold.
        if self.self_activated:
            return (
                self_activated if self.training or self.lowest is None else partial(self_activated, lowest=self.lowest)
            )
        return partial(rank_top_k, selection_bias=self.selection_bias, bias_in_gates=self.bias_in_gates)

    def forward(self, x: Tensor, y: Tensor, context: RoutingContext) -> Tensor:
        """`y` plus the chosen ranks' output for `x`.

        Args:
            x: `[*, d_in]`; cast to the adapter's dtype, or to autocast's.
            y: `[*, d_out]`, the frozen layer's output; its shape and dtype are those of the result.
        """
        dtype = compute_dtype(x, self.lora_A)
        flat = y.reshape(-1, y.shape[-1])
        # Training without gradient is the first pass of re-entrant checkpointing: it must round as the second one does.
        if not (self.training or torch.is_grad_enabled()) and x.numel() <= FEW_TOKENS * x.shape[-1]:
            return self._decoded(x.reshape(-1, x.shape[-1]).to(dtype), flat, context).view(y.shape)
        B = self._all(self.frozen_B, self.lora_B, dtype)
        if self.router is not None:
            dropout = self.dropout if self.training else 0.0
            hidden, logits = stacked_in(x, self.lora_A.to(dtype), self.router.to(dtype), dropout)
            routing = self._routing(logits, context)
        else:
            A = (self.lora_A,) if self.frozen_A is None else (self.frozen_A, self.lora_A)
            parts = stacked_products(self._dropped(x), tuple(factor.flatten(0, 1).to(dtype) for factor in A))
            hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
            if self.static:
                return experts_out(flat, hidden, B, hidden.new_ones(hidden.shape[1], 1), None, self.scaling).view(
                    y.shape
                )
            routing = self._routing(hidden.T, context)
        weights, index, scale = self._weights(routing)
        return experts_out(flat, hidden, B, weights, index, scale).view(y.shape)

    def _decoded(self, tokens: Tensor, y: Tensor, context: RoutingContext) -> Tensor:
        """`forward` for a few tokens without gradient."""
        A, B = (self._all(f, w, tokens.dtype) for f, w in ((self.frozen_A, self.lora_A), (self.frozen_B, self.lora_B)))
        if self.static:
            return experts_decoded(y, tokens, A, B, tokens.new_ones(tokens.shape[0], 1), self.scaling)
        scored_by = A.flatten(0, 1) if self.router is None else self.router.to(tokens.dtype)
        routing = self._routing(nn.functional.linear(tokens, scored_by), context)
        gates = dense_weights(routing) * self._scales(routing)
        return experts_decoded(y, tokens, A, B, gates.to(tokens.dtype))

    def _routing(self, scores: Tensor, context: RoutingContext) -> Routing:
        """From the router's logits `[T, r / rank_partition]`, or the responses `[T, R]`."""
        if self.self_activated:
            assert self.temperature is not None
            return self.routed(own_logits(scores.to(routing_dtype(scores.dtype)), self.temperature), context)
        return self.routed(scores if self.partition == 1 else scores.repeat_interleave(self.partition, 1), context)

    def _weights(self, routing: Routing) -> tuple[Tensor, Tensor | None, float]:
        """`(weights, index, scale)` for the kernel: the scale is the new ranks' alone, and slots may be empty."""
        if self.frozen_A is not None:
            return dense_weights(routing) * self._scales(routing), None, 1.0
        if self.lowest is not None:
            return dense_weights(routing), None, self.scaling
        return routing.top_k_weights, routing.top_k_index, self.scaling

    def _scales(self, routing: Routing) -> Tensor:
        """What multiplies each rank's output, `[R]`: frozen ones have theirs in B."""
        scales = routing.top_k_weights.new_full((self.num_experts,), self.scaling)
        scales[: self.num_frozen] = 1.0
        return scales

    @staticmethod
    def _all(frozen: Tensor | None, new: Tensor, dtype: torch.dtype) -> Tensor:
        return (new if frozen is None else torch.cat((frozen.to(new.dtype), new))).to(dtype)

    def _dropped(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout) if self.training and self.dropout else x

    def gates_by_definition(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """The weights `[T, R]` from all ranks' responses `[T, R]` and the router's logits, of which it may have none."""
        if self.self_activated:
            logits = own_logits(hidden, self.temperature or 1.0)
        else:
            logits = logits.repeat_interleave(self.partition, 1) * self.router_scale
        return dense_weights(self.current_rule()(logits, self.top_k))

    def gates(self, x: Tensor, context: RoutingContext) -> Tensor:
        """The weights of all ranks for the tokens of `x`, `[T, R]` in fp32 or better."""
        tokens = x.reshape(-1, x.shape[-1]).to(routing_dtype(x.dtype))
        if self.static:
            return tokens.new_ones(len(tokens), 1)
        rows = tokens.new_zeros(0, tokens.shape[1]) if self.router is None else self.router.to(tokens.dtype)
        return self.gates_by_definition(tokens @ self.stacked()[0].to(tokens.dtype).T, tokens @ rows.T)

    def stacked(self) -> tuple[Tensor, Tensor]:
        """`A [R, d_in]` and `B [R, d_out]` of all ranks, each scale in B."""
        B = self._all(self.frozen_B, self.scaling * self.lora_B, self.lora_B.dtype)
        return self._all(self.frozen_A, self.lora_A, self.lora_A.dtype).flatten(0, 1), B.flatten(0, 1)

    @torch.no_grad()
    def consolidate(self) -> None:
        """Freeze the ranks that were trained, with their scale folded into B; the function stays what it is."""
        A, B = self.lora_A, self.lora_B
        self.frozen_A = self._frozen(self._all(self.frozen_A, A, A.dtype).clone())
        self.frozen_B = self._frozen(self._all(self.frozen_B, B * self.scaling, B.dtype).clone())
        self.num_frozen = len(self.frozen_A)
        self.lora_A, self.lora_B = (nn.Parameter(w.new_empty(0, *w.shape[1:])) for w in (A, B))

    def grow(self, config: RankMoeConfig, r: int) -> None:
        """Consolidate, and make `r` ranks for the next task in the dtype and on the device of the earlier ones."""
        d_in, d_out, like = self.lora_A.shape[-1], self.lora_B.shape[-1], self.lora_A
        self.consolidate()
        self._set_up(config, d_in, d_out, r)
        self.to(device=like.device, dtype=like.dtype)


@final
class RankMoeLinear(MoeTunerLayer):
    """A frozen linear layer with a LoRA whose ranks are chosen by the token."""

    adapter_layer_names = ("rank_moe_experts",)
    other_param_names = ("r", "scaling")

    def __init__(self, base_layer: nn.Module, context: RoutingContext, quantization: dict[str, Any]) -> None:
        super().__init__(base_layer, context, quantization)
        self.rank_moe_experts = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}

    def update_layer(self, adapter_name: str, config: RankMoeConfig, num_frozen: int, r: int) -> None:
        """Give the adapter its ranks on this layer."""
        experts = RankExperts(config, self.in_features, self.out_features, num_frozen, r)
        self.rank_moe_experts[adapter_name] = experts
        self._note(adapter_name, r)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def grow(self, adapter_name: str, config: RankMoeConfig, r: int) -> None:
        """Freeze the adapter's ranks and give it `r` new ones."""
        self.rank_moe_experts[adapter_name].grow(config, r)
        self._note(adapter_name, r)

    def _note(self, adapter_name: str, r: int) -> None:
        self.r[adapter_name], self.scaling[adapter_name] = r, self.rank_moe_experts[adapter_name].scaling

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        # PEFT's own place for weights that stay frozen; it knows whole containers only.
        super()._freeze_non_trainable_peft_weights(adapter_names)
        for experts in self.rank_moe_experts.values():
            experts.freeze_earlier()

    def holds(self, adapter_name: str) -> bool:
        return adapter_name in self.r

    def add_experts_output(self, x: Tensor, y: Tensor, adapter_name: str) -> Tensor:
        return self.rank_moe_experts[adapter_name](x, y, self.context)

    def is_static(self, adapter_name: str) -> bool:
        return not self.holds(adapter_name) or bool(self.rank_moe_experts[adapter_name].static)


class RankMoeModel(MoeTuner):
    """Registered with PEFT as `RANK_MOE`; made by `get_peft_model(model, RankMoeConfig(...))`."""

    prefix = "rank_moe_"
    tuner_layer_cls = RankMoeLinear
    layer_cls = RankMoeLinear

    def _allocated(self, config: RankMoeConfig, key: str) -> tuple[int, int]:  # type: ignore[override]
        """The number of frozen ranks and that of ranks to be trained, for the layer that `key` names."""
        spread = [self._ranks(r, key) for r in (*(config.frozen_r or []), config.r)]
        return sum(spread[:-1]), spread[-1]

    def _ranks(self, r: Any, key: str) -> int:
        return super()._allocated(SimpleNamespace(num_experts=1, r=r), key)[1]  # type: ignore[arg-type]
