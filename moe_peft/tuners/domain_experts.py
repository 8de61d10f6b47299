"""One adapter of named experts on one linear layer: the experts, each with a rank of its own, and the gate if it is here.

    y = W x + s * sum_{d chosen} g_d B_d A_d x,    s = alpha / r for all

The ranks of all experts are stacked, `A_cat [R, d_in]` and `B_cat [R, d_out]` with R their sum, and the gate of rank j is
that of the expert that owns it, `g[:, owner]`: two dense products whatever is chosen, without a loop over experts.
"""

import math
from typing import Any, final

import torch
from torch import Tensor, nn

from moe_peft.attach import RoutingContext
from moe_peft.bound_rules import scaling
from moe_peft.domain_config import ARROWS, MODEL_GATES, TRAINING_FREE, DomainMoeConfig
from moe_peft.errors import refuse
from moe_peft.experts import experts_decoded, experts_out, stacked_in
from moe_peft.products import stacked_products
from moe_peft.routing import Routing, RoutingRule, dense_weights, routing_dtype
from moe_peft.row_types import check_types, no_task_types
from moe_peft.rules import ROUTING_RULES, top_1_hard
from moe_peft.selection import MASKED
from moe_peft.tuners.router import Anchored, Router, compute_dtype


FEW_TOKENS = 32
"""Up to so many, a pass without gradient takes the way with the fewest calls."""


def domains_naive(x: Tensor, factors: dict[str, tuple[Tensor, Tensor]], gates: dict[str, Tensor]) -> Tensor:
    """The definition: `sum_d gates[d] * (x @ A_d.T @ B_d)`, `[T, d_out]`.

    Args:
        x: `[T, d_in]`.
        factors: domain -> A `[r_d, d_in]` and B `[r_d, d_out]`, the scale in B; domains without an expert here are left out.
        gates: domain -> `[T]`.
    """
    parts = [gates[domain].unsqueeze(-1) * (x @ A.T @ B) for domain, (A, B) in factors.items()]
    return torch.stack(parts).sum(0)


