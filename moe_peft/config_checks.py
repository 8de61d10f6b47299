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


def check_flags(**flags: Any) -> None:
    """The switches of a function, by name, as `check_booleans` does for fields."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise refuse(name, value, "True or False", "A word would count as True whatever it says.")


ELSEWHERE = {
    "use_dora": "DoRA rescales the rows of the whole weight W + s B A. A mixture of such experts needs the row norms of W + "
    "s B_e A_e for every expert at every step, and is not linear in the experts, so that no merge and no export here would "
    "hold for it. Leave it out; `use_rslora` goes with experts.",
    "rank_pattern": "`r` says the rank of each layer, as groups ('4:8') or a list, and the modules of one layer have one "
    "rank. Give those that need another an adapter of their own.",
    "alpha_pattern": "`lora_alpha` is one number here; the scale of a layer is `lora_alpha` over the `r` of that layer.",
}
"""Fields of `LoraConfig` that people may well ask for -> why they have no place in a mixture, or what is there instead."""


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


def _check_names(name: str, value: Any) -> None:
    """A word where PEFT iterates over names is read letter by letter: `modules_to_save="lm_head"` would train every module
    whose name ends in one of these letters."""
    if value is None or (isinstance(value, str) and name != "modules_to_save"):
        return
    if (
        isinstance(value, str)
        or not isinstance(value, (list, set, tuple))
        or not all(isinstance(n, str) for n in value)
    ):
        allowed = "a list of names" if name == "modules_to_save" else "a list of names, or one text"
        remedy = f'Write `{name}=["{value}"]`.' if isinstance(value, str) else "Put each name in quotes."
        raise refuse(name, sorted(value, key=str) if isinstance(value, set) else value, allowed, remedy)


def check_layers(config: Any) -> None:
    """PEFT would not look at these fields; the sentences are those of its `LoraConfig`, where it has any."""
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        _check_names(name, getattr(config, name))
    numbers = config.layers_to_transform
    listed = numbers if isinstance(numbers, (list, tuple, range)) else [numbers]
    if numbers is not None and not all(is_count(number) for number in listed):
        raise refuse(
            "layers_to_transform", numbers, "a whole number of at least 0, or a list of them", "0 is the first."
        )
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(config.target_modules, str) and getattr(config, name) is not None:
            raise ValueError(
                f"`{name}` cannot be used when `target_modules` is a str. Write the layers into the regex."
            )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
