"""What `moe-peft merge` does: fit, measure, print, and write only what keeps within the bound that was set."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from moe_peft.backbone import model_path
from moe_peft.bottleneck_config import BottleneckMoeConfig
from moe_peft.errors import refuse
from moe_peft.export.writer import check_is_free, remove_abandoned, whole_folder
from moe_peft.loaded import adapters_backbone, backbone_named, load_adapter
from moe_peft.merge import Factors
from moe_peft.merging.decoder import Decoder
from moe_peft.merging.dense import DensePlan, advice
from moe_peft.merging.lazy import LazyModel
from moe_peft.merging.methods import Merged, Progress, check_settings, merge_static, total_rank
from moe_peft.merging.recovery import STEPS
from moe_peft.merging.table import error_plot, kept, merge_table
from moe_peft.merging.text import Text, random_text, read_text, scored_text
from moe_peft.merging.walk import RIDGES, Resident
from moe_peft.merging.writing import (
    LARGEST_RANK,
    PLOT_FILE,
    check_record,
    check_unchanged,
    fingerprint,
    write_plain_lora,
    write_record,
)
from moe_peft.plain_lora import is_plain, lora_factors
from moe_peft.portable_lora import max_lora_rank_flag
from moe_peft.tuners.bottleneck_moe import not_linear
from moe_peft.tuners.ffn_moe import FfnMoeLinear


ENOUGH = 30
"""Tokens for each input of a linear beyond which more text changes little (export.md B.2)."""


class Options(NamedTuple):
    """The options of the command, as the user gave them; see `moe-peft merge --help`."""

    adapter: str
    output: Path
    calibration: str | None = None
    method: str | None = None
    rank: int | None = None
    dense: bool = False
    per_domain: bool = False
    max_kl: float | None = None
    evaluation: str | None = None
    held_out: str | None = None
    steps: int = STEPS
    limit: int = 512
    base_weights: str | None = None
    dtype: str | None = None
    model: str | None = None
    load_in: str = "4bit"
    mask_prompts: bool = False


def merge_adapter(console: Console, options: Options) -> None:
    """Make the adapter static, print what that costs, write it.

    Raises:
        ValueError: an adapter, text or setting that cannot be used, a loss above `max_kl`; then nothing is written.
    """
    _check(options)
    check_record(options.adapter)
    before = fingerprint(options.adapter)
    model, tokenizer, resident = _load(options)
    if isinstance(model.peft_config["default"], BottleneckMoeConfig):
        raise ValueError(not_linear("default"))
    base = options.model or backbone_named(model.peft_config["default"].base_model_name_or_path)
    plan = _plan(options, base)
    if is_plain(model):
        _refuse_fitting(options)
        factors = lora_factors(model)
        _write(console, options, model, before, plan, {"all": factors}, {})
        return
    texts, method = _texts(console, options, model, tokenizer)
    scored = scored_text(options.evaluation, tokenizer, options.limit) if options.evaluation else []
    rank = _rank(options, model)
    merges: dict[str, Merged] = {}
    for domain, text in texts.items():
        where = "" if domain == "all" else f", domain {domain}"
        with _bars(console, len(Decoder(model)), method, options.steps, f"{method}{where}") as progress:
            tokens = "answers" if options.mask_prompts else "all"
            merged = merge_static(
                model, *text, method, rank, scored, options.steps, tokens=tokens, progress=progress, resident=resident
            )
        merges[domain] = merged
        console.print(merge_table(merged.measured, f"{_title(options, merged)}{where}"))
        console.print(kept(merged.measured))
        if merged.tokens < ENOUGH * model.get_base_model().config.hidden_size and method.startswith("ls"):
            console.print(
                f"[yellow]Few tokens:[/] {merged.tokens:,} for inputs of width {model.get_base_model().config.hidden_size}. "
                f"Least squares gets better up to about {ENOUGH} tokens for each; more rows in `--calibration`, a larger "
                "`--limit`."
            )
        seconds = merged.measured.seconds
        console.print(f"{sum(seconds) / len(seconds):.2f} s for each layer.", highlight=False)
    _check_bound(options, merges)
    check_unchanged(options.adapter, before)
    factors = {domain: merged.measured.factors for domain, merged in merges.items()}
    records = {d: _figures(options, method, merges[d], texts[d], rank) for d in merges}
    _write(console, options, model, before, plan, factors, records)


def _load(options: Options) -> tuple[PeftModel, Any, Resident | None]:
    """The adapter on its backbone, the tokenizer, and how layers come from disk if that is wanted."""
    if options.load_in != "layers":
        return *load_adapter(options.adapter, options.model, options.load_in), None
    named, tokenizer = adapters_backbone(options.adapter, options.model)
    lazy = LazyModel(options.adapter, named, "cuda" if torch.cuda.is_available() else "cpu")
    return lazy.model, tokenizer, lazy.resident


def _check(options: Options) -> None:
    """What can be refused before anything is loaded."""
    check_settings(options.method or "ls", options.rank)
    if not options.dense and options.rank is not None and options.rank > LARGEST_RANK:
        allowed = f"at most {LARGEST_RANK}, the largest rank that vLLM takes"
        raise refuse("--rank", options.rank, allowed, "Or take `--dense` for whole weights.")
    if options.max_kl is not None and not options.max_kl > 0:
        raise refuse("--max-kl", options.max_kl, "a number above 0", "0.05 keeps most answers as they are.")
    if options.max_kl is not None and options.calibration is None:
        remedy = "The loss has to be measured on text: give `--calibration`."
        raise refuse("--max-kl", options.max_kl, "left out without `--calibration`", remedy)
    for option in ("base_weights", "dtype"):
        value = getattr(options, option)
        if value is not None and not options.dense:
            name = "--" + option.replace("_", "-")
            raise refuse(name, value, "left out for a plain LoRA", "It holds no weights of the base; give `--dense`.")
    if options.dense and options.per_domain:
        remedy = "One whole model for each domain would hold the base as often: leave one of the two out."
        raise refuse("--dense", True, "False with `--per-domain`", remedy)
    check_is_free(options.output)


def _plan(options: Options, base: str) -> DensePlan | None:
    if not options.dense:
        return None
    return DensePlan(model_path(base), options.adapter, options.base_weights or "auto", options.dtype or "auto")


def _refuse_fitting(options: Options) -> None:
    for option in ("calibration", "rank", "held_out", "method", "max_kl", "evaluation"):
        value = getattr(options, option)
        if value is not None:
            name = "--eval" if option == "evaluation" else "--" + option.replace("_", "-")
            remedy = "It is written exactly: nothing is fitted."
            raise refuse(name, value, "left out for an adapter without routing", remedy)
    if options.per_domain:
        raise refuse("--per-domain", True, "left out for an adapter without routing", "It is written exactly.")


def _texts(console: Console, options: Options, model: PeftModel, tokenizer: Any) -> tuple[dict[str, Text], str]:
    """The text of each domain, and the method."""
    if options.calibration is not None:
        texts = read_text(options.calibration, options.held_out, tokenizer, options.limit, options.per_domain)
        return texts, options.method or "ls"
    if options.method != "usage":
        remedy = (
            "A routed adapter is fitted: give 128 to 512 rows of the training mix. Without text there is only `--method usage`, "
            "the mean of the experts, which loses much."
        )
        raise refuse("--calibration", None, "text, as for `train --dataset`", remedy)
    for option in ("held_out", "per_domain"):
        if getattr(options, option):
            name = "--" + option.replace("_", "-")
            raise refuse(name, getattr(options, option), "left out without `--calibration`", "Give both.")
    console.print(
        "[bold red]No text:[/] usage and loss are measured on random tokens, which no router was trained on. Expect much "
        "more loss on real text than the table says (in export.md's experiments 4 to 12 times that of least squares). Give "
        "`--calibration` if there is any text at all."
    )
    return {"all": random_text(model.get_base_model().config.vocab_size)}, "usage"


def _rank(options: Options, model: PeftModel) -> int | None:
    """Of the factors; a plain LoRA for an FFN mixture gets the experts' total rank unless told otherwise."""
    if options.dense or options.rank is not None:
        return options.rank
    decoder = Decoder(model)
    total = total_rank(decoder)
    if total > LARGEST_RANK:
        allowed = f"given where the experts have {total} directions, more than the {LARGEST_RANK} that vLLM takes"
        raise refuse("--rank", None, allowed, f"`--rank {LARGEST_RANK}` keeps the most, `--dense` all.")
    layers = (layer for block in decoder.adapted for layer in block.values())
    return total if any(isinstance(layer, FfnMoeLinear) for layer in layers) else None


