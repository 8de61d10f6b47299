"""Bottleneck adapters for named domains beside a frozen linear layer, a gate over them, a LoRA for the task: MixDA
(arXiv:2306.05406).

    y = W x + sum_j g_j(x) (U_j GELU(V_j x + c_j) + b_j) + s B A drop(x)

x is the FFN's intermediate activation where the layer is the FFN's second one, as it is by default. The published form
weighs W x by the gate as well (`gate_ffn`). What is added is not linear in x, so that it cannot be merged into W.
"""

import copy
import math
from types import SimpleNamespace
from typing import Any, final

import torch
from peft.tuners.tuners_utils import _ExcludedModule, _maybe_include_all_linear_layers, check_target_module_exists
from torch import Tensor, nn

from moe_peft.attach import RoutingContext
from moe_peft.bottleneck import bottleneck_experts, gate_logits, pooled
from moe_peft.bottleneck_config import REDUCTION, BottleneckMoeConfig
from moe_peft.config import LinearMoeConfig
from moe_peft.prompts import said_of
from moe_peft.routing import RoutingRule, routing_dtype, softmax
from moe_peft.selection import Selection, selection_rule
from moe_peft.shards import low_rank_added
from moe_peft.tuners.base import MoeTuner, MoeTunerLayer, layer_place
from moe_peft.tuners.router import Router, compute_dtype


_RULES: dict[str, RoutingRule] = {
    "mlp": softmax,
    "sigmoid": selection_rule(Selection("sigmoid", "all", False, 1.0, 1.0, 0)),
}
"""`gate` -> from its logits to the weights."""

_LOOKS_AT_ROWS = "`gate_input` is 'mean' or 'last_nonpad'"

_SECOND_LINEARS = ("down_proj", "fc2", "fc_out", "dense_4h_to_h", "mlp.c_proj", "wo", "lin2", "output.dense")
"""How transformers calls the second linear layer of an FFN."""


