"""Where rows come from: a file, a folder of files or the Hub, and how much of it. What a row means is `data`'s business."""

import csv
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, ReadInstruction, Value, load_dataset

from moe_peft.errors import nearest


FILE_KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}

_OTHER_SPLITS = {"test", "validation", "valid", "val", "dev", "eval"}


def split_and_slice(split: str) -> tuple[str, str]:
    """`"train[:300]"` -> `("train", "[:300]")`; the slice of a bare name is empty.

    Raises:
        ValueError: if it is neither.
    """
    match = re.fullmatch(r"(?P<name>[^\[\]]+)(?P<slice>\[[^\[\]]*:[^\[\]]*\])?", split.strip())
    if match is None:
        raise ValueError(f"`split` is '{split}', but must be a name, or a name and a slice such as 'train[:300]'.")
    return match["name"], match["slice"] or ""


def sliced(dataset: Dataset, brackets: str) -> Dataset:
    """The rows that a slice such as `[:300]` or `[90%:]` takes.

    Raises:
        ValueError: if it cannot be read or takes nothing.
    """
    try:
        (span,) = ReadInstruction.from_spec(f"rows{brackets}").to_absolute({"rows": len(dataset)})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"The slice {brackets} of `split` cannot be read. Write 'train[:300]', say.") from error
    if span.to <= span.from_:
        raise ValueError(f"The slice {brackets} of `split` leaves nothing of {len(dataset)} rows. Widen it.")
    return dataset.select(range(span.from_, span.to))


def load(source: str, split: str) -> Iterable[tuple[str, Dataset]]:
    """The data sets that make up a split, each with the name to use in messages.

    Raises:
        ValueError: if there is no such source or split, or a file cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if split != "train":
            raise ValueError(
                f"`split` is '{split}', but the single file {source} is all 'train'. Leave it out, take a slice such "
                "as 'train[90%:]', or name another file."
            )
        return [(str(path), _read(path))]
    if path.is_dir():
        return [(str(file), _read(file)) for file in _files_of(path, split)]
    if path.suffix in FILE_KINDS or source.startswith((".", "/", "~")):
        siblings = [file.name for file in path.parent.glob("*")] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) if siblings else f"There is no folder '{path.parent}' either."
        raise ValueError(f"There is no file or folder '{source}'. {hint}")
    try:
        return [(f"{source}, split '{split}'", load_dataset(source, split=split))]
    except Exception as error:  # not found, no network, no such split, a script that is refused: say which
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"'{source}' is no file or folder here, and cannot be loaded from the Hub either: {reason} Check the "
            "spelling, `--split` and the connection."
        ) from error


def _files_of(folder: Path, split: str) -> list[Path]:
    """The files of a folder whose names contain the split; for "train" all that name no other split will do too."""
    files = sorted(path for path in folder.iterdir() if path.suffix in FILE_KINDS)
    if not files:
        kinds = ", ".join(FILE_KINDS)
        raise ValueError(f"The folder '{folder}' holds no data: none of its files ends in {kinds}.")

    def words(path: Path) -> set[str]:
        return set(re.split(r"[^a-z0-9]+", path.stem.lower()))

    named = [path for path in files if split.lower() in words(path)]
    if not named and split == "train":
        named = [path for path in files if not words(path) & _OTHER_SPLITS]
    if not named:
        raise ValueError(
            f"No file in '{folder}' has '{split}' in its name; it holds {', '.join(path.name for path in files)}. "
            "Name the file itself, or another split."
        )
    return named


def _read(path: Path) -> Dataset:
    kind = FILE_KINDS.get(path.suffix)
    if kind is None:
        raise ValueError(f"{path} ends in '{path.suffix}', but data must end in one of {', '.join(FILE_KINDS)}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty. Give a file with at least one row.")
    if kind in ("json", "csv", "text"):
        _check_utf8(path)
    try:
        dataset = load_dataset(kind, data_files=str(path), split="train", **_how_to_read(path, kind))
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{path} has no rows. Give a file with at least one.") from error
        cause = error.__cause__ or error
        where = _broken_json(path) if kind == "json" else None
        reason = where or " ".join(str(cause).split()) or type(cause).__name__
        raise ValueError(f"{path} cannot be read as {kind}: {reason} Correct the file.") from error
    if kind == "text":
        dataset = dataset.filter(lambda row: bool(row["text"].strip()))
    if not len(dataset):
        raise ValueError(f"{path} has no rows. Give a file with at least one.")
    return dataset


def _check_utf8(path: Path) -> None:
    """Arrow takes other bytes into a column of text without a word; whoever asks for the row then fails."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not written in UTF-8: line {number} holds the byte {line[error.start]:#04x}. Save it as "
                    "UTF-8."
                ) from error


def _how_to_read(path: Path, kind: str) -> dict[str, Any]:
    """In a csv file a column of numbers is text all the same, "NA" and "null" are words, and an empty cell is missing."""
    if kind != "csv":
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        columns = next(csv.reader(file), [])
    text = Features({column: Value("string") for column in columns})
    return {"features": text, "keep_default_na": False, "na_values": [""]}


def _broken_json(path: Path) -> str | None:
    """Where the first mistake of a JSON file is, which the fast reader does not say."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            return f"line {error.lineno}, column {error.colno}: {error.msg}."
        return None
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            json.loads(line or "null")
        except json.JSONDecodeError as error:
            return f"line {number}, column {error.colno}: {error.msg}."
    return None
