"""The tables of `eval/composite.py`: parts and whole answers for each method, by tag, and one answer with its experts."""

import os
import statistics
from pathlib import Path
from typing import Any


def table(runs: list[dict[str, Any]], methods: tuple[str, ...]) -> list[str]:
    """A row for each method: means and every seed."""
    lines = ["| method | parts right | whole answers right | parts, every seed |", "|---|---|---|---|"]
    for method in methods:
        own = sorted((run for run in runs if run["method"] == method), key=lambda run: run["seed"])
        if own:
            parts, answers = ([run[what] for run in own] for what in ("parts", "answers"))
            seeds = " ".join(f"{score:.2f}" for score in parts)
            lines.append(f"| {method} | {statistics.mean(parts):.2f} | {statistics.mean(answers):.2f} | {seeds} |")
    return lines


def by_tag(runs: list[dict[str, Any]], methods: tuple[str, ...], tags: str) -> list[str]:
    """Parts right for each tag."""
    lines = ["| method | " + " | ".join(tags) + " |", "|---" * (len(tags) + 1) + "|"]
    for method in methods:
        own = [run["by_tag"] for run in runs if run["method"] == method]
        if own:
            cells = [f"{statistics.mean(scores[tag] for scores in own):.2f}" for tag in tags]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def trace_lines(trace: dict[str, Any]) -> list[str]:
    """The answer line by line, under each token the expert that led it, in the mean over all routers."""
    lines, text, led = [f"    {trace['prompt']}"], "", ""
    for token, expert in zip(trace["tokens"], trace["experts"], strict=True):
        if token == "\n" or len(token) > 1:  # a line's end, or the end of the text
            lines += [f"    {text}", f"    {led}", ""]
            text = led = ""
        else:
            text, led = text + token, led + expert
    return lines + ([f"    {text}", f"    {led}"] if text else [])


def write_report(runs: list[dict[str, Any]], output: Path, tags: str, methods: tuple[str, ...]) -> str:
    """Write `summary.md`; returns it."""
    traces = [run for run in runs if "trace" in run]
    best = max(traces, key=lambda run: (run["method"] == "all+few", -run["seed"]), default=None)
    parts = [
        "# Ten sub-tasks in one answer",
        "",
        "Made by `python eval/composite.py`, which says what the rows are.",
        "",
    ]
    parts += [
        *table(runs, methods),
        "",
        "Parts right by tag, mean over the seeds:",
        "",
        *by_tag(runs, methods, tags),
        "",
    ]
    if best is not None:
        meant = ", ".join(f"{tag} {skill}" for tag, skill in best["meanings"].items())
        parts += [
            f'What "{best["method"]}" writes (seed {best["seed"]}; {meant}), and below each token the expert with the '
            "largest share over all routers:",
            "",
            *trace_lines(best["trace"]),
        ]
    text = "\n".join(parts).rstrip() + "\n"
    temporary = output / "summary.md.tmp"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, output / "summary.md")
    return text
