"""Trained plain LoRAs, read with PEFT's own classes: their factors with the scales in them, and what makes one unfit."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from peft.utils.save_and_load import load_peft_weights
from safetensors import safe_open
from torch import Tensor

from moe_peft.errors import nearest, refuse
from moe_peft.routing import routing_dtype
from moe_peft.saving import check_weights


class Pair(NamedTuple):
    """One layer's LoRA, `x -> x @ A.T @ B`: A `[r, d_in]`, B `[r, d_out]`, with the LoRA's scale in B."""

    A: Tensor
    B: Tensor


@dataclass
class PlainLora:
    """A LoRA read from a folder or the Hub.

    Attributes:
        name: as the user wrote it.
        base: the base model's name in its config.
        pairs: module name -> factors, without the name's `base_model.model.`.
        problems: what of it no expert can take over, a line each.
    """

    name: str
    base: str | None
    pairs: dict[str, Pair]
    problems: list[str]


_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights` after which the LoRA belongs to a base that PEFT has changed."""

_REFUSED = {
    "use_dora": "DoRA: it rescales the whole weight, which no low-rank expert does",
    "lora_bias": "its B has a bias",
    "modules_to_save": "it trained whole modules too",
    "trainable_token_indices": "it trained token embeddings too",
    "target_parameters": "it adapts parameters, not linear layers",
    "layer_replication": "its model repeats layers",
    "alora_invocation_tokens": "it acts from its invocation tokens on only",
    "arrow_config": "it routes by itself",
}


def read_lora(source: str | Path, only_shapes: bool = False) -> PlainLora:
    """Config and weights, on the CPU, in fp32 or better.

    Args:
        source: a folder that PEFT saved, or an id on the Hub.
        only_shapes: of the weights read the file's header alone; `pairs` are then on the meta device. For a folder with
            an `adapter_model.safetensors`.

    Raises:
        ValueError: if it is no LoRA, or its weights are damaged. What it has beyond plain factors goes to `problems`.
    """
    _check_source(source)
    name = str(source)
    check_weights(Path(name))
    try:
        config = PeftConfig.from_pretrained(name)
    except (ValueError, OSError) as error:  # not found, no network, no such id: say which
        reason = " ".join(str(error).split())
        raise ValueError(f"it is no folder here, and the Hub gave no LoRA: {reason}. Check the spelling.") from error
    if not isinstance(config, LoraConfig) or config.peft_type != "LORA":
        allowed = "the folder or the Hub id of a plain LoRA"
        raise refuse("lora", f"{name} ({config.peft_type.value})", allowed, "Other adapter types have other weights.")
    problems = [f"`{field}`: {why}" for field, why in _REFUSED.items() if getattr(config, field, None)]
    if config.bias != "none":
        problems.append(f"`bias` is {config.bias!r}: it trained biases of the base too")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_CHANGED_BASE):
        problems.append(
            f"`init_lora_weights` is {init!r}, which changed the base model. Save it with PEFT's "
            "`path_initial_model_for_weight_conversion`"
        )
    weights = _shapes(Path(name)) if only_shapes else load_peft_weights(name, device="cpu")
    pairs = _pairs(weights, config, problems)
    return PlainLora(name, config.base_model_name_or_path, pairs, problems)


