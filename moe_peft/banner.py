"""What a run says before it starts: the versions, the adapter and where it sits, and one row as the model will see it."""

from collections import Counter
from importlib.metadata import version
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from trl import SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

from moe_peft.arguments import Settings
from moe_peft.budget import count_parameters
from moe_peft.card import method_line
from moe_peft.data import Rows


LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
LONGEST_PIECE = 600
"""Characters of one masked or trained stretch of the example before its middle is left out."""


def print_banner(console: Console, trainer: SFTTrainer, settings: Settings, rows: Rows, notes: list[str]) -> None:
    """Print it.

    Args:
        trainer: made, not yet started.
        rows: what it was given to train on.
        notes: sentences that the user should read before the run.
    """
    training, arguments = settings.training, settings.arguments
    model: Any = trainer.model
    parameters = parameter_counts(model)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("versions", ", ".join(f"{name} {version(name)}" for name in installed()))
    table.add_row("device", _device(training.device))
    table.add_row("backbone", f"{arguments.model}, {_precision(model, arguments.load_in)}")
    table.add_row("adapter", f"{settings.source.name}: {method_line(settings.source.config)}")
    table.add_row(
        "parameters",
        f"{parameters['trainable']:,} trainable ({parameters['trainable'] / parameters['total']:.2%} of "
        f"{parameters['total']:,}), of them {parameters['router']:,} in routers; a token uses {parameters['active']:,}",
    )
    table.add_row("targets", matched_targets(model))
    table.add_row("rows", f"{len(rows.dataset):,} of {rows.form}" + _unused(rows))
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    table.add_row("loss on", _loss_on(trainer, settings, rows))
    table.add_row(
        "step", f"{batch} rows, learning rate {training.learning_rate:g} ({_word(training.lr_scheduler_type)})"
    )
    console.print(table)
    for note in notes:
        console.print(f"[yellow]{note}[/yellow]")
    console.print(Text("first row, what is not trained is dimmed:", style="bold"))
    first: Any = trainer.train_dataset
    console.print(example(first[0], trainer.processing_class))
    console.print()


def installed() -> list[str]:
    """Those of `LIBRARIES` that are there."""
    found = []
    for name in LIBRARIES:
        try:
            version(name)
        except ImportError:  # PackageNotFoundError is one
            continue
        found.append(name)
    return found


def parameter_counts(model: Any) -> dict[str, int]:
    """`trainable`, `router`, `active` (what one token uses) and `total`, packed 4-bit weights counted in full."""
    count = count_parameters(model)
    return {
        "trainable": count.trainable,
        "router": count.router,
        "active": count.active,
        "total": model.get_nb_trainable_parameters()[1],
    }


def matched_targets(model: nn.Module) -> str:
    """`"q_proj x4, v_proj x4 (8 layers; 2-8 experts, rank 8)"`."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    counts = Counter(name.rsplit(".", 1)[-1] for name in layers)
    experts = sorted({n for layer in layers.values() for n in getattr(layer, "num_experts", {}).values()})
    ranks = sorted({n for layer in layers.values() for n in getattr(layer, "r", {}).values()})
    inside = [f"{len(layers)} layers"]
    if experts:
        inside.append(f"{_span(experts)} experts")
    if ranks:
        inside.append(f"rank {_span(ranks)}")
    return ", ".join(f"{name} x{count}" for name, count in counts.items()) + f" ({'; '.join(inside)})"


def example(row: dict[str, Any], tokenizer: Any) -> Text:
    """A tokenised row as text, with what the loss does not count dimmed."""
    ids, labels = row["input_ids"], row["labels"]
    text, start = Text(), 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (labels[end] == -100) != (labels[start] == -100):
            piece = tokenizer.decode(ids[start:end])
            if len(piece) > LONGEST_PIECE:
                piece = f"{piece[: LONGEST_PIECE // 2]} [...] {piece[-LONGEST_PIECE // 2 :]}"
            text.append(piece, style="dim" if labels[start] == -100 else "")
            start = end
    return text


def _word(value: Any) -> str:
    """An enum member as its value, which is what users write."""
    return str(getattr(value, "value", value))


def _span(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return f"{device} {properties.name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def _precision(model: nn.Module, load_in: str | None) -> str:
    dtypes = Counter(p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad)
    dtype = str(dtypes.most_common(1)[0][0]).removeprefix("torch.") if dtypes else "unknown dtype"
    if getattr(model, "is_loaded_in_4bit", False):
        return f"4 bits, the rest in {dtype}"
    return f"8 bits, the rest in {dtype}" if getattr(model, "is_loaded_in_8bit", False) else dtype


def _unused(rows: Rows) -> str:
    return f"; not used: {', '.join(rows.unused)}" if rows.unused else ""


def _loss_on(trainer: SFTTrainer, settings: Settings, rows: Rows) -> str:
    if settings.training.assistant_only_loss:
        return "the assistant's turns"
    if trainer.completion_only_loss and "prompt" in rows.dataset.column_names:
        return "the completion"
    return "every token"
