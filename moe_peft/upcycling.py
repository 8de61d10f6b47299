"""Experts from LoRAs that were trained elsewhere: copies of one, one split by rank, or several side by side.

With g the weights of a token and W' = B' A' the change that the LoRA makes, its scale included:

    "spawn"   every expert starts as the LoRA. Exact copies: the change is (sum g_e) W', so W' itself where weights sum
              to 1. With `diversify` half of each expert's ranks are zeroed and the others doubled (EvoMoE,
              arXiv:2112.14397): W' in expectation, and exactly where all experts weigh alike and their number is even,
              as each two take complementary halves. (EvoMoE masks each expert for itself.)
    "split"   expert e takes the e-th block of r / E ranks, times E: W' exactly where all E experts weigh 1 / E, and in
              expectation over the choice where K of them, each as likely, weigh 1 / K.
    "each"    expert e is the e-th LoRA; what the router makes of them, it has to learn (Rocket, arXiv:2408.15915).

"Where all weigh alike" is the router's start: use `router_init_std=0.0`, or a small one. Ranks that an expert has beyond
what it is given keep their fresh A under B = 0, so that they can learn. Shared experts stay at B = 0.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from moe_peft.config import FfnMoeConfig, LinearMoeConfig
from moe_peft.config_checks import check_flags
from moe_peft.errors import nearest, refuse
from moe_peft.merge import routed_layers
from moe_peft.plain_loras import Pair, PlainLora, fitted, read_lora
from moe_peft.resizing import check_idle, check_unnamed
from moe_peft.routing import dense_weights
from moe_peft.tuners.layer import MoeTunerLayer, linear_features


Source = str | Path
WAYS = ("spawn", "split")
NEAR_UNIFORM = 0.02


class UpcyclingReport(NamedTuple):
    """What `init_experts_from_lora` did.

    Attributes:
        layers: names of the layers whose experts now hold LoRA weights.
        fresh: layers of the adapter that no LoRA has; they still change nothing.
        errors: layer -> the largest relative error of a LoRA that was cut to the experts' rank; only where one was.
    """

    layers: list[str]
    fresh: list[str]
    errors: dict[str, float]


def init_experts_from_lora(
    model: PeftModel,
    lora: Source | Sequence[Source] | Mapping[str, Source],
    how: str | None = None,
    adapter_name: str = "default",
    diversify: bool = True,
    seed: int = 0,
    check_base: bool = True,
) -> UpcyclingReport:
    """Start the experts of a fresh adapter from trained plain LoRAs. The base model is not touched.

    Args:
        model: with a fresh LINEAR_MOE or FFN_MOE adapter. Of an FFN mixture the layers outside the blocks take the LoRA
            as it is, and "split" and "each" have no place there: see Raises.
        lora: folder or Hub id of one LoRA; or a list (or a dict, whose keys name them) of one LoRA for each expert.
        how: "spawn" (the default) or "split" for one LoRA; "each", the only way, for several.
        adapter_name: which adapter.
        diversify: with "spawn", drop a random half of each copy's ranks and double the rest. False: exact copies.
        seed: of that choice; the global random stream is left alone.
        check_base: refuse a LoRA whose config names another base model. Names are compared without the path.

    Raises:
        ValueError: an adapter that is not fresh; LoRAs that do not fit, everything about them in one message: modules
            that the adapter has not, other widths, DoRA, biases, another base; "split" where the LoRA's rank is no
            multiple of the number of experts, and in FFN mixtures, whose experts stand inside a non-linearity.
        RuntimeError: while a trainer runs on the model.
    """
    several = not isinstance(lora, (str, Path))
    if several and not (isinstance(lora, (Sequence, Mapping)) and len(lora)):
        remedy = "Give the folder of one LoRA, or one folder for each expert."
        raise refuse("lora", lora, "a folder or id, or a list or dict of them that is not empty", remedy)
    check_flags(diversify=diversify, check_base=check_base)
    how = _way(how, several)
    layers = routed_layers(model, adapter_name)
    check_idle(layers, adapter_name, "Starting the experts anew")
    config = model.peft_config[adapter_name]
    _check_adapter(config, layers, adapter_name, how)
    sources = list(lora.values() if isinstance(lora, Mapping) else lora) if several else [lora]
    loras = [read_lora(source) for source in sources]
    problems = [f"{one.name}: {problem}" for one in loras for problem in one.problems]
    base = _base_name(model) if check_base else None
    for one in loras:
        problems += _misfits(one, layers, adapter_name, how, base)
    if several:
        problems += _wrong_number(loras, layers, adapter_name)
    if problems:
        raise ValueError(_told(problems, adapter_name))
    _warn_of_weights(config, layers, adapter_name, how, diversify)
    return _write(layers, loras, adapter_name, how, diversify, seed)


def _way(how: str | None, several: bool) -> str:
    allowed = ("each",) if several else WAYS
    how = allowed[0] if how is None else how
    if how not in allowed:
        what = "several LoRAs, which become one expert each" if several else "one LoRA"
        remedy = nearest(str(how), allowed)
        raise refuse("how", how, " or ".join(map(repr, allowed)) + f" for {what}", remedy)
    return how


def _check_adapter(config: Any, layers: dict[str, MoeTunerLayer], adapter_name: str, how: str) -> None:
    check_unnamed(config, adapter_name, "Starting experts from a LoRA")
    if not isinstance(config, (LinearMoeConfig, FfnMoeConfig)):
        raise ValueError(f"Adapter '{adapter_name}' is {config.peft_type.value}, whose experts are no LoRA pairs.")
    if how == "split" and not isinstance(config, LinearMoeConfig):
        raise refuse(
            "how",
            how,
            "'spawn' for an FFN mixture",
            "Its experts stand inside a non-linearity, where parts of a LoRA do not add up to it.",
        )
    if how != "spawn" and getattr(config, "share_A", False):
        raise refuse("share_A", True, f"False with `how` = {how!r}", "The experts would need an A each.")
    used = [name for name, layer in layers.items() if bool(layer.experts(adapter_name).lora_B.detach().any())]
    if used:
        raise ValueError(
            f"Adapter '{adapter_name}' is not fresh: the experts of {used[0]} and {len(used) - 1} other layers are not "
            "zero any more, and would be written over. Add a new adapter and start that one from the LoRA."
        )


def _base_name(model: PeftModel) -> str | None:
    return getattr(getattr(model.get_base_model(), "config", None), "_name_or_path", None) or None


def _routed(layer: MoeTunerLayer, adapter_name: str) -> int:
    """How many routed experts the layer has; 1 for a layer that carries one plain LoRA."""
    experts = layer.experts(adapter_name)
    return len(experts.lora_B) - experts.num_shared


def _misfits(
    lora: PlainLora, layers: dict[str, MoeTunerLayer], adapter_name: str, how: str, base: str | None
) -> list[str]:
    problems = []
    if base and lora.base and Path(base).name != Path(lora.base).name:
        problems.append(f"it was trained on {lora.base}, and this is {base} (`check_base=False` if they are the same)")
    for module, pair in lora.pairs.items():
        if module not in layers:
            problems.append(f"{module}: no layer of the adapter")
            continue
        have = linear_features(layers[module].get_base_layer())
        theirs = pair.A.shape[1], pair.B.shape[1]
        if have != theirs:
            problems.append(
                f"{module}: from {theirs[0]} to {theirs[1]}, the model's layer from {have[0]} to {have[1]}"
            )
        experts, rank = _routed(layers[module], adapter_name), len(pair.A)
        if how == "split" and rank % experts:
            problems.append(f"{module}: rank {rank} cannot be split evenly between {experts} experts")
        elif how == "split" and rank // experts > layers[module].experts(adapter_name).r:
            r = layers[module].experts(adapter_name).r
            problems.append(f"{module}: a part has rank {rank // experts}, an expert {r}: raise `r`")
    if not lora.pairs and not lora.problems:
        problems.append("it has no factors at all")
    return [f"{lora.name}: {problem}" for problem in problems]


def _wrong_number(loras: list[PlainLora], layers: dict[str, MoeTunerLayer], adapter_name: str) -> list[str]:
    problems = []
    for name, layer in layers.items():
        experts = _routed(layer, adapter_name)
        if experts != len(loras) and any(name in lora.pairs for lora in loras):
            problems.append(f"{name}: {len(loras)} LoRAs for {experts} expert{'s' * (experts > 1)}")
    return problems


def _told(problems: list[str], adapter_name: str, shown: int = 20) -> str:
    more = [f"and {len(problems) - shown} more"] if len(problems) > shown else []
    return "\n- ".join(
        [f"The experts of adapter '{adapter_name}' cannot start from this, and nothing was changed:"]
        + problems[:shown]
        + more
    )


def _warn_of_weights(
    config: Any, layers: dict[str, MoeTunerLayer], adapter_name: str, how: str, diversify: bool
) -> None:
    """Say where the start will not be the LoRA's function, though the user may expect it."""
    if how == "each":
        return
    routers = [layer.experts(adapter_name) for layer in layers.values()]
    if not all(_sums_to_one(experts) for experts in routers):
        warnings.warn(
            f"With `routing` = {config.routing!r} a token's weights do not sum to 1 here, so that at the start the adapter "
            "does less than the LoRA. 'softmax_top_k' and 'softmax' keep it whole.",
            stacklevel=3,
        )
    std = config.router_init_std
    if (how == "split" or diversify) and (std is None or std > NEAR_UNIFORM):
        warnings.warn(
            f"`router_init_std` is {std!r}: the experts start unlike each other, and only where the router weighs them alike "
            "is their sum the LoRA. Use `router_init_std=0.0`, or exact copies (`how='spawn', diversify=False`).",
            stacklevel=3,
        )


