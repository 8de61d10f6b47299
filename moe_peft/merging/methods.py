"""The ways to make a mixture static, by name: each gives factors for every adapted linear and what they lose."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from peft import PeftModel

from moe_peft.errors import nearest, refuse
from moe_peft.merge import Batch
from moe_peft.merging.decoder import Decoder
from moe_peft.merging.measures import predicting, real
from moe_peft.merging.recovery import STEPS, distill, learned_mixing
from moe_peft.merging.walk import Fit, Measured, Resident, sequential, walk


METHODS = ("ls", "usage", "learned", "distill", "ls+distill")
"""Of `moe-peft merge --method`:

ls          sequential least squares, the ridge chosen on held-out text
usage       each expert's mean weight
learned     one learnt weight for each expert of each linear, from usage (XFT)
distill     factors trained towards the routed model, from usage
ls+distill  the same, from ls

Least squares among the experts' own directions, all layers at once (`moe_peft.merge.fit_static`), was measured beside these
and is none of them: it ends twice as far from the routed model as "ls" (`eval/results/merge/summary.md`).
"""


class Progress(NamedTuple):
    """Who is told how far the work is: `on_layer(index, seconds)` and `on_step(step, loss)`."""

    on_layer: Callable[[int, float], None] | None = None
    on_step: Callable[[int, float], None] | None = None


class Merged(NamedTuple):
    """A merge and its figures.

    Attributes:
        measured: factors and figures.
        ridges: ridge -> KL, where several were tried.
        tokens: of the text that it was fitted to.
    """

    measured: Measured
    ridges: dict[float, float]
    tokens: int


def merge_static(
    model: PeftModel,
    calibration: Sequence[Batch],
    held_out: Sequence[Batch],
    method: str = "ls",
    rank: int | None = None,
    scored: Sequence[Batch] = (),
    steps: int = STEPS,
    adapter_name: str = "default",
    tokens: str = "all",
    progress: Progress | None = None,
    resident: Resident | None = None,
) -> Merged:
    """Static factors in the place of a routed adapter, with figures on text that they were not fitted to.

    Args:
        model: with the adapter active; left as it is, 4-bit weights included.
        calibration: batches for `model(**batch)`, with labels on the tokens that were trained on (-100 elsewhere).
        held_out: batches to measure on, and to choose the ridge by.
        method: one of `METHODS`.
        rank: of the factors; None keeps every direction, which for the last linear of an FFN mixture under "ls" is a
            full-rank change.
        scored: batches of prompts and answers, whose answers are counted right or wrong.
        steps: of distillation or learned mixing.
        tokens: which count in the fit, "all" that are real or those that predict an "answers" token. Distillation and all
            figures look at answers alone.
        resident: makes a layer's weights be there, see `walk`; for "ls" and "usage" alone.

    Raises:
        ValueError: an unknown method, a rank below 1, an adapter that is not active or that has weights beside the
            experts', too little text.
    """
    check_settings(method, rank)
    progress = progress or Progress()
    decoder = Decoder(model, adapter_name)
    check_adapter(model, decoder)
    count = sum(int((real(batch) if tokens == "all" else predicting(batch)).sum()) for batch in calibration)
    check_text(decoder, count)
    if resident is not None and method not in ("ls", "usage"):
        raise refuse(
            "method", method, "'ls' or 'usage' where layers are read one by one", "The others need all of the model."
        )
    walked: dict[str, Any] = {"scored": scored, "on_layer": progress.on_layer, "tokens": tokens}
    if resident is not None:
        walked["resident"] = resident
    if method == "ls":
        best, ridges = sequential(decoder, calibration, held_out, rank, **walked)
        return Merged(best, ridges, count)
    if method == "usage":
        return Merged(walk(decoder, held_out, None, calibration, Fit("usage", 0.0, rank), **walked), {}, count)
    ridges = {}
    if method == "ls+distill":
        start, ridges = sequential(decoder, calibration, held_out, rank, on_layer=progress.on_layer, tokens=tokens)
    else:
        fit = Fit("usage", 0.0, rank)
        start = walk(decoder, held_out, None, calibration, fit, on_layer=progress.on_layer, tokens=tokens)
    if method == "learned":
        factors = learned_mixing(model, decoder.usage, calibration, rank, steps, adapter_name, progress.on_step)
    else:
        factors = distill(model, start.factors, calibration, steps, adapter_name, progress.on_step)
    return Merged(walk(decoder, held_out, factors, **walked), ridges, count)


def check_settings(method: str, rank: int | None) -> None:
    """Refuse what is wrong before a model is loaded."""
    if method not in METHODS:
        raise refuse("method", method, "one of " + ", ".join(map(repr, METHODS)), nearest(method, METHODS))
    if rank is not None and rank < 1:
        raise refuse("rank", rank, "a whole number of at least 1, or None", "None keeps every direction.")


def check_adapter(model: PeftModel, decoder: Decoder) -> None:
    """Refuse what static factors could not carry, before anything is computed."""
    layers = [layer for block in decoder.adapted for layer in block.values()]
    name = decoder.adapter_name
    if any(name not in layer.active_adapters for layer in layers):
        raise ValueError(f"Adapter '{name}' is not active. Call `model.set_adapter('{name}')` first.")
    config = model.peft_config[name]
    if getattr(config, "num_constant_experts", 0):
        remedy = "What they add is a bias, which a plain LoRA does not have: serve the adapter routed."
        raise refuse("num_constant_experts", config.num_constant_experts, "0 for a static merge", remedy)
    for field in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, field, None):
            remedy = "The merge would lose the weights that were trained there: serve the adapter routed."
            raise refuse(field, getattr(config, field), "None for a static merge", remedy)


def check_text(decoder: Decoder, tokens: int) -> None:
    """Refuse text with which the fit would be one to single tokens."""
    least = total_rank(decoder)
    if tokens < least:
        raise ValueError(
            f"The calibration text has {tokens} tokens to fit to, fewer than the adapter's {least} directions: the fit "
            "would be to single tokens. Give 128 to 512 rows of the training mix."
        )


def total_rank(decoder: Decoder) -> int:
    """The largest number of directions that the experts of one linear have together."""
    experts = [layer.experts(decoder.adapter_name) for block in decoder.adapted for layer in block.values()]
    return max(e.lora_B.shape[0] * e.lora_B.shape[1] + getattr(e, "num_frozen", 0) for e in experts)
