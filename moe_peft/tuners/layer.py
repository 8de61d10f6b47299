"""A wrapped layer: the frozen linear's output plus what each adapter adds, mixed batches, exact merge and its undoing.

It keeps the linear's signature, return type and dtype. The frozen layer is called, never opened, so one class serves
plain and quantised linears alike; only an exact merge reads its weight, through PEFT's quantisation backends.
"""

import copy
from abc import abstractmethod
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn

from moe_peft.attach import RoutingContext
from moe_peft.routing import routing_dtype


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

    Attributes:
        place: the key of its parent in the model and its name there.
    """

    place: tuple[str, str] = ("", "")

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
    def holds(self, adapter_name: str) -> bool:
        """Whether this layer has weights of the adapter."""

    def routes_sequences(self) -> bool:
        """Whether an active adapter's router looks at prompts here."""
        active = [] if self.disable_adapters else self.active_adapters
        return any(getattr(self.experts(name), "by_sequence", False) for name in active if self.holds(name))

    def experts(self, adapter_name: str) -> Any:
        """The module that holds the adapter's `lora_A [n, r, d_in]` and `lora_B [n, r, d_out]` here."""
        return getattr(self, self.adapter_layer_names[0])[adapter_name]

    def expert_names(self, adapter_name: str) -> list[str]:
        """What the experts that a token may choose from are called, in order: "0", "1" ... unless they have names.

        Where `group_experts` has merged some, each of the router's choices keeps its name.
        """
        experts = self.experts(adapter_name)
        names = getattr(experts, "domains", None)
        counts = (getattr(experts, which, None) for which in ("num_rows", "num_routed", "num_experts"))
        number = next((count for count in counts if count), 1)
        return list(names) if names else [str(expert) for expert in range(number)]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As PEFT's, but buffers do not follow a base weight that is away on disk: parameters alone come back from there."""
        experts = self.experts(adapter_name)
        here = {name: buffer for name, buffer in experts.named_buffers(recurse=False) if not buffer.is_meta}
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for name, buffer in here.items():
            if experts.get_buffer(name).is_meta:
                setattr(experts, name, buffer)

    def static_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """The one LoRA that a static adapter is: A `[n, d_in]`, B `[n, d_out]`, in fp32 or better, all scales in B.

        Raises:
            ValueError: if the adapter is routed.
        """
        if not self.is_static(adapter_name):
            raise ValueError(f"Adapter '{adapter_name}' is routed: its delta depends on the token.")
        experts = self.experts(adapter_name)
        A, B = (factor.flatten(0, 1).to(routing_dtype(factor.dtype)) for factor in (experts.lora_A, experts.lora_B))
        return A, experts.scaling * B

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What a static adapter adds to every token, in the layout and dtype of the base weight.

        Raises:
            ValueError: if the adapter is routed.
        """
        A, B = self.static_factors(adapter_name)
        delta = B.T @ A
        if type(self.get_base_layer()).__name__ == "Conv1D":
            delta = delta.T
        return delta.to(self.get_base_weight().dtype)

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
                with self.context.of_rows(rows, len(x)):
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
