"""Named experts made of plain LoRAs that were trained elsewhere: `from_loras`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from moe_peft.domain_config import ARROWS, DomainMoeConfig, name_problems
from moe_peft.errors import refuse
from moe_peft.merge import routed_layers
from moe_peft.plain_loras import PlainLora, read_lora
from moe_peft.prototypes import arrow_prototypes
from moe_peft.tuners.layer import linear_features


Source = str | Path

_OF_LORAS = {"domains", "domain_ranks", "rank_pattern", "r", "lora_alpha", "use_rslora", "num_experts"}
_OF_LORAS |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_weights"}


def from_loras(
    loras: Mapping[str, Source] | Sequence[tuple[str, Source]],
    base_model: nn.Module | str | None = None,
    gate: str = "token",
    adapter_name: str = "default",
    check_base: bool = True,
    **fields: Any,
) -> PeftModel:
    """One model with an expert for each LoRA, exactly as it was trained: under its own domain the model computes what stock
    PEFT computes with that LoRA alone.

    Ranks, alphas and scales may differ, and so may the layers: a domain contributes nothing where its LoRA has none. The
    experts are frozen and the gate is fresh (`train_domains` changes the former); a gate without training is computed here
    from the experts ("arrow"), or from labelled text by `moe_peft.set_prototypes` ("prototype").

    Args:
        loras: domain -> folder or Hub id of a plain PEFT LoRA; or pairs of these.
        base_model: the model that the LoRAs were trained on, or its folder or Hub id. By default the one that they name, in
            full precision.
        gate: as in [`DomainMoeConfig`].
        adapter_name: of the new adapter.
        check_base: refuse a LoRA whose config names another base model. Names are compared without the path.
        fields: further ones of [`DomainMoeConfig`]; ranks, scales and layers are the LoRAs'.

    Raises:
        ValueError: everything that does not fit, in one message, a line each: names that are none or not different; what
            is no LoRA; DoRA, biases and whatever else an expert cannot take over; another base; layers that the model has
            not or of other widths; an unknown gate or field.
    """
    _check_settings(fields, base_model)
    listed = isinstance(loras, (list, tuple)) and all(isinstance(pair, (list, tuple)) for pair in loras)
    pairs = list(loras.items()) if isinstance(loras, Mapping) else [tuple(pair) for pair in loras] if listed else []
    if not pairs or any(len(pair) != 2 for pair in pairs):
        remedy = 'Write {"law": "path/to/law", "code": "path/to/code"}.'
        raise refuse("loras", loras, "from names to folders, at least one", remedy)
    names = [name for name, _ in pairs]
    problems = name_problems(names)
    read, tasks = _read(pairs, problems)
    problems += _config_problems(gate, fields, names)
    model = _base(base_model, read, problems)
    if model is not None:
        base = getattr(getattr(model, "config", None), "_name_or_path", None) if check_base else None
        for name, lora in read:
            problems += [f"{name} ({lora.name}): {line}" for line in _misfits(lora, model, base or None)]
    if problems or model is None:
        raise ValueError(_told(problems))
    ranks = _ranks([lora for _, lora in read])
    config = _config(model, names, ranks, gate, {"task_type": tasks.pop() if len(tasks) == 1 else None, **fields})
    adapted = get_peft_model(model, config, adapter_name=adapter_name)  # type: ignore[arg-type]
    _write(adapted, [lora for _, lora in read], names, adapter_name)
    if gate in ARROWS:
        arrow_prototypes(adapted, adapter_name)
    return adapted  # type: ignore[return-value]


def _check_settings(fields: dict[str, Any], base_model: Any) -> None:
    for name in fields:
        if name in _OF_LORAS:
            raise refuse(name, fields[name], "left out: it is what the LoRAs have", f"Remove `{name}`.")
    if base_model is not None and not isinstance(base_model, (nn.Module, str, Path)):
        remedy = "Leave it out for the one that the LoRAs name."
        raise refuse("base_model", base_model, "a model, or its folder or Hub id", remedy)
    if isinstance(base_model, PeftModel):
        remedy = "Give `model.get_base_model()` of a model without adapters, or its name."
        raise refuse("base_model", type(base_model).__name__, "the model itself, without an adapter", remedy)


def _read(pairs: list[tuple[Any, Any]], problems: list[str]) -> tuple[list[tuple[str, PlainLora]], set[Any]]:
    """The LoRAs that can be read, and the task types in their configs; what is wrong with them goes to `problems`."""
    found, tasks = [], set()
    for name, source in pairs:
        try:
            lora = read_lora(source)
            tasks.add(PeftConfig.from_pretrained(str(source)).task_type)
        except (ValueError, KeyError, OSError) as error:
            problems.append(f"{name} ({source}): {error}")
            continue
        problems += [f"{name} ({source}): {problem}" for problem in lora.problems]
        if not lora.pairs and not lora.problems:
            problems.append(f"{name} ({source}): it has no factors at all")
        found.append((name, lora))
    return found, tasks


def _config_problems(gate: str, fields: dict[str, Any], names: list[Any]) -> list[str]:
    """What the config says of the gate and the fields; the names have been looked at."""
    known = names if not name_problems(names) else [f"domain {n}" for n in range(len(names))]
    try:
        DomainMoeConfig(domains=known, gate=gate, **fields)
    except (ValueError, TypeError) as error:
        return [str(error)]
    return []


def _base(base_model: nn.Module | str | None, read: list[tuple[str, PlainLora]], problems: list[str]) -> Any:
    """The base model, or None where there is none; it is loaded only if all else fits."""
    if isinstance(base_model, nn.Module):
        return base_model
    named = {lora.base for _, lora in read if lora.base}
    if base_model is None and len(named) != 1:
        listed = ", ".join(f"{name}: {lora.base}" for name, lora in read)
        problems.append(f"`base_model` was left out, and the LoRAs do not name one model ({listed}): give it")
        return None
    if problems:
        return None
    from moe_peft.backbone import load_backbone  # here, because importing this package loads no data sets
    from moe_peft.loaded import backbone_named

    return load_backbone(backbone_named(base_model or named.pop()), "none")


def _misfits(lora: PlainLora, model: nn.Module, base: str | None) -> list[str]:
    problems = []
    if base and lora.base and Path(base).name != Path(lora.base).name:
        problems.append(f"it was trained on {lora.base}, and this is {base} (`check_base=False` if they are the same)")
    modules = dict(model.named_modules())
    absent = [module for module in lora.pairs if module not in modules]
    if absent:
        which = f"none of its {len(absent)} layers" if len(absent) == len(lora.pairs) else "no such layer"
        more = f" (nor {len(absent) - 1} more of its layers)" if 1 < len(absent) < len(lora.pairs) else ""
        problems.append(f"{absent[0]}: the model has {which}{more}: it was trained on another backbone")
    for module, pair in lora.pairs.items():
        if module not in modules:
            continue
        try:
            have = linear_features(modules[module])
        except TypeError as error:
            problems.append(f"{module}: {error}")
            continue
        theirs = pair.A.shape[1], pair.B.shape[1]
        if have != theirs:
            problems.append(
                f"{module}: from {theirs[0]} to {theirs[1]}, the model's layer from {have[0]} to {have[1]}"
            )
    return problems


def _told(problems: list[str], shown: int = 4) -> str:
    """Every LoRA's first problems: those that one has on each of its layers must not hide the next LoRA's."""
    by_source: dict[str, list[str]] = {}
    for problem in problems:
        by_source.setdefault(problem.partition("): ")[0], []).append(problem)
    lines = ["These LoRAs cannot become the experts of one adapter, and nothing was changed:"]
    for source, own in by_source.items():
        lines += own[:shown]
        if len(own) > shown:
            lines.append(f"{source}): and {len(own) - shown} more")
    return "\n- ".join(lines)


def _ranks(loras: list[PlainLora]) -> dict[str, list[int]]:
    """Layer -> the rank of each domain there."""
    layers = sorted({module for lora in loras for module in lora.pairs})
    return {layer: [len(lora.pairs[layer].A) if layer in lora.pairs else 0 for lora in loras] for layer in layers}


def _config(
    model: nn.Module, names: list[str], ranks: dict[str, list[int]], gate: str, fields: dict[str, Any]
) -> DomainMoeConfig:
    """Scales are in the factors, so that the experts' own is 1."""
    usual = [max(column) for column in zip(*ranks.values(), strict=True)]
    r = max(usual)
    return DomainMoeConfig(
        domains=names,
        gate=gate,
        r=r,
        lora_alpha=r,
        domain_ranks=usual,
        rank_pattern=_pattern(ranks, usual),
        target_modules=_targets(model, ranks),
        **{"train_domains": [], **fields},
    )


