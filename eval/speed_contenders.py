"""The contenders of the speed benchmark that live in this process: the frozen layer, PEFT's LoRA and X-LoRA, and ours.

All have as many active ranks: a LoRA of rank 32, or 8 experts of rank 16 of which a token visits 2 (or, dense, all 8).
"""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import LoraConfig, PeftConfig, XLoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.xlora.layer import XLoraLinearLayer
from speed_shared import (
    DTYPES,
    EXPERTS,
    LINEARS,
    RANK,
    TOP_K,
    Case,
    ModelCase,
    Step,
    layer_step,
    make_base,
    make_inputs,
    make_llama,
    model_step,
)
from torch import Tensor, nn

from moe_peft import LinearMoeConfig


BASE, LORA, XLORA = "frozen layer alone", "PEFT LoRA r=32", "PEFT X-LoRA 8 × r=16"
OURS, BALANCED, DENSE = "ours top-2 of 8", "ours top-2 of 8, balanced", "ours dense 8"


def lora_config() -> LoraConfig:
    return LoraConfig(r=TOP_K * RANK, lora_alpha=16, target_modules=LINEARS, init_lora_weights=False)


def our_config(name: str) -> LinearMoeConfig:
    shared = {"num_experts": EXPERTS, "r": RANK, "target_modules": LINEARS, "init_weights": False}
    if name == DENSE:
        return LinearMoeConfig(routing="softmax", **shared)
    return LinearMoeConfig(top_k=TOP_K, router_aux_loss_coef=0.001 if name == BALANCED else 0.0, **shared)


def layer_contenders(case: Case) -> dict[str, Step]:
    """A step for every contender, all around one frozen layer."""
    base = make_base(case)
    steps = {BASE: layer_step(case, base, [])}
    configs: dict[str, PeftConfig] = {
        LORA: lora_config(),
        **{name: our_config(name) for name in (OURS, BALANCED, DENSE)},
    }
    for name, config in configs.items():
        holder = nn.Module()
        holder.q_proj = base
        holder.is_loaded_in_4bit = case.nf4
        layer = inject_adapter_in_model(config, holder).q_proj
        steps[name] = layer_step(case, layer.train(case.kind == "train"), trained(layer, DTYPES[case.dtype]))
    steps[XLORA] = xlora_layer(case, base)
    if case.kind == "decode":
        del steps[BALANCED]  # balance has no part in inference
    return steps


def trained(module: nn.Module, dtype: torch.dtype) -> list[nn.Parameter]:
    """The parameters to train, in the dtype of the model: PEFT would keep them in fp32 and compute in it."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
    return parameters


def xlora_layer(case: Case, base: nn.Module) -> Step:
    """X-LoRA's layer with given gates: its classifier, and the second pass through the model, are not charged here."""
    holder = nn.Module()
    holder.q_proj = base
    holder.is_loaded_in_4bit = case.nf4
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=["q_proj"], init_lora_weights=False)
    names = [str(number) for number in range(EXPERTS)]
    for name in names:
        holder = inject_adapter_in_model(config, holder, adapter_name=name)
    target = holder.q_proj
    target.set_adapter(names)
    settings = SimpleNamespace(top_k_lora=None, enable_softmax_topk=False, global_scaling_weight=1.0)
    layer = XLoraLinearLayer(SimpleNamespace(disabled=False), target, target.forward, 0, settings)
    parameters = trained(target, DTYPES[case.dtype])
    x, _ = make_inputs(case)
    gates = x[..., :EXPERTS].softmax(-1).unsqueeze(2).requires_grad_(case.kind == "train")

    def forward(x: Tensor) -> Tensor:
        return layer.forward(x, scalings=gates)

    return layer_step(case, forward, parameters)


def model_contenders(case: ModelCase) -> dict[str, Step]:
    """A training step of the whole model for every contender."""
    configs: dict[str, PeftConfig] = {
        LORA: lora_config(),
        **{name: our_config(name) for name in (OURS, BALANCED, DENSE)},
    }
    steps = {}
    for name, config in configs.items():
        model = get_peft_model(make_llama(case), config, autocast_adapter_dtype=False)
        steps[name] = model_step(case, model, trained(model, DTYPES[case.dtype]))
    steps[XLORA] = xlora_model(case)
    return steps


def xlora_model(case: ModelCase) -> Step:
    """PEFT's `XLoraModel` as it is, its experts trainable as everyone else's are."""
    with tempfile.TemporaryDirectory() as folder:
        config = LoraConfig(r=RANK, lora_alpha=16, target_modules=LINEARS, init_lora_weights=False)
        expert = get_peft_model(make_llama(case), config, autocast_adapter_dtype=False)
        paths = {}
        for number in range(EXPERTS):
            paths[str(number)] = str(Path(folder) / str(number))
            expert.save_pretrained(paths[str(number)])
        settings = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=case.width,
            adapters=paths,
            xlora_depth=1,
            xlora_dropout_p=0.0,
            use_trainable_adapters=True,
        )
        model = get_peft_model(make_llama(case), settings, autocast_adapter_dtype=False)
    model.base_model.lora_model.enable_adapter_layers()
    return model_step(case, model, trained(model, DTYPES[case.dtype]))