@final
class DomainExperts(Router):
    """A leaf whose own forward consumes its weights.

    Parameters, all of one dtype:
        lora_A_<domain> `[r_d, d_in]`, lora_B_<domain> `[r_d, d_out]` for each domain with an expert here: named, so that a
        saved file says whose they are, and each one frozen or trained by itself.
        router `[E + N, d]`: on the layer's input, or, on the first layer alone, on the prompt's embeddings. A buffer where
        nothing is trained: mean embeddings under "prototype", singular vectors under "arrow".
    Buffers:
        null_threshold `[]`, with a gate of the whole model: the score below which a prompt falls to the frozen model.
    """

    def __init__(
        self, config: DomainMoeConfig, d_in: int, d_out: int, ranks: list[int], d_router: int = 0, here: bool = True
    ) -> None:
        super().__init__()
        names = config.names
        self.domains, self.ranks, self.gate = names, list(ranks), config.gate
        self.trained = set(names if config.train_domains is None else config.train_domains)
        self.num_shared, self.r = 0, 1  # for those who read gates: one weight for each rank
        self.present = [(d, name) for d, (name, r) in enumerate(zip(names, ranks, strict=True)) if r]
        for d, name in self.present:
            self.register_parameter(f"lora_A_{name}", nn.Parameter(torch.empty(ranks[d], d_in)))
            self.register_parameter(f"lora_B_{name}", nn.Parameter(torch.empty(ranks[d], d_out)))
        self._keys = [(f"lora_A_{name}", f"lora_B_{name}") for _, name in self.present]
        owners = [d for d, r in enumerate(ranks) for _ in range(r)]
        self.register_buffer("owner", torch.tensor(owners, device="cpu"), persistent=False)
        self.scaling, self.dropout = scaling(config, config.r), config.lora_dropout
        self.of_model, self.training_free = config.gate in MODEL_GATES, config.gate in TRAINING_FREE
        experts = len(names)
        null = (1 if self.of_model else config.num_null_experts) if experts > 1 else 0
        rule = ROUTING_RULES[config.routing or ""] if self.of_model else None
        self.set_up_router(config, experts + null, d_router or d_in, rule, num_null=null, here=here)
        self.visited = 1 if self.of_model else min(self.visited, experts)
        self.supervised = config.supervised and self.router is not None
        self.by_labels_alone = config.gate_training == "labels"
        asked = self.of_model and self.router is not None
        self.register_buffer("null_threshold", torch.full((), -math.inf, dtype=torch.float32) if asked else None)
        self._ready = not self.training_free
        self.reset_parameters(config)

    def _make_weights(self, config: Any, num_experts: int, d_in: int, learns: bool) -> None:
        # The null expert of a gate of the model has a threshold in place of a row.
        super()._make_weights(config, num_experts - (1 if self.of_model and num_experts > 1 else 0), d_in, learns)

    def reset_parameters(self, config: Any) -> None:
        for A, B in self._pairs():
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            nn.init.zeros_(B) if config.init_weights else nn.init.normal_(B, std=0.02)
        self.reset_router(config)
        if self.training_free and self.router is not None and config.init_weights:
            nn.init.zeros_(self.router)  # not computed yet

    # --- the experts ---

    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        own = self._parameters
        return [(own[a], own[b]) for a, b in self._keys]  # type: ignore[misc]

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]
        """All ranks, `[R, 1, d_in]`, stacked anew."""
        return torch.cat([A for A, _ in self._pairs()]).unsqueeze(1)

    @property
    def lora_B(self) -> Tensor:  # type: ignore[override]
        """All ranks, `[R, 1, d_out]`, stacked anew."""
        return torch.cat([B for _, B in self._pairs()]).unsqueeze(1)

    @property
    def weight(self) -> Tensor:
        """What PEFT's FSDP policy looks for, to shard this module as a unit of its own: one that is trained, if any is."""
        return next((p for p in self.parameters() if p.requires_grad), self._pairs()[0][0])

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Domain -> A `[r, d_in]`, B `[r, d_out]`, the scale in B; without domains that have no expert here."""
        pairs = zip(self.present, self._pairs(), strict=True)
        return {name: (A, self.scaling * B) for (_, name), (A, B) in pairs}

    def stacked(self) -> tuple[Tensor, Tensor]:
        """`A [R, d_in]` and `B [R, d_out]` of all ranks, the scale in B."""
        return self.lora_A.squeeze(1), self.scaling * self.lora_B.squeeze(1)

    def freeze_untrained(self) -> None:
        """Switch the experts of domains that are not trained off again after everything in the adapter was switched on."""
        for (_, name), pair in zip(self.present, self._pairs(), strict=True):
            if name not in self.trained:
                for weight in pair:
                    weight.requires_grad_(False)

    def idle_parameters(self) -> int:
        sizes = [A.numel() + B.numel() for A, B in self._pairs()]
        return sum(sorted(sizes)[: max(len(sizes) - self.visited, 0)])

    # --- forward ---

    def forward(
        self,
        x: Tensor,
        y: Tensor | None,
        context: RoutingContext,
        routing: Routing | None = None,
        tokens: int = 0,
    ) -> Tensor | Routing:
        """`y` plus the experts' output for `x`; without `y`, the gate of the model's decision for `tokens` tokens.

        Args:
            x: `[*, d_in]`; or `[B, 2, d]`, the prompts' embeddings (`RoutingContext.required_pool`).
            y: `[*, d_out]`, the frozen layer's output; its shape and dtype are those of the result.
            context: of the model.
            routing: where the gate of the model has decided.
            tokens: T.
        """
        if y is None:
            return self._of_prompts(x, context, tokens)
        dtype = compute_dtype(x, self._pairs()[0][0])
        # Training without gradient is the first pass of re-entrant checkpointing: it must round as the second one does.
        if not (self.training or torch.is_grad_enabled()) and x.numel() <= FEW_TOKENS * x.shape[-1]:
            return self._decoded(x, y, context, dtype, routing)
        hidden, logits = self._products(x, dtype, routing is None and self.router is not None)
        if routing is None:
            routing = self._here(x, logits, hidden.T, context)
        gates = dense_weights(routing)[:, : len(self.domains)].T.to(dtype)
        weights = gates.index_select(0, self.owner).T
        flat = y.reshape(-1, y.shape[-1])
        return experts_out(flat, hidden, self.lora_B.to(dtype), weights, None, self.scaling).view(y.shape)

    def _products(self, x: Tensor, dtype: torch.dtype, asked: bool) -> tuple[Tensor, Tensor | None]:
        """`A_cat x [R, T]` and, if the gate here is asked, its logits `[T, E + N]`, from one pass over x."""
        router = self.router.to(dtype) if asked else None
        dropout = self.dropout if self.training else 0.0
        if dropout and router is not None:
            return stacked_in(x, self.lora_A.to(dtype), router, dropout)
        seen = nn.functional.dropout(x, dropout) if dropout else x
        factors = tuple(A.to(dtype) for A, _ in self._pairs())
        rows = () if router is None else (router,)
        hidden, *logits = stacked_products(seen, (*factors, *rows), joined=len(factors))
        return hidden, logits[0].T if logits else None

    def _decoded(
        self, x: Tensor, y: Tensor, context: RoutingContext, dtype: torch.dtype, routing: Routing | None
    ) -> Tensor:
        """`forward` for a few tokens without gradient."""
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        if routing is None:
            logits = None if self.router is None else nn.functional.linear(flat, self.router.to(dtype))
            routing = self._here(x, logits, flat, context)
        gates = dense_weights(routing).to(dtype).index_select(1, self.owner)
        A, B = self._kept(context, dtype)
        return experts_decoded(y.reshape(-1, y.shape[-1]), flat, A, B, gates, self.scaling).view(y.shape)

    def _kept(self, context: RoutingContext, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All A and B stacked, once for all the tokens of one generation."""
        if context.kept is None:
            return self.lora_A.to(dtype), self.lora_B.to(dtype)
        key = id(self)
        if key not in context.kept or context.kept[key][0].dtype != dtype:
            context.kept[key] = self.lora_A.to(dtype), self.lora_B.to(dtype)
        return context.kept[key]

    # --- the gate ---

    def _here(self, x: Tensor, logits: Tensor | None, like: Tensor, context: RoutingContext) -> Routing:
        """The routing of the tokens of `x` where no gate of the model decides; `like [T, *]` has the weights' dtype."""
        if logits is None and self.num_experts > 1:
            return self.routed_without_logits(len(like), like, context)
        if logits is None:
            one = like.new_ones(len(like), 1, dtype=routing_dtype(like.dtype))
            return Routing(one, one, None)
        if self.gate in ARROWS:
            self._check_ready()
            logits = logits.abs()
        flat = x.reshape(-1, x.shape[-1]) if self.cosine else None
        return self.routed(logits, context, flat, x.shape[0] if x.dim() == 3 else None)

    def _check_ready(self) -> None:
        """Refuse to choose by prototypes that nobody has computed; asked of the device until there are some."""
        if self._ready or torch.compiler.is_compiling() or self.router.is_meta:
            return
        self._ready = bool(self.router.any())
        if not self._ready and any(bool(B.any()) for _, B in self._pairs()):
            remedy = (
                "Call `moe_peft.set_prototypes(model)` for 'arrow', `set_prototypes(model, batches)` for 'prototype'."
            )
            raise refuse("gate", self.gate, "another where no prototypes were computed", remedy)

    def _of_prompts(self, pooled: Tensor, context: RoutingContext, tokens: int) -> Routing:
        """One decision for each row of the batch, spread over its tokens."""
        self._check_ready()
        logits = self.prompt_scores(pooled)
        null = self.null_threshold.to(logits).clamp(min=MASKED) if not self.training else logits.new_full((), MASKED)
        logits = torch.cat((logits, null.expand(len(logits), 1)), dim=1)
        rows = len(logits)
        return self.routed(logits.repeat_interleave(tokens // rows, 0), context, rows=rows)

    def prompt_scores(self, pooled: Tensor) -> Tensor:
        """How well each domain fits each prompt, `[B, E]` in fp32 or better: log-probabilities under "sequence", minus the
        distance to the domain's prototype under "prototype".

        Args:
            pooled: `[B, 2, d]`, the maximum and the mean of the prompts' embeddings.
        """
        dtype = routing_dtype(pooled.dtype)
        rows = self.router.to(dtype)
        if self.gate == "prototype":
            return -torch.cdist(pooled[:, 1].to(dtype), rows)
        return nn.functional.linear(pooled[:, 0].to(dtype), rows).log_softmax(-1)

    def current_rule(self) -> RoutingRule:
        # Soft in training and the best one in use.
        return top_1_hard if self.gate == "sequence" and not self.training else super().current_rule()

    def routed(self, *args: Any, **kwargs: Any) -> Routing:
        routing = super().routed(*args, **kwargs)
        if not (self.by_labels_alone and self.training):
            return routing
        # The trainer's loss stops here; the labels' still reaches the logits, on the way back through them.
        return routing._replace(top_k_weights=Anchored.apply(routing.top_k_weights.detach(), routing.router_logits))

    def sample_types(self, context: RoutingContext) -> Tensor | None:
        if not self.supervised:
            return super().sample_types(context)
        types = self._checked_types(context, "gate_training", "labels", "'loss'")
        if self.training and not torch.compiler.is_compiling():
            self.state.mark_types(types, len(self.domains))
        return types

    def _types(self, tokens: int, context: RoutingContext, rows: int) -> Tensor:
        self._checked_types(context, "gate", self.gate, "another gate")
        return super()._types(tokens, context, rows)

    def _checked_types(self, context: RoutingContext, field: str, value: str, otherwise: str) -> Tensor:
        """The samples' domains, `[B]` or `[B, S]`.

        Raises:
            ValueError: if the model was not told, or of a domain that there is not.
        """
        types = context.task_types if context.task_types is not None else context.fixed_types
        if types is None:
            raise no_task_types(field, value, otherwise, self.domains)
        check_types(types, len(self.domains), self.domains)
        return types

    def gates(self, x: Tensor, context: RoutingContext, routing: Routing | None = None) -> Tensor:
        """The weights that `forward` gives each rank, `[T, R]`; its arguments are those."""
        if routing is None:
            flat = x.reshape(-1, x.shape[-1])
            dtype = routing_dtype(x.dtype)
            logits = None if self.router is None else nn.functional.linear(flat.to(dtype), self.router.to(dtype))
            routing = self._here(x, logits, flat.to(dtype), context)
        return dense_weights(routing).index_select(1, self.owner)
