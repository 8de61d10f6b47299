"""Experts weights averaging (EWA, arXiv:2308.06093): after each optimizer step the experts move towards each other.

    theta_e <- (1 - beta) theta_e + beta mean_{j != e} theta_j

An expert's weight is the product B_e A_e, and the mean of products is the product of means only where the experts have
one factor in common: with one A for all (HydraLoRA, or copies with A frozen) averaging B is exact. Else it is an
approximation, good as long as the A have not moved far from a common start. B is always averaged, A if asked for.

The paper routes at random while training, which is a setting of the adapter, and collapses the experts to their mean when
training ends, which `moe_peft.merge.fit_static(method="mean")` does.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from moe_peft.callbacks import _is_sharded
from moe_peft.errors import refuse
from moe_peft.frozen import frozen_experts
from moe_peft.tuners.rank_moe import RankExperts
from moe_peft.tuners.router import Router


class EwaCallback(TrainerCallback):
    """Experts weights averaging for every routed adapter that a transformers or TRL trainer trains.

    Args:
        beta: how far an expert moves towards the mean of the others in one step; above 0 and below 1. Kept constant, where
            the paper has a schedule.
        average_A: average A as well. For experts that started alike (`init_experts_from_lora`, "spawn").

    Raises:
        ValueError: another beta; at the start of training, parameters that FSDP or DeepSpeed have sharded, or an adapter
            whose experts are ranks.
    """

    def __init__(self, beta: float = 0.001, average_A: bool = False) -> None:
        if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not math.isfinite(beta) or not 0 < beta < 1:
            raise refuse("beta", beta, "above 0 and below 1", "0.001 to 0.01 are common.")
        self.beta, self.average_A = beta, average_A

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if _is_sharded():
            raise ValueError(
                "`EwaCallback` averages whole experts, and FSDP or DeepSpeed has sharded them: leave it out."
            )
        if model is not None and any(_averages_ranks(module) for module in model.modules()):
            raise ValueError(
                "`EwaCallback` moves the B of all experts towards each other, and the experts of RankMoeConfig are the ranks "
                "of one LoRA: with all B alike it would have rank 1. Leave it out, or use LinearMoeConfig."
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if model is not None:
            average_experts(model, self.beta, self.average_A)


@torch.no_grad()
def average_experts(model: nn.Module, beta: float, average_A: bool = False) -> None:
    """One step of EWA on every trainable routed adapter of `model`; shared experts, experts that `freeze_experts` holds
    still, ranks and routers stay.

    Args:
        beta: as in `EwaCallback`.
        average_A: likewise.
    """
    for module in model.modules():
        if not isinstance(module, Router) or isinstance(module, RankExperts):
            continue
        experts = len(module.lora_B) - int(getattr(module, "num_shared", 0))
        for factor in (module.lora_B, module.lora_A) if average_A else (module.lora_B,):
            if factor.requires_grad and experts > 1 and len(factor) >= experts:
                held = list(frozen_experts(module))
                kept = factor[held].clone()
                factor[:experts] = averaged(factor[:experts], beta)
                factor[held] = kept


def _averages_ranks(module: nn.Module) -> bool:
    return isinstance(module, RankExperts) and module.lora_B.requires_grad


def averaged(theta: Tensor, beta: float) -> Tensor:
    """`(1 - beta) theta_e + beta mean_{j != e} theta_j` for `theta [E, ...]`, computed in fp32 or better."""
    wide = theta.to(torch.promote_types(theta.dtype, torch.float32))
    others = (wide.sum(0, keepdim=True) - wide) / (len(wide) - 1)
    return torch.lerp(wide, others, beta).to(theta.dtype)
