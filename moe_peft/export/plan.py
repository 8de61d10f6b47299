"""What an export will be: everything that can be found out, and refused, before a byte is written."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from moe_peft.backbone import model_path
from moe_peft.errors import nearest, refuse
from moe_peft.export.adapter import FfnAdapter
from moe_peft.export.checkpoint import Checkpoint, local_folder, torch_dtype
from moe_peft.export.choose import Choice, choose, config_entries
from moe_peft.export.routes import LANGUAGE_MODEL, caveats_of, splits
from moe_peft.export.weights import Sources, nf4, plan_tensors
from moe_peft.export.writer import PlannedTensor, gigabytes


BASE_WEIGHTS = ("auto", "original", "dequantized")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ExportPlan:
    """All that is known before a byte is written.

    Attributes:
        base_name, adapter_name: as the user wrote them.
        base, adapter: the files.
        config: of the dense model.
        choice: the target, and how the experts lie in it.
        dtype: of the export.
        base_weights: "original" or "dequantized".
        why_base_weights: the reason, as a sentence.
    """

    base_name: str
    adapter_name: str
    base: Checkpoint
    adapter: FfnAdapter
    config: dict[str, Any]
    choice: Choice
    dtype: torch.dtype
    base_weights: str
    why_base_weights: str

    @cached_property
    def sources(self) -> Sources:
        return Sources(self.base, self.adapter, nf4 if self.base_weights == "dequantized" else None)

    @cached_property
    def tensors(self) -> list[PlannedTensor]:
        return plan_tensors(self.sources, self.config, self.choice, self.dtype)

    @property
    def target(self) -> str:
        return self.choice.target.model_type

    @property
    def parameters(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def active_parameters(self) -> int:
        """What one token uses: all but the experts that it does not visit."""
        one = 3 * self.config["hidden_size"] * self.config["intermediate_size"]
        return self.parameters - len(self.choice.slots) * (self.choice.num_experts - self.choice.top_k) * one

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def experts_per_layer(self) -> list[int]:
        """What the adapter has; 1 is a layer without a router."""
        return [self.adapter.routed.get(layer, 1) for layer in range(self.config["num_hidden_layers"])]

    @property
    def notes(self) -> list[str]:
        """What somebody might not expect, then what is known of servers; without full stops."""
        renormalised = self.choice.renormalised
        copies = ["experts that several of the router's choices share are written out once for each of them"]
        shared = copies if self.adapter.expert_maps else []
        return [*self.choice.notes, *shared, *caveats_of(self.choice.target, renormalised, self.config, self.choice)]

    def rows(self) -> list[tuple[str, str]]:
        """The plan as a table of two columns, for `--check`."""
        counts = self.experts_per_layer
        varied = f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else str(counts[0])
        return [
            ("from", f"{self.base_name} ({self.config['model_type']}) with {self.adapter_name}"),
            ("to", f"{self.choice.target.architecture} ({self.target})"),
            (
                "experts",
                f"{self.choice.num_experts} in each of {len(self.choice.slots)} layers, top {self.choice.top_k}",
            ),
            ("the adapter has", f"{varied} experts per layer, routing '{self.adapter.config.get('routing')}'"),
            ("parameters", f"{self.parameters:,}, a token uses {self.active_parameters:,}"),
            ("size", f"{gigabytes(self.nbytes)} in {str(self.dtype).removeprefix('torch.')}"),
            ("frozen weights", f"{self.base_weights}: {self.why_base_weights}"),
            *(("note", note) for note in self.notes),
        ]

    def target_config(self) -> PreTrainedConfig:
        return make_config(self.config, self.choice, self.dtype)


def make_config(config: Mapping[str, Any], choice: Choice, dtype: torch.dtype) -> PreTrainedConfig:
    """The exported model's config, its balance loss off: the mixture is trained, and its routers are to stay."""
    made = AutoConfig.for_model(choice.target.model_type, **config_entries(config, choice))
    for name, value in (("router_aux_loss_coef", 0.0), ("output_router_logits", False)):
        if hasattr(made, name):
            setattr(made, name, value)
    made.architectures = [choice.target.architecture]
    made.dtype = dtype
    return made


