"""Gates that nothing trains: prototypes of the domains from labelled text, or from the experts' own weights."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from moe_peft.domain_config import ARROWS
from moe_peft.errors import nearest, refuse
from moe_peft.merge import on_device, routed_layers
from moe_peft.prompts import pooled
from moe_peft.tuners.domain_experts import DomainExperts
from moe_peft.tuners.domain_moe import DomainMoeLinear


Batch = dict[str, Any]


def gate_layers(model: PeftModel, adapter_name: str = "default") -> dict[str, DomainMoeLinear]:
    """The layers of an adapter of named experts, by name.

    Raises:
        ValueError: another adapter type.
    """
    layers = routed_layers(model, adapter_name)
    kind = model.peft_config[adapter_name].peft_type.value
    if not all(isinstance(layer, DomainMoeLinear) for layer in layers.values()):
        raise refuse(
            "adapter_name", f"{adapter_name} ({kind})", "an adapter of named experts", "Make one: DOMAIN_MOE."
        )
    return layers  # type: ignore[return-value]


def gate_of_model(model: PeftModel, adapter_name: str = "default") -> DomainExperts:
    """The module that has the one gate of the whole model.

    Raises:
        ValueError: if the adapter has none.
    """
    config = model.peft_config[adapter_name]
    for layer in gate_layers(model, adapter_name).values():
        experts = layer.experts(adapter_name)
        if experts.of_model and experts.router is not None:
            return experts
    allowed = "'sequence' or 'prototype', over at least two domains"
    raise refuse("gate", getattr(config, "gate", None), allowed, "Other gates decide for each token by itself.")


def set_prototypes(
    model: PeftModel, batches: Mapping[str, Iterable[Batch]] | None = None, adapter_name: str = "default"
) -> None:
    """Compute what a gate without training chooses by. It is saved with the adapter.

    "prototype": each domain's is the mean, over its prompts, of the mean embedding of a prompt's real tokens; a prompt then
    goes to the nearest (Euclidean). "arrow": each layer's, from its experts; see `arrow_prototypes`.

    Args:
        model: with an adapter of one of these gates.
        batches: for "prototype" alone: domain -> batches with `input_ids`, and `attention_mask` and `labels` where there
            are; where labels begin, the prompt ends. A few dozen prompts each are enough.
        adapter_name: which adapter.

    Raises:
        ValueError: another gate; text for "arrow"; a domain without text, or one that the adapter has not.
    """
    config = model.peft_config[adapter_name]
    gate = getattr(config, "gate", None)
    if gate not in ("prototype", *ARROWS):
        remedy = "Train the other gates; `gate='prototype'` and 'arrow' need no training."
        raise refuse("gate", gate, "'prototype', 'arrow' or 'arrow_init'", remedy)
    if gate in ARROWS:
        if batches is not None:
            raise refuse("batches", list(batches), f"left out with `gate` = {gate!r}", "It reads the experts alone.")
        arrow_prototypes(model, adapter_name)
        return
    experts = gate_of_model(model, adapter_name)
    texts = dict(batches or {})
    check_domains(texts, config.names)
    rows = torch.stack([_mean_prompt(model, texts[name], name) for name in config.names])
    with torch.no_grad():
        experts.router.copy_(rows)
    experts._ready = True


def check_domains(batches: Mapping[str, Any], domains: list[str]) -> None:
    """Refuse text of unknown domains, and a domain without text."""
    for name in batches:
        if name not in domains:
            raise refuse("batches", name, f"of the domains {', '.join(domains)}", nearest(str(name), domains))
    missing = [name for name in domains if name not in batches]
    if missing:
        listed = ", ".join(repr(name) for name in missing)
        raise refuse(
            "batches", list(batches), f"of every domain; {listed} has no text", "Give at least one batch each."
        )


@torch.no_grad()
def prompt_pools(model: PeftModel, batches: Iterable[Batch]) -> Tensor:
    """The prompts' embeddings, pooled, `[N, 2, d]`; nothing but the embedding layer is run."""
    embed, found = model.get_input_embeddings(), []
    for batch in batches:
        batch = on_device(batch, model)
        labels, prompt = batch.get("labels"), batch.get("prompt_mask")
        if labels is not None and labels.dim() == 2 and prompt is None:
            prompt = (labels == -100).long().cumprod(1).bool()
        found.append(pooled(embed(batch["input_ids"]), prompt, batch.get("attention_mask")))
    return torch.cat(found) if found else torch.zeros(0, 2, 1)


def _mean_prompt(model: PeftModel, batches: Iterable[Batch], domain: str) -> Tensor:
    pools = prompt_pools(model, batches)
    if not len(pools):
        raise ValueError(f"Domain '{domain}' has no text. Give at least one batch for it.")
    return pools[:, 1].float().mean(0)


