"""What `moe-peft inspect` does: load an adapter, look at it, print."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoConfig

from moe_peft.bottleneck_config import REDUCTION, BottleneckMoeConfig
from moe_peft.budget import count_parameters, equal_budget_lora, meta_backbone, train_as_configured
from moe_peft.config import MoeConfig
from moe_peft.domain_config import TRAINED_GATES, DomainMoeConfig
from moe_peft.loaded import batches_of, load_adapter
from moe_peft.merge import routed_layers
from moe_peft.report import health_table, health_verdict, heat_map, routing_report, verdict
from moe_peft.shard_config import ShardPoolConfig


def inspect_adapter(
    console: Console,
    adapter: str,
    model: str | None,
    data: str | None,
    by: str | None,
    limit: int,
    output: Path | None,
    load_in: str,
) -> None:
    """Print what an adapter is and, with data, how its routers do.

    Raises:
        ValueError: an adapter, model or data that cannot be used, in words.
    """
    if by is not None and data is None:
        raise ValueError(
            f"`--by` is '{by}', but there is no `--data` whose column it could be. Give `--data` as well."
        )
    adapted, tokenizer = load_adapter(adapter, model, load_in)
    train_as_configured(adapted)  # loaded for inference; counted as trained
    config = adapted.peft_config["default"]
    if not isinstance(config, (MoeConfig, ShardPoolConfig, BottleneckMoeConfig)):
        kind = config.peft_type.value
        raise ValueError(f"'{adapter}' is a {kind} adapter, without routers to look into. Give a routed adapter.")
    count = count_parameters(adapted)
    backbone = meta_backbone(AutoConfig.from_pretrained(adapted.get_base_model().config.name_or_path))
    modules = sorted(routed_layers(adapted))
    targets = sorted({name.rsplit(".", 1)[-1] for name in modules})
    table = Table(title=f"{adapter}: {config.peft_type.value}", show_header=False)
    for title, text in _rows(config):
        table.add_row(title, text)
    table.add_row("adapted layers", f"{count.layers}: {', '.join(targets)}")
    table.add_row("trained parameters", f"{count.trainable:,}, of them {count.router:,} in routers")
    table.add_row("used by a token", f"{count.active:,}")
    for label, budget in (("trained", count.trainable), ("used", count.active)):
        table.add_row(f"LoRA with as many {label}", _equal_rank(backbone, budget, modules))
    console.print(table)
    if data is None and isinstance(config, ShardPoolConfig):
        console.print("It has no router, and is one plain LoRA: `moe-peft merge` writes it, exactly.")
        return
    if data is None:
        console.print("Give --data FILE (and --by COLUMN) to route text and see which expert answers what.")
        return
    report = routing_report(adapted, batches_of(data, tokenizer, by, limit), answers_only=True)
    console.print(health_table(report))
    console.print(health_verdict(report))
    console.print(verdict(report))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        report.save(output / "routing.json")
        heat_map(report, output / "routing.png")
        console.print(f"Written: {output / 'routing.json'}, {output / 'routing.png'}")


def _rows(config: MoeConfig | ShardPoolConfig | BottleneckMoeConfig) -> list[tuple[str, str]]:
    """What an adapter is made of, title and text."""
    if isinstance(config, BottleneckMoeConfig):
        width = config.bottleneck_size or f"a {REDUCTION}th of the input"
        return [
            ("domains", ", ".join(config.domains or ()) + (", frozen" if config.freeze_domains else "")),
            ("bottleneck", f"{width}"),
            ("gate", config.gate + (f", on {config.gate_input}" if config.gate_input else "")),
            ("the task's LoRA", f"rank {config.r}" if config.r else "none"),
        ]
    if isinstance(config, ShardPoolConfig):
        rows = [("rank of a layer", f"{config.r}")]
        if config.shares:
            shards = f"{config.shards_per_vector} shards for a vector"
            rows.append(("shared pools", f"as large as rank {config.equivalent_rank}; {shards}"))
            rows.append(("of a layer alone", f"{config.private_rank} of its ranks"))
        if config.num_splits > 1:
            rows.append(("splits", f"{config.num_splits}, of {config.split_factors}"))
        return rows
    visited = f"top {config.top_k}" if config.top_k else ""
    if isinstance(config, DomainMoeConfig):
        ranks = config.domain_ranks or [config.r] * len(config.names)
        named = ", ".join(f"{name} (rank {r})" for name, r in zip(config.names, ranks, strict=True))
        learns = f"learns from {config.gate_training}" if config.gate in TRAINED_GATES else "not trained"
        return [("domains", named), ("gate", f"{config.gate} {visited}; {learns}")]
    distinct = getattr(config, "num_distinct_experts", None)
    merged = "" if distinct is None else f" ({distinct} with weights of their own)"
    return [
        ("experts", f"{config.num_experts} of rank {config.r}{merged}, {config.num_shared_experts} shared"),
        ("routing", f"{config.routing} {visited}; balance {config.balance}"),
    ]


def _equal_rank(backbone: nn.Module, budget: int, modules: list[str]) -> str:
    try:
        return f"r = {equal_budget_lora(backbone, budget, modules).r}"
    except ValueError:
        return "less than r = 1"
