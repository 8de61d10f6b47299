"""Tables and a plot of `eval/continual.py`: the matrix of each method, and what is left in the end."""

import json
import statistics
from pathlib import Path
from typing import Any


HEAD = """Made by `python eval/continual.py`; every run: `runs.jsonl`. Domains of `fact8tag` on the NF4 pocket backbone, learnt one after
another; exact match, means over seeds. "Forgotten" is the best that a domain ever had, less what it has in the end, as a mean
over all domains but the last. "Facts kept" is the share of the facts of the backbone's pre-training that it answers in the
end; {before:.2f} before. For "given" nobody tells the domain of such a fact, so nothing stands there.
"""


def by_method(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Method -> its runs."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        found.setdefault(run["method"], []).append(run)
    return found


def matrix(runs: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Domain -> exact match after each stage, means over seeds; None before the domain was learnt."""
    domains = list(runs[0]["stages"][-1]["domains"])
    return {
        domain: [
            statistics.mean(run["stages"][stage]["domains"][domain] for run in runs) if stage >= place else None
            for stage in range(len(domains))
        ]
        for place, domain in enumerate(domains)
    }


def forgotten(run: dict[str, Any]) -> float:
    """Mean over the domains but the last of the best score that it ever had less its last one."""
    last = run["stages"][-1]["domains"]
    losses = [
        max(stage["domains"].get(domain, 0.0) for stage in run["stages"]) - last[domain] for domain in list(last)[:-1]
    ]
    return statistics.mean(losses)


def line(method: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the table says of a method."""
    final = [statistics.mean(run["stages"][-1]["domains"].values()) for run in runs]
    known = [run["stages"][-1]["knowledge"] for run in runs if run["stages"][-1]["knowledge"] is not None]
    return {
        "method": method,
        "final": statistics.mean(final),
        "seeds": final,
        "forgotten": statistics.mean(map(forgotten, runs)),
        "knowledge": statistics.mean(known) if known else None,
        "matrix": matrix(runs),
    }


def gate_table(runs: list[dict[str, Any]]) -> list[str]:
    """How often each gate decides for the domain's own expert in the end, a row per gate."""
    found: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        if "gate_accuracy" in run["stages"][-1]:
            found.setdefault(run["method"], []).append(run["stages"][-1]["gate_accuracy"])
    if not found:
        return []
    domains = list(next(iter(found.values()))[0])
    text = [
        "",
        "Share of the gate's decisions on held-out prompts (per token and layer where it decides so) that are for the",
    ]
    text += ["domain's own expert, after the last domain; chance is " + f"{1 / len(domains):.3f}:", ""]
    text += ["| gate | mean |" + "".join(f" {name} |" for name in domains), "|---" * (len(domains) + 2) + "|"]
    for method, of in found.items():
        means = {name: statistics.mean(run[name] for run in of) for name in domains}
        cells = "".join(f" {means[name]:.2f} |" for name in domains)
        text.append(f"| {method} | {statistics.mean(means.values()):.2f} |{cells}")
    return text


def write_report(runs: list[dict[str, Any]], folder: Path) -> None:
    """`summary.json`, `summary.md` and `matrix.png`."""
    lines = [line(method, of) for method, of in by_method(runs).items()]
    (folder / "summary.json").write_text(json.dumps(lines, indent=1) + "\n")
    before = statistics.mean(run["known_before"] for run in runs)
    text = [HEAD.format(before=before), "| method | all domains in the end | every seed | forgotten | facts kept |"]
    text.append("|---|---|---|---|---|")
    for row in lines:
        seeds = " ".join(f"{score:.2f}" for score in row["seeds"])
        known = "–" if row["knowledge"] is None else f"{row['knowledge']:.2f}"
        text.append(f"| {row['method']} | {row['final']:.2f} | {seeds} | {row['forgotten']:.2f} | {known} |")
    text += gate_table(runs)
    for row in lines:
        domains = list(row["matrix"])
        text += ["", f"**{row['method']}**: a row per domain, a column per stage", ""]
        text += ["| |" + "".join(f" after {name} |" for name in domains), "|---" * (len(domains) + 1) + "|"]
        for domain, scores in row["matrix"].items():
            cells = "".join("  |" if score is None else f" {score:.2f} |" for score in scores)
            text.append(f"| {domain} |{cells}")
    (folder / "summary.md").write_text("\n".join(text) + "\n")
    plot(lines, folder / "matrix.png")


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """A heat map per method: domains downwards, stages to the right."""
    from moe_peft.pictures import pyplot

    plt = pyplot()

    columns = 4
    rows = -(-len(lines) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 3.3 * rows), squeeze=False, layout="constrained")
    image = None
    for axis, row in zip(axes.flat, lines, strict=False):
        values = [[float("nan") if score is None else score for score in scores] for scores in row["matrix"].values()]
        image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis")
        names = list(row["matrix"])
        axis.set_xticks(range(len(names)), names)
        axis.set_yticks(range(len(names)), names)
        axis.set_title(f"{row['method']}: {row['final']:.2f}", fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("after learning")
    for axis in list(axes.flat)[len(lines) :]:
        axis.axis("off")
    if image is not None:
        figure.colorbar(image, ax=axes, label="exact match", shrink=0.7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
