"""PEFT's tests on bitsandbytes layers, 4-bit and 8-bit, on the CPU."""

import pytest

from moe_peft import BottleneckMoeConfig, DomainMoeConfig, LinearMoeConfig, RankMoeConfig, ShardPoolConfig

from . import checkpoints
from .factory import BOTTLENECK_RULES, DOMAIN_RULES, JOINED, LARGE, RANK_RULES, RULES, SHARD_RULES, rebuild, upstream


pytest.importorskip("bitsandbytes")


def _loaders() -> list:
    """Upstream's, reading a local model. Subclasses would fall under its skip of 4-bit merging on the CPU."""
    params = []
    for name in ("Bnb4bitLoader", "Bnb8bitLoader"):
        loader = getattr(upstream("test_quantization"), name)
        ours = type(name, (), {**vars(loader), "model_id": checkpoints.path("opt-125m")})
        params.append(pytest.param(ours(), id=ours.name))
    return params


QV = {"target_modules": ["q_proj", "v_proj"], **LARGE}

TestQuantization = rebuild(
    "test_quantization",
    "TestQuantization",
    {
        "quant": _loaders(),
        "config_cls,config_kwargs": [
            *(pytest.param(LinearMoeConfig, {**QV, **kwargs}, id=name) for name, kwargs in RULES.items()),
            *(
                pytest.param(ShardPoolConfig, {**QV, **kwargs}, id=name)
                for name, kwargs in {**SHARD_RULES, "pools": JOINED}.items()
            ),
            *(pytest.param(DomainMoeConfig, {**QV, **kwargs}, id=name) for name, kwargs in DOMAIN_RULES.items()),
            *(pytest.param(RankMoeConfig, {**QV, **kwargs}, id=name) for name, kwargs in RANK_RULES.items()),
            *(
                pytest.param(BottleneckMoeConfig, {**QV, **kwargs, "r": 0}, id=name)
                for name, kwargs in BOTTLENECK_RULES.items()
            ),
        ],
    },
    # One test evaluates the base first, on purpose.
    pytestmark=[pytest.mark.filterwarnings("ignore:The 4-bit base model was evaluated before")],
)
