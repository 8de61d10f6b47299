"""Saving in one step: files are written beside their place and moved there when all of them are whole.

A run that is killed while it saves leaves the adapter that was there before, never half of a new one. PEFT's own
`save_pretrained` writes in place and offers no hook before it does; what it may leave behind is refused at loading.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import ModelCard
from peft import PeftModel


UNFINISHED = ".unfinished"
"""The folder that files are written to first, inside the one they are meant for."""

after_saving: list[Callable[[PeftModel, Path, str], None]] = []
"""Called with the model, the folder that it was saved to and the adapter's name; the package puts its card writer here."""

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_CARD = "README.md"


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """`model.save_pretrained(folder)`, in one step, and a card (README.md) that says what the adapter is.

    Args:
        model: with one or more adapters; each is saved as PEFT does it.
        folder: made if it is not there; files of other names are left alone.
    """
    folder = Path(folder)
    beside = begin(folder)
    model.save_pretrained(str(beside))
    for describe in after_saving:
        describe(model, beside, folder.resolve().name)
    put_in_place(beside, folder)


def begin(folder: Path) -> Path:
    """A folder inside `folder` to write to, empty but for the card; what an interrupted run left there is thrown away.

    PEFT goes on from a card that it finds where it saves, so that a user's text is still in the one put in place.
    """
    beside, card = folder / UNFINISHED, folder / _CARD
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    if card.is_file():
        try:
            ModelCard(card.read_text(encoding="utf-8"))
        except Exception as error:  # whatever YAML and the Hub's checks say; PEFT would not save the weights for it
            kept = folder / "README.before.md"
            shutil.copyfile(card, kept)
            warnings.warn(
                f"The metadata of `{card}` cannot be read ({str(error).splitlines()[0]}): kept as `{kept}`.",
                stacklevel=3,
            )
        else:
            shutil.copyfile(card, beside / _CARD)
    return beside


def put_in_place(beside: Path, folder: Path) -> None:
    """Move every file of `beside` to the same place in `folder`, over what is there, and remove `beside`.

    The configs come last, and an old config that differs goes first: at no time do new weights lie beside the config of
    others.
    """
    files = [path for path in beside.rglob("*") if path.is_file()]
    for path in files:
        target = folder / path.relative_to(beside)
        if path.name == _CONFIG and target.exists() and target.read_bytes() != path.read_bytes():
            target.unlink()
    for path in sorted(files, key=lambda path: (path.name == _CONFIG, path)):
        target = folder / path.relative_to(beside)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(beside)


def check_weights(folder: Path) -> None:
    """Refuse a weights file that was cut short.

    Args:
        folder: of an adapter; one without a weights file passes, as does a name on the Hub.

    Raises:
        ValueError: if the file is not as long as its own header says.
    """
    path = folder / _WEIGHTS
    if not path.is_file():
        return
    size = path.stat().st_size
    with path.open("rb") as file:  # the header's length in 8 bytes, the header in JSON, the tensors
        header_size = int.from_bytes(file.read(8), "little")
        whole = 8 + header_size
        if size >= whole:
            try:
                tensors = json.loads(file.read(header_size))
                whole += max(
                    (t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__"), default=0
                )
            except (ValueError, TypeError, KeyError, AttributeError):
                whole = -1
    if size != whole:
        raise ValueError(
            f"`{path}` is damaged: it has {size} bytes, which is not what its header says. A save or a download that was "
            "interrupted leaves such a file. Save the adapter again, or fetch the file anew."
        )


def checkpoint_to_resume(wanted: str | None, output_dir: Path) -> str | None:
    """The checkpoint to go on from.

    Args:
        wanted: None or "false" for a fresh start; "true" or "last" for the last whole checkpoint in `output_dir`; or
            the path of one. A run that is killed while it saves leaves half a checkpoint; such are passed over.

    Raises:
        ValueError: if there is none.
    """
    if wanted is None or str(wanted).lower() in ("false", "none"):
        return None
    if str(wanted).lower() not in ("true", "last"):
        if _is_whole(Path(wanted)):
            return str(wanted)
        raise ValueError(
            f"`resume_from_checkpoint` is '{wanted}', which holds no whole checkpoint (trainer_state.json and an "
            "adapter). Name a folder such as output/molora/checkpoint-100, or write 'true' for the last one."
        )
    numbered = {
        int(p.name.split("-")[1]): p for p in output_dir.glob("checkpoint-*") if p.name.split("-")[1].isdigit()
    }
    for number in sorted(numbered, reverse=True):
        if _is_whole(numbered[number]):
            return str(numbered[number])
    raise ValueError(
        f"`resume_from_checkpoint` is '{wanted}', but '{output_dir}' has no whole checkpoint. Give the `--output_dir` of "
        "the run that was stopped, or leave it out to start afresh."
    )


def _is_whole(checkpoint: Path) -> bool:
    try:  # the trainer writes its state last
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any(checkpoint.glob("adapter_model.*"))
