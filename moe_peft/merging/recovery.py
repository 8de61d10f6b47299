"""Static factors trained towards the routed model itself: distillation (export.md B.1), and XFT's learned mixing.

The teacher is the routed model, the student the same backbone with static factors in the adapter's place: one model in
memory. The loss is KL(teacher || student) on the tokens that were trained on, and nothing else: the routed model is what
shall be kept, right or wrong.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from moe_peft.errors import refuse
from moe_peft.merge import Batch, Factors, instead_of_routing, on_device, routed_layers
from moe_peft.merging.gram import Readout, balanced, truncated
from moe_peft.merging.measures import labels_of, wanted_log_probs
from moe_peft.tuners.ffn_experts import FfnExperts


STEPS = 300
RATE = {"distill": 3e-3, "learned": 1e-2}
"""Peak learning rates of Adam, falling linearly to 0."""

OnStep = Callable[[int, float], None]


def distill(
    model: PeftModel,
    start: dict[str, Factors],
    text: Sequence[Batch],
    steps: int = STEPS,
    adapter_name: str = "default",
    on_step: OnStep | None = None,
) -> dict[str, Factors]:
    """The factors after some steps towards the routed model, all of them trained.

    Args:
        start: of every adapted linear.
        text: batches, visited in random order; the loss is on the tokens with a label.
        on_step: called with the number of the step and its loss.
    """
    begun = {name: balanced(f) for name, f in start.items()}
    weights = {name: (f.A.clone().requires_grad_(), f.B.clone().requires_grad_()) for name, f in begun.items()}
    trained = [weight for pair in weights.values() for weight in pair]
    _train(
        model,
        trained,
        lambda: {name: Factors(*pair) for name, pair in weights.items()},
        text,
        steps,
        RATE["distill"],
        adapter_name,
        on_step,
    )
    return {name: Factors(A.detach(), B.detach()) for name, (A, B) in weights.items()}


def learned_mixing(
    model: PeftModel,
    usage: dict[str, Tensor],
    text: Sequence[Batch],
    rank: int | None = None,
    steps: int = STEPS,
    adapter_name: str = "default",
    on_step: OnStep | None = None,
) -> dict[str, Factors]:
    """`B' diag(c) A` with one number c for each expert of each linear, learnt (XFT, arXiv:2404.15247).

    XFT mixes whole weights with a softmax, one vector a layer, on the task's loss, and keeps a fixed share of its shared
    expert. Here the numbers are free, one vector a linear, and start at the usage mean; the loss is that of `distill`.

    Args:
        usage: linear -> mean weight of each expert, `[E]`; linears without routing are left out and kept as they are.
        rank: of the result; the numbers are learnt before it is truncated.
    """
    layers = routed_layers(model, adapter_name)
    mixing = {name: c.detach().float().clone().requires_grad_() for name, c in usage.items()}
    stacks = {name: stacked(layers[name].experts(adapter_name)) for name in usage}
    fixed = {
        name: Factors(A.detach().float(), B.detach().float().T)
        for name, layer in layers.items()
        if name not in usage
        for A, B in (layer.static_factors(adapter_name),)
    }

    def factors() -> dict[str, Factors]:
        mixed = {}
        for name, (A, B) in stacks.items():
            spread = mixing[name].repeat_interleave(len(A) // len(mixing[name]))
            mixed[name] = Factors(A, B.T * spread)
        return mixed | fixed

    _train(model, list(mixing.values()), factors, text, steps, RATE["learned"], adapter_name, on_step)
    with torch.no_grad():
        result = {}
        for name, f in factors().items():
            n = len(f.A) if rank is None else min(rank, len(f.A))
            result[name] = truncated(Readout(f.A.double(), f.B.double().T), n)
    return result


def stacked(experts: Any) -> tuple[Tensor, Tensor]:
    """`A [n, d_in]` and `B [n, d_out]` of all experts in fp32, the scale in B."""
    if isinstance(experts, FfnExperts):
        A, B = experts.lora_A.flatten(0, 1), experts.scaling * experts.lora_B.flatten(0, 1)
    else:
        A, B = experts.stacked()
    return A.detach().float(), B.detach().float()


def _train(
    model: PeftModel,
    weights: list[Tensor],
    factors: Callable[[], dict[str, Factors]],
    text: Sequence[Batch],
    steps: int,
    rate: float,
    adapter_name: str,
    on_step: OnStep | None,
) -> None:
    if steps < 1:
        raise refuse("steps", steps, "a whole number of at least 1", f"{STEPS} is what was measured.")
    optimizer = torch.optim.Adam(weights, lr=rate)
    order = random.Random(0)
    was_training = model.training
    model.eval()
    try:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
            batch = on_device(order.choice(text), model)
            labels = labels_of(batch)
            with torch.no_grad():
                routed, _ = wanted_log_probs(model(**batch, use_cache=False).logits, labels)
            with torch.enable_grad(), instead_of_routing(model, factors(), adapter_name):
                own, _ = wanted_log_probs(model(**batch, use_cache=False).logits, labels)
                loss = (routed.exp() * (routed - own)).sum(-1).mean()
                loss.backward(inputs=weights)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if on_step is not None:
                on_step(step, float(loss.detach()))
    finally:
        model.train(was_training)
