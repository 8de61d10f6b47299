"""Fewer experts after training: those that a calibration text needs least are cut out, tensors and all.

The score is EASY-EP's (arXiv:2504.06792), summed over the tokens t that visit expert e:

    I_e = sum_t g_te |E_e(x_t)|_2 max(0, 1 - cos(h_t, h_t + sum_e g_te E_e(x_t)))

There h is the residual stream around a whole MoE block. Here h is what the routed experts are added to: the output of the
linear layer that the router sits on, or of the frozen FFN block (`block_scores`); shared experts belong to it. What is left is not trained further: the
rule rescales the weights of the remaining experts, and how the model fares is to be measured afterwards.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from moe_peft.block_scores import block_easy_ep, check_own_modules, easy_ep_of_outputs, observing_blocks
from moe_peft.config import FfnMoeConfig
from moe_peft.config_checks import check_flags
from moe_peft.errors import nearest, refuse
from moe_peft.merge import Batch, observing, on_device
from moe_peft.resizing import chosen_layers, reached_no_expert, rebuild, resizable_layers, with_counts
from moe_peft.routing import Routing, dense_weights, routing_dtype
from moe_peft.tuners.base import layer_place
from moe_peft.tuners.ffn_moe import FfnMoeLinear
from moe_peft.tuners.linear_moe import RoutedLora


SCORES = ("easy_ep", "usage")
"""What `expert_scores` can measure: EASY-EP's score, or the summed weight that tokens give an expert."""


class PrunedLayer(NamedTuple):
    """One line of what `prune_experts` does.

    Attributes:
        layer: the name of the module, or of the FFN block.
        kept, dropped: numbers of its experts before pruning, in order.
        share: of the layer's summed score, what the kept ones have; 1.0 where all scores are 0.
    """

    layer: str
    kept: list[int]
    dropped: list[int]
    share: float


def easy_ep_naive(g: Tensor, outputs: Tensor, h: Tensor) -> Tensor:
    """The definition, `[E]`: weights `g [T, E]`, the experts' outputs `[T, E, d]`, h before them `[T, d]`."""
    score = g.new_zeros(g.shape[1])
    for t in range(len(h)):
        after = h[t] + (g[t, :, None] * outputs[t]).sum(0)
        moved = max(0.0, 1 - float(torch.cosine_similarity(h[t], after, dim=0)))
        for e in range(g.shape[1]):
            score[e] += g[t, e] * outputs[t, e].norm() * moved
    return score


