"""The text of a merge: what it is fitted to, what it is measured on, and what its answers are scored by."""

import random
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_peft.data import training_rows
from moe_peft.errors import nearest, refuse
from moe_peft.loaded import Batch, batches_from, batches_of
from moe_peft.pocket import SUITES, make_suite


DOMAIN_COLUMNS = ("domain", "task_type")
BATCH = 16
RANDOM_ROWS, RANDOM_LENGTH = 64, 64


class Text(NamedTuple):
    """Batches to fit to and to measure on."""

    calibration: list[Batch]
    held_out: list[Batch]


def read_text(calibration: str, held_out: str | None, tokenizer: Any, limit: int, per_domain: bool) -> dict[str, Text]:
    """The text of each domain; all of it under "all" unless domains are wanted.

    Args:
        calibration: as for `moe-peft train --dataset`.
        held_out: likewise; None keeps a quarter of the calibration text.
        limit: at most so many rows of each.
        per_domain: by the rows' column `domain` or `task_type`.

    Raises:
        ValueError: rows that cannot be read, that name no domain, or that are too few to keep a part for measuring.
    """
    by = _column(calibration, tokenizer) if per_domain else None
    groups = batches_of(calibration, tokenizer, by, limit, BATCH if not per_domain else 4)
    if held_out is not None:
        measured = batches_of(held_out, tokenizer, by, limit, BATCH)
        missing = [name for name in groups if name not in measured]
        if missing:
            raise ValueError(f"`--held-out` has no rows of the domain '{missing[0]}'. Give some, or leave it out.")
        return {name: Text(batches, measured[name]) for name, batches in groups.items()}
    return {name: _split(name, batches) for name, batches in groups.items()}


def _column(source: str, tokenizer: Any) -> str:
    """The column that says what domain a row is of."""
    name, _, split = source.partition("#")
    rows = training_rows(name, split or "train", chat=tokenizer.chat_template is not None)
    found = [column for column in DOMAIN_COLUMNS if column in (*rows.unused, *rows.dataset.column_names)]
    if not found:
        columns = ", ".join(sorted({*rows.unused, *rows.dataset.column_names}))
        raise ValueError(
            f"`--per-domain` needs a column `domain` or `task_type`, but the rows of '{source}' have {columns}. Add one, or "
            "leave `--per-domain` out for one merge of everything."
        )
    return found[0]


def _split(name: str, batches: list[Batch]) -> Text:
    if len(batches) < 2:
        rows = sum(len(batch["input_ids"]) for batch in batches)
        where = "" if name == "all" else f" of the domain '{name}'"
        raise ValueError(
            f"`--calibration` gives {rows} rows{where}, too little to keep a part for measuring. Give 128 to 512 rows of the "
            "training mix, or other text with `--held-out`."
        )
    batches = list(batches)
    random.Random(0).shuffle(batches)
    quarter = max(1, len(batches) // 4)
    return Text(batches[quarter:], batches[:quarter])


def random_text(vocabulary: int) -> Text:
    """Tokens drawn evenly: a stand-in where there is no text, on which usage and loss say little."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (RANDOM_ROWS, RANDOM_LENGTH), generator=generator)
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in ids.split(BATCH)
    ]
    half = len(batches) // 2
    return Text(batches[:half], batches[half:])


def scored_text(name: str, tokenizer: Any, limit: int) -> list[Batch]:
    """Prompts with their answers: the test rows of a suite of the pocket backbone, or rows in a file.

    Raises:
        ValueError: an unknown suite, or rows without prompts.
    """
    if name in SUITES:
        rows: list[Any] = list(make_suite(name).test)[:limit]
        return batches_from(rows, tokenizer, 64)
    if not Path(name.partition("#")[0]).exists() and "/" not in name:
        allowed = "a suite of the pocket backbone, or rows as for `train --dataset`"
        raise refuse("--eval", name, allowed, nearest(name, SUITES))
    batches = batches_of(name, tokenizer, limit=limit, batch_size=64)["all"]
    if any(bool((batch["labels"][:, 0] != -100).any()) for batch in batches):
        remedy = "Exact match compares the answer to a prompt: give `prompt` and `completion`."
        raise refuse("--eval", name, "rows with a prompt and an answer", remedy)
    return batches
