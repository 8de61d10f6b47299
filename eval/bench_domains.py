"""28 LoRAs of rank 8 under one gate beside one LoRA of rank 224, one of rank 8, and PEFT's X-LoRA of the same 28.

    python eval/bench_domains.py            # ten minutes on one core
    python eval/bench_domains.py --quick    # fewer rounds

Writes `eval/results/domains.md` and `.json`. One process, the contenders in turn within each round, process CPU time; a ratio
is the median over rounds of the ratio within one round. "step" is forward and backward of one frozen layer with the adapter,
or, for the model, with AdamW; "decode" is one token without gradient, or, for the model, generating 16 tokens after a prompt
of 64: with a KV cache for all but X-LoRA, which has none. A layer decodes as within one generation. On a layer X-LoRA is given its gates for nothing: neither its
classifier nor the first of its two passes through the model is charged there.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any


ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
    "HF_HUB_OFFLINE": "1",
}
if __name__ == "__main__" and any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})  # read at start only

import speed_contenders  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, PeftConfig, get_peft_model, inject_adapter_in_model  # noqa: E402
from speed_contenders import trained, xlora_layer  # noqa: E402
from speed_report import describe_machine  # noqa: E402
from speed_shared import (  # noqa: E402
    DTYPES,
    LINEARS,
    Case,
    ModelCase,
    Step,
    layer_step,
    make_base,
    make_llama,
    model_step,
    repeats_of,
    seconds,
)
from torch import nn  # noqa: E402

from moe_peft import DomainMoeConfig  # noqa: E402


DOMAINS, R = [f"domain-{number}" for number in range(28)], 8
WIDE, NARROW, XLORA = "PEFT LoRA r=224", "PEFT LoRA r=8", "PEFT X-LoRA 28 × r=8"
LIMITS = {"step": (WIDE, 1.3), "decode": (NARROW, 3.0)}
RESULTS = Path(__file__).resolve().parent / "results"
LAYERS = [
    Case(kind, width, width, rows, length, dtype)
    for dtype in ("fp32", "bf16")
    for width in (1024, 4096)
    for kind, rows, length in (("train", 1, 512), ("decode", 1, 1))
]
MODEL = ModelCase("fp32", layers=4, width=256, inner=704, vocabulary=1024, rows=2, length=256)


def configs(targets: list[str]) -> dict[str, PeftConfig]:
    ours = {"domains": DOMAINS, "r": R, "target_modules": targets, "init_weights": False}
    lora = {"lora_alpha": 16, "target_modules": targets, "init_lora_weights": False}
    return {
        WIDE: LoraConfig(r=len(DOMAINS) * R, **lora),
        NARROW: LoraConfig(r=R, **lora),
        "ours, top 2, frozen experts": DomainMoeConfig(top_k=2, train_domains=[], **ours),
        "ours, top 2, all trained": DomainMoeConfig(top_k=2, **ours),
        "ours, top 8, all trained": DomainMoeConfig(top_k=8, **ours),
        "ours, all 28, all trained": DomainMoeConfig(routing="softmax", **ours),
    }


def layer_contenders(case: Case) -> dict[str, Step]:
    base, steps = make_base(case), {}
    for name, config in configs(["q_proj"]).items():
        holder = nn.Module()
        holder.q_proj = base
        layer = inject_adapter_in_model(config, holder).q_proj.to(DTYPES[case.dtype])
        if case.kind == "decode" and hasattr(layer, "context"):
            layer.context.kept = {}  # as within `generate`
        steps[name] = layer_step(case, layer.train(case.kind == "train"), trained(layer, DTYPES[case.dtype]))
    steps[XLORA] = xlora_layer(case, base)
    return steps


def xlora_model() -> Any:
    """PEFT's `XLoraModel` as it is, over 28 saved LoRAs."""
    from peft import XLoraConfig

    with tempfile.TemporaryDirectory() as folder:
        config = LoraConfig(r=R, lora_alpha=16, target_modules=LINEARS, init_lora_weights=False)
        expert = get_peft_model(make_llama(MODEL), config)
        paths = {str(number): str(Path(folder) / str(number)) for number in range(len(DOMAINS))}
        for path in paths.values():
            expert.save_pretrained(path)
        settings = XLoraConfig(task_type="CAUSAL_LM", hidden_size=MODEL.width, adapters=paths, xlora_depth=1)
        model = get_peft_model(make_llama(MODEL), settings)
    model.base_model.lora_model.enable_adapter_layers()
    return model


def model_contenders(kind: str) -> dict[str, Step]:
    models = {name: get_peft_model(make_llama(MODEL), config) for name, config in configs(LINEARS).items()}
    models[XLORA] = xlora_model()
    if kind == "step":
        return {n: model_step(MODEL, m, [p for p in m.parameters() if p.requires_grad]) for n, m in models.items()}
    ids = torch.randint(1, MODEL.vocabulary, (1, 64))

    def decoding(model: Any, use_cache: bool) -> Step:
        model.eval()
        settings = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
        return lambda: model.generate(input_ids=ids, use_cache=use_cache, **settings)

    return {name: decoding(model, name != XLORA) for name, model in models.items()}


def measured(steps: dict[str, Step], repeats: int, rounds: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            spent = seconds(step, "cpu", repeats)
            if turn:
                taken[name].append(spent)
    return taken


def row(taken: dict[str, list[float]], reference: str) -> dict[str, float]:
    of = taken[reference]
    return {name: statistics.median(a / b for a, b in zip(spent, of, strict=True)) for name, spent in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    speed_contenders.RANK, speed_contenders.EXPERTS = R, len(DOMAINS)
    rounds, rows = (3 if arguments.quick else 7), {}
    for case in LAYERS:
        kind = "step" if case.kind == "train" else "decode"
        taken = measured(layer_contenders(case), 1 if kind == "step" else repeats_of(case), rounds)
        rows[str(case)] = {"kind": kind, **row(taken, LIMITS[kind][0])}
        print(case, {name: round(v, 2) for name, v in rows[str(case)].items() if name != "kind"}, flush=True)
    for kind in LIMITS:
        taken = measured(model_contenders(kind), 1, 3 if arguments.quick else 5)
        rows[f"{kind}, {MODEL}"] = {"kind": kind, **row(taken, LIMITS[kind][0])}
        print(kind, MODEL, {n: round(v, 2) for n, v in rows[f"{kind}, {MODEL}"].items() if n != "kind"}, flush=True)
    text = written(rows)
    (RESULTS / "domains.md").write_text(text)
    (RESULTS / "domains.json").write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
    print(text)


def written(rows: dict[str, dict[str, Any]]) -> str:
    parts = ["# 28 LoRAs of rank 8 under one gate"]
    for kind, (reference, limit) in LIMITS.items():
        chosen = {name: row for name, row in rows.items() if row["kind"] == kind}
        names = [name for name in next(iter(chosen.values())) if name != "kind"]
        parts.append(f"## {kind.capitalize()}, time over {reference} (asked of ours: at most {limit})")
        lines = ["| contender | " + " | ".join(chosen) + " |", "|" + "---|" * (len(chosen) + 1)]
        for name in names:
            missed = [
                " **missed**" if name.startswith("ours") and row[name] > limit else "" for row in chosen.values()
            ]
            cells = [f"{row[name]:.2f}{mark}" for row, mark in zip(chosen.values(), missed, strict=True)]
            lines.append("| " + " | ".join((name, *cells)) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join((*parts, f"Made by `python {' '.join(['eval/bench_domains.py', *sys.argv[1:]])}`.")) + "\n"


if __name__ == "__main__":
    main()
