"""The exported model's tensors, planned one by one: what each is made of, and nothing computed yet."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_peft.export.adapter import FfnAdapter
from moe_peft.export.checkpoint import Checkpoint, torch_dtype
from moe_peft.export.choose import Choice
from moe_peft.export.routes import Split, splits
from moe_peft.export.targets import PADDING_BIAS
from moe_peft.export.writer import PlannedTensor


_IN_LAYER = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<rest>.+)")
_LEFT_BEHIND = re.compile(r"(.*\.)?rotary_emb\.inv_freq|mtp\..*")
_ALMOST_ZERO = 1e-6  # of a gate whose expert is zero: llama.cpp divides by it


class Rounding(Protocol):
    """What a training run did to a frozen weight before it saw it, `[d_out, d_in]` to the same in fp32."""

    def __call__(self, weight: Tensor) -> Tensor: ...


def nf4(weight: Tensor) -> Tensor:
    """A weight as a model in 4 bits has it: NF4 in blocks of 64 with double quantisation (QLoRA), and back.

    Raises:
        ImportError: without bitsandbytes.
    """
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError as error:
        raise ImportError(
            "Weights as a 4-bit model has them need bitsandbytes: pip install bitsandbytes, or export the original "
            "ones with base_weights='original'."
        ) from error
    weight = weight.float().contiguous()
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state)


class Sources:
    """Frozen weights with an expert's change on them, read when asked for; the last frozen one is kept."""

    def __init__(self, base: Checkpoint, adapter: FfnAdapter, rounding: Rounding | None = None) -> None:
        self.base, self.adapter, self.rounding = base, adapter, rounding
        self._kept: tuple[str, Tensor] | None = None

    def frozen(self, module: str) -> Tensor:
        """`[d_out, d_in]`, as training saw it."""
        if self._kept is None or self._kept[0] != module:
            self._kept = None  # let go of the last one before the next is read
            weight = self.base.read(f"{module}.weight")
            self._kept = (module, weight if self.rounding is None else self.rounding(weight))
        return self._kept[1]

    def matrix(self, module: str, expert: int = 0, rows: tuple[int, int] | None = None, heads: int = 0) -> Tensor:
        """A linear's weight with one expert merged into it, `[rows, d_in]` in fp32.

        Args:
            module: path in the dense model.
            expert: its number; an attention layer has only one.
            rows: of a fused linear; None is all.
            heads: reorder the rows of so many heads, from halves to neighbours; 0 leaves them.
        """
        weight = self.frozen(module)
        weight = weight if rows is None else weight[rows[0] : rows[1]]
        change = self.adapter.factors(module, expert, rows)
        merged = weight.to(torch.float32, copy=True)
        if change is not None:
            merged.addmm_(*change)
        return neighbours(merged, heads) if heads else merged


def neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k for a model that rotates neighbours (2i, 2i + 1) from those of one that rotates halves (i, i + d/2)."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def plan_tensors(
    sources: Sources, config: Mapping[str, Any], choice: Choice, dtype: torch.dtype, layers: int | None = None
) -> list[PlannedTensor]:
    """Every tensor of the export, in the order of the layers.

    Args:
        sources: the dense model and the adapter.
        config: of the dense model.
        choice: where it goes.
        dtype: of all floating tensors but the few that are kept in fp32.
        layers: only so many of the first ones, for a check; None is all.
    """
    limit = config["num_hidden_layers"] if layers is None else layers
    planner = _Planner(sources, config, choice, dtype)
    planned: list[PlannedTensor] = []
    done: set[int] = set()
    for name in sorted(sources.base.files, key=_in_order):
        match = _IN_LAYER.fullmatch(name)
        layer = None if match is None else int(match["layer"])
        if _LEFT_BEHIND.fullmatch(name) or (layer is not None and layer >= limit):
            continue
        if match is None or layer is None:
            planned.append(planner.copied(name))
        elif match["rest"].startswith("mlp."):
            if layer not in done:
                done.add(layer)
                planned.extend(planner.block(layer))
        else:
            planned.extend(planner.outside_block(name, match["rest"]))
    return planned


