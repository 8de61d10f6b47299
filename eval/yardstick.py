"""The offline yardstick: catalogue methods against plain LoRA at equal trainable parameters, on the pocket backbone.

    python eval/yardstick.py                          # the full form, about an hour on two cores
    python eval/yardstick.py --quick                  # two seeds, one suite, no sweep: under five minutes
    python eval/yardstick.py --methods lora molora --suites fact8tag --seeds 10

Every method gets the same backbone (NF4), rows, steps and batch, and a rank solved from its config so that its trainable
parameters come closest to the budget. Its learning rate is swept on seeds of its own, over the same factors around the
same centre for every method; then it runs on the reported seeds, paired: the same seed is the same order of rows. Each
trial is appended to a file as it ends, so that an interrupted run goes on where it stopped. Written at the end: JSON,
a table and a plot, with every seed.

What this cannot show: absolute gains on models of useful size. It shows interference, routing, stability, forgetting.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

RESULTS = Path(__file__).parent / "results" / "yardstick"
RATES = (2e-3, 3e-3, 4.5e-3)
SWEEP_SEEDS = (100, 101)


class Method(NamedTuple):
    """A row of the comparison: a config made from a catalogue name, or plain LoRA, and where it is placed.

    LoRA's scale `lora_alpha / r` is tuned like everything else: 2 is common, 4 turned out better on the FFN.
    """

    name: str
    catalogue: str | None
    target_modules: str | list[str]
    overrides: dict[str, Any] = {}
    lora_scale: float = 2.0


FFN = ["gate_proj", "up_proj", "down_proj"]
METHODS = {
    method.name: method
    for method in (
        Method("lora", None, "all-linear"),
        Method("lora-ffn", None, FFN, lora_scale=4.0),
        Method("molora", "molora", FFN),
        Method("mola", "mola", "all-linear", {"lora_dropout": 0.0}),
        Method("loramoe", "loramoe", FFN, {"lora_dropout": 0.0, "balance": "none"}),
    )
}


def config_for(method: Method, budget: int) -> Any:
    """The method's config with the rank that fits the budget."""
    from transformers import AutoConfig

    from moe_peft import from_catalogue
    from moe_peft.budget import equal_budget_lora, fit_to_budget, meta_backbone
    from moe_peft.pocket import POCKET_DIR

    backbone = meta_backbone(AutoConfig.from_pretrained(POCKET_DIR))
    if method.catalogue is None:
        return equal_budget_lora(backbone, budget, method.target_modules, method.lora_scale)
    config = from_catalogue(method.catalogue, target_modules=method.target_modules, **method.overrides)
    return fit_to_budget(backbone, config, budget)


def run_one(job: dict[str, Any]) -> dict[str, Any]:
    """One trial in a worker process; the job is returned with its result."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    import moe_peft  # noqa: F401  (registers the adapter types)
    from moe_peft.pocket import make_suite
    from moe_peft.trial import TrialSettings, run_trial

    settings = TrialSettings(learning_rate=job["rate"], steps=job["steps"], seed=job["seed"])
    config = config_for(METHODS[job["method"]], job["budget"])
    with tempfile.TemporaryDirectory() as folder:
        result = run_trial(make_suite(job["suite"], job["seed"]), config, settings, Path(folder))
    return {**job, **result._asdict()}


def key(job: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two trials the same one."""
    return tuple(job[name] for name in ("method", "suite", "budget", "steps", "rate", "seed"))


class Trials:
    """The trials done so far, on disk: one JSON object per line, appended as they end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.done = {key(trial): trial for trial in map(json.loads, filter(None, lines))}

    def run(self, jobs: list[dict[str, Any]], workers: int) -> list[dict[str, Any]]:
        """The results of all jobs, running those that are not on disk yet."""
        missing = [job for job in jobs if key(job) not in self.done]
        if missing:
            from rich.progress import Progress

            with Progress() as progress, ProcessPoolExecutor(workers) as pool:
                task = progress.add_task("trials", total=len(missing))
                for future in as_completed([pool.submit(run_one, job) for job in missing]):
                    self._keep(future.result())
                    progress.advance(task)
        return [self.done[key(job)] for job in jobs]

    def _keep(self, trial: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(trial) + "\n")
        self.done[key(trial)] = trial


def best_rate(trials: Trials, method: str, suite: str, arguments: argparse.Namespace) -> float:
    """The learning rate with the best mean score on the sweep's own seeds."""
    jobs = [job(method, suite, rate, seed, arguments) for rate in RATES for seed in SWEEP_SEEDS]
    scores: dict[float, list[float]] = {}
    for trial in trials.run(jobs, arguments.workers):
        scores.setdefault(trial["rate"], []).append(trial["score"])
    return max(scores, key=lambda rate: statistics.mean(scores[rate]))


