"""PEFT's tests of configs: to and from JSON, copies, pickles, task types, versions."""

import pytest

from moe_peft import BottleneckMoeConfig, DomainMoeConfig, LinearMoeConfig, RankMoeConfig, ShardPoolConfig

from . import checkpoints
from .factory import BOTTLENECK_RULES, DOMAIN_RULES, PER_LAYER, RANK_RULES, RULES, SHARD_RULES, rebuild, upstream


# Read by tests that load a LoRA config through another method's class.
upstream("test_config").PEFT_MODELS_TO_TEST = [(checkpoints.path(checkpoints.LORA_ADAPTER), "test")]

TestPeftConfig = rebuild(
    "test_config",
    "TestPeftConfig",
    {
        "config_class,mandatory_kwargs": [
            *(
                pytest.param(LinearMoeConfig, kwargs, id=name)
                for name, kwargs in {"defaults": {}, "per layer": PER_LAYER, **RULES}.items()
            ),
            *(pytest.param(ShardPoolConfig, kwargs, id=name) for name, kwargs in SHARD_RULES.items()),
            *(pytest.param(DomainMoeConfig, kwargs, id=name) for name, kwargs in DOMAIN_RULES.items()),
            *(pytest.param(RankMoeConfig, kwargs, id=name) for name, kwargs in RANK_RULES.items()),
            *(pytest.param(BottleneckMoeConfig, kwargs, id=name) for name, kwargs in BOTTLENECK_RULES.items()),
        ],
        "config_class": [
            pytest.param(config_class, id=config_class.__name__)
            for config_class in (LinearMoeConfig, ShardPoolConfig, RankMoeConfig)
        ],
    },
    say_lora=("test_lora_config_layers_to_transform_validation", "test_regex_with_layer_indexing_lora"),
)