def _in_order(name: str) -> tuple[str | int, ...]:
    """Layer 2 before layer 10."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))


class _Planner:
    """One export's tensors, piece by piece."""

    def __init__(self, sources: Sources, config: Mapping[str, Any], choice: Choice, dtype: torch.dtype) -> None:
        self.sources, self.config, self.choice, self.dtype = sources, config, choice, dtype
        self.splits = splits(config)
        self.hidden, self.width = config["hidden_size"], config["intermediate_size"]
        self.usual = torch_dtype(sources.base.dtypes["model.embed_tokens.weight"])

    def copied(self, name: str) -> PlannedTensor:
        shape, stored = self.sources.base.shapes[name], torch_dtype(self.sources.base.dtypes[name])
        kept = not stored.is_floating_point or stored.itemsize > self.usual.itemsize  # stored wider on purpose
        dtype = stored if kept else self.dtype
        return PlannedTensor(name, shape, dtype, (partial(self.sources.base.read, name),))

    def outside_block(self, name: str, rest: str) -> Iterator[PlannedTensor]:
        """Attention and norms: linears with their LoRA merged, fused ones taken apart, the rest as it is."""
        module, _, kind = name.rpartition(".")
        if kind != "weight" or len(self.sources.base.shapes[name]) != 2:
            yield self.copied(name)
            return
        inner = rest.rpartition(".")[0]
        if inner in self.splits:
            for split in self.splits[inner]:
                yield self._piece(module, inner, split)
            return
        heads = 0
        if self.choice.route.pairs_adjacent:
            keys = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
            heads = self.config[keys[inner]] if inner in keys else 0
        make = partial(self.sources.matrix, module, heads=heads)
        yield PlannedTensor(name, self.sources.base.shapes[name], self.dtype, (make,))

    def _piece(self, module: str, inner: str, split: Split) -> PlannedTensor:
        name = f"{module.removesuffix(inner)}{split.name}.weight"
        rows = (split.start, split.stop)
        shape = (split.stop - split.start, self.sources.base.shapes[f"{module}.weight"][1])
        return PlannedTensor(name, shape, self.dtype, (partial(self.sources.matrix, module, rows=rows),))

    def _linear(self, layer: int, linear: str) -> tuple[str, tuple[int, int] | None]:
        """Where gate, up or down of a layer is in the dense model: module, and rows if it is fused."""
        for fused, parts in self.splits.items():
            for part in parts:
                if part.name == f"mlp.{linear}":
                    return f"model.layers.{layer}.{fused}", (part.start, part.stop)
        return f"model.layers.{layer}.mlp.{linear}", None

    def _maker(self, layer: int, linear: str, expert: int) -> Callable[[], Tensor]:
        module, rows = self._linear(layer, linear)
        return partial(self.sources.matrix, module, expert, rows)

    def _shape(self, linear: str) -> tuple[int, int]:
        return (self.hidden, self.width) if linear == "down_proj" else (self.width, self.hidden)

    def block(self, layer: int) -> Iterator[PlannedTensor]:
        """The FFN of a layer."""
        here = f"model.layers.{layer}."
        if layer in self.choice.dense:
            for linear in ("gate_proj", "up_proj", "down_proj"):
                make = self._maker(layer, linear, 0)
                yield PlannedTensor(f"{here}mlp.{linear}.weight", self._shape(linear), self.dtype, (make,))
            return
        yield from self._router(layer, here)
        yield from (self._fused(layer, here) if self.choice.target.fused else self._experts(layer, here))
        yield from self._shared(here)

    def _router(self, layer: int, here: str) -> Iterator[PlannedTensor]:
        target, total = self.choice.target, self.choice.num_experts
        dtype = torch.float32 if target.gate_in_fp32 else self.dtype
        yield PlannedTensor(f"{here}{target.gate}", (total, self.hidden), dtype, (partial(self._rows, layer),))
        if target.bias is not None:
            name, rank = target.bias
            shape = (1, total) if rank == 2 else (total,)
            yield PlannedTensor(f"{here}{name}", shape, torch.float32, (partial(self._bias, layer, shape),))

    def _rows(self, layer: int) -> Tensor:
        """The router's rows in the order of the slots, `[N, d]`; equal experts and padding have zeros."""
        rows = torch.zeros(self.choice.num_experts, self.hidden)
        if layer not in self.choice.uniform:
            router = self.sources.adapter.router(layer)
            for place, expert in enumerate(self.choice.slots[layer]):
                if expert is not None:
                    rows[place] = router[expert]
        return rows

    def _bias(self, layer: int, shape: tuple[int, ...]) -> Tensor:
        trained = None if layer in self.choice.uniform else self.sources.adapter.selection_bias(layer)
        slots = self.choice.slots[layer]
        values = [PADDING_BIAS if e is None else 0.0 if trained is None else float(trained[e]) for e in slots]
        return torch.tensor(values).reshape(shape)

    def _expert(self, layer: int, linear: str, expert: int | None) -> Callable[[], Tensor]:
        if expert is None:
            return partial(torch.zeros, self._shape(linear))
        return self._maker(layer, linear, expert)

    def _experts(self, layer: int, here: str) -> Iterator[PlannedTensor]:
        for linear, name in self.choice.target.experts.items():  # one linear at a time: its frozen weight is read once
            for place, expert in enumerate(self.choice.slots[layer]):
                make = self._expert(layer, linear, expert)
                yield PlannedTensor(here + name.format(e=place), self._shape(linear), self.dtype, (make,))

    def _fused(self, layer: int, here: str) -> Iterator[PlannedTensor]:
        names, slots, total = self.choice.target.experts, self.choice.slots[layer], self.choice.num_experts
        both = tuple(self._expert(layer, linear, e) for e in slots for linear in ("gate_proj", "up_proj"))
        shape = (total, 2 * self.width, self.hidden)
        yield PlannedTensor(here + names["gate_proj"], shape, self.dtype, both)
        down = tuple(self._expert(layer, "down_proj", e) for e in slots)
        yield PlannedTensor(here + names["down_proj"], (total, self.hidden, self.width), self.dtype, down)

    def _shared(self, here: str) -> Iterator[PlannedTensor]:
        """The shared expert that some targets always have, with nothing in it."""
        target = self.choice.target
        if target.shared is None:
            return
        width = target.always["shared_expert_intermediate_size"] if target.shared == "gated" else self.width
        for linear in ("gate_proj", "up_proj", "down_proj"):
            shape = (self.hidden, width) if linear == "down_proj" else (width, self.hidden)
            make = partial(torch.zeros, shape)
            yield PlannedTensor(f"{here}{target.shared_name}.{linear}.weight", shape, self.dtype, (make,))
        if target.shared == "gated":
            make = partial(torch.full, (1, self.hidden), _ALMOST_ZERO)
            yield PlannedTensor(f"{here}{target.shared_name}_gate.weight", (1, self.hidden), self.dtype, (make,))
