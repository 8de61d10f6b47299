"""The config of `BOTTLENECK_MOE`: named bottleneck adapters beside chosen FFNs, a gate, and a task's LoRA (MixDA)."""

from dataclasses import dataclass, field
from typing import Any

from peft.utils import PeftType

from moe_peft.config_checks import check_booleans, check_layers, is_count, is_number
from moe_peft.errors import nearest, refuse
from moe_peft.plugin_config import PluginConfig


GATES = ("mlp", "sigmoid", "none")
"""The values of `gate`: that of the released code, that of the paper, and no choice."""

GATE_INPUTS = ("token", "mean", "last_nonpad")
"""The values of `gate_input`."""

FFN = "ffn"
"""What the frozen layer is called among the sources of a gate; no domain may have this name."""

REDUCTION = 16
"""A bottleneck is a 16th of the layer's input, as published."""


@dataclass
class BottleneckMoeConfig(PluginConfig):
    """Bottleneck adapters for named domains, beside the second linear layer of chosen FFNs (MixDA,
    https://huggingface.co/papers/2306.05406), with a gate over them and a plain LoRA for the task.

    On an adapted layer with input z, the FFN's intermediate activation:

        y = W z + sum_j g_j(z) (U_j GELU(V_j z + c_j) + b_j)

    Made in two stages: each domain by itself on its text with `gate="none"`, then the gate and the LoRA on labels with
    `freeze_domains=True` ([`domains_config`] and [`load_domains`] join the domains).

    Args:
        domains (`list[str]`):
            The experts' names, all different. "ffn" is the frozen layer's.
        bottleneck_size (`int`, *optional*):
            Width of each expert's hidden layer. Defaults to a 16th of the layer's input, as published.
        gate (`str`, *optional*, defaults to `"mlp"`):
            "mlp": four linear layers with ReLU and dropout between them, then a softmax over the domains and the frozen
            FFN (the released code). "sigmoid": `W_u sigmoid(W_d z)` and a sigmoid for each source (the paper). "none":
            every domain with weight 1; the first stage trains so.
        gate_input (`str`, *optional*):
            What the gate looks at: "token", each token by itself; "mean" or "last_nonpad", the mean or the last of the
            prompt's real tokens (of all real ones where a model does not generate), for the whole sequence, kept while
            it is continued. Defaults to "last_nonpad" for "mlp" and to "token" for "sigmoid", as published.
        gate_size (`int`, *optional*, defaults to 768):
            Width of the gate's hidden layers.
        gate_dropout (`float`, *optional*):
            Dropout before each linear layer of "mlp" in training; at least 0, below 1. Defaults to 0.2 there.
        gate_ffn (`bool`, *optional*, defaults to `False`):
            Weigh the frozen layer's output too, `g_ffn W z`, as published. A fresh adapter then changes the model, whose
            FFNs count less than they did. Without it W z keeps weight 1, and the share that the softmax gives to the FFN
            only takes away from the domains.
        freeze_domains (`bool`, *optional*, defaults to `False`):
            Never train the domains' experts, as in the second stage.
        r (`int`, *optional*, defaults to 0):
            Rank of the task's LoRA on the `task_modules` of all layers; 0 is none.
        lora_alpha (`int` or `float`, *optional*, defaults to 16):
            The LoRA's output is scaled by `lora_alpha / r`.
        lora_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on the LoRA's input.
        task_modules (`list[str]` or `str`, *optional*):
            Names or regex of the linear layers that get the LoRA, or "all-linear". Defaults to PEFT's LoRA targets of the
            model.
        target_modules (`list[str]` or `str`, *optional*):
            Names or regex of the linear layers that get the domains' experts. Defaults to the second linear layer of the
            FFNs at 7/24 and 11/24 of the depth (the paper's 7 and 11 of 24), or of those of `layers_to_transform`.
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern, trainable_token_indices: as in
            `LoraConfig`; the layers choose among `target_modules` alone.

    Raises:
        ValueError: a field that does not exist or holds what it may not.
    """

    domains: list[str] | None = field(default=None, metadata={"help": "The experts' names."})
    bottleneck_size: int | None = field(default=None, metadata={"help": "Width of an expert; a 16th of its input."})
    gate: str = field(default="mlp", metadata={"help": "'mlp', 'sigmoid' or 'none'."})
    gate_input: str | None = field(default=None, metadata={"help": "'token', 'mean' or 'last_nonpad'."})
    gate_size: int = field(default=768, metadata={"help": "Width of the gate's hidden layers."})
    gate_dropout: float | None = field(default=None, metadata={"help": "Dropout in the gate 'mlp'."})
    gate_ffn: bool = field(default=False, metadata={"help": "The gate weighs the frozen layer too."})
    freeze_domains: bool = field(default=False, metadata={"help": "Never train the domains' experts."})
    r: int = field(default=0, metadata={"help": "Rank of the task's LoRA."})
    lora_alpha: int | float = field(default=16, metadata={"help": "Scale of the LoRA, over r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the LoRA's input."})
    task_modules: list[str] | str | None = field(default=None, metadata={"help": "The layers that get the LoRA."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "The layers that get the domains."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave alone."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer numbers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layer list."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Embedding rows to train."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Start with U = b = B = 0. False gives a random function, for tests only."}
    )
    plugin: str = field(default="moe_peft", metadata={"help": "The package to import before loading this adapter."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["BOTTLENECK_MOE"]
        if isinstance(self.task_modules, list):
            self.task_modules = set(self.task_modules)
        check_booleans(self)
        check_domains(self.domains)
        _check_gate(self)
        _check_numbers(self)
        _check_task(self)
        check_layers(self)

    @property
    def sources(self) -> list[str]:
        """What the gate tells apart, in the order of its logits; under "none" the domains."""
        weighs_ffn = self.gate == "mlp" or self.gate_ffn
        return [*(self.domains or ()), *([FFN] if weighs_ffn else [])]

    @property
    def by_sequence(self) -> bool:
        """Whether one decision holds for a whole sequence."""
        return self.gate_input in ("mean", "last_nonpad")


def check_domains(domains: Any, field_name: str = "domains") -> None:
    """Refuse what is no list of names, an empty one, and names that cannot tell experts apart."""
    allowed = "a list of names, at least one"
    if not isinstance(domains, (list, tuple)) or not domains:
        raise refuse(field_name, domains, allowed, 'Name what each expert is for: ["law", "medicine"].')
    for name in domains:
        if not isinstance(name, str) or not name.strip():
            raise refuse(field_name, domains, allowed, f"{name!r} is no name.")
        if name == FFN:
            raise refuse(field_name, domains, f"names other than '{FFN}'", "The frozen layer has it: choose another.")
        if list(domains).count(name) > 1:
            raise refuse(field_name, domains, "all different", f"Two domains are called '{name}': rename one.")


def _check_gate(config: BottleneckMoeConfig) -> None:
    """Fill in what was left out as published, and refuse what the gate does not have."""
    gate = config.gate
    if gate not in GATES:
        raise refuse("gate", gate, "one of " + ", ".join(map(repr, GATES)), nearest(str(gate), GATES))
    if gate == "none":
        for name, unset in (("gate_input", None), ("gate_dropout", None), ("gate_ffn", False)):
            if getattr(config, name) != unset:
                remedy = f"Every domain counts 1 there: remove `{name}`, or choose a gate."
                raise refuse(name, getattr(config, name), "left out with `gate` = 'none'", remedy)
        return
    if config.gate_input is None:
        config.gate_input = "last_nonpad" if gate == "mlp" else "token"
    if config.gate_input not in GATE_INPUTS:
        allowed = "one of " + ", ".join(map(repr, GATE_INPUTS))
        raise refuse("gate_input", config.gate_input, allowed, nearest(str(config.gate_input), GATE_INPUTS))
    if gate == "sigmoid" and config.gate_dropout is not None:
        remedy = "The paper's gate has no dropout: remove it, or use 'mlp'."
        raise refuse("gate_dropout", config.gate_dropout, "left out with `gate` = 'sigmoid'", remedy)
    if gate == "mlp" and config.gate_dropout is None:
        config.gate_dropout = 0.2


def _check_numbers(config: BottleneckMoeConfig) -> None:
    if not is_count(config.gate_size) or config.gate_size < 1:
        raise refuse("gate_size", config.gate_size, "a whole number of at least 1", "MixDA's code has 768.")
    width = config.bottleneck_size
    if width is not None and (not is_count(width) or width < 1):
        remedy = f"Left out, it is a {REDUCTION}th of the layer's input."
        raise refuse("bottleneck_size", width, "a whole number of at least 1, or None", remedy)
    for name in ("gate_dropout", "lora_dropout"):
        value = getattr(config, name)
        if value is not None and (not is_number(value) or not 0.0 <= value < 1.0):
            raise refuse(name, value, "at least 0 and below 1", "Give a share such as 0.05.")


def _check_task(config: BottleneckMoeConfig) -> None:
    if not is_count(config.r):
        raise refuse("r", config.r, "a whole number of at least 0", "It is the rank of the task's LoRA; 0 is none.")
    if not is_number(config.lora_alpha) or config.lora_alpha <= 0:
        raise refuse("lora_alpha", config.lora_alpha, "a positive number", "16 is a common choice.")
    if not config.r and config.task_modules is not None:
        remedy = "They are what the task's LoRA adapts: give it a rank, or remove them."
        raise refuse("task_modules", sorted(config.task_modules), "left out with `r` = 0", remedy)
    if config.freeze_domains and config.gate == "none" and not config.r:
        remedy = "With neither a gate nor a LoRA nothing is left to train: set `gate` or `r`."
        raise refuse("freeze_domains", True, "False with `gate` = 'none' and `r` = 0", remedy)
