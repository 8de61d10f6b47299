"""Allocations of experts against each other: MoLA's patterns and `moe_peft.allocate`, at equal trainable parameters.

    nice python eval/allocation.py                 # four allocations, two suites, eight seeds: some forty minutes on one core
    python eval/allocation.py --seeds 3
    python eval/allocation.py --report             # trains nothing: table and plot of the trials on disk

MoLA as on the yardstick (rank 3, no dropout, NF4 pocket backbone of four layers, 300 steps), with twenty experts dealt out
to the layers as 2:4:6:8, 8:6:4:2, 5:5:5:5, or as measured on 512 of the run's own training rows before it starts. The
learning rate is the one that the yardstick's sweep found best for 2:4:6:8, the same for all. Seeds are paired: the same
rows in the same order. Each trial is appended as it ends, so that an interrupted run goes on where it stopped.
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

from yardstick import DIFFICULTY, METHODS, config_for  # noqa: E402
from yardstick_report import paired_p_value, versions  # noqa: E402


RESULTS = Path(__file__).parent / "results" / "allocation"
PATTERNS = ("2:4:6:8", "8:6:4:2", "5:5:5:5")
MEASURED = "measured"
RATES = {"fact8tag": 4.5e-3, "opconf8tag": 6.75e-3}
BUDGET, STEPS, CALIBRATION_ROWS, CALIBRATION_BATCH = 190_000, 300, 512, 16


def allocation_for(suite: Any, config: Any) -> tuple[Any, dict[str, Any]]:
    """The config with the experts that are measured on the suite's training rows, and what was measured."""
    from moe_peft import allocate
    from moe_peft.loaded import collate
    from moe_peft.trial import load_pocket, tokenized

    model, tokenizer = load_pocket()
    rows = tokenized(suite.train[:CALIBRATION_ROWS], tokenizer)
    encoded = [(row["input_ids"], row["labels"]) for row in rows]
    size = CALIBRATION_BATCH
    batches = [collate(encoded[i : i + size], tokenizer.pad_token_id) for i in range(0, len(encoded), size)]
    start = time.process_time()
    found = allocate(model, batches, config)
    gains = {layer.number: [row[0] for row in layer.gain] for layer in found.layers}
    return found.config, {"gain": gains, "measuring_seconds": time.process_time() - start}


