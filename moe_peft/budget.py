"""How many parameters an adapter trains and uses, and the plain LoRA that costs the same.

Counting needs no weights: models are built on the meta device, so that a 7B configuration is counted in a second.
"""

import copy
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from moe_peft.config import MoeConfig
from moe_peft.errors import refuse
from moe_peft.tuners.base import MoeTunerLayer


class ParameterCount(NamedTuple):
    """Numbers of parameters.

    Attributes:
        trainable: everything that gets a gradient.
        router: the part of it that chooses experts.
        active: what one token uses: the router and the experts that it visits.
        layers: adapted layers.
    """

    trainable: int
    router: int
    active: int
    layers: int


def meta_backbone(config: object) -> nn.Module:
    """A model of this transformers configuration without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def count_parameters(model: nn.Module, adapter_name: str = "default") -> ParameterCount:
    """Count what an adapter of a PEFT model trains and uses, whether it is one of ours or plain LoRA."""
    layers = [m for m in model.modules() if isinstance(m, MoeTunerLayer) and m.holds(adapter_name)]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not layers:
        adapted = sum(hasattr(m, "base_layer") for m in model.modules())
        return ParameterCount(trainable, 0, trainable, adapted)
    router = idle = 0
    for layer in layers:
        experts = layer.experts(adapter_name)
        router += sum(p.numel() for name, p in experts.named_parameters() if name.startswith("router"))
        visited = experts.num_shared + experts.visited
        for factor in (experts.lora_A, experts.lora_B):
            idle += max(0, len(factor) - visited) * factor[0].numel()  # one A for all experts is always used
    return ParameterCount(trainable, router, trainable - idle, len(layers))


def count_config(backbone: nn.Module, config: PeftConfig) -> ParameterCount:
    """Count for a configuration that has not been injected yet.

    Args:
        backbone: of `meta_backbone`, or any small model; it is left as it is.
    """
    config = copy.deepcopy(config)
    config.inference_mode = False
    return count_parameters(get_peft_model(copy.deepcopy(backbone), config, low_cpu_mem_usage=True))


def equal_budget_lora(
    backbone: nn.Module, budget: int, target_modules: list[str] | str = "all-linear", lora_alpha_over_r: float = 2.0
) -> LoraConfig:
    """The plain LoRA on these modules whose trainable parameters come closest to `budget`.

    Args:
        budget: a number of parameters, such as `count_config(backbone, moe).trainable`.
        lora_alpha_over_r: LoRA's scale.

    Raises:
        ValueError: if even rank 1 costs more than 1.5 times the budget.
    """

    def config(r: int) -> LoraConfig:
        alpha = max(1, round(lora_alpha_over_r * r))
        return LoraConfig(r=r, lora_alpha=alpha, target_modules=target_modules, task_type="CAUSAL_LM")

    per_rank = count_config(backbone, config(1)).trainable
    if per_rank > 1.5 * budget:
        raise refuse("budget", budget, f"at least {per_rank}, what LoRA of rank 1 costs", "Adapt fewer modules.")
    return config(max(1, round(budget / per_rank)))


def fit_to_budget(backbone: nn.Module, config: MoeConfig, budget: int) -> MoeConfig:
    """A copy of `config` with the rank whose trainable parameters come closest to `budget`; all else as it was.

    The scale of the experts is kept. A rank that differs between layers is scaled as a whole.

    Raises:
        ValueError: if even rank 1 costs more than 1.5 times the budget.
    """

    def with_rank(r: int) -> MoeConfig:
        fitted = copy.deepcopy(config)
        old = config.r if isinstance(config.r, int) else 1
        ratio = r / old
        fitted.r, fitted.lora_alpha = r, config.lora_alpha * (ratio**0.5 if config.use_rslora else ratio)
        return fitted

    if not isinstance(config.r, int):
        raise refuse("r", config.r, "one number when it is to be fitted to a budget", "Set `r` to a number.")
    one, two = (count_config(backbone, with_rank(r)).trainable for r in (1, 2))
    if one > 1.5 * budget:
        raise refuse(
            "budget", budget, f"at least {one}, what rank 1 costs", "Use fewer experts or adapt fewer modules."
        )
    return with_rank(max(1, round(1 + (budget - one) / (two - one))))


def budget_line(model: PeftModel, adapter_name: str = "default") -> str:
    """One sentence: trainable, router and active parameters of an adapter."""
    count = count_parameters(model, adapter_name)
    return (
        f"{count.trainable:,} trainable parameters in {count.layers} layers, of them {count.router:,} in routers; "
        f"a token uses {count.active:,}"
    )
