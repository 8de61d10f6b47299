"""A bank of LoRAs: a folder whose folders are plain LoRAs that PEFT saved. What is in it, and what of it can be used.

Of the weights only a file's header is held in memory; the rest goes through the fingerprint in small pieces. So a bank of
a thousand LoRAs costs a list of a thousand names.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from moe_peft.errors import refuse
from moe_peft.plain_loras import PlainLora, read_lora
from moe_peft.portable_lora import CONFIG_FILE, WEIGHTS_FILE
from moe_peft.tuners.layer import linear_features


Step = Callable[[int, int], None]
"""Called with how many are done, and of how many."""

_PIECE = 1 << 20


class BankEntry(NamedTuple):
    """A LoRA of the bank.

    Attributes:
        name: of its folder.
        folder: the folder.
        fingerprint: of its config and weights; another one means that the LoRA has changed.
        r: its largest rank.
    """

    name: str
    folder: Path
    fingerprint: str
    r: int


class Bank(NamedTuple):
    """What a folder holds.

    Attributes:
        entries: the LoRAs that can be used, by name.
        unusable: name of a folder -> what is wrong with it, a line each.
    """

    entries: list[BankEntry]
    unusable: dict[str, list[str]]


def scan_bank(
    folder: str | Path,
    model: nn.Module | None = None,
    skip_unusable: bool = False,
    check_base: bool = True,
    on_step: Step | None = None,
) -> Bank:
    """List the LoRAs of a bank and check each of them.

    Args:
        folder: every folder in it is taken for a LoRA; files, and folders that begin with a dot, are passed over.
        model: the backbone, without an adapter; with it, base names, layers and widths are checked as well.
        skip_unusable: go on without what cannot be used. By default that is refused.
        check_base: refuse a LoRA whose config names another base model. Names are compared without the path.
        on_step: for a progress bar.

    Raises:
        ValueError: no such folder, an empty one, nothing usable in it, or something unusable in it: all of that at once,
            each with the name of its folder and the field or layer.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise refuse("bank", str(folder), "a folder", "Put the folders of your LoRAs into one and name that.")
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        itself = " It is a LoRA itself: name the folder around it." if (folder / CONFIG_FILE).is_file() else ""
        raise refuse("bank", str(folder), "a folder of LoRA folders", f"This one holds no folder.{itself}")
    entries, unusable = [], {}
    base = base_name(model) if model is not None and check_base else None
    for number, path in enumerate(found, start=1):
        lora, problems = _look_at(path)
        if lora is not None:
            problems += _misfits(lora, model, base)
        if problems or lora is None:
            unusable[path.name] = problems
        else:
            r = max(len(pair.A) for pair in lora.pairs.values())
            entries.append(BankEntry(path.name, path, fingerprint(path), r))
        if on_step is not None:
            on_step(number, len(found))
    if unusable and (not skip_unusable or not entries):
        raise ValueError(_told(folder, unusable, len(found), skip_unusable))
    return Bank(entries, unusable)


def base_name(model: nn.Module) -> str | None:
    """What the model was loaded from, or None."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def fingerprint(folder: Path) -> str:
    """Of a LoRA's config and weights, read piece by piece."""
    digest = hashlib.blake2b(digest_size=16)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with (folder / name).open("rb") as file:
            digest.update(str((folder / name).stat().st_size).encode())
            while piece := file.read(_PIECE):
                digest.update(piece)
    return digest.hexdigest()


def _look_at(folder: Path) -> tuple[PlainLora | None, list[str]]:
    """The LoRA with shapes for weights, and what no expert can take over of it."""
    if not (folder / CONFIG_FILE).is_file():
        return None, [f"it has no {CONFIG_FILE}, so it is no adapter"]
    if not (folder / WEIGHTS_FILE).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        remedy = ", only an adapter_model.bin: load it and save it again with PEFT" if pickled else ": no weights"
        return None, [f"it has no {WEIGHTS_FILE}{remedy}"]
    try:
        json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        lora = read_lora(folder, only_shapes=True)
    except (ValueError, TypeError, KeyError, OSError) as error:
        what = " ".join(str(error).split())
        return None, [what if isinstance(error, ValueError) else f"its {CONFIG_FILE} cannot be read: {what}"]
    return lora, [*lora.problems, *([] if lora.pairs or lora.problems else ["it has no factors at all"])]


def _misfits(lora: PlainLora, model: nn.Module | None, base: str | None) -> list[str]:
    problems = []
    if base and lora.base and Path(base).name != Path(lora.base).name:
        field = "`base_model_name_or_path`"
        problems.append(f"{field} is {lora.base!r}, and this backbone is {base!r} (same model? `check_base=False`)")
    layers = {} if model is None else dict(model.named_modules())
    for module, pair in lora.pairs.items() if model is not None else ():
        if module not in layers:
            problems.append(f"{module}: the backbone has no such layer")
            continue
        theirs = pair.A.shape[1], pair.B.shape[1]
        try:
            have = linear_features(layers[module])
        except TypeError:
            problems.append(f"{module}: the backbone's layer is no linear one")
            continue
        if have != theirs:
            problems.append(f"{module}: from {theirs[0]} to {theirs[1]}, the backbone's from {have[0]} to {have[1]}")
    return problems


def _told(folder: Path, unusable: dict[str, list[str]], number: int, skipped: bool, shown: int = 3) -> str:
    lines = [f"{len(unusable)} of {number} folders in the bank '{folder}' cannot be used:"]
    for name, problems in unusable.items():
        lines += [f"{name}: {problem}" for problem in problems[:shown]]
        if len(problems) > shown:
            lines.append(f"{name}: and {len(problems) - shown} more of this kind")
    end = "Nothing is left to choose from." if skipped else "Mend or remove them, or go on without: `skip_unusable`."
    return "\n- ".join(lines) + f"\n{end}"
