"""How often a gate sends text where it belongs."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from moe_peft.errors import nearest, refuse
from moe_peft.merge import observing, on_device
from moe_peft.prototypes import gate_layers


def gate_confusion(
    model: PeftModel, batches: Mapping[str, Iterable[dict[str, Any]]], adapter_name: str = "default"
) -> dict[str, dict[str, float]]:
    """For text of each domain the share of decisions that went to each domain, and to none of them.

    A decision is the expert with the highest weight for one real token on one layer; a gate of the whole model decides
    alike for all of a prompt's. A token whose weights are all zero went to "null", the frozen model.

    Args:
        model: with an adapter of named experts, active.
        batches: domain -> batches for `model(**batch)`; not every domain need have text.
        adapter_name: which adapter.

    Returns:
        domain of the text -> chosen domain, or "null" -> 0..1, summing to 1.

    Raises:
        ValueError: another adapter type, text of a domain that the adapter has not, or a domain without a batch.
    """
    layers = gate_layers(model, adapter_name)
    domains = next(iter(layers.values())).experts(adapter_name).domains
    for name in batches:
        if name not in domains:
            raise refuse("batches", name, f"of the domains {', '.join(domains)}", nearest(str(name), domains))
    found = {name: _decisions(model, layers, list(texts), adapter_name) for name, texts in batches.items()}
    empty = [name for name, counts in found.items() if not counts.sum()]
    if empty:
        raise refuse("batches", empty, "of domains that have text", "Give at least one batch for each.")
    shares = {name: (counts / counts.sum()).tolist() for name, counts in found.items()}
    return {name: dict(zip([*domains, "null"], row, strict=True)) for name, row in shares.items()}


def gate_accuracy(
    model: PeftModel, batches: Mapping[str, Iterable[dict[str, Any]]], adapter_name: str = "default"
) -> dict[str, float]:
    """The diagonal of `gate_confusion`: the share of decisions for each domain's own expert."""
    return {name: row[name] for name, row in gate_confusion(model, batches, adapter_name).items()}


@torch.no_grad()
def _decisions(model: PeftModel, layers: Any, batches: list[dict[str, Any]], adapter_name: str) -> Tensor:
    """How many decisions went to each domain, and to none, `[E + 1]` in fp64."""
    experts = next(iter(layers.values())).experts(adapter_name)
    counts = torch.zeros(len(experts.domains) + 1, dtype=torch.float64)

    def see(name: str, experts: Any, x: Tensor, y: Tensor, gates: Tensor, real: Tensor | None) -> None:
        chosen = experts.owner[gates.argmax(1)]
        chosen = torch.where(gates.amax(1) > 0, chosen, len(experts.domains))
        counts.add_(torch.bincount(chosen if real is None else chosen[real], minlength=len(counts)).double().cpu())

    with observing(model, layers, adapter_name, see):
        for batch in batches:
            model(**on_device(batch, model))
    return counts
