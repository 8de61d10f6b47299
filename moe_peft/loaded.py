"""A trained adapter on its backbone, and text for it: what `moe-peft inspect` and `moe-peft merge` start from."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel

from moe_peft.backbone import load_backbone, load_tokenizer
from moe_peft.catalogue import CONFIG_FILE
from moe_peft.data import training_rows
from moe_peft.errors import refuse
from moe_peft.pocket import POCKET_DIR


Batch = dict[str, torch.Tensor]


def load_adapter(folder: str, model: str | None = None, load_in: str = "4bit") -> tuple[PeftModel, Any]:
    """The adapter on its backbone in evaluation mode, and the tokenizer (the adapter's own, where it was saved with it).

    Args:
        folder: with an `adapter_config.json`, or an id on the Hub.
        model: the backbone; by default the one that the config names, or the pocket backbone if it names none.
        load_in: "4bit", "8bit" or "none".

    Raises:
        ValueError: if there is no adapter, no backbone or no tokenizer, in words.
    """
    named, tokenizer = adapters_backbone(folder, model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    backbone = load_backbone(named, load_in, device, dtype=dtype)
    return PeftModel.from_pretrained(backbone, folder).eval(), tokenizer


def adapters_backbone(folder: str, model: str | None = None) -> tuple[str, Any]:
    """The backbone's name and the tokenizer, with nothing loaded yet.

    Raises:
        ValueError: as `load_adapter`.
    """
    path = Path(folder).expanduser()
    if not (path / CONFIG_FILE).is_file() and (
        path.exists() or folder.count("/") != 1 or folder.startswith((".", "/"))
    ):
        raise ValueError(
            f"'{folder}' holds no adapter: there is no {CONFIG_FILE} in it. Give the folder that training wrote, or an id "
            "on the Hub."
        )
    config = PeftConfig.from_pretrained(folder)
    named = model or backbone_named(config.base_model_name_or_path)
    own_tokenizer = folder if (path / "tokenizer_config.json").is_file() else None
    return named, load_tokenizer(named, own_tokenizer)


def backbone_named(base_model_name_or_path: str | None) -> str:
    """The backbone that an adapter's config names; "pocket" if it names none, or that of another installation."""
    named = base_model_name_or_path
    if named is None or (not Path(named).exists() and Path(named).name == POCKET_DIR.name):
        return "pocket"
    return named


def batches_of(
    source: str,
    tokenizer: Any,
    by: str | None = None,
    limit: int = 256,
    batch_size: int = 8,
    max_length: int = 1024,
) -> dict[str, list[Batch]]:
    """Text as right-padded batches with labels on the answers, grouped by a column.

    Args:
        source: as `moe-peft train --dataset`; a slice of it goes behind a `#`: "rows.jsonl#train[:100]".
        tokenizer: with a chat template if the rows are conversations.
        by: the column that names a row's domain; None puts all rows under "all".
        limit: at most this many rows in all, drawn at random (seed 0): a file may be sorted by domain.
        max_length: longer rows are cut.

    Raises:
        ValueError: if the rows cannot be read, or lack the column.
    """
    if limit < 1:
        raise refuse("limit", limit, "a whole number of at least 1", "256 is enough for a report.")
    name, _, split = source.partition("#")
    keep = () if by is None else (by,)
    dataset = training_rows(name, split or "train", chat=tokenizer.chat_template is not None, keep=keep).dataset
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in dataset.shuffle(seed=0).select(range(min(limit, len(dataset)))):
        groups.setdefault(str(row[by]) if by else "all", []).append(row)
    return {group: batches_from(rows, tokenizer, batch_size, max_length) for group, rows in groups.items()}


def batches_from(
    rows: list[dict[str, Any]], tokenizer: Any, batch_size: int = 8, max_length: int = 1024
) -> list[Batch]:
    """Rows in a format of TRL's as right-padded batches with labels on the answers."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    encoded = [tuple(ids[:max_length] for ids in encode(row, tokenizer)) for row in rows]
    return [collate(encoded[i : i + batch_size], pad) for i in range(0, len(encoded), batch_size)]


def collate(rows: list[tuple[list[int], list[int]]], pad_token_id: int) -> Batch:
    """`(input ids, labels)` pairs as one right-padded batch."""
    longest = max(len(ids) for ids, _ in rows)

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    return {
        "input_ids": torch.tensor([padded(ids, pad_token_id) for ids, _ in rows]),
        "attention_mask": torch.tensor([padded([1] * len(ids), 0) for ids, _ in rows]),
        "labels": torch.tensor([padded(labels, -100) for _, labels in rows]),
    }


def encode(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids and labels of one row in a format of TRL's; the loss is on the completion where there is one."""
    if "input_ids" in row:
        return list(row["input_ids"]), list(row.get("labels") or row["input_ids"])
    if "messages" in row:
        ids = _template(tokenizer, row["messages"])
        return ids, list(ids)
    if "prompt" in row:
        if isinstance(row["prompt"], str):
            prompt = tokenizer(row["prompt"])["input_ids"]
            whole = tokenizer(_ended(row["prompt"] + row["completion"], tokenizer))["input_ids"]
            own = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
            return whole, [-100] * own + whole[own:]
        prompt = _template(tokenizer, row["prompt"], add_generation_prompt=True)
        whole = _template(tokenizer, row["prompt"] + row["completion"])
        return whole, [-100] * len(prompt) + whole[len(prompt) :]
    ids = tokenizer(_ended(row["text"], tokenizer))["input_ids"]
    return ids, list(ids)


def _ended(text: str, tokenizer: Any) -> str:
    """The text with an end-of-text behind it, as TRL trains it."""
    eos = tokenizer.eos_token or ""
    return text if text.endswith(eos) else text + eos


def _template(tokenizer: Any, messages: list[dict[str, str]], **kwargs: Any) -> list[int]:
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)
    return list(encoded["input_ids"])
