"""What `moe-peft bank` does: scan, score, choose, show; and write a folder that `moe-peft train --adapter` takes."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from moe_peft.backbone import load_backbone, load_tokenizer
from moe_peft.bank import Bank, scan_bank
from moe_peft.bank_scores import Score, Shot, read_shots, score_bank
from moe_peft.bank_selection import Choice, choose
from moe_peft.catalogue import RECIPE_FILE, from_catalogue, recipe
from moe_peft.errors import refuse
from moe_peft.plain_loras import read_lora
from moe_peft.saving import begin, put_in_place
from moe_peft.similar_rows import mean_embeddings, most_similar
from moe_peft.tuners.layer import linear_features


SCORES_FILE, CHOICE_FILE, ROWS_FILE = "scores.jsonl", "selection.json", "train.jsonl"
_OURS = {SCORES_FILE, CHOICE_FILE, ROWS_FILE, RECIPE_FILE, "adapter_config.json", "README.md", ".unfinished"}


class BankOptions(NamedTuple):
    """The options of `moe-peft bank`, under their names there."""

    bank: Path
    shots: str
    output: Path
    model: str = "pocket"
    select: int = 4
    candidates: int = 8
    open_rows: str | None = None
    open_limit: int = 1000
    skip_unusable: bool = False
    load_in: str = "4bit"
    batch_size: int = 8


def select_from_bank(console: Console, options: BankOptions) -> Choice:
    """Choose LoRAs of a bank by labelled shots, and write how to go on.

    The output gets the scores as they are found (a run that was stopped goes on from there), the choice, the config and
    recipe of a mixture whose experts start from the chosen LoRAs, and the rows to train it on.

    Raises:
        ValueError: a bank, LoRA, model, shots, rows or output that cannot be used, in words.
    """
    _check(options)
    tokenizer = load_tokenizer(options.model)
    shots = read_shots(options.shots, tokenizer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    backbone = load_backbone(options.model, options.load_in, device, dtype=dtype)
    with _progress(console) as progress:
        looking = progress.add_task("looking", total=None)
        bank = scan_bank(
            options.bank,
            backbone,
            options.skip_unusable,
            on_step=lambda done, total: progress.update(looking, completed=done, total=total),
        )
        if options.select > len(bank.entries):
            choose(
                [Score(entry.name, 1.0, 1.0) for entry in bank.entries], {}, options.select
            )  # refuses, before the work
        scoring = progress.add_task("scoring", total=len(bank.entries))
        scores = score_bank(
            backbone,
            tokenizer,
            bank.entries,
            shots,
            options.output / SCORES_FILE,
            batch_size=options.batch_size,
            on_step=lambda done, total: progress.update(scoring, completed=done, total=total),
        )
    folders = {entry.name: entry.folder for entry in bank.entries}
    choice = choose(scores, folders, options.select, options.candidates)
    rows = _training_rows(options, shots, tokenizer, backbone)
    _write(options, backbone, bank, scores, choice, rows)
    _show(console, options, bank, scores, choice, len(rows) - len(shots))
    return choice


def _check(options: BankOptions) -> None:
    for option in ("select", "candidates", "open_limit", "batch_size"):
        value = getattr(options, option)
        if value < 1:
            raise refuse(
                option, value, "a whole number of at least 1", f"{BankOptions._field_defaults[option]} is usual."
            )
    if options.candidates < options.select:
        raise refuse(
            "candidates", options.candidates, f"at least `select` = {options.select}", "The paper takes 4 of 8."
        )
    out = options.output
    foreign = sorted(path.name for path in out.iterdir() if path.name not in _OURS) if out.is_dir() else []
    if foreign or out.is_file():
        what = f"This one holds {foreign[0]}." if foreign else "This is a file."
        raise refuse("output", str(out), "a new folder, or the output of the same command", what)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def _training_rows(options: BankOptions, shots: list[Shot], tokenizer: Any, backbone: Any) -> list[dict[str, Any]]:
    """The shots, and of the open rows those most like them."""
    rows = [_pair(shot) for shot in shots]
    if options.open_rows is None:
        return rows
    found = read_shots(options.open_rows, tokenizer)
    if type(found[0].row["prompt"]) is not type(shots[0].row["prompt"]):
        raise ValueError(
            f"The rows of `--open-rows` {options.open_rows} and of `--shots` {options.shots} are of different kinds: one has "
            "texts, the other messages. Write both alike."
        )
    embedding: nn.Module = backbone.get_input_embeddings()
    vectors = [mean_embeddings([one.ids for one in part], embedding) for part in (shots, found)]
    return rows + [_pair(found[i]) for i in most_similar(*vectors, limit=options.open_limit)]


def _pair(shot: Shot) -> dict[str, Any]:
    return {"prompt": shot.row["prompt"], "completion": shot.row["completion"]}


def _write(
    options: BankOptions,
    backbone: nn.Module,
    bank: Bank,
    scores: list[Score],
    choice: Choice,
    rows: list[dict[str, Any]],
) -> None:
    """The choice and the recipe of its mixture, whole or not at all."""
    folders = {entry.name: entry.folder.resolve() for entry in bank.entries}
    chosen = [str(folders[name]) for name in choice.chosen]
    r = max(entry.r for entry in bank.entries if entry.name in choice.chosen)
    modules = set().union(*(read_lora(folder, only_shapes=True).pairs for folder in chosen))
    targets = _target_modules(backbone, modules)
    config = from_catalogue("rocket", num_experts=len(chosen), r=r, lora_alpha=r, target_modules=targets)
    out = options.output.resolve()
    going_on = {
        **recipe("rocket"),
        "model": options.model,
        "load_in": options.load_in,
        "dataset": str(out / ROWS_FILE),
        "experts_from": chosen,
    }
    found = {
        "chosen": chosen,
        "candidates": choice.candidates,
        "rank_score": choice.rank_score,
        "diversity": choice.diversity,
        "cosines": choice.cosines.tolist(),
        "ranks": {name: {"perplexity": p, "accuracy": a} for name, (p, a) in choice.ranks.items()},
        "scores": {s.name: {"perplexity": s.perplexity, "accuracy": s.accuracy} for s in scores},
        "unusable": bank.unusable,
        "asked": {**options._asdict(), "bank": str(options.bank), "output": str(options.output)},
    }
    beside = begin(options.output)
    config.save_pretrained(str(beside))
    (beside / RECIPE_FILE).write_text(yaml.safe_dump(going_on, sort_keys=False), encoding="utf-8")
    (beside / CHOICE_FILE).write_text(json.dumps(found, indent=1), encoding="utf-8")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (beside / ROWS_FILE).write_text(lines, encoding="utf-8")
    put_in_place(beside, options.output)


def _target_modules(backbone: nn.Module, modules: set[str]) -> list[str]:
    """Short names where they mean these modules and no others, else the modules' own."""
    short = {name.rsplit(".", 1)[-1] for name in modules}
    meant = {
        name for name, module in backbone.named_modules() if name.rsplit(".", 1)[-1] in short and _is_linear(module)
    }
    return sorted(short if meant == modules else modules)


