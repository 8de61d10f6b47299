"""What each way of merging loses: LoRAMoE-, MoLA-, SMoRA- and MixLoRA-shaped adapters of the pocket backbone.

    python eval/merge_table.py                     # four methods, three seeds; under an hour on one core
    python eval/merge_table.py --methods loramoe --seeds 1
    python eval/merge_table.py --report            # trains nothing: the table of what is on disk

Each adapter is trained as in `eval/yardstick.py`: suite fact8tag with its difficulty, NF4 backbone, equal budget, the
learning rate of its sweep. Then it is merged in every way, fitted to three quarters of 768 of its training rows and measured on
the other quarter; exact match is that of the suite's test rows. Each merge is appended to a file as it ends, so that an
interrupted run goes on where it stopped. "per domain" is one LoRA for each of the eight tags, each measured on its own
rows.
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


RESULTS = Path(__file__).parent / "results" / "merge"
SUITE, BUDGET, STEPS = "fact8tag", 190_000, 300
ADAPTERS = {  # the yardstick's own settings and the rate of its sweep
    "loramoe": (METHODS["loramoe"], 0.0045),
    "mola": (METHODS["mola"], 0.00675),
    "smora": (METHODS["smora"], 0.003),
    "mixlora": (METHODS["mixlora"], 0.0045),
}
WAYS = (
    "usage",
    "subspace",
    "ls",
    "ls, answers only",
    "ls, rank 16",
    "ls, dense",
    "learned",
    "distill",
    "ls+distill",
    "per domain",
)
ROWS, BATCH = 768, 32


def applies(way: str, adapter: str) -> bool:
    """Full-rank least squares is another thing than a plain LoRA for FFN mixtures only, and the subspace one for others."""
    ffn = adapter == "mixlora"
    return {"ls, dense": ffn, "subspace": not ffn}.get(way, True)


def key(trial: dict[str, Any]) -> tuple[str, int, str]:
    return trial["adapter"], trial["seed"], trial["way"]


class Trials:
    """The merges done so far: one JSON object per line, appended as they end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.done = {key(trial): trial for trial in map(json.loads, filter(None, lines))}

    def keep(self, trial: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(trial) + "\n")
        self.done[key(trial)] = trial


