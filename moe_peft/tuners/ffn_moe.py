"""A router on each FFN block: MixLoRA (arXiv:2404.15159), LLaVA-MoLE (arXiv:2401.16160), and the space around them.

Each expert is the frozen block with a LoRA of its own on every linear. With h the block's input:

    G_e = W_g h + s B_e A_e h,   U_e likewise,   O_e = W_d (act(G_e) * U_e) + s B_e A_e (act(G_e) * U_e)
    y = sum_{e chosen} g_e O_e,   g = rule(c R h)

The frozen products are computed once for all experts, as W_d is linear: the gated sum of the hidden units goes through
it once. Linears of the model that belong to no FFN block (attention) carry one plain LoRA each, as in MixLoRA.

Two paths compute the same function. On the general one the linears themselves fan out and in: those that read the
block's input return their output once per slot, `[*, K, f]`, the block's own code runs on it, and the last linear sums
the slots up. On the fast one (`ffn_fast`), for blocks of transformers whose code is known, one autograd function stands
between the frozen products and keeps nothing of width f but them. A base that accelerate has hooked before injection
(`force_hooks`, `device_map="auto"` over several devices) has a `forward` of accelerate's on each block, and so takes the
general path.
"""

from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from torch import Tensor, nn

from moe_peft.attach import RoutingContext
from moe_peft.balance import BY_ROW
from moe_peft.config import FfnMoeConfig
from moe_peft.errors import refuse
from moe_peft.ffn_names import BlockNames
from moe_peft.routing import Routing
from moe_peft.tuners.base import MoeTuner, MoeTunerLayer, distinct_experts
from moe_peft.tuners.ffn_blocks import find_blocks, looked_for
from moe_peft.tuners.ffn_experts import FfnExperts
from moe_peft.tuners.ffn_fast import FastForward
from moe_peft.tuners.principal import start_from_principal


class Pending(NamedTuple):
    """The routing of the block's input, from the first linear that sees it to the last."""

    x: Tensor
    adapter_name: str
    routing: Routing


class MixedBlock:
    """What the linears of one FFN block share. One per block, for all adapters.

    Attributes:
        names: which linears they are.
        layers: by name, in the order of `names.all`, once they have adapters.
        pending: set by the first linear, cleared by the last.
        fast: the fast path, where the block is one that it knows.
    """

    def __init__(self, names: BlockNames, parent: nn.Module) -> None:
        self.names = names
        self.layers: dict[str, FfnMoeLinear] = {}
        self.pending: Pending | None = None
        self.fast = FastForward.install(self, parent)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not in the middle of a pass, even if this one was stopped there."""
        return {**self.__dict__, "pending": None}

    def routing(self, x: Tensor, adapter_name: str) -> Routing:
        """The routing for the block's input, computed by the first of its linears that asks."""
        if self.pending is None or self.pending.x is not x or self.pending.adapter_name != adapter_name:
            first = self.layers[self.names.ins[0]]
            routing = first.ffn_moe_experts[adapter_name]("route", x, first.context)
            self.pending = Pending(x, adapter_name, routing)
        return self.pending.routing

    def take(self, adapter_name: str) -> Routing:
        """The routing for the linear that closes the block."""
        if self.pending is None or self.pending.adapter_name != adapter_name:
            raise RuntimeError(
                f"`{self.names.out}` of an FFN mixture was called before {' and '.join(self.names.ins)}: its input has "
                "no experts yet. Call the block as a whole."
            )
        routing, self.pending = self.pending.routing, None
        return routing