def _pattern(ranks: dict[str, list[int]], usual: list[int]) -> dict[str, list[int]]:
    """The layers whose ranks are not the usual ones; by the last part of the name where all of that name agree."""
    by_kind: dict[str, set[tuple[int, ...]]] = {}
    for layer, own in ranks.items():
        by_kind.setdefault(layer.rpartition(".")[2], set()).add(tuple(own))
    pattern = {}
    for layer, own in ranks.items():
        kind = layer.rpartition(".")[2]
        if own != usual:
            pattern[kind if len(by_kind[kind]) == 1 else layer] = own
    return pattern


def _targets(model: nn.Module, ranks: dict[str, list[int]]) -> list[str]:
    """The layers by the last part of their names where these say the same, else by their whole names."""
    kinds = {layer.rpartition(".")[2] for layer in ranks}
    named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in kinds}
    return sorted(kinds if named == set(ranks) else ranks)


@torch.no_grad()
def _write(model: Any, loras: list[PlainLora], names: list[str], adapter_name: str) -> None:
    for layer, linear in routed_layers(model, adapter_name).items():
        experts = linear.experts(adapter_name)
        for name, lora in zip(names, loras, strict=True):
            if layer in lora.pairs:
                A, B = (experts.get_parameter(f"lora_{factor}_{name}") for factor in "AB")
                A.copy_(lora.pairs[layer].A)
                B.copy_(lora.pairs[layer].B)
