"""The card of an adapter (README.md): sections between marks, filled from what is known and left out where it is not.

Everything outside the marks belongs to whoever wrote it: PEFT's own text, its metadata and a user's paragraphs stay as
they are, however often the card is written. A section that nothing new is known of stays as well.
"""

import copy
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel

from moe_peft.budget import count_parameters, equal_budget_lora, meta_backbone
from moe_peft.catalogue import CARD_FILE, CONFIG_FILE, RECIPE_FILE
from moe_peft.merge import routed_layers


SECTIONS = ("title", "method", "data", "settings", "parameters", "routers", "merge", "shrink", "export")
"""In this order they stand in a card."""

TAGS = ("mixture-of-lora-experts",)

_NOTE = "rewritten by moe_peft when it saves; write outside of it"


def update_card(
    folder: str | Path,
    sections: dict[str, str],
    base_model: str | None = None,
    library: str = "peft",
    before: str | None = None,
) -> None:
    """Put sections into the folder's card, each in the place of the one of its name; the file is replaced in one step.

    Args:
        folder: gets README.md if it has none.
        sections: name (of `SECTIONS`) -> Markdown; empty ones are left out.
        base_model, library: for the metadata, where it does not say.
        before: the card to start from, in the place of the one in the folder.
    """
    path = Path(folder) / CARD_FILE
    text = before if before is not None else path.read_text(encoding="utf-8") if path.is_file() else ""
    try:
        card = ModelCard(text, ignore_metadata_errors=False) if text.startswith("---") else None
    except Exception as error:  # whatever YAML and the Hub's checks say of it
        warnings.warn(
            f"`{path}` was left as it is: its metadata cannot be read ({str(error).splitlines()[0]}).", stacklevel=2
        )
        return
    body = with_sections(text if card is None else card.text, sections)
    card = ModelCard("---\n{}\n---\n") if card is None else card
    card.data["library_name"] = card.data.get("library_name") or library
    if base_model and not card.data.get("base_model"):
        card.data["base_model"] = base_model
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *TAGS]))
    card.text = body
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(str(card), encoding="utf-8")
    os.replace(temporary, path)


def with_sections(text: str, sections: dict[str, str]) -> str:
    """`text` with the sections in it: in the place of the same section, or behind the one that comes before it.

    What is not between a section's own two marks is never touched, also where somebody has removed one of them.
    """
    for number, name in enumerate(SECTIONS):
        if not sections.get(name):
            continue
        block = f"<!-- moe_peft: {name} ({_NOTE}) -->\n{sections[name].strip()}\n<!-- /moe_peft: {name} -->"
        old = _found(text, name)
        if old is not None:
            text = text[: old.start()] + block + text[old.end() :]
            continue
        earlier = [found.end() for other in SECTIONS[:number] if (found := _found(text, other)) is not None]
        place = max(earlier, default=0)
        text = text[:place] + ("\n\n" if place else "") + block + ("\n\n" if not place else "") + text[place:]
    return text


def _found(text: str, name: str) -> re.Match[str] | None:
    """A section with both marks; it does not reach over the beginning of another."""
    return re.search(
        rf"<!-- moe_peft: {name} \([^)]*\) -->(?:(?!<!-- moe_peft: ).)*?<!-- /moe_peft: {name} -->", text, re.DOTALL
    )


def sections_of(folder: str | Path) -> dict[str, str]:
    """The sections of the folder's card, without their marks; none without a card."""
    path = Path(folder) / CARD_FILE
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = {name: _found(text, name) for name in SECTIONS}
    return {name: re.sub(r"<!--.*?-->", "", m.group(), flags=re.DOTALL).strip() for name, m in found.items() if m}


# --- of an adapter on its model ---


def title_section(name: str, base_model: str | None, ours: bool) -> str:
    """Heading, and how to load it."""
    on = f" on {base_model.rstrip('/').rsplit('/', 1)[-1]}" if base_model else ""
    base = f'"{base_model}"' if base_model else '"THE_BACKBONE"'
    imports = "import moe_peft  # registers the adapter type\n" if ours else ""
    return f"""# {name}{on}

```python
{imports}from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(model, "PATH_OF_THIS_FOLDER")
```"""


