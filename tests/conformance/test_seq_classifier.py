"""PEFT's tests on sequence classifiers, whose head is trained and saved beside the adapter."""

import pytest

from moe_peft import BottleneckMoeConfig, LinearMoeConfig, RankMoeConfig, ShardPoolConfig

from . import checkpoints
from .factory import BOTTLENECK_RULES, JOINED, LARGE, PER_LAYER, RANK_RULES, RULES, SHARD_RULES, rebuild


CLASSIFY = {"task_type": "SEQ_CLS", "target_modules": None, **LARGE}
CONFIGS = {"one expert": RULES["one expert"], "top-k per layer": PER_LAYER, "dense": RULES["dense"]}

TestSequenceClassificationModels = rebuild(
    "test_seq_classifier",
    "TestSequenceClassificationModels",
    {
        "model_id": [pytest.param(checkpoints.path(name), id=name) for name in checkpoints.CLASSIFIERS],
        "config_cls,config_kwargs": [
            *(pytest.param(LinearMoeConfig, {**CLASSIFY, **kwargs}, id=name) for name, kwargs in CONFIGS.items()),
            *(
                pytest.param(ShardPoolConfig, {**CLASSIFY, **kwargs}, id=name)
                for name, kwargs in {**SHARD_RULES, "pools": JOINED}.items()
            ),
            *(pytest.param(RankMoeConfig, {**CLASSIFY, **kwargs}, id=name) for name, kwargs in RANK_RULES.items()),
            *(
                pytest.param(BottleneckMoeConfig, {**CLASSIFY, **kwargs}, id=name)
                for name, kwargs in BOTTLENECK_RULES.items()
            ),
        ],
    },
)
