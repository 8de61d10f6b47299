"""One dataclass per adapter type over a shared base: every knob a user can turn, checked in `__post_init__`.

The names are PEFT's for LoRA (`r`, `lora_alpha`, `target_modules`) and transformers' for experts (`num_experts`,
`top_k`, `router_aux_loss_coef`). Every value that a check can refuse is refused here (in `config_checks`), before any
model is touched.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import PeftType

from moe_peft import routing, rules
from moe_peft.allocation import Allocation
from moe_peft.config_checks import (
    ELSEWHERE,
    check_balance,
    check_init,
    check_layers,
    check_localized_is_dense,
    check_numbers,
    check_router,
    check_rule,
    check_top_k,
)
from moe_peft.errors import nearest
from moe_peft.routing import RoutingRule
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
        init_weights (`bool` or `str`, *optional*, defaults to `True`):
            B starts at 0 and a fresh adapter changes nothing. "pissa": likewise, and A starts as the principal right
            singular vectors of the frozen weight, dealt out to the experts; the frozen weight itself is left as it is,
            which PiSSA changes. `False` gives a random function, for tests.
    """

    _rules: ClassVar[Mapping[str, RoutingRule]] = routing.ROUTING_RULES

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
    init_weights: bool | str = field(
        default=True, metadata={"help": "Start with B = 0; 'pissa': and A from the base weight. False is for tests."}
    )
    plugin: str = field(default="moe_peft", metadata={"help": "The package to import before loading this adapter."})

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # PEFT drops an unknown key with a warning and trains the default; here it is an error.
        known = {f.name for f in fields(cls)}
        for key in kwargs:
            if key in ELSEWHERE:
                raise ValueError(f"`{key}` is not a field of {cls.__name__}: {ELSEWHERE[key]}")
            if key not in known:
                raise ValueError(f"`{key}` is not a field of {cls.__name__}. {nearest(key, known)}")
        return super().__new__(cls)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """As PEFT's, which also comes first when weights are loaded: damaged ones are refused here."""
        check_weights(Path(pretrained_model_name_or_path, subfolder or ""))
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        config.weights_follow = (
            config.inference_mode
        )  # PEFT sets it in what it saves; then nothing has to be drawn well
        return config

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        check_numbers(self)
        check_init(self)
        check_layers(self)
        check_rule(self, self._rules)
        self._check_router()
        check_top_k(self)
        check_balance(self)

    def _check_router(self) -> None:
        """The fields of the router that only one type has."""


@dataclass
class LinearMoeConfig(MoeConfig):
    """A router and LoRA experts on each adapted linear layer (MoLA, LoRAMoE). The fields are those of [`MoeConfig`]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["LINEAR_MOE"]


@dataclass
class FfnMoeConfig(MoeConfig):
    """A router and LoRA experts on each whole FFN block (MixLoRA, LLaVA-MoLE): an expert is the frozen block with its own
    low-rank change on every targeted linear layer in it, so that the activation function stands inside the expert.

    The fields are those of [`MoeConfig`], and:

    Args:
        routing (`str`, *optional*, defaults to `"softmax_top_k"`):
            "softmax_top_k", "softmax" and "top_1" as in [`MoeConfig`]. "top_p": the most probable experts that together
            reach the probability `top_p`, not rescaled. "top_1_hard": the most probable expert with weight 1, whose
            router learns from the balance loss alone. "top_1_straight_through": the same output, and the router learns
            from the task. "sigmoid_top_k": each expert scored by itself, keep `top_k`, rescale to sum 1.
        top_p (`float`, *optional*):
            For "top_p" alone: above 0, at most 1, which keeps all. Defaults to 0.8 there. Lower uses fewer experts. The
            start is near uniform, where a token visits about `top_p * num_experts` of them.
        top_k (`int`, *optional*):
            Experts that each token visits, null ones included. Defaults to 2 under "softmax_top_k" and "sigmoid_top_k".
            Under "top_p" the most that a token may visit, by default without limit. The other rules fix it.
        num_null_experts (`int`, *optional*, defaults to 0):
            Choices beside the experts that mean "the frozen block alone" (AdaMoE), under "softmax_top_k". Tokens that
            need no change keep the model's own output. With balanced use a token visits
            `top_k * num_experts / (num_experts + num_null_experts)` experts, so raise `top_k` along with it.
        num_shared_experts (`int`, *optional*, defaults to 0):
            Further low-rank changes of rank `r` on each targeted linear layer of the block that every token gets,
            underneath all experts: an expert changes the block that they have changed. An export folds them into each
            expert.
        balance (`str`, *optional*):
            As in [`MoeConfig`]; "localized" goes with `routing="softmax"` alone, and "top_1_hard" needs "switch".
        router_z_loss_coef (`float`, *optional*, defaults to 0.0):
            Weight of the z-loss, which keeps the logits small (ST-MoE); 0.001 is common. Not for "sigmoid_top_k".
        router_jitter_noise (`float`, *optional*, defaults to 0.0):
            In training the router sees its input times random numbers from 1 - noise to 1 + noise; the experts do not.
            At least 0 and below 1.
        router_bias (`bool`, *optional*, defaults to `False`):
            Give the router a bias, one number per expert, as LLaVA-MoLE does.
        router_scale (`float`, *optional*, defaults to 1.0):
            As in [`MoeConfig`]. A temperature T is `router_scale = 1 / T`: it divides the logits. (MixLoRA's code divides
            the probabilities, which then no longer sum to 1.)
        target_modules (`list[str]` or `str`, *optional*):
            Names or regex of the linear layers to adapt, or "all-linear". Those that belong to an FFN block are mixed;
            every other one, such as those of the attention, carries one plain LoRA with the layer's `r` and
            `lora_alpha`. Defaults to the FFN blocks alone.
    """

    top_p: float | None = field(default=None, metadata={"help": "Probability that the experts reach under 'top_p'."})
    num_null_experts: int = field(default=0, metadata={"help": "Choices that mean the frozen block alone."})
    router_z_loss_coef: float = field(default=0.0, metadata={"help": "Weight of the z-loss on the logits."})
    router_jitter_noise: float = field(default=0.0, metadata={"help": "Noise on the router's input in training."})
    router_bias: bool = field(default=False, metadata={"help": "Give the router a bias."})

    _rules: ClassVar[Mapping[str, RoutingRule]] = rules.ROUTING_RULES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_localized_is_dense(self)
        self.peft_type = PeftType["FFN_MOE"]

    def _check_router(self) -> None:
        check_router(self)