def trained(method: Any, rate: float, seed: int) -> tuple[Any, Any, Any, dict[str, list[Any]]]:
    """An adapter of this method of the yardstick: model, tokenizer, suite, and the rows to fit to, to measure on and to
    score."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    import moe_peft  # noqa: F401  (registers the adapter types)
    from moe_peft.pocket import make_suite
    from moe_peft.trial import TrialSettings, load_pocket, train_adapter

    suite = make_suite(SUITE, seed, **DIFFICULTY[SUITE])
    model, tokenizer = load_pocket()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrialSettings(learning_rate=rate, steps=STEPS, seed=seed)
        adapted, _ = train_adapter(model, tokenizer, suite.train, config_for(method, BUDGET), settings, Path(folder))
    adapted.eval()
    rows = suite.train[:ROWS]  # make_suite has shuffled them
    cut = len(rows) * 3 // 4
    return adapted, tokenizer, suite, {"calibration": rows[:cut], "held_out": rows[cut:], "scored": suite.test}


def run_adapter(name: str, seed: int, ways: list[str], trials: Trials) -> None:
    """Train one adapter, and merge it in each of the ways."""
    adapted, tokenizer, suite, text = trained(*ADAPTERS[name], seed)
    from moe_peft.loaded import batches_from

    for way in ways:
        start = time.process_time()
        if way == "per domain":
            found = per_domain(adapted, tokenizer, suite, text)
        else:
            batches = {part: batches_from(list(rows), tokenizer, BATCH) for part, rows in text.items()}
            found = merged(adapted, way, name, batches)
        seconds = time.process_time() - start
        trials.keep({"adapter": name, "seed": seed, "way": way, "seconds": round(seconds, 1), **found})
        print(
            f"{name}, seed {seed}, {way}: KL {found['merged']['kl']:.4f}, exact {found['merged']['score']:.3f}",
            flush=True,
        )


def merged(model: Any, way: str, adapter: str, batches: dict[str, Any]) -> dict[str, Any]:
    """One merge and its figures."""
    from moe_peft.merge import fit_static
    from moe_peft.merging.decoder import Decoder
    from moe_peft.merging.methods import merge_static, total_rank
    from moe_peft.merging.walk import walk

    method = way.split(",")[0]
    rank = 16 if "rank 16" in way else None
    if adapter == "mixlora" and rank is None and way != "ls, dense":
        rank = total_rank(Decoder(model))  # as `moe-peft merge` has it for a plain LoRA
    tokens = "answers" if "answers" in way else "all"
    if method == "subspace":  # measured here, and for that reason no method of `moe-peft merge`
        factors = fit_static(model, batches["calibration"], rank)
        measured, tried = walk(Decoder(model), batches["held_out"], factors, scored=batches["scored"]), {}
    else:
        measured, tried, _ = merge_static(model, **batches, method=method, rank=rank, tokens=tokens)
    figures = {name: f._asdict() for name, f in measured.figures.items()}
    ranks = [len(f.A) for f in measured.factors.values()]
    ridges = {f"{alpha:g}": kl for alpha, kl in tried.items()}
    return {**figures, "rank": [min(ranks), max(ranks)], "ridges": ridges, "layers": measured.layer_error}


def per_domain(model: Any, tokenizer: Any, suite: Any, text: dict[str, Any]) -> dict[str, Any]:
    """A merge for each domain, and the mean of their figures, weighted alike: the domains are equally large."""
    from moe_peft.loaded import batches_from

    found = []
    for domain in suite.domains:
        own = {part: [row for row in rows if row["domain"] == domain] for part, rows in text.items()}
        batches = {part: batches_from(rows, tokenizer, BATCH) for part, rows in own.items()}
        adapter = "mixlora" if "FFN" in str(model.peft_config["default"].peft_type) else ""
        found.append(merged(model, "ls", adapter, batches))
    mean = {
        name: {
            figure: statistics.mean(one[name][figure] for one in found) for figure in ("loss", "kl", "top1", "score")
        }
        for name in ("base", "routed", "merged")
    }
    return {**mean, "rank": found[0]["rank"], "ridges": {}, "layers": {}}


def summarise(trials: Trials) -> list[dict[str, Any]]:
    """A row for each adapter and way, over its seeds; the routed model and the base come first."""
    rows = []
    for adapter in ADAPTERS:
        of_adapter = [trial for trial in trials.done.values() if trial["adapter"] == adapter]
        for way in ("base", "routed", *WAYS):
            own = (
                [t for t in of_adapter if t["way"] == way]
                if way in WAYS
                else [t for t in of_adapter if t["way"] == "usage"]
            )
            if not own:
                continue
            figures = [trial[way if way in ("base", "routed") else "merged"] for trial in own]
            row: dict[str, Any] = {"adapter": adapter, "way": way, "seeds": sorted(trial["seed"] for trial in own)}
            for figure in ("loss", "kl", "top1", "score"):
                values = [one[figure] for one in figures]
                row[figure] = {"mean": statistics.mean(values), "min": min(values), "max": max(values)}
            row["rank"] = own[0]["rank"] if way in WAYS else None
            row["seconds"] = statistics.mean(trial["seconds"] for trial in own) if way in WAYS else 0.0
            rows.append(row)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, a mean and the range over the seeds in each cell."""

    def cell(row: dict[str, Any], figure: str, form: str) -> str:
        mean, low, high = (format(row[figure][part], form) for part in ("mean", "min", "max"))
        return mean if low == high else f"{mean} ({low} to {high})"

    lines = [
        "| adapter | merge | KL from routed, nats | same top token | exact match | rank | CPU seconds | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rank = (
            ""
            if row["rank"] is None
            else str(row["rank"][0])
            if row["rank"][0] == row["rank"][1]
            else "{} to {}".format(*row["rank"])
        )
        cells = [
            row["adapter"],
            row["way"],
            cell(row, "kl", ".4f"),
            cell(row, "top1", ".3f"),
            cell(row, "score", ".3f"),
        ]
        seconds = f"{row['seconds']:.0f}" if row["seconds"] else ""
        lines.append("| " + " | ".join([*cells, rank, seconds, str(len(row["seeds"]))]) + " |")
    return "\n".join(lines)


def write(rows: list[dict[str, Any]], output: Path) -> None:
    settings = {"suite": SUITE, "difficulty": DIFFICULTY[SUITE], "budget": BUDGET, "steps": STEPS, "rows": ROWS}
    for name, text in (
        ("summary.json", json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n"),
        ("summary.md", f"# What each way of merging loses\n\n{__doc__.split(chr(10) * 2, 2)[2]}\n{markdown(rows)}\n"),
    ):
        temporary = output / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, output / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=ADAPTERS, default=list(ADAPTERS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="train nothing; report what is on disk")
    arguments = parser.parse_args()
    trials = Trials(arguments.output / "trials.jsonl")
    for seed in range(
        arguments.first_seed, arguments.first_seed + arguments.seeds
    ):  # seeds last: every method has one first
        for name in [] if arguments.report else arguments.methods:
            ways = [way for way in arguments.ways if applies(way, name) and (name, seed, way) not in trials.done]
            if ways:
                run_adapter(name, seed, ways, trials)
                write(summarise(trials), arguments.output)
    rows = summarise(trials)
    if not rows:
        raise SystemExit(f"{trials.path} holds no merges; run without --report first.")
    write(rows, arguments.output)
    print(markdown(rows))


if __name__ == "__main__":
    main()
