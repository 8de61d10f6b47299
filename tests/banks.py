"""Banks of LoRAs for tests: folders as PEFT saves them, without the time that training or injecting takes."""

import json
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file


def write_lora(
    folder: Path,
    layers: dict[str, tuple[int, int]],
    r: int = 4,
    seed: int = 0,
    base: str | None = None,
    scale: float = 1.0,
    **settings,
) -> Path:
    """A plain LoRA of random factors; `layers` is module name -> (d_in, d_out)."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (d_in, d_out) in layers.items():
        key = f"base_model.model.{name}"
        weights[f"{key}.lora_A.weight"] = torch.randn(r, d_in, generator=generator) / d_in**0.5
        weights[f"{key}.lora_B.weight"] = scale * torch.randn(d_out, r, generator=generator) / r
    targets = sorted({name.rsplit(".", 1)[-1] for name in layers})
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, task_type="CAUSAL_LM", **settings)
    config.base_model_name_or_path = base
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def rewrite_config(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def linears(model, *names: str) -> dict[str, tuple[int, int]]:
    """The linear layers of a model with these last names."""
    found = {n: m for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in names}
    return {n: (m.in_features, m.out_features) for n, m in found.items()}
