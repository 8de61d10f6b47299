"""The `adapter_config.json` of MixLoRA as TUDB-Labs' packages write it: what it says, our config from it, what is lost.

Used by `importing`. Defaults are those of `moe-peft` 2.0.2 when it loads such a file.
"""

import math
from collections.abc import Mapping
from typing import Any

from moe_peft.config import FfnMoeConfig
from moe_peft.errors import refuse
from moe_peft.mixlora import Layout, Lora, common_rank


Settings = Mapping[str, Any]
STRATEGIES = ("mixlora", "mixlora-dynamic", "mixlora-switch")


def check_settings(settings: Settings) -> None:
    """Refuse what our type has no equal for, and values that are none."""
    for field, allowed, remedy in (
        (
            "peft_type",
            ("MIXLORA",),
            "Only MixLoRA is imported: LORA is read by PEFT itself, LORAMOE and MOLA are not.",
        ),
        ("routing_strategy", STRATEGIES, "These are the ones of MoE-PEFT 2.0.2."),
    ):
        if settings.get(field) not in allowed:
            raise refuse(field, settings.get(field), "one of " + ", ".join(map(repr, allowed)), remedy)
    if settings.get("bias", "none") != "none":
        raise refuse("bias", settings["bias"], "'none'", "MixLoRA trains no biases: is this another kind of adapter?")
    task = settings.get("task_type")
    if task not in ("CAUSAL_LM", "QUESTION_ANS"):
        remedy = "A classification head stands beside the experts, and MoE-PEFT pools in its own way: train it anew."
        raise refuse("task_type", task, "'CAUSAL_LM' or 'QUESTION_ANS'", remedy)
    _whole(settings, "num_experts", settings.get("num_experts"))
    for lora in (attention_lora, expert_lora):
        lora(settings)
    temperature = settings.get("temperature") or 0
    if settings["routing_strategy"] == "mixlora-dynamic" and temperature not in (0, 1):
        remedy = (
            "MoE-PEFT divides the probabilities by it, after the softmax, so that they no longer sum to 1; no rule here "
            "does. 0 and 1 mean none."
        )
        raise refuse("temperature", temperature, "0 or 1", remedy)


def attention_lora(settings: Settings) -> Lora:
    """The LoRA on attention, from the outer fields."""
    return _lora(settings, "")


def expert_lora(settings: Settings) -> Lora:
    """The LoRA of an expert: the outer fields, each overridden by `expert_lora` as MoE-PEFT does when it loads."""
    nested = settings.get("expert_lora", {})
    if not isinstance(nested, Mapping):
        raise refuse("expert_lora", nested, "an object with fields such as r and lora_alpha", "Remove or correct it.")
    return _lora({**settings, **nested}, "expert_lora." if nested else "")


def _lora(settings: Settings, prefix: str) -> Lora:
    if settings.get("use_dora", False):
        remedy = "MoE-PEFT saves no magnitudes, so what was trained is not in the file; and there is no DoRA here."
        raise refuse(f"{prefix}use_dora", settings["use_dora"], "false", remedy)
    rslora, alpha = settings.get("use_rslora", False), settings.get("lora_alpha")
    if not isinstance(rslora, bool):
        raise refuse(f"{prefix}use_rslora", rslora, "true or false", "Correct the adapter_config.json.")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise refuse(f"{prefix}lora_alpha", alpha, "a positive number", "Without it the scale is unknown.")
    return Lora(_whole(settings, f"{prefix}r", settings.get("r")), alpha, rslora)


