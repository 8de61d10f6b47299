"""What the config classes refuse of the balance: kinds that mean nothing for a rule, and settings without an effect."""

from typing import Any

from moe_peft.allocation import parse
from moe_peft.balance import BALANCES
from moe_peft.config_checks import is_number
from moe_peft.errors import nearest, refuse
from moe_peft.router_checks import SELECTING


SWITCHES = ("switch", "switch_local", "sequence")
"""Balances that look at the load."""

AUX_LOSS_COEF, BIAS_UPDATE_SPEED, BALANCE_DELTA = 0.001, 0.01, 0.1
"""The defaults of the three fields."""


def check_balance(config: Any) -> None:
    selects = config.routing in SELECTING
    if config.balance is None:  # a router that is frozen learns nothing from a loss: only the layers below it would
        config.balance = "switch" if selects and not config.freeze_router else "none"
    if config.balance not in BALANCES:
        allowed = "one of " + ", ".join(repr(name) for name in BALANCES)
        raise refuse("balance", config.balance, allowed, nearest(str(config.balance), BALANCES))
    _check_coefficients(config)
    rule = f"with `routing` = {config.routing!r}"
    if config.routing in ("random", "given") and config.balance != "none":
        raise refuse("balance", config.balance, f"'none' {rule}", "There is no router that a balance could teach.")
    if config.balance in (*SWITCHES, "bias") and not selects:
        others = "'localized', 'cv2', 'mi' or 'none'" if config.routing != "sparsegen" else "'cv2', 'mi' or 'none'"
        raise refuse(
            "balance",
            config.balance,
            f"{others} {rule}",
            f"Every token visits every expert there, so the load that {config.balance!r} balances is constant.",
        )
    if config.balance == "bias" and config.routing in ("top_1_hard", "top_1_straight_through"):
        raise refuse("balance", "bias", f"'switch' {rule}", "The bias needs 'top_1', 'softmax_top_k' or another rule.")
    if config.balance == "mi" and (config.routing == "sigmoid_top_k" or config.scoring_func == "sigmoid"):
        raise refuse("balance", "mi", f"'switch' or 'bias' {rule}", "Sigmoid scores are no distribution over experts.")
    coef = config.router_aux_loss_coef
    if (
        config.routing == "top_1_hard"
        and not (config.freeze_router or getattr(config, "supervised", False))
        and (config.balance in ("none", "cv2") or coef == 0)
    ):
        field, value, allowed = ("balance", config.balance, "'switch'")
        if not coef:
            field, value, allowed = ("router_aux_loss_coef", coef, "above 0")
        raise refuse(
            field,
            value,
            f"{allowed} with `routing` = 'top_1_hard'",
            "The weight is the constant 1 there, so without balancing the router would get no gradient at all. "
            "'top_1_straight_through' computes the same and is trained by the task.",
        )
    if config.balance == "cv2" and config.num_null_experts:
        remedy = "Null experts weigh nothing, so the weights in sum could never be even."
        raise refuse("balance", "cv2", "'switch' or 'bias' with null experts", remedy)
    if config.balance == "localized":
        if config.routing in ("top_1_hard", "top_1_straight_through"):  # whose weight is always 1
            check_localized_is_dense(config)
        _check_localized(config)
    _check_balance_settings(config)


def _check_coefficients(config: Any) -> None:
    coef = config.router_aux_loss_coef
    if not is_number(coef) or coef < 0:
        raise refuse("router_aux_loss_coef", coef, "at least 0", "0 turns balancing off.")
    for name, common in (("router_z_loss_coef", "0.001"), ("router_entropy_coef", "0.0001")):
        value = getattr(config, name)
        if not is_number(value) or value < 0:
            raise refuse(name, value, "at least 0", f"{common} is common, 0 turns it off.")
        rule = f"0 with `routing` = {config.routing!r}"
        if value and (config.routing in ("sigmoid_top_k", "random", "given") or config.scoring_func == "sigmoid"):
            remedy = "It is about a softmax over the experts, and there is none: remove it."
            raise refuse(name, value, rule, remedy)
    if config.router_z_loss_coef and config.routing == "sparsegen":
        remedy = "It limits the denominator of a softmax, and sparsegen has none: remove it."
        raise refuse("router_z_loss_coef", config.router_z_loss_coef, "0 with `routing` = 'sparsegen'", remedy)


