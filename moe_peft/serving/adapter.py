"""A routed adapter as it lies on disk, for a server that has no PEFT: its settings, its tensors, and what cannot be served.

    base_model.model.<linear>.<type>_experts.<part>      of type linear_moe, rank_moe or ffn_moe

The settings are those that training wrote, all of them: what a field means without being written is the config classes'
to say, and they are PEFT's.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import safe_open
from torch import Tensor

from moe_peft.errors import refuse


PARTS = {
    "linear_moe": ("lora_A", "lora_B", "router", "router_bias", "selection_bias", "constant", "expert_map"),
    "rank_moe": ("lora_A", "lora_B", "router", "selection_bias", "frozen_A", "frozen_B"),
    "ffn_moe": ("lora_A", "lora_B", "router", "router_bias", "selection_bias", "expert_map"),
}
"""Type of adapter -> its tensors on one linear."""

_FIELDS = (
    *("routing", "scoring_func", "norm_topk_prob", "routed_scaling_factor", "top_p", "sparsegen_lambda", "top_k"),
    *("num_null_experts", "num_shared_experts", "lora_alpha", "use_rslora", "router_act", "router_scale", "balance"),
    *("router_granularity", "expert_groups", "schedule_steps", "modules_to_save", "trainable_token_indices"),
)
_OWN_FIELDS = {
    "linear_moe": ("num_constant_experts", "router_scope", "share_A"),
    "rank_moe": ("rank_partition", "bias_in_gates", "temperature", "threshold"),
    "ffn_moe": (),
}
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<kind>\w+)_experts\.(?P<part>\w+)")


class Adapter:
    """Attributes:
    folder: where it lies.
    kind: "linear_moe", "rank_moe" or "ffn_moe".
    config: its settings by name.
    shapes: linear (named as in the model with its head) -> part -> shape, in the order of the layers.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the config and the header of the weights.

        Raises:
            ValueError: if there is no whole adapter, or one that no batch of mixed requests can be routed by.
        """
        self.folder = Path(folder)
        self.kind, self.config = _config(self.folder)
        check_token_local(self.config, self.folder)
        self.path = self.folder / "adapter_model.safetensors"
        if not self.path.is_file():
            raise ValueError(f"'{self.folder}' has no adapter_model.safetensors. Give the folder that training wrote.")
        with safe_open(self.path, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        self.shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for key in sorted(shapes, key=_in_order):
            match = _KEY.fullmatch(key)
            if match is None or match["kind"] != self.kind or match["part"] not in PARTS[self.kind]:
                raise ValueError(
                    f"'{self.path}' has a tensor '{key}', which is none of an adapter of type {self.kind}. Save the "
                    "adapter again with this version of moe_peft."
                )
            self.shapes.setdefault(match["module"], {})[match["part"]] = shapes[key]
        self._check_whole()

    def _check_whole(self) -> None:
        for module, parts in self.shapes.items():
            A, B = parts.get("lora_A"), parts.get("lora_B")
            if A is None or B is None or len(A) != 3 or len(B) != 3 or A[1] != B[1] or A[0] not in (1, B[0]):
                raise ValueError(
                    f"'{self.path}' has no whole pair of factors for '{module}': lora_A is {A}, lora_B is {B}. Save the "
                    "adapter again."
                )
        if not self.shapes:
            raise ValueError(f"'{self.path}' is empty. Save the adapter again.")

    def tensors(self, module: str) -> dict[str, Tensor]:
        """The tensors of one linear by part, on the CPU, as they were stored."""
        with safe_open(self.path, "pt") as file:
            return {
                p: file.get_tensor(f"base_model.model.{module}.{self.kind}_experts.{p}") for p in self.shapes[module]
            }

    def fingerprint(self) -> dict[str, Any]:
        """What the computation depends on beside the values of tensors: for caches of compiled graphs."""
        return {"config": json.dumps(vars(self.config), sort_keys=True, default=str), "shapes": str(self.shapes)}


def _config(folder: Path) -> tuple[str, SimpleNamespace]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ValueError(
            f"'{folder}' holds no adapter: there is no adapter_config.json in it. Name the folder by its path."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = str(config.get("peft_type")).lower()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"'{path}' is not JSON that PEFT wrote: {error}. Save the adapter again.") from error
    if kind not in PARTS:
        remedy = "A plain LoRA is vLLM's own business: `vllm serve BASE --enable-lora --lora-modules name=DIR`."
        if kind == "shard_pool":
            remedy = (
                "A pool of shards is the same function as one plain LoRA: `moe_peft.plain_lora.save_lora` writes that."
            )
        allowed = "LINEAR_MOE, RANK_MOE or FFN_MOE, which route"
        raise refuse("peft_type", config.get("peft_type"), allowed, remedy)
    missing = [name for name in (*_FIELDS, *_OWN_FIELDS[kind]) if name not in config]
    if missing:
        raise ValueError(
            f"'{path}' does not say {', '.join(f'`{name}`' for name in missing)}, and a server does not know what they mean "
            "unwritten. Load the adapter with PEFT and save it again: that writes every field."
        )
    return kind, SimpleNamespace(**config)


def check_token_local(config: Any, folder: Path) -> None:
    """Refuse what a token alone cannot decide: a server packs the tokens of all requests into one row.

    Raises:
        ValueError: naming the field and the way out.
    """
    transformers = "Serve it with transformers: `PeftModel` and `generate`, where a row is a request."
    if config.router_granularity != "token":
        allowed = "'token' where a server packs tokens of many requests into one row"
        raise refuse("router_granularity", config.router_granularity, allowed, transformers)
    if config.routing == "random":
        remedy = "In use it is the mean of its experts, which is one weight: call `merge_and_unload()` and serve the result."
        raise refuse("routing", "random", "a rule that chooses by the token", remedy)
    if config.routing == "given" or config.expert_groups is not None:
        field = "routing" if config.routing == "given" else "expert_groups"
        value = config.routing if field == "routing" else config.expert_groups
        allowed = "a rule that chooses by the token alone" if field == "routing" else "left out"
        remedy = "A request to a server does not tell the task type of its tokens. " + transformers
        raise refuse(field, value, allowed, remedy)
    if getattr(config, "router_scope", "linear") == "model":
        allowed = "'linear', 'group' or 'block' in a server, whose layers do not see the input embeddings"
        raise refuse("router_scope", "model", allowed, transformers)
    for field in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, field):
            remedy = "What was trained there is no routed layer, and would be lost. " + transformers
            raise refuse(field, getattr(config, field), "None in a server", remedy)
    _check_schedule(config, folder)


def _check_schedule(config: Any, folder: Path) -> None:
    """Inference is always at the end of a schedule; a checkpoint from its middle has not learned to be there."""
    state = folder / "trainer_state.json"
    if not config.schedule_steps or not state.is_file():
        return
    done = json.loads(state.read_text(encoding="utf-8")).get("global_step", 0)
    if done < config.schedule_steps:
        allowed = f"at most {done}, the steps that this checkpoint has been trained for"
        remedy = "It was taken while the schedule was still pending: train on, or serve a later checkpoint."
        raise refuse("schedule_steps", config.schedule_steps, allowed, remedy)


def check_server(tensor_parallel: int, pipeline_parallel: int, quantization: str | None, enable_lora: bool) -> None:
    """Refuse what has not been tried, or is known to compute something else.

    Args:
        tensor_parallel, pipeline_parallel: sizes. Over several devices the routers would have to see sums over all of them.
        quantization: of the base, as vLLM names it.
        enable_lora: vLLM's own.

    Raises:
        ValueError: naming vLLM's flag and the way out.
    """
    replicas = "Serve more requests with `--data-parallel-size`, each copy on one device."
    if tensor_parallel != 1:
        raise refuse("--tensor-parallel-size", tensor_parallel, "1 for a routed adapter", replicas)
    if pipeline_parallel != 1:
        raise refuse("--pipeline-parallel-size", pipeline_parallel, "1 for a routed adapter", replicas)
    if quantization is not None:
        remedy = "Serve the base in bf16 or fp16; nobody has tried routed layers on vLLM's quantised ones."
        raise refuse("--quantization", quantization, "left out for a routed adapter", remedy)
    if enable_lora:
        remedy = (
            "Its LoRA would be added below the experts: serve plain LoRAs from a server without the routed adapter."
        )
        raise refuse("--enable-lora", True, "left out for a routed adapter", remedy)


def _in_order(name: str) -> tuple[tuple[int, str], ...]:
    """Layer 2 before layer 10."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in name.split("."))
