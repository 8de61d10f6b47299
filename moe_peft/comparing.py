"""What `moe-peft methods --compare` does: the size of every method on one backbone, and the plain LoRA of the same size.

Nothing is loaded but the backbone's config: all is counted on the meta device.
"""

import copy
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig, LlamaConfig

from moe_peft.budget import ParameterCount, count_config, count_parameters, meta_backbone
from moe_peft.catalogue import entry_folder, from_catalogue, methods
from moe_peft.pocket import POCKET_DIR


LLAMA_2_7B = "the shape of LLaMA-2-7B"
"""What is counted on where no backbone is named: the cards give their figures for it."""


class Comparison(NamedTuple):
    """One method on one backbone.

    Attributes:
        name: in the catalogue.
        count: its parameters, or None where it does not fit the backbone.
        lora_rank: of the plain LoRA on the same modules that comes closest to `count.trainable`; 0 where even rank 1 costs
            more than 1.5 times as much.
        lora_parameters: what that LoRA trains; with `lora_rank` 0, what rank 1 would.
        reason: why it does not fit, else empty.
    """

    name: str
    count: ParameterCount | None
    lora_rank: int = 0
    lora_parameters: int = 0
    reason: str = ""


def compare(backbone: nn.Module, names: Sequence[str]) -> list[Comparison]:
    """Count each of these catalogue entries on a backbone of `meta_backbone`, which is left as it is.

    Raises:
        ValueError: if a name is not in the catalogue.
    """
    for name in names:
        entry_folder(name)
    per_rank: dict[str, int] = {}
    return [_compared(backbone, name, per_rank) for name in names]


def _compared(backbone: nn.Module, name: str, per_rank: dict[str, int]) -> Comparison:
    config = from_catalogue(name)
    config.inference_mode = False
    try:
        adapted = get_peft_model(copy.deepcopy(backbone), config, low_cpu_mem_usage=True)
        count = count_parameters(adapted)
        rank_1 = _rank_1(backbone, adapted.peft_config["default"], per_rank)
    except (ValueError, NotImplementedError) as error:  # no FFN block, no such modules, too few layers
        return Comparison(name, None, reason=str(error).split(". ")[0].strip())
    rank = max(1, round(count.trainable / rank_1)) if rank_1 <= 1.5 * count.trainable else 0
    return Comparison(name, count, rank, max(1, rank) * rank_1)


def _rank_1(backbone: nn.Module, config: PeftConfig, known: dict[str, int]) -> int:
    """What LoRA of rank 1 trains on the modules of `config`, which PEFT has filled in; LoRA is linear in its rank."""
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    where = {field: getattr(config, field, None) for field in fields}
    key = repr({f: sorted(v) if isinstance(v, set) else v for f, v in where.items()})
    if key not in known:
        with warnings.catch_warnings():  # PEFT tells of GPT-2's transposed layers, which it handles itself
            warnings.simplefilter("ignore", UserWarning)
            known[key] = count_config(backbone, LoraConfig(r=1, task_type="CAUSAL_LM", **where)).trainable
    return known[key]


def backbone_config(model: str | None) -> object:
    """The config of a backbone: of a folder with a config.json, of an id on the Hub, or LLaMA-2-7B's shape.

    Raises:
        ValueError: if there is none.
    """
    if model is None:
        return LlamaConfig(intermediate_size=11008, num_hidden_layers=32)
    try:
        return AutoConfig.from_pretrained(str(POCKET_DIR) if model == "pocket" else model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`--model` is '{model}', but must be a folder with a config.json, an id on the Hub or 'pocket' "
            f"({type(error).__name__}). Check the spelling and the connection; without `--model`, {LLAMA_2_7B} is counted."
        ) from error


def print_comparison(console: Console, names: Sequence[str], model: str | None) -> None:
    """Print the table of `compare`, for all of the catalogue where no names are given.

    Raises:
        ValueError: an unknown name or backbone, in words.
    """
    for name in names:
        entry_folder(name)
    rows = compare(meta_backbone(backbone_config(model)), names or methods())
    table = Table(
        title=f"Parameters on {model or LLAMA_2_7B}",
        caption="LoRA: the plain LoRA on the same linear layers whose parameters come closest to the trained ones.",
    )
    for title in ("name", "trained", "used by a token, at most", "in routers", "LoRA of that size"):
        table.add_column(title, overflow="fold", justify="left" if title == "name" else "right")
    for row in rows:
        if row.count is None:
            table.add_row(row.name, "-", "-", "-", f"does not fit: {row.reason}")
            continue
        lora = f"r = {row.lora_rank}: {row.lora_parameters:,}"
        lora = lora if row.lora_rank else f"less than r = 1: {row.lora_parameters:,}"
        table.add_row(row.name, *(f"{n:,}" for n in (row.count.trainable, row.count.active, row.count.router)), lora)
    console.print(table)