def _parameter(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


@final
class BottleneckExperts(Router):
    """One adapter on one linear layer. A leaf whose own forward consumes its weights.

    Parameters, all of one dtype (n domains here, which may be 0; m the width of an expert; N the gate's sources):
        down `[n, m, d_in]`, down_bias `[n, m]`, up `[n, m, d_out]`, up_bias `[n, d_out]`. Not trained under
        `freeze_domains`, whatever PEFT switches on.
        router_in `[h, d_in]`, router_out `[N, h]`, and with "mlp" router_mid_1 and router_mid_2 `[h, h]` and as many
        biases, or none.
        lora_A `[1, r, d_in]`, lora_B `[1, r, d_out]`, or none: the task's.
    """

    def __init__(self, config: BottleneckMoeConfig, d_in: int, d_out: int, domains: int, r: int) -> None:
        super().__init__()
        self.domains, self.r, self.num_shared = domains, r, 0
        self.frozen, self.gate_ffn = config.freeze_domains, config.gate_ffn
        self.gate = config.gate if domains else "none"
        self.gate_dropout, self.dropout = config.gate_dropout or 0.0, config.lora_dropout
        self.scaling = config.lora_alpha / r if r else 1.0
        if domains:
            width = config.bottleneck_size or max(1, d_in // REDUCTION)
            self.down, self.down_bias = _parameter((domains, width, d_in)), _parameter((domains, width))
            self.up, self.up_bias = _parameter((domains, width, d_out)), _parameter((domains, d_out))
        self.lora_A = _parameter((1, r, d_in)) if r else None
        self.lora_B = _parameter((1, r, d_out)) if r else None
        # The gate is no linear layer: of the router's config it has the rule alone, and none of the losses.
        sources = len(config.sources) if self.gate != "none" else 1
        plain = LinearMoeConfig(num_experts=2, routing="softmax", balance="none")
        self.set_up_router(plain, sources, d_in, _RULES.get(self.gate), here=False)
        self.by_sequence, self.last = config.by_sequence and self.gate != "none", config.gate_input == "last_nonpad"
        self._make_gate(config.gate_size, sources, d_in)
        self.reset_parameters(config)

    def _make_gate(self, width: int, sources: int, d_in: int) -> None:
        middle = ["router_mid_1", "router_mid_2"] if self.gate == "mlp" else []
        self.gate_layers = ["router_in", *middle, "router_out"] if self.gate != "none" else []
        for name in self.gate_layers:
            rows = sources if name == "router_out" else width
            setattr(self, name, _parameter((rows, d_in if name == "router_in" else width)))
            if self.gate == "mlp":
                setattr(self, f"{name}_bias", _parameter((rows,)))

    def reset_parameters(self, config: Any) -> None:
        """As the released code: V and the gate as `nn.Linear` draws them, the rest zero, so that nothing changes at first."""
        drawn = [getattr(self, name) for name in self.gate_layers]
        drawn += [*self.down] if self.domains else []
        drawn += [self.lora_A[0]] if self.lora_A is not None else []
        for weight in drawn:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        for name in self.gate_layers if self.gate == "mlp" else []:
            bound = 1 / math.sqrt(getattr(self, name).shape[1])
            nn.init.uniform_(getattr(self, f"{name}_bias"), -bound, bound)
        if self.domains:
            nn.init.zeros_(self.down_bias)
        for name in ("up", "up_bias", "lora_B"):
            weight = getattr(self, name, None)
            if weight is not None:
                nn.init.zeros_(weight) if config.init_weights else nn.init.normal_(weight, std=0.02)

    @property
    def weight(self) -> Tensor:
        """What PEFT's FSDP policy looks for, to shard this module as a unit of its own."""
        return next(self.parameters())

    @property
    def routes(self) -> bool:
        return self.gate != "none" and self.num_experts > 1

    def idle_parameters(self) -> int:
        """None: every expert runs for every token."""
        return 0

    def freeze_domains(self) -> None:
        """Switch the domains' experts off again after everything in the adapter was switched on."""
        if self.frozen and self.domains:
            for weight in (self.down, self.down_bias, self.up, self.up_bias):
                weight.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor, context: RoutingContext) -> Tensor:
        """`y` plus what the experts and the LoRA add for `x`.

        Args:
            x: `[*, d_in]`; cast to the adapter's dtype, or to autocast's.
            y: `[*, d_out]`, the frozen layer's output; its shape and dtype are those of the result.
        """
        if self.domains:
            dtype = compute_dtype(x, self.down)
            tokens = x.reshape(-1, x.shape[-1]).to(dtype)
            weights = None if self.gate == "none" else self.gates(x, context)
            added = self._domains_output(tokens, None if weights is None else weights[:, : self.domains])
            y = (self._weighed(y, weights) + added.view(y.shape)).to(y.dtype)
        if self.lora_A is None:
            return y
        A, B = (factor[0].to(compute_dtype(x, factor)) for factor in (self.lora_A, self.lora_B))
        return low_rank_added(x, y, A, B, self.scaling, self.dropout if self.training else 0.0)

    def _weighed(self, y: Tensor, weights: Tensor | None) -> Tensor:
        if weights is None or not self.gate_ffn:
            return y
        return y * weights[:, -1].view(*y.shape[:-1], 1)

    def domains_output(self, x: Tensor) -> Tensor:
        """The sum of all domains' outputs without a gate, for `x [T, d_in]`; `[T, d_out]` in the adapter's dtype."""
        return self._domains_output(x.to(compute_dtype(x, self.down)), None)

    def _domains_output(self, tokens: Tensor, weights: Tensor | None) -> Tensor:
        factors = (w.to(tokens.dtype) for w in (self.down, self.down_bias, self.up, self.up_bias))
        return bottleneck_experts(tokens, *factors, weights)

    def gates(self, x: Tensor, context: RoutingContext) -> Tensor:
        """The weights of all sources for the tokens of `x`, `[T, N]` in fp32 or better."""
        if not self.by_sequence:
            return self.routed(self._logits(x.reshape(-1, x.shape[-1])), context).top_k_weights
        rows, tokens = self._rows(x, context), x.numel() // x.shape[-1]
        logits = self._of_rows(x.reshape(rows, -1, x.shape[-1]), context)
        return self.routed(logits.repeat_interleave(tokens // rows, 0), context, rows=rows).top_k_weights

    def _rows(self, x: Tensor, context: RoutingContext) -> int:
        """How many sequences `x` holds. Without an attention that says so, a vector by itself is one."""
        return x.shape[0] if x.dim() == 3 else context.rows or x.numel() // x.shape[-1]

    def _of_rows(self, x: Tensor, context: RoutingContext) -> Tensor:
        """The logits of each row of `x [B, S, d_in]`; tokens that are generated keep what the prompt decided."""
        pinned = None if context.decoding is None else context.pinned.get(context.decoding, {}).get(id(self))
        if pinned is not None and pinned.shape[0] == x.shape[0]:
            return pinned
        like = x.new_empty((), dtype=routing_dtype(x.dtype)).requires_grad_(self.training and torch.is_grad_enabled())
        seen = context.prompt_tokens(x.shape[0], x.shape[1], like)
        logits = self._logits(pooled(x, seen, self.last))
        context.pin(id(self), logits)
        return logits

    def _logits(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x, self.router_in)
        weights = [getattr(self, name).to(dtype) for name in self.gate_layers]
        biases = [getattr(self, f"{name}_bias").to(dtype) for name in self.gate_layers] if self.gate == "mlp" else None
        logits = gate_logits(x.to(dtype), weights, biases, self.gate_dropout, self.training)
        return logits.to(routing_dtype(logits.dtype))

    def _of_sequence(self, logits: Tensor, context: RoutingContext, rows: int) -> Tensor:
        """They are the sequence's already."""
        return logits


class GateContext(RoutingContext):
    """Knows that a model which does not generate has no prompt: its gates look at all of each row.

    Attributes:
        whole_rows: there is no prompt here.
    """

    whole_rows = False

    def _for_routers(self, module: nn.Module, given: dict[str, Any]) -> dict[str, Tensor]:
        generates = getattr(module, "can_generate", None)
        self.whole_rows = generates is None or not generates()
        if self.whole_rows:
            return {}
        with said_of(_LOOKS_AT_ROWS):
            return super()._for_routers(module, given)

    def prompt_tokens(self, rows: int, columns: int, like: Tensor) -> Tensor:
        # Without a prompt to wait for, nothing is missing in training either.
        with said_of(_LOOKS_AT_ROWS):
            return super().prompt_tokens(rows, columns, like.detach() if self.whole_rows else like)


@final
class BottleneckMoeLinear(MoeTunerLayer):
    """A frozen linear layer with bottleneck experts, a LoRA, or both."""

    adapter_layer_names = ("bottleneck_moe_experts",)
    other_param_names = ("r", "names")

    def __init__(self, base_layer: nn.Module, context: RoutingContext, quantization: dict[str, Any]) -> None:
        super().__init__(base_layer, context, quantization)
        self.bottleneck_moe_experts = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.names: dict[str, list[str]] = {}

    def update_layer(self, adapter_name: str, config: BottleneckMoeConfig, domains: int, r: int) -> None:
        """Give the adapter its experts on this layer."""
        experts = BottleneckExperts(config, self.in_features, self.out_features, domains, r)
        self.bottleneck_moe_experts[adapter_name] = experts
        self.r[adapter_name], self.names[adapter_name] = r, config.sources if domains else []
        self.context.wants_prompt |= experts.by_sequence
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        # PEFT's own place for weights that stay frozen; it knows whole containers only.
        super()._freeze_non_trainable_peft_weights(adapter_names)
        for experts in self.bottleneck_moe_experts.values():
            experts.freeze_domains()

    def expert_names(self, adapter_name: str) -> list[str]:
        """The names of what the gate chooses among here, in order; empty where the adapter has no domains."""
        return self.names[adapter_name]

    def holds(self, adapter_name: str) -> bool:
        return adapter_name in self.r

    def has_domains(self, adapter_name: str) -> bool:
        """Whether the adapter has domains' experts here, and not its LoRA alone."""
        return self.holds(adapter_name) and int(self.bottleneck_moe_experts[adapter_name].domains) > 0

    def add_experts_output(self, x: Tensor, y: Tensor, adapter_name: str) -> Tensor:
        experts = self.bottleneck_moe_experts[adapter_name]
        if experts.gate_ffn and experts.domains and sum(map(self.holds, self.active_adapters)) > 1:
            raise ValueError(
                f"Adapter '{adapter_name}' has `gate_ffn` = True: it weighs the frozen layer, which it cannot share with "
                f"the other active adapters of {self.active_adapters}. Activate it alone, or train it without `gate_ffn`."
            )
        return experts(x, y, self.context)

    def is_static(self, adapter_name: str) -> bool:
        return not self.has_domains(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if not self.is_static(name):
                raise ValueError(not_linear(name))
        super().merge(safe_merge, adapter_names)


def not_linear(adapter_name: str) -> str:
    """Why such an adapter has no weight, and the ways out."""
    return (
        f"Adapter '{adapter_name}' cannot be merged into the base weights: a GELU stands between the two layers of each "
        "domain's bottleneck, so no weight equals them, nor does a plain LoRA. Serve it unmerged (transformers' `generate` "
        "and classifiers work as they are), or make the domains LoRA experts, which `moe-peft merge` fits."
    )


class BottleneckMoeModel(MoeTuner):
    """Registered with PEFT as `BOTTLENECK_MOE`; made by `get_peft_model(model, BottleneckMoeConfig(...))`."""

    prefix = "bottleneck_moe_"
    tuner_layer_cls = BottleneckMoeLinear
    layer_cls = BottleneckMoeLinear

    def _context(self) -> RoutingContext:
        for module in self.model.modules():
            if isinstance(module, MoeTunerLayer):
                return module.context
        context = GateContext()
        context.watch_attention(self.model)
        return context

    def _prepare_adapter_config(self, peft_config: BottleneckMoeConfig, model_config: dict) -> BottleneckMoeConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = second_linears(self.model, peft_config.layers_to_transform)
        if peft_config.r:
            task = SimpleNamespace(target_modules=peft_config.task_modules, task_type=peft_config.task_type)
            task = _maybe_include_all_linear_layers(super()._prepare_adapter_config(task, model_config), self.model)
            peft_config.task_modules = task.target_modules
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: BottleneckMoeConfig, key: str) -> Any:
        found = check_target_module_exists(peft_config, key)
        return found if found or isinstance(found, _ExcludedModule) else _gets_lora(peft_config, key)

    def _allocated(self, config: BottleneckMoeConfig, key: str) -> tuple[int, int]:  # type: ignore[override]
        """The number of domains and the rank of the LoRA for the layer that `key` names."""
        domains = len(config.domains or ()) if check_target_module_exists(config, key) else 0
        return domains, config.r if _gets_lora(config, key) else 0

    def _refuse_routed(self, adapter_names: list[str] | None) -> None:
        for layer in self.model.modules():
            if isinstance(layer, BottleneckMoeLinear):
                for name in layer.active_adapters if adapter_names is None else adapter_names:
                    if not layer.is_static(name):
                        raise ValueError(not_linear(name))


def _gets_lora(config: BottleneckMoeConfig, key: str) -> bool:
    if not config.r:
        return False
    task = copy.copy(config)
    task.target_modules, task.layers_to_transform, task.layers_pattern = config.task_modules, None, None
    return bool(check_target_module_exists(task, key))


def second_linears(model: nn.Module, layers: list[int] | int | None) -> set[str]:
    """The second linear layers of the FFNs of these layers, from the layer list's own name on.

    Args:
        layers: numbers; None for those at 7/24 and 11/24 of the depth.

    Raises:
        ValueError: if the model has no FFN whose layers are called as transformers calls them.
    """
    found: dict[int, list[str]] = {}
    for name, _ in model.named_modules():
        place = layer_place(name)
        known = any(name.endswith(f".{last}") for last in _SECOND_LINEARS)
        if place is not None and known and not name.endswith("attention.output.dense"):
            found.setdefault(place[1], []).append(name.removeprefix(place[0].rpartition(".")[0] + "."))
    if not found:
        raise ValueError(
            "Please specify `target_modules` in `peft_config`: no FFN of this model has a second linear layer of a known "
            f"name ({', '.join(_SECOND_LINEARS)})."
        )
    depth = max(found) + 1
    wanted = {min(depth - 1, round(share * depth / 24)) for share in (7, 11)} if layers is None else layers
    wanted = {wanted} if isinstance(wanted, int) else set(wanted)
    return {name for layer in sorted(wanted) for name in found.get(layer, [])}