def _whole(settings: Settings, field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise refuse(field, value, "a whole number of at least 1", "Correct the adapter_config.json.")
    return value


def _number(settings: Settings, field: str, default: float) -> float:
    value = settings.get(field, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise refuse(field, value, "a number of at least 0", "Correct the adapter_config.json.")
    return value


def routing_fields(settings: Settings) -> dict[str, Any]:
    """The fields of our config that say how a token is routed and balanced."""
    strategy, switch = settings["routing_strategy"], settings["routing_strategy"] == "mixlora-switch"
    coef = _number(settings, "router_aux_loss_coef", 0.001)
    balanced = settings.get("router_loss", True)
    if not isinstance(balanced, bool):
        raise refuse("router_loss", balanced, "true or false", "Correct the adapter_config.json.")
    if strategy == "mixlora":
        top_k = _whole(settings, "top_k", settings.get("top_k", 2))
        # One weight, divided by itself. `top_1_hard` is the same; this one can also be trained without balancing.
        chosen = {"routing": "softmax_top_k", "top_k": top_k} if top_k > 1 else {"routing": "top_1_straight_through"}
        coef = coef * top_k  # their loss is worth k when even, ours 1
    elif strategy == "mixlora-dynamic":
        chosen = {"routing": "top_p", "top_p": settings.get("top_p", 0.8)}
    else:
        chosen = {"routing": "top_1", "router_z_loss_coef": _number(settings, "router_z_loss_coef", 0.001)}
    return {
        **chosen,
        "balance": "switch" if balanced else "none",
        "router_aux_loss_coef": coef,
        "router_jitter_noise": _number(settings, "jitter_noise", 0.01 if switch else 0.0),
    }


def our_config(settings: Settings, layout: Layout) -> FfnMoeConfig:
    """The config that goes with `mixlora.converted`; the scale is the experts'."""
    expert = expert_lora(settings)
    r = common_rank(layout, expert, attention_lora(settings))
    alpha = expert.alpha if r == expert.r else expert.scaling * (math.sqrt(r) if expert.rslora else r)
    nested = settings.get("expert_lora", {})
    return FfnMoeConfig(
        r=r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        use_rslora=expert.rslora,
        lora_dropout=nested.get("lora_dropout", settings.get("lora_dropout", 0.0)),
        num_experts=settings["num_experts"],
        target_modules=[*(f"mlp.{n}" for n in layout.family.ffn), *(f"self_attn.{n}" for n in layout.attention)],
        base_model_name_or_path=settings.get("base_model_name_or_path"),
        task_type="CAUSAL_LM",
        inference_mode=True,
        **routing_fields(settings),
    )


def targets(settings: Settings) -> set[str]:
    """The linears to adapt: a list of names, or names with true and false."""
    named = settings.get("target_modules")
    if isinstance(named, Mapping) and all(isinstance(value, bool) for value in named.values()):
        return {name for name, value in named.items() if value}
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        allowed = "a list of names, or names with true or false"
        raise refuse("target_modules", named, allowed, "Correct the adapter_config.json.")
    return set(named)


# --- warnings ---

_KNOWN = frozenset(
    "peft_type task_type routing_strategy base_model_name_or_path bias r lora_alpha lora_dropout lora_init use_dora "
    "use_rslora target_modules expert_lora num_experts act_fn top_k top_p temperature expert_capacity sparse_step "
    "router_aux_loss_coef router_loss router_init_range jitter_noise router_z_loss_coef ffn_dropout".split()
)
_SWITCH = (
    "routing 'mixlora-switch': MoE-PEFT weights the expert by its probability in training, and in inference returns the "
    "block's input without the FFN. Imported as routing='top_1', the function that was trained. expert_capacity={}: tokens "
    "over it passed by the experts in training; here none does. ffn_dropout={} has no equal here."
)


def warnings_about(settings: Settings, config: FfnMoeConfig, layout: Layout, checked: bool) -> list[str]:
    """What a user should know, one sentence or two each.

    Args:
        checked: whether `check_base` was called.
    """
    switch, top_1 = config.routing == "top_1", config.routing == "top_1_straight_through"
    told = [_lost(settings, config)]
    if switch:
        told.append(_SWITCH.format(settings.get("expert_capacity", 32), settings.get("ffn_dropout", "not saved")))
    if top_1:
        told.append("top_k=1: the weight is always 1, and here, unlike there, the task trains the router as well.")
    told += _one_lora(settings, layout)
    without = [name for name in layout.family.ffn if name not in layout.ffn]
    if without:
        told.append(f"no LoRA on {', '.join(without)} of the FFN: zeros there, which training leaves at zero.")
    if settings["task_type"] != "CAUSAL_LM":
        told.append("task_type QUESTION_ANS: MoE-PEFT answers with the language head; imported as CAUSAL_LM.")
    unknown = sorted(set(settings) - _KNOWN)
    if unknown:
        told.append(f"ignored, as MoE-PEFT ignores them: {', '.join(unknown)}.")
    if not checked:
        act = settings.get("act_fn") or "none named"
        told.append(f"base model not looked at: its layers, widths and activation (act_fn: {act}) are taken on trust.")
    return [sentence for sentence in told if sentence]


def _lost(settings: Settings, config: FfnMoeConfig) -> str:
    """The fields that MoE-PEFT's export leaves out, and what stands in for them."""
    fields = ["router_aux_loss_coef", "router_loss", "jitter_noise"]
    fields += ["router_z_loss_coef"] if config.routing == "top_1" else []
    lost = [field for field in fields if field not in settings]
    if not lost:
        return ""
    z_loss = f", router_z_loss_coef={config.router_z_loss_coef}" if config.routing == "top_1" else ""
    return (
        f"not saved by MoE-PEFT: {', '.join(lost)}. They matter to further training only, which gets its defaults on our "
        f"scale: balance={config.balance!r}, router_aux_loss_coef={config.router_aux_loss_coef}, "
        f"router_jitter_noise={config.router_jitter_noise}{z_loss}."
    )


def _one_lora(settings: Settings, layout: Layout) -> list[str]:
    """What `expert_lora` says and one rank, scale and dropout cannot."""
    nested, told = settings.get("expert_lora", {}), []
    expert, attention = expert_lora(settings), attention_lora(settings)
    if layout.attention and (expert.r, expert.scaling) != (attention.r, attention.scaling):
        told.append(
            f"expert_lora: experts have r={expert.r} and scale {expert.scaling:g}, attention r={attention.r} and "
            f"{attention.scaling:g}. Here one r={common_rank(layout, expert, attention)}: zero rows fill up, and the "
            "attention's B carries the ratio. Same output; attention learns at another pace."
        )
    if nested and expert != attention:
        told.append(
            "expert_lora: read as `moe-peft` does; the package `mixlora` passes over it and answers differently."
        )
    if settings.get("use_rslora") and nested and "use_rslora" not in nested:
        told.append("expert_lora.use_rslora: MoE-PEFT does not save false, so true is taken over from attention.")
    dropout = settings.get("lora_dropout")
    if nested.get("lora_dropout", dropout) != dropout:
        told.append(f"lora_dropout: {nested['lora_dropout']} of the experts for all; attention had {dropout}.")
    return told
