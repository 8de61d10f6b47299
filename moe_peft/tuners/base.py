"""What every adapter type shares with PEFT's model class: which layers, how many experts, loading, merge rules."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
)
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn

from moe_peft.allocation import expand, is_uniform, parse
from moe_peft.attach import RoutingContext
from moe_peft.config import MoeConfig
from moe_peft.errors import refuse
from moe_peft.routing_control import ModelControl
from moe_peft.tuners.layer import MoeTunerLayer, linear_features, unmergeable


_LAYER_NUMBER = re.compile(r"(?P<layers>.*?\.[^.]*)\.(?P<number>\d+)\.")

after_injection: list[Callable[[bool], None]] = []
"""Called after each injection with whether the adapter is to be trained; the package puts its trainer hook here."""


def layer_place(key: str) -> tuple[str, int] | None:
    """`("model.layers", 3)` of `"model.layers.3.mlp.up_proj"`; None for a name without a layer number."""
    match = _LAYER_NUMBER.match(f".{key}")
    return None if match is None else (match["layers"][1:], int(match["number"]))


def distinct_experts(config: Any, place: tuple[str, str]) -> int | None:
    """How many experts of the layer at this place have weights of their own (`num_distinct_experts`); None for all.

    Raises:
        ValueError: if the config says it by layer and not for this one.
    """
    distinct = config.num_distinct_experts
    if not isinstance(distinct, list):
        return distinct
    numbered = layer_place(".".join(place))
    if numbered is None or numbered[1] >= len(distinct):
        allowed = f"one number, or a list that has an entry for {'.'.join(place).lstrip('.')}"
        raise refuse("num_distinct_experts", distinct, allowed, "Its entries count by layer, from 0.")
    return distinct[numbered[1]]


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
    context_cls: type[RoutingContext] = RoutingContext

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
        layer = self._new_layer(target, target_name, parent, current_key)
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, peft_config, num_experts, r)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _new_layer(self, target: nn.Module, target_name: str, parent: nn.Module, current_key: str) -> MoeTunerLayer:
        """A layer around `target`, without adapters yet."""
        linear_features(target.get_base_layer() if isinstance(target, BaseTunerLayer) else target)
        layer = self.layer_cls(target, self._context(), get_quantization_kwargs(self.model))
        layer.place = (current_key.rpartition(".")[0], target_name)
        return layer

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a layer in the place of its base layer, on the same device, or the base layer back in its own place."""
        if isinstance(new_module, MoeTunerLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            # PEFT would assign weight and bias as well, which are this layer's own already, and which a merged
            # trainable-token layer shows as a plain tensor that cannot be assigned.
            setattr(parent, child_name, new_module)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # bitsandbytes repacks a 4-bit weight in place on AVX512-BF16 CPUs the first time it sees eval(). After that it
        # dequantises wrongly and gives its input no gradient, on layers without an adapter too: the ones below stop
        # learning. The library's own switch keeps it from doing so.
        repacked = False
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
                repacked |= _unpack(module)
        super().inject_adapter(model, adapter_name, *args, **kwargs)  # "pissa" reads the weights
        if repacked:
            warnings.warn(
                "The 4-bit base model was evaluated before the adapter was added, so bitsandbytes had repacked its weights "
                "for CPU inference and rounded their scales to bfloat16. They are unpacked again, but the rounding stays: "
                "to keep the base as it was, add the adapter before the first evaluation.",
                stacklevel=2,
            )
        self._take_buffers_of_twin(model, adapter_name)
        for hook in after_injection:
            hook(not self.peft_config[adapter_name].inference_mode)

    def _twins(self, adapter_name: str) -> list[str]:
        """The adapters that this one is a second form of: TRL makes its reference adapter from the very config object of
        the trained one and copies the parameters over, but not the buffers."""
        config = self.peft_config[adapter_name]
        return [name for name, other in self.peft_config.items() if other is config and name != adapter_name]

    def _take_buffers_of_twin(self, model: nn.Module, adapter_name: str) -> None:
        """Choose experts as the twin does, whose biases, frozen routers and indices are buffers."""
        for name in self._twins(adapter_name)[:1]:
            for layer in model.modules():
                for container in layer.adapter_layer_names if isinstance(layer, MoeTunerLayer) else ():
                    held = getattr(layer, container)
                    if name in held and adapter_name in held:
                        for key, buffer in held[adapter_name].named_buffers():
                            buffer.copy_(held[name].get_buffer(key))

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
        context = self.context_cls()
        context.watch_attention(self.model)
        ModelControl.install(self.model)
        return context

    def _allocated(self, config: MoeConfig, key: str) -> tuple[int, int]:
        """The number of experts and the rank for the layer that `key` names."""
        if is_uniform(config.num_experts) and is_uniform(config.r):
            return parse(config.num_experts, "num_experts")[0], parse(config.r, "r")[0]
        place = layer_place(key)
        if place is None:
            raise ValueError(
                f"`num_experts` = {config.num_experts!r} and `r` = {config.r!r} differ between layers, but the target "
                f"'{key}' has no layer number in its name. Use one number for both, or exclude that module."
            )
        layers, number = place
        total = len(list(self.model.get_submodule(layers).children()))
        return expand(config.num_experts, total, "num_experts")[number], expand(config.r, total, "r")[number]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._refuse_routed(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._refuse_routed(kwargs.get("adapter_names"))
        context = self._context()
        base = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        ModelControl.release(base)
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
            with self._context().one_call():
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