def method_line(config: Any) -> str:
    """`"LINEAR_MOE, 8 experts of rank 8, softmax_top_k, top 2, balance switch x 0.001"`."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if not hasattr(config, "routing"):
        return kind
    chosen = f", top {config.top_k}" if config.top_k else ""
    balance = "" if config.balance == "none" else f" x {config.router_aux_loss_coef:g}"
    ranks = config.num_experts is None  # each of them an expert
    experts = f"{config.r} ranks" if ranks else f"{config.num_experts} experts of rank {config.r}"
    if getattr(config, "num_distinct_experts", None) is not None:
        experts += f" ({config.num_distinct_experts} with weights of their own)"
    return f"{kind}, {experts}, {config.routing}{chosen}, balance {config.balance}{balance}"


def data_section(dataset: str | None, history: list[dict[str, Any]] | None = None) -> str:
    """On what the adapter was trained, and the last losses; empty where nobody has said.

    Args:
        history: the trainer's log.
    """
    if not dataset:
        return ""
    entries = (history or [])[-3:]
    losses = [f"{key} {e[key]:.4f}" for e in entries for key in ("train_loss", "eval_loss") if key in e]
    said = f"Trained on `{dataset}` with TRL ({', '.join(losses) or 'no loss logged'})"
    return f"## Data\n\n{said}; `{RECIPE_FILE}` has every setting."


def parameters_section(model: Any, adapter_name: str = "default") -> str:
    """Parameters, and the plain LoRA that has as many; empty where nothing is trained now."""
    count = count_parameters(model, adapter_name)
    if not count.trainable:
        return ""
    rows = [("trained", count.trainable, _equal_rank(model, count.trainable, adapter_name))]
    rows.append(("used by a token", count.active, _equal_rank(model, count.active, adapter_name)))
    rows.append(("of them in routers", count.router, ""))
    table = _table(("", "parameters", "plain LoRA of that size on the same layers"), [
        (title, f"{number:,}", rank) for title, number, rank in rows])  # fmt: skip
    return f"## Parameters\n\n{table}"


def _equal_rank(model: Any, budget: int, adapter_name: str) -> str:
    if not hasattr(model.peft_config[adapter_name], "plugin"):
        return ""
    config = copy.deepcopy(model.get_base_model().config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    try:
        modules = sorted(routed_layers(model, adapter_name))
        return f"r = {equal_budget_lora(meta_backbone(config), budget, modules).r}"
    except (ValueError, AttributeError):  # smaller than any LoRA; no causal language model
        return ""


def settings_section(log: dict[str, Any]) -> str:
    """From a run's `training_log.json`: every setting, versions, device, time."""
    rows = [(f"`{key}`", f"`{value}`") for key, value in (log.get("settings") or {}).items()]
    versions = ", ".join(f"{name} {number}" for name, number in (log.get("versions") or {}).items())
    rows += [(title, str(value)) for title, value in (
        ("versions", versions), ("device", log.get("device")), ("seconds", log.get("seconds"))) if value]  # fmt: skip
    return "## Settings of the run\n\n" + _table(("", ""), rows) if rows else ""


# --- from reports ---


def routers_section(report: dict[str, Any]) -> str:
    """From the JSON of a routing report: one row for each router."""
    layers = report.get("layers") or {}
    rows = [
        (f"`{name}`", f"{h['max_load']:.2f}", f"{h['entropy']:.2f}", str(h["dead"]), f"{h['domain_information']:.0%}")
        for name, h in layers.items()
    ]
    if not rows:
        return ""
    told = f"Text of {len(report['domains'])} domains." if len(report["domains"]) > 1 else "Text of one domain."
    head = ("router", "busiest expert (1 is even)", "entropy (0 certain, 1 undecided)", "dead", "tells the domain")
    return f"## Router health\n\n{told}\n\n{_table(head, rows)}"


def agreement_rows(record: dict[str, Any], name: str) -> list[tuple[str, ...]]:
    """Base, routed and `name`: loss, KL from routed, share of equal top tokens; none where they were not measured."""
    if any(f"{what}_merged" not in record for what in ("loss", "kl", "top1")):
        return []
    rows = [("base", record["loss_base"], record["kl_base"], record["top1_base"])]
    rows.append(("routed", record["loss_routed"], 0.0, 1.0))
    rows.append((name, record["loss_merged"], record["kl_merged"], record["top1_merged"]))
    return [(title, f"{loss:.3f}", f"{kl:.4f}", f"{top1:.1%}") for title, loss, kl, top1 in rows]


_AGREEMENT = ("", "loss", "KL from routed", "same top token")


def merge_section(record: dict[str, Any]) -> str:
    """From the record beside a static merge, or beside LoRAs merged into one."""
    if "loras" in record:
        rows = [(f"`{Path(source).name}`", f"{w:g}", f"{record['likeness'][name]:.2f}")
                for (name, source), w in zip(record["loras"].items(), record["weights"], strict=True)]  # fmt: skip
        how = f"{len(rows)} plain LoRAs, merged by `{record['method']}`."
        return f"## Merged from\n\n{how}\n\n" + _table(("LoRA", "weight", "cosine with the result"), rows)
    rows = [
        (name, f"{of['loss']:.3f}", f"{of['kl']:.4f}", f"{of['top1']:.1%}")
        for name, of in record.get("models", {}).items()
    ]
    how = f"A static merge of a routed adapter by `{record.get('method')}`, fitted to `{record.get('calibration')}`: "
    how += "one LoRA for every token. What that loses, on text it was not fitted to:"
    return f"## Merge\n\n{how}\n\n" + _table(_AGREEMENT, rows) if rows else ""


def shrink_section(record: dict[str, Any]) -> str:
    """From the record beside a shrunk adapter."""
    left = record.get("keep") or record.get("groups")
    parameters = record.get("parameters") or {}
    how = (
        f"Shrunk by `{record.get('method')}` to {left} experts for each layer, chosen on `{record.get('calibration')}`"
    )
    how += f", recovered for {record['recover_steps']} steps" if record.get("recover_steps") else ""
    if {"default", "shrunk"} <= parameters.keys():
        how += f": {parameters['shrunk']:,} parameters of {parameters['default']:,}"
    rows = agreement_rows(record, "shrunk")
    return f"## Shrunk\n\n{how}.\n\n" + _table(_AGREEMENT, rows) if rows else ""


