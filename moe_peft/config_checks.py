"""What the config classes refuse, and what they fill in where a field was left out. Used by `config` alone.

Each function looks at one group of fields of a config that is being made. They run in the order in which they stand
here: a later one may rely on what an earlier one has let through.
"""

import math
from collections.abc import Iterable
from typing import Any

from moe_peft.allocation import parse
from moe_peft.balance import BALANCES
from moe_peft.errors import nearest, refuse
from moe_peft.routing import DENSE_RULES
from moe_peft.rules import ROUTING_RULES, TOP_1_RULES, TOP_P


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
    if not _is_count(shared):
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


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_layers(config: Any) -> None:
    """PEFT would not look at these fields; the sentences are those of its `LoraConfig`."""
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(config.target_modules, str) and getattr(config, name) is not None:
            raise ValueError(
                f"`{name}` cannot be used when `target_modules` is a str. Write the layers into the regex."
            )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")


def check_rule(config: Any, rules: Iterable[str]) -> None:
    """`rules` are the names that this type of adapter has."""
    rules = list(rules)
    if config.routing in rules:
        return
    remedy = nearest(str(config.routing), rules)
    if config.routing in ROUTING_RULES:
        remedy = f"{config.routing!r} is available in FfnMoeConfig, which mixes whole FFN blocks."
    raise refuse("routing", config.routing, "one of " + ", ".join(repr(rule) for rule in rules), remedy)


def check_router(config: Any) -> None:
    """The fields of the router that only `FfnMoeConfig` has."""
    rule = f"with `routing` = {config.routing!r}"
    if config.routing == "top_p":
        config.top_p = TOP_P if config.top_p is None else config.top_p
        if not _is_number(config.top_p) or not 0.0 < config.top_p <= 1.0:
            raise refuse("top_p", config.top_p, "above 0 and at most 1", f"MixLoRA uses {TOP_P}.")
    elif config.top_p is not None:
        raise refuse("top_p", config.top_p, f"left out {rule}", "Remove `top_p`, or set `routing` to 'top_p'.")
    _check_null_experts(config)
    coef = config.router_z_loss_coef
    if not _is_number(coef) or coef < 0:
        raise refuse("router_z_loss_coef", coef, "at least 0", "0.001 is common, 0 turns it off.")
    if coef and config.routing == "sigmoid_top_k":
        remedy = "It limits the denominator of a softmax, and sigmoid scores have none: remove it."
        raise refuse("router_z_loss_coef", coef, f"0 {rule}", remedy)
    noise = config.router_jitter_noise
    if not _is_number(noise) or not 0.0 <= noise < 1.0:
        raise refuse("router_jitter_noise", noise, "at least 0 and below 1", "0.01 is common, 0 turns it off.")


def _check_null_experts(config: Any) -> None:
    null = config.num_null_experts
    if not _is_count(null):
        raise refuse("num_null_experts", null, "a whole number of at least 0", "As many as experts is common.")
    if null == 0:
        return
    if config.routing != "softmax_top_k":
        raise refuse(
            "num_null_experts",
            null,
            f"0 with `routing` = {config.routing!r}",
            "Null experts take the place of some of several experts that a token chooses: remove them, or set `routing` "
            "to 'softmax_top_k'.",
        )
    if min(parse(config.num_experts, "num_experts")) == 1:
        raise refuse(
            "num_null_experts",
            null,
            f"0 with `num_experts` = {config.num_experts!r}, which gives some layers only 1",
            "The weight of a single expert would always be 1 and the task would never train its router: raise "
            "`num_experts` to at least 2.",
        )


