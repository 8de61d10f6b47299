"""One plain PEFT LoRA per expert, with what picks among them; or the one LoRA that a single request is.

Any server of several LoRAs (vLLM, SGLang, llama.cpp) can then run a mixture whose experts are chosen for whole requests,
exactly, and knows nothing of routing: see `routing-balance-merge.md` 4.4 and `export.md` C of the design pages.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from moe_peft.errors import refuse
from moe_peft.export.selector import Selector, describe, expert_names, selector_of, write_selector
from moe_peft.export.writer import whole_folder
from moe_peft.merge import Factors, observing, on_device, routed_layers, save_static
from moe_peft.routing_control import routing
from moe_peft.serving import client


class ExportedExperts(NamedTuple):
    """What `export_experts` wrote.

    Attributes:
        folders: the name of the adapter on a server -> its folder.
        r: of each.
        selector: what picks among them, or None.
    """

    folders: dict[str, Path]
    r: int
    selector: Selector | None


def export_experts(
    model: PeftModel,
    out: str | Path,
    selector: Selector | str | None = "auto",
    adapter_name: str = "default",
) -> ExportedExperts:
    """Write each expert as a plain LoRA: what the adapter computes where that expert answers alone, with weight 1.

    Shared experts, and layers with a single expert, are part of each.

    Args:
        model: with the adapter; it is left as it is.
        out: a new or empty folder; gets a folder per expert, and with a selector `router.safetensors`, `router.json` and
            `client.py`, which picks the adapter for a prompt.
        selector: from `fit_selector`; "auto" is the adapter's own (`selector_of`), if its gate decides for whole prompts
            by their embeddings; None writes none.

    Raises:
        ValueError: if the experts are no LoRAs (FFN mixtures, constant experts), or `out` is in use.
    """
    layers = _lora_layers(model, adapter_name)
    config: Any = model.peft_config[adapter_name]
    names = expert_names(model, adapter_name)
    chosen = selector_of(model, adapter_name) if selector == "auto" else selector
    assert not isinstance(chosen, str)
    about = None if chosen is None else describe(model, chosen, names, config.base_model_name_or_path)
    out = Path(out)
    with whole_folder(out) as beside:
        r = 0
        for number, name in enumerate(names):
            factors = {
                module: found
                for module, layer in layers.items()
                if (found := _of_expert(layer, adapter_name, number)) is not None
            }
            r = max(r, write_lora(factors, beside / name, config).r)
        if chosen is not None and about is not None:
            write_selector(chosen, about, beside)
            shutil.copyfile(str(client.__file__), beside / "client.py")
    return ExportedExperts({name: out / name for name in names}, r, chosen)


def _of_expert(layer: Any, adapter_name: str, number: int) -> Factors | None:
    """One expert on one layer, or None where it has none there."""
    if layer.is_static(adapter_name):
        A, B = layer.static_factors(adapter_name)
    else:
        name = layer.expert_names(adapter_name)
        factors = layer.expert_factors(adapter_name)
        if number >= len(name) or name[number] not in factors:
            return None
        A, B = factors[name[number]]
    return Factors(A.detach().float(), B.detach().float().T)


def _lora_layers(model: PeftModel, adapter_name: str) -> dict[str, Any]:
    """The layers, if each expert on them is a LoRA and the adapter is nothing beside them."""
    layers = routed_layers(model, adapter_name)
    config: Any = model.peft_config[adapter_name]
    routed = [layer for layer in layers.values() if not layer.is_static(adapter_name)]
    if not routed:
        remedy = "`moe-peft merge` writes it as one plain LoRA, exactly."
        raise refuse("adapter", adapter_name, "one that routes, for an export per expert or request", remedy)
    if not all(hasattr(layer, "expert_factors") for layer in routed):
        kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
        allowed = "'linear_moe' or 'domain_moe', whose experts are LoRAs on linear layers"
        raise refuse("peft_type", kind, allowed, "`--to moe` writes an FFN mixture as a stock MoE checkpoint.")
    if getattr(config, "num_constant_experts", 0):
        remedy = "What they add is a bias, which a plain LoRA does not have."
        raise refuse("num_constant_experts", config.num_constant_experts, "0 for plain LoRAs", remedy)
    for field in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, field, None):
            remedy = "The plain LoRA would lose the weights that were trained there: serve the adapter routed."
            raise refuse(field, getattr(config, field), "None for plain LoRAs", remedy)
    return layers


def write_lora(factors: Mapping[str, Factors], folder: Path, config: Any) -> LoraConfig:
    """The one place where a plain LoRA of this module is written: portable, its scale 1, one rank for all layers.

    Layers of a lower rank are filled up with zeros, so that no pattern of ranks stands in the config, which SGLang and
    llama.cpp do not read.

    Args:
        factors: module -> A `[rank, d_in]`, B `[d_out, rank]`.
        folder: gets `adapter_config.json` and `adapter_model.safetensors`.
        config: of the adapter, for the base model's name and the task.
    """
    return save_static(dict(factors), folder, config.base_model_name_or_path, task_type=config.task_type)


@torch.no_grad()
def request_factors(
    model: PeftModel, ids: Tensor, adapter_name: str = "default", domain: str | int | None = None
) -> dict[str, Factors]:
    """The one LoRA per layer that the adapter is for this prompt and its answer: A of the chosen experts stacked, B times
    their weights.

    Args:
        model: with the adapter active, routing whole sequences.
        ids: `[S]` or `[1, S]`, the prompt.
        domain: as in `moe_peft.routing`, in place of the router's choice.

    Raises:
        ValueError: if the adapter routes single tokens, or no expert answers this prompt.
    """
    layers = _lora_layers(model, adapter_name)
    config: Any = model.peft_config[adapter_name]
    by_hand = domain is not None or getattr(config, "routing", None) == "given"
    if config.router_granularity != "sequence" and not by_hand:
        remedy = (
            "Its experts change within a request, so that no LoRA is exact: fit one to each domain's text by `moe-peft merge` "
            "(least squares, its loss measured), serve the adapter routed, or give a `domain`."
        )
        raise refuse("router_granularity", config.router_granularity, "'sequence' for a LoRA per request", remedy)
    if any(adapter_name not in layer.active_adapters for layer in layers.values()):
        raise ValueError(f"Adapter '{adapter_name}' is not active. Call `model.set_adapter('{adapter_name}')` first.")
    ids = torch.as_tensor(ids).reshape(1, -1)
    if not ids.numel():
        raise refuse("prompt", "", "a text with at least one token", "The prompt chooses the experts.")
    factors: dict[str, Factors] = {}

    def see(name: str, experts: Any, x: Tensor, y: Tensor, gates: Tensor, real: Any) -> None:
        weights = gates[0].repeat_interleave(experts.r)
        A, B = (rows.detach().float() for rows in experts.stacked())
        keep = weights != 0
        factors[name] = Factors(A[keep], (weights[keep].float().unsqueeze(1) * B[keep]).T)

    routed = {name: layer for name, layer in layers.items() if not layer.is_static(adapter_name)}
    was_training = model.training
    model.eval()
    try:
        with routing(model, domain=domain), observing(model, routed, adapter_name, see):
            model(**on_device({"input_ids": ids}, model))
    finally:
        model.train(was_training)
    if not any(len(f.A) for f in factors.values()):
        remedy = "Send this prompt to the base model itself."
        raise refuse("prompt", ids[0, :8].tolist(), "one that some expert answers", remedy)
    static = {name: _of_expert(layer, adapter_name, 0) for name, layer in layers.items() if name not in routed}
    return {**factors, **{name: found for name, found in static.items() if found is not None}}


def export_request_lora(
    model: PeftModel,
    prompt: str | Tensor | list[int],
    out: str | Path,
    tokenizer: Any = None,
    adapter_name: str = "default",
    domain: str | int | None = None,
) -> LoraConfig:
    """Write the exact plain LoRA for one request, for hot loading into any LoRA server. Its rank is the largest sum of
    the chosen experts' ranks over the layers.

    Args:
        model, adapter_name, domain: as for `request_factors`.
        prompt: text, which needs `tokenizer`, or token ids.
        out: a new or empty folder.

    Raises:
        ValueError: as `request_factors`; text without a tokenizer; or `out` in use.
    """
    if isinstance(prompt, str) and tokenizer is None:
        raise refuse("tokenizer", None, "the base model's where `prompt` is text", "Or give token ids.")
    ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    factors = request_factors(model, torch.as_tensor(ids), adapter_name, domain)
    with whole_folder(Path(out)) as beside:
        return write_lora(factors, beside, model.peft_config[adapter_name])
