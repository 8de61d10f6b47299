"""Domains learnt one after another: what a method still knows of the earlier ones, and of what the backbone knew before.

    python eval/continual.py                        # three seeds of eight domains: about forty minutes on one core
    python eval/continual.py --seeds 1 --methods lora moram
    python eval/continual.py --report               # trains nothing: tables and plot of the runs on disk

After each domain every domain so far is scored, and the probe of facts from the backbone's pre-training. Rows:

    lora         one plain LoRA, trained on
    expert+GATE  a LoRA per domain, each trained alone on the bare backbone, made into one adapter by `from_loras`; GATE
                 says who chooses. "token" and "sequence" are trained on the text of the domains so far, the experts frozen:
                 "sequence" by its labels, "token" by labels and language-model loss alike (by labels alone, or with
                 MeteoRA's weight of 50 on them, it is worse); "prototype" takes a mean of it; "null" is the same with a
                 threshold that sends one prompt of the domains in twenty, and whatever is stranger, to the bare
                 backbone; "arrow" and "given" take nothing ("given" is told the domain of each row).
    moram        ranks that choose themselves; new ones for each domain, the earlier ones frozen

All end with the same rank in sum. Rates and steps of the gates are those that were best on seed 10, which is in no table.
A run is appended to a file as it ends, so that an interrupted command goes on.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

RESULTS = Path(__file__).parent / "results" / "continual"
SUITE, DIFFICULTY = "fact8tag", {"repeats": [1, 2, 4, 8, 16]}
FFN = ["gate_proj", "up_proj", "down_proj"]
GATES = ("given", "prototype", "null", "arrow", "sequence", "token")
METHODS = ("lora", *(f"expert+{gate}" for gate in GATES), "moram")
RANK, RATE = 4, 4.5e-3  # of each domain; the rate is the one that was best for LoRA on the yardstick
STEPS, GATE_STEPS = 100, 300
GATE_RATES = {"token": 2e-2, "sequence": 5e-2}
TRAINED_GATES: dict[str, dict[str, Any]] = {
    "token": {"gate_training": "both", "router_supervision_coef": 1.0},
    "sequence": {"gate_training": "labels"},
}


class Bench:
    """Backbone, tokenizer and rows of one seed; what training and scoring need."""

    def __init__(self, seed: int, folder: Path, quick: bool) -> None:
        import torch
        import transformers

        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        from moe_peft.pocket import make_suite

        self.seed, self.folder, self.quick = seed, folder, quick
        self.suite = make_suite(SUITE, seed, **DIFFICULTY)
        self.domains = list(self.suite.domains)[: 3 if quick else None]

    def backbone(self) -> Any:
        from moe_peft.trial import load_pocket

        model, self.tokenizer = load_pocket()
        return model

    def rows(self, domains: list[str], part: str = "train") -> list[Any]:
        return [row for row in getattr(self.suite, part) if row["domain"] in domains]

    def train(self, model: Any, domains: list[str], rate: float, steps: int, labels: bool = False) -> None:
        from moe_peft.trial import TrialSettings, tokenized, train_on

        settings = TrialSettings(learning_rate=rate, steps=10 if self.quick else steps, seed=self.seed)
        dataset = tokenized(self.rows(domains), self.tokenizer, domains if labels else ())
        train_on(model, self.tokenizer, dataset, settings, self.folder)

    def scores(self, model: Any, domains: list[str], told: bool = False) -> dict[str, Any]:
        """Exact match on each of the domains, and on the probe. `told` says the domain of each row to the model."""
        from moe_peft import task_types
        from moe_peft.pocket import exact_match, knowledge_probe

        found = {}
        for number, domain in enumerate(domains):
            rows = self.rows([domain], "test")
            if told:
                with task_types(model, [number] * len(rows)):
                    matches = exact_match(model, self.tokenizer, rows)
            else:
                matches = exact_match(model, self.tokenizer, rows)
            found[domain] = sum(matches) / len(matches)
        if told:  # nobody can say which domain a fact of the backbone's is of: the null expert, the backbone itself
            return {"domains": found, "knowledge": None}
        known = exact_match(model, self.tokenizer, knowledge_probe())
        return {"domains": found, "knowledge": sum(known) / len(known)}


def lora_config(rank: int) -> Any:
    """Plain LoRA with the scale that is best for it on the yardstick."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=FFN, task_type="CAUSAL_LM")


