"""One walk through the layers: fit each in turn on what the merged layers before it let through, and measure as it goes.

Sequential least squares (export.md B.1) with GPTQ's order of work (arXiv:2210.17323): the text's hidden states are kept,
one layer is run on them, fitted, and run again merged. At no time are the sums of two layers held, and of the model only
the layer in hand is needed. Held-out text walks along three times, through the base, the routed and the merged layers, so
that the figures of all three come from the same walk.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_peft.errors import nearest, refuse
from moe_peft.merge import Batch, Factors
from moe_peft.merging.decoder import HEAD_BYTES, Decoder
from moe_peft.merging.layerwise import Stream, fit_layer
from moe_peft.merging.measures import Figures, Sums, labels_of, predicting, real, right_rows, wanted_log_probs


MODELS = ("base", "routed", "merged")
RIDGES = (1e-4, 1e-3, 1e-2)
"""The ridges that are tried, as shares of the mean eigenvalue of a layer's Gram matrix."""


class Fit(NamedTuple):
    """How a layer is fitted, see `fit_layer`."""

    method: str
    alpha: float
    rank: int | None


TOKENS = ("all", "answers")
"""Which tokens a fit counts; padding never does. Prompts are read by later layers and, as keys and values, by the answer:
left out of the fit (LoRAMoE on the pocket backbone) the merge is nearly twice as far from the routed model."""


class Measured(NamedTuple):
    """What a walk found.

    Attributes:
        factors: of every adapted linear.
        figures: of "base", "routed" and "merged" on the held-out text.
        layer_error: decoder layer -> |merged - routed| / |routed - base| of its output on the routed model's states.
        tokens: how many were compared.
        seconds: for each layer.
    """

    factors: dict[str, Factors]
    figures: dict[str, Figures]
    layer_error: dict[str, float]
    tokens: int
    seconds: list[float]


Resident = Callable[[int], AbstractContextManager[None]]
"""Makes one layer's weights be there, for models whose weights are not all in memory; -1 is all but the layers."""


def _everything_is_there(index: int) -> AbstractContextManager[None]:
    return nullcontext()


@torch.no_grad()
def walk(
    decoder: Decoder,
    held_out: Sequence[Batch],
    factors: dict[str, Factors] | None = None,
    calibration: Sequence[Batch] = (),
    fit: Fit | None = None,
    scored: Sequence[Batch] = (),
    resident: Resident = _everything_is_there,
    on_layer: Callable[[int, float], None] | None = None,
    tokens: str = "all",
) -> Measured:
    """Go through the decoder's layers once.

    Args:
        held_out: batches to measure on.
        factors: to measure; or None, to fit them.
        calibration, fit: batches to fit on, and how.
        scored: batches whose answers are counted right or wrong.
        on_layer: called with the number of each layer that is done and the seconds that it took.
        tokens: which of the calibration text count in the fit, "all" or those that predict an "answers" token.

    Raises:
        ValueError: if there is nothing to fit or to measure on.
    """
    if (factors is None) != bool(fit and calibration):
        raise ValueError("Give either factors to measure, or text and how to fit them.")
    if not held_out:
        raise ValueError("There is no held-out text to measure on. Give at least one batch.")
    done: dict[str, Factors] = dict(factors or {})
    with decoder.reading():
        with resident(-1), resident(0):
            decoder.look(held_out[0])
        with resident(-1):
            source = _enter(decoder, calibration, tokens)
            streams = {model: _enter(decoder, [*held_out, *scored]) for model in MODELS}
        errors: dict[str, float] = {}
        seconds: list[float] = []
        for index in range(len(decoder)):
            start = time.monotonic()
            with resident(index):
                if fit is not None:
                    done |= fit_layer(decoder, index, source, *fit)
                own = {name: done[name] for name in decoder.adapted[index]}
                error = _advance(decoder, index, own, streams, len(held_out))
                if decoder.adapted[index]:
                    errors[decoder.layer_name(index)] = error
                if fit is not None and index + 1 < len(decoder):
                    with decoder.without(index, own):
                        _go_on(source, decoder, index)
            seconds.append(time.monotonic() - start)
            if on_layer is not None:
                on_layer(index, seconds[-1])
        with resident(-1):
            figures, compared = _figures(decoder, held_out, scored, streams)
    return Measured(done, figures, errors, compared, seconds)


