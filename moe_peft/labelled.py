"""Labelled text for sequence classification: columns `text` and `label`, from a file, a folder or the Hub."""

from typing import NamedTuple

from datasets import Dataset, concatenate_datasets

from moe_peft.errors import nearest, refuse
from moe_peft.sources import load, sliced, split_and_slice


class Labelled(NamedTuple):
    """Texts and their classes.

    Attributes:
        dataset: columns `text` and `label`, the latter a number.
        names: of the classes, in the order of their numbers.
    """

    dataset: Dataset
    names: list[str]


def has_labels(source: str) -> bool:
    """Whether the training rows of a source are texts with labels.

    Raises:
        ValueError: if the source cannot be read.
    """
    return all({"text", "label"} <= set(part.column_names) for _, part in load(source, "train"))


def labelled_text(source: str, split: str = "train", names: list[str] | None = None) -> Labelled:
    """Read texts with their labels, which may be words or numbers.

    Args:
        source: a json, jsonl, csv or parquet file, a folder of them, or an id on the Hub.
        split: as for `train --split`; a slice is possible.
        names: the classes, where they are known from the training rows; else every label that occurs, sorted.

    Raises:
        ValueError: a missing column, a row without text or label, a label outside `names`, or one class alone.
    """
    name, brackets = split_and_slice(split)
    parts = [part for _, part in load(source, name)]
    dataset = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    dataset = sliced(dataset, brackets) if brackets else dataset
    for column in ("text", "label"):
        if column not in dataset.column_names:
            near = nearest(column, dataset.column_names)
            raise ValueError(f"The rows of {source} have no column `{column}`. {near} Rename it to `{column}`.")
    for row, (text, label) in enumerate(zip(dataset["text"], dataset["label"], strict=True)):
        if not isinstance(text, str) or not text.strip() or label is None or str(label).strip() == "":
            raise ValueError(
                f"Row {row} of {source} has no {'label' if isinstance(text, str) and text.strip() else 'text'}."
            )
    if names is None:
        found = sorted(set(dataset["label"]), key=lambda label: (str(type(label)), label))
        names = [str(label) for label in found]
    if len(names) < 2:
        raise refuse("label", names, "at least two classes", "With one there is nothing to tell apart.")
    unknown = sorted({str(label) for label in dataset["label"]} - set(names))
    if unknown:
        remedy = f"{nearest(unknown[0], names)} The training rows have no other labels."
        raise refuse("label", unknown[0], f"one of {names} in {source}", remedy)
    number = {label: i for i, label in enumerate(names)}
    rows = {"text": list(dataset["text"]), "label": [number[str(label)] for label in dataset["label"]]}
    return Labelled(Dataset.from_dict(rows), names)