def job(method: str, suite: str, rate: float, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """A trial to run, as plain data."""
    return {
        "method": method,
        "suite": suite,
        "rate": rate,
        "seed": seed,
        "budget": arguments.budget,
        "steps": arguments.steps,
    }


def paired_p_value(ours: list[float], theirs: list[float]) -> float:
    """Two-sided sign-flip permutation test of the mean paired difference (exact for up to about 13 seeds)."""
    from scipy.stats import permutation_test

    if all(math.isclose(a, b) for a, b in zip(ours, theirs, strict=True)):
        return 1.0
    outcome = permutation_test(
        (ours, theirs), lambda a, b, axis: (a - b).mean(axis=axis), permutation_type="samples", vectorized=True
    )
    return float(outcome.pvalue)


def summarise(suite: str, runs: dict[str, list[dict[str, Any]]], rates: dict[str, float]) -> list[dict[str, Any]]:
    """One row per method: mean, spread, every seed, knowledge, and the paired test against each LoRA."""
    rows = []
    for method, trials in runs.items():
        scores = [trial["score"] for trial in trials]
        row: dict[str, Any] = {
            "suite": suite,
            "method": method,
            "rate": rates[method],
            "trainable": trials[0]["trainable"],
            "mean": statistics.mean(scores),
            "sd": statistics.stdev(scores) if len(scores) > 1 else 0.0,
            "worst": min(scores),
            "scores": scores,
            "knowledge": statistics.mean(trial["knowledge"] for trial in trials),
            "seconds": statistics.median(trial["seconds"] for trial in trials),
        }
        for baseline in ("lora", "lora-ffn"):
            if baseline in runs and method != baseline:
                for what in ("score", "knowledge"):
                    ours, theirs = ([trial[what] for trial in runs[m]] for m in (method, baseline))
                    row[f"p_{what}_{baseline}"] = paired_p_value(ours, theirs)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The summary as Markdown."""
    lines = [
        "| suite | method | parameters | rate | exact match | worst seed | p: LoRA, LoRA on the FFN | facts kept | p: LoRA, "
        "LoRA on the FFN | s per run | every seed |",
        "|" + "---|" * 11,
    ]
    for r in rows:
        score_p, knowledge_p = (
            ", ".join(f"{r[name]:.3f}" if name in r else "–" for name in (f"p_{what}_lora", f"p_{what}_lora-ffn"))
            for what in ("score", "knowledge")
        )
        seeds = " ".join(f"{score:.2f}" for score in r["scores"])
        lines.append(
            f"| {r['suite']} | {r['method']} | {r['trainable']:,} | {r['rate']:g} | {r['mean']:.3f} ± {r['sd']:.3f} | "
            f"{r['worst']:.2f} | {score_p} | {r['knowledge']:.2f} | {knowledge_p} | {r['seconds']:.0f} | {seeds} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Every seed as a dot, the mean as a bar, for each suite and method; facts kept beneath."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    suites = list(dict.fromkeys(row["suite"] for row in rows))
    figure, axes = plt.subplots(1, len(suites), figsize=(1.5 + 4.5 * len(suites), 4.5), squeeze=False, sharey=True)
    for axis, suite in zip(axes[0], suites, strict=True):
        chosen = [row for row in rows if row["suite"] == suite]
        for x, row in enumerate(chosen):
            axis.bar(
                x, row["mean"], width=0.6, color="#9ecae1" if "lora" == row["method"][:4] else "#3182bd", alpha=0.6
            )
            axis.plot([x] * len(row["scores"]), row["scores"], "o", color="black", markersize=4, alpha=0.7)
            axis.plot(x, row["knowledge"], "D", color="#d95f02", markersize=6)
        axis.set_xticks(range(len(chosen)), [row["method"] for row in chosen], rotation=20)
        axis.set_title(suite)
        axis.set_ylim(0, 1.02)
    axes[0][0].set_ylabel("exact match: each seed (dot), mean (bar)\nold facts kept (diamond)")
    figure.suptitle(f"Equal trainable parameters, {len(rows[0]['scores'])} paired seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parse_arguments() -> argparse.Namespace:
    """The command line; a wrong name is refused by argparse with the list of right ones."""
    from moe_peft.pocket import SUITES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--suites", nargs="+", choices=list(SUITES), default=["fact8tag", "opconf8tag"])
    parser.add_argument("--seeds", type=int, default=10, help="how many reported seeds")
    parser.add_argument("--first-seed", type=int, default=10, help="the first of them; 0 to 9 were used while tuning")
    parser.add_argument("--budget", type=int, default=190_000, help="trainable parameters")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, help="one learning rate for all, without a sweep")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="two seeds of lora and molora on fact8tag, no sweep")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.methods, arguments.suites, arguments.seeds = ["lora", "molora"], ["fact8tag"], 2
        arguments.rate = arguments.rate or 4e-3
    return arguments


def versions() -> dict[str, str]:
    """Of everything that the figures depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes", "peft-moe")}


def main() -> None:
    arguments = parse_arguments()
    trials = Trials(arguments.output / "trials.jsonl")
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    rows: list[dict[str, Any]] = []
    for suite in arguments.suites:
        rates = {m: arguments.rate or best_rate(trials, m, suite, arguments) for m in arguments.methods}
        jobs = [job(m, suite, rates[m], seed, arguments) for m in arguments.methods for seed in seeds]
        runs: dict[str, list[dict[str, Any]]] = {m: [] for m in arguments.methods}
        for trial in trials.run(jobs, arguments.workers):
            runs[trial["method"]].append(trial)
        rows += summarise(suite, runs, rates)
        print(table(rows))
    (arguments.output / "summary.json").write_text(json.dumps({"versions": versions(), "rows": rows}, indent=1))
    (arguments.output / "summary.md").write_text(table(rows))
    plot(rows, arguments.output / "summary.png")
    print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
