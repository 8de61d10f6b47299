"""Mixtures of LoRA experts for Hugging Face PEFT.

Importing this package registers its adapter types with PEFT and does nothing else: no device is chosen, no trainer or
quantisation library is loaded.
"""

from moe_peft import registration
from moe_peft.rival import refuse_rival


refuse_rival()
for name in ("linear_moe", "ffn_moe"):
    registration.reserve(name)

from moe_peft.allocating import allocate  # noqa: E402  (the enum members must exist first)
from moe_peft.callbacks import MoeCallback, install  # noqa: E402
from moe_peft.catalogue import from_catalogue  # noqa: E402
from moe_peft.collator import TaskTypeCollator  # noqa: E402
from moe_peft.config import FfnMoeConfig, LinearMoeConfig  # noqa: E402
from moe_peft.tuners import base  # noqa: E402
from moe_peft.tuners.ffn_moe import FfnMoeModel  # noqa: E402
from moe_peft.tuners.linear_moe import LinearMoeModel  # noqa: E402


registration.register("linear_moe", LinearMoeConfig, LinearMoeModel)
registration.register("ffn_moe", FfnMoeConfig, FfnMoeModel)
if install not in base.after_injection:
    base.after_injection.append(install)

__all__ = [
    "FfnMoeConfig",
    "FfnMoeModel",
    "LinearMoeConfig",
    "LinearMoeModel",
    "MoeCallback",
    "TaskTypeCollator",
    "allocate",
    "from_catalogue",
]
