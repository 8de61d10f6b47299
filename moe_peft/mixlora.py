"""The tensors of MixLoRA as TUDB-Labs saves them (packages `moe-peft` 2.0.2 and `mixlora` 0.2.3), and ours from them.

Used by `importing`, which reads the settings and the files. Nothing here touches a file or a model.

    theirs                                                                 ours, behind base_model.model.model.
    mixlora.layers.I.mlp.moe_gate.weight [E, d]                            layers.I.mlp.FIRST.ffn_moe_experts.router [E, d]
    mixlora.layers.I.mlp.NAME.experts.J.lora_A.weight [r, d_in]            layers.I.mlp.NAME.ffn_moe_experts.lora_A [E, r, d_in]
    mixlora.layers.I.mlp.NAME.experts.J.lora_B.weight [d_out, r]           layers.I.mlp.NAME.ffn_moe_experts.lora_B [E, r, d_out]
    mixlora.layers.I.self_attn.NAME.lora_A.weight, as above without E      layers.I.self_attn.NAME.ffn_moe_experts, E = 1

FIRST is the linear that reads the block's input first. Letters: E experts, r rank, d width of the model, f of the FFN.
"""

import math
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from moe_peft.errors import nearest, refuse


Tensors = Mapping[str, Tensor]


class Family(NamedTuple):
    """The linears of one decoder layer. MoE-PEFT takes these names from transformers as they are.

    Attributes:
        attention, ins, out: names within `self_attn` and `mlp`; `ins` read the block's input, the first has the router.
        fused: gate and up are one linear of width 2 f.
        model_types: of transformers, as far as MoE-PEFT knows them.
    """

    attention: tuple[str, ...]
    ins: tuple[str, ...]
    out: str
    fused: bool
    model_types: tuple[str, ...]

    @property
    def ffn(self) -> tuple[str, ...]:
        return (*self.ins, self.out)

    def shape(self, name: str, d: int, f: int) -> tuple[int, int]:
        """`(d_in, d_out)` of an FFN linear."""
        return (f, d) if name == self.out else (d, 2 * f if self.fused else f)


_LLAMA_LIKE = ("llama", "mistral", "qwen2", "gemma", "gemma2")
FAMILIES = (
    Family(("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj"), "down_proj", False, _LLAMA_LIKE),
    Family(("q_proj", "k_proj", "v_proj", "dense"), ("fc1",), "fc2", False, ("phi",)),
    Family(("qkv_proj", "o_proj"), ("gate_up_proj",), "down_proj", True, ("phi3",)),
)


class Lora(NamedTuple):
    """Rank and scale of one kind of LoRA in the checkpoint."""

    r: int
    alpha: float
    rslora: bool

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


class Layout(NamedTuple):
    """What the checkpoint holds: how many layers of which family, and the linears with a LoRA in each part."""

    family: Family
    layers: int
    attention: tuple[str, ...]
    ffn: tuple[str, ...]


# --- names ---

_KEY = re.compile(r"mixlora\.layers\.(\d{1,6})\.(self_attn|mlp)\.(\w+)\.")


def find_layout(tensors: Tensors, targets: set[str], num_experts: int, model_type: str | None) -> Layout:
    """Which linears of which family have tensors; every one that should be there is, and no other.

    Args:
        tensors: theirs.
        targets: the linears that the settings name. MoE-PEFT passes over those that the family does not have.
        num_experts: E.
        model_type: of the base model, or None where the names alone are to tell the family.

    Raises:
        ValueError: tensors that are missing or unknown, a family that is not known or left open.
    """
    matches = [match for match in map(_KEY.match, tensors) if match]
    if not matches:
        remedy = "This is not what MoE-PEFT saves; the layers that it saves are not empty either."
        raise refuse("tensors", list(islice(tensors, 3)), "named 'mixlora.layers.0.…'", remedy)
    found = {f"{match[2]}.{match[3]}" for match in matches} - {"mlp.moe_gate"}
    family = _family(found, model_type)
    attention, ffn = (tuple(n for n in names if n in targets) for names in (family.attention, family.ffn))
    if not ffn:
        allowed = f"names with one of {', '.join(family.ffn)}"
        raise refuse("target_modules", sorted(targets), allowed, "Without experts there is only LoRA on attention.")
    layout = Layout(family, 1 + max(int(match[1]) for match in matches), attention, ffn)
    # Lazily, so that a file that claims a million layers is refused at the first one missing.
    missing = list(islice((key for key in _expected(layout, num_experts) if key not in tensors), 3))
    if missing:
        remedy = "MoE-PEFT would put a fresh random LoRA in its place without a word. Fetch the whole checkpoint."
        raise refuse("tensors", missing, "in the file: `target_modules` and the highest layer ask for them", remedy)
    unknown = sorted(set(tensors) - set(_expected(layout, num_experts)))
    if unknown:
        allowed = "MixLoRA's routers, experts and attention LoRAs on the layers that `target_modules` names, no others"
        raise refuse("tensors", unknown[:3], allowed, "What is not understood is not dropped: remove them if you may.")
    return layout


