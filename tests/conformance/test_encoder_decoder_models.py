"""PEFT's tests on encoder-decoders, where a router sees the tokens of two sequences."""

import pytest

from moe_peft import FfnMoeConfig, LinearMoeConfig, RankMoeConfig

from . import checkpoints
from .factory import FFN_RULES, LARGE, RANK_RULES, RULES, rebuild


CONFIGS = {"one expert": RULES["one expert"], "top-k": RULES["top-k"], "dense": RULES["dense"]}
SEQ2SEQ = {"task_type": "SEQ_2_SEQ_LM", "target_modules": None, **LARGE}

TestEncoderDecoderModels = rebuild(
    "test_encoder_decoder_models",
    "TestEncoderDecoderModels",
    {
        "model_id": [pytest.param(checkpoints.path(name), id=name) for name in checkpoints.SEQ2SEQ],
        "config_cls,config_kwargs": [
            *(pytest.param(LinearMoeConfig, {**SEQ2SEQ, **kwargs}, id=name) for name, kwargs in CONFIGS.items()),
            *(pytest.param(FfnMoeConfig, {**SEQ2SEQ, **kwargs}, id=name) for name, kwargs in FFN_RULES.items()),
            *(pytest.param(RankMoeConfig, {**SEQ2SEQ, **kwargs}, id=name) for name, kwargs in RANK_RULES.items()),
        ],
    },
    pretend_lora=("_test_mixed_adapter_batches", "_test_generate_with_mixed_adapter_batches_and_beam_search"),
)