@torch.no_grad()
def arrow_prototypes(model: PeftModel, adapter_name: str = "default") -> None:
    """Give every layer's gate the direction along which each expert acts most: the top right singular vector of B A (Arrow,
    arXiv:2405.11157, section 4.1). A token's score is the absolute value of its product with it, as a singular vector has
    no sign. A domain without an expert on a layer has a row of zeros there.
    """
    for layer in gate_layers(model, adapter_name).values():
        experts = layer.experts(adapter_name)
        if experts.router is None:
            continue
        experts.router.zero_()
        for name, (A, B) in experts.factors().items():
            experts.router[experts.domains.index(name)] = top_right_singular_vector(A, B).to(experts.router)
        experts._ready = True


def top_right_singular_vector(A: Tensor, B: Tensor) -> Tensor:
    """Of `x -> x A' B`, `[d_in]`, of length 1; zeros where B A is zero. By the small matrices alone: with A' = Q R it is Q
    times that of `B' R'`, which has as many columns as the expert has ranks.

    Args:
        A: `[r, d_in]`.
        B: `[r, d_out]`.
    """
    Q, R = torch.linalg.qr(A.double().T)  # [d_in, r], [r, r]
    S = torch.linalg.qr(B.double().T).R
    _, sigma, Vh = torch.linalg.svd(S @ R.T)
    return (Q @ Vh[0]) * bool(sigma[0] > 0)


class NullThreshold(NamedTuple):
    """What `set_null_threshold` found.

    Attributes:
        threshold: a prompt whose best domain scores below it gets the frozen model.
        kept: the share of known prompts that keep their expert.
        rejected: the share of unknown ones that fall to the frozen model; None where none were given.
    """

    threshold: float
    kept: float
    rejected: float | None


def set_null_threshold(
    model: PeftModel,
    known: Iterable[Batch],
    unknown: Iterable[Batch] | None = None,
    quantile: float = 0.05,
    adapter_name: str = "default",
) -> NullThreshold:
    """Let prompts that fit no domain fall to the frozen model: set the score that the best domain has to reach.

    The score is the log-probability of the best domain under "sequence", minus the distance to its prototype under
    "prototype". With unknown prompts the threshold is the one with the best mean of the share of known ones kept and that of
    unknown ones turned away, half way between the two scores that it lies between; without, the `quantile` of the known
    scores. It is saved with the adapter. Training does not look at it.

    Args:
        model: with an adapter whose gate is the model's.
        known: held-out batches of prompts of the domains, as for `set_prototypes`.
        unknown: batches of prompts that no domain is for, or of several at once.
        quantile: the share of known prompts that may be turned away, where there are no unknown ones.
        adapter_name: which adapter.

    Raises:
        ValueError: a gate without a threshold, no prompts, a quantile that is no share.
    """
    if not isinstance(quantile, (int, float)) or not 0 <= quantile < 1:
        raise refuse("quantile", quantile, "at least 0 and below 1", "0.05 turns one known prompt in twenty away.")
    gate = gate_of_model(model, adapter_name)
    good = best_scores(model, gate, known)
    bad = best_scores(model, gate, unknown) if unknown is not None else None
    for name, scores in (("known", good), ("unknown", bad)):
        if scores is not None and not len(scores):
            raise refuse(name, "empty", "at least one batch of prompts", "A threshold is set from data.")
    threshold = torch.quantile(good, quantile) if bad is None else separating(good, bad)
    gate.null_threshold.copy_(threshold)
    exact = gate.null_threshold.to(good)
    rejected = None if bad is None else float((bad < exact).double().mean())
    return NullThreshold(float(exact), float((good >= exact).double().mean()), rejected)


def best_scores(model: PeftModel, gate: DomainExperts, batches: Iterable[Batch]) -> Tensor:
    """The best domain's score of each prompt, `[N]` in fp64."""
    pools = prompt_pools(model, batches)
    if not len(pools):
        return torch.zeros(0, dtype=torch.float64)
    with torch.no_grad():
        return gate.prompt_scores(pools).amax(-1).double().cpu()


def separating(good: Tensor, bad: Tensor) -> Tensor:
    """The threshold with the largest mean of `P(good >= t)` and `P(bad < t)`, half way to the next score below.

    Args:
        good, bad: `[N]`, `[M]` scores.
    """
    scores = torch.cat((good, bad)).unique()
    ends = torch.cat((scores[:1] - 1, scores, scores[-1:] + 1))
    middles = (ends[1:] + ends[:-1]) / 2
    kept = (good.unsqueeze(0) >= middles.unsqueeze(1)).double().mean(1)
    rejected = (bad.unsqueeze(0) < middles.unsqueeze(1)).double().mean(1)
    return middles[(kept + rejected).argmax()]
