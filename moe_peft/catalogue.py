"""The published methods by name: what stands in `adapters/<method>/`, and what else an adapter may be given as.

A catalogue entry is a folder of data: `adapter_config.json` (the adapter), `recipe.yaml` (how it is trained, in the
field names of TRL's `SFTConfig`) and `README.md` (the card). Nothing that is written there is ignored: a key that no
field has is an error.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from moe_peft.errors import nearest
from moe_peft.plain_yaml import load_settings


CONFIG_FILE, RECIPE_FILE, CARD_FILE = "adapter_config.json", "recipe.yaml", "README.md"

_HERE = Path(__file__).parent
_WITHOUT_MEANING = {"peft_type", "peft_version", "auto_mapping"}
"""Keys that PEFT writes into every `adapter_config.json` and that are no settings."""


class AdapterSource(NamedTuple):
    """What `--adapter` turned out to be.

    Attributes:
        name: as the user wrote it; for a folder, its last part.
        config: checked, and ready to train.
        recipe: settings for the trainer that come with it; empty where there are none.
        weights: the folder holds trained weights, which a config alone does not bring along.
    """

    name: str
    config: PeftConfig
    recipe: dict[str, Any]
    weights: bool


def catalogue_folder() -> Path:
    """`adapters/`: inside the package in an installed wheel, at the root of the repository in a checkout.

    Raises:
        FileNotFoundError: if it is in neither place.
    """
    for folder in (_HERE / "adapters", _HERE.parent / "adapters"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"The catalogue `adapters/` is neither in {_HERE} nor beside it. Install the package again, or run from a whole "
        "checkout of the repository."
    )


def methods() -> list[str]:
    """The names of the catalogue, sorted."""
    return sorted(path.parent.name for path in catalogue_folder().glob(f"*/{CONFIG_FILE}"))


def entry_folder(name: str) -> Path:
    """The folder of a catalogue entry.

    Raises:
        ValueError: if there is no such entry.
    """
    if name not in methods():
        raise ValueError(f"'{name}' is not in the catalogue. {_suggestion(name)}")
    return catalogue_folder() / name


def from_catalogue(name: str, **overrides: Any) -> PeftConfig:
    """The config of a published method, with your changes: `from_catalogue("mola", r=16)`.

    Args:
        name: one of `methods()`.
        overrides: fields of the config; it is checked as a whole, as if all had been written together.

    Raises:
        ValueError: unknown name, unknown field, or a value that the config refuses.
    """
    return _read_config(entry_folder(name) / CONFIG_FILE, overrides)


def recipe(name: str) -> dict[str, Any]:
    """How a published method is trained: fields of TRL's `SFTConfig`. Empty if the entry has no recipe."""
    return _read_recipe(entry_folder(name))


def idea(name: str) -> str:
    """What the card's title says after the name: the method in one clause. Empty without a card."""
    card = entry_folder(name) / CARD_FILE
    title = card.read_text(encoding="utf-8").partition("\n")[0] if card.is_file() else ""
    return title.partition(": ")[2].strip()


def at_a_glance(name: str) -> dict[str, str]:
    """What a list of the entries shows of one: its type, experts, routing, balance and idea."""
    config = from_catalogue(name)
    top_k = getattr(config, "top_k", None)
    return {
        "type": str(getattr(config.peft_type, "value", config.peft_type)),
        "experts": str(getattr(config, "num_experts", "-") or f"{getattr(config, 'r', '-')} ranks"),
        "routing": getattr(config, "routing", "-") + (f", top {top_k}" if top_k else ""),
        "balance": getattr(config, "balance", "-"),
        "idea": idea(name),
    }


