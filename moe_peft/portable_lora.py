"""Plain LoRA folders that every server reads alike. Every LoRA that this package writes goes through here.

Servers read `adapter_config.json` each in its own way: SGLang and llama.cpp scale by `lora_alpha` over the rank of the
tensor and know neither rsLoRA nor patterns; vLLM takes both, but refuses ranks above its limit, biases and most inits. So
nothing is left to be read: the scale is in B, `lora_alpha` is `r`, and all layers have one rank, filled up with zeros.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from moe_peft.errors import refuse
from moe_peft.saving import begin, put_in_place


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's `--max-lora-rank` (0.33), whose default is 16; an adapter may have any rank up to it."""

RECORD_FILE = "moe_peft_export.json"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


class Factors(NamedTuple):
    """One layer's static LoRA: `y + x @ A.T @ B.T`, with A `[rank, d_in]` and B `[d_out, rank]`, its scale in B."""

    A: Tensor
    B: Tensor


def max_lora_rank_flag(r: int) -> str:
    """The flag that vLLM needs for an adapter of rank `r`; "" where its default will do.

    Raises:
        ValueError: above 512, which no setting of it takes.
    """
    if r > VLLM_RANKS[-1]:
        remedy = "Give a rank: each layer is then cut to its largest singular values. Or merge into dense weights."
        raise refuse("rank", r, f"at most {VLLM_RANKS[-1]}, the largest that vLLM serves", remedy)
    return "" if r <= 16 else f"--max-lora-rank {next(limit for limit in VLLM_RANKS if limit >= r)}"


def portable(factors: Mapping[str, Factors], rank: int | None = None) -> dict[str, Factors]:
    """The same linear maps with one rank everywhere, fp32, on the CPU.

    Args:
        factors: module name, as in the model without PEFT -> its factors.
        rank: cut to so many of the largest singular values of `B A`; None keeps every direction. A fit that knows the data
            should truncate by itself, weighted by them (`fit_static`).

    Raises:
        ValueError: nothing to write, factors that do not fit each other or are not finite, or a rank below 1.
    """
    if not factors:
        raise ValueError("There is no layer to write a LoRA for.")
    if rank is not None and rank < 1:
        raise refuse("rank", rank, "a whole number of at least 1, or None", "None keeps every direction.")
    for name, (A, B) in factors.items():
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
            raise ValueError(f"The factors of '{name}' do not fit each other: A {list(A.shape)}, B {list(B.shape)}.")
        if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
            raise ValueError(f"The factors of '{name}' are not finite. The adapter is broken; nothing was written.")
    cut = {name: f if rank is None or f.A.shape[0] <= rank else _truncated(f, rank) for name, f in factors.items()}
    r = max(f.A.shape[0] for f in cut.values())
    return {name: Factors(_filled(f.A, 0, r), _filled(f.B, 1, r)) for name, f in cut.items()}


def _truncated(factors: Factors, rank: int) -> Factors:
    """The nearest map of that rank, from the small matrix between the two orthogonal bases."""
    (left, R_B), (right, R_A) = (torch.linalg.qr(f.double()) for f in (factors.B, factors.A.T))
    U, sigma, Vh = torch.linalg.svd(R_B @ R_A.T)
    keep = min(rank, sigma.numel())
    return Factors((Vh[:keep] @ right.T), (left @ U[:, :keep] * sigma[:keep]))


def _filled(factor: Tensor, dim: int, r: int) -> Tensor:
    factor = factor.detach().float().cpu()
    missing = list(factor.shape)
    missing[dim] = r - missing[dim]
    return torch.cat((factor, factor.new_zeros(missing)), dim).contiguous()


def lora_config(factors: Mapping[str, Factors], base_model: str | None, task_type: str | None) -> LoraConfig:
    """For factors of one rank, with a scale of exactly 1."""
    r = next(iter(factors.values())).A.shape[0]
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=sorted(factors),
        task_type=task_type,
        base_model_name_or_path=base_model,
        inference_mode=True,
    )


def lora_state(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The tensors under the names that every server expects."""
    prefix = "base_model.model."
    return {f"{prefix}{name}.lora_{part}.weight": getattr(f, part) for name, f in factors.items() for part in "AB"}


def write_portable_lora(
    factors: Mapping[str, Factors],
    folder: str | Path,
    base_model: str | None,
    rank: int | None = None,
    task_type: str | None = "CAUSAL_LM",
    also: Mapping[str, str] | None = None,
    sources: Mapping[str, str | Path] | None = None,
) -> LoraConfig:
    """Write a plain LoRA in one step; `moe_peft_export.json` beside it says what it was made of.

    Args:
        factors: module name -> its factors, the scale in B.
        folder: new, or one that this function has written and nobody has changed; files of other names are left alone.
        base_model: what the config names as its base.
        rank: see `portable`.
        task_type: PEFT's.
        also: further files, name -> text.
        sources: name -> the folder of an adapter that this one is made of; its files' hashes are recorded.

    Returns:
        the config.

    Raises:
        ValueError: if the folder holds another adapter, the rank is above what vLLM takes, or `portable` refuses.
    """
    folder = Path(folder)
    check_may_write(folder)
    same = portable(factors, rank)
    config = lora_config(same, base_model, task_type)
    flag = max_lora_rank_flag(config.r)
    beside = begin(folder)
    config.save_pretrained(str(beside))
    save_file(lora_state(same), beside / WEIGHTS_FILE, metadata={"format": "pt"})
    record = {
        "kind": "plain LoRA",
        "r": config.r,
        "ranks": {name: int(f.A.shape[0]) for name, f in factors.items()},
        "cut_to": rank,
        "vllm_flag": flag,
        "base_model": base_model,
        "sources": {name: hashes(Path(path)) for name, path in (sources or {}).items()},
        "files": hashes(beside),
    }
    (beside / RECORD_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
    for name, text in (also or {}).items():
        (beside / name).write_text(text, encoding="utf-8")
    for path in beside.iterdir():
        path.chmod(0o644)  # a server often runs under another user
    put_in_place(beside, folder)
    return config


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of an adapter's files, by name."""
    from moe_peft.export.checkpoint import sha256

    return {name: sha256(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE) if (folder / name).is_file()}


def check_may_write(folder: Path) -> None:
    """Refuse a folder that holds an adapter of somebody else's, or one of ours that was changed since.

    Raises:
        ValueError: naming the file.
    """
    if folder.is_file():
        raise refuse("output", str(folder), "a folder", "Name another one.")
    there = hashes(folder)
    if not there:
        return
    record = folder / RECORD_FILE
    if not record.is_file():
        allowed = f"a folder without an adapter that is not this function's: it holds {' and '.join(there)}"
        raise refuse("output", str(folder), allowed, "Nothing is overwritten: name another folder.")
    try:
        written = json.loads(record.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        written = None
    if written != there:
        allowed = f"a folder whose adapter is as its {RECORD_FILE} says; this one was changed since, or is another's"
        raise refuse("output", str(folder), allowed, "Nothing is overwritten: name another folder.")
