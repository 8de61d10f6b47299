"""What a training step of every linear-site method of the catalogue costs beside PEFT's LoRA of its total rank.

    python eval/speed_catalogue.py            # a quarter of an hour on one core
    python eval/speed_catalogue.py --quick    # two shapes, fewer rounds

Writes `eval/results/speed_catalogue.md` and `.json`. One layer, forward and backward, without the optimiser; process CPU
time, the method and its LoRA in turn, a ratio is the median over rounds. The total rank is that of all experts, shared
ones included: what a token uses is less, but dense products over all experts are what is computed. One frozen layer of
its own carries the whole step; in a model attention, norms and loss are added to both sides.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from bench_process import start_steady


if __name__ == "__main__":
    start_steady()

import torch  # noqa: E402
from peft import LoraConfig, PeftConfig, inject_adapter_in_model  # noqa: E402
from speed_contenders import trained  # noqa: E402
from speed_report import describe_machine  # noqa: E402
from speed_shared import DTYPES, Case, Step, layer_step, make_base, seconds  # noqa: E402
from torch import nn  # noqa: E402

from moe_peft import LinearMoeConfig, from_catalogue  # noqa: E402
from moe_peft.catalogue import methods  # noqa: E402


LIMIT = 1.5
RESULTS = Path(__file__).resolve().parent / "results"
FULL = [
    Case("train", 4096, 4096, 1, 512, "bf16"),
    Case("train", 4096, 4096, 1, 512, "fp32"),
    Case("train", 1024, 1024, 4, 512, "bf16"),
    Case("train", 1024, 1024, 4, 512, "fp32"),
]
QUICK = [Case("train", 1024, 1024, 1, 512, "bf16"), Case("train", 4096, 4096, 1, 128, "bf16")]


def config_of(name: str) -> LinearMoeConfig | None:
    """The entry on one layer, without dropout; None where it is of another type, which has a bench of its own, or where
    one layer alone cannot route."""
    config = from_catalogue(name)
    if not isinstance(config, LinearMoeConfig) or config.router_scope == "model" or config.routing == "given":
        return None  # the last two ask the whole model, which is not here
    changes: dict[str, Any] = {"target_modules": ["q_proj"], "lora_dropout": 0.0, "init_weights": False}
    changes |= {"num_experts": 5} if isinstance(config.num_experts, str) else {}  # MoLA's average
    if config.balance == "localized" or config.expert_groups is not None:
        changes |= {"balance": "none"}  # there are no task types here
    return from_catalogue(name, **changes)


def title(case: Case) -> str:
    return f"{case.dtype} {case.d_in}, {case.rows * case.length} tokens"


def total_rank(config: LinearMoeConfig) -> int:
    assert isinstance(config.num_experts, int)
    assert isinstance(config.r, int)
    return (config.num_experts + config.num_shared_experts) * config.r


def step_of(case: Case, base: nn.Module, config: PeftConfig) -> Step:
    """A training step of the layer with that adapter; every form routes as in the middle of a run."""
    holder = nn.Module()
    holder.q_proj = base
    layer = inject_adapter_in_model(config, holder).q_proj
    return layer_step(case, layer.train(), trained(layer, DTYPES[case.dtype]))


def ratio(case: Case, config: LinearMoeConfig, rounds: int) -> float:
    """The method's time over that of its LoRA, the median over rounds of one of each."""
    base = make_base(case)
    lora = LoraConfig(r=total_rank(config), lora_alpha=16, target_modules=["q_proj"], init_lora_weights=False)
    ours, theirs = step_of(case, base, config), step_of(case, base, lora)
    for step in (ours, theirs):
        step()
    return statistics.median(seconds(ours, "cpu", 2) / seconds(theirs, "cpu", 2) for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--methods", nargs="+", choices=methods(), default=methods())
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases, rounds = (QUICK, 5) if arguments.quick else (FULL, 9)
    rows: dict[str, dict[str, Any]] = {}
    for name in arguments.methods:
        config = config_of(name)
        if config is not None:
            rows[name] = {"total rank": total_rank(config), **{title(c): ratio(c, config, rounds) for c in cases}}
            print(name, {key: round(value, 3) for key, value in rows[name].items()}, flush=True)
    titles = ["method", "total rank", *map(title, cases)]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for name, row in rows.items():
        cells = [f"{row[title(c)]:.2f}" + ("" if row[title(c)] <= LIMIT else " **missed**") for c in cases]
        lines.append("| " + " | ".join((name, str(row["total rank"]), *cells)) + " |")
    text = f"# Training step over PEFT's LoRA of the same total rank (asked: at most {LIMIT})\n\n"
    text += "\n".join(lines) + f"\n\nMade by `python {' '.join(['eval/speed_catalogue.py', *sys.argv[1:]])}`.\n"
    (RESULTS / "speed_catalogue.md").write_text(text)
    (RESULTS / "speed_catalogue.json").write_text(
        json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n"
    )
    print(text)


if __name__ == "__main__":
    main()
