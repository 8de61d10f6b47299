"""What the config classes refuse of the router, and what they fill in where a field was left out.

They run in the order in which they stand here: a later one may rely on what an earlier one has let through.
"""

from typing import Any

from moe_peft.allocation import parse
from moe_peft.config_checks import is_count, is_number
from moe_peft.errors import nearest, refuse
from moe_peft.rules import TOP_1_RULES, TOP_K_RULES, TOP_P
from moe_peft.selection import ACTIVATIONS, DENSE_ROUTINGS, ROUTINGS, SCORES


SELECTING = frozenset(ROUTINGS) - DENSE_ROUTINGS
"""Values of `routing` under which a token leaves some experts out: those that have a load."""


def check_routing(config: Any) -> None:
    """The rule, and the choices that it leaves open."""
    if config.routing not in ROUTINGS:
        allowed = "one of " + ", ".join(repr(rule) for rule in ROUTINGS)
        raise refuse("routing", config.routing, allowed, nearest(str(config.routing), ROUTINGS))
    rule = f"with `routing` = {config.routing!r}"
    free, softmax = (
        config.routing in ("top_k", "all"),
        config.routing in ("softmax_top_k", "softmax", "top_1", "top_p"),
    )
    scores: tuple[str, ...] = SCORES if free else ("softmax", "cosine") if softmax else ()
    if config.scoring_func is not None and config.scoring_func not in scores:
        allowed = f"one of {', '.join(map(repr, scores))} {rule}" if scores else f"left out {rule}, which says it"
        raise refuse("scoring_func", config.scoring_func, allowed, "'top_k' and 'all' leave the score open.")
    if config.norm_topk_prob is not None and not (free and isinstance(config.norm_topk_prob, bool)):
        allowed = "True or False" if free else f"left out {rule}, which says it"
        raise refuse("norm_topk_prob", config.norm_topk_prob, allowed, "'top_k' and 'all' leave it open.")
    if free:
        config.scoring_func = config.scoring_func or "softmax"
        config.norm_topk_prob = True if config.norm_topk_prob is None else config.norm_topk_prob
    factor = config.routed_scaling_factor
    if not is_number(factor) or factor <= 0:
        raise refuse("routed_scaling_factor", factor, "a positive number", "1.0 leaves the weights as they are.")
    if factor != 1.0 and config.routing in ("top_1_hard", "top_1_straight_through", "sparsegen", "random", "given"):
        raise refuse("routed_scaling_factor", factor, f"1.0 {rule}", "Put the factor into `lora_alpha`.")


def check_router(config: Any) -> None:
    """How the logits come about."""
    rule = f"with `routing` = {config.routing!r}"
    if config.routing == "top_p":
        config.top_p = TOP_P if config.top_p is None else config.top_p
        if not is_number(config.top_p) or not 0.0 < config.top_p <= 1.0:
            raise refuse("top_p", config.top_p, "above 0 and at most 1", f"MixLoRA uses {TOP_P}.")
    elif config.top_p is not None:
        raise refuse("top_p", config.top_p, f"left out {rule}", "Remove `top_p`, or set `routing` to 'top_p'.")
    sparsity = config.sparsegen_lambda
    if sparsity is not None and config.routing != "sparsegen":
        raise refuse("sparsegen_lambda", sparsity, f"left out {rule}", "Remove it, or set `routing` to 'sparsegen'.")
    if sparsity is not None and not (is_number(sparsity) and sparsity < 1):
        raise refuse("sparsegen_lambda", sparsity, "a number below 1", "0.0 is sparsemax; -3.0 uses more experts.")
    if config.router_act is not None and config.router_act not in tuple(ACTIVATIONS):
        allowed = "None or one of " + ", ".join(map(repr, ACTIVATIONS))
        raise refuse("router_act", config.router_act, allowed, nearest(str(config.router_act), ACTIVATIONS))
    if config.router_granularity not in ("token", "sequence"):
        allowed = "'token' or 'sequence'"
        raise refuse("router_granularity", config.router_granularity, allowed, "'token' is the usual one.")
    noise = config.router_jitter_noise
    if not is_number(noise) or not 0.0 <= noise < 1.0:
        raise refuse("router_jitter_noise", noise, "at least 0 and below 1", "0.01 is common, 0 turns it off.")
    if config.router_bias and config.freeze_router:
        remedy = "The bias is a part of the router, and training it would move every choice: remove one of the two."
        raise refuse("router_bias", True, "False with `freeze_router` = True", remedy)
    if config.scoring_func == "cosine" and config.router_init_std == 0:
        remedy = "The cosine with a row of zeros has no direction to learn in."
        raise refuse("router_init_std", config.router_init_std, "above 0 with `scoring_func` = 'cosine'", remedy)
    _check_null_experts(config)
    _check_without_router(config, rule)


