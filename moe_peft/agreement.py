"""What a static merge costs: base, routed and merged model on the same held-out tokens, and layer by layer."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

from moe_peft.merge import (
    Batch,
    Experts,
    Factors,
    hidden_and_features,
    instead_of_routing,
    observing,
    on_device,
    routed_layers,
)


class Agreement(NamedTuple):
    """How three models do on the same held-out tokens (those with a label, where the batches have labels).

    Attributes:
        loss_base, loss_routed, loss_merged: mean negative log-likelihood in nats.
        kl_base, kl_merged: mean KL(routed || other) in nats; 0 is no loss.
        top1_base, top1_merged: share of tokens whose most probable next token is the routed model's.
        layer_error: layer name -> relative error of the layer's output, |merged - routed| / |routed|.
        tokens: how many were compared.
    """

    loss_base: float
    loss_routed: float
    loss_merged: float
    kl_base: float
    kl_merged: float
    top1_base: float
    top1_merged: float
    layer_error: dict[str, float]
    tokens: int


@torch.no_grad()
def measure_agreement(
    model: PeftModel, factors: dict[str, Factors], held_out: Iterable[Batch], adapter_name: str = "default"
) -> Agreement:
    """What the static LoRA costs on text that it was not fitted to.

    Args:
        held_out: batches for `model(**batch)`, with `labels` (-100 where no loss is wanted) or at least `input_ids`.

    Raises:
        ValueError: if no token can be compared.
    """
    sums = torch.zeros(7, dtype=torch.float64)
    tokens, layers = 0, routed_layers(model, adapter_name)
    error: dict[str, Tensor] = {name: torch.zeros(2, dtype=torch.float64) for name in layers}

    def see(name: str, experts: Experts, x: Tensor, y: Tensor, gates: Tensor, real: Tensor | None) -> None:
        flat = x.reshape(-1, x.shape[-1])
        flat, gates = (flat, gates) if real is None else (flat[real], gates[real])
        error[name] += _squares(experts, factors[name], flat, gates)

    for batch in (on_device(batch, model) for batch in held_out):
        with observing(model, layers, adapter_name, see):
            routed, labels = _log_probs(model, batch)
            with model.disable_adapter():
                base, _ = _log_probs(model, batch)
            with instead_of_routing(model, factors, adapter_name):
                merged, _ = _log_probs(model, batch)
        losses = [F.nll_loss(p, labels, reduction="sum") for p in (base, routed, merged)]
        kl = [(routed.exp() * (routed - p)).sum() for p in (base, merged)]
        top1 = [(p.argmax(-1) == routed.argmax(-1)).sum() for p in (base, merged)]
        sums += torch.stack([v.double().cpu() for v in (*losses, *kl, *top1)])
        tokens += labels.numel()
    if not tokens:
        raise ValueError("The held-out text holds no token with a label. Give rows with an answer.")
    layer_error = {name: float((e[0] / e[1].clamp(min=1e-30)).sqrt()) for name, e in error.items()}
    return Agreement(*(sums / tokens).tolist(), layer_error=layer_error, tokens=tokens)


def _log_probs(model: PeftModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """`(log-probabilities [N, V] in fp32, labels [N])` of the positions whose next token has a label."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"].masked_fill(batch.get("attention_mask", torch.ones(())) == 0, -100)
    logits, labels = model(**inputs).logits[:, :-1], labels[:, 1:]
    wanted = labels != -100
    return logits[wanted].float().log_softmax(-1), labels[wanted]


def _squares(experts: Experts, f: Factors, x: Tensor, gates: Tensor) -> Tensor:
    """`[sum |merged - routed|^2, sum |routed|^2]` over tokens, of what is added to the frozen output."""
    hidden, _ = hidden_and_features(experts, x)
    gated = hidden * gates.repeat_interleave(experts.r, dim=1)
    routed = gated @ experts.stacked()[1].to(gated.dtype)
    merged = x.to(f.A.dtype) @ f.A.T @ f.B.T
    return torch.stack([(merged - routed).square().sum(), routed.square().sum()]).double().cpu()
