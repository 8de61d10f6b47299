"""One dataclass per adapter type over a shared base: every knob a user can turn, checked in `__post_init__`.

The names are PEFT's for LoRA (`r`, `lora_alpha`, `target_modules`) and transformers' for experts (`num_experts`,
`top_k`, `router_aux_loss_coef`). Every value that a check can refuse is refused here, before any model is touched.
"""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from moe_peft.allocation import Allocation, parse
from moe_peft.balance import BALANCES
from moe_peft.errors import nearest, refuse
from moe_peft.routing import DENSE_RULES, ROUTING_RULES
from moe_peft.saving import check_weights


@dataclass
class MoeConfig(PeftConfig):
    """What every adapter type of this package shares; not an adapter type itself.

    Args:
        r (`int`, `str` or `list[int]`, *optional*, defaults to 8):
            Rank of one expert: one number, numbers for consecutive groups of layers ("4:4:8:8"), or a list with one per
            layer. Parameters grow linearly with it.
        num_experts (`int`, `str` or `list[int]`, *optional*, defaults to 8):
            Experts per adapted layer, written like `r` ("2:4:6:8" is MoLA's allocation).
        num_shared_experts (`int`, *optional*, defaults to 0):
            Further experts of the same rank that every token visits with weight 1 (DeepSeekMoE). They take up what all
            tokens have in common and learn as fast as plain LoRA; the routed ones are left with the differences.
        top_k (`int`, *optional*):
            Experts that each token visits. Defaults to 2 under `routing="softmax_top_k"`; the other rules fix it.
        lora_alpha (`int` or `float`, *optional*, defaults to 16):
            The experts' output is scaled by `lora_alpha / r`, with the `r` of the layer.
        use_rslora (`bool`, *optional*, defaults to `False`):
            Scale by `lora_alpha / sqrt(r)` instead (https://huggingface.co/papers/2312.03732).
        lora_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on the experts' input, one mask for all of them; the router sees the input without it.
        routing (`str`, *optional*, defaults to `"softmax_top_k"`):
            "softmax_top_k": softmax, keep `top_k`, rescale to sum 1. "softmax": every expert, weighted. "top_1": the most
            probable expert, weighted by its probability.
        balance (`str`, *optional*):
            "switch": load balancing per layer over a window of micro-batches and all ranks. "localized": LoRAMoE's
            constraint, which needs `task_types` in the batch. "none". Defaults to "switch" where a rule selects and to
            "none" where every expert is used.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.001):
            Weight of the balance loss, whose value is 1 when experts are used evenly. Higher evens them out more.
        balance_delta (`float`, *optional*, defaults to 0.1):
            How strongly "localized" separates the two halves of the experts; 0 treats all alike.
        router_init_std (`float`, *optional*):
            Standard deviation of the router's start. Small: the start is near uniform. Defaults to `None`, which draws
            as `nn.Linear` does (Kaiming uniform with a = sqrt(5), as MoLA and LoRAMoE), divided by `router_scale`.
        router_scale (`float`, *optional*, defaults to 1.0):
            Multiplies the router's logits. Under Adam it acts as a learning rate of the router's own: at 0.1 the choice
            of experts moves ten times slower than the experts learn, which keeps it from wandering before they differ.
        target_modules (`list[str]` or `str`, *optional*):
            Names or regex of the linear layers to adapt, or "all-linear". Defaults to PEFT's LoRA targets of the model.
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in `LoraConfig`.
        trainable_token_indices: as in `LoraConfig`; TRL sets it when a chat template adds tokens.
    """

    r: Allocation = field(default=8, metadata={"help": "Rank of one expert."})
    num_experts: Allocation = field(default=8, metadata={"help": "Experts per adapted layer."})
    num_shared_experts: int = field(default=0, metadata={"help": "Further experts that every token visits."})
    top_k: int | None = field(default=None, metadata={"help": "Experts that each token visits."})
    lora_alpha: int | float = field(default=16, metadata={"help": "Scale of the experts' output, over r."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the experts' input."})
    routing: str = field(default="softmax_top_k", metadata={"help": "How a token chooses its experts."})
    balance: str | None = field(default=None, metadata={"help": "What keeps the experts in use."})
    router_aux_loss_coef: float = field(default=0.001, metadata={"help": "Weight of the balance loss."})
    balance_delta: float = field(default=0.1, metadata={"help": "Separation of the halves under 'localized'."})
    router_init_std: float | None = field(default=None, metadata={"help": "Spread of the router's start."})
    router_scale: float = field(default=1.0, metadata={"help": "Multiplies the router's logits."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "The linear layers to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave alone."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer numbers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layer list."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Embedding rows to train."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Start with B = 0. False gives a random function, for tests only."}
    )
    plugin: str = field(default="moe_peft", metadata={"help": "The package to import before loading this adapter."})

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # PEFT drops an unknown key with a warning and trains the default; here it is an error.
        known = {f.name for f in fields(cls)}
        for key in kwargs:
            if key not in known:
                raise ValueError(f"`{key}` is not a field of {cls.__name__}. {nearest(key, known)}")
        return super().__new__(cls)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """As PEFT's, which also comes first when weights are loaded: damaged ones are refused here."""
        check_weights(Path(pretrained_model_name_or_path, subfolder or ""))
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        _check_numbers(self)
        _check_layers(self)
        _check_routing(self)
        _check_balance(self)


@dataclass
class LinearMoeConfig(MoeConfig):
    """A router and LoRA experts on each adapted linear layer (MoLA, LoRAMoE). The fields are those of [`MoeConfig`]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["LINEAR_MOE"]


def _check_numbers(config: MoeConfig) -> None:
    parse(config.r, "r")
    parse(config.num_experts, "num_experts")
    shared = config.num_shared_experts
    if isinstance(shared, bool) or not isinstance(shared, int) or shared < 0:
        raise refuse("num_shared_experts", shared, "a whole number of at least 0", "1 or 2 are common, 0 is none.")
    if not _is_number(config.lora_alpha) or config.lora_alpha <= 0:
        raise refuse("lora_alpha", config.lora_alpha, "a positive number", "16 is a common choice.")
    if not _is_number(config.lora_dropout) or not 0.0 <= config.lora_dropout < 1.0:
        raise refuse("lora_dropout", config.lora_dropout, "at least 0 and below 1", "Give a share such as 0.05.")
    std = config.router_init_std
    if std is not None and (not _is_number(std) or std < 0):
        raise refuse("router_init_std", std, "at least 0, or None", "0.02 is near uniform.")
    if not _is_number(config.router_scale) or config.router_scale <= 0:
        raise refuse("router_scale", config.router_scale, "a positive number", "1.0 leaves the logits as they are.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_layers(config: MoeConfig) -> None:
    """PEFT would not look at these fields; the sentences are those of its `LoraConfig`."""
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(config.target_modules, str) and getattr(config, name) is not None:
            raise ValueError(
                f"`{name}` cannot be used when `target_modules` is a str. Write the layers into the regex."
            )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")


def _check_routing(config: MoeConfig) -> None:
    if config.routing not in ROUTING_RULES:
        allowed = "one of " + ", ".join(repr(rule) for rule in ROUTING_RULES)
        raise refuse("routing", config.routing, allowed, nearest(str(config.routing), ROUTING_RULES))
    if config.routing != "softmax_top_k":
        fixed = "every expert" if config.routing in DENSE_RULES else "one expert"
        if config.top_k is not None and not (config.routing == "top_1" and config.top_k == 1):
            raise refuse(
                "top_k",
                config.top_k,
                f"left out with `routing` = {config.routing!r}, which sends each token to {fixed}",
                "Remove `top_k`, or set `routing` to 'softmax_top_k'.",
            )
        return
    experts = parse(config.num_experts, "num_experts")
    if config.top_k is None:
        config.top_k = 1 if max(experts) == 1 else 2
    if isinstance(config.top_k, bool) or not isinstance(config.top_k, int) or config.top_k < 1:
        raise refuse("top_k", config.top_k, "a whole number of at least 1", "2 is what MoLA and MixLoRA use.")
    fewest = min(experts)
    if config.top_k > fewest:
        raise refuse(
            "top_k",
            config.top_k,
            f"at most {fewest}, as `num_experts` = {config.num_experts!r} gives some layers only {fewest}",
            "A token cannot visit more experts than its layer has: lower `top_k` or raise the smallest number.",
        )
    if config.top_k == 1 and max(experts) > 1:
        raise refuse(
            "top_k",
            1,
            "at least 2 with `routing` = 'softmax_top_k'",
            "The one weight would always be 1 and the task would never train the router: use `routing` = 'top_1'.",
        )


def _check_balance(config: MoeConfig) -> None:
    if config.balance is None:
        config.balance = "none" if config.routing in DENSE_RULES else "switch"
    if config.balance not in BALANCES:
        allowed = "one of " + ", ".join(repr(name) for name in BALANCES)
        raise refuse("balance", config.balance, allowed, nearest(str(config.balance), BALANCES))
    if not _is_number(config.router_aux_loss_coef) or config.router_aux_loss_coef < 0:
        raise refuse("router_aux_loss_coef", config.router_aux_loss_coef, "at least 0", "0 turns balancing off.")
    if config.balance == "switch" and config.routing in DENSE_RULES:
        raise refuse(
            "balance",
            "switch",
            f"'localized' or 'none' with `routing` = {config.routing!r}",
            "Every token visits every expert there, so the load that 'switch' balances is constant.",
        )
    if config.balance == "localized":
        if not _is_number(config.balance_delta) or not 0.0 <= config.balance_delta < 1.0:
            raise refuse("balance_delta", config.balance_delta, "at least 0 and below 1", "LoRAMoE uses 0.1.")
        odd = [n for n in parse(config.num_experts, "num_experts") if n % 2]
        if odd:
            raise refuse(
                "num_experts",
                config.num_experts,
                "even numbers with `balance` = 'localized', which splits the experts into two halves",
                f"Change {odd[0]} to {odd[0] + 1}.",
            )
