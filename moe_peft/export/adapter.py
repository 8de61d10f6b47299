"""An FFN mixture as it lies on disk: its rule of routing, and each layer's experts, without PEFT and without a model.

Layout (`moe_peft.tuners.ffn_moe`), E routed experts, S shared ones, PREFIX = `base_model.model.`:

    PREFIX <linear> .ffn_moe_experts.lora_A           [E + S, r, d_in]
    PREFIX <linear> .ffn_moe_experts.lora_B           [E + S, r, d_out]
    PREFIX <first linear of a block> .ffn_moe_experts.router          [E, d]
    PREFIX <first linear of a block> .ffn_moe_experts.selection_bias  [E]
    PREFIX <first linear of a block> .ffn_moe_experts.expert_map      [E], where choices of the router share experts
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from moe_peft.errors import refuse
from moe_peft.export.checkpoint import Checkpoint, local_folder


_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.ffn_moe_experts\.(?P<part>\w+)")
_BLOCK = re.compile(r".*\.layers\.(?P<layer>\d+)\.mlp")
_PARTS = ("lora_A", "lora_B", "router", "router_bias", "selection_bias", "expert_map")


class Rule(NamedTuple):
    """How a token's experts and their weights follow from the router's logits.

    Attributes:
        score: "softmax" or "sigmoid" of the logits.
        renormalised: whether the weights of the chosen experts are rescaled to sum to 1.
        top_k: how many are chosen; None is all of them.
    """

    score: str
    renormalised: bool
    top_k: int | None


def rule_of(config: Mapping[str, Any]) -> Rule:
    """The rule of an adapter's config.

    Raises:
        ValueError: if no stock MoE model routes like that.
    """
    routing, top_k = config.get("routing", "softmax_top_k"), config.get("top_k")
    if routing == "top_k" and config.get("norm_topk_prob") and config.get("scoring_func") in ("softmax", "sigmoid"):
        return Rule(str(config["scoring_func"]), True, 2 if top_k is None else top_k)
    if routing in ("softmax_top_k", "sigmoid_top_k"):
        return Rule(routing.split("_")[0], True, 2 if top_k is None else top_k)
    if routing == "softmax":
        return Rule("softmax", True, None)
    if routing == "top_1":
        return Rule("softmax", False, 1)
    if routing in ("top_1_hard", "top_1_straight_through"):  # the one weight is exactly 1, as renormalising makes it
        return Rule("softmax", True, 1)
    raise refuse(
        "routing",
        routing,
        "'softmax_top_k', 'softmax', 'top_1', 'top_1_hard', 'top_1_straight_through' or 'sigmoid_top_k' for an export",
        "No stock MoE model visits a varying number of experts. Serve it routed, or train with "
        "routing='sigmoid_top_k', which exports for most backbones.",
    )


class FfnAdapter:
    """The adapter's tensors by what they are.

    Attributes:
        folder, config: where it lies, and its `adapter_config.json`.
        rule: of routing.
        shared: how many experts every token visits.
        linears: module path -> shape of its `lora_A`, `[experts, r, d_in]`.
        routed: layer -> number of experts that its router chooses from; layers with a single expert have none.
        expert_maps: layer -> for each of these, which of the experts in the file it is, where several share one.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the config and the weights' header, and check that every layer is whole.

        Raises:
            ValueError: another type of adapter, something that no stock model has, or a tensor that is missing.
        """
        self.folder = local_folder(folder)
        self.config = _read_config(self.folder)
        self.rule = rule_of(self.config)
        self.shared: int = self.config.get("num_shared_experts", 0)
        self.router_scale: float = self.config.get("router_scale", 1.0)
        self.checkpoint = Checkpoint(self.folder, "adapter_model")
        self._keys = self._sort_keys()
        self.linears = {m: self._shape(m, "lora_A") for m, part in self._keys if part == "lora_A"}
        self._check_pairs()
        self.routed: dict[int, int] = {}
        self.expert_maps: dict[int, list[int]] = {}
        self._routers: dict[int, str] = {}
        for module, part in self._keys:
            if part == "router":
                layer = self._layer_of(module)
                self._routers[layer] = module
                self.routed[layer] = self._shape(module, "router")[0]
            if part == "expert_map":
                self.expert_maps[self._layer_of(module)] = self._read(module, part).long().tolist()
        self._check_blocks()

    def _sort_keys(self) -> dict[tuple[str, str], str]:
        found = {}
        for key in self.checkpoint.files:
            match = _KEY.fullmatch(key)
            if match is None or match["part"] not in _PARTS:
                raise ValueError(
                    f"'{self.folder}' has a tensor '{key}', which no stock MoE model has a place for. Modules that were "
                    "trained beside the experts cannot be exported."
                )
            found[match["module"], match["part"]] = key
        if not found:
            raise ValueError(
                f"'{self.folder}' has no experts in its adapter_model.safetensors. Save the adapter again."
            )
        return found

    def _shape(self, module: str, part: str) -> tuple[int, ...]:
        return self.checkpoint.shapes[self._keys[module, part]]

    def _layer_of(self, module: str) -> int:
        match = _BLOCK.fullmatch(module.rsplit(".", 1)[0])
        if match is None:
            raise ValueError(
                f"The router at '{module}' is not in a decoder layer's `mlp`, where stock MoE models have theirs. Serve "
                "the adapter routed."
            )
        return int(match["layer"])

    def _check_pairs(self) -> None:
        for module, part in self._keys:
            if part == "router_bias":
                raise refuse(
                    "router_bias", True, "False for an export", "No stock MoE model has a bias on its router."
                )
            other = {"lora_A": "lora_B", "lora_B": "lora_A"}.get(part)
            if other is not None and (module, other) not in self._keys:
                raise self._missing(module, other)
        for module, (experts, r, _) in self.linears.items():
            if self._shape(module, "lora_B")[:2] != (experts, r):
                raise ValueError(
                    f"'{module}' has lora_A for {experts} experts of rank {r}, but lora_B of shape "
                    f"{list(self._shape(module, 'lora_B'))}. The file is damaged: save the adapter again."
                )

    def _missing(self, module: str, part: str) -> ValueError:
        return ValueError(
            f"'{self.folder}' lacks the tensor 'base_model.model.{module}.ffn_moe_experts.{part}', without which an "
            "expert is not whole. Save the adapter again, or fetch it anew."
        )

    def _check_blocks(self) -> None:
        """Every block has the same linears, each with the experts that its router chooses from."""
        blocks: dict[str, set[str]] = {}
        for module in self.linears:
            parent, _, name = module.rpartition(".")
            if _BLOCK.fullmatch(parent):
                blocks.setdefault(parent, set()).add(name)
            elif self.linears[module][0] != 1 + self.shared and self.linears[module][0] != 1:
                raise ValueError(
                    f"'{module}' holds {self.linears[module][0]} experts outside the FFN. Stock MoE models route the FFN "
                    "alone: serve the adapter routed."
                )
        whole = set().union(*blocks.values())
        for block, names in blocks.items():
            for name in sorted(whole - names):
                raise self._missing(f"{block}.{name}", "lora_A")
            layer = self._layer_of(f"{block}.x")
            wanted = self._distinct(layer) + self.shared
            for name in sorted(names):
                if self.linears[f"{block}.{name}"][0] != wanted:
                    if layer not in self.routed:
                        raise self._missing(f"{block}.{min(names)}", "router")
                    raise ValueError(
                        f"'{block}.{name}' holds {self.linears[f'{block}.{name}'][0]} experts, but its router and "
                        f"`num_shared_experts` = {self.shared} ask for {wanted}. The file and its config do not belong "
                        "together."
                    )
        self.block_linears = whole
        if not whole:
            raise ValueError(
                f"'{self.folder}' adapts no FFN: it is a plain LoRA, which `merge_and_unload` of PEFT merges."
            )

    def _distinct(self, layer: int) -> int:
        """How many of a layer's experts have weights of their own.

        Raises:
            ValueError: if the map of the router's choices does not fit the router.
        """
        of, choices = self.expert_maps.get(layer), self.routed.get(layer, 1)
        if of is None:
            return choices
        if len(of) != choices or set(of) != set(range(max(of) + 1)):
            raise ValueError(
                f"The `expert_map` of layer {layer} has {len(of)} entries up to {max(of)} for a router of {choices} choices. "
                "The file is damaged: save the adapter again."
            )
        return max(of) + 1

    def factors(self, module: str, expert: int, rows: tuple[int, int] | None = None) -> tuple[Tensor, Tensor] | None:
        """What an expert adds to a frozen weight, shared experts included, as a product: `[rows, R]` times `[R, d_in]`, in
        fp32 and with the scale in it; None is nothing.

        Args:
            module: path of the linear layer.
            expert: its number among the router's choices; outside the FFN there is only one.
            rows: of the weight; None is all.
        """
        if module not in self.linears:
            return None
        total, r, _ = self.linears[module]
        if _BLOCK.fullmatch(module.rsplit(".", 1)[0]) is None:
            chosen = list(range(total))
        else:
            of = self.expert_maps.get(self._layer_of(module))
            chosen = [expert if of is None else of[expert], *range(total - self.shared, total)]
        A = self._read(module, "lora_A")[chosen].flatten(0, 1)
        B = self._read(module, "lora_B")[chosen].flatten(0, 1)
        B = B if rows is None else B[:, rows[0] : rows[1]]
        return self.scale(r) * B.T, A

    def scale(self, r: int) -> float:
        """What the experts' output is multiplied by in a layer of rank `r`."""
        alpha = self.config.get("lora_alpha", 16)
        return alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)

    def router(self, layer: int) -> Tensor:
        """The rows of a layer's router with its scale, `[E, d]` in fp32."""
        return self.router_scale * self._read(self._routers[layer], "router")

    def selection_bias(self, layer: int) -> Tensor | None:
        """`[E]` in fp32, what is added to the scores for choosing only; None if there is none."""
        module = self._routers[layer]
        return self._read(module, "selection_bias") if (module, "selection_bias") in self._keys else None

    def _read(self, module: str, part: str) -> Tensor:
        return self.checkpoint.read(self._keys[module, part]).float()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"'{folder}' holds no adapter: there is no adapter_config.json in it.")
    config = json.loads(path.read_text(encoding="utf-8"))
    kind = config.get("peft_type")
    if kind != "FFN_MOE":
        remedy = {
            "LINEAR_MOE": "It has a router on each linear layer, and stock MoE models have one on each FFN block. `moe-peft "
            "merge` makes a static LoRA of it and measures what that loses.",
            "LORA": "PEFT's `merge_and_unload` merges a plain LoRA.",
        }.get(str(kind), "Only FFN mixtures such as 'mixlora' become stock MoE models.")
        raise refuse("peft_type", kind, "'FFN_MOE' for an export", remedy)
    for name in ("modules_to_save", "trainable_token_indices"):
        if config.get(name):
            raise refuse(name, config[name], "None for an export", "The export reads the experts alone.")
    if config.get("num_null_experts"):
        raise refuse(
            "num_null_experts",
            config["num_null_experts"],
            "0 for an export",
            "A token that chose null experts gives their weight to the others, and no stock MoE model does that: serve the "
            "adapter routed.",
        )
    if config.get("router_bias"):
        raise refuse(
            "router_bias", True, "False for an export", "No stock MoE model has a bias on its router: train without."
        )
    for name, said, remedy in _NO_STOCK_MODEL:
        value = config.get(name)
        if value is not None and value not in said:
            allowed = f"{' or '.join(map(repr, said)) or 'None'} for an export"
            raise refuse(name, value, allowed, f"No stock MoE model {remedy}: serve the adapter routed.")
    if config.get("balance") == "bias" and rule_of(config).score != "sigmoid":
        remedy = "Only routers with sigmoid scores have a selection bias there: train with routing='sigmoid_top_k'."
        raise refuse("balance", "bias", "another for an export", remedy)
    return config


_NO_STOCK_MODEL = (
    ("scoring_func", ("softmax", "sigmoid"), "routes by cosines"),
    ("router_act", (), "has an activation on its router's logits"),
    ("router_granularity", ("token",), "routes whole sequences"),
    ("expert_groups", (), "is told task types"),
)
"""Fields of the router, what they may be, and what a stock model would have to do otherwise."""
