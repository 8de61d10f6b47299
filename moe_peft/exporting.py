"""What `moe-peft export` and `moe-peft import` do: look, say what will be, write, say what came of it."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moe_peft.catalogue import CONFIG_FILE
from moe_peft.errors import nearest, refuse


ROUTES = ("moe",)
"""The values of `--to`."""


def export_adapter(
    console: Console,
    adapter: str,
    to: str,
    output: Path | None,
    check: bool,
    model: str | None,
    target: str,
    base_weights: str,
    dtype: str,
    max_shard_size: str,
    verify: bool,
) -> None:
    """Print the plan and, unless only that is wanted, write the checkpoint.

    Raises:
        ValueError: an unknown route, no folder to write to, or whatever stands against the export.
    """
    from moe_peft.export import plan_export
    from moe_peft.export.stock_moe import RECORD_FILE, carry_out
    from moe_peft.export.writer import check_is_free

    if to not in ROUTES:
        raise refuse("--to", to, "'moe', a stock Mixture-of-Experts checkpoint", nearest(to, ROUTES))
    if output is None and not check:
        raise refuse("--output", None, "a new or empty folder", "Or pass --check to see the plan without writing.")
    if output is not None:
        check_is_free(output)
    plan = plan_export(model or named_base(adapter), adapter, target, base_weights, dtype)
    table = Table("", "", title="Export to a stock MoE checkpoint", show_header=False)
    for title, text in plan.rows():
        table.add_row(title, text)
    console.print(table)
    if check or output is None:
        console.print("Nothing was written.")
        return
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=plan.nbytes)
        carry_out(
            plan,
            output,
            max_shard_size,
            verify,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(f"Written to {output}. `transformers`, vLLM and others load it without this package.")
    console.print(_checked(json.loads((output / RECORD_FILE).read_text())["check"]))


def _checked(figures: dict[str, Any]) -> str:
    """What the self-check measured, or why it did not."""
    if not figures["done"]:
        return f"It was not compared with the adapter: {figures['why']}."
    return (
        f"Compared with the adapter on its backbone, {figures['layers']} layers, {figures['tokens']} tokens: in fp32 the logits "
        f"differ by {figures['fp32_largest_relative_error']:.1e} of the largest; as stored by "
        f"{figures['stored_relative_error_rms']:.1e} (root mean square), and {figures['stored_same_top_token']:.0%} of the "
        "tokens have the same first choice."
    )


def named_base(adapter: str) -> str:
    """The backbone that the adapter's config names."""
    from moe_peft.export.checkpoint import local_folder
    from moe_peft.loaded import backbone_named

    path = local_folder(adapter) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(
            f"'{adapter}' holds no adapter: there is no {CONFIG_FILE} in it. Give the folder that training wrote."
        )
    return backbone_named(json.loads(path.read_text()).get("base_model_name_or_path"))


def import_checkpoint(console: Console, source: str, output: Path, model: str | None) -> None:
    """Convert a MixLoRA checkpoint and print what became of it."""
    from moe_peft.importing import import_mixlora

    report = import_mixlora(source, output, model)
    for warning in report.warnings:
        console.print(f"[yellow]warning[/]: {warning}")
    console.print(
        f"Written to {output}: {report.parameters:,} parameters in {report.tensors} tensors, {report.experts} experts in "
        f"each of {report.layers} layers, routing '{report.config.routing}'."
    )
