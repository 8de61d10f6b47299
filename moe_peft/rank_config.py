"""The config of `rank_moe`, where each rank of one LoRA is an expert, and what it refuses."""

from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from moe_peft.allocation import Allocation, parse
from moe_peft.balance_checks import check_balance, check_unused
from moe_peft.config import MoeConfig
from moe_peft.config_checks import check_booleans, check_layers, check_numbers, is_count, is_number
from moe_peft.errors import nearest, refuse


SIGMOID, SELF = "sigmoid_top_k", "self_activated"
RANK_RULES = (SIGMOID, SELF)
"""The values of `routing` here: SMoRA's and MoRAM's."""

TOP_K = 8
"""The default of `top_k`: that of both papers. Layers of a smaller rank visit all that they have."""

TEMPERATURE = 0.03
"""The default of `temperature`: MoRAM's for language models."""


@dataclass
class RankMoeConfig(MoeConfig):
    """One LoRA on each linear layer of which every token uses `top_k` ranks (SMoRA, MoRAM).

    The fields are those of [`MoeConfig`] but for `num_experts`, which is the rank, and:

    Args:
        r (`int`, `str` or `list[int]`, *optional*, defaults to 64):
            Ranks per adapted layer, each of them an expert; written as in [`MoeConfig`].
        top_k (`int`, *optional*):
            Ranks that each token uses. Defaults to 8, or to the smallest `r` where that is less.
        lora_alpha (`int` or `float`, *optional*, defaults to 16):
            Under "sigmoid_top_k" the scale is `lora_alpha / top_k`: the gates sum to `top_k`, so that all ranks with
            equal gates are LoRA with scale `lora_alpha / r`. Under "self_activated" it is `lora_alpha / r`, and the
            weights sum to 1.
        use_rslora (`bool`, *optional*, defaults to `False`):
            Divide by the square root instead: `lora_alpha / sqrt(top_k)`, `lora_alpha / sqrt(r)`.
        routing (`str`, *optional*, defaults to `"sigmoid_top_k"`):
            "sigmoid_top_k": a learned router scores each rank by itself (SMoRA). Its parameters are as many as those of
            A, half as much again as the LoRA has. "self_activated": no router; a rank's response `A_i x` is its score
            (MoRAM). Such an adapter takes on ranks for a new task: [`moe_peft.grow`].
        rank_partition (`int`, *optional*, defaults to 1):
            So many neighbouring ranks share one row of the router. Divides `r` and `top_k`: more makes the router
            smaller and the choice coarser.
        bias_in_gates (`bool`, *optional*, defaults to `False`):
            Let the selection bias enter the gates too, as SMoRA's released code does. Otherwise it only selects.
        temperature (`float`, *optional*):
            Of the softmax over the chosen ranks under "self_activated"; above 0. Defaults to 0.03. Lower gives the
            strongest rank nearly all the weight.
        threshold (`float`, *optional*):
            Under "self_activated", in inference alone: a chosen rank whose share of the response, from -1 to 1, lies
            below it adds nothing. The papers use 0.2; with R ranks a share is about `1 / sqrt(R)`, so that higher
            leaves little. Defaults to `None`, no threshold.
        balance (`str`, *optional*):
            "bias": a bias on the selection that follows the load (SMoRA's). "switch", "none". Defaults to "bias" under
            "sigmoid_top_k"; "self_activated" has "none".
        lora_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on the input of A. A router sees the input without it; a rank's own response does not.
        frozen_r (`list`, *optional*):
            Ranks of earlier tasks, one entry of the form of `r` for each. Written by [`moe_peft.grow`], not by hand.
    """

    r: Allocation = field(default=64, metadata={"help": "Ranks per layer, each an expert."})
    num_experts: Allocation | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, metadata={"help": "Left out: each rank is an expert."}
    )
    routing: str = field(default=SIGMOID, metadata={"help": "How a token chooses its ranks."})
    rank_partition: int = field(default=1, metadata={"help": "Neighbouring ranks that share a row of the router."})
    bias_in_gates: bool = field(default=False, metadata={"help": "The selection bias enters the gates too."})
    temperature: float | None = field(default=None, metadata={"help": "Of the softmax under 'self_activated'."})
    threshold: float | None = field(default=None, metadata={"help": "Smallest share of a rank, in inference."})
    frozen_r: list[Any] | None = field(default=None, metadata={"help": "Ranks of earlier tasks; written by grow."})

    def __post_init__(self) -> None:
        PeftConfig.__post_init__(self)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        _check_experts(self)
        _check_other_routers(self)
        check_booleans(self)
        if not isinstance(self.init_weights, bool):
            raise refuse("init_weights", self.init_weights, "True or False for ranks", "A starts at random here.")
        check_numbers(_shared(self))
        check_layers(self)
        _check_rule(self)
        _check_top_k(self)
        _check_router(self)
        _check_responses(self)
        _check_balance(self)
        self.peft_type = PeftType["RANK_MOE"]


def _shared(config: RankMoeConfig, **changes: Any) -> SimpleNamespace:
    """The config as the checks of all types know it."""
    return SimpleNamespace(**{**vars(config), "num_experts": 1, **changes})


def _check_experts(config: RankMoeConfig) -> None:
    if config.num_experts is not None:
        remedy = "Each rank is an expert here, so `r` says how many there are: remove `num_experts` and set `r`."
        raise refuse("num_experts", config.num_experts, "left out", remedy)
    if config.num_shared_experts != 0:
        remedy = "Remove it. A plain LoRA as a second active adapter does the same."
        raise refuse("num_shared_experts", config.num_shared_experts, "0 for ranks", remedy)