def _check_localized(config: Any) -> None:
    if not is_number(config.balance_delta) or not 0.0 <= config.balance_delta < 1.0:
        raise refuse("balance_delta", config.balance_delta, "at least 0 and below 1", "LoRAMoE uses 0.1.")
    odd = [n for n in parse(config.num_experts, "num_experts") if n % 2]
    if odd:
        raise refuse(
            "num_experts",
            config.num_experts,
            "even numbers with `balance` = 'localized', which splits the experts into two halves",
            f"Change {odd[0]} to {odd[0] + 1}.",
        )


def _check_balance_settings(config: Any) -> None:
    weights, balance = config.balance_weights, f"with `balance` = {config.balance!r}"
    if weights is not None:
        if config.balance not in ("switch", "switch_local"):
            raise refuse(
                "balance_weights", weights, f"left out {balance}", "Only 'switch' and 'switch_local' use them."
            )
        counts = set(parse(config.num_experts, "num_experts"))
        extra = config.num_null_experts + getattr(config, "num_constant_experts", 0)
        good = isinstance(weights, list) and all(is_number(w) and w > 0 for w in weights)
        if not good or counts != {len(weights) - extra}:
            allowed = f"one positive number for each of {' or '.join(str(n + extra) for n in sorted(counts))} choices"
            raise refuse("balance_weights", weights, allowed, "Every layer must have the same number of experts.")
    speed = config.bias_update_speed
    if not is_number(speed) or speed < 0:
        raise refuse("bias_update_speed", speed, "at least 0", "0.01 suits runs of 500 to 2000 steps.")
    target = config.target_active
    if target is None:
        return
    if config.balance != "bias" or not config.num_null_experts:
        allowed = f"left out {balance} and `num_null_experts` = {config.num_null_experts}"
        remedy = "A token visits a fixed number of experts otherwise: set `balance` to 'bias' and add null experts."
        raise refuse("target_active", target, allowed, remedy)
    if not is_number(target) or not 0 < target < (config.top_k or 0):
        raise refuse("target_active", target, f"above 0 and below `top_k` = {config.top_k}", "1.5 of 3 is a start.")


def check_unused(config: Any) -> None:
    """What sets a balance that is not there: written, it would be ignored."""
    coef, speed = config.router_aux_loss_coef, config.bias_update_speed
    balance = f"with `balance` = {config.balance!r}"
    if config.balance in ("none", "bias") and coef not in (0, AUX_LOSS_COEF):
        why = "which has no loss" if config.balance == "bias" else "which has nothing to weigh"
        remedy = "Remove it, or set `balance` to 'switch'."
        raise refuse("router_aux_loss_coef", coef, f"left out {balance}, {why}", remedy)
    if config.balance != "bias" and speed != BIAS_UPDATE_SPEED:
        raise refuse("bias_update_speed", speed, f"left out {balance}", "Remove it, or set `balance` to 'bias'.")
    if config.balance != "localized" and config.balance_delta != BALANCE_DELTA:
        remedy = "Remove it, or set `balance` to 'localized'."
        raise refuse("balance_delta", config.balance_delta, f"left out {balance}", remedy)


def check_localized_is_dense(config: Any) -> None:
    """Where a rule selects, most weights of a row are 0, and LoRAMoE's constraint compares choices, not weights."""
    if config.balance == "localized" and config.routing in SELECTING:
        others = "'switch'" if config.routing == "top_1_hard" else "'switch' or 'none'"
        raise refuse(
            "balance",
            "localized",
            f"{others} with `routing` = {config.routing!r}",
            "It evens out the weights that every token gives to every expert: set `routing` to 'softmax' for it.",
        )


def check_block(config: Any) -> None:
    """What would change the frozen block itself, which stands inside each expert of `FfnMoeConfig`."""
    factor = config.routed_scaling_factor
    if factor != 1.0:
        remedy = "It would multiply the frozen block along with its experts: put the factor into `lora_alpha`."
        raise refuse("routed_scaling_factor", factor, "1.0 in FfnMoeConfig", remedy)
    check_localized_is_dense(config)