@contextmanager
def _bars(console: Console, layers: int, method: str, steps: int, label: str) -> Iterator[Progress]:
    """A bar for the walks through the layers and, where something is trained, one for its steps."""
    walks = {"ls": len(RIDGES), "ls+distill": len(RIDGES) + 1, "distill": 2, "learned": 2}.get(method, 1)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        walking = bar.add_task(f"{label}: layers", total=walks * layers)
        training = None
        if method in ("learned", "distill", "ls+distill"):
            training = bar.add_task("steps", total=steps)

        def on_layer(index: int, seconds: float) -> None:
            bar.update(walking, advance=1, description=f"{label}: layer {index}, {seconds:.1f} s")

        def on_step(step: int, loss: float) -> None:
            if training is not None:
                bar.update(training, advance=1, description=f"steps, KL {loss:.4f}")

        yield Progress(on_layer, on_step)


def _title(options: Options, merged: Merged) -> str:
    ranks = {len(f.A) for f in merged.measured.factors.values()}
    span = str(min(ranks)) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
    return "Static merge into dense weights" if options.dense else f"Static merge into one plain LoRA of rank {span}"


def _check_bound(options: Options, merges: dict[str, Merged]) -> None:
    if options.max_kl is None:
        return
    worst = max(merges, key=lambda domain: merges[domain].measured.figures["merged"].kl)
    found = merges[worst].measured.figures["merged"].kl
    if not found <= options.max_kl:
        where = "" if worst == "all" else f" for the domain '{worst}'"
        raise ValueError(
            f"The merge is {found:.4f} nats from the routed model{where}, above `--max-kl` {options.max_kl:g}: nothing was "
            f"written. Try `--method ls+distill`, {'' if options.rank is None else 'a larger `--rank`, '}more text, or serve the "
            "adapter routed; named experts go out one by one, exactly, by `moe-peft export --to loras`."
        )


