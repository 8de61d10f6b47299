"""Mixtures of LoRA experts for Hugging Face PEFT.

Importing this package registers its adapter types with PEFT and does nothing else: no device is chosen, no trainer or
quantisation library is loaded.
"""

from moe_peft import registration


registration.reserve("linear_moe")

from moe_peft.config import LinearMoeConfig  # noqa: E402  (the enum member must exist first)
from moe_peft.tuners.linear_moe import LinearMoeModel  # noqa: E402


registration.register("linear_moe", LinearMoeConfig, LinearMoeModel)

__all__ = ["LinearMoeConfig", "LinearMoeModel"]