def needed_memory(decoder: Decoder, calibration: Sequence[Batch], held_out: Sequence[Batch]) -> int:
    """Bytes that a walk with least squares needs beside the weights of one layer, at most.

    They are: the states of all text (four streams, one of which twice while it goes on); a layer's sums, fp32, one Gram for
    each width of input and three where q, k and v, o, gate and up read tensors of one width; two matrices of the widest
    input in fp64 for the solution; and what the sums and the solutions of the linears take that are as wide as the rank.
    """
    base: Any = decoder.model.get_base_model()
    config = base.config
    tokens = [sum(batch["input_ids"].numel() for batch in batches) for batches in (calibration, held_out)]
    largest: int = max(batch["input_ids"].numel() for batch in [*calibration, *held_out])
    item = base.dtype.itemsize
    states = item * config.hidden_size * (tokens[0] + 6 * tokens[1])
    most: int = 0
    for layers in filter(None, decoder.adapted):
        widths = [layer.in_features for layer in layers.values()]
        grams = 4 * sum(min(widths.count(d), 3) * d * d for d in set(widths))
        ranks: int = 0
        for layer in layers.values():
            B: Tensor = layer.experts(decoder.adapter_name).lora_B
            ranks += 4 * B.shape[0] * B.shape[1] * layer.in_features
        solving = 16 * max(widths) ** 2 + 10 * ranks
        passing = 16 * largest * max(widths)  # what one batch takes on its way through a layer, and in fp32
        most = max(most, grams + ranks + solving + passing)
    head = 8 * min(HEAD_BYTES, 4 * config.vocab_size * largest)  # three models' logits, and their log-probabilities
    return states + max(most, head)


def _enter(decoder: Decoder, batches: Sequence[Batch], tokens: str = "answers") -> Stream:
    if tokens not in TOKENS:
        raise refuse("tokens", tokens, "'all' or 'answers'", nearest(tokens, TOKENS))
    entered = [decoder.enter(batch) for batch in batches]
    counted = [
        (predicting(batch) if tokens == "answers" else real(batch)).to(e.hidden.device)
        for batch, e in zip(batches, entered, strict=True)
    ]
    return Stream([e.hidden for e in entered], [e.calls for e in entered], counted)


def _go_on(stream: Stream, decoder: Decoder, index: int) -> None:
    """To the next layer; one batch's states take the place of the others'."""
    for number, hidden in enumerate(stream.outputs(decoder, index)):
        stream.hidden[number] = hidden


def _advance(
    decoder: Decoder, index: int, own: dict[str, Factors], streams: dict[str, Stream], held_out: int
) -> float:
    """All three models to the next layer; the layer's error on the held-out batches, which come first."""
    routed = streams["routed"]
    before = routed.hidden[:held_out]
    squares = torch.zeros(2, dtype=torch.float64)
    _go_on(routed, decoder, index)
    only = Stream(before, routed.calls[:held_out], routed.counted[:held_out])
    with decoder.without(index):
        _go_on(streams["base"], decoder, index)
        base = list(only.outputs(decoder, index))
    with decoder.without(index, own):
        _go_on(streams["merged"], decoder, index)
        for number, merged in enumerate(only.outputs(decoder, index)):
            counted, target = only.counted[number], routed.hidden[number]
            squares += torch.stack([_square(merged - target, counted), _square(target - base[number], counted)])
    return float((squares[0] / squares[1].clamp(min=1e-30)).sqrt()) if squares[0] else 0.0


def _square(x: Tensor, counted: Tensor) -> Tensor:
    return x[counted].double().square().sum().cpu()


def _figures(
    decoder: Decoder, held_out: Sequence[Batch], scored: Sequence[Batch], streams: dict[str, Stream]
) -> tuple[dict[str, Figures], int]:
    sums = {model: Sums() for model in MODELS}
    right: dict[str, list[bool]] = {model: [] for model in MODELS}
    for number, batch in enumerate([*held_out, *scored]):
        labels = labels_of(batch)
        passes = [decoder.logits(batch, streams[model].hidden[number]) for model in MODELS]
        for parts in zip(*passes, strict=True):
            rows = labels[parts[0][0]]
            if number >= len(held_out):
                for model, (_, logits) in zip(MODELS, parts, strict=True):
                    right[model] += right_rows(logits, rows)
                continue
            log_probs = [wanted_log_probs(logits, rows) for _, logits in parts]
            for model, (own, wanted) in zip(MODELS, log_probs, strict=True):
                sums[model].add(own, log_probs[1][0], wanted)
    share = {model: sum(r) / len(r) if r else None for model, r in right.items()}
    return {model: sums[model].figures(share[model]) for model in MODELS}, sums["routed"].tokens


def sequential(
    decoder: Decoder,
    calibration: Sequence[Batch],
    held_out: Sequence[Batch],
    rank: int | None = None,
    ridges: Sequence[float] = RIDGES,
    scored: Sequence[Batch] = (),
    resident: Resident = _everything_is_there,
    on_layer: Callable[[int, float], None] | None = None,
    tokens: str = "all",
) -> tuple[Measured, dict[float, float]]:
    """Sequential least squares with the ridge that loses least on the held-out text.

    Returns:
        the best walk, and the KL from the routed model for every ridge.

    Raises:
        ValueError: if no ridge is given, or a rank below 1.
    """
    if rank is not None and rank < 1:
        raise refuse("rank", rank, "a whole number of at least 1, or None", "None keeps every direction.")
    found: dict[float, float] = {}
    best: Measured | None = None
    for alpha in ridges:
        fit = Fit("ls", alpha, rank)
        one = walk(decoder, held_out, None, calibration, fit, scored, resident, on_layer, tokens)
        found[alpha] = one.figures["merged"].kl
        if best is None or one.figures["merged"].kl < best.figures["merged"].kl:
            best = one
    if best is None:
        raise ValueError("No ridge is given to try.")
    return best, found
