"""`moe-peft demo`: the whole product on real input in minutes, on a CPU, without a download.

Eight domains ask about the same people and contradict each other; a tag tells them apart. Plain LoRA and a routed
adapter are trained with TRL on the NF4 pocket backbone, with the same data, steps and number of trainable parameters.
Then the routed adapter is saved, reloaded in a fresh process, merged into one plain LoRA at a measured loss, and its
routers are looked at.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoConfig, TrainerCallback

from moe_peft.budget import budget_line, count_parameters, equal_budget_lora, fit_to_budget, meta_backbone
from moe_peft.catalogue import from_catalogue
from moe_peft.loaded import collate
from moe_peft.merge import instead_of_routing, save_static
from moe_peft.merging.methods import merge_static
from moe_peft.merging.table import kept, merge_table
from moe_peft.pocket import POCKET_DIR, Row, Suite, exact_match, knowledge_probe, make_suite, per_domain
from moe_peft.report import health_table, health_verdict, heat_map, routing_report, verdict
from moe_peft.saving import save_adapter
from moe_peft.trial import TrialSettings, load_pocket, tokenized, train_adapter


SUITE = "fact8tag"
FFN = ["gate_proj", "up_proj", "down_proj"]
BUDGET = 190_000  # trainable parameters of each adapter
LEARNING_RATE = 3e-3  # for all three: the best for each, or next to it, in the yardstick's sweep (eval/yardstick.py)

_RELOAD = """
import sys, torch
torch.set_num_threads(1)
import moe_peft
from peft import PeftModel
from moe_peft.trial import load_pocket
batch = torch.load(sys.argv[2])
model, _ = load_pocket()
model = PeftModel.from_pretrained(model, sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(**batch).logits.cpu(), sys.argv[3])
"""

_RELOAD_PLAIN = _RELOAD.replace("import moe_peft\n", "").replace(
    "from moe_peft.trial import load_pocket\nbatch = torch.load(sys.argv[2])\nmodel, _ = load_pocket()",
    "from transformers import AutoModelForCausalLM, BitsAndBytesConfig\n"
    "batch = torch.load(sys.argv[2])\n"
    "quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True,\n"
    "                           bnb_4bit_compute_dtype=torch.float32)\n"
    "model = AutoModelForCausalLM.from_pretrained(sys.argv[4], dtype=torch.float32, quantization_config=quant,\n"
    "                                             device_map={'': batch['input_ids'].device})\n"
    "for module in model.modules():\n"
    "    if hasattr(module, 'support_avx512bf16_for_cpu'):\n"
    "        module.support_avx512bf16_for_cpu = False",
)


class Scored(NamedTuple):
    """One row of the demo's table: exact match by domain and on all, old facts kept, trained parameters."""

    by_domain: dict[str, float]
    score: float
    knowledge: float
    trainable: int


