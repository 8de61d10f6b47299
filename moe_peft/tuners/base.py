"""What every adapter type shares with PEFT: which layers, adapter-keyed modules, wrap-and-add forward, merge rules.

A wrapped layer keeps its signature, return type and dtype. The frozen layer is called, never opened, so one class
serves plain and quantised linears alike; only an exact merge reads its weight, through PEFT's quantisation backends.
"""

import copy
import re
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
)
from peft.utils.quantization_utils import (
    get_quantization_kwargs,
    quantization_extra_repr,
    resolve_quantization_backend,
)
from torch import Tensor, nn

from moe_peft.allocation import expand, is_uniform, parse
from moe_peft.attach import RoutingContext
from moe_peft.config import MoeConfig


_LAYER_NUMBER = re.compile(r"(?P<layers>.*?\.[^.]*)\.(?P<number>\d+)\.")

after_injection: list[Callable[[bool], None]] = []
"""Called after each injection with whether the adapter is to be trained; the package puts its trainer hook here."""


def linear_features(module: nn.Module) -> tuple[int, int]:
    """`(d_in, d_out)` of anything that acts as a linear layer.

    Raises:
        TypeError: if the module is not linear.
    """
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)
    if type(module).__name__ == "Conv1D":  # transformers' GPT-2 layer stores [d_in, d_out]
        d_in, d_out = module.get_parameter("weight").shape
        return int(d_in), int(d_out)
    raise TypeError(
        f"Target module of type {type(module).__name__} is not supported: routed experts are added to linear layers "
        "(`nn.Linear`, transformers' `Conv1D` and their quantised forms). Narrow `target_modules`."
    )


class MoeTunerLayer(nn.Module, BaseTunerLayer):
    """The frozen layer's output plus what each active adapter adds. Abstract: a type says what an adapter is.

    Subclasses name their containers in `adapter_layer_names` and `other_param_names` and fill them in `update_layer`.
    """

    def __init__(self, base_layer: nn.Module, context: RoutingContext, quantization: dict[str, Any]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.context = context
        self.in_features, self.out_features = linear_features(self.get_base_layer())
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization)
        self.frozen_peft_weight_names = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._packed_weight: nn.Parameter | None = None
        self._packed_state: Any = None

    @abstractmethod
    def add_experts_output(self, x: Tensor, y: Tensor, adapter_name: str) -> Tensor:
        """`y` plus the adapter's output for `x`; same shape and dtype as `y`, which is not edited."""

    @abstractmethod
    def is_static(self, adapter_name: str) -> bool:
        """Whether the adapter adds the same linear map to every token, so that it can be merged."""

    @abstractmethod
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """That linear map, in the layout of the base weight. Only for a static adapter."""

    @abstractmethod
    def holds(self, adapter_name: str) -> bool:
        """Whether this layer has weights of the adapter."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return y
        for name in self.active_adapters:
            if self.holds(name):
                y = self.add_experts_output(x, y, name)
        return y

    def _mixed_batch(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        y = self.base_layer(x, *args, **kwargs)
        parts = y.clone()
        for name in sorted(set(adapter_names)):
            if name != "__base__" and self.holds(name):
                rows = [row for row, wanted in enumerate(adapter_names) if wanted == name]
                parts[rows] = self.add_experts_output(x[rows], y[rows], name)
        return parts

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add static adapters to the base weight. The packed weight of a quantised layer is kept for `unmerge`.

        Raises:
            ValueError: if an adapter is routed, or the merged weight is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.holds(name)]
        for name in names:
            if not self.is_static(name):
                raise ValueError(unmergeable(name))
        for name in names:
            merged = self.get_base_weight() + self.get_delta_weight(name)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            if self.quantization_backend is not None and self._packed_weight is None:
                self._packed_weight = self.get_base_layer().weight
                # bitsandbytes' 8-bit layer computes from its state, not from its weight.
                self._packed_state = copy.copy(getattr(self.get_base_layer(), "state", None))
            self.set_base_weight(merged.to(self._base_dtype()))
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo `merge`: subtract, or put the packed weight of a quantised layer back bit for bit."""
        if not self.merged:
            return
        if self._packed_weight is not None:
            self.get_base_layer().weight = self._packed_weight
            if self._packed_state is not None:
                self.get_base_layer().state = self._packed_state
            self._packed_weight = self._packed_state = None
            self.merged_adapters.clear()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self.set_base_weight((self.get_base_weight() - self.get_delta_weight(name)).to(self._base_dtype()))

    def _base_dtype(self) -> torch.dtype:
        return self.get_base_weight().dtype

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.is_static(adapter_name)

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def unmergeable(adapter_name: str) -> str:
    """Why a routed adapter has no weight, and the two ways out."""
    return (
        f"Adapter '{adapter_name}' cannot be merged into the base weights: its routing depends on the token, so no "
        "single weight equals it. Serve it unmerged (transformers' `generate` works as it is), or run `moe-peft merge` "
        "to get one plain LoRA fitted to calibration text, with the loss that this costs measured and printed."
    )


def misfit(adapter_name: str, problems: list[str], shown: int = 20) -> str:
    """Why a weights file was not loaded, a line for each tensor."""
    more = [f"and {len(problems) - shown} more"] if len(problems) > shown else []
    return "\n- ".join(
        [
            f"The saved weights do not fit adapter '{adapter_name}', and none were loaded. Either the file is not the one "
            "that was saved with this `adapter_config.json`, or the base model is not the one it was trained on:",
            *sorted(problems)[:shown],
            *more,
        ]
    )