def check_top_k(config: Any) -> None:
    rule = f"with `routing` = {config.routing!r}"
    if config.routing in DENSE_RULES or config.routing in TOP_1_RULES:
        fixed = "every expert" if config.routing in DENSE_RULES else "one expert"
        if config.top_k is not None and not (config.routing in TOP_1_RULES and config.top_k == 1):
            raise refuse(
                "top_k",
                config.top_k,
                f"left out {rule}, which sends each token to {fixed}",
                "Remove `top_k`, or set `routing` to 'softmax_top_k'.",
            )
        return
    experts = parse(config.num_experts, "num_experts")
    fewest, most = min(experts), max(experts)
    given = config.top_k is not None
    if not given and config.routing == "top_p":
        return
    if not given:
        config.top_k = 1 if most == 1 else 2
    if not _is_count(config.top_k) or config.top_k < 1:
        raise refuse("top_k", config.top_k, "a whole number of at least 1", "2 is what MoLA and MixLoRA use.")
    if config.routing == "top_p":
        if config.top_k > most:
            raise refuse(
                "top_k",
                config.top_k,
                f"at most {most}, or left out, {rule}, where it is the most experts that a token may visit",
                "No layer has more experts: remove `top_k`, or lower it.",
            )
        return
    null = getattr(config, "num_null_experts", 0)
    if null and config.top_k >= fewest + null:
        raise refuse(
            "top_k",
            config.top_k,
            f"below {fewest + null}, the sum of `num_null_experts` = {null} and of `num_experts` = "
            f"{config.num_experts!r} in the smallest layer",
            "A token that visits all of them has nothing to choose: lower `top_k` or raise `num_null_experts`.",
        )
    if not null and config.top_k > fewest and not given:
        raise refuse(
            "num_experts",
            config.num_experts,
            f"at least 2 in every layer {rule}, as `top_k` was not given and is then 2",
            "Raise the smallest number. A single expert needs a rule that takes one or all: 'top_1' or 'softmax'.",
        )
    if not null and config.top_k > fewest:
        lower = "lower `top_k` or " if fewest > 1 else ""  # 1 is refused below
        raise refuse(
            "top_k",
            config.top_k,
            f"at most {fewest}, as `num_experts` = {config.num_experts!r} gives some layers only {fewest}",
            f"A token cannot visit more experts than its layer has: {lower}raise the smallest number.",
        )
    if config.top_k == 1 and most > 1:
        better = "top_1" if config.routing == "softmax_top_k" else "top_1_straight_through"
        raise refuse(
            "top_k",
            1,
            f"at least 2 {rule}",
            f"The one weight would always be 1 and the task would never train the router: use `routing` = {better!r}.",
        )


def check_balance(config: Any) -> None:
    if config.balance is None:
        config.balance = "none" if config.routing in DENSE_RULES else "switch"
    if config.balance not in BALANCES:
        allowed = "one of " + ", ".join(repr(name) for name in BALANCES)
        raise refuse("balance", config.balance, allowed, nearest(str(config.balance), BALANCES))
    coef = config.router_aux_loss_coef
    if not _is_number(coef) or coef < 0:
        raise refuse("router_aux_loss_coef", coef, "at least 0", "0 turns balancing off.")
    if config.balance == "switch" and config.routing in DENSE_RULES:
        raise refuse(
            "balance",
            "switch",
            f"'localized' or 'none' with `routing` = {config.routing!r}",
            "Every token visits every expert there, so the load that 'switch' balances is constant.",
        )
    if config.routing == "top_1_hard" and (config.balance == "none" or coef == 0):
        field, value, allowed = ("balance", "none", "'switch'") if coef else ("router_aux_loss_coef", coef, "above 0")
        raise refuse(
            field,
            value,
            f"{allowed} with `routing` = 'top_1_hard'",
            "The weight is the constant 1 there, so without balancing the router would get no gradient at all. "
            "'top_1_straight_through' computes the same and is trained by the task.",
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


def check_localized_is_dense(config: Any) -> None:
    """Where a rule selects, most weights of a row are 0, and LoRAMoE's constraint compares choices, not weights."""
    if config.balance == "localized" and config.routing not in DENSE_RULES:
        others = "'switch'" if config.routing == "top_1_hard" else "'switch' or 'none'"
        raise refuse(
            "balance",
            "localized",
            f"{others} with `routing` = {config.routing!r}",
            "It evens out the weights that every token gives to every expert: set `routing` to 'softmax' for it.",
        )
