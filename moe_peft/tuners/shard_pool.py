"""Ranks assembled from pools that layers share: MoS (arXiv:2410.00938). Splits drawn at random: MoSA (arXiv:2312.02923).

    MoS    y = W x + s B A drop(x),          row j of A, and of B^T: l shards of the pool of this kind of layer
    MoSA   y = W x + s (B * M_i) A drop(x),  i drawn anew for each layer and training pass; B / N in inference
                                             s = alpha / r

No router: a layer is one linear map and can be merged. A pool is a module of the first layer that uses it, and is
registered nowhere else, so that it is saved, moved, counted and frozen once; the other layers hold on to the container
that it lies in. Its own forward consumes its weights, which is what FSDP, ZeRO-3 and offloading ask of a module.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe_peft.attach import RoutingContext
from moe_peft.errors import refuse
from moe_peft.routing import routing_dtype
from moe_peft.shard_config import ShardPoolConfig
from moe_peft.shards import assembled, draw_index, draw_splits, expected, low_rank_added, sampled
from moe_peft.tuners.base import MoeTuner, MoeTunerLayer
from moe_peft.tuners.router import compute_dtype


def _start_A(factor: Tensor, d_in: int) -> None:
    """As `nn.Linear` draws a matrix of `d_in` columns, whatever the length of a shard."""
    bound = 1 / math.sqrt(d_in)
    nn.init.uniform_(factor, -bound, bound)


def _start_B(factor: Tensor, config: ShardPoolConfig) -> None:
    nn.init.zeros_(factor) if config.init_weights else nn.init.normal_(factor, std=0.02)


@final
class ShardPool(nn.Module):
    """The two pools of one kind of layer.

    Parameters: lora_A `[e L l, d_in / l]`, lora_B `[e L l, d_out / l]`.
    """

    def __init__(self, config: ShardPoolConfig, d_in: int, d_out: int, layers: int) -> None:
        super().__init__()
        per_vector = config.shards_per_vector
        shards = (config.equivalent_rank or config.r) * layers * per_vector
        self.r = config.r
        self.lora_A = nn.Parameter(torch.empty(shards, d_in // per_vector))
        self.lora_B = nn.Parameter(torch.empty(shards, d_out // per_vector))
        self.lengths = (self.lora_A.shape, self.lora_B.shape)
        self._reduced_at_once = False
        _start_A(self.lora_A, d_in)
        _start_B(self.lora_B, config)

    @property
    def weight(self) -> Tensor:
        """What PEFT's FSDP policy looks for, to shard this module as a unit of its own."""
        return self.lora_B

    def forward(self, index_A: Tensor, index_B: Tensor) -> tuple[Tensor, Tensor]:
        """A `[r, d_in]` and B `[r, d_out]` of the layer whose choice these are.

        Raises:
            RuntimeError: if FSDP has put the pool away because it counts as a part of its first layer, or DDP would
                leave out what re-entrant checkpointing adds later.
        """
        if not torch.compiler.is_compiling():
            self._check_present()
            self._check_reduced_whole()
        device = self.lora_A.device
        A = assembled(self.lora_A, index_A.to(device), self.r)
        return A, assembled(self.lora_B, index_B.to(device), self.r)

    def _check_present(self) -> None:
        for factor, shape in zip((self.lora_A, self.lora_B), self.lengths, strict=True):
            away = hasattr(factor, "device_mesh") or factor.shape != shape
            if away or (factor.device.type != "meta" and not factor.untyped_storage().size()):
                raise RuntimeError(
                    "FSDP shards this pool together with its first layer, but other layers use it too, when that "
                    "layer's weights are put away. Shard each pool by itself: FSDP1 does with PEFT's "
                    "`fsdp_auto_wrap_policy(model)`; FSDP2 by `fully_shard(pool)` for every `ShardPool` in "
                    "`model.modules()` before the layers; accelerate by adding ShardPool to "
                    "`fsdp_transformer_layer_cls_to_wrap`."
                )

    def _check_reduced_whole(self) -> None:
        """Re-entrant checkpointing runs a backward pass of its own in each layer, and DDP exchanges a gradient once."""
        if torch._C._current_graph_task_id() == -1:  # no backward pass runs
            ddp = DistributedDataParallel._active_ddp_module
            self._reduced_at_once = ddp is not None and not ddp.static_graph and ddp.process_group.size() > 1
        elif self._reduced_at_once and torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            # Recomputing without the hooks of the other way: the layers' gradients arrive one by one.
            raise RuntimeError(
                "Under DDP, pools that layers share cannot be trained with re-entrant gradient checkpointing: DDP averages "
                "a pool's gradient when its last layer is done, and what the other layers add stays local. Set "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )


@final
class ShardIndex(nn.Module):
    """What one layer takes of the pools of its kind: index_A and index_B, `[r l]` int32, drawn independently."""

    def __init__(self, index_A: Tensor, index_B: Tensor) -> None:
        super().__init__()
        self.register_buffer("index_A", index_A)
        self.register_buffer("index_B", index_B)