_HERE = {"r", "num_experts", "num_shared_experts", "top_k", "lora_alpha", "use_rslora", "lora_dropout", "routing"}
_HERE |= {"router_init_std", "router_scale", "balance", "router_aux_loss_coef", "bias_update_speed"}
_HERE |= {"target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"}
_HERE |= {"trainable_token_indices", "init_weights", "plugin"}
"""The fields of [`MoeConfig`] that mean something for ranks."""


def _check_other_routers(config: RankMoeConfig) -> None:
    """What whole experts have and ranks do not: written, it would be ignored."""
    of_peft = {f.name for f in fields(PeftConfig)}
    for f in fields(MoeConfig):
        value = getattr(config, f.name)
        if f.name not in _HERE | of_peft and value != f.default:
            remedy = f"Remove `{f.name}`, or use LinearMoeConfig, whose experts it is for."
            raise refuse(f.name, value, f"left out for ranks ({f.default!r})", remedy)


def _check_rule(config: RankMoeConfig) -> None:
    if config.routing not in RANK_RULES:
        allowed = "one of " + ", ".join(map(repr, RANK_RULES)) + " for ranks"
        remedy = f"{nearest(str(config.routing), RANK_RULES)} Whole experts are LinearMoeConfig's and FfnMoeConfig's."
        raise refuse("routing", config.routing, allowed, remedy)


def _check_top_k(config: RankMoeConfig) -> None:
    ranks = parse(config.r, "r")
    earlier = config.frozen_r if config.routing == SELF and isinstance(config.frozen_r, list) else []
    frozen = [parse(entry, "frozen_r") for entry in earlier]  # ranks of earlier tasks compete too
    fewest, most = (sum(map(end, frozen)) + end(ranks) for end in (min, max))
    if config.top_k is None:
        config.top_k = min(TOP_K, fewest)
    k = config.top_k
    if not is_count(k, 1):
        raise refuse("top_k", k, "a whole number of at least 1", f"SMoRA and MoRAM use {TOP_K}.")
    if k > fewest:
        remedy = "A token cannot use more ranks than its layer has: lower `top_k` or raise the smallest number."
        with_earlier = f" with the {len(frozen)} of `frozen_r`" if frozen else ""
        raise refuse("top_k", k, f"at most {fewest}, the smallest `r` of {config.r!r}{with_earlier}", remedy)
    if k == 1 and most > 1:
        why = "the one gate would always be 1, and the task would never train the choice"
        remedy = f"With `top_k` = 1 {why}: raise it, and the smallest `r` with it."
        raise refuse("top_k", 1, f"at least 2 where a layer has {most} ranks", remedy)


def _check_router(config: RankMoeConfig) -> None:
    part = config.rank_partition
    if not is_count(part, 1):
        raise refuse("rank_partition", part, "a whole number of at least 1", "1 gives every rank a row of its own.")
    if config.routing == SELF:
        for name, none in (
            ("rank_partition", 1),
            ("bias_in_gates", False),
            ("router_scale", 1.0),
            ("router_init_std", None),
        ):
            if getattr(config, name) != none:
                remedy = f"There is no router: remove `{name}`, or set `routing` to {SIGMOID!r}."
                raise refuse(name, getattr(config, name), f"left out with `routing` = {SELF!r}", remedy)
        return
    for r in parse(config.r, "r"):
        if r % part:
            raise refuse("rank_partition", part, f"a divisor of `r` = {config.r!r}", f"{r} cannot be split by it.")
    assert config.top_k is not None
    if config.top_k % part:
        remedy = (
            "Ranks that share a row score alike, and which of them are chosen would be left to chance: choose whole "
            "groups."
        )
        raise refuse("rank_partition", part, f"a divisor of `top_k` = {config.top_k}", remedy)


def _check_responses(config: RankMoeConfig) -> None:
    """The fields of "self_activated"."""
    if config.routing != SELF:
        for name in ("temperature", "threshold", "frozen_r"):
            if getattr(config, name) is not None:
                remedy = f"Remove `{name}`, or set `routing` to {SELF!r}."
                raise refuse(name, getattr(config, name), f"left out with `routing` = {config.routing!r}", remedy)
        return
    config.temperature = TEMPERATURE if config.temperature is None else config.temperature
    if not is_number(config.temperature) or config.temperature <= 0:
        raise refuse("temperature", config.temperature, "above 0", "MoRAM uses 0.03 for text and 0.01 for images.")
    if config.threshold is not None and (not is_number(config.threshold) or not -1 <= config.threshold <= 1):
        raise refuse("threshold", config.threshold, "from -1 to 1, or None", "MoRAM uses 0.2.")
    if config.frozen_r is not None:
        if not isinstance(config.frozen_r, list) or not config.frozen_r:
            allowed = "a list with one entry for each earlier task, or None"
            raise refuse("frozen_r", config.frozen_r, allowed, "`moe_peft.grow` writes it: leave it out.")
        for entry in config.frozen_r:
            parse(entry, "frozen_r")


def _check_balance(config: RankMoeConfig) -> None:
    allowed = ("none",) if config.routing == SELF else ("bias", "switch", "none")
    if config.balance is None:
        config.balance = allowed[0]
    if config.balance not in allowed:
        names = ("one of " if len(allowed) > 1 else "") + ", ".join(map(repr, allowed))
        remedy = "There is no router to balance." if config.routing == SELF else nearest(str(config.balance), allowed)
        raise refuse("balance", config.balance, f"{names} with `routing` = {config.routing!r}", remedy)
    if config.bias_in_gates and config.balance != "bias":
        remedy = "There is no bias without it: set `balance` to 'bias', or remove `bias_in_gates`."
        raise refuse("bias_in_gates", True, f"left out with `balance` = {config.balance!r}", remedy)
    check_balance(_shared(config, balance="none"))
    check_unused(config)
