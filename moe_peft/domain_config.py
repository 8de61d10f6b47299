"""The config of named experts: `DomainMoeConfig` and what it refuses."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peft.utils import PeftType

from moe_peft.config import MoeConfig
from moe_peft.config_checks import is_count, is_number
from moe_peft.errors import nearest, refuse


GATES: dict[str, dict[str, Any]] = {
    "token": {},
    "sequence": {"routing": "softmax", "router_granularity": "sequence"},
    "given": {"routing": "given"},
    "prototype": {"routing": "top_1_hard", "router_granularity": "sequence", "freeze_router": True},
    "arrow": {"routing": "softmax_top_k", "freeze_router": True},
    "arrow_init": {"routing": "softmax_top_k"},
}
"""The value of `gate` -> the fields of [`MoeConfig`] that it fixes."""

MODEL_GATES = ("sequence", "prototype")
"""Gates of which the whole model has one, on the embeddings of the prompt."""

TRAINED_GATES = ("token", "sequence", "arrow_init")
ARROWS = ("arrow", "arrow_init")
TRAINING_FREE = ("prototype", "arrow")

LEARNS_FROM = ("loss", "labels", "both")
"""The values of `gate_training`."""

NULL = "null"
"""What reports call the choice of no expert, which no domain may be named."""


@dataclass
class DomainMoeConfig(MoeConfig):
    """Named LoRA experts on each adapted linear layer, often trained elsewhere and frozen, mixed by a gate.

    The fields are those of [`MoeConfig`], and:

    Args:
        domains (`list[str]`):
            The experts' names, in order. What is called a task type elsewhere is here the place of a domain in this list.
        gate (`str`, *optional*, defaults to `"token"`):
            Who chooses. "token": a router on each linear layer, for each token (MeteoRA, arXiv:2405.13053). "sequence": one
            router for the model on the prompt's embeddings, max-pooled; soft in training, the best expert in use, fixed
            for all that is generated (SteloCoder, arXiv:2310.15539). "given": the sample's domain, from `task_types`.
            "prototype": the domain whose mean prompt embedding lies nearest; nothing is trained
            (`moe_peft.set_prototypes`). "arrow": each token to the experts whose strongest direction it lies along;
            computed from the experts alone (Arrow, arXiv:2405.11157). "arrow_init": the same start, and trained on.
        gate_training (`str`, *optional*, defaults to `"loss"`):
            What a trained gate learns from: "loss", the trainer's; "labels", the samples' domains by
            cross-entropy; "both". Labels are `task_types` in the batch.
        router_supervision_coef (`float`, *optional*, defaults to 50.0):
            Weight of that cross-entropy, a mean over the real tokens and over all routers. 50 is MeteoRA's.
        domain_ranks (`list[int]`, *optional*):
            The rank of each domain's expert. Defaults to `r` for all.
        rank_pattern (`dict[str, list[int]]`, *optional*):
            Layers (named as in PEFT) whose ranks differ -> the rank of each domain there; 0 where it has none.
        train_domains (`list[str]`, *optional*):
            The domains whose experts are trained; the others are held still. Defaults to all. [] trains the gate alone.
        num_experts (`int`, *optional*):
            Follows from `domains`; may be left out.
        lora_alpha, r:
            The output of every expert is scaled by `lora_alpha / r` with these two numbers, whatever its own rank.
        routing (`str`, *optional*):
            As in [`MoeConfig`] with `gate="token"`, "softmax_top_k" by default; the other gates fix it.
    """

    num_experts: Any = field(default=None, metadata={"help": "Follows from `domains`."})
    routing: Any = field(default=None, metadata={"help": "How a token chooses, with the gate 'token'."})
    domains: list[str] | None = field(default=None, metadata={"help": "The experts' names, in order."})
    gate: str = field(default="token", metadata={"help": "Who chooses the experts."})
    gate_training: str = field(default="loss", metadata={"help": "What the gate learns from."})
    router_supervision_coef: float = field(default=50.0, metadata={"help": "Weight of the gate's cross-entropy."})
    domain_ranks: list[int] | None = field(default=None, metadata={"help": "The rank of each domain's expert."})
    rank_pattern: dict[str, list[int]] = field(default_factory=dict, metadata={"help": "Ranks of single layers."})
    train_domains: list[str] | None = field(default=None, metadata={"help": "The domains whose experts learn."})

    def __post_init__(self) -> None:
        self.domains = _checked_names(self)
        _check_gate(self)
        _check_what_shapes_a_router(self)
        _check_experts(self)
        _check_ranks(self)
        _check_training(self)
        self.balance = self.balance or "none"
        super().__post_init__()
        self.peft_type = PeftType["DOMAIN_MOE"]

    @property
    def names(self) -> list[str]:
        """The domains, which `__post_init__` has made sure of."""
        return list(self.domains or [])

    @property
    def supervised(self) -> bool:
        """Whether the gate learns from labels."""
        return self.gate_training != "loss"


def name_problems(names: Sequence[Any]) -> list[str]:
    """Why these cannot be the names of experts, a line each."""
    problems, seen = [], {}
    for name in names:
        if not isinstance(name, str) or not name.strip() or name != name.strip():
            problems.append(f"{name!r} is no name: give a text without spaces at its ends")
            continue
        if "." in name or "/" in name or not name.isprintable() or name.lower() == NULL:
            why = "it contains '.', '/' or what cannot be printed, or is 'null', the name of no expert"
            problems.append(f"{name!r} may not be a name: {why}")
        if name.casefold() in seen:
            problems.append(f"two domains have one name: {seen[name.casefold()]!r} and {name!r}")
        seen.setdefault(name.casefold(), name)
    return problems


def _checked_names(config: DomainMoeConfig) -> list[str]:
    names = config.domains
    if not isinstance(names, (list, tuple)) or not names:
        remedy = "Name the experts: `domains=['law', 'medicine']`, or start from LoRAs with `moe_peft.from_loras`."
        raise refuse("domains", names, "a list with the name of each expert", remedy)
    problems = name_problems(names)
    if problems:
        raise refuse("domains", list(names), "different names", f"{'; '.join(problems)}.")
    return list(names)


def _check_gate(config: DomainMoeConfig) -> None:
    if config.gate not in GATES:
        allowed = "one of " + ", ".join(map(repr, GATES))
        raise refuse("gate", config.gate, allowed, nearest(str(config.gate), GATES))
    if config.routing is None and config.gate == "token":
        config.routing = "softmax_top_k"
    for name, fixed in GATES[config.gate].items():
        value, left_out = getattr(config, name), {"router_granularity": "token"}.get(name)
        if value not in (fixed, left_out) and value:
            raise refuse(name, value, f"left out with `gate` = {config.gate!r}, which fixes it", f"Remove `{name}`.")
        setattr(config, name, fixed)
    if config.gate == "token" and config.routing in ("given", "random"):
        raise refuse("routing", config.routing, "a rule with a router for the gate 'token'", "Use `gate='given'`.")
    if config.gate == "token" and config.routing == "softmax_top_k" and config.top_k is None:
        config.top_k = min(2, len(config.names))
    if config.gate in ARROWS and config.top_k is None:
        config.top_k = min(4, len(config.names))  # the paper's
    if config.gate in MODEL_GATES and (config.num_null_experts or config.expert_groups is not None):
        name = "num_null_experts" if config.num_null_experts else "expert_groups"
        remedy = "Such a gate has one null expert, for prompts that score below `moe_peft.set_null_threshold`."
        raise refuse(name, getattr(config, name), f"left out with `gate` = {config.gate!r}", remedy)


_SHAPES = {
    "router_bias": False,
    "router_act": None,
    "scoring_func": None,
    "norm_topk_prob": None,
    "routed_scaling_factor": 1.0,
    "router_init_std": None,
    "schedule_steps": 0,
}
"""Fields that shape a trained router of tokens -> what they are where there is none."""


def _check_what_shapes_a_router(config: DomainMoeConfig) -> None:
    without = dict(_SHAPES) if config.gate in (*MODEL_GATES, *ARROWS) else {}
    if config.gate in MODEL_GATES:
        without |= {"router_scale": 1.0}
    if config.gate in TRAINED_GATES:
        without.pop("router_init_std", None)
    for name, left_out in {"router_jitter_noise": 0.0, **without}.items():
        if getattr(config, name) != left_out:
            remedy = f"Remove `{name}`."
            raise refuse(name, getattr(config, name), f"{left_out!r} with `gate` = {config.gate!r}", remedy)
    if without and config.balance not in (None, "none"):
        remedy = "The gate is to follow the prompts, however often each domain comes."
        raise refuse("balance", config.balance, f"'none' with `gate` = {config.gate!r}", remedy)


def _check_experts(config: DomainMoeConfig) -> None:
    number = len(config.names)
    if config.num_experts not in (None, number):
        raise refuse("num_experts", config.num_experts, f"left out, or {number}, as many as `domains`", "Remove it.")
    config.num_experts = number
    if config.num_shared_experts:
        remedy = "A plain LoRA as a second active adapter does the same: remove it."
        raise refuse("num_shared_experts", config.num_shared_experts, "0 for domains", remedy)
    if not isinstance(config.init_weights, bool):
        raise refuse("init_weights", config.init_weights, "True or False for domains", "A starts at random here.")


def _check_ranks(config: DomainMoeConfig) -> None:
    if not is_count(config.r) or not config.r:
        remedy = "Single layers' ranks stand in `rank_pattern`."
        raise refuse("r", config.r, "a whole number of at least 1 for domains", remedy)
    number = len(config.names)
    ranks = config.domain_ranks
    if ranks is not None and not _are_ranks(ranks, number, 1):
        remedy = "Leave it out to give every domain the rank `r`."
        raise refuse("domain_ranks", ranks, f"a list of {number} whole numbers of at least 1, one per domain", remedy)
    if not isinstance(config.rank_pattern, dict):
        remedy = "Write {'layers.0.self_attn.q_proj': [8, 0]}."
        raise refuse("rank_pattern", config.rank_pattern, "a dict from layers to lists of ranks", remedy)
    for layer, ranks in config.rank_pattern.items():
        if not _are_ranks(ranks, number, 0) or not any(ranks):
            allowed = f"a list of {number} whole numbers for {layer!r}, one per domain and not all 0"
            raise refuse("rank_pattern", ranks, allowed, "0 is for a domain that has no expert there.")


def _are_ranks(ranks: Any, number: int, least: int) -> bool:
    return isinstance(ranks, list) and len(ranks) == number and all(is_count(r) and r >= least for r in ranks)


def _check_training(config: DomainMoeConfig) -> None:
    if config.gate_training not in LEARNS_FROM:
        allowed = "one of " + ", ".join(map(repr, LEARNS_FROM))
        raise refuse("gate_training", config.gate_training, allowed, nearest(str(config.gate_training), LEARNS_FROM))
    if config.supervised and (config.gate not in TRAINED_GATES or config.freeze_router):
        allowed = f"'loss' with `gate` = {config.gate!r}" + ", frozen" * config.freeze_router
        raise refuse("gate_training", config.gate_training, allowed, "There is nothing there that labels could train.")
    if config.supervised and len(config.names) < 2:
        remedy = "A gate that is trained on one domain only has nothing to tell apart: add a domain."
        raise refuse("domains", config.names, "at least two with a gate that learns from labels", remedy)
    coef = config.router_supervision_coef
    if not is_number(coef) or coef <= 0:
        raise refuse("router_supervision_coef", coef, "a positive number", "50 is MeteoRA's.")
    if config.supervised and config.routing == "softmax_top_k" and config.top_k == 1:
        config.routing = "top_1_hard"  # its weight is 1 as well; the labels train the router, the loss cannot
    trained = config.train_domains
    if trained is None:
        return
    if not isinstance(trained, list):
        raise refuse("train_domains", trained, "a list of names, or None for all", "[] trains the gate alone.")
    for name in trained:
        if name not in config.names:
            allowed = "a list of names from " + ", ".join(map(repr, config.names))
            raise refuse("train_domains", trained, allowed, nearest(str(name), config.names))