def _family(found: set[str], model_type: str | None) -> Family:
    known = [name for family in FAMILIES for name in family.model_types]
    if model_type is not None and model_type not in known:
        raise refuse("base", model_type, f"a model of type {', '.join(known)}", nearest(model_type, known))
    fits = [f for f in FAMILIES if found <= {f"self_attn.{n}" for n in f.attention} | {f"mlp.{n}" for n in f.ffn}]
    if not fits:
        remedy = (
            "ChatGLM's base is code of its own outside transformers and cannot be imported."
            if any("dense_h_to_4h" in name or "dense_4h_to_h" in name for name in found)
            else "Its linears have names that MoE-PEFT does not give."
        )
        raise refuse("tensors", sorted(found), f"on the linears of {', '.join(known)}", remedy)
    fits = [f for f in fits if model_type is None or model_type in f.model_types]
    if len(fits) != 1:
        allowed = "on linears that tell the base model's family" if fits else f"on the linears of {model_type}"
        raise refuse(
            "tensors", sorted(found), allowed, "Name the base model that the adapter was trained on (`base`)."
        )
    return fits[0]


def _expected(layout: Layout, num_experts: int) -> Iterator[str]:
    for i in range(layout.layers):
        yield f"mixlora.layers.{i}.mlp.moe_gate.weight"
        for side in ("lora_A", "lora_B"):
            for name in layout.attention:
                yield f"mixlora.layers.{i}.self_attn.{name}.{side}.weight"
            for name in layout.ffn:
                for e in range(num_experts):
                    yield f"mixlora.layers.{i}.mlp.{name}.experts.{e}.{side}.weight"


# --- tensors ---


def converted(tensors: Tensors, layout: Layout, num_experts: int, expert: Lora, attention: Lora) -> dict[str, Tensor]:
    """Our state dict, in fp32 (fp64 stays), by the names in which PEFT saves it.

    One rank and scale hold for all linears here. Where experts and attention differ, the smaller rank is filled up with
    zero rows, and the ratio of the scales goes into the attention's B. An FFN linear without a LoRA gets zeros. Zeros in
    both factors get no gradient, so what was not trained there is not trained here.

    Raises:
        ValueError: a tensor of the wrong shape or kind, or with numbers that are not finite.
    """
    return {
        name: tensor
        for i in range(layout.layers)
        for part in (_router, _experts, _attention)
        for name, tensor in part(tensors, layout, num_experts, expert, attention, i)
    }


def common_rank(layout: Layout, expert: Lora, attention: Lora) -> int:
    """The rank that holds both."""
    return max(expert.r, attention.r) if layout.attention else expert.r


def _names(i: int) -> tuple[str, str]:
    return f"mixlora.layers.{i}", f"base_model.model.model.layers.{i}"


Parts = Iterator[tuple[str, Tensor]]


def _router(tensors: Tensors, layout: Layout, num_experts: int, expert: Lora, attention: Lora, i: int) -> Parts:
    theirs, ours = _names(i)
    router = _checked(tensors, f"{theirs}.mlp.moe_gate.weight", (num_experts, _model_width(tensors)))
    if num_experts > 1:  # one expert needs no choice, and has the weight 1 there as well
        yield f"{ours}.mlp.{layout.family.ins[0]}.ffn_moe_experts.router", router


