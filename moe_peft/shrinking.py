"""A shrunk adapter beside the one that it was made from: both on one model, compared on the same text, saved by itself.

The routed adapter is loaded a second time under a name of its own, and that copy is changed (`pruning`, `regrouping`),
so that base, routed and shrunk model answer the same batches without a weight being loaded twice.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

from moe_peft.agreement import Agreement, _log_probs
from moe_peft.config import FfnMoeConfig
from moe_peft.merge import Batch, Experts, hidden_and_features, observing, on_device, routed_layers
from moe_peft.saving import begin, put_in_place


ROUTED, SHRUNK = "default", "shrunk"
"""Names of the two adapters on the model."""


@contextmanager
def active(model: PeftModel, adapter_name: str) -> Iterator[None]:
    """The adapter alone is active; afterwards what was before."""
    before = model.active_adapter
    model.set_adapter(adapter_name)
    try:
        yield
    finally:
        model.set_adapter(before)


@torch.no_grad()
def measure_shrunk(
    model: PeftModel, held_out: Iterable[Batch], routed: str = ROUTED, shrunk: str = SHRUNK
) -> Agreement:
    """What the shrunk adapter costs: the table of a merge, with the shrunk model in the merged one's place; without errors
    by layer for FFN mixtures, whose experts are no sum on a layer.

    Args:
        model: with both adapters.
        held_out: batches for `model(**batch)`, with `labels` (-100 where no loss is wanted) or at least `input_ids`.

    Raises:
        ValueError: if no token can be compared, or one of the adapters is not there.
    """
    layers, smaller = routed_layers(model, routed), routed_layers(model, shrunk)
    if isinstance(model.peft_config[routed], FfnMoeConfig):
        return measure_adapters(model, held_out, routed, shrunk)
    error = {name: torch.zeros(2, dtype=torch.float64) for name in layers}
    context = next(iter(layers.values())).context

    def see(name: str, experts: Experts, x: Tensor, y: Tensor, gates: Tensor, real: Tensor | None) -> None:
        other = smaller[name].experts(shrunk)
        theirs, flat = other.gates(x, context), x.reshape(-1, x.shape[-1])
        if real is not None:
            flat, gates, theirs = flat[real], gates[real], theirs[real]
        whole = added(experts, flat, gates)
        error[name] += torch.stack([(added(other, flat, theirs) - whole).square().sum(), whole.square().sum()]).cpu()

    with observing(model, layers, routed, see):
        found = measure_adapters(model, held_out, routed, shrunk)
    return found._replace(layer_error={n: float((e[0] / e[1].clamp(min=1e-30)).sqrt()) for n, e in error.items()})


@torch.no_grad()
def measure_adapters(model: PeftModel, held_out: Iterable[Batch], before: str, after: str) -> Agreement:
    """Base, adapter `before` and adapter `after` (as "routed" and "merged") on the same text; no error by layer.

    Raises:
        ValueError: if no token can be compared.
    """
    sums, tokens = torch.zeros(7, dtype=torch.float64), 0
    for batch in (on_device(batch, model) for batch in held_out):
        with active(model, before):
            first, labels = _log_probs(model, batch)
            with model.disable_adapter():
                base, _ = _log_probs(model, batch)
        with active(model, after):
            second, _ = _log_probs(model, batch)
        losses = [F.nll_loss(p, labels, reduction="sum") for p in (base, first, second)]
        kl = [(first.exp() * (first - p)).sum() for p in (base, second)]
        top1 = [(p.argmax(-1) == first.argmax(-1)).sum() for p in (base, second)]
        sums += torch.stack([v.double().cpu() for v in (*losses, *kl, *top1)])
        tokens += labels.numel()
    if not tokens:
        raise ValueError("The held-out text holds no token with a label. Give rows with an answer.")
    return Agreement(*(sums / tokens).tolist(), layer_error={}, tokens=tokens)


def added(experts: Experts, x: Tensor, gates: Tensor) -> Tensor:
    """What the experts with low-rank weights add for tokens `x [T, d_in]` under `gates [T, E + S]`: `[T, d_out]`."""
    hidden, _ = hidden_and_features(experts, x)
    return (hidden * gates.repeat_interleave(experts.r, dim=1)) @ experts.stacked()[1].to(hidden.dtype)


def save_alone(
    model: PeftModel, adapter_name: str, folder: Path, also: dict[str, str], tokenizer: object = None
) -> None:
    """Write one of the model's adapters as if it were the only one, in one step.

    Args:
        folder: gets what PEFT writes for the adapter "default".
        also: further files, name -> text.
        tokenizer: saved beside it, if given.
    """
    beside = begin(folder)
    model.save_pretrained(str(beside), selected_adapters=[adapter_name])
    within = beside / adapter_name  # where PEFT puts all but "default"
    if within.is_dir():
        for path in within.iterdir():
            path.replace(beside / path.name)
        shutil.rmtree(within)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(beside))
    for name, text in also.items():
        (beside / name).write_text(text, encoding="utf-8")
    put_in_place(beside, folder)
