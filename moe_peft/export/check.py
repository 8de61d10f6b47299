"""Whether an export computes what the adapter on its backbone does, measured on the first layers.

Both are cut after the same layer, run in fp32 on random tokens with left padding, and their logits compared. Cutting is
exact, and keeps the check within memory for a model of any size.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from moe_peft.allocation import expand, is_uniform
from moe_peft.export.choose import Choice
from moe_peft.export.plan import ExportPlan, make_config
from moe_peft.export.weights import nf4, plan_tensors
from moe_peft.export.writer import gigabytes, write_checkpoint


SMALL = 2_000_000_000
"""Bytes in fp32 up to which all layers are compared."""

TOLERANCE = 1e-4
"""Of the largest difference over the largest logit in fp32; measured ones are below 1e-5."""

TOLERANCE_STORED = 0.3
"""The same for the folder in 16 bits, root mean square: rounding moves some tokens to another expert."""

_OURS = (
    "This is a mistake of moe_peft, or the installed transformers is not one that it knows: please report it with the base "
    "model's config."
)
_SHAPE = (3, 24)
_PADDED = (0, 5, 11)


class Measured(NamedTuple):
    """What the check before writing leaves for the one after it.

    Attributes:
        layers: how many were run; 0 if there was no room, with the reason in `why`.
        logits: of the adapter on its backbone at the real tokens, `[tokens, vocabulary]` in fp32.
        error: largest difference of the fp32 export over the largest logit.
    """

    layers: int
    logits: Tensor | None
    error: float
    why: str = ""


def check_layers(plan: ExportPlan, folder: Path) -> Measured:
    """Export the first layers in fp32 and compare them.

    Args:
        plan: what will be written.
        folder: empty, on the disk that has room.

    Raises:
        ValueError: if the two differ by more than rounding.
    """
    layers, needed = _how_many(plan)
    free = psutil.virtual_memory().available
    if 3 * needed > free:
        why = f"comparing {layers} layers would take {gigabytes(3 * needed)} of memory, and {gigabytes(free)} are free"
        return Measured(0, None, float("nan"), why)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.check") as name:
        part = Path(name)
        choice, config = _cut_choice(plan.choice, layers), cut_config(plan.config, layers)
        write_checkpoint(plan_tensors(plan.sources, config, choice, torch.float32, layers), part)
        make_config(config, choice, torch.float32).save_pretrained(part)
        exported = logits_of(load_exported(part))
        reference = logits_of(reference_model(plan, layers, part))
    error = float((exported - reference).abs().max() / reference.abs().max())
    if not error <= TOLERANCE:
        raise ValueError(
            f"The export does not compute what the adapter does: on {layers} layers in fp32 the logits differ by "
            f"{error:.1e} of the largest, where rounding is below {TOLERANCE:.0e}. Nothing is written. {_OURS}"
        )
    return Measured(layers, reference, error)


def check_stored(plan: ExportPlan, folder: Path, measured: Measured) -> dict[str, Any]:
    """Load the first layers of the folder that was written, compare again, and give the figures for the record.

    Raises:
        ValueError: if it does not load whole, or differs by more than its dtype explains.
    """
    if measured.logits is None:
        return {"done": False, "why": measured.why}
    choice, config = _cut_choice(plan.choice, measured.layers), cut_config(plan.config, measured.layers)
    whole = measured.layers == plan.config["num_hidden_layers"]
    stored = logits_of(load_exported(folder, make_config(config, choice, torch.float32), whole))
    difference = stored - measured.logits
    rms = float(difference.square().mean().sqrt() / measured.logits.square().mean().sqrt())
    limit = TOLERANCE if plan.dtype == torch.float32 else TOLERANCE_STORED
    if not rms <= limit:
        raise ValueError(
            f"The folder that was written differs from the adapter by {rms:.1e} (root mean square of the logits), more than "
            f"{plan.dtype} explains. Nothing is left of it. Try dtype='float32', and report it if that differs too."
        )
    return {
        "done": True,
        "layers": measured.layers,
        "tokens": len(measured.logits),
        "fp32_largest_relative_error": measured.error,
        "stored_relative_error_rms": rms,
        "stored_same_top_token": float((stored.argmax(-1) == measured.logits.argmax(-1)).float().mean()),
    }


def _how_many(plan: ExportPlan) -> tuple[int, int]:
    """(layers to compare, bytes of them in fp32): all of a small model, else up to the first mixture and two at least."""
    total = plan.config["num_hidden_layers"]

    def size(layers: int) -> int:
        return 4 * sum(t.numel for t in plan_tensors(plan.sources, plan.config, plan.choice, torch.float32, layers))

    if size(total) <= SMALL:
        return total, size(total)
    few = min(total, max(2, min(set(plan.choice.slots) - set(plan.choice.uniform), default=0) + 1))
    return few, size(few)


def _cut_choice(choice: Choice, layers: int) -> Choice:
    return choice._replace(
        slots={layer: slots for layer, slots in choice.slots.items() if layer < layers},
        dense=tuple(layer for layer in choice.dense if layer < layers),
    )


def cut_config(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """A dense model's config with fewer layers."""
    cut = {**config, "num_hidden_layers": layers}
    if cut.get("layer_types"):
        cut["layer_types"] = cut["layer_types"][:layers]
    return cut


