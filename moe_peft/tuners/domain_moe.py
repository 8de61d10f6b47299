"""Named experts on each linear layer, often trained elsewhere and frozen, mixed by a gate: MeteoRA (arXiv:2405.13053),
SteloCoder (arXiv:2310.15539), Arrow (arXiv:2405.11157), and routing by label or by prototypes.

What an adapter is on one layer, and how it computes, is `domain_experts`. Here: which layers, where the gate of the model
lies, what is frozen, and what a saved file must hold.
"""

import re
from typing import Any, final

from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from moe_peft.attach import RoutingContext
from moe_peft.balance import LOAD_WINDOW
from moe_peft.domain_config import MODEL_GATES, DomainMoeConfig
from moe_peft.errors import refuse
from moe_peft.prompts import said_of
from moe_peft.tuners.base import MoeTuner, MoeTunerLayer
from moe_peft.tuners.domain_experts import DomainExperts
from moe_peft.tuners.scopes import RouterUnit


_LOOKS_AT_PROMPTS = "`gate` is 'sequence' or 'prototype'"


@final
class DomainMoeLinear(MoeTunerLayer):
    """A frozen linear layer with named LoRA experts added to its output."""

    adapter_layer_names = ("domain_moe_experts",)
    other_param_names = ("r", "scaling")

    def __init__(self, base_layer: nn.Module, context: RoutingContext, quantization: dict[str, Any]) -> None:
        super().__init__(base_layer, context, quantization)
        self.domain_moe_experts = nn.ModuleDict()
        self.r: dict[str, int] = {}  # the largest; `experts.ranks` has that of each domain
        self.scaling: dict[str, float] = {}
        self.units: dict[str, RouterUnit] = {}  # by adapter, where the model has one gate

    def update_layer(self, adapter_name: str, config: DomainMoeConfig, num_experts: int, r: list[int]) -> None:  # type: ignore[override]
        """Give the adapter its experts on this layer; `r` has the rank of each domain."""
        here, d_router = self._joins(adapter_name, config)
        experts = DomainExperts(config, self.in_features, self.out_features, r, d_router, here)
        self.domain_moe_experts[adapter_name] = experts
        self.r[adapter_name], self.scaling[adapter_name] = max(r), experts.scaling
        self.context.wants_prompt |= experts.by_sequence
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _joins(self, adapter_name: str, config: DomainMoeConfig) -> tuple[bool, int]:
        """Whether this layer has a gate, and how wide that is where it is not the layer's own input."""
        if config.gate not in MODEL_GATES or len(config.names) == 1:
            return True, 0
        width = self.context.embedding_width
        if not width:
            allowed = "another where the model has no `get_input_embeddings` with an `embedding_dim`"
            raise refuse("gate", config.gate, allowed, "'token' needs nothing of the model.")
        unit = self.context.units.setdefault(("domains", ""), RouterUnit("model"))
        self.units[adapter_name] = unit
        self.context.wants_pool = True
        return unit.join(adapter_name, self), width

    def holds(self, adapter_name: str) -> bool:
        return adapter_name in self.r

    def add_experts_output(self, x: Tensor, y: Tensor, adapter_name: str) -> Tensor:
        experts = self.domain_moe_experts[adapter_name]
        if adapter_name not in self.units:
            return experts(x, y, self.context)
        # Asked anew by each layer, so that a recomputed layer does not reach into another one's graph.
        first = self.units[adapter_name].first[adapter_name].domain_moe_experts[adapter_name]  # type: ignore[index]
        tokens = x.numel() // x.shape[-1]
        routing = first(self.context.required_pool(), None, self.context, None, tokens)
        return experts(x, y, self.context, routing)

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        # PEFT's own place for weights that stay frozen; it knows whole containers only.
        super()._freeze_non_trainable_peft_weights(adapter_names)
        for experts in self.domain_moe_experts.values():
            experts.freeze_untrained()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        unit = self.units.pop(adapter_name, None)
        if unit is not None:
            unit.leave(adapter_name)

    def is_static(self, adapter_name: str) -> bool:
        return not self.holds(adapter_name) or bool(self.experts(adapter_name).num_experts == 1)

    def expert_names(self, adapter_name: str) -> list[str]:
        """The domains, in order."""
        return list(self.domain_moe_experts[adapter_name].domains)

    def expert_factors(self, adapter_name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Domain -> A `[r, d_in]` and B `[r, d_out]`, the scale in B; without domains that have no expert on this layer."""
        return self.domain_moe_experts[adapter_name].factors()


class PromptContext(RoutingContext):
    """Says `gate` where a prompt is missing, as the user wrote it."""

    def _for_routers(self, module: nn.Module, given: dict[str, Any]) -> dict[str, Tensor]:
        with said_of(_LOOKS_AT_PROMPTS):
            return super()._for_routers(module, given)

    def prompt_tokens(self, rows: int, columns: int, like: Tensor) -> Tensor:
        with said_of(_LOOKS_AT_PROMPTS):
            return super().prompt_tokens(rows, columns, like)


class DomainMoeModel(MoeTuner):
    """Registered with PEFT as `DOMAIN_MOE`; made by `moe_peft.from_loras` or `get_peft_model(model, DomainMoeConfig(...))`."""

    prefix = "domain_moe_"
    tuner_layer_cls = DomainMoeLinear
    layer_cls = DomainMoeLinear
    context_cls = PromptContext

    def _prepare_model(self, peft_config: DomainMoeConfig, model: nn.Module) -> None:
        if peft_config.gate in MODEL_GATES and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            remedy = "Its cross-attention reads two sequences at once, and one decision cannot be about both."
            raise refuse("gate", peft_config.gate, "'token', 'given' or 'arrow' for an encoder-decoder", remedy)
        super()._prepare_model(peft_config, model)

    def _allocated(self, config: DomainMoeConfig, key: str) -> tuple[int, list[int]]:  # type: ignore[override]
        """The number of experts and the rank of each for the layer that `key` names."""
        ranks = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), key))
        return len(config.names), ranks or config.domain_ranks or [int(config.r)] * len(config.names)  # type: ignore[arg-type]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        held = [m for m in model.modules() if isinstance(m, DomainMoeLinear) and m.holds(adapter_name)]
        of_model = any(adapter_name in layer.units for layer in held)
        for layer in held:
            experts = layer.experts(adapter_name)
            if of_model:  # one router, asked by every layer
                experts.share, experts.state.window = 1 / len(held), LOAD_WINDOW * len(held)
            else:
                experts.state.routers = len(held)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: DomainMoeConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        _check_domains(config, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _check_domains(config: DomainMoeConfig, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Refuse weights that lack a domain of the config, or have another one."""
    keys = (re.search(r"domain_moe_experts\.(?:.*\.)?lora_A_(.+)$", key) for key in state_dict)
    saved = {key[1] for key in keys if key}
    if not saved:  # as FSDP shows it to all ranks but the first
        return
    folder = getattr(config, "loaded_from", None)
    where = f"in '{folder}'" if folder else f"for adapter '{adapter_name}'"
    for what, names in (("no expert", set(config.names) - saved), ("an unexpected expert", saved - set(config.names))):
        if names:
            listed = ", ".join(repr(name) for name in sorted(names))
            raise ValueError(
                f"The saved weights {where} have {what} for {listed}, while `domains` in its config is {config.names}. "
                "Nothing was loaded. Either the file is not the one that was saved with this config, or the config was edited: "
                "get both from one save."
            )
