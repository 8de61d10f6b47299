"""Some experts of an adapter held still while the others learn: their rows of every gradient are zero.

PEFT freezes whole parameters, and the experts of a layer are slices of one. A forward pre-hook on the experts' module
puts the mask on the gradient of whatever parameters the module has by then, so that it outlives `set_adapter`, a
reference pass without the adapter, and `copy.deepcopy`. It is not saved with the adapter.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary


_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> its mask; a copied parameter has none yet


class _Mask:
    """Zeroes rows of a gradient."""

    def __init__(self, rows: tuple[int, ...], length: int) -> None:
        self.rows, self.length, self.handle = rows, length, None

    def __call__(self, grad: Tensor) -> Tensor:
        if grad.shape[0] != self.length:
            raise RuntimeError(
                "The gradient of frozen experts is sharded, so their rows cannot be told from the others'. Train without "
                "FSDP or ZeRO-3, or with `freeze_old=False`."
            )
        grad = grad.clone()
        grad[list(self.rows)] = 0
        return grad


class _Frozen:
    """The forward pre-hook."""

    def __init__(self, experts: tuple[int, ...]) -> None:
        self.experts = experts

    def __call__(self, module: Any, args: tuple) -> None:
        if torch.is_grad_enabled():
            mask_gradients(module, self.experts)


def mask_gradients(module: Any, experts: tuple[int, ...]) -> None:
    for name in ("lora_A", "lora_B", "router", "router_bias"):
        parameter = getattr(module, name, None)
        if not isinstance(parameter, nn.Parameter) or not parameter.requires_grad:
            continue
        # What all experts share cannot move without moving the frozen ones.
        whole = name == "lora_A" and len(parameter) < len(module.lora_B)
        rows = (0,) if whole else experts
        mask = _masks.get(parameter)
        if mask is not None and mask.rows == rows:
            continue
        if mask is not None:
            mask.handle.remove()
        _masks[parameter] = mask = _Mask(rows, len(parameter))
        mask.handle = parameter.register_hook(mask)


def frozen_experts(module: nn.Module) -> tuple[int, ...]:
    """The numbers of the experts that `freeze` holds still on this module."""
    return next((hook.experts for hook in module._forward_pre_hooks.values() if isinstance(hook, _Frozen)), ())


def freeze(module: nn.Module, experts: Iterable[int]) -> None:
    """Hold these routed experts of the module and their router rows still, and no others; none frees all."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, _Frozen):
            del module._forward_pre_hooks[key]
    for parameter in module.parameters(recurse=False):
        mask = _masks.pop(parameter, None)
        if mask is not None:
            mask.handle.remove()
    numbers = tuple(sorted(set(experts)))
    if numbers:
        module.register_forward_pre_hook(_Frozen(numbers))
