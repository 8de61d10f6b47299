"""Mixtures of LoRA experts for Hugging Face PEFT.

Importing this package registers its adapter types with PEFT and does nothing else: no device is chosen, no trainer or
quantisation library is loaded.
"""

from moe_peft import registration, saving
from moe_peft.rival import refuse_rival


refuse_rival()
for name in ("linear_moe", "ffn_moe", "rank_moe", "shard_pool", "domain_moe", "bottleneck_moe"):
    registration.reserve(name)

from moe_peft.adding import add_experts, freeze_experts  # noqa: E402  (the enum members must exist first)
from moe_peft.allocating import allocate  # noqa: E402
from moe_peft.bottleneck_config import BottleneckMoeConfig  # noqa: E402
from moe_peft.callbacks import MoeCallback, install  # noqa: E402
from moe_peft.card import describe_adapter  # noqa: E402
from moe_peft.catalogue import from_catalogue  # noqa: E402
from moe_peft.collator import TaskTypeCollator  # noqa: E402
from moe_peft.config import FfnMoeConfig, LinearMoeConfig  # noqa: E402
from moe_peft.consistency import ConsistencyLoss, consistency_loss  # noqa: E402
from moe_peft.context import set_aux_scale, set_step, task_types  # noqa: E402
from moe_peft.domain_config import DomainMoeConfig  # noqa: E402
from moe_peft.domain_loras import from_loras  # noqa: E402
from moe_peft.ewa import EwaCallback  # noqa: E402
from moe_peft.growing import grow  # noqa: E402
from moe_peft.merging_loras import merge_loras  # noqa: E402
from moe_peft.plain_lora import to_lora  # noqa: E402
from moe_peft.prototypes import set_null_threshold, set_prototypes  # noqa: E402
from moe_peft.pruning import expert_scores, prune_experts  # noqa: E402
from moe_peft.rank_config import RankMoeConfig  # noqa: E402
from moe_peft.regrouping import group_experts  # noqa: E402
from moe_peft.router_init import init_routers  # noqa: E402

# The name of the module `moe_peft.routing` too, which was loaded above: the package's attribute is from here on the context
# manager, while `from moe_peft.routing import Routing` still finds the module. (`import moe_peft.routing as x` gives the
# context manager: Python asks the package for the attribute.)
from moe_peft.routing_control import routing  # noqa: E402
from moe_peft.self_contrast import SelfContrast  # noqa: E402
from moe_peft.shard_config import ShardPoolConfig  # noqa: E402
from moe_peft.tracing import expert_trace  # noqa: E402
from moe_peft.tuners import base  # noqa: E402
from moe_peft.tuners.bottleneck_moe import BottleneckMoeModel  # noqa: E402
from moe_peft.tuners.domain_moe import DomainMoeModel  # noqa: E402
from moe_peft.tuners.ffn_moe import FfnMoeModel  # noqa: E402
from moe_peft.tuners.linear_moe import LinearMoeModel  # noqa: E402
from moe_peft.tuners.rank_moe import RankMoeModel  # noqa: E402
from moe_peft.tuners.shard_pool import ShardPoolModel  # noqa: E402
from moe_peft.upcycling import init_experts_from_lora  # noqa: E402
from moe_peft.watch import update_selection_bias  # noqa: E402


registration.register("linear_moe", LinearMoeConfig, LinearMoeModel)
registration.register("ffn_moe", FfnMoeConfig, FfnMoeModel)
registration.register("rank_moe", RankMoeConfig, RankMoeModel)
registration.register("shard_pool", ShardPoolConfig, ShardPoolModel)
registration.register("domain_moe", DomainMoeConfig, DomainMoeModel)
registration.register("bottleneck_moe", BottleneckMoeConfig, BottleneckMoeModel)
if install not in base.after_injection:
    base.after_injection.append(install)
if describe_adapter not in saving.after_saving:
    saving.after_saving.append(describe_adapter)

__all__ = [
    "BottleneckMoeConfig",
    "BottleneckMoeModel",
    "ConsistencyLoss",
    "DomainMoeConfig",
    "DomainMoeModel",
    "EwaCallback",
    "FfnMoeConfig",
    "FfnMoeModel",
    "LinearMoeConfig",
    "LinearMoeModel",
    "MoeCallback",
    "RankMoeConfig",
    "RankMoeModel",
    "SelfContrast",
    "ShardPoolConfig",
    "ShardPoolModel",
    "TaskTypeCollator",
    "add_experts",
    "allocate",
    "consistency_loss",
    "expert_scores",
    "expert_trace",
    "freeze_experts",
    "from_catalogue",
    "from_loras",
    "group_experts",
    "grow",
    "init_experts_from_lora",
    "init_routers",
    "merge_loras",
    "prune_experts",
    "routing",
    "set_aux_scale",
    "set_null_threshold",
    "set_prototypes",
    "set_step",
    "task_types",
    "to_lora",
    "update_selection_bias",
]