class _Bar(TrainerCallback):
    """A progress bar of the demo's own, one line per adapter."""

    def __init__(self, progress: Progress, label: str, steps: int) -> None:
        self.progress, self.task = progress, progress.add_task(label, total=steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.advance(self.task)


def run(output_dir: Path, seed: int = 0, steps: int = 300, console: Console | None = None) -> dict[str, Any]:
    """The demo from end to end; prints as it goes and leaves everything in `output_dir`.

    Args:
        output_dir: gets `molora/` (the adapter), `merged_lora/` (the static LoRA), `routing.png`, `routing.json` and
            `demo.json` with every figure that was printed.
        seed: of the rows and of both adapters.
        steps: optimiser steps of 32 rows.

    Returns:
        what `demo.json` holds.
    """
    console = console or Console()
    torch.set_num_threads(1)
    started = time.monotonic()
    output_dir.mkdir(parents=True, exist_ok=True)
    suite = make_suite(SUITE, seed)
    _introduce(console, suite)
    model, tokenizer = load_pocket()
    table = {"base": _score(model, tokenizer, suite, 0)}
    backbone = meta_backbone(AutoConfig.from_pretrained(POCKET_DIR))
    contenders = {
        "LoRA, all linears": equal_budget_lora(backbone, BUDGET, "all-linear", lora_alpha_over_r=2),
        "LoRA, FFN": equal_budget_lora(backbone, BUDGET, FFN, lora_alpha_over_r=4),
        "molora": fit_to_budget(backbone, from_catalogue("molora"), BUDGET),
    }
    settings = TrialSettings(learning_rate=LEARNING_RATE, steps=steps, seed=seed)
    adapted = model
    with _progress(console) as progress:
        for label, config in contenders.items():
            model = adapted.unload() if isinstance(adapted, PeftModel) else adapted
            adapted = _train(model, tokenizer, suite, config, settings, progress, f"{label}, rank {config.r}")
            table[label] = _score(adapted, tokenizer, suite, count_parameters(adapted).trainable)
    console.print(_score_table(table, suite))
    console.print(f"molora: {budget_line(adapted)}.\n")
    adapted.eval()
    reload_error = _prove_reload(console, adapted, tokenizer, suite, output_dir / "molora")
    merged = _merge(console, adapted, tokenizer, suite, output_dir / "merged_lora")
    _report(console, adapted, tokenizer, suite, output_dir)
    result = {
        "seed": seed,
        "steps": steps,
        "scores": {name: row._asdict() for name, row in table.items()},
        "reload_max_logit_difference": reload_error,
        "merge": merged,
        "seconds": time.monotonic() - started,
    }
    (output_dir / "demo.json").write_text(json.dumps(result, indent=1))
    console.print(f"\n{result['seconds']:.0f} s in all. Everything is in [bold]{output_dir}[/bold]. Next:")
    console.print(f"  moe-peft inspect {output_dir / 'molora'}")
    console.print("  moe-peft train --adapter molora --model YOUR_MODEL --dataset YOUR_DATA --output_dir out")
    return result


def _introduce(console: Console, suite: Suite) -> None:
    console.print("[bold]moe-peft demo[/bold]: eight domains that contradict each other, one 4-bit backbone\n")
    question = suite.test[0]["prompt"][2:]
    shown = [row for row in suite.test if row["prompt"][2:] == question]
    for row in sorted(shown, key=lambda row: row["domain"])[:3]:
        console.print(f"  [dim]{row['prompt']}[/dim][green]{row['completion']}[/green]")
    console.print(f"  ... {len(suite.train)} rows; the tag before the bar decides which answer is right.\n")


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def _train(
    model: Any,
    tokenizer: Any,
    suite: Suite,
    config: PeftConfig,
    settings: TrialSettings,
    progress: Progress,
    label: str,
) -> PeftModel:
    bar = _Bar(progress, label, settings.steps)
    with tempfile.TemporaryDirectory() as scratch:
        adapted, _ = train_adapter(model, tokenizer, suite.train, config, settings, Path(scratch), [bar])
    return adapted


def _score(model: Any, tokenizer: Any, suite: Suite, trainable: int) -> Scored:
    matches = exact_match(model, tokenizer, suite.test)
    known = exact_match(model, tokenizer, knowledge_probe())
    return Scored(per_domain(suite.test, matches), sum(matches) / len(matches), sum(known) / len(known), trainable)


def _score_table(table: dict[str, Scored], suite: Suite) -> Table:
    shown = Table(title="Exact match, percent", caption="old facts: what each still knows of the backbone's own 480")
    shown.add_column("")
    for domain in suite.domains:
        shown.add_column(domain, justify="right")
    for title in ("all", "old facts", "parameters"):
        shown.add_column(title, justify="right", style="bold" if title == "all" else None)
    for name, row in table.items():
        cells = [f"{100 * row.by_domain[domain]:.0f}" for domain in suite.domains]
        shown.add_row(name, *cells, f"{100 * row.score:.0f}", f"{100 * row.knowledge:.0f}", f"{row.trainable:,}")
    return shown


def _batch(tokenizer: Any, rows: list[Row]) -> dict[str, torch.Tensor]:
    """Rows as one right-padded batch with labels on the answers."""
    batch = collate([(row["input_ids"], row["labels"]) for row in tokenized(rows, tokenizer)], tokenizer.pad_token_id)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {key: value.to(device) for key, value in batch.items()}


def _batches(tokenizer: Any, rows: list[Row]) -> list[dict[str, torch.Tensor]]:
    return [_batch(tokenizer, rows[i : i + 64]) for i in range(0, len(rows), 64)]


def _fresh_process_logits(code: str, adapter: Path, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as folder:
        rows, logits = Path(folder) / "rows.pt", Path(folder) / "logits.pt"
        torch.save({k: v for k, v in batch.items() if k != "labels"}, rows)
        command = [sys.executable, "-c", code, str(adapter), str(rows), str(logits), str(POCKET_DIR)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return torch.load(logits)


def _prove_reload(console: Console, model: PeftModel, tokenizer: Any, suite: Suite, folder: Path) -> float:
    """Save, load in a process that knows nothing of this one, compare logits; returns the largest difference."""
    save_adapter(model, folder)
    batch = _batch(tokenizer, suite.test[:16])
    with torch.no_grad():
        here = model(**batch).logits.cpu()
    difference = float((_fresh_process_logits(_RELOAD, folder, batch) - here).abs().max())
    verdict = "[green]equal bit for bit[/green]" if difference == 0 else f"[red]they differ by {difference:.2g}[/red]"
    console.print(f"Saved to {folder}, reloaded in a fresh process: logits {verdict}.\n")
    return difference


def _merge(console: Console, model: PeftModel, tokenizer: Any, suite: Suite, folder: Path) -> dict[str, Any]:
    """One plain LoRA in place of the routed adapter, as `moe-peft merge` makes it, and what it costs."""
    half = len(suite.train) // 2
    calibration = _batches(tokenizer, suite.train[:half])
    merged = merge_static(
        model, calibration, _batches(tokenizer, suite.train[half:]), scored=_batches(tokenizer, suite.test)
    ).measured
    save_static(merged.factors, folder, str(POCKET_DIR))
    rank = max(len(factors.A) for factors in merged.factors.values())
    console.print(merge_table(merged, f"One plain LoRA of rank {rank} in place of the routers"))
    console.print(kept(merged))
    console.print(
        "What it loses is printed, not hidden. Serve the adapter routed (`moe-peft serve`) to keep all of it."
    )
    batch = _batch(tokenizer, suite.test[:16])
    with torch.no_grad(), instead_of_routing(model, merged.factors):
        here = model(**batch).logits.cpu()
    difference = float((_fresh_process_logits(_RELOAD_PLAIN, folder, batch) - here).abs().max())
    console.print(f"{folder} loads with stock PEFT, without this package; logits differ by {difference:.1g}.\n")
    return {name: figures._asdict() for name, figures in merged.figures.items()}


def _report(console: Console, model: PeftModel, tokenizer: Any, suite: Suite, output_dir: Path) -> None:
    batches = {
        f"tag {domain}": [_batch(tokenizer, [row for row in suite.test if row["domain"] == domain])]
        for domain in suite.domains
    }
    report = routing_report(model, batches, answers_only=True)
    report.save(output_dir / "routing.json")
    heat_map(report, output_dir / "routing.png")
    console.print(health_table(report))
    console.print(health_verdict(report))
    console.print(verdict(report))
    console.print(f"Picture: {output_dir / 'routing.png'}")
