"""PEFT's tests on six families of decoders: training with and without checkpointing, generation, merging, saving."""

import pytest

from moe_peft import (
    BottleneckMoeConfig,
    DomainMoeConfig,
    FfnMoeConfig,
    LinearMoeConfig,
    RankMoeConfig,
    ShardPoolConfig,
)

from . import checkpoints
from .factory import (
    BOTTLENECK_RULES,
    DOMAIN_RULES,
    FFN_RULES,
    JOINED,
    LARGE,
    PER_LAYER,
    RANK_RULES,
    RULES,
    SHARD_RULES,
    rebuild,
    upstream,
)


CAUSAL = {"task_type": "CAUSAL_LM", "target_modules": None, **LARGE}
CONFIGS = {
    "one expert": {**RULES["one expert"], "lora_dropout": 0.05},
    "top-k per layer": PER_LAYER,
    "dense with tokens": {**RULES["dense"], "trainable_token_indices": [0, 1, 3]},
    "top-1 and shared": {**RULES["top-1"], "num_shared_experts": 1, "use_rslora": True},
}

# It skips every method but BEFT where the model has no biases, which BEFT alone needs.
upstream("test_decoder_models").check_beft_config = lambda *args: None

CASES = [
    *(pytest.param(LinearMoeConfig, {**CAUSAL, **kwargs}, id=name) for name, kwargs in CONFIGS.items()),
    *(pytest.param(FfnMoeConfig, {**CAUSAL, **kwargs}, id=name) for name, kwargs in FFN_RULES.items()),
    *(pytest.param(ShardPoolConfig, {**CAUSAL, **SHARD_RULES[name]}, id=name) for name in ("own", "splits")),
    *(pytest.param(DomainMoeConfig, {**CAUSAL, **kwargs}, id=name) for name, kwargs in DOMAIN_RULES.items()),
    *(pytest.param(RankMoeConfig, {**CAUSAL, **kwargs}, id=name) for name, kwargs in RANK_RULES.items()),
]
BOTTLENECKS = {name: {**CAUSAL, **kwargs, "r": 0} for name, kwargs in BOTTLENECK_RULES.items()}
EVERY_FFN = {"target_modules": ["down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h"]}
CHOSEN = [pytest.param(BottleneckMoeConfig, kwargs, id=name) for name, kwargs in BOTTLENECKS.items()]
ALL = [pytest.param(BottleneckMoeConfig, {**kwargs, **EVERY_FFN}, id=name) for name, kwargs in BOTTLENECKS.items()]
POOLS = pytest.param(ShardPoolConfig, {**CAUSAL, **JOINED}, id="pools")

TestDecoderModels = rebuild(
    "test_decoder_models",
    "TestDecoderModels",
    {
        "model_id": [pytest.param(checkpoints.path(name), id=name) for name in checkpoints.DECODERS],
        # It counts the parameters that adapted layers register, and all layers' pools lie in the first.
        "test_training_decoders_layer_indexing:config_cls,config_kwargs": [
            *CASES,
            *ALL,
        ],  # by default few layers are adapted
        "config_cls,config_kwargs": [*CASES, *CHOSEN, POOLS],
    },
    pretend_lora=(
        "test_mixed_adapter_batches",
        "test_generate_with_mixed_adapter_batches",
        "_test_mixed_adapter_batches",
        "_test_generate_with_mixed_adapter_batches_and_beam_search",
    ),
)