def _is_linear(module: nn.Module) -> bool:
    try:
        return bool(linear_features(module))
    except TypeError:
        return False


def _show(
    console: Console,
    options: BankOptions,
    bank: Bank,
    scores: list[Score],
    choice: Choice,
    added: int,
    shown: int = 20,
) -> None:
    of = {score.name: score for score in scores}
    table = Table(title=f"{len(bank.entries)} LoRAs of {options.bank}, by the sum of two ranks")
    for title in ("", "LoRA", "perplexity", "rank", "accuracy", "rank", "nearest candidate"):
        table.add_column(title, justify="left" if title in ("", "LoRA") else "right")
    for name in list(choice.ranks)[: max(shown, len(choice.candidates))]:
        by_perplexity, by_accuracy = choice.ranks[name]
        mark = "[green]chosen[/green]" if name in choice.chosen else "candidate" if name in choice.candidates else ""
        score = of[name]
        figures = (f"{score.perplexity:.3f}", f"{by_perplexity:g}", f"{score.accuracy:.0%}", f"{by_accuracy:g}")
        table.add_row(mark, name, *figures, _nearest(choice, name))
    console.print(table)
    if len(choice.ranks) > shown:
        console.print(f"and {len(choice.ranks) - max(shown, len(choice.candidates))} more, in {CHOICE_FILE}.")
    for name, problems in bank.unusable.items():
        console.print(f"Left out: {name}: {problems[0]}", style="yellow", markup=False, soft_wrap=True)
    console.print(
        f"Chosen: {', '.join(choice.chosen)}; rank score {choice.rank_score:.2f}, diversity {choice.diversity:.2f}."
    )
    more = f" and {added} open rows like them" if options.open_rows is not None else ""
    console.print(
        f"Written to {options.output}: the choice, the mixture's config and recipe, the shots{more}. Mix and train:"
    )
    line = f"  moe-peft train --adapter {options.output} --output_dir output/rocket"
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _nearest(choice: Choice, name: str) -> str:
    if name not in choice.candidates or len(choice.candidates) == 1:
        return ""
    own = choice.candidates.index(name)
    cosine, other = max((float(c), i) for i, c in enumerate(choice.cosines[own]) if i != own)
    return f"{choice.candidates[other]} ({cosine:.2f})"
