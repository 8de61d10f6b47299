"""A bundle: one folder with the base model, the adapter, the tokenizer and a record of what they are.

transformers takes a folder with a `config.json` and an `adapter_config.json` for a model with its adapter, so a bundle
loads wherever `moe_peft` is imported. The record holds a hash of every file: what is served is what was bundled.
"""

import errno
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer

from moe_peft.backbone import load_backbone, model_path
from moe_peft.budget import meta_backbone
from moe_peft.catalogue import CONFIG_FILE
from moe_peft.errors import nearest, refuse
from moe_peft.export.checkpoint import Checkpoint, base_sha256, local_folder, sha256
from moe_peft.export.plan import trained_in
from moe_peft.export.stock_moe import carry
from moe_peft.export.writer import check_is_free, check_space, remove_abandoned, whole_folder
from moe_peft.exporting import named_base
from moe_peft.merging.writing import check_record


RECORD_FILE = "moe_peft_bundle.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_ADAPTER = (CONFIG_FILE, WEIGHTS_FILE)
_LOAD_IN = ("auto", "4bit", "8bit", "none")
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class Bundle(NamedTuple):
    """A bundle whose files are those of its record.

    Attributes:
        folder: where it lies.
        record: what `write_bundle` recorded.
    """

    folder: Path
    record: dict[str, Any]

    @property
    def name(self) -> str:
        """What requests call the model: the folder's name."""
        return self.folder.resolve().name


