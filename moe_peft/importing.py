"""`moe-peft import`: a MixLoRA checkpoint of TUDB-Labs' packages `moe-peft` and `mixlora` becomes an adapter of ours.

The weights are read as tensors and nothing else. What has no equal here is refused by name; what MoE-PEFT does not save,
and what further training would do differently, is said in a warning. `mixlora` knows their tensors, `mixlora_settings` their
settings, this file the folders and the base model.
"""

import json
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_peft.config import FfnMoeConfig
from moe_peft.errors import refuse
from moe_peft.mixlora import Layout, Tensors, converted, find_layout
from moe_peft.mixlora_settings import (
    Settings,
    attention_lora,
    check_settings,
    expert_lora,
    our_config,
    targets,
    warnings_about,
)
from moe_peft.saving import UNFINISHED, begin, check_weights, put_in_place


CONFIG_FILE, RECORD_FILE = "adapter_config.json", "moe_peft_import.json"


class ImportReport(NamedTuple):
    """What an import did.

    Attributes:
        config: as saved.
        warnings: sentences for the user: what was lost, what was chosen instead.
        tensors, layers, experts, parameters: how many were written; `experts` per layer.
    """

    config: FfnMoeConfig
    warnings: list[str]
    tensors: int
    layers: int
    experts: int
    parameters: int


def import_mixlora(source: Path | str, output: Path | str, base: str | None = None) -> ImportReport:
    """Convert a checkpoint and save it in one step.

    The outputs are those of the packages with their LoRA dropout off. Both leave it on in inference: `moe-peft` never
    turns it off, and in `mixlora` the call of `eval()` does not reach the experts.

    Args:
        source: a folder with `adapter_config.json` and `adapter_model.bin` or `.safetensors`, or an id on the Hub.
        output: a folder that is empty or not there. It gets an adapter for `PeftModel.from_pretrained`, and their
            settings and the warnings in `moe_peft_import.json`.
        base: folder or id of the base model, of which the configuration alone is read: layers, widths and activation
            are then checked.

    Raises:
        ValueError: a checkpoint that is damaged, asks for code to be run, or has no equal here.
    """
    output = Path(output).expanduser()
    if output.exists() and (not output.is_dir() or any(path.name != UNFINISHED for path in output.iterdir())):
        raise refuse(
            "output", str(output), "an empty folder, or none yet", "Name a new folder: nothing is overwritten."
        )
    folder = _folder(str(source))
    settings = _read_settings(folder / CONFIG_FILE)
    tensors = _read_tensors(folder)
    backbone = None if base is None else _backbone(base)
    config, state, layout = _convert(settings, tensors, None if backbone is None else backbone.config.model_type)
    if backbone is not None:
        check_base(backbone, settings, layout, state)
    told = warnings_about(settings, config, layout, checked=backbone is not None)
    _write(output, config, state, {"format": "MixLoRA", "settings": settings, "warnings": told})
    parameters = sum(tensor.numel() for tensor in state.values())
    return ImportReport(config, told, len(state), layout.layers, settings["num_experts"], parameters)


def mixlora_to_ours(
    settings: Settings, tensors: Tensors, model_type: str | None = None
) -> tuple[FfnMoeConfig, dict[str, Tensor]]:
    """The config and state dict of an adapter with the same output. Pure.

    Args:
        settings: their `adapter_config.json`.
        tensors: their weights by name, on the CPU.
        model_type: of the base model's config, needed where the names of the linears leave it open.

    Returns:
        the config, and tensors by the names in which PEFT saves them (`mixlora.converted`).

    Raises:
        ValueError: what has no equal here; a tensor that is missing, unknown or of the wrong shape.
    """
    config, state, _ = _convert(settings, tensors, model_type)
    return config, state


def _convert(
    settings: Settings, tensors: Tensors, model_type: str | None
) -> tuple[FfnMoeConfig, dict[str, Tensor], Layout]:
    check_settings(settings)
    layout = find_layout(tensors, targets(settings), settings["num_experts"], model_type)
    state = converted(tensors, layout, settings["num_experts"], expert_lora(settings), attention_lora(settings))
    return our_config(settings, layout), state, layout


# --- the base model ---


