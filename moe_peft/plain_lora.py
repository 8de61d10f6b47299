"""A static adapter as one plain LoRA, exactly: pools and splits, experts by lot, and mixtures with a single expert."""

from pathlib import Path

from peft import LoraConfig, PeftModel
from torch import Tensor

from moe_peft.errors import refuse
from moe_peft.merge import Factors, factors_to_peft, routed_layers, save_static


def is_plain(model: PeftModel, adapter_name: str = "default") -> bool:
    """Whether the adapter adds one linear map to each layer, so that a LoRA can be the same function."""
    return all(layer.is_static(adapter_name) for layer in routed_layers(model, adapter_name).values())


def lora_factors(model: PeftModel, adapter_name: str = "default") -> dict[str, Factors]:
    """The LoRA of each layer, with the scale in B.

    Raises:
        ValueError: if the adapter is routed, or trained weights that a LoRA has no place for.
    """
    layers = routed_layers(model, adapter_name)
    routed = [name for name, layer in layers.items() if not layer.is_static(adapter_name)]
    if routed:
        raise ValueError(
            f"Adapter '{adapter_name}' is routed in {len(routed)} layers ({routed[0]}, ...), so that no plain LoRA equals it. "
            "`moe-peft merge` fits one to calibration text and prints what that loses."
        )
    config = model.peft_config[adapter_name]
    for field in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, field, None):
            remedy = (
                "The plain LoRA would lose the weights that were trained there: call `merge_and_unload()` instead."
            )
            raise refuse(field, getattr(config, field), "None for a plain LoRA", remedy)
    static = {name: layer.static_factors(adapter_name) for name, layer in layers.items()}
    return {name: Factors(A.detach().float(), B.detach().float().T) for name, (A, B) in static.items()}


def to_lora(model: PeftModel, adapter_name: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
    """A plain PEFT LoRA that computes what the adapter computes in inference.

    Args:
        model: with the adapter; it is left as it is.
        adapter_name: which of its adapters.

    Returns:
        the config, and the tensors as PEFT saves them; `save_lora` writes both.

    Raises:
        ValueError: if there is no such adapter, it is routed, or a LoRA has no place for all that it trained.
    """
    factors = lora_factors(model, adapter_name)
    config = model.peft_config[adapter_name]
    return factors_to_peft(factors, config.base_model_name_or_path, config.task_type)


def save_lora(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> LoraConfig:
    """Write `to_lora` as an adapter that stock PEFT, vLLM and others load without this package.

    Raises:
        ValueError: as `to_lora`.
    """
    factors = lora_factors(model, adapter_name)
    config = model.peft_config[adapter_name]
    return save_static(factors, Path(folder), config.base_model_name_or_path, task_type=config.task_type)