@torch.no_grad()
def _sums_to_one(experts: Any) -> bool:
    """Asked of the rule itself, with some logits: a token that visits null experts alone has a sum of 0."""
    if experts.router is None or getattr(experts, "routing", None) in ("random", "given"):
        return True
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1024, experts.num_experts, generator=generator).to(experts.router.device)
    routed = len(experts.lora_B) - experts.num_shared
    sums = dense_weights(experts.current_rule()(logits, experts.top_k))[:, :routed].sum(-1)
    return bool(torch.allclose(sums, torch.ones_like(sums)))


@torch.no_grad()
def _write(
    layers: dict[str, MoeTunerLayer], loras: list[PlainLora], adapter_name: str, how: str, diversify: bool, seed: int
) -> UpcyclingReport:
    generator = torch.Generator().manual_seed(seed)
    written, errors = [], {}
    for name, layer in layers.items():
        experts = layer.experts(adapter_name)
        pairs = [lora.pairs.get(name) for lora in loras]
        if all(pair is None for pair in pairs):
            continue
        number, error = _routed(layer, adapter_name), 0.0
        if how == "split":
            parts = _parts(pairs[0], number)
        elif how == "spawn":
            pair, error = fitted(pairs[0], experts.r)
            # A layer without a choice has nothing to diversify.
            parts = _diversified(pair, number, generator) if diversify and number > 1 else [pair] * number
        else:
            cut = [None if pair is None else fitted(pair, experts.r) for pair in pairs]
            parts = [None if one is None else one[0] for one in cut]
            error = max(one[1] for one in cut if one is not None)
        for expert, part in enumerate(parts):
            _put(experts, expert, part)
        written.append(name)
        if error:
            errors[name] = error
    return UpcyclingReport(written, [name for name in layers if name not in written], errors)