def easy_ep(experts: RoutedLora, x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """EASY-EP's score of every routed expert on some tokens, `[E]`; no expert's output is ever formed by itself.

    Args:
        x: `[T, d_in]`, the layer's input.
        y: `[T, d_out]`, its output without this adapter.
        g: `[T, E + S]`, the weights of the routed experts, then those of the shared ones.
    """
    n, dtype = len(experts.lora_B), routing_dtype(x.dtype)
    num_routed = n - experts.num_shared
    A, B = experts.lora_A.to(dtype).expand(n, -1, -1), experts.lora_B.to(dtype)
    hidden = torch.einsum("td,erd->ter", x.to(dtype), A)
    gram = torch.einsum("erd,esd->ers", B, B)  # |B h|^2 = h' (B' B) h
    norms = torch.einsum("ter,ers,tes->te", hidden, gram, hidden).clamp(min=0).sqrt() * experts.scaling
    gated = hidden * g.to(dtype).unsqueeze(-1)
    routed = experts.scaling * gated[:, :num_routed].flatten(1) @ B[:num_routed].flatten(0, 1)
    before = y.to(dtype) + experts.scaling * gated[:, num_routed:].flatten(1) @ B[num_routed:].flatten(0, 1)
    return easy_ep_of_outputs(g[:, :num_routed].to(dtype), norms[:, :num_routed], before, before + routed)


@torch.no_grad()
def expert_scores(
    model: PeftModel, calibration: Iterable[Batch], by: str = "easy_ep", adapter_name: str = "default"
) -> dict[str, Tensor]:
    """How much each expert matters on the calibration text: name of the module, or of the FFN block -> `[E]` in fp64, on
    the CPU.

    Args:
        model: with the adapter active; nothing is changed.
        calibration: batches for `model(**batch)`; EASY-EP takes 25 long samples of the domain that is to be served.
        by: "easy_ep", or "usage" for the summed weight that the tokens give.

    Raises:
        ValueError: another measure; a text that reaches no expert, as when the adapter is not active.
    """
    if by not in SCORES:
        raise refuse("by", by, "one of " + ", ".join(map(repr, SCORES)), nearest(str(by), SCORES))
    layers = resizable_layers(model, adapter_name, "Scoring experts")
    counts = {name: layer.num_experts[adapter_name] for name, layer in layers.items()}
    devices = {name: layer.experts(adapter_name).lora_B.device for name, layer in layers.items()}
    totals = {name: torch.zeros(n, dtype=torch.float64, device=devices[name]) for name, n in counts.items()}
    seen = 0

    def see(name: str, experts: RoutedLora, x: Tensor, y: Tensor, gates: Tensor, real: Tensor | None) -> None:
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        if real is not None:
            x, y, gates = x[real], y[real], gates[real]
        found = easy_ep(experts, x, y, gates) if by == "easy_ep" else gates[:, : counts[name]].sum(0)
        totals[name] += found.to(totals[name])

    def see_block(name: str, layer: FfnMoeLinear, x: Tensor, routing: Routing, real: Tensor | None) -> None:
        if by == "usage":
            gates = dense_weights(routing)[:, : counts[name]]
            totals[name] += (gates if real is None else gates[real]).sum(0).to(totals[name])
            return
        block = model.base_model.model.get_submodule(name)
        totals[name] += block_easy_ep(block, layer, adapter_name, x, routing, real).to(totals[name])

    of_blocks = isinstance(model.peft_config[adapter_name], FfnMoeConfig)
    if of_blocks and by == "easy_ep":
        check_own_modules(layers, "by", by, "Score with `expert_scores(model, text, by='usage')`.")
    watch, called = (observing_blocks, see_block) if of_blocks else (observing, see)
    with watch(model, layers, adapter_name, called):
        for batch in calibration:
            model(**on_device(batch, model))
            seen += 1
    if not seen or any(adapter_name not in layer.active_adapters for layer in layers.values()):
        raise reached_no_expert(adapter_name)
    return {name: total.cpu() for name, total in totals.items()}


def prune_experts(
    model: PeftModel,
    keep: int | dict[int, int],
    calibration: Iterable[Batch] | None = None,
    scores: dict[str, Tensor] | None = None,
    dry_run: bool = False,
    adapter_name: str = "default",
) -> list[PrunedLayer]:
    """Keep the best experts of each layer and cut the others out, in place; the config's `num_experts` follows.

    Each adapted module, or FFN block, ranks its own experts, as each has its own router. Those that stay keep their order, weights and
    router rows bit for bit; shared experts are not touched. Make a new optimizer before training on.

    Args:
        model: with a LINEAR_MOE or FFN_MOE adapter.
        keep: how many experts stay, in every layer or by layer number; layers that are not named stay whole.
        calibration: text to score the experts on (`expert_scores`); give it or `scores`.
        scores: module name -> `[E]`, higher is better.
        dry_run: return the table and change nothing.

    Returns:
        a line for each module that loses experts.

    Raises:
        ValueError: fewer experts than `top_k`, more than there are, no text and no scores, another adapter type.
        RuntimeError: while a trainer runs on the model.
    """
    if (calibration is None) == (scores is None):
        raise ValueError("`prune_experts` takes `calibration` (batches of text) or `scores`, and exactly one of them.")
    check_flags(dry_run=dry_run)
    layers = resizable_layers(model, adapter_name, "Pruning experts")
    counts = {name: layer.num_experts[adapter_name] for name, layer in layers.items()}
    wanted = _wanted(model, keep, counts, adapter_name)
    config = with_counts(model, model.peft_config[adapter_name], wanted)
    if scores is None:
        assert calibration is not None
        scores = expert_scores(model, calibration, adapter_name=adapter_name)
    _check_scores(scores, counts)
    table = [_line(name, scores[name], wanted[name]) for name in layers if wanted[name] < counts[name]]
    if not dry_run:
        model.peft_config[adapter_name].num_experts = config.num_experts
        for line in table:
            rebuild(layers[line.layer], adapter_name, config, line.kept)
    return table


def _wanted(model: PeftModel, keep: int | dict[int, int], counts: dict[str, int], adapter_name: str) -> dict[str, int]:
    """Experts that each module keeps."""
    chosen = chosen_layers(model, counts, keep if isinstance(keep, dict) else None, "keep")
    config, wanted = model.peft_config[adapter_name], dict(counts)
    fewest = 1 if config.top_k is None or config.routing == "top_p" else config.top_k
    for name in chosen:
        place = layer_place(name)
        number = keep[place[1]] if isinstance(keep, dict) and place is not None else keep
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise refuse("keep", keep, "a whole number of at least 1, or such numbers by layer", "Half is common.")
        if number < fewest:
            remedy = "A token cannot visit more experts than are left: keep more, or train with a smaller `top_k`."
            raise refuse("keep", keep, f"at least {fewest}, the adapter's `top_k`", remedy)
        if number > counts[name]:
            raise refuse(
                "keep", keep, f"at most {counts[name]}, the experts of {name}", "Name fewer, or that layer not."
            )
        wanted[name] = number
    return wanted


def _check_scores(scores: dict[str, Tensor], counts: dict[str, int]) -> None:
    wrong = [
        f"{name}: {'no score' if name not in scores else list(scores[name].shape)}, for {count} experts"
        for name, count in counts.items()
        if name not in scores or tuple(scores[name].shape) != (count,) or not torch.isfinite(scores[name]).all()
    ]
    if wrong:
        raise ValueError(
            "`scores` must hold one finite number per expert for every module, as `expert_scores` gives them:\n- "
            + "\n- ".join(wrong)
        )


def _line(name: str, score: Tensor, number: int) -> PrunedLayer:
    kept = sorted(score.argsort(descending=True, stable=True)[:number].tolist())
    total = float(score.sum())
    share = float(score[kept].sum()) / total if total else 1.0
    return PrunedLayer(name, kept, [e for e in range(len(score)) if e not in kept], share)