class MoeTuner(BaseTuner):
    """Finds the layers, gives each its number of experts and its rank, and refuses what cannot be merged. Abstract."""

    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    layer_cls: type[MoeTunerLayer]

    def _create_and_replace(
        self,
        peft_config: MoeConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")
        num_experts, r = self._allocated(peft_config, current_key)
        if isinstance(target, self.layer_cls):
            target.update_layer(adapter_name, peft_config, num_experts, r)
            return
        linear_features(target.get_base_layer() if isinstance(target, BaseTunerLayer) else target)
        layer = self.layer_cls(target, self._context(), get_quantization_kwargs(self.model))
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, peft_config, num_experts, r)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a layer in the place of its base layer, on the same device, or the base layer back in its own place."""
        if isinstance(new_module, MoeTunerLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            # PEFT would assign weight and bias as well, which are this layer's own already, and which a merged
            # trainable-token layer shows as a plain tensor that cannot be assigned.
            setattr(parent, child_name, new_module)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # bitsandbytes repacks a 4-bit weight in place on AVX512-BF16 CPUs the first time it sees eval(). After that it
        # dequantises wrongly and gives its input no gradient, on layers without an adapter too: the ones below stop
        # learning. The library's own switch keeps it from doing so.
        repacked = False
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
                repacked |= _unpack(module)
        if repacked:
            warnings.warn(
                "The 4-bit base model was evaluated before the adapter was added, so bitsandbytes had repacked its weights "
                "for CPU inference and rounded their scales to bfloat16. They are unpacked again, but the rounding stays: "
                "to keep the base as it was, add the adapter before the first evaluation.",
                stacklevel=2,
            )
        for hook in after_injection:
            hook(not self.peft_config[adapter_name].inference_mode)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoeConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The checkpoint's tensors under the names that the model has for them, all of them and no others.

        Raises:
            ValueError: if tensors of the adapter are missing, left over or of another shape. PEFT would go on without
                a word, with fresh experts where the file has none.
        """
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        of_adapter = re.compile(rf"(^|\.){cls.prefix}[^.]*\.{re.escape(adapter_name)}\.")
        expected = {key: tensor.shape for key, tensor in model.state_dict().items() if of_adapter.search(key)}
        if not expected:  # as FSDP shows it to all ranks but the first
            return state_dict
        problems = [f"missing: {key}" for key in expected.keys() - state_dict.keys()]
        for key, tensor in state_dict.items():
            if key not in expected:
                if re.search(rf"(^|\.){cls.prefix}", key):
                    problems.append(f"not in the model: {key}")
            elif tensor.shape != expected[key] and expected[key].numel():  # ZeRO-3 shows 0 for what it has put away
                shapes = f"{list(tensor.shape)}, the config and the base model ask for {list(expected[key])}"
                problems.append(f"of another shape: {key}: {shapes}")
        if problems:
            raise ValueError(misfit(adapter_name, problems))
        return state_dict

    def _context(self) -> RoutingContext:
        for module in self.model.modules():
            if isinstance(module, MoeTunerLayer):
                return module.context
        context = RoutingContext()
        context.watch_attention(self.model)
        return context

    def _allocated(self, config: MoeConfig, key: str) -> tuple[int, int]:
        """The number of experts and the rank for the layer that `key` names."""
        if is_uniform(config.num_experts) and is_uniform(config.r):
            return parse(config.num_experts, "num_experts")[0], parse(config.r, "r")[0]
        match = _LAYER_NUMBER.match(f".{key}")
        if match is None:
            raise ValueError(
                f"`num_experts` = {config.num_experts!r} and `r` = {config.r!r} differ between layers, but the target "
                f"'{key}' has no layer number in its name. Use one number for both, or exclude that module."
            )
        layers = self.model.get_submodule(match["layers"][1:])
        total, number = len(list(layers.children())), int(match["number"])
        return expand(config.num_experts, total, "num_experts")[number], expand(config.r, total, "r")[number]

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        self._refuse_routed(None)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._refuse_routed(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._refuse_routed(kwargs.get("adapter_names"))
        context = self._context()
        base = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        context.release(base)  # hooks that stayed would take `task_types` from those of the next adapter
        return base

    def _refuse_routed(self, adapter_names: list[str] | None) -> None:
        """Raise before any layer is touched: an error half way would leave the model half merged."""
        for layer in self.model.modules():
            if isinstance(layer, MoeTunerLayer):
                for name in layer.active_adapters if adapter_names is None else adapter_names:
                    if layer.holds(name) and not layer.is_static(name):
                        raise ValueError(unmergeable(name))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [m for m in self.modules() if isinstance(m, (MoeTunerLayer, AuxiliaryTrainingWrapper))]
        known = {name for m in layers if isinstance(m, MoeTunerLayer) for name in self.peft_config if m.holds(name)}
        unknown = set(names) - known - {"__base__"}
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        beams = kwargs.get("num_beams")
        repeated = [name for name in names for _ in range(beams if isinstance(beams, int) else 1)]
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        # An encoder sees each row once. A model without one may answer with itself.
        once = set() if encoder is None or encoder is self.model else set(encoder.modules())
        handles = [
            m.register_forward_pre_hook(partial(_pass_names, names if m in once else repeated), with_kwargs=True)
            for m in layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _unpack(linear4bit: nn.Module) -> bool:
    """Undo what bitsandbytes has done to a 4-bit weight that saw eval(); whether there was anything to undo."""
    state = getattr(linear4bit.weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return False
    linear4bit.state_dict()  # the library unpacks a weight in place before it saves it
    return True


def _pass_names(names: list[str], module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {**kwargs, "adapter_names": names}
