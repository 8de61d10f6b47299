"""A dense model and its FFN mixture as one stock MoE checkpoint, which transformers, vLLM and llama.cpp load as their own.

Each expert of the mixture is the frozen FFN with a low-rank change, so writing every expert out in full is exact:

    y = sum_{e chosen} g_e W_d^e (act(W_g^e h) * W_u^e h),    W^e = W + s B_e A_e

The price is size: attention and embeddings once, the FFN as many times as there are experts.
"""

import json
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moe_peft.export.check import check_layers, check_stored
from moe_peft.export.checkpoint import sha256
from moe_peft.export.plan import ExportPlan, plan_export
from moe_peft.export.writer import (
    Progress,
    check_is_free,
    check_space,
    remove_abandoned,
    whole_folder,
    write_checkpoint,
)


RECORD_FILE = "moe_peft_export.json"

_CARRIED = (
    *("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("*.model", "*.tiktoken"),
)
_OF_BASE = ("generation_config.json", "LICENSE*", "NOTICE*")


def export_moe(
    base: str,
    adapter: str,
    out: str | Path,
    target: str = "auto",
    base_weights: str = "auto",
    dtype: str = "auto",
    max_shard_size: int | str = "4GB",
    verify: bool = True,
    on_progress: Progress | None = None,
) -> ExportPlan:
    """Write the stock MoE checkpoint: weights, config, tokenizer, and a record of what it was made from.

    Before the weights are written, the first layers are exported in fp32 and compared with the adapter on its backbone;
    after it, those of the folder itself. The folder appears when all of that went well.

    Args:
        base, adapter, target, base_weights, dtype: as for `plan_export`.
        out: a new or empty folder.
        max_shard_size: of one weights file.
        verify: whether to compare.
        on_progress: called with the bytes written and the bytes to write.

    Returns:
        the plan that was carried out.

    Raises:
        ValueError: what `plan_export` refuses, a folder that holds something, a disk that is too small or fills up, or an
            export that does not compute what the adapter does.
    """
    plan = plan_export(base, adapter, target, base_weights, dtype)
    carry_out(plan, out, max_shard_size, verify, on_progress)
    return plan


def carry_out(
    plan: ExportPlan,
    out: str | Path,
    max_shard_size: int | str = "4GB",
    verify: bool = True,
    on_progress: Progress | None = None,
) -> None:
    """What `export_moe` does once there is a plan, for those who show it first."""
    out = Path(out).expanduser()
    check_is_free(out)
    remove_abandoned(out)
    check_space(out, plan.nbytes)
    with whole_folder(out) as beside:
        write_export(plan, beside, max_shard_size, verify, on_progress)


def write_export(
    plan: ExportPlan,
    folder: Path,
    max_shard_size: int | str = "4GB",
    verify: bool = True,
    on_progress: Progress | None = None,
) -> None:
    """Fill an empty folder with the export; `carry_out` does this where nobody sees it half done."""
    measured = check_layers(plan, folder) if verify else None
    write_checkpoint(plan.tensors, folder, max_shard_size, on_progress)
    plan.target_config().save_pretrained(folder)
    carry(plan.adapter.folder, plan.base.folder, folder)
    figures = {"done": False, "why": "not asked for"} if measured is None else check_stored(plan, folder, measured)
    record = json.dumps({**_record(plan), "check": figures}, indent=1)
    (folder / RECORD_FILE).write_text(record + "\n", encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)


def carry(adapter: Path, base: Path, folder: Path) -> None:
    """The tokenizer, with the adapter's own before the base's, and what else belongs to the base."""
    own = (adapter / "tokenizer_config.json").is_file()
    for place, patterns in ((adapter if own else base, _CARRIED), (base, _OF_BASE)):
        for pattern in patterns:
            for path in place.glob(pattern):
                if path.is_file() and not (folder / path.name).exists():
                    shutil.copyfile(path, folder / path.name)


def _record(plan: ExportPlan) -> dict[str, Any]:
    """What somebody needs to make or to trust the export again."""
    return {
        "base": plan.base_name,
        "base_sha256": plan.base.hashes(),
        "base_weights": plan.base_weights,
        "adapter": plan.adapter_name,
        "adapter_sha256": plan.adapter.checkpoint.hashes(),
        "adapter_config_sha256": sha256(plan.adapter.folder / "adapter_config.json"),
        "target": plan.target,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "parameters": plan.parameters,
        "num_experts": plan.choice.num_experts,
        "top_k": plan.choice.top_k,
        "experts_per_layer_of_the_adapter": plan.experts_per_layer,
        "notes": plan.notes,
        "versions": {name: _version(name) for name in ("peft-moe", "torch", "transformers", "peft", "safetensors")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