def _parts(pair: Pair, number: int) -> list[Pair]:
    return [Pair(A, number * B) for A, B in zip(pair.A.chunk(number), pair.B.chunk(number), strict=True)]


def _diversified(pair: Pair, number: int, generator: torch.Generator) -> list[Pair]:
    """Copies with half of their ranks, doubled; two by two complementary, so that each two add up to twice the pair.

    With an odd number the last stands alone, and its ranks are multiplied by r / (how many it keeps).
    """
    r, copies = len(pair.A), []
    for first in range(0, number, 2):
        order = torch.randperm(r, generator=generator)
        kept = (torch.arange(r) >= r // 2)[order]
        if first + 1 == number:
            copies.append(Pair(pair.A, pair.B * (kept * (r / int(kept.sum()))).unsqueeze(1)))
        else:
            copies += [Pair(pair.A, pair.B * (2 * half).unsqueeze(1)) for half in (kept, ~kept)]
    return copies


def _put(experts: Any, expert: int, part: Pair | None) -> None:
    """Write one expert; ranks that it has beyond the part keep their fresh A under B = 0."""
    if part is None:
        return
    ranks = len(part.A)
    A: Tensor = experts.lora_A[0 if len(experts.lora_A) == 1 else expert]
    A[:ranks] = part.A.to(A)
    experts.lora_B[expert, :ranks] = (part.B / experts.scaling).to(experts.lora_B)
