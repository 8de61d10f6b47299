"""Routers that start out knowing the domains: their rows are set from a few labelled examples.

A router that begins at random must find out by itself which texts belong together, while the experts do not differ yet.
With labels at hand it can begin where that search would end (cf. the routing warm-up of Innovator, and k-means starts).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from moe_peft.domain_config import DomainMoeConfig
from moe_peft.errors import refuse
from moe_peft.merge import on_device
from moe_peft.tuners.layer import MoeTunerLayer
from moe_peft.tuners.router import Router


Batch = dict[str, Any]


@torch.no_grad()
def init_routers(
    model: PeftModel, batches: Mapping[str, Iterable[Batch]], strength: float = 2.0, adapter_name: str = "default"
) -> dict[str, list[int]]:
    """Set every router's rows from the mean input of each domain's tokens.

    With c_d the mean input of domain d and c that of all domains, row d is the part of `c_d - c` that is orthogonal to c,
    scaled so that an average domain's mean input has a logit of `strength` at its own row. Orthogonal, because
    `(c_d - c) c` is an offset that would favour an expert on every token. With more experts than domains, experts d,
    d + D, d + 2 D ... share domain d and start a tenth of a row's length apart, at random.

    Args:
        model: with a fresh adapter; everything but the routers is left as it is.
        batches: domain name -> batches for `model(**batch)`; padding is not counted. A few dozen rows each are enough.
        strength: above 0. 2 gives an expert about 7 times the probability of another on its domain's mean.
        adapter_name: which adapter.

    Returns:
        domain name -> the experts that were given to it.

    Raises:
        ValueError: no router, fewer than two domains, more domains than experts, a domain without text.
    """
    if not isinstance(strength, (int, float)) or not strength > 0:
        raise refuse("strength", strength, "a positive number", "2.0 is the default.")
    if len(batches) < 2:
        raise refuse("batches", list(batches), "of at least two domains", "One domain gives a router nothing to tell.")
    config = model.peft_config.get(adapter_name)
    if isinstance(config, DomainMoeConfig):
        batches = _by_name(batches, config)
    layers = _layers(model, adapter_name)
    routers: dict[str, Router] = {name: layer.experts(adapter_name) for name, layer in layers.items()}
    fewest = min(router.num_experts - router.num_null for router in routers.values())
    if len(batches) > fewest:
        remedy = f"Join domains, or set `num_experts` to at least {len(batches)}."
        raise refuse(
            "batches", f"{len(batches)} domains", f"at most {fewest}, as some layer has no more experts", remedy
        )
    means = {domain: _mean_inputs(model, layers, adapter_name, texts, domain) for domain, texts in batches.items()}
    for name, router in routers.items():
        router.router.copy_(_rows(router, torch.stack([means[domain][name] for domain in batches]), strength))
        if router.router_bias is not None:
            router.router_bias.zero_()
    return {domain: list(range(d, fewest, len(batches))) for d, domain in enumerate(batches)}


def _by_name(batches: Mapping[str, Iterable[Batch]], config: DomainMoeConfig) -> Mapping[str, Iterable[Batch]]:
    """In the order of the experts: each has the domain of its name."""
    if config.gate != "token":
        remedy = "`moe_peft.set_prototypes` is for gates without training; train the one of 'sequence'."
        raise refuse("gate", config.gate, "'token' for a router that starts from domains' means", remedy)
    if set(batches) != set(config.names):
        allowed = "of the adapter's domains, all of them: " + ", ".join(config.names)
        raise refuse("batches", list(batches), allowed, "Each expert's row starts from the text of its name.")
    return {name: batches[name] for name in config.names}


def _layers(model: PeftModel, adapter_name: str) -> dict[str, MoeTunerLayer]:
    """The layers that have a router row for each choice."""
    found: dict[str, MoeTunerLayer] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, MoeTunerLayer) and layer.holds(adapter_name):
            experts = layer.experts(adapter_name)
            if (
                isinstance(experts, Router)
                and experts.routes
                and len(getattr(experts, "router", ())) == experts.num_experts
            ):
                found[name] = layer
    if not found:
        remedy = "Give an adapter whose layers have a router row for each of at least two experts."
        raise refuse("adapter_name", adapter_name, "an adapter with routers", remedy)
    return found


def _mean_inputs(
    model: PeftModel, layers: dict[str, MoeTunerLayer], adapter_name: str, texts: Iterable[Batch], domain: str
) -> dict[str, Tensor]:
    """The mean of what each router reads, over the real tokens, `[d]`."""
    context = next(iter(layers.values())).context
    width = {name: layer.experts(adapter_name).router.shape[1] for name, layer in layers.items()}
    sums = {name: torch.zeros(d, dtype=torch.float64) for name, d in width.items()}
    tokens = dict.fromkeys(layers, 0)

    def hook(name: str, layer: MoeTunerLayer) -> Any:
        of_model = getattr(model.peft_config[adapter_name], "router_scope", "linear") == "model"

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = context.required_embeddings(args[0]) if of_model else args[0]
            flat = x.reshape(-1, x.shape[-1]).double()
            real = context.real_tokens(len(flat))
            flat = flat if real is None else flat[real]
            sums[name] += flat.sum(0).cpu()
            tokens[name] += len(flat)

        return layer.register_forward_pre_hook(before)

    handles = [hook(name, layer) for name, layer in layers.items()]
    was_training, was_recording = model.training, context.recording
    model.eval()
    context.recording = True  # so that padding is known
    try:
        for batch in texts:
            model(**on_device({k: v for k, v in batch.items() if k != "labels"}, model))
    finally:
        context.recording = was_recording
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if not all(tokens.values()):
        raise ValueError(f"Domain '{domain}' has no text that reached the routers. Give at least one batch for it.")
    return {name: sums[name] / tokens[name] for name in layers}


def _rows(router: Router, means: Tensor, strength: float) -> Tensor:
    """`[N, d]` from the domains' means `[D, d]`; null and constant experts get rows of 0."""
    centre = means.mean(0)
    rows = means - centre
    rows = rows - (rows @ centre).unsqueeze(-1) * centre / centre.square().sum().clamp(min=1e-30)
    own = (rows * means).sum(-1).mean().clamp(min=1e-30)
    rows = strength * rows / own / router.router_scale
    domains = len(rows)
    every = rows.new_zeros(router.num_experts, rows.shape[1])
    true = router.num_experts - router.num_null
    every[:true] = rows[torch.arange(true) % domains]
    noise = torch.randn_like(every[domains:true])
    every[domains:true] += 0.1 * noise * every[domains:true].norm(dim=-1, keepdim=True) / rows.shape[1] ** 0.5
    return every.to(router.router.device, router.router.dtype)
