"""Ranks as experts beside PEFT's LoRA of as many ranks: the layer that `rank_moe` adapts, in training and decoding.

Ours computes every rank for every token, as LoRA does, and the router beside A; so the arithmetic is LoRA's and half
its factors' again, or LoRA's alone where ranks choose themselves.
"""

from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from speed_contenders import BASE, trained
from speed_shared import DTYPES, RankCase, Step, layer_step, make_base
from torch import nn

from moe_peft import RankMoeConfig


RANKS, TOP_K = 64, 8
LORA_64 = "PEFT LoRA r=64"
SMORA, BIASED, MORAM = "ours top-8 of 64 ranks", "ours top-8 of 64 ranks, bias", "ours 64 ranks by themselves"
RANK_LIMIT = 1.25
RANK_ARITHMETIC = [
    "Rows of ranks: ratios are to LoRA of all 64 ranks, of which ours uses 8 for a token. Training at width d takes",
    "2dd + 3·128d multiply-adds per token for LoRA, 3·64d more with a router. With the bias, what was chosen is counted in",
    "backward.",
]


def rank_contenders(case: RankCase) -> dict[str, Step]:
    """A step for every contender, all around one frozen layer."""
    base = make_base(case)
    shared = {"r": RANKS, "top_k": TOP_K, "target_modules": ["q_proj"], "init_weights": False}
    configs: dict[str, PeftConfig] = {
        LORA_64: LoraConfig(r=RANKS, lora_alpha=16, target_modules=["q_proj"], init_lora_weights=False),
        SMORA: RankMoeConfig(balance="none", **shared),
        BIASED: RankMoeConfig(balance="bias", **shared),
        MORAM: RankMoeConfig(routing="self_activated", **shared),
    }
    steps = {BASE: layer_step(case, base, [])}
    for name, config in configs.items():
        holder = nn.Module()
        holder.q_proj = base
        layer = inject_adapter_in_model(config, holder).q_proj
        steps[name] = layer_step(case, layer.train(case.kind == "train"), trained(layer, DTYPES[case.dtype]))
    return steps


def rank_arithmetic_ratios(case: RankCase) -> dict[str, float]:
    """The products' multiply-adds over LoRA's; see `speed_report.arithmetic_ratios`."""
    passes = (1, 1) if case.kind == "decode" else (2, 3)
    d = case.width

    def total(router: int) -> int:
        return passes[0] * d * d + passes[1] * ((RANKS + router) * d + RANKS * d)

    return {name: total(rows) / total(0) for name, rows in ((SMORA, RANKS), (BIASED, RANKS), (MORAM, 0))}


def rank_verdicts(cases: list[dict]) -> list[str]:
    """Rows of the table of targets, for training."""
    lines = []
    for name in (SMORA, BIASED, MORAM):
        for row in cases:
            if row["rows"] == "rank" and row["name"].startswith("ranks train") and name in row["summary"]:
                ratio = row["summary"][name]["ratio"]
                verdict = "met" if ratio <= RANK_LIMIT else "**missed**"
                alone = row["arithmetic"][name]
                lines.append(f"| {name}, {row['name']} | ≤ {RANK_LIMIT:.2f} | {ratio:.3f} | {alone:.2f} | {verdict} |")
    return lines