def plan_export(
    base: str, adapter: str, target: str = "auto", base_weights: str = "auto", dtype: str = "auto"
) -> ExportPlan:
    """Everything that can be found out, and refused, without writing.

    Args:
        base: the dense model that the adapter was trained on: a folder, an id on the Hub, or 'pocket'.
        adapter: a folder or an id on the Hub.
        target: a key of `TARGETS`, or "auto" for the best known one that is exact.
        base_weights: "original"; "dequantized" for what a backbone in 4 bits (NF4) computed with; "auto" asks the log of
            the training run, and takes the original ones if there is none.
        dtype: "float32", "bfloat16", "float16", or "auto" for the base model's.

    Raises:
        ValueError: whatever stands against the export, in words.
    """
    if base_weights not in BASE_WEIGHTS:
        allowed = "one of " + ", ".join(map(repr, BASE_WEIGHTS))
        raise refuse("base_weights", base_weights, allowed, nearest(base_weights, BASE_WEIGHTS))
    if dtype not in ("auto", *DTYPES):
        allowed = "'auto' or one of " + ", ".join(map(repr, DTYPES))
        raise refuse("dtype", dtype, allowed, nearest(dtype, ("auto", *DTYPES)))
    experts = FfnAdapter(adapter)
    folder = local_folder(model_path(base))
    whole = AutoConfig.from_pretrained(folder).to_dict()
    if whole.get("quantization_config"):
        raise ValueError(
            f"'{base}' is quantised already. Give the model that it was made from: the experts are written out in full "
            "precision. If the adapter was trained on 4 bits, add base_weights='dequantized'."
        )
    family = whole["model_type"]
    config = whole["text_config"] if family in LANGUAGE_MODEL and "text_config" in whole else whole
    choice = choose(config, experts, target)
    weights = Checkpoint(folder, inside=LANGUAGE_MODEL.get(family))
    _check_fit(config, weights, experts)
    stored = torch_dtype(weights.dtypes["model.embed_tokens.weight"])
    kept, why = frozen_weights(experts.folder, base_weights)
    return ExportPlan(
        base_name=base,
        adapter_name=adapter,
        base=weights,
        adapter=experts,
        config=config,
        choice=choice,
        dtype=DTYPES.get(dtype, stored),
        base_weights=kept,
        why_base_weights=why,
    )


def _check_fit(config: Mapping[str, Any], base: Checkpoint, adapter: FfnAdapter) -> None:
    """The base is whole, and the adapter's linears are in it."""
    fused = "mlp.gate_up_proj" in splits(config)
    block = {"gate_up_proj", "down_proj"} if fused else {"gate_proj", "up_proj", "down_proj"}
    if adapter.block_linears != block:
        there, wanted = ", ".join(sorted(adapter.block_linears)), ", ".join(sorted(block))
        raise ValueError(
            f"'{adapter.folder}' has experts on {there} of the FFN, but a {config['model_type']} block consists of {wanted}. "
            "Give the base model that the adapter was trained on; if this is the one, the adapter's file is not whole."
        )
    layers = range(config["num_hidden_layers"])
    wanted = [f"model.layers.{layer}.mlp.{linear}.weight" for layer in layers for linear in sorted(block)]
    for name in ("model.embed_tokens.weight", *wanted):
        if name not in base:
            raise ValueError(f"'{base.folder}' lacks the tensor '{name}', which its config asks for. Fetch it anew.")
    for module, (_, _, d_in) in adapter.linears.items():
        d_out = adapter.checkpoint.shapes[f"base_model.model.{module}.ffn_moe_experts.lora_B"][-1]
        shape = base.shapes.get(f"{module}.weight")
        if shape != (d_out, d_in):
            there = "no such layer" if shape is None else f"a weight of {shape[0]} x {shape[1]}"
            raise ValueError(
                f"The adapter changes '{module}' ({d_out} x {d_in}), but '{base.folder}' has {there}. Give the base model "
                f"that it was trained on: {adapter.config.get('base_model_name_or_path')}."
            )


def trained_in(adapter: Path) -> str | None:
    """How the backbone was loaded in training, "4bit", "8bit" or "none"; None if no training log says so."""
    log = adapter / "training_log.json"
    if not log.is_file():
        return None
    settings = json.loads(log.read_text(encoding="utf-8")).get("settings", {})
    return "none" if settings.get("no_quantize") else settings.get("load_in", "4bit")


def frozen_weights(adapter: Path, wanted: str) -> tuple[str, str]:
    """Which frozen weights to take, and why."""
    log, loaded = adapter / "training_log.json", trained_in(adapter)
    if wanted != "auto":
        unlike = loaded is not None and (loaded == "4bit") != (wanted == "dequantized")
        return wanted, "as you asked" + (f", though {log.name} says load_in {loaded}" if unlike else "")
    if loaded == "4bit":
        return "dequantized", f"{log.name} says that the experts were trained on a backbone in 4 bits"
    if loaded == "8bit":
        return "original", f"{log.name} says 8 bits, which are not rebuilt here: close, but not what training saw"
    if loaded == "none":
        return "original", f"{log.name} says that the backbone was not quantised"
    return "original", "nothing says how the backbone was loaded; if in 4 bits, ask for 'dequantized'"
