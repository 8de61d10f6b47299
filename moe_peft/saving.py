"""Saving in one step: files are written beside their place and moved there when all of them are whole.

A run that is killed while it saves leaves the adapter that was there before, never half of a new one.
"""

import os
import shutil
from pathlib import Path

from peft import PeftModel


UNFINISHED = ".unfinished"
"""The folder that files are written to first, inside the one they are meant for."""

_CONFIG = "adapter_config.json"


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """`model.save_pretrained(folder)`, in one step.

    Args:
        model: with one or more adapters; each is saved as PEFT does it.
        folder: made if it is not there; files of other names are left alone.
    """
    folder = Path(folder)
    beside = begin(folder)
    model.save_pretrained(beside)
    put_in_place(beside, folder)


def begin(folder: Path) -> Path:
    """An empty folder inside `folder` to write to; what an interrupted run left there is thrown away."""
    beside = folder / UNFINISHED
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    return beside


def put_in_place(beside: Path, folder: Path) -> None:
    """Move every file of `beside` to the same place in `folder`, over what is there, and remove `beside`.

    The configs come last: in an empty folder, nothing is an adapter before it is whole.
    """
    files = [path for path in beside.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.name == _CONFIG, path)):
        target = folder / path.relative_to(beside)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(beside)