@final
class SplitLora(nn.Module):
    """A LoRA that one layer has to itself, with splits (MoSA) or without.

    Parameters: lora_A `[r, d_in]`, lora_B `[r, d_out]`. Buffers: splits_A, splits_B, the part of each entry (uint8), for
    the factors that are split; start_A, what A started from, if A is split: lora_A is then the change, zero at first.
    One tensor holds all parts, as they are disjoint; the entries that a pass did not use get a gradient of zero.
    """

    def __init__(self, config: ShardPoolConfig, d_in: int, d_out: int, generator: torch.Generator) -> None:
        super().__init__()
        self.num_splits = config.num_splits
        self.scaling, self.dropout = _scaling(config), config.lora_dropout
        self.lora_A = nn.Parameter(torch.empty(config.r, d_in))
        self.lora_B = nn.Parameter(torch.empty(config.r, d_out))
        _start_A(self.lora_A, d_in)
        _start_B(self.lora_B, config)
        split = config.split_factors if self.num_splits > 1 else ""
        if split in ("A", "both"):
            start = torch.empty(config.r, d_in, device="cpu")
            bound = 1 / math.sqrt(d_in)
            # From the seed, as all that is drawn and not trained.
            self.register_buffer("start_A", start.uniform_(-bound, bound, generator=generator))
            self.register_buffer("splits_A", draw_splits(config.r, d_in, self.num_splits, generator))
            nn.init.zeros_(self.lora_A) if config.init_weights else nn.init.normal_(self.lora_A, std=0.02)
        if split in ("B", "both"):
            self.register_buffer("splits_B", draw_splits(config.r, d_out, self.num_splits, generator))

    @property
    def weight(self) -> Tensor:
        """What PEFT's FSDP policy looks for, to shard this module as a unit of its own."""
        return self.lora_B

    def factors(self, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
        """A and B of the part `chosen [1]`, or the mean over all parts."""
        A, B = self.lora_A, self.lora_B
        if hasattr(self, "splits_A"):
            A = self.start_A.to(A.dtype) + self._part(A, self.splits_A, chosen)
        if hasattr(self, "splits_B"):
            B = self._part(B, self.splits_B, chosen)
        return A, B

    def _part(self, change: Tensor, splits: Tensor, chosen: Tensor | None) -> Tensor:
        return expected(change, self.num_splits) if chosen is None else sampled(change, splits, chosen)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """`y` plus the LoRA's output for `x`; see `low_rank_added`."""
        chosen = None
        if self.training and self.num_splits > 1:
            # From torch's generator on the device of the weights, which checkpointing puts back before it recomputes.
            chosen = torch.randint(self.num_splits, (1,), device=self.lora_B.device)
        dtype = compute_dtype(x, self.lora_A)
        A, B = (factor.to(dtype) for factor in self.factors(chosen))
        return low_rank_added(x, y, A, B, self.scaling, self.dropout if self.training else 0.0)


@final
class ShardPoolLinear(MoeTunerLayer):
    """A frozen linear layer plus a LoRA that is assembled from shared pools, or sampled."""

    adapter_layer_names = ("shard_pool_weights", "shard_pool_index")
    other_param_names = ("r", "scaling", "lora_dropout", "pool_containers")

    def __init__(self, base_layer: nn.Module, context: RoutingContext, quantization: dict[str, Any]) -> None:
        super().__init__(base_layer, context, quantization)
        self.shard_pool_weights = nn.ModuleDict()
        self.shard_pool_index = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        # Adapter -> the container on the layer that owns the pool. In a dict, so that this is not a second registration;
        # the container rather than the pool, because FSDP1 puts its wrapper there.
        self.pool_containers: dict[str, nn.ModuleDict] = {}

    def update_layer(self, adapter_name: str, config: ShardPoolConfig, num_experts: int, r: int) -> None:
        """Note the adapter. Its weights come when it is known which layers share: see `ShardPoolModel.inject_adapter`."""
        _check_widths(config, self.in_features, self.out_features)
        self.r[adapter_name], self.scaling[adapter_name] = r, _scaling(config)
        self.lora_dropout[adapter_name] = config.lora_dropout

    def holds(self, adapter_name: str) -> bool:
        return adapter_name in self.r

    def is_static(self, adapter_name: str) -> bool:
        return True

    def experts(self, adapter_name: str) -> Any:
        """The module with this layer's weights, which may belong to another layer."""
        return self.pool_containers.get(adapter_name, self.shard_pool_weights)[adapter_name]

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A `[r, d_in]` and B `[r, d_out]` of inference, without the scale."""
        experts = self.experts(adapter_name)
        if adapter_name not in self.pool_containers:
            return experts.factors(None)
        index = self.shard_pool_index[adapter_name]
        device = index.index_A.device
        A, B = experts(index.index_A, index.index_B)
        return A.to(device), B.to(device)

    def add_experts_output(self, x: Tensor, y: Tensor, adapter_name: str) -> Tensor:
        if adapter_name not in self.pool_containers:
            return self.shard_pool_weights[adapter_name](x, y)
        A, B = self.factors(adapter_name)
        dtype = compute_dtype(x, A)
        dropout = self.lora_dropout[adapter_name] if self.training else 0.0
        return low_rank_added(x, y, A.to(dtype), B.to(dtype), self.scaling[adapter_name], dropout)

    def static_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        A, B = (factor.to(routing_dtype(factor.dtype)) for factor in self.factors(adapter_name))
        return A, self.scaling[adapter_name] * B


class ShardPoolModel(MoeTuner):
    """Registered with PEFT as `SHARD_POOL`; made by `get_peft_model(model, ShardPoolConfig(...))`."""

    prefix = "shard_pool_"
    tuner_layer_cls = ShardPoolLinear
    layer_cls = ShardPoolLinear

    def _allocated(self, config: ShardPoolConfig, key: str) -> tuple[int, int]:
        return 1, config.r

    def _context(self) -> RoutingContext:
        """One for the whole model, and it watches nothing: there is no router that would ask it."""
        layers = (module for module in self.model.modules() if isinstance(module, MoeTunerLayer))
        return next((layer.context for layer in layers), None) or RoutingContext()

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        config = self.peft_config[adapter_name]
        generator = torch.Generator(device="cpu").manual_seed(config.index_seed)
        memory = torch.device("meta") if low_cpu_mem_usage else nullcontext()
        for layers in _kinds(model, adapter_name):
            give = _share_pools if config.shares else _give_own
            give(adapter_name, config, layers, generator, memory)
            for layer in layers:
                layer._move_adapter_to_device_of_base_layer(adapter_name)
                # A new module is in training mode: in a model that is being evaluated it would sample.
                layer.train(layer.get_base_layer().training)
                trained = adapter_name in layer.active_adapters and not config.inference_mode
                for container in (layer.shard_pool_weights, layer.shard_pool_index):
                    if adapter_name in container:
                        container[adapter_name].requires_grad_(trained)
        self._take_buffers_of_twin(model, adapter_name)

    def _twins(self, adapter_name: str) -> list[str]:
        """Adapters of an equal config: they choose alike, by their seed or by the file that they were loaded from."""
        config = self.peft_config[adapter_name]
        return [name for name, other in self.peft_config.items() if other == config and name != adapter_name]


def _scaling(config: ShardPoolConfig) -> float:
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def _check_widths(config: ShardPoolConfig, d_in: int, d_out: int) -> None:
    """Refuse shards and splits that do not come out even in a layer of these widths."""
    per_vector, splits = config.shards_per_vector, config.num_splits
    for width in (d_in, d_out):
        if width % per_vector:
            remedy = (
                "A pool that does not divide the width leaves an end of it without shards: 1, 2 or 4 fit most models."
            )
            raise refuse(
                "shards_per_vector", per_vector, f"a divisor of {width}, the width of an adapted layer", remedy
            )
    widths = {"A": [d_in], "B": [d_out], "both": [d_in, d_out]}[config.split_factors]
    for width in widths:
        if (config.r * width) % splits:
            allowed = f"a divisor of {config.r * width}, the entries of a factor of rank {config.r} and width {width}"
            raise refuse("num_splits", splits, allowed, "The parts are equally large: 2 or 4 fit most models.")


def _kinds(model: nn.Module, adapter_name: str) -> Iterator[list[ShardPoolLinear]]:
    """The layers that hold the adapter, by kind: the same last name and the same widths. In the order of the model."""
    kinds: dict[tuple[str, int, int], list[ShardPoolLinear]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, ShardPoolLinear) and layer.holds(adapter_name):
            kind = name.rpartition(".")[2], layer.in_features, layer.out_features
            kinds.setdefault(kind, []).append(layer)
    yield from kinds.values()


def _share_pools(
    adapter_name: str,
    config: ShardPoolConfig,
    layers: list[ShardPoolLinear],
    generator: torch.Generator,
    memory: AbstractContextManager,
) -> None:
    """Give layers of one kind their pools, on the first of them, and each its own choice."""
    owner = layers[0]
    with memory:
        pool = ShardPool(config, owner.in_features, owner.out_features, len(layers))
    owner.shard_pool_weights[adapter_name] = pool
    for number, layer in enumerate(layers):
        settings = config.r, config.equivalent_rank, config.shards_per_vector, config.private_rank
        index_A, index_B = (draw_index(len(layers), number, *settings, generator) for _ in "AB")
        layer.shard_pool_index[adapter_name] = ShardIndex(index_A, index_B)
        layer.pool_containers[adapter_name] = owner.shard_pool_weights


def _give_own(
    adapter_name: str,
    config: ShardPoolConfig,
    layers: list[ShardPoolLinear],
    generator: torch.Generator,
    memory: AbstractContextManager,
) -> None:
    """Give each layer weights of its own."""
    for layer in layers:
        with memory:
            own = SplitLora(config, layer.in_features, layer.out_features, generator)
        layer.shard_pool_weights[adapter_name] = own
