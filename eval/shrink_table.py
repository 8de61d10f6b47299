"""What each way of shrinking loses: half of the experts of LoRAMoE-, MoLA-, DeepSeekMoE- and MixLoRA-shaped adapters.

    python eval/shrink_table.py                     # four adapters, three seeds; under an hour on one core
    python eval/shrink_table.py --adapters mixlora --seeds 1
    python eval/shrink_table.py --report            # trains nothing: the table of what is on disk

Each adapter is trained as in `eval/merge_table.py`: suite fact8tag, NF4 backbone, equal budget, the learning rate of its
sweep; MixLoRA with 8 experts here, at the best of three rates on another seed. Then each layer is left with half of its
experts, two at least. Experts are scored or grouped on three quarters of 768 training rows; KL is measured on the other
quarter, exact match on the suite's test rows. "recovered" is after 100 steps of `moe-peft shrink --recover` on the first
three quarters, at a third of the learning rate of training. Each result is appended to a file as it ends, so that an
interrupted run goes on where it stopped.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

from merge_table import BATCH, BUDGET, DIFFICULTY, METHODS, ROWS, STEPS, SUITE, Trials, trained  # noqa: E402


RESULTS = Path(__file__).parent / "results" / "shrink"
ADAPTERS = {  # the yardstick's own settings and the rate of its sweep
    "loramoe": (METHODS["loramoe"], 0.0045),
    "mola": (METHODS["mola"], 0.00675),
    "deepseek-moe": (METHODS["deepseek-moe"], 0.003),
    "mixlora": (METHODS["mixlora"]._replace(overrides={**METHODS["mixlora"].overrides, "num_experts": 8}), 0.00675),
}
WAYS: dict[str, tuple[str, dict[str, str]]] = {
    "prune by usage": ("prune", {"by": "usage"}),
    "prune by EASY-EP": ("prune", {"by": "easy_ep"}),
    "group by router": ("group", {"similarity": "router", "merge": "usage"}),
    "group by outputs": ("group", {"similarity": "outputs", "merge": "usage"}),
    "group by router, lstsq": ("group", {"similarity": "router", "merge": "lstsq"}),
}
"""Row of the table -> what `moe-peft shrink` would be told."""
RECOVERY = 100


def run_adapter(name: str, seed: int, ways: list[str], trials: Trials) -> None:
    """Train one adapter, and shrink it in each of the ways."""
    method, rate = ADAPTERS[name]
    adapted, tokenizer, _, text = trained(method, rate, seed)
    from moe_peft.loaded import batches_from
    from moe_peft.pocket.score import exact_match
    from moe_peft.recovering import recover
    from moe_peft.shrinking import SHRUNK, active, measure_shrunk

    batches = {part: batches_from(list(rows), tokenizer, BATCH) for part, rows in text.items()}

    def score(adapter_name: str) -> float:
        with active(adapted, adapter_name):
            return statistics.mean(exact_match(adapted, tokenizer, text["scored"]))

    routed = score("default")
    for way in ways:
        start = time.process_time()
        counts = shrunk(adapted, way, batches["calibration"])
        seconds = time.process_time() - start
        measured = measure_shrunk(adapted, batches["held_out"])
        found = {"shrunk": {"kl": measured.kl_merged, "top1": measured.top1_merged, "score": score(SHRUNK)}}
        recover(adapted, batches["calibration"], RECOVERY, rate / 3)
        measured = measure_shrunk(adapted, batches["held_out"])
        found["recovered"] = {"kl": measured.kl_merged, "top1": measured.top1_merged, "score": score(SHRUNK)}
        adapted.delete_adapter(SHRUNK)
        adapted.set_adapter("default")
        trials.keep({
            "adapter": name, "seed": seed, "way": way, "seconds": round(seconds, 1), "routed": routed, "parameters": counts,
            "base": measured.kl_base, **found,
        })  # fmt: skip
        print(f"{name}, seed {seed}, {way}: {routed:.3f} -> {found}", flush=True)


def shrunk(adapted: Any, way: str, calibration: list[Any]) -> dict[str, int]:
    """The adapter a second time, with half of its experts; how many numbers each of the two holds."""
    from moe_peft import group_experts, prune_experts
    from moe_peft.pruning import expert_scores
    from moe_peft.resizing import resizable_layers
    from moe_peft.shrinking import ROUTED, SHRUNK, active
    from moe_peft.tuners.base import layer_place

    method, words = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder, selected_adapters=[ROUTED])
        adapted.load_adapter(folder, SHRUNK)
    half: dict[int, int] = {}
    for module, layer in resizable_layers(adapted, SHRUNK, "Shrinking").items():
        place, number = layer_place(module), layer.num_experts[SHRUNK]
        assert place is not None
        half[place[1]] = min(number, max(2, number // 2))
    with active(adapted, SHRUNK):
        if method == "prune":
            scores = expert_scores(adapted, calibration, words["by"], SHRUNK)
            prune_experts(adapted, half, scores=scores, adapter_name=SHRUNK)
        else:
            group_experts(adapted, calibration, half, **words, adapter_name=SHRUNK)
    return {
        name: sum(p.numel() for key, p in adapted.named_parameters() if f".{name}." in key)
        for name in (ROUTED, SHRUNK)
    }


def summarise(trials: Trials) -> list[dict[str, Any]]:
    """A row for each adapter and way, over its seeds."""
    rows = []
    for adapter in ADAPTERS:
        for way in WAYS:
            own = [t for t in trials.done.values() if (t["adapter"], t["way"]) == (adapter, way)]
            if not own:
                continue
            row: dict[str, Any] = {"adapter": adapter, "way": way, "seeds": sorted(t["seed"] for t in own)}
            row["share"] = own[0]["parameters"]["shrunk"] / own[0]["parameters"]["default"]
            row["routed"] = _spread([t["routed"] for t in own])
            for state in ("shrunk", "recovered"):
                for figure in ("kl", "score"):
                    row[f"{state} {figure}"] = _spread([t[state][figure] for t in own])
            rows.append(row)
    return rows


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "min": min(values), "max": max(values)}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, a mean and the range over the seeds in each cell."""
    figures = ("routed", "shrunk score", "shrunk kl", "recovered score", "recovered kl")
    lines = [
        "| adapter | way | parameters left | exact match before | after | KL, nats | recovered | KL, nats | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = ["{mean:.3f} ({min:.3f} to {max:.3f})".format(**row[figure]) for figure in figures]
        ends = f"{row['share']:.0%}", str(len(row["seeds"]))
        lines.append("| " + " | ".join([row["adapter"], row["way"], ends[0], *cells, ends[1]]) + " |")
    return "\n".join(lines)


def write(rows: list[dict[str, Any]], output: Path) -> None:
    settings = {"suite": SUITE, "difficulty": DIFFICULTY[SUITE], "budget": BUDGET, "steps": STEPS, "rows": ROWS}
    for name, text in (
        ("summary.json", json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n"),
        (
            "summary.md",
            f"# What each way of shrinking loses\n\n{__doc__.split(chr(10) * 2, 2)[2]}\n{markdown(rows)}\n",
        ),
    ):
        temporary = output / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, output / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=list(ADAPTERS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="train nothing; report what is on disk")
    arguments = parser.parse_args()
    trials = Trials(arguments.output / "trials.jsonl")
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for name in [] if arguments.report else arguments.adapters:
            ways = [way for way in arguments.ways if (name, seed, way) not in trials.done]
            if ways:
                run_adapter(name, seed, ways, trials)
                write(summarise(trials), arguments.output)
    rows = summarise(trials)
    if not rows:
        raise SystemExit(f"{trials.path} holds no shrunk adapters; run without --report first.")
    write(rows, arguments.output)
    print(markdown(rows))


if __name__ == "__main__":
    main()