def adapter_config(spec: str, **overrides: Any) -> AdapterSource:
    """What `--adapter` names: a catalogue entry, a folder with an `adapter_config.json`, or an id on the Hub.

    Args:
        spec: the name, path or id. A catalogue name wins over a folder of the same name; write `./mola` for the folder.
            An id has a slash ("someone/adapter"), so that a misspelt name does not go looking on the Hub.
        overrides: as in `from_catalogue`.

    Raises:
        ValueError: if it is none of these, or the config refuses a value.
    """
    if spec in methods():
        return AdapterSource(spec, from_catalogue(spec, **overrides), recipe(spec), False)
    folder = Path(spec).expanduser()
    folder = folder.parent if folder.name == CONFIG_FILE else folder
    if (folder / CONFIG_FILE).is_file():
        weights = any(folder.glob("adapter_model.*"))
        config = _read_config(folder / CONFIG_FILE, overrides)
        return AdapterSource(folder.resolve().name, config, _read_recipe(folder), weights)
    if folder.is_dir():
        raise ValueError(
            f"The folder '{spec}' has no {CONFIG_FILE}, so it is not an adapter. Give the folder that holds one, or a "
            f"name from the catalogue. {_suggestion(folder.name)}"
        )
    if spec.count("/") != 1 or spec.startswith((".", "/", "~")):
        raise ValueError(
            f"'{spec}' is neither in the catalogue nor a folder. {_suggestion(spec)} A folder must hold an "
            f"{CONFIG_FILE}; an id on the Hub reads 'someone/adapter'."
        )
    return AdapterSource(spec, _from_hub(spec, overrides), {}, True)


def _suggestion(name: str) -> str:
    """The nearest name and all of them."""
    known = methods()
    closest = nearest(name, known)
    return closest if closest.startswith("Choose") else f"{closest} The catalogue has {', '.join(known)}."


def _read_recipe(folder: Path) -> dict[str, Any]:
    path = folder / RECIPE_FILE
    return load_settings(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else {}


def _read_config(path: Path, overrides: dict[str, Any]) -> PeftConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict) or "peft_type" not in values:
        raise ValueError(f"{path} has no `peft_type`, so it is not the config of an adapter. Write one with PEFT.")
    peft_type, config_classes = str(values["peft_type"]), {k.value: c for k, c in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if peft_type not in config_classes:
        raise ValueError(
            f"`peft_type` in {path} is '{peft_type}', which PEFT does not know. {nearest(peft_type, config_classes)}"
        )
    config_class = config_classes[peft_type]
    fields = [f.name for f in dataclasses.fields(config_class) if f.init and f.name not in _WITHOUT_MEANING]
    for key in values:
        if key not in fields and key not in _WITHOUT_MEANING:
            raise ValueError(f"`{key}` in {path} is not a field of {config_class.__name__}. {nearest(key, fields)}")
    for key in overrides:
        if key not in fields:
            raise ValueError(f"`{key}` is not a field of {config_class.__name__}. {nearest(key, fields)}")
    settings = {key: value for key, value in values.items() if key not in _WITHOUT_MEANING}
    # A saved adapter is marked for inference and carries its base model's name; both are the trainer's to say.
    if "routing" in overrides or "num_experts" in overrides:
        # What follows from them is decided anew, not held against a value that the user never wrote.
        for dependent in ("top_k", "balance", "top_p"):
            if dependent not in overrides and not _allowed(config_class, {**settings, **overrides}):
                settings.pop(dependent, None)
    if "balance" in overrides:  # and with a balance goes what weighed it
        for dependent in ("router_aux_loss_coef", "bias_update_speed", "balance_delta"):
            if dependent not in overrides and not _allowed(config_class, {**settings, **overrides}):
                settings.pop(dependent, None)
    settings.update(inference_mode=False, **overrides)
    return config_class(**settings)


def _allowed(config_class: type[PeftConfig], settings: dict[str, Any]) -> bool:
    try:
        config_class(**settings)
    except ValueError:
        return False
    return True


def _from_hub(spec: str, overrides: dict[str, Any]) -> PeftConfig:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(spec, CONFIG_FILE)
    except Exception as error:  # not found, no network, no access: all of them mean that there is no config
        raise ValueError(
            f"'{spec}' is no folder here, and the Hub gave no {CONFIG_FILE} for it ({type(error).__name__}). Check the "
            f"spelling and the connection, or use a name from the catalogue. {_suggestion(spec)}"
        ) from error
    return _read_config(Path(path), overrides)
