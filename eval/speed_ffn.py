"""The FFN rows of the speed benchmark: the contenders in this process, what they cost at least, the verdicts."""

import statistics

from peft import LoraConfig, PeftConfig, get_peft_model
from speed_shared import (
    DTYPES,
    EXPERTS,
    FFN_LINEARS,
    RANK,
    TOP_K,
    FfnCase,
    Step,
    layer_step,
    make_experts,
    make_inputs,
    make_mlp,
    outcome,
)
from torch import Tensor, nn

from moe_peft import FfnMoeConfig


FROZEN, LORA = "frozen block alone", "PEFT LoRA r=32"
MIXED, MIXED_BALANCED = "ours ffn_moe top-2 of 8", "ours ffn_moe top-2 of 8, balanced"
EFFICIENT, COMPATIBLE = "rival moe-peft mixlora, efficient", "rival moe-peft mixlora, compatible"
MIXLORA = "rival mixlora package"

FFN_TARGETS = [
    ("ffn bf16 4096/14336", 1.5),
    ("ffn bf16 1024/2816", 2.0),
    ("ffn fp32 1024/2816", 1.35),
]
"""Start of a case's name, and the most that our time over that of PEFT's LoRA is to be."""
FASTER = 1.7
"""How many times the rival's step is to take as long as ours, at every shape."""

FFN_ARITHMETIC = [
    "FFN rows: of a block d/f the frozen linears take 2·3df multiply-adds per token in training, LoRA's factors",
    "9·32(d + f). Ours computes A of gate and up and the router, and B of down, for all experts at once, the rest for the",
    "chosen ones: 3((2n + m)d + nd) + 11·32f, as B of gate and up is multiplied a second time in backward, where the hidden",
    "units are computed anew. What a ratio is above that are passes over tensors of width f: in a step ours writes some 50",
    "of size [T, f] in pieces of 512 tokens at most, LoRA 18, the frozen block 8. Of the rival's paths efficient writes 97,",
    "two thirds of them in fp32 whatever the model's dtype, compatible 49 and `mixlora` 73; they multiply the frozen weights",
    "4/3, 2 and 4/3 times as often as ours.",
    "It was first shown to compute the same output and gradients as ours from equal weights. Its time is over ours without",
    "balance, as its own router loss is left out; `arithmetic` is how many times ours it would take if ours took LoRA's",
    "time but for the products.",
]


class Holder(nn.Module):
    """A model that is the block alone."""

    def __init__(self, case: FfnCase) -> None:
        super().__init__()
        self.mlp = make_mlp(case)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class OurBlock(nn.Module):
    """`ffn_moe` on the block, through `get_peft_model`, on its fast path, with the weights that all contenders have.

    Raises:
        RuntimeError: if the block would run on the general path.
    """

    def __init__(self, case: FfnCase, balance: float = 0.0) -> None:
        super().__init__()
        config = FfnMoeConfig(num_experts=EXPERTS, r=RANK, lora_alpha=RANK, top_k=TOP_K, router_aux_loss_coef=balance)
        self.model = adapted(case, config)
        mlp = self.model.base_model.model.mlp
        self.leaves = {name: getattr(mlp, name).ffn_moe_experts["default"] for name in FFN_LINEARS}
        for name, parameter in self.named().items():
            parameter.data.copy_(make_experts(case)[name])
        fast = mlp.gate_proj.block.fast
        if fast is None or fast.applies((make_inputs(case)[0],), {}) is None:
            raise RuntimeError("The block is not on the fast path, which is what this benchmark measures.")

    def named(self) -> dict[str, nn.Parameter]:
        factors = {f"{name}.{key}": getattr(leaf, f"lora_{key}") for name, leaf in self.leaves.items() for key in "AB"}
        return {"router": self.leaves["gate_proj"].router, **factors}

    def gradients(self) -> dict[str, Tensor]:
        return {name: parameter.grad for name, parameter in self.named().items()}

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def adapted(case: FfnCase, config: PeftConfig) -> nn.Module:
    """The block under PEFT, in training, its adapter in the dtype of the model."""
    model = get_peft_model(Holder(case), config, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPES[case.dtype])
    return model.train()


def ffn_contenders(case: FfnCase) -> dict[str, Step]:
    """A step for every contender, all around the same frozen linears."""
    r = TOP_K * RANK
    lora = LoraConfig(r=r, lora_alpha=r, target_modules=FFN_LINEARS, init_lora_weights=False)
    blocks = {
        LORA: adapted(case, lora),
        MIXED: OurBlock(case),
        MIXED_BALANCED: OurBlock(case, balance=0.001),
    }
    steps = {FROZEN: layer_step(case, make_mlp(case), [])}
    for name, block in blocks.items():
        steps[name] = layer_step(case, block, [p for p in block.parameters() if p.requires_grad])
    return steps


