"""What the yardstick found: a row per method and suite, as Markdown, JSON and a plot with every seed."""

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple


BASELINES = ("lora", "lora-ffn")
"""Plain LoRA on all linears and in its best placement; every other method is tested against both."""


class Sweep(NamedTuple):
    """One method's search for its learning rate on one suite.

    Attributes:
        rate: the best.
        at_edge: whether the search ended at its limit instead of between worse rates.
        trials: rate -> its trials, on seeds that are not reported. Empty where a rate was given.
    """

    rate: float
    at_edge: bool
    trials: dict[float, list[dict[str, Any]]]


def paired_p_value(ours: list[float], theirs: list[float]) -> float:
    """Two-sided sign-flip permutation test of the mean paired difference (exact for up to about 13 seeds)."""
    from scipy.stats import permutation_test

    if all(math.isclose(a, b) for a, b in zip(ours, theirs, strict=True)):
        return 1.0
    outcome = permutation_test(
        (ours, theirs), lambda a, b, axis: (a - b).mean(axis=axis), permutation_type="samples", vectorized=True
    )
    return float(outcome.pvalue)


def summarise(
    suite: str, runs: dict[tuple[str, str], list[dict[str, Any]]], sweeps: dict[tuple[str, str], Sweep]
) -> list[dict[str, Any]]:
    """One row per method: mean, spread, every seed, knowledge, the sweep, and the paired test against each LoRA.

    Args:
        runs: (suite, method) -> the reported trials.
        sweeps: (suite, method) -> how the rate was found.
    """
    rows = []
    for (of, method), trials in runs.items():
        if of != suite:
            continue
        scores, kept = ([trial[name] for trial in trials] for name in ("score", "knowledge"))
        row: dict[str, Any] = {
            "suite": suite,
            "method": method,
            "rank": trials[0]["rank"],
            "trainable": trials[0]["trainable"],
            "rate": sweeps[suite, method].rate,
            "at_edge": sweeps[suite, method].at_edge,
            "seeds": [trial["seed"] for trial in trials],
            "mean": statistics.mean(scores),
            "sd": statistics.stdev(scores) if len(scores) > 1 else 0.0,
            "worst": min(scores),
            "scores": scores,
            "knowledge": statistics.mean(kept),
            "kept": kept,
            "seconds": statistics.median(trial["seconds"] for trial in trials),
            "sweep": {f"{rate:g}": _means(tried) for rate, tried in sweeps[suite, method].trials.items()},
        }
        for baseline in BASELINES:
            if method != baseline and (suite, baseline) in runs:
                row |= _against(baseline, trials, runs[suite, baseline])
        rows.append(row)
    return rows


def _means(trials: list[dict[str, Any]]) -> dict[str, float]:
    return {name: statistics.mean(trial[name] for trial in trials) for name in ("score", "knowledge")}


def _against(baseline: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, float]:
    """The paired tests over the seeds that both have."""
    by_seed = {trial["seed"]: trial for trial in theirs}
    pairs = [(trial, by_seed[trial["seed"]]) for trial in ours if trial["seed"] in by_seed]
    return {
        f"p_{name}_{baseline}": paired_p_value([a[name] for a, _ in pairs], [b[name] for _, b in pairs])
        for name in ("score", "knowledge")
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The summary as Markdown."""
    lines = [
        "| suite | method | parameters (rank) | rate | exact match | worst seed | p: LoRA, LoRA on the FFN | facts kept | "
        "p: LoRA, LoRA on the FFN | s per run | every seed |",
        "|" + "---|" * 11,
    ]
    for r in rows:
        score_p, knowledge_p = (
            ", ".join(f"{r[f'p_{what}_{b}']:.3f}" if f"p_{what}_{b}" in r else "–" for b in BASELINES)
            for what in ("score", "knowledge")
        )
        seeds = " ".join(f"{score:.2f}" for score in r["scores"])
        edge = " (edge)" if r["at_edge"] else ""
        lines.append(
            f"| {r['suite']} | {r['method']} | {r['trainable']:,} ({r['rank']}) | {r['rate']:g}{edge} | "
            f"{r['mean']:.3f} ± {r['sd']:.3f} | {r['worst']:.2f} | {score_p} | {r['knowledge']:.2f} | {knowledge_p} | "
            f"{r['seconds']:.0f} | {seeds} |"
        )
    return "\n".join(lines) + "\n"


def sweep_table(rows: list[dict[str, Any]]) -> str:
    """Exact match / facts kept at every rate of the sweep: knowledge is only comparable at equal rates."""
    rates = sorted({float(rate) for row in rows for rate in row["sweep"]})
    if not rates:
        return ""
    lines = [
        "Exact match / facts kept at each rate, means over the sweep's own seeds. A higher rate forgets more whatever the "
        "method, so facts kept compare along a column.\n",
        "| suite | method | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|" + "---|" * (len(rates) + 2),
    ]
    for row in rows:
        cells = (row["sweep"].get(f"{rate:g}") for rate in rates)
        shown = " | ".join(f"{c['score']:.2f} / {c['knowledge']:.2f}" if c else "" for c in cells)
        lines.append(f"| {row['suite']} | {row['method']} | {shown} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Every seed as a dot, the mean as a bar, for each suite and method; facts kept as diamonds."""
    from moe_peft.pictures import pyplot

    plt = pyplot()
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    most = max(sum(row["suite"] == suite for row in rows) for suite in suites)
    width = max(4.5, 0.45 * most)
    figure, axes = plt.subplots(1, len(suites), figsize=(1.5 + width * len(suites), 5), squeeze=False, sharey=True)
    for axis, suite in zip(axes[0], suites, strict=True):
        chosen = [row for row in rows if row["suite"] == suite]
        for x, row in enumerate(chosen):
            color = "#9ecae1" if row["method"] in BASELINES else "#3182bd"
            axis.bar(x, row["mean"], width=0.6, color=color, alpha=0.6)
            axis.plot([x] * len(row["scores"]), row["scores"], "o", color="black", markersize=4, alpha=0.7)
            axis.plot(x, row["knowledge"], "D", color="#d95f02", markersize=6)
        axis.set_xticks(range(len(chosen)), [row["method"] for row in chosen], rotation=45, ha="right")
        axis.set_title(suite)
        axis.set_ylim(0, 1.02)
    axes[0][0].set_ylabel("exact match: each seed (dot), mean (bar)\nold facts kept (diamond)")
    figure.suptitle(f"Equal trainable parameters, up to {max(len(row['scores']) for row in rows)} paired seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def versions() -> dict[str, str]:
    """Of everything that the figures depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes", "peft-moe")}


def write_report(rows: list[dict[str, Any]], settings: dict[str, Any], folder: Path) -> str:
    """Write `summary.json`, `summary.md` and `summary.png`; returns the tables."""
    text = table(rows) + "\n" + sweep_table(rows)
    record = {"versions": versions(), "settings": settings, "rows": rows}
    (folder / "summary.json").write_text(json.dumps(record, indent=1))
    (folder / "summary.md").write_text(text)
    plot(rows, folder / "summary.png")
    return text