def export_section(record: dict[str, Any]) -> str:
    """From the record beside an exported checkpoint, or a plain LoRA."""
    if record.get("kind") == "plain LoRA":
        r, flag = record["r"], record["vllm_flag"]
        needs = f"; vLLM needs `{flag}`" if flag else ""
        return f"## Export\n\nOne plain PEFT LoRA of rank {r}, its scale in B, for any LoRA server{needs}."
    check = record.get("check") or {}
    if check.get("done"):
        error = check["fp32_largest_relative_error"]
        told = (
            f"Compared with the adapter on its backbone: in fp32 the logits differ by {error:.1e} of the largest, and "
        )
        told += f"{check['stored_same_top_token']:.1%} of the tokens keep their first choice as stored."
    else:
        told = f"It was not compared with the adapter: {check['why']}." if check.get("why") else ""
    return f"## Export\n\nA stock Mixture-of-Experts checkpoint of a routed adapter. {told}".strip()


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


# --- what the commands call ---

RECORDS = {
    "moe_peft_merge.json": ("merge", merge_section),
    "moe_peft_shrink.json": ("shrink", shrink_section),
    "moe_peft_export.json": ("export", export_section),
}
"""File beside the weights -> the section that it fills."""


def describe_output(adapter: str | None, output: str | Path, part: str | None = None) -> None:
    """Write the card of what a command made of an adapter: its record, and what the adapter's card says of its origin.

    Args:
        adapter: its folder; what is not a local folder has no card to take from.
        output: with a record beside the weights, or folders with one, each of which gets a card; without one nothing is
            written.
        part: what the output is of the adapter, one of several.
    """
    output = Path(output)
    known = {} if adapter is None else sections_of(Path(adapter).expanduser())
    for file, (section, fill) in RECORDS.items():
        if not (output / file).is_file():
            continue
        record = json.loads((output / file).read_text(encoding="utf-8"))
        base = _config(output).get("base_model_name_or_path")
        routed = section == "export" and record.get("kind") != "plain LoRA"
        carried = ("method", "data", "settings") + (("parameters", "routers") if routed else ())
        sections = {name: known[name] for name in carried if name in known}
        if "method" in sections:
            sections["method"] = sections["method"].replace("## Method\n\n", "## Method\n\nMade from ")
        if section == "shrink":  # another number of experts than its origin had
            sections["method"] = f"## Method\n\n{method_line(PeftConfig.from_pretrained(str(output)))}."
        sections["title"] = _title_of(Path(adapter or "LoRAs").name, section, base, part, routed)
        update_card(output, {**sections, section: fill(record)}, base, "transformers" if routed else "peft")
    if part is None and output.is_dir():
        for folder in sorted(output.iterdir()):
            if (folder / CONFIG_FILE).is_file():
                describe_output(adapter, folder, folder.name)


def _title_of(name: str, section: str, base: str | None, part: str | None, routed: bool) -> str:
    if routed:
        return f"# {name}, as a stock Mixture-of-Experts checkpoint"
    what = "shrunk" if section == "shrink" else "as a plain LoRA" if part is None else f"{part} of it as a plain LoRA"
    return title_section(f"{name}, {what}", base, section == "shrink")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def describe_routers(adapter: str, report: str | Path) -> bool:
    """Put a saved routing report into the card of a local adapter; whether there was one to put it into."""
    folder, path = Path(adapter).expanduser(), Path(report)
    if not (folder / CONFIG_FILE).is_file() or not path.is_file():
        return False
    update_card(folder, {"routers": routers_section(json.loads(path.read_text(encoding="utf-8")))})
    return True


def describe_adapter(
    model: PeftModel,
    folder: str | Path,
    name: str,
    dataset: str | None = None,
    log: dict[str, Any] | None = None,
    before: str | None = None,
    base_model: str | None = None,
) -> None:
    """Write the card of an adapter that was just saved.

    A card is no reason to lose a run: what goes wrong here is a warning.

    Args:
        name: what it is called, where the card does not say yet.
        dataset: what it was trained on, as the user wrote it.
        log: of the run, as in `training_log.json`.
        before: the card to start from, in the place of the one in the folder.
    """
    if "default" not in model.peft_config:
        return
    try:
        config = model.peft_config["default"]
        base = base_model or config.base_model_name_or_path
        title = title_section(name, base, hasattr(config, "plugin"))
        sections = {
            "title": "" if before is None and "title" in sections_of(folder) else title,
            "method": f"## Method\n\n{method_line(config)}.",
            "data": data_section(dataset, (log or {}).get("log")),
            "parameters": parameters_section(model),
            "settings": settings_section(log or {}),
        }
        update_card(folder, sections, base, before=before)
    except Exception as error:
        warnings.warn(f"The card of '{folder}' was not written: {error!r}.", stacklevel=2)