def _check_without_router(config: Any, rule: str) -> None:
    """Under "random" and "given" nothing is learned that chooses, so what shapes a router would be ignored."""
    if config.routing not in ("random", "given"):
        return
    given = {
        "router_bias": config.router_bias,
        "router_act": config.router_act,
        "router_jitter_noise": config.router_jitter_noise,
        "freeze_router": config.freeze_router,
        "router_init_std": config.router_init_std is not None,
        "router_scale": config.router_scale != 1.0,
        "router_granularity": config.router_granularity != "token",
        "router_temperature_start": config.router_temperature_start is not None,
    }
    for name, written in given.items():
        if written:
            raise refuse(name, getattr(config, name), f"left out {rule}, which has no router", f"Remove `{name}`.")


def _check_null_experts(config: Any) -> None:
    null, constant = config.num_null_experts, getattr(config, "num_constant_experts", 0)
    if not is_count(null):
        raise refuse("num_null_experts", null, "a whole number of at least 0", "As many as experts is common.")
    if not is_count(constant):
        raise refuse("num_constant_experts", constant, "a whole number of at least 0", "MoE++ has 2.")
    if null == 0:
        return
    if config.routing not in ("softmax_top_k", "sigmoid_top_k", "top_k"):
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
    if config.routing in DENSE_ROUTINGS or config.routing in TOP_1_RULES:
        fixed = "every expert" if config.routing in DENSE_ROUTINGS else "one expert"
        fixed = {"random": "one expert by lot", "given": "those of its task type"}.get(config.routing, fixed)
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
    if not is_count(config.top_k) or config.top_k < 1:
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
    null = config.num_null_experts + getattr(config, "num_constant_experts", 0)
    if null and config.top_k >= fewest + null:
        raise refuse(
            "top_k",
            config.top_k,
            f"below {fewest + null}, the sum of {null} null or constant experts and of `num_experts` = "
            f"{config.num_experts!r} in the smallest layer",
            "A token that visits all of them has nothing to choose: lower `top_k` or add null experts.",
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
    normalised = config.routing in TOP_K_RULES or config.norm_topk_prob
    if config.top_k == 1 and most > 1 and normalised:
        better = "top_1_straight_through" if config.routing == "sigmoid_top_k" else "top_1"
        raise refuse(
            "top_k",
            1,
            f"at least 2 {rule}",
            f"The one weight would always be 1 and the task would never train the router: use `routing` = {better!r}.",
        )


def check_groups(config: Any) -> None:
    """`expert_groups`, which "given" fills in: one expert for each type."""
    groups, experts = config.expert_groups, parse(config.num_experts, "num_experts")
    if groups is None and config.routing == "given":
        if len(set(experts)) > 1:
            raise refuse(
                "num_experts",
                config.num_experts,
                "one number with `routing` = 'given', where task type t goes to expert t in every layer",
                "Give `expert_groups`, or the same number of experts to each layer.",
            )
        groups = config.expert_groups = [[expert] for expert in range(experts[0])]
    if groups is None:
        return
    fewest = min(experts)
    listed = isinstance(groups, list) and groups and all(isinstance(g, list) and g for g in groups)
    if not listed or any(not is_count(e) or e >= fewest for g in groups for e in g):
        raise refuse(
            "expert_groups",
            groups,
            f"a list of lists that are not empty, with whole numbers from 0 to {fewest - 1}, the last expert of the "
            "smallest layer",
            "Write one list of experts for each task type: [[0, 1], [2, 3]] keeps two types apart.",
        )
    if config.balance == "localized":
        raise refuse(
            "balance", "localized", "another with `expert_groups`", "The groups separate the experts already."
        )


def check_schedules(config: Any) -> None:
    starts = {"top_k_start": config.top_k_start, "router_temperature_start": config.router_temperature_start}
    steps = config.schedule_steps
    if not is_count(steps):
        raise refuse("schedule_steps", steps, "a whole number of at least 0", "About half of the run is common.")
    written = [name for name, value in starts.items() if value is not None]
    if bool(written) != bool(steps):
        if steps:
            raise refuse(
                "schedule_steps", steps, "0 without a start", "Give `top_k_start` or `router_temperature_start`."
            )
        raise refuse(written[0], starts[written[0]], "left out with `schedule_steps` = 0", "Say over how many steps.")
    if config.top_k_start is not None:
        if not is_count(config.top_k_start) or config.top_k_start < 1:
            raise refuse("top_k_start", config.top_k_start, "a whole number of at least 1", "All experts, or one.")
        if config.routing not in ("softmax_top_k", "sigmoid_top_k", "top_k"):
            allowed = f"left out with `routing` = {config.routing!r}, which has no `top_k`"
            raise refuse(
                "top_k_start", config.top_k_start, allowed, "Use 'softmax_top_k', 'sigmoid_top_k' or 'top_k'."
            )
        extra = config.num_null_experts + getattr(config, "num_constant_experts", 0)
        most = max(parse(config.num_experts, "num_experts")) + extra
        if config.top_k_start > most:
            raise refuse("top_k_start", config.top_k_start, f"at most {most}", "No layer has more to choose from.")
    temperature = config.router_temperature_start
    if temperature is not None and not (is_number(temperature) and temperature > 0):
        raise refuse("router_temperature_start", temperature, "a positive number", "2.0 is EvoMoE's.")


def check_linear(config: Any) -> None:
    """The fields of `LinearMoeConfig` alone."""
    constant = config.num_constant_experts
    if constant and config.routing not in ("softmax_top_k", "sigmoid_top_k", "top_k", "softmax", "all"):
        allowed = f"0 with `routing` = {config.routing!r}"
        raise refuse("num_constant_experts", constant, allowed, "Use 'softmax_top_k' or another that weighs several.")
    if constant and min(parse(config.num_experts, "num_experts")) == 1:
        allowed = f"0 with `num_experts` = {config.num_experts!r}, which gives some layers only 1"
        raise refuse("num_constant_experts", constant, allowed, "Raise `num_experts` to at least 2.")
    if constant and config.balance == "localized":
        remedy = "The constraint splits the choices into two halves, and these belong to neither."
        raise refuse("num_constant_experts", constant, "0 with `balance` = 'localized'", remedy)
    scopes = ("linear", "group", "block", "model")
    if config.router_scope not in scopes:
        allowed = "one of " + ", ".join(map(repr, scopes))
        raise refuse("router_scope", config.router_scope, allowed, nearest(str(config.router_scope), scopes))
    if config.router_scope != "linear" and config.routing in ("random", "given"):
        allowed = f"'linear' with `routing` = {config.routing!r}, which has no router to share"
        raise refuse("router_scope", config.router_scope, allowed, "Remove `router_scope`.")
    if config.router_scope == "model" and config.router_jitter_noise:
        allowed = "0 with `router_scope` = 'model', where each layer asks the router anew"
        remedy = "Other noise in each layer would make one decision into many: remove it."
        raise refuse("router_jitter_noise", config.router_jitter_noise, allowed, remedy)
    check_distinct(config)
    if config.share_A and config.num_shared_experts:
        allowed = "0 with `share_A` = True, where every token uses the one A already"
        raise refuse("num_shared_experts", config.num_shared_experts, allowed, "Remove one of the two.")


def check_distinct(config: Any) -> None:
    """`num_distinct_experts`, which `group_experts` writes."""
    distinct = config.num_distinct_experts
    if distinct is None:
        return
    numbers = distinct if isinstance(distinct, list) and distinct else [distinct]
    most = max(parse(config.num_experts, "num_experts"))
    if any(not is_count(n) or not 1 <= n <= most for n in numbers):
        allowed = f"a whole number from 1 to {most}, the most that `num_experts` names, or a list of them"
        raise refuse("num_distinct_experts", distinct, allowed, "Leave it out: `group_experts` writes it.")
    for field, wanted in (("router_scope", "linear"), ("expert_groups", None)):
        if getattr(config, field, wanted) != wanted:
            allowed = f"left out with `{field}` = {getattr(config, field)!r}"
            raise refuse("num_distinct_experts", distinct, allowed, "Grouped experts need a router for each layer.")
    if config.routing in ("random", "given"):
        allowed = f"left out with `routing` = {config.routing!r}, which has no router whose choices could be grouped"
        raise refuse("num_distinct_experts", distinct, allowed, "Lower `num_experts`.")
