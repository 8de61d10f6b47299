"""What `moe-peft export` and `moe-peft import` do: look, say what will be, write, say what came of it."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moe_peft.catalogue import CONFIG_FILE
from moe_peft.errors import nearest, refuse
from moe_peft.portable_lora import max_lora_rank_flag


PLAIN = {"loras": ("--data",), "request-lora": ("--prompt", "--domain")}
"""The values of `--to` that write plain LoRAs, and the options that go with each."""

ROUTES = ("moe", *PLAIN)
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
        allowed = "'moe', a stock Mixture-of-Experts checkpoint, 'loras' or 'request-lora'"
        raise refuse("--to", to, allowed, nearest(to, ROUTES))
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


def export_plain(
    console: Console,
    adapter: str,
    to: str,
    output: Path | None,
    model: str | None,
    given: dict[str, Any],
    by: str = "domain",
) -> None:
    """Write a plain LoRA per expert, or the one for a request, and print how to serve it.

    Args:
        given: option -> what was written for it, or None.
        by: the column of `--data` with the expert's name.

    Raises:
        ValueError: options that belong to another route, no folder, or whatever stands against the export.
    """
    from moe_peft.export.per_domain import export_experts, export_request_lora
    from moe_peft.export.writer import check_is_free
    from moe_peft.loaded import load_adapter

    for option, value in given.items():
        if value is not None and option not in PLAIN[to]:
            raise refuse(option, value, f"left out with `--to {to}`", "See `moe-peft export --help`.")
    if output is None:
        raise refuse("--output", None, "a new or empty folder", "It appears whole, or not at all.")
    check_is_free(output)
    if to == "request-lora" and not given["--prompt"] and given["--domain"] is None:
        remedy = "The LoRA is for that request alone, or for all of one `--domain`."
        raise refuse("--prompt", given["--prompt"], "the request's text", remedy)
    routed, tokenizer = load_adapter(adapter, model, "none")
    if to == "request-lora":
        config = export_request_lora(routed, given["--prompt"] or " ", output, tokenizer, domain=given["--domain"])
        what = "this request and its answer" if given["--prompt"] else f"the domain '{given['--domain']}'"
        console.print(f"Written to {output}: one LoRA of rank {config.r}, exact for {what}.")
        return
    selector = "auto" if given["--data"] is None else _fitted(routed, tokenizer, given["--data"], by)
    done = export_experts(routed, output, selector)
    served = " ".join(f"{name}={folder}" for name, folder in done.folders.items())
    console.print(f"Written to {output}: {len(done.folders)} LoRAs of rank {done.r}.", soft_wrap=True)
    flag, base = max_lora_rank_flag(done.r), routed.peft_config["default"].base_model_name_or_path or "BASE"
    serve = f"vllm serve {base} --enable-lora {f'{flag} ' if flag else ''}--lora-modules {served}"
    console.print(serve, soft_wrap=True, highlight=False, markup=False)
    console.print(_picks(output, done.selector, _one_for_each_label(routed.peft_config["default"])), soft_wrap=True)


def _fitted(model: Any, tokenizer: Any, data: str, by: str) -> Any:
    """A selector from labelled rows: each row's prompt, or its text."""
    from datasets import Dataset

    from moe_peft.data import training_rows
    from moe_peft.export.selector import expert_names, fit_selector

    name, _, split = data.partition("#")
    rows: Dataset = training_rows(name, split or "train", chat=tokenizer.chat_template is not None, keep=(by,)).dataset
    texts: dict[str, list[str]] = {}
    known = expert_names(model)
    for row in rows:
        label = str(row[by])  # type: ignore[index]
        texts.setdefault(f"expert{label}" if f"expert{label}" in known else label, []).append(_prompt(row, tokenizer))
    if known == [f"expert{number}" for number in range(len(known))] and not set(texts) & set(known):
        remedy = "No expert of this adapter was made for a label. Name its experts by number in that column if you know them."
        raise refuse(
            "--by", f"{by} ({', '.join(sorted(texts)[:4])})", f"numbers of experts, 0 to {len(known) - 1}", remedy
        )
    return fit_selector(model, tokenizer, texts)


def _prompt(row: Any, tokenizer: Any) -> str:
    """What a server would see of a row before it answers."""
    prompt = row.get("prompt") or row.get("text") or row.get("messages")
    if isinstance(prompt, str):
        return prompt
    turns = [turn for turn in prompt if turn["role"] != "assistant" or "messages" not in row]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _one_for_each_label(config: Any) -> bool:
    """Whether a sample's task type names its one expert."""
    groups = getattr(config, "expert_groups", None) or []
    given = getattr(config, "routing", None) == "given"
    return given and all(group == [number] for number, group in enumerate(groups))


def _picks(output: Path, selector: Any, by_label: bool) -> str:
    """Which LoRA is for which prompt, in words."""
    alone = "Alone, an expert is not what the mixture computes."
    if by_label:
        alone = "Each is exactly what the adapter computes for its task type: expert0 for 0, expert1 for 1 and so on."
    if selector is None and by_label:
        return f"{alone} Name it in each request."
    if selector is None:
        return (
            "Nothing picks among them: the gate decides for each token, or at each layer. Label prompts with `--data` and "
            f"`--by`, or name the expert in each request. {alone}"
        )
    how = f"python {output / 'client.py'} {output} --base BASE --prompt '...'"
    if selector.fitted:
        return f"Fitted to your prompts, this picks one: {how}. {alone}"
    if selector.exact:
        return f"The adapter's own choice, exactly: {how}"
    return (
        f"The adapter's best expert: {how}. Its rule gives that expert another weight than 1, or mixes several: "
        "`--to request-lora` is exact."
    )


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
