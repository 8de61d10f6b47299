"""What a merge leaves on disk: a plain LoRA or dense weights, a record, a picture; whole or not at all."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moe_peft.export.checkpoint import sha256
from moe_peft.merge import Factors, save_static
from moe_peft.portable_lora import VLLM_RANKS


RECORD_FILE = "moe_peft_merge.json"
PLOT_FILE = "moe_peft_merge.png"
LARGEST_RANK = VLLM_RANKS[-1]
"""vLLM's largest `--max-lora-rank`; SGLang and llama.cpp take any."""


def write_plain_lora(factors: dict[str, Factors], folder: Path, base_model: str | None, task_type: str | None) -> None:
    """The one place where a merge writes its plain LoRA."""
    save_static(factors, folder, base_model, task_type=task_type)


def fingerprint(folder: str | Path) -> dict[str, str]:
    """sha256 of an adapter's config and weights by file name; empty for an id on the Hub."""
    path = Path(folder).expanduser()
    return {file.name: sha256(file) for file in sorted(path.glob("adapter_*")) if file.is_file()}


def check_unchanged(folder: str | Path, before: dict[str, str]) -> None:
    """Refuse to write figures beside weights that they are not about.

    Raises:
        ValueError: if the adapter's files are not those of the fingerprint.
    """
    now = fingerprint(folder)
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        raise ValueError(
            f"`{changed[0]}` of '{folder}' was changed after its record was written, so that the figures are not about what "
            "lies there. Wait until nothing writes to the adapter any more, and merge again."
        )


def check_record(folder: str | Path) -> dict[str, Any] | None:
    """The record that a merge wrote beside its weights, if there is one.

    Raises:
        ValueError: if the weights are not those that were measured.
    """
    path = Path(folder).expanduser() / RECORD_FILE
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("written_sha256"):
        check_unchanged(folder, record["written_sha256"])
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """The record, last of all files, with what identifies the weights beside it."""
    versions = {name: _version(name) for name in ("peft-moe", "torch", "transformers", "peft")}
    whole = {**record, "written_sha256": fingerprint(folder), "versions": versions}
    (folder / RECORD_FILE).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # a server often runs under another user


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