def ffn_work(case: FfnCase) -> dict[str, float]:
    """Multiply-adds per token of a training step, as each method's products make them."""
    d, f, n = case.hidden, case.inner, EXPERTS * RANK
    # The static schedule, that of devices other than CPUs, multiplies every expert's rows, zero where not chosen.
    visited = TOP_K * (RANK if case.device == "cpu" else n)
    factors = 3 * ((2 * n + EXPERTS) * d + n * d) + 11 * visited * f
    frozen = 2 * 3 * d * f
    mixed = dict.fromkeys((MIXED, MIXED_BALANCED), frozen + factors)
    return {FROZEN: frozen, LORA: frozen + 9 * TOP_K * RANK * (d + f), **mixed}


def ffn_arithmetic_ratios(case: FfnCase) -> dict[str, float]:
    """What the products alone make of a method's time over LoRA's."""
    work = ffn_work(case)
    return {name: work[name] / work[LORA] for name in (MIXED, MIXED_BALANCED)}


def ffn_roofline_seconds(case: FfnCase, ceiling: dict[str, float]) -> dict[str, float]:
    """The least time of a training step on this machine: the active ranks' arithmetic or the traffic at full speed.

    Counted as if everything were fused, and the outputs of gate and up were kept for backward: the weights are read
    twice; x, y, dy and dx pass once, x a second time; the two kept tensors are written and read; factors are read in
    either pass and their gradients written.
    """
    d, f, size = case.hidden, case.inner, DTYPES[case.dtype].itemsize
    frozen = 3 * d * f
    weight = frozen * (0.53 if case.nf4 else size)  # NF4: 4 bits and a scale for each 64 values
    wide = case.tokens * (5 * d + 2 * 2 * f) * size
    floors = {}
    for name, active, stored in (
        (FROZEN, 0, 0),
        (LORA, TOP_K * RANK, TOP_K * RANK),
        (MIXED, TOP_K * RANK, EXPERTS * RANK),
    ):
        operations = 2 * case.tokens * (2 * frozen + 3 * active * 3 * (d + f))
        traffic = 2 * weight + wide + 3 * stored * 3 * (d + f) * size
        floors[name] = max(operations / ceiling[case.dtype], traffic / ceiling["bytes"])
    return floors


def ffn_verdicts(rows: list[dict]) -> list[str]:
    """Lines for the table of targets."""
    lines = []
    for prefix, limit in FFN_TARGETS:
        for row in rows:
            for name in (MIXED, MIXED_BALANCED):
                if row["name"].startswith(prefix) and name in row["summary"]:
                    ratio = row["summary"][name]["ratio"]
                    verdict = "met" if ratio <= limit else "**missed**"
                    alone = f"{row['arithmetic'][name]:.2f}"
                    lines.append(f"| {name}, {row['name']} | ≤ {limit:.2f} | {ratio:.3f} | {alone} | {verdict} |")
    for row in rows:
        for other in (EFFICIENT, COMPATIBLE, MIXLORA):
            if row["name"].startswith("ffn") and other in row["summary"]:
                faster = times_faster(row["seconds"], MIXED, other)
                alone = row["summary"][other]["ratio"] / row["arithmetic"][MIXED]
                verdict = "met" if faster >= FASTER else "**missed**"
                name = f"{MIXED} over {other}, {row['name']}"
                lines.append(f"| {name} | ≥ {FASTER:.2f} × | {faster:.2f} × | {alone:.2f} × | {verdict} |")
    return lines


def times_faster(taken: dict[str, list[float]], mine: str, other: str) -> float:
    """The median over rounds of their time over mine in the same round."""
    return statistics.median(t / m for t, m in zip(taken[other], taken[mine], strict=True))


def same_function(differences: dict[str, float]) -> str:
    """A sentence for the report."""
    each = ", ".join(f"{name} {gap:.0e}" for name, gap in differences.items())
    return f"Equal weights, fp32, largest difference of output and gradients from ours: {each}."


CHECK = FfnCase(64, 176, 2, 48, "fp32")
"""Small, and in fp32, where rounding hides no difference and moves no token to another expert."""


def our_outcome() -> dict[str, Tensor]:
    """What ours computes for `CHECK`."""
    block = OurBlock(CHECK)
    return outcome(CHECK, block, block.gradients)