def run_one(suite_name: str, allocation: str, seed: int) -> dict[str, Any]:
    """One trial, with its allocation as a list."""
    from dataclasses import replace

    from moe_peft.pocket import make_suite
    from moe_peft.trial import TrialSettings, run_trial

    suite = make_suite(suite_name, seed, **DIFFICULTY[suite_name])
    config, measured = config_for(METHODS["mola"], BUDGET), {}
    if allocation == MEASURED:
        config, measured = allocation_for(suite, config)
    else:
        config = replace(config, num_experts=allocation)
    settings = TrialSettings(learning_rate=RATES[suite_name], steps=STEPS, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        result = run_trial(suite, config, settings, Path(folder))
    plain = {"suite": suite_name, "allocation": allocation, "seed": seed, "num_experts": config.num_experts}
    return {**plain, "rank": config.r, **measured, **result._asdict()}


def summarise(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per suite and allocation over the seeds that every allocation of the suite has; tests against the measured one."""
    rows = []
    for suite in RATES:
        by = {name: {t["seed"]: t for t in trials if (t["suite"], t["allocation"]) == (suite, name)} for name in NAMES}
        seeds = sorted(set.intersection(*(set(of) for of in by.values())))
        for name in NAMES if seeds else ():
            chosen, ours = ([by[which][seed] for seed in seeds] for which in (name, MEASURED))
            scores, kept = ([t[what] for t in chosen] for what in ("score", "knowledge"))
            rows.append(
                {
                    "suite": suite,
                    "allocation": name,
                    "trainable": sorted({t["trainable"] for t in chosen}),
                    "rate": RATES[suite],
                    "seeds": seeds,
                    "mean": statistics.mean(scores),
                    "sd": statistics.stdev(scores) if len(scores) > 1 else 0.0,
                    "worst": min(scores),
                    "scores": scores,
                    "knowledge": statistics.mean(kept),
                    "loss": statistics.mean(t["losses"][-1] for t in chosen),
                    "num_experts": [t["num_experts"] for t in chosen],
                    "seconds": statistics.median(t["seconds"] for t in chosen),
                    "p": None if name == MEASURED else paired_p_value([t["score"] for t in ours], scores),
                }
            )
    return rows


NAMES = (*PATTERNS, MEASURED)


def table(rows: list[dict[str, Any]]) -> str:
    """The summary as Markdown."""
    lines = [
        "| suite | experts by layer | parameters | rate | exact match | worst seed | p: measured against it | facts kept | "
        "last training loss | every seed |",
        "|" + "---|" * 10,
    ]
    for r in rows:
        p = "–" if r["p"] is None else f"{r['p']:.3f}"
        seeds = " ".join(f"{score:.2f}" for score in r["scores"])
        lines.append(
            f"| {r['suite']} | {r['allocation']} | {', '.join(f'{n:,}' for n in r['trainable'])} | {r['rate']:g} | "
            f"{r['mean']:.3f} ± {r['sd']:.3f} | {r['worst']:.2f} | {p} | {r['knowledge']:.2f} | {r['loss']:.3f} | {seeds} |"
        )
    least = min(len(r["seeds"]) for r in rows)
    lines += [
        "",
        f"Means over {least} paired seeds or more, where no p can fall below {2 / 2**least:.2g}: differences here are hints. The "
        "rate was swept for 2:4:6:8 alone.",
    ]
    lines += ["", "What was measured, seed by seed:", "", "| suite | experts by layer |", "|---|---|"]
    for r in rows:
        if r["allocation"] == MEASURED:
            shown = ", ".join(
                f"{seed}: {':'.join(map(str, n))}" for seed, n in zip(r["seeds"], r["num_experts"], strict=True)
            )
            lines.append(f"| {r['suite']} | {shown} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Every seed as a dot, joined over the allocations, and the mean as a bar."""
    from moe_peft.pictures import pyplot

    plt = pyplot()

    suites = list(dict.fromkeys(row["suite"] for row in rows))
    figure, axes = plt.subplots(1, len(suites), figsize=(1 + 5 * len(suites), 4.5), squeeze=False, sharey=True)
    for axis, suite in zip(axes[0], suites, strict=True):
        chosen = [row for row in rows if row["suite"] == suite]
        colors = ["#d95f02" if row["allocation"] == MEASURED else "#9ecae1" for row in chosen]
        axis.bar(range(len(chosen)), [row["mean"] for row in chosen], width=0.6, color=colors, alpha=0.6)
        for scores in zip(*(row["scores"] for row in chosen), strict=True):
            axis.plot(range(len(chosen)), scores, "o-", color="black", markersize=4, linewidth=0.6, alpha=0.6)
        axis.set_xticks(range(len(chosen)), [row["allocation"] for row in chosen])
        axis.set_title(f"{suite}, {len(chosen[0]['seeds'])} paired seeds")
        axis.set_ylim(0, 1.02)
    axes[0][0].set_ylabel("exact match: each seed (dots, joined), mean (bar)")
    figure.suptitle("Twenty experts of rank 3, dealt out to four layers; equal parameters and rate")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=10, help="as on the yardstick")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="train nothing; report what is on disk")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "trials.jsonl"
    trials = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not arguments.report:
        import torch
        import transformers

        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        done = {(t["suite"], t["allocation"], t["seed"]) for t in trials}
        # Seed after seed, so that an interrupted run has whole pairs.
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            for job in ((suite, name, seed) for suite in RATES for name in NAMES):
                if job not in done:
                    trials.append(run_one(*job))
                    print(*job, trials[-1]["num_experts"], round(trials[-1]["score"], 3), flush=True)
                    with path.open("a") as file:
                        file.write(json.dumps(trials[-1]) + "\n")
    rows = summarise(trials)
    if not rows:
        raise SystemExit(f"{path} holds no seed with all of {', '.join(NAMES)}; run without --report first.")
    settings = {"budget": BUDGET, "steps": STEPS, "calibration_rows": CALIBRATION_ROWS, "difficulty": DIFFICULTY}
    record = {"versions": versions(), "settings": settings, "rows": rows}
    (arguments.output / "summary.json").write_text(json.dumps(record, indent=1))
    (arguments.output / "summary.md").write_text(table(rows))
    plot(rows, arguments.output / "summary.png")
    print(table(rows))


if __name__ == "__main__":
    main()