def write_bundle(
    adapter: str,
    output: str | Path,
    model: str | None = None,
    load_in: str = "auto",
    copy: bool = False,
    any_base: bool = False,
) -> Bundle:
    """Write a bundle; the folder appears whole, or not at all.

    Args:
        adapter: its folder, or an id on the Hub.
        output: a new or empty folder.
        model: the base; by default the one that the adapter names.
        load_in: "4bit" or "8bit" stores the base so quantised (NF4 with double quantisation), "none" as it is; "auto" is
            what the adapter's training log says, and "none" without one. A base that is quantised already stays so.
        copy: the base's files, even where a hard link would do.
        any_base: also where the training log says that the adapter was trained on other weights.

    Raises:
        ValueError: no adapter, one that was changed after a merge wrote its record, no base, a base of another shape or with other weights than in training, an output that
            is in use, a setting that does not exist, or a disk that is full.
    """
    out = Path(output).expanduser()
    check_is_free(out)
    if load_in not in _LOAD_IN:
        raise refuse("load_in", load_in, "'auto', '4bit', '8bit' or 'none'", nearest(load_in, _LOAD_IN))
    base_name = model or named_base(adapter)
    source, base = local_folder(adapter), local_folder(model_path(base_name))
    check_adapter(source)
    check_record(source)
    weights = Checkpoint(base)
    hashes = base_sha256(base)
    if not any_base:
        check_trained_on(source, base_name, hashes)
    check_shapes(source, base)
    quantise = load_in if load_in != "auto" else trained_in(source) or "none"
    if getattr(AutoConfig.from_pretrained(base), "quantization_config", None) is not None:
        quantise = "none"
    remove_abandoned(out)
    check_space(out, sum(path.stat().st_size for path in weights.paths))
    with whole_folder(out) as beside:
        if quantise == "none":
            _take(base, weights, beside, copy)
        else:
            _quantise(base, quantise, beside)
        of_base = sorted(path.name for path in beside.iterdir())
        for name in _ADAPTER:
            shutil.copyfile(source / name, beside / name)
        carry(source, base, beside)
        _check_tokenizer(beside, adapter)
        record = {
            "base": base_name,
            "adapter": adapter,
            "load_in": quantise,
            "base_source_sha256": hashes,
            **_hashes(beside, of_base),
            "versions": {name: _version(name) for name in ("peft-moe", "torch", "transformers", "peft")},
        }
        (beside / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return Bundle(out, record)


def open_bundle(folder: str | Path) -> Bundle:
    """The bundle in a folder, if its files are those that were bundled.

    Raises:
        ValueError: no bundle, a file that is missing, or one that was changed since.
    """
    path = Path(folder).expanduser()
    record_file = path / RECORD_FILE
    if not record_file.is_file():
        if not path.is_dir():
            raise ValueError(f"There is no folder '{folder}'. Give one that `moe-peft bundle` wrote.")
        adapter = (path / CONFIG_FILE).is_file()
        what = f"moe-peft bundle {folder if adapter else 'ADAPTER'} --output BUNDLE"
        raise ValueError(
            f"'{folder}' is no bundle: there is no {RECORD_FILE} in it. "
            f"{'It holds an adapter alone. ' if adapter else ''}Make one with `{what}`, and serve that."
        )
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        recorded = [
            (part, name, record[f"{part}_sha256"][name]) for part in _PARTS for name in record[f"{part}_sha256"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`{record_file}` cannot be read ({error!r}). Bundle the adapter anew.") from error
    for _, name, _ in recorded:
        if not (path / name).is_file():
            raise ValueError(f"'{folder}' lacks '{name}', which its record names. Bundle the adapter anew.")
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter's lock
        found = pool.map(lambda entry: sha256(path / entry[1]), recorded)
        changed = [entry for entry, digest in zip(recorded, found, strict=True) if digest != entry[2]]
    if changed:
        part, name, _ = changed[0]
        raise ValueError(f"`{path / name}` {_PARTS[part]} Bundle the adapter anew, or bring the file back.")
    return Bundle(path, record)


_PARTS = {
    "adapter": "was changed after its record was written: this is not the adapter that was bundled.",
    "base": "is not the base model's that was bundled: the weights or the config were changed or swapped since.",
    "others": "was changed after its record was written: prompts would be read otherwise than they were.",
}
"""The parts of a record in the order they are looked at, and what it means when one differs."""


def check_adapter(folder: Path) -> None:
    """Refuse a folder without an adapter's config and weights."""
    for name in _ADAPTER:
        if not (folder / name).is_file():
            raise ValueError(
                f"'{folder}' holds no adapter: there is no {name} in it. Give the folder that training wrote."
            )


def check_trained_on(adapter: Path, base_name: str, hashes: dict[str, str]) -> None:
    """Refuse a base with other weights than the training log names; a log that names none passes.

    Raises:
        ValueError: if they differ.
    """
    log = adapter / "training_log.json"
    trained = json.loads(log.read_text(encoding="utf-8")).get("base_sha256") if log.is_file() else None
    if trained and trained != hashes:
        other = sorted(name for name in trained.keys() | hashes.keys() if trained.get(name) != hashes.get(name))
        raise ValueError(
            f"'{base_name}' is not the base that the adapter was trained on: by its hash, {other[0]} differs from what "
            f"{log.name} recorded. Give that base with `--model`, or pass `--any-base` if you know that these weights are "
            "meant (the same ones in other files, say)."
        )


def check_shapes(adapter: Path, base: Path) -> None:
    """Refuse a base that the adapter's weights do not fit, without loading either into memory.

    Raises:
        ValueError: if a layer is missing or of another shape.
    """
    try:
        PeftModel.from_pretrained(
            meta_backbone(AutoConfig.from_pretrained(base)), str(adapter), torch_device="cpu", low_cpu_mem_usage=True
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"The adapter does not fit '{base}': {error}") from error


def _take(base: Path, weights: Checkpoint, folder: Path, copy: bool) -> None:
    """The base's config and weights, by hard links where the file system has them."""
    shutil.copyfile(base / "config.json", folder / "config.json")
    index = base / "model.safetensors.index.json"
    for path in [*weights.paths, *([index] if index.is_file() else [])]:
        there = folder / path.name
        if not copy:
            try:
                os.link(path.resolve(), there)  # the Hub's cache holds symbolic links
                continue
            except OSError as error:
                if error.errno not in _NO_LINK:
                    raise
        shutil.copyfile(path, there)


def _quantise(base: Path, load_in: str, folder: Path) -> None:
    """The base in 4 or 8 bits, as it was loaded to train on: packed weights, and a config that says so."""
    dtype = getattr(AutoConfig.from_pretrained(base), "dtype", None)
    load_backbone(str(base), load_in, "cpu", **({} if dtype is None else {"dtype": dtype})).save_pretrained(folder)


def _check_tokenizer(folder: Path, adapter: str) -> None:
    try:
        AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Neither '{adapter}' nor its base has a tokenizer that can be loaded. Copy the tokenizer's files into the "
            "adapter's folder."
        ) from error


def _hashes(folder: Path, of_base: list[str]) -> dict[str, dict[str, str]]:
    """By part of the bundle, sha256 of each file by its name."""
    others = [p.name for p in folder.iterdir() if p.name not in of_base and p.name not in _ADAPTER]
    parts = {"adapter": _ADAPTER, "base": of_base, "others": sorted(others)}
    return {f"{part}_sha256": {name: sha256(folder / name) for name in names} for part, names in parts.items()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