class FfnMoeLinear(MoeTunerLayer):
    """A frozen linear: of an FFN block, with its part of the experts; or elsewhere, with a plain LoRA."""

    adapter_layer_names = ("ffn_moe_experts",)
    other_param_names = ("r", "num_experts", "scaling")

    def __init__(self, base_layer: nn.Module, context: RoutingContext, quantization: dict[str, Any]) -> None:
        super().__init__(base_layer, context, quantization)
        self.ffn_moe_experts = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.num_experts: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.block: MixedBlock | None = None
        self.name = ""

    def join(self, block: MixedBlock, name: str) -> None:
        """Become the linear `name` of `block`."""
        self.block, self.name = block, name
        block.layers[name] = self

    def update_layer(self, adapter_name: str, config: FfnMoeConfig, num_experts: int, r: int) -> None:
        """Give the adapter its part on this linear."""
        in_block = self.block is not None
        routes = self.block is not None and self.name == self.block.names.ins[0]
        distinct = distinct_experts(config, self.place) if in_block else None
        experts = FfnExperts(config, self.in_features, self.out_features, num_experts, r, in_block, routes, distinct)
        start_from_principal(self, experts, config)
        self.ffn_moe_experts[adapter_name] = experts
        self.r[adapter_name], self.scaling[adapter_name] = r, experts.scaling
        self.num_experts[adapter_name] = num_experts if self.block is not None else 1
        self.context.wants_prompt |= config.router_granularity == "sequence"
        self.context.wants_rows |= config.balance in BY_ROW
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def holds(self, adapter_name: str) -> bool:
        return adapter_name in self.ffn_moe_experts

    def is_static(self, adapter_name: str) -> bool:
        return not self.holds(adapter_name) or not _experts(self.ffn_moe_experts[adapter_name]).coupled

    def check_one_mixture(self, names: list[str]) -> None:
        """Refuse to follow two routers.

        Raises:
            ValueError: if two of the adapters route here.
        """
        coupled = [name for name in names if self.holds(name) and not self.is_static(name)]
        if len(coupled) > 1:
            raise ValueError(
                f"The FFN mixtures {' and '.join(map(repr, coupled))} cannot be active at once: one block can follow one "
                "router only. Call `model.set_adapter` with one of them."
            )

    def coupled_adapter(self) -> str | None:
        """The active adapter whose experts a router chooses here, or None."""
        names = self.active_adapters
        if len(names) > 1:
            self.check_one_mixture(names)
        return next((name for name in names if self.holds(name) and not self.is_static(name)), None)

    def add_experts_output(self, x: Tensor, y: Tensor, adapter_name: str) -> Tensor:
        return self.ffn_moe_experts[adapter_name]("add", x, y)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_name = None if self.disable_adapters or self.merged else self.coupled_adapter()
        if adapter_name is None or kwargs.get("adapter_names") is not None:
            return super().forward(x, *args, **kwargs)
        assert self.block is not None
        experts = self.ffn_moe_experts[adapter_name]
        if self.name != self.block.names.out:
            routing = self.block.routing(x, adapter_name)
            return experts("fan_out", x, self.below(x, *args, **kwargs), routing)
        routing = self.block.take(adapter_name)
        mixed, z = experts("fan_in", x, routing)
        y = self.weighted_bias(self.below(mixed, *args, **kwargs), routing, _experts(experts).normalised)
        return experts("back", mixed, y, z)

    def below(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The frozen layer's output plus that of the active plain LoRAs."""
        y = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            if self.holds(name) and self.is_static(name):
                y = self.add_experts_output(x, y, name)
        return y

    def weighted_bias(self, y: Tensor, routing: Routing, normalised: bool) -> Tensor:
        """`y`, whose frozen bias counts once, with the bias counted as often as the weights say."""
        bias = getattr(self.get_base_layer(), "bias", None)
        if normalised or bias is None:
            return y
        excess = routing.top_k_weights.sum(-1, keepdim=True) - 1
        return y + (excess * bias.to(excess.dtype)).to(y.dtype).view(y.shape)

    def _mixed_batch(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        routed = [name for name in dict.fromkeys(adapter_names) if self.holds(name) and not self.is_static(name)]
        if routed:
            raise ValueError(
                f"`adapter_names` asks for {', '.join(map(repr, routed))}, an FFN mixture: its experts share the block's "
                "frozen layers, so one batch cannot hold rows of several. Send the rows in separate batches."
            )
        return super()._mixed_batch(x, adapter_names, *args, **kwargs)


def _experts(module: nn.Module) -> FfnExperts:
    """The leaf itself, also where FSDP1 has wrapped it."""
    return getattr(module, "_fsdp_wrapped_module", module)  # type: ignore[return-value]


class FfnMoeModel(MoeTuner):
    """Registered with PEFT as `FFN_MOE`; made by `get_peft_model(model, FfnMoeConfig(...))`."""

    prefix = "ffn_moe_"
    tuner_layer_cls = FfnMoeLinear
    layer_cls = FfnMoeLinear

    def _prepare_adapter_config(self, peft_config: FfnMoeConfig, model_config: dict) -> FfnMoeConfig:
        if peft_config.target_modules is None:
            blocks = find_blocks(self.model)
            if not blocks:
                raise _no_block(self.model)
            peft_config.target_modules = {
                name if parent.rpartition(".")[2].isdigit() else f"{parent.rpartition('.')[2]}.{name}"
                for parent, block in blocks.items()
                for name in block.all
            }
        return peft_config

    def _prepare_model(self, peft_config: FfnMoeConfig, model: nn.Module) -> None:
        """Find the blocks, and refuse a part of one before anything is replaced."""
        written = _short(peft_config.target_modules)
        _maybe_include_all_linear_layers(peft_config, model)
        self._block_names = find_blocks(model)
        if not self._block_names:
            raise _no_block(model)
        wanted = 0
        for parent, block in self._block_names.items():
            keys = [f"{parent}.{name}" if parent else name for name in block.all]
            chosen = [key for key in keys if bool(self._check_target_module_exists(peft_config, key))]
            if 0 < len(chosen) < len(keys):
                missing = [key for key in keys if key not in chosen]
                raise refuse(
                    "target_modules",
                    written,
                    f"all linears of an FFN block or none: it holds {', '.join(chosen)} but not {', '.join(missing)}",
                    "The experts of a block share one router. Add the missing names, leave `target_modules` out, or see what "
                    "`exclude_modules` takes away.",
                )
            wanted += len(chosen)
        if not wanted:
            raise refuse(
                "target_modules",
                written,
                f"names that hold an FFN block, such as {', '.join(next(iter(self._block_names.values())).all)}",
                "Without one there is nothing to route; for plain LoRA use `peft.LoraConfig`.",
            )

    def _new_layer(self, target: nn.Module, target_name: str, parent: nn.Module, current_key: str) -> MoeTunerLayer:
        """A layer that knows its block, which the first of the block's linears makes."""
        layer = super()._new_layer(target, target_name, parent, current_key)
        assert isinstance(layer, FfnMoeLinear)
        names = self._block_names.get(current_key.rpartition(".")[0])
        if names is not None and target_name in names.all:
            layer.join(_block(parent, names), target_name)
        return layer

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        blocks = {id(m.block): m.block for m in self.model.modules() if isinstance(m, FfnMoeLinear) and m.block}
        base = super()._unload_and_optionally_merge(*args, **kwargs)
        for block in blocks.values():
            if block.fast is not None:
                block.fast.remove()
        return base

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's; two FFN mixtures at once are refused before anything changes."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for layer in self.model.modules():
            if isinstance(layer, FfnMoeLinear):
                layer.check_one_mixture(names)
        super().set_adapter(adapter_name, inference_mode)


def _block(parent: nn.Module, names: BlockNames) -> MixedBlock:
    """The block that the parent's other linears have joined already, or a new one."""
    for name in names.all:
        child = getattr(parent, name)
        if isinstance(child, FfnMoeLinear) and child.block is not None:
            return child.block
    return MixedBlock(names, parent)


def _short(target_modules: Any) -> Any:
    """As the user wrote it, if that is short enough to be read in a sentence."""
    names = sorted(target_modules) if isinstance(target_modules, set) else target_modules
    return names if len(str(names)) <= 200 else f"{str(names)[:200]} ..."


def _no_block(model: nn.Module) -> ValueError:
    kind = type(model).__name__
    return ValueError(
        f"{kind} has no FFN block that `ffn_moe` could share among experts. Looked for {looked_for()}; the linear layers "
        f"that are there: {', '.join(sorted(_linear_names(model))[:12])}. Use `linear_moe`, which needs linear layers only."
    )


def _linear_names(model: nn.Module) -> set[str]:
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, BaseTunerLayer)) or type(module).__name__ == "Conv1D"
    }
