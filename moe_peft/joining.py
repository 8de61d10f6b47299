"""What `moe-peft join` does: ready LoRAs as the named experts of one adapter, under a gate that needs no training."""

from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.table import Table

from moe_peft.domain_config import TRAINED_GATES, TRAINING_FREE
from moe_peft.domain_loras import from_loras
from moe_peft.errors import nearest, refuse
from moe_peft.export.writer import check_is_free
from moe_peft.gate_accuracy import gate_accuracy
from moe_peft.loaded import adapters_backbone, batches_of
from moe_peft.prototypes import set_null_threshold, set_prototypes
from moe_peft.saving import save_adapter


GATES = (*TRAINING_FREE, "given")
"""Gates that `join` makes."""

Texts = dict[str, list[dict[str, Any]]]


def join_loras(
    console: Console,
    loras: list[str],
    output: Path,
    gate: str = "prototype",
    data: str | None = None,
    by: str = "domain",
    unknown: str | None = None,
    limit: int = 256,
    model: str | None = None,
) -> None:
    """Join, find where each domain's prompts go, save.

    Args:
        loras: `name=folder` each; an id on the Hub is a folder too.
        data: labelled rows; "prototype" is made of three quarters of each domain's, and tried on the rest.
        by: the column of `data` with the domain's name.
        unknown: rows that no domain is for: then prompts like these fall to the base model.
        limit: at most this many rows of each file.
        model: the backbone, if not the one that the LoRAs name.

    Raises:
        ValueError: what is no list of named LoRAs, whatever `from_loras` refuses, a gate that learns, text that is
            missing, not wanted, or of other domains. Nothing is written then.
    """
    named = _named(loras)
    _check(gate, data, unknown)
    check_is_free(output)
    _, tokenizer = adapters_backbone(next(iter(named.values())), model)
    text = batches_of(data, tokenizer, by, limit, batch_size=1) if data is not None else {}
    _check_domains(text, list(named), by)
    joined = from_loras(named, model, gate=gate).eval()
    made, tried = _split(text)
    if gate == "prototype":
        set_prototypes(joined, made)
    if unknown is not None:
        _turn_away(console, joined, tried, batches_of(unknown, tokenizer, limit=limit)["all"])
    save_adapter(joined, output)
    console.print(_table(joined, gate_accuracy(joined, tried) if tried and gate != "given" else {}))
    by_hand = '`generate(domain="NAME")`' if gate == "given" else f"`moe-peft inspect {output} --data ROWS --by {by}`"
    console.print(
        f"Written to {output}: {len(named)} experts, each exactly its LoRA. Next: {by_hand}.", soft_wrap=True
    )


def _named(loras: list[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for entry in loras:
        name, equals, folder = entry.partition("=")
        if not (name and equals and folder):
            raise refuse(
                "loras", entry, "a name and a folder, as law=loras/law", "The name is what the expert is called."
            )
        if name in named:
            raise refuse(
                "loras", entry, f"of another name: '{name}' is {named[name]} already", "Names tell experts apart."
            )
        named[name] = folder
    return named


def _check(gate: str, data: str | None, unknown: str | None) -> None:
    if gate not in GATES:
        remedy = nearest(gate, GATES)
        if gate in TRAINED_GATES:
            remedy = "That one learns: `moe_peft.from_loras` joins the LoRAs for a trainer, `train_scripts/domains.py` trains both."
        raise refuse("--gate", gate, "one of " + ", ".join(map(repr, GATES)), remedy)
    if data is None and gate == "prototype":
        remedy = "A few dozen prompts of each domain are enough; `--gate arrow` needs no text."
        raise refuse("--data", None, "rows with a column of domains, of which prototypes are made", remedy)
    if unknown is not None and gate != "prototype":
        remedy = "Others have no score that a strange prompt could fall short of."
        raise refuse("--unknown", unknown, "left out without `--gate prototype`", remedy)


def _check_domains(text: Texts, names: list[str], by: str) -> None:
    """Every domain of the text has an expert; that each has text is for `set_prototypes` to say."""
    for domain in text:
        if domain not in names:
            allowed = "names of the LoRAs: " + ", ".join(map(repr, names))
            raise refuse(f"--by {by}", domain, allowed, nearest(domain, names))


def _split(text: Texts) -> tuple[Texts, Texts]:
    """Of each domain the rows that prototypes are made of, and those that the gate is tried on; few rows are both."""
    made, tried = {}, {}
    for domain, rows in text.items():
        cut = len(rows) - len(rows) // 4
        made[domain], tried[domain] = rows[:cut], rows[cut:] or rows
    return made, tried


def _turn_away(console: Console, joined: PeftModel, known: Texts, unknown: list[dict[str, Any]]) -> None:
    found = set_null_threshold(joined, [batch for rows in known.values() for batch in rows], unknown)
    console.print(
        f"Prompts that fit no domain fall to the base model: of the known ones {found.kept:.0%} stay, of the unknown ones "
        f"{found.rejected or 0:.0%} are turned away.",
        soft_wrap=True,
    )


def _table(joined: PeftModel, right: dict[str, float]) -> Table:
    config: Any = joined.peft_config["default"]
    table = Table(title=f"Experts under the gate '{config.gate}'")
    for title in ("expert", "rank", *(["prompts that it gets of its own"] if right else [])):
        table.add_column(title, justify="left" if title == "expert" else "right")
    ranks = config.domain_ranks or [config.r] * len(config.names)
    for name, r in zip(config.names, ranks, strict=True):
        table.add_row(name, str(r), *([f"{right[name]:.0%}"] if right else []))
    return table
