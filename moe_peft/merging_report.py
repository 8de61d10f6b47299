"""What `moe-peft merge-loras` does: merge plain LoRAs, print what became of each, measure it where text is given."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_peft.agreement import Agreement
from moe_peft.errors import refuse
from moe_peft.loaded import batches_of, load_adapter
from moe_peft.merging_loras import RECORD_FILE, MergedLoras, merge_loras
from moe_peft.shrinking import measure_adapters


def merge_plain_loras(
    console: Console,
    loras: list[str],
    output: Path,
    method: str,
    weights: list[float] | None,
    density: float | None,
    rank: int | None,
    held_out: list[str],
    limit: int,
    model: str | None,
    load_in: str,
) -> None:
    """Merge, print, measure; the figures go into the record beside the weights.

    Raises:
        ValueError: whatever `merge_loras` refuses; text that is neither one for all nor one for each LoRA.
    """
    if len(held_out) not in (0, 1, len(loras)):
        allowed = f"given once, or {len(loras)} times, once for each LoRA"
        raise refuse("--held-out", held_out, allowed, "In the order of the LoRAs.")
    merged = merge_loras(loras, output, method, weights, density, rank)
    found = _measured(loras, output, merged, held_out, limit, model, load_in) if held_out else {}
    console.print(merged_table(merged, found))
    worst = max(merged.errors, key=lambda module: merged.errors[module])
    if merged.errors[worst]:
        console.print(
            f"Cut to rank {merged.ranks[worst]}; the largest error of that: {worst}, {merged.errors[worst]:.0%}."
        )
    measured = "" if held_out else " Nothing was measured: give `--held-out` text to see what each LoRA loses."
    console.print(f"Written to {output}: a plain PEFT LoRA.{measured}")


def _measured(
    loras: list[str],
    output: Path,
    merged: MergedLoras,
    held_out: list[str],
    limit: int,
    model: str | None,
    load_in: str,
) -> dict[str, Agreement]:
    """Name -> the LoRA by itself and the merged one on its text, also written into the record."""
    adapted, tokenizer = load_adapter(loras[0], model, load_in)
    adapted.load_adapter(str(output), "merged")
    found = {}
    for number, (name, lora) in enumerate(zip(merged.names, loras, strict=True)):
        if number:
            adapted.load_adapter(lora, "alone")
        text = batches_of(held_out[number if len(held_out) > 1 else 0], tokenizer, limit=limit)["all"]
        found[name] = measure_adapters(adapted.eval(), text, "alone" if number else "default", "merged")
        if number:
            adapted.delete_adapter("alone")
    path = output / RECORD_FILE
    record = json.loads(path.read_text())
    record["held_out"] = held_out
    record["measured"] = {name: agreement._asdict() for name, agreement in found.items()}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1))
    temporary.replace(path)
    return found


def merged_table(merged: MergedLoras, found: dict[str, Agreement]) -> Table:
    """One row for each LoRA: its weight, how much of its direction is left and, where measured, what it loses."""
    ranks = sorted(set(merged.ranks.values()))
    table = Table(title=f"Merged into one LoRA of rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else ""))
    titles = ["", "weight", "cosine with the result"]
    if found:
        table.caption = "each LoRA on its text: without it, with it alone, with the merged one"
        titles += ["base loss", "own loss", "merged loss", "KL from own", "same top token"]
    for title in titles:
        table.add_column(title, justify="right")
    for name, weight in zip(merged.names, merged.weights, strict=True):
        cells: list[Any] = [name, f"{weight:g}", f"{merged.likeness[name]:.2f}"]
        if name in found:
            a = found[name]
            cells += [f"{a.loss_base:.3f}", f"{a.loss_routed:.3f}", f"{a.loss_merged:.3f}", f"{a.kl_merged:.3f}",
                      f"{a.top1_merged:.0%}"]  # fmt: skip
        table.add_row(*cells)
    return table