def _backbone(base: str) -> nn.Module:
    """The base model without weights."""
    from transformers import AutoConfig

    from moe_peft.budget import meta_backbone

    return meta_backbone(AutoConfig.from_pretrained(base))


def check_base(backbone: nn.Module, settings: Settings, layout: Layout, state: Tensors) -> None:
    """Refuse a base model that the adapter was not trained on.

    Args:
        backbone: of `transformers`; it may lie on the meta device.

    Raises:
        ValueError: another number of layers, another width, another activation.
    """
    remedy = "Name the base model that the adapter was trained on."
    layers: Any = backbone.config.num_hidden_layers
    if layers != layout.layers:
        raise refuse("base", f"a model of {layers} layers", f"one of {layout.layers}, as the checkpoint", remedy)
    for name in (name for name in state if name.endswith("lora_A")):
        module = name.removeprefix("base_model.model.").removesuffix(".ffn_moe_experts.lora_A")
        linear: Any = backbone.get_submodule(module)
        ours = state[name].shape[-1], state[name.removesuffix("A") + "B"].shape[-1]
        if (linear.in_features, linear.out_features) != ours:
            have = f"{module} from {linear.in_features} to {linear.out_features}"
            raise refuse("base", have, f"from {ours[0]} to {ours[1]}, as the checkpoint", remedy)
    _check_activation(backbone, settings.get("act_fn"))


def _check_activation(backbone: nn.Module, name: str | None) -> None:
    """MoE-PEFT runs the experts with `act_fn`; here they share the block, and so its activation."""
    from transformers.activations import ACT2FN

    from moe_peft.ffn_names import ACTIVATIONS

    if name is None:
        return
    mlp = backbone.get_submodule("model.layers.0.mlp")
    own = next(getattr(mlp, field) for field in ACTIVATIONS if hasattr(mlp, field))
    grid = torch.linspace(-9, 9, 361, dtype=torch.float64, device="cpu")
    if name not in ACT2FN or not torch.allclose(ACT2FN[name](grid), own(grid), rtol=1e-6, atol=1e-6):
        remedy = "The experts share the frozen block here, and with it the activation."
        raise refuse("act_fn", name, f"the base model's own, {type(own).__name__}", remedy)


# --- files ---


def _folder(source: str) -> Path:
    """The checkpoint's folder, fetched if it is an id on the Hub."""
    folder = Path(source).expanduser()
    if (folder / CONFIG_FILE).is_file():
        return folder
    if folder.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise refuse(
            "source", source, f"a folder with {CONFIG_FILE}, or an id on the Hub", "See what the folder holds."
        )
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=[CONFIG_FILE, "adapter_model.*"]))


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise refuse(CONFIG_FILE, settings, "a JSON object", "Is this the adapter's config?")
    return settings


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights, on the CPU; from a pickle tensors only."""
    safe, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if safe.is_file() == pickled.is_file():
        there = "both" if safe.is_file() else "neither"
        allowed = f"a folder with one of {safe.name} and {pickled.name}: it has {there}"
        raise refuse("source", str(folder), allowed, "Fetch the weights, or remove the file that is not meant.")
    if safe.is_file():
        check_weights(folder)
        try:
            return load_file(safe)
        except SafetensorError as error:
            raise ValueError(f"`{safe}` is damaged: {error}. Fetch the file anew.") from error
    return _unpickled(pickled)


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"asks for `{asked[1]}`" if asked else "is no pickle of tensors"
        raise ValueError(
            f"`{path}` {what}, and was not loaded: a pickle can run any code. MoE-PEFT saves tensors alone. Do not use "
            "this file unless you know where it comes from; if you do, save its tensors as adapter_model.safetensors."
        ) from error
    except (EOFError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"`{path}` is damaged: {error}. Fetch the file anew.") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise refuse(path.name, type(tensors).__name__, "tensors by name", "MoE-PEFT saves nothing else.")
    return tensors


def _write(output: Path, config: FfnMoeConfig, state: dict[str, Tensor], record: dict[str, Any]) -> None:
    beside = begin(output)
    config.save_pretrained(str(beside))
    save_file(state, beside / "adapter_model.safetensors", metadata={"format": "pt"})
    (beside / RECORD_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    put_in_place(beside, output)
