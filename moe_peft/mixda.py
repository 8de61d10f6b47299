"""From MixDA's first stage to its second: bottleneck adapters that were trained apart, joined in one adapter.

Each domain comes as the folder of a `BottleneckMoeConfig` adapter with `gate="none"`. `domains_config` reads the folders'
configs and makes that of the second stage; `load_domains` puts the weights into its experts, which stay frozen there.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights
from torch import Tensor

from moe_peft.bottleneck_config import BottleneckMoeConfig, check_domains
from moe_peft.errors import refuse
from moe_peft.tuners.bottleneck_moe import BottleneckExperts, BottleneckMoeLinear


_PLACE = ("bottleneck_size", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""What domains must have in common to stand beside each other in one layer."""

_FACTORS = ("down", "down_bias", "up", "up_bias")
_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<layer>.*)\.bottleneck_moe_experts\.(?P<factor>\w+)$")


class _Source(NamedTuple):
    """One domain's folder."""

    folder: str
    config: BottleneckMoeConfig
    number: int  # of the domain among those that the folder holds


def domains_config(folders: Mapping[str, str | Path], **overrides: Any) -> BottleneckMoeConfig:
    """The second stage's config for domains that were trained apart.

    >>> config = domains_config({"law": "out/law", "medicine": "out/medicine"}, r=8)  # doctest: +SKIP
    >>> model = get_peft_model(base, config)  # doctest: +SKIP
    >>> load_domains(model, {"law": "out/law", "medicine": "out/medicine"})  # doctest: +SKIP

    Args:
        folders: the domains' names and the folders, or ids on the Hub, of their adapters. A folder with one domain may be
            given any name; of one with several, the one that is so called is taken.
        overrides: further fields, as `gate`, `gate_input`, `r` and `task_type`. `freeze_domains` is True unless given.

    Raises:
        ValueError: naming every folder and field that does not fit.
    """
    sources = _sources(folders)
    first = next(iter(sources.values())).config
    for name in _PLACE:
        if name in overrides:
            raise ValueError(f"`{name}` is what the domains were trained with and cannot be changed: leave it out.")
    settings = {name: _listed(getattr(first, name)) for name in _PLACE}
    return BottleneckMoeConfig(domains=list(folders), **{"freeze_domains": True, **settings, **overrides})


def load_domains(model: PeftModel, folders: Mapping[str, str | Path], adapter_name: str = "default") -> None:
    """Put trained domains into the experts of an adapter that has been made for them.

    Args:
        model: with an adapter of `domains_config(folders)`.
        folders: as there.
        adapter_name: of that adapter.

    Raises:
        ValueError: naming every folder, and every domain or tensor in it, that does not fit; nothing is loaded then.
    """
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, BottleneckMoeConfig):
        raise ValueError(
            f"Adapter '{adapter_name}' is no BottleneckMoeConfig adapter of this model, so it has no domains."
        )
    problems = [
        f"'{name}': the adapter has this domain, but no folder was given for it" for name in config.domains or ()
    ]
    problems = [said for said, name in zip(problems, config.domains or (), strict=True) if name not in folders]
    problems += [
        f"'{name}' ({folders[name]}): the adapter has no such domain" for name in folders if name not in config.domains
    ]
    _raise(problems)
    layers = {
        name.removeprefix("base_model.model."): layer.experts(adapter_name)
        for name, layer in model.named_modules()
        if isinstance(layer, BottleneckMoeLinear) and layer.has_domains(adapter_name)
    }
    copies: list[tuple[Tensor, Tensor]] = []
    for name, source in _sources(folders).items():
        number = (config.domains or []).index(name)
        found, wrong = _fitted(source, layers, number)
        problems += [f"'{name}' ({source.folder}): {said}" for said in wrong]
        copies += found
    _raise(problems)
    with torch.no_grad():
        for target, value in copies:
            target.copy_(value)


def _sources(folders: Mapping[str, str | Path]) -> dict[str, _Source]:
    """The folders' configs, checked against each other."""
    check_domains(list(folders), "folders")
    problems, sources = [], {}
    for name, folder in folders.items():
        try:
            config = PeftConfig.from_pretrained(str(folder))
        except (OSError, ValueError, KeyError) as error:
            problems.append(
                f"'{name}' ({folder}): its adapter_config.json cannot be read ({' '.join(str(error).split())})"
            )
            continue
        if not isinstance(config, BottleneckMoeConfig):
            kind = getattr(config.peft_type, "value", config.peft_type)
            problems.append(f"'{name}' ({folder}): `peft_type` is {kind}, but a domain is a BOTTLENECK_MOE adapter")
            continue
        held = config.domains or []
        if len(held) > 1 and name not in held:
            problems.append(f"'{name}' ({folder}): `domains` is {held}, none of which has this name")
            continue
        sources[name] = _Source(str(folder), config, held.index(name) if name in held else 0)
    problems += _misfits(sources)
    _raise(problems)
    return sources


def _misfits(sources: dict[str, _Source]) -> list[str]:
    """Where domains differ that must not."""
    said: list[str] = []
    if not sources:
        return said
    (first_name, first), *others = sources.items()
    for name, source in others:
        for field in (*_PLACE, "base_model_name_or_path"):
            value, wanted = getattr(source.config, field), getattr(first.config, field)
            if value != wanted:
                said.append(
                    f"'{name}' ({source.folder}): `{field}` is {_listed(value)!r}, but {_listed(wanted)!r} for '{first_name}'"
                )
    return said


def _fitted(
    source: _Source, layers: dict[str, BottleneckExperts], number: int
) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """Pairs of a slice of the model and what goes there, and what does not fit."""
    saved: dict[tuple[str, str], Tensor] = {}
    for key, tensor in load_peft_weights(source.folder, device="cpu").items():
        match = _KEY.match(key)
        if match and match["factor"] in _FACTORS:
            saved[match["layer"], match["factor"]] = tensor
    pairs, wrong = [], []
    for layer, experts in layers.items():
        for factor in _FACTORS:
            value, target = saved.pop((layer, factor), None), getattr(experts, factor)[number]
            if value is None:
                wrong.append(f"{layer}.{factor} is missing")
            elif value.shape[1:] != target.shape:
                wrong.append(f"{layer}.{factor} is {list(value.shape[1:])}, but {list(target.shape)} in this model")
            else:
                pairs.append((target, value[source.number]))
    wrong += [f"{layer}.{factor} has no place in this model" for layer, factor in saved]
    return pairs, wrong


def _listed(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def _raise(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n- ".join(["These domains cannot be joined, and nothing was loaded:", *problems]))


def named_paths(pairs: list[str], option: str = "--domain") -> dict[str, str]:
    """`["law=out/law", "code=out/code"]` as a mapping.

    Raises:
        ValueError: a pair without a name or a path, or two of one name.
    """
    found: list[tuple[str, str]] = []
    for pair in pairs or []:
        name, equals, path = pair.partition("=")
        if not (name.strip() and equals and path.strip()):
            raise refuse(option, pair, "a domain's name and a path, as law=data/law.txt", "Write one for each domain.")
        found.append((name.strip(), path.strip()))
    check_domains([name for name, _ in found], option)
    return dict(found)