def _check_source(source: Any) -> None:
    """Refuse what is neither a folder with a LoRA in it nor could be an id on the Hub."""
    if not isinstance(source, (str, Path)) or not str(source).strip():
        remedy = "Write 'path/to/law' or 'someone/law-lora'."
        raise refuse("lora", source, "the folder or the Hub id of a plain LoRA", remedy)
    # An id on the Hub is "someone/name": with no slash, or with more, it is a path.
    folder, looks_local = Path(source), str(source).startswith((".", "/", "~")) or str(source).count("/") != 1
    if not folder.is_dir():
        if folder.exists():
            raise ValueError("it is a file: give the folder that PEFT saved")
        if isinstance(source, Path) or looks_local:
            siblings = [p.name for p in folder.parent.glob("*")][:50] if folder.parent.is_dir() else []
            hint = nearest(folder.name, siblings) if siblings else f"There is no folder '{folder.parent}' either."
            raise ValueError(f"there is no such folder. {hint}")
        return
    config = folder / "adapter_config.json"
    if not config.is_file():
        raise ValueError("the folder has no adapter_config.json: give the one that PEFT saved the LoRA in")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"its adapter_config.json is damaged ({error}): save the LoRA again") from error
    if not any((folder / f"adapter_model.{end}").is_file() for end in ("safetensors", "bin")):
        raise ValueError("the folder has no adapter_model.safetensors: only half of the LoRA is there")


def _shapes(folder: Path) -> dict[str, Tensor]:
    """Every tensor's name and shape, without its values."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118


def _pairs(weights: dict[str, Tensor], config: LoraConfig, problems: list[str]) -> dict[str, Pair]:
    prefix = "base_model.model."
    factors: dict[str, dict[str, Tensor]] = {}
    others: list[str] = []
    for key, tensor in weights.items():
        module, _, factor = key.removeprefix(prefix).removesuffix(".weight").rpartition(".")
        if factor in ("lora_A", "lora_B") and key.endswith(".weight") and tensor.dim() == 2:
            factors.setdefault(module, {})[factor] = tensor.to(routing_dtype(tensor.dtype))
        elif key.endswith(".base_layer.weight"):
            others.append(
                f"{key}: PEFT put a copy of the base's weight beside it; save with `save_embedding_layers=False`"
            )
        else:
            others.append(f"{key} {list(tensor.shape)} is no factor of a linear layer")
    if not problems or len(others) <= 1:
        problems += others
    elif others:  # what a refused field leaves on every layer
        problems.append(f"{others[0]}, nor are {len(others) - 1} more")
    pairs = {}
    for module, both in factors.items():
        if both.keys() != {"lora_A", "lora_B"} or len(both["lora_A"]) != both["lora_B"].shape[1]:
            problems.append(f"{module}: its factors do not fit each other")
            continue
        r, scale = _rank_and_scale(config, module)
        if r != len(both["lora_A"]):
            problems.append(f"{module}: the config says rank {r}, the weights have {len(both['lora_A'])}")
            continue
        if not all(factor.is_meta or bool(factor.isfinite().all()) for factor in both.values()):
            problems.append(f"{module}: its weights are not all finite numbers: its training has failed")
        pairs[module] = Pair(both["lora_A"], scale * both["lora_B"].T)
    return pairs


def _rank_and_scale(config: Any, module: str) -> tuple[int, float]:
    """As PEFT's LoRA finds them for a module."""
    r = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), module), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
    return r, alpha / (math.sqrt(r) if config.use_rslora else r)


def fitted(pair: Pair, r: int) -> tuple[Pair, float]:
    """The pair with at most `r` ranks, and the relative error of its product (Frobenius).

    The truncation is the best there is: the singular value decomposition of the product, by QR of the factors, without
    forming it.
    """
    if len(pair.A) <= r:
        return pair, 0.0
    Q_A, R_A = torch.linalg.qr(pair.A.double().T)  # A' = Q_A R_A
    Q_B, R_B = torch.linalg.qr(pair.B.double().T)
    U, sigma, Vh = torch.linalg.svd(R_B @ R_A.T)  # B' A = Q_B (R_B R_A') Q_A'
    root = sigma[:r].sqrt()
    A, B = root.unsqueeze(1) * (Vh[:r] @ Q_A.T), root.unsqueeze(1) * (Q_B @ U[:, :r]).T
    total = float(sigma.square().sum())
    error = math.sqrt(float(sigma[r:].square().sum()) / total) if total else 0.0
    return Pair(A.to(pair.A.dtype), B.to(pair.B.dtype)), error