def one_lora(bench: Bench) -> list[dict[str, Any]]:
    """One LoRA of the rank that the others have in sum, trained on and on."""
    from peft import get_peft_model

    model, stages = get_peft_model(bench.backbone(), lora_config(RANK * len(bench.domains))), []
    for number, domain in enumerate(bench.domains, start=1):
        bench.train(model, [domain], RATE, STEPS)
        stages.append(bench.scores(model, bench.domains[:number]))
    return stages


def growing_ranks(bench: Bench) -> list[dict[str, Any]]:
    """MoRAM: `RANK` ranks for each domain, those of earlier ones frozen."""
    from peft import get_peft_model

    from moe_peft import from_catalogue, grow

    config = from_catalogue(
        "moram", r=RANK, top_k=RANK, lora_alpha=4 * RANK, target_modules=FFN, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    model, stages = get_peft_model(bench.backbone(), config), []
    for number, domain in enumerate(bench.domains, start=1):
        if number > 1:
            grow(model, RANK)
        bench.train(model, [domain], RATE, STEPS)
        stages.append(bench.scores(model, bench.domains[:number]))
    return stages


def experts(bench: Bench) -> dict[str, Path]:
    """A LoRA for each domain, trained alone; kept for all gates of this seed."""
    from peft import get_peft_model

    folders = {domain: bench.folder / "experts" / domain for domain in bench.domains}
    for domain, folder in folders.items():
        if not folder.exists():
            model = get_peft_model(bench.backbone(), lora_config(RANK))
            bench.train(model, [domain], RATE, STEPS)
            model.save_pretrained(str(folder))
    return folders


def expert_per_domain(bench: Bench, gate: str) -> list[dict[str, Any]]:
    """One adapter of the experts so far after each domain; the gate is made anew."""
    from moe_peft import from_loras, set_null_threshold, set_prototypes
    from moe_peft.gate_accuracy import gate_accuracy

    folders, stages = experts(bench), []
    kind = "prototype" if gate == "null" else gate
    for number in range(1, len(bench.domains) + 1):
        domains = bench.domains[:number]
        trained = gate in TRAINED_GATES and number > 1
        settings = TRAINED_GATES[gate] if trained else {}
        base = bench.backbone()
        model = from_loras({name: folders[name] for name in domains}, base, gate=kind, check_base=False, **settings)
        if trained:
            bench.train(model, domains, GATE_RATES[gate], GATE_STEPS, labels=True)
        if kind == "prototype" and number > 1:
            set_prototypes(model, {name: [prompts(bench, name)] for name in domains})
        if gate == "null" and number > 1:
            set_null_threshold(model, [prompts(bench, name) for name in domains])
        stages.append(bench.scores(model, domains, told=gate == "given"))
    if gate != "given":
        batches = {domain: [prompts(bench, domain, "test")] for domain in bench.domains}
        stages[-1]["gate_accuracy"] = gate_accuracy(model, batches)
    return stages


def prompts(bench: Bench, domain: str, part: str = "train") -> dict[str, Any]:
    """The prompts of a domain's rows as one batch."""
    texts = [row["prompt"] for row in bench.rows([domain], part)]
    batch = bench.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def run(method: str, bench: Bench) -> list[dict[str, Any]]:
    """What was scored after each domain."""
    import torch

    torch.manual_seed(bench.seed)
    if method == "lora":
        return one_lora(bench)
    return growing_ranks(bench) if method == "moram" else expert_per_domain(bench, method.removeprefix("expert+"))


def bare(bench: Bench) -> float:
    """The share of the probe's facts that the backbone knows before anything is learnt."""
    from moe_peft.pocket import exact_match, knowledge_probe

    known = exact_match(bench.backbone(), bench.tokenizer, knowledge_probe())
    return sum(known) / len(known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--quick", action="store_true", help="three domains, ten steps each: does everything run?")
    parser.add_argument("--report", action="store_true", help="only write the tables and the plot")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "runs.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for seed in range(0 if options.report else options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(seed, Path(folder), options.quick)
            for method in options.methods:
                if not any(entry["method"] == method and entry["seed"] == seed for entry in done):
                    stages = run(method, bench)
                    done.append({"method": method, "seed": seed, "known_before": bare(bench), "stages": stages})
                    with path.open("a") as file:
                        file.write(json.dumps(done[-1]) + "\n")
                    final = statistics.mean(stages[-1]["domains"].values())
                    print(f"seed {seed}, {method}: {final:.2f} on all domains in the end", flush=True)
    from continual_report import write_report

    write_report(done, options.output)
    print((options.output / "summary.md").read_text())


if __name__ == "__main__":
    main()
