"""Preference pairs judged for one capability each, or overall: what a reward model of capability experts is trained on.

A row has `chosen` and `rejected` (texts, or lists of messages), perhaps `prompt`, and `capability`: what the pair was judged
for. Where that is empty the pair was judged as a whole; such pairs train the head. With categories, rows also have
`category`, the kind of prompt.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets import Dataset, concatenate_datasets

from moe_peft.errors import nearest, refuse
from moe_peft.sources import load, sliced, split_and_slice


_READ = ("prompt", "chosen", "rejected", "category")


class Preferences(NamedTuple):
    """Pairs by what they were judged for.

    Attributes:
        by_capability: capability -> its pairs, in the order in which they first appear.
        overall: pairs judged as a whole.
    """

    by_capability: dict[str, Dataset]
    overall: Dataset


def preferences(
    source: str,
    split: str = "train",
    capabilities: Sequence[str] | None = None,
    categories: Sequence[str] | None = None,
) -> Preferences:
    """Load and check the pairs.

    Args:
        source: a json, jsonl, csv or parquet file, a folder of them, or an id on the Hub.
        split: a name, or a name and a slice: "train[:300]".
        capabilities: the labels that there may be; by default those that there are.
        categories: likewise for `category`; None where the model has no categories.

    Raises:
        ValueError: rows that cannot be read, a column or value that is missing, a label outside the set, a capability
            without pairs, fewer than two capabilities, or no pairs that were judged as a whole.
    """
    name, brackets = split_and_slice(split)
    dataset = concatenate_datasets([part for _, part in load(source, name)])
    dataset = sliced(dataset, brackets) if brackets else dataset
    needed = ["chosen", "rejected", "capability", *(["prompt", "category"] if categories is not None else [])]
    for column in needed:
        if column not in dataset.column_names:
            have = ", ".join(dataset.column_names)
            raise ValueError(
                f"The rows of {source} have no `{column}` (they have {have}). {nearest(column, dataset.column_names)} A pair "
                "needs `chosen`, `rejected` and `capability`, which is empty where the pair was judged as a whole."
            )
    groups = _grouped(dataset, source, capabilities, categories)
    overall = groups.pop("", [])
    for missing in (one for one in capabilities or () if one not in groups):
        raise refuse("capability", missing, "the label of at least one pair", f"{source} has none: add some.")
    if len(groups) < 2:
        raise refuse("capability", sorted(groups), "at least two different labels", "One capability needs no fusion.")
    if not overall:
        raise ValueError(
            f"All pairs of {source} were judged for a capability. Add pairs with an empty `capability`, judged as a whole: "
            "the head learns from them what the capabilities weigh."
        )
    kept = dataset.select_columns([column for column in _READ if column in dataset.column_names])
    plain = kept.remove_columns("category") if "category" in kept.column_names else kept
    return Preferences({name: plain.select(rows) for name, rows in groups.items()}, kept.select(overall))


def _grouped(
    dataset: Dataset, source: str, capabilities: Sequence[str] | None, categories: Sequence[str] | None
) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(dataset):
        where = f"Row {index + 1} of {source}: "
        for field in ("chosen", "rejected"):
            if not row[field]:
                raise ValueError(f"{where}`{field}` is empty. Correct or remove the row.")
        if row["chosen"] == row["rejected"]:
            raise ValueError(f"{where}`chosen` and `rejected` are the same, which prefers nothing. Remove the row.")
        label = str(row["capability"] or "").strip()
        if label and capabilities is not None:
            _check(where, "capability", label, capabilities)
        if not label and categories is not None:
            _check(where, "category", row["category"], categories)
        groups.setdefault(label, []).append(index)
    return groups


def _check(where: str, field: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        hint = nearest(str(value), known)
        raise ValueError(f"{where}`{field}` is {value!r}, but must be one of {', '.join(map(repr, known))}. {hint}")