def _experts(tensors: Tensors, layout: Layout, num_experts: int, expert: Lora, attention: Lora, i: int) -> Parts:
    (theirs, ours), r = _names(i), common_rank(layout, expert, attention)
    d, f = _model_width(tensors), _ffn_width(tensors, layout)
    for name in layout.family.ffn:
        d_in, d_out = layout.family.shape(name, d, f)
        keys = [f"{theirs}.mlp.{name}.experts.{e}" for e in range(num_experts)] if name in layout.ffn else []
        pairs = [_factors(tensors, key, expert.r, d_in, d_out, r) for key in keys]
        nothing = [(torch.zeros(r, d_in), torch.zeros(r, d_out))] * num_experts
        yield from _stacked(f"{ours}.mlp.{name}", pairs or nothing)


def _attention(tensors: Tensors, layout: Layout, num_experts: int, expert: Lora, attention: Lora, i: int) -> Parts:
    (theirs, ours), r = _names(i), common_rank(layout, expert, attention)
    d, ratio = _model_width(tensors), attention.scaling / expert.scaling
    for name in layout.attention:
        heads = _heads_width(tensors, layout, name)
        d_in, d_out = (heads, d) if name == layout.family.attention[-1] else (d, heads)
        A, B = _factors(tensors, f"{theirs}.self_attn.{name}", attention.r, d_in, d_out, r)
        yield from _stacked(f"{ours}.self_attn.{name}", [(A, B * ratio if ratio != 1 else B)])


# Widths are those of the first layer: the families that MoE-PEFT knows have the same in every layer.


def _model_width(tensors: Tensors) -> int:
    """d, from the router."""
    return _width(tensors, "mlp.moe_gate.weight", 1)


def _ffn_width(tensors: Tensors, layout: Layout) -> int:
    """f, from the first expert of a linear that has one."""
    name = layout.ffn[-1]
    if name == layout.family.out:
        return _width(tensors, f"mlp.{name}.experts.0.lora_A.weight", 1)
    return _width(tensors, f"mlp.{name}.experts.0.lora_B.weight", 0) // (2 if layout.family.fused else 1)


def _heads_width(tensors: Tensors, layout: Layout, name: str) -> int:
    """The side of an attention linear that is not d."""
    if name == layout.family.attention[-1]:
        return _width(tensors, f"self_attn.{name}.lora_A.weight", 1)
    return _width(tensors, f"self_attn.{name}.lora_B.weight", 0)


def _width(tensors: Tensors, name: str, side: int) -> int:
    return _checked(tensors, f"mixlora.layers.0.{name}", (None, None)).shape[side]


def _factors(
    tensors: Tensors, key: str, rank: int, d_in: int | None, d_out: int | None, r: int
) -> tuple[Tensor, Tensor]:
    """A `[r, d_in]` and the transpose of B `[r, d_out]`, filled up with zero rows from `rank` to r."""
    A = _checked(tensors, f"{key}.lora_A.weight", (rank, d_in))
    B = _checked(tensors, f"{key}.lora_B.weight", (d_out, rank)).T
    return tuple(torch.nn.functional.pad(factor, (0, 0, 0, r - rank)) for factor in (A, B))  # type: ignore[return-value]


def _checked(tensors: Tensors, key: str, shape: tuple[int | None, int | None]) -> Tensor:
    """The tensor in fp32 or better, if it is a matrix of that shape (None: any size) with finite numbers."""
    tensor = tensors[key].detach()
    fits = tensor.ndim == 2 and all(want in (None, size) for want, size in zip(shape, tensor.shape, strict=True))
    if not fits or not tensor.is_floating_point():
        wanted = " x ".join("any" if want is None else str(want) for want in shape)
        remedy = "The other tensors and the adapter_config.json ask for that. Are they of the same checkpoint?"
        raise refuse(key, f"{tuple(tensor.shape)} {tensor.dtype}", f"floating-point, of shape {wanted}", remedy)
    if not tensor.isfinite().all():
        raise refuse(key, "not finite", "finite in every element", "That training run diverged: take an earlier save.")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _stacked(prefix: str, pairs: list[tuple[Tensor, Tensor]]) -> Parts:
    for side, factors in zip(("lora_A", "lora_B"), zip(*pairs, strict=True), strict=True):
        yield f"{prefix}.ffn_moe_experts.{side}", torch.stack(factors).contiguous()
