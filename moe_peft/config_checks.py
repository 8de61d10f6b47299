"""What the config classes refuse of sizes, numbers and layers; the router's fields are `router_checks`'.

Each function looks at one group of fields of a config that is being made.
"""

import math
from dataclasses import fields
from typing import Any

from moe_peft.allocation import parse
from moe_peft.errors import refuse


def check_booleans(config: Any) -> None:
    for f in fields(config):
        value = getattr(config, f.name)
        if f.type in (bool, "bool") and not isinstance(value, bool):
            raise refuse(f.name, value, "True or False", "A word would count as True whatever it says.")


ELSEWHERE = {
    "use_dora": "DoRA rescales the rows of the whole weight W + s B A. A mixture of such experts needs the row norms of W + "
    "s B_e A_e for every expert at every step, and is not linear in the experts, so that no merge and no export here would "
    "hold for it. Leave it out; `use_rslora` goes with experts.",
}
"""Fields of `LoraConfig` that people may well ask for -> why they have no place in a mixture."""


def check_init(config: Any) -> None:
    if not isinstance(config.init_weights, bool) and config.init_weights != "pissa":
        remedy = "'pissa' starts A from the frozen weight; True, as LoRA does, from random numbers."
        raise refuse("init_weights", config.init_weights, "True, False or 'pissa'", remedy)


def check_numbers(config: Any) -> None:
    parse(config.r, "r")
    parse(config.num_experts, "num_experts")
    shared = config.num_shared_experts
    if not is_count(shared):
        raise refuse("num_shared_experts", shared, "a whole number of at least 0", "1 or 2 are common, 0 is none.")
    if not is_number(config.lora_alpha) or config.lora_alpha <= 0:
        raise refuse("lora_alpha", config.lora_alpha, "a positive number", "16 is a common choice.")
    if not is_number(config.lora_dropout) or not 0.0 <= config.lora_dropout < 1.0:
        raise refuse("lora_dropout", config.lora_dropout, "at least 0 and below 1", "Give a share such as 0.05.")
    std = config.router_init_std
    if std is not None and (not is_number(std) or std < 0):
        raise refuse("router_init_std", std, "at least 0, or None", "0.02 is near uniform.")
    if not is_number(config.router_scale) or config.router_scale <= 0:
        raise refuse("router_scale", config.router_scale, "a positive number", "1.0 leaves the logits as they are.")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_layers(config: Any) -> None:
    """PEFT would not look at these fields; the sentences are those of its `LoraConfig`."""
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(config.target_modules, str) and getattr(config, name) is not None:
            raise ValueError(
                f"`{name}` cannot be used when `target_modules` is a str. Write the layers into the regex."
            )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