def _figures(options: Options, method: str, merged: Merged, text: Text, rank: int | None) -> dict[str, Any]:
    """What is measured, for the record."""
    measured = merged.measured
    return {
        "method": method,
        "rank": rank,
        "kl_by_ridge": {f"{ridge:g}": kl for ridge, kl in merged.ridges.items()},
        "calibration": options.calibration,
        "calibration_rows": sum(len(batch["input_ids"]) for batch in text.calibration),
        "calibration_tokens": merged.tokens,
        "prompts_masked_in_the_fit": options.mask_prompts,
        "held_out": options.held_out or "a quarter of the calibration text",
        "held_out_tokens": measured.tokens,
        "max_kl": options.max_kl,
        "evaluation": options.evaluation,
        "models": {name: figures._asdict() for name, figures in measured.figures.items()},
        "layer_error": measured.layer_error,
        "seconds_per_layer": measured.seconds,
    }


def _write(
    console: Console,
    options: Options,
    model: PeftModel,
    before: dict[str, str],
    plan: DensePlan | None,
    factors: dict[str, dict[str, Factors]],
    records: dict[str, dict[str, Any]],
) -> None:
    """Everything into a folder beside `output`, which takes its place at the end."""
    config = model.peft_config["default"]
    base = config.base_model_name_or_path
    about = {"adapter": options.adapter, "adapter_sha256": before, "base": base, "exact": not records}
    said = []
    remove_abandoned(options.output)
    with whole_folder(options.output) as beside:
        folders = {domain: beside if domain == "all" else beside / folder_name(domain) for domain in factors}
        for domain, its in factors.items():
            folder, record = folders[domain], {**about, **records.get(domain, {})}
            folder.mkdir(exist_ok=True)
            if plan is not None:
                recovered = plan.write(its, folder)
                dtype = str(plan.dtype).removeprefix("torch.")
                record |= {"dense": {"base_weights": plan.base_weights, "why": plan.why, "dtype": dtype}}
                record["dense"] |= recovered._asdict()
                said.append(f"The base's weights are {plan.base_weights}: {plan.why}. {advice(recovered, plan.dtype)}")
            else:
                write_plain_lora(its, folder, base, config.task_type)
            if records:
                said += _plotted({domain: records[domain]["layer_error"]}, folder / PLOT_FILE)
            write_record(folder, record)
    for sentence in dict.fromkeys(said):
        console.print(sentence)
    console.print(_written(options, factors, exact=not records))
    if plan is None:
        console.print(_served(options, base, factors), highlight=False, markup=False, soft_wrap=True)
        if records and options.load_in in ("4bit", "8bit"):
            console.print(
                f"All of this was measured on the base in {options.load_in[0]} bits, where the adapter was trained if nothing else "
                "was said. A server that loads the base unquantised is another model: measure that with `--load-in none`."
            )


def _plotted(errors: dict[str, dict[str, float]], path: Path) -> list[str]:
    """Draw the picture, or say why not: nobody should lose a merge for the want of one."""
    try:
        error_plot(errors, path)
    except ImportError as error:
        return [f"Without a picture of the layers. {error}"]
    return []


def _written(options: Options, factors: dict[str, dict[str, Factors]], exact: bool) -> str:
    if options.dense:
        what = "a whole model that loads without this package, at the speed of its class"
    else:
        rank = max(len(f.A) for its in factors.values() for f in its.values())
        several = f"{len(factors)} plain PEFT LoRAs, one for each domain," if len(factors) > 1 else "a plain PEFT LoRA"
        what = f"{several} of rank {rank}"
    if exact:
        said = f"Written to {options.output}: {what}, which computes what the adapter computes, exactly."
    else:
        said = f"Written to {options.output}: {what}. A routed adapter is no weight; above is what the merge loses."
    return said


def _served(options: Options, base: str | None, factors: dict[str, dict[str, Factors]]) -> str:
    """The command by which vLLM takes what was written."""
    rank = max(len(f.A) for its in factors.values() for f in its.values())
    folders = [options.output] if list(factors) == ["all"] else [options.output / folder_name(d) for d in factors]
    loras = " ".join(f"{folder.name}={folder}" for folder in folders)
    flag = max_lora_rank_flag(rank)
    return f"In vLLM: vllm serve {base or 'BASE'} --enable-lora {f'{flag} ' if flag else ''}--lora-modules {loras}"


def folder_name(domain: str) -> str:
    """A domain's name as that of a folder."""
    return re.sub(r"[^\w.-]+", "_", domain).strip(".") or "_"
