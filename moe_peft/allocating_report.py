"""What `moe-peft allocate` does: measure, choose, show as a table and a picture, write a folder to train from."""

import json
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from moe_peft.allocating import Allocated, Layer, allocate
from moe_peft.catalogue import RECIPE_FILE, AdapterSource, adapter_config
from moe_peft.errors import refuse
from moe_peft.pictures import pyplot
from moe_peft.plain_yaml import pairs
from moe_peft.saving import begin, put_in_place


RECORD_FILE, PICTURE_FILE = "allocation.json", "allocation.png"

_OF_THE_RUN = ("adapter", "set", "model", "tokenizer", "dataset", "output_dir")
"""What the recipe of a trained adapter says about its own run."""


def allocate_adapter(
    console: Console,
    adapter: str,
    model: str,
    data: str,
    output: Path,
    budget: str | None,
    choose: str,
    min_experts: int | None,
    max_experts: int | None,
    max_rank: int | None,
    overrides: list[str],
    limit: int,
    batch_size: int,
    load_in: str,
) -> None:
    """Choose experts or rank for each layer by what text shows, and write a folder that `train --adapter` takes.

    Raises:
        ValueError: an output that is not empty, or an adapter, model, text, budget or bound that cannot be used.
    """
    import torch

    from moe_peft.backbone import load_backbone, load_tokenizer
    from moe_peft.export.writer import check_is_free
    from moe_peft.loaded import batches_of

    check_is_free(output)
    if batch_size < 1:
        raise refuse("batch_size", batch_size, "a whole number of at least 1", "8 is the default.")
    source = adapter_config(adapter, **pairs(overrides))
    tokenizer = load_tokenizer(model)
    batches = batches_of(data, tokenizer, limit=limit, batch_size=batch_size)["all"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone = load_backbone(
        model, load_in, device, dtype=torch.bfloat16 if device == "cuda" else torch.float32
    )  # in the precision that `train` and `inspect` use
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=None)
        found = allocate(
            backbone,
            batches,
            source.config,
            budget,
            choose,
            min_experts,
            max_experts,
            max_rank,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(allocation_table(found))
    console.print(in_words(found))
    write_allocation(found, output, source, {"model": model, "data": data, "limit": limit})
    console.print(f"Written to {output}: the config, {RECORD_FILE} and {PICTURE_FILE}. Train it:")
    line = f"  moe-peft train --adapter {output} --model {model} --dataset {data.partition('#')[0]}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def allocation_table(found: Allocated) -> Table:
    """One row per adapted layer, for a terminal."""
    table = Table(
        title="Experts and rank by layer",
        caption="gain: what the text lets the layer lower the loss by, nats per token, to second order; next: what one more "
        "step would add",
    )
    for title in ("layer", "gain of the least", "gain", "next", "experts", "rank", "parameters"):
        table.add_column(title, justify="right")
    for layer, (n, m) in zip(found.layers, found.picks, strict=True):
        more = _next_step(layer, n, m)
        table.add_row(
            str(layer.number),
            f"{layer.gain[0][0]:.3f}",
            f"{layer.gain[n][m]:.3f}",
            "–" if more is None else f"{more:.3f}",
            str(layer.experts[n]),
            str(layer.ranks[m]),
            f"{layer.cost[n][m]:,}",
        )
    return table


def _next_step(layer: Layer, n: int, m: int) -> float | None:
    """The most that one step up would add; None at the top."""
    gains = [row[m] for row in layer.gain[n + 1 : n + 2]] + layer.gain[n][m + 1 : m + 2]
    return max(gains) - layer.gain[n][m] if gains else None


def in_words(found: Allocated) -> str:
    """The lists, and how near the budget they come."""
    lists = [f"{name}={getattr(found.config, name)}" for name in ("num_experts", "r")]
    return f"{', '.join(lists)}: {found.trainable:,} trainable parameters of {found.budget:,}."


def record_of(found: Allocated, about: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured and chosen, as plain data."""
    layers = [
        {**layer._asdict(), "chosen": {"experts": layer.experts[n], "rank": layer.ranks[m]}}
        for layer, (n, m) in zip(found.layers, found.picks, strict=True)
    ]
    numbers = {"num_experts": found.config.num_experts, "r": found.config.r}
    return {
        **about,
        "choose": found.chosen,
        "budget": found.budget,
        "trainable": found.trainable,
        **numbers,
        "layers": layers,
    }


def write_allocation(found: Allocated, output: Path, source: AdapterSource, about: dict[str, Any]) -> None:
    """The config, the method's recipe, the figures and the picture, in one step.

    Args:
        output: a folder; files of other names are left alone.
        source: where the config came from, whose recipe goes along.
        about: goes into the record.
    """
    beside = begin(output)
    found.config.save_pretrained(str(beside))
    recipe = {key: value for key, value in source.recipe.items() if key not in _OF_THE_RUN}
    if recipe:
        said = f"# As for '{source.name}', from which experts and rank were chosen by layer.\n"
        (beside / RECIPE_FILE).write_text(said + yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    record = record_of(found, {"adapter": source.name, **about})
    (beside / RECORD_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    draw_allocation(found, beside / PICTURE_FILE)
    put_in_place(beside, output)


def draw_allocation(found: Allocated, path: Path) -> None:
    """Draw as a PNG what each layer has to gain, and what it was given.

    Raises:
        ImportError: without matplotlib (`pip install matplotlib scipy`).
    """
    plt = pyplot()
    by_rank = found.chosen == "rank"
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    colors = plt.get_cmap("viridis")([0.9 * i / max(1, len(found.layers) - 1) for i in range(len(found.layers))])
    for color, layer, (n, m) in zip(colors, found.layers, found.picks, strict=True):
        x = layer.ranks if by_rank else layer.experts
        y = layer.gain[n] if by_rank else [row[m] for row in layer.gain]
        left.plot(x, y, "-", color=color, label=f"layer {layer.number}")
        left.plot(x[m if by_rank else n], y[m if by_rank else n], "o", color=color)
    left.set_xlabel("rank" if by_rank else "experts")
    left.set_ylabel("gain, nats per token")
    left.set_title("What each layer has to gain (dot: chosen)")
    if len(found.layers) <= 12:
        left.legend(fontsize=8)
    names = [str(layer.number) for layer in found.layers]
    chosen = [(layer.experts[n], layer.ranks[m]) for layer, (n, m) in zip(found.layers, found.picks, strict=True)]
    bars = right.bar(names, [rank if by_rank else experts for experts, rank in chosen], color=colors)
    if found.chosen == "both":
        right.bar_label(bars, [f"r {rank}" for _, rank in chosen])
    right.set_xlabel("layer")
    right.set_ylabel("rank" if by_rank else "experts")
    right.set_title(f"{found.trainable:,} trainable parameters of {found.budget:,}")
    figure.savefig(path, dpi=120)
    plt.close(figure)