def load_exported(folder: Path, config: PreTrainedConfig | None = None, whole: bool = True) -> PreTrainedModel:
    """The export in transformers' stock class, in fp32.

    Args:
        config: with fewer layers, if not all are wanted.
        whole: whether the folder may hold nothing that the model does not take.

    Raises:
        ValueError: if a weight is missing, or too much.
    """
    logging.disable_progress_bar()
    options = {} if config is None else {"config": config}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, **options
        )
    except RuntimeError as error:
        raise ValueError(f"transformers does not load the export whole: {error} {_OURS}") from error
    model, info = loaded
    wrong = {key: sorted(info[key]) for key in ("missing_keys", "mismatched_keys") if info[key]}
    if whole and info["unexpected_keys"]:
        wrong["unexpected_keys"] = sorted(info["unexpected_keys"])
    if wrong:
        kind, names = next(iter(wrong.items()))
        what = f"{kind.replace('_', ' ')}, as {names[0]}."
        raise ValueError(f"{type(model).__name__} does not load the export whole: {what} {_OURS}")
    return model.eval()


def reference_model(plan: ExportPlan, layers: int, workplace: Path) -> nn.Module:
    """The first layers of the backbone with the adapter on them, through PEFT, in fp32.

    Args:
        workplace: gets a copy of the adapter that is cut likewise.
    """
    adapter = plan.adapter.folder
    if layers < plan.config["num_hidden_layers"]:
        adapter = _cut_adapter(plan, layers, workplace / "adapter")
    return PeftModel.from_pretrained(reference_base(plan, layers), str(adapter)).eval()


def reference_base(plan: ExportPlan, layers: int) -> PreTrainedModel:
    """The first layers of the dense model in fp32, with the frozen weights that the export has."""
    config = AutoConfig.from_pretrained(plan.base.folder)
    text = config.get_text_config()
    for name, value in cut_config(plan.config, layers).items():
        if name in ("num_hidden_layers", "layer_types"):
            setattr(text, name, value)
    model = AutoModelForCausalLM.from_pretrained(plan.base.folder, config=config, dtype=torch.float32)
    if plan.base_weights == "dequantized":
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and ".layers." in name:
                module.weight.data = nf4(module.weight.data)
    return model.eval()


def _cut_adapter(plan: ExportPlan, layers: int, folder: Path) -> Path:
    """The adapter of the first layers only, as a folder that PEFT loads."""
    config, total = dict(plan.adapter.config), plan.config["num_hidden_layers"]
    for field in ("num_experts", "r"):
        if field in config and not is_uniform(config[field]):
            config[field] = expand(config[field], total, field)[:layers]
    if isinstance(config.get("layers_to_transform"), list):
        config["layers_to_transform"] = [layer for layer in config["layers_to_transform"] if layer < layers]
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    beyond = tuple(f".layers.{layer}." for layer in range(layers, total))
    kept = {
        name: plan.adapter.checkpoint.read(name)
        for name in plan.adapter.checkpoint.files
        if not any(part in name for part in beyond)
    }
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    """Of random tokens behind padding on the left, real positions only, `[tokens, vocabulary]` in fp32."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, _SHAPE, generator=generator)
    mask = torch.ones(_SHAPE, dtype=torch.long)
    for row, padded in enumerate(_PADDED):
        mask[row, :padded] = 0
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()].float()
