"""How many parameters an adapter trains and uses, and the plain LoRA that costs the same.

Counting needs no weights: models are built on the meta device, so that a 7B configuration is counted in a second.
"""

import copy
from typing import Any, NamedTuple, TypeVar

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from moe_peft.allocation import Allocation, parse
from moe_peft.config import MoeConfig
from moe_peft.errors import refuse
from moe_peft.rank_config import RankMoeConfig
from moe_peft.shard_config import ShardPoolConfig
from moe_peft.tuners.base import MoeTunerLayer


ConfigT = TypeVar("ConfigT", MoeConfig, ShardPoolConfig)


class ParameterCount(NamedTuple):
    """Numbers of parameters.

    Attributes:
        trainable: everything that gets a gradient; not the experts that a stage holds still.
        router: the part of it that chooses experts.
        active: what one token uses, trained or held still: the router and the experts that it visits.
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
    still: dict[int, int] = {}  # by id, as layers may share a router
    for layer in layers:
        experts = layer.experts(adapter_name)
        if not hasattr(experts, "visited"):  # without a router every token uses all
            continue
        for name, parameter in experts.named_parameters():
            if not parameter.requires_grad:
                still[id(parameter)] = parameter.numel()
            elif name.startswith("router"):
                router += parameter.numel()
        idle += experts.idle_parameters()
    return ParameterCount(trainable, router, trainable + sum(still.values()) - idle, len(layers))


def train_as_configured(model: PeftModel) -> None:
    """Switch on what was loaded for inference, as its training had it: what a config freezes stays frozen."""
    for name, parameter in model.named_parameters():
        if model.base_model.prefix in name:
            parameter.requires_grad_(True)
    for layer in (m for m in model.modules() if isinstance(m, MoeTunerLayer)):
        layer._freeze_non_trainable_peft_weights()


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


def fit_to_budget(backbone: nn.Module, config: ConfigT, budget: int) -> ConfigT:
    """A copy of `config` with the rank whose trainable parameters come closest to `budget`; all else as it was.

    The scale of the experts is kept. A rank that differs between layers is scaled as a whole: with the largest one k, all
    are multiplied by 1/k, 2/k, ... and rounded, to at least 1.

    Raises:
        ValueError: if even rank 1 (of the largest one) costs more than 1.5 times the budget, or nothing that is trained
            has the rank `r`.
    """
    if config.r == 0:
        remedy = "Its bottlenecks are sized by `bottleneck_size`: set that, or give the task's LoRA a rank."
        raise refuse("r", config.r, "at least 1 where a rank is fitted to a budget", remedy)
    largest = max(parse(config.r, "r"))

    def with_rank(r: int) -> Any:
        if isinstance(config, ShardPoolConfig):
            return config.with_budget_of(r)
        fitted = copy.deepcopy(config)
        ratio = r / largest
        fitted.r = _scaled(config.r, ratio)
        scaled_by_k = isinstance(config, RankMoeConfig) and config.routing == "sigmoid_top_k"
        if not scaled_by_k:
            fitted.lora_alpha = config.lora_alpha * (ratio**0.5 if getattr(config, "use_rslora", False) else ratio)
        return fitted

    def cost(r: int) -> int:
        return count_config(backbone, with_rank(r)).trainable

    one, full = cost(1), cost(2 * largest)
    if one > 1.5 * budget:
        raise refuse(
            "budget", budget, f"at least {one}, what rank 1 costs", "Use fewer experts or adapt fewer modules."
        )
    if full == one:
        remedy = "Its experts are held still, or have ranks of their own: see `train_domains` and `domain_ranks`."
        raise refuse("r", config.r, "the rank of something that is trained, to be fitted to a budget", remedy)
    near = max(1, round(1 + (budget - one) * (2 * largest - 1) / (full - one)))
    if isinstance(config.r, int):
        return with_rank(near)
    # Rounding bends the line: from below, the first that reaches the budget, or the one before.
    while cost(near) < budget:
        near += 1
    while near > 1 and cost(near - 1) >= budget:
        near -= 1
    return with_rank(min((near, max(1, near - 1)), key=lambda r: abs(cost(r) - budget)))


def _scaled(r: Allocation, ratio: float) -> Allocation:
    """An allocation of ranks times `ratio`, written as it was."""
    numbers = [max(1, round(n * ratio)) for n in parse(r, "r")]
    if isinstance(r, int):
        return numbers[0]
    return ":".join(map(str, numbers)) if isinstance(r, str) else numbers


def budget_line(model: PeftModel, adapter_name: str = "default") -> str:
    """One sentence: trainable, router and active parameters of an adapter."""
    count = count_parameters(model, adapter_name)
    return (
        f"{count.trainable:,} trainable parameters in {count.layers} layers, of them {count.router:,} in routers; "
        f"a token uses {count.active:,}"
    )
