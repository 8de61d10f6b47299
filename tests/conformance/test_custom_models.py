"""PEFT's tests on small hand-made models: saving, merging, switching, mixing and deleting adapters, dtypes, FSDP."""

import re

import pytest

from moe_peft import BottleneckMoeConfig, DomainMoeConfig, LinearMoeConfig, RankMoeConfig, ShardPoolConfig

from .factory import BOTTLENECK_RULES, DOMAIN_RULES, RANK_RULES, RULES, SHARD_RULES, SMALL, rebuild


KINDS = [(LinearMoeConfig, "linear_moe", rule, settings) for rule, settings in RULES.items()]
KINDS += [(ShardPoolConfig, "shard_pool", rule, settings) for rule, settings in SHARD_RULES.items()]
KINDS += [(DomainMoeConfig, "domain_moe", rule, settings) for rule, settings in DOMAIN_RULES.items()]
KINDS += [(RankMoeConfig, "rank_moe", rule, settings) for rule, settings in RANK_RULES.items()]
KINDS += [
    (BottleneckMoeConfig, "bottleneck_moe", rule, {**settings, "r": 0}) for rule, settings in BOTTLENECK_RULES.items()
]


def _cases() -> list:
    """`(test_name, model_id, config_cls, config_kwargs)`; upstream turns `init_weights` off where it must."""
    targets = {
        "regex": ("MLP", {"target_modules": "lin0"}),
        "first": ("MLP", {"target_modules": ["lin0"]}),
        "last": ("MLP", {"target_modules": ["lin1"]}),
        "both": ("MLP", {"target_modules": ["lin0", "lin1"]}),
        "and a saved module": ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
        "all but one": ("MLP", {"target_modules": "all-linear", "exclude_modules": ["lin1"]}),
        "under a norm": ("MLP_LayerNorm", {"target_modules": ["lin0"], "modules_to_save": ["layernorm1"]}),
        "Conv1D": ("EmbConv1D", {"target_modules": ["conv1d"]}),
        "head": ("EmbConv1D", {"target_modules": ["lin0"], "modules_to_save": ["conv1d"]}),
        "and tokens": ("EmbConv1D", {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}}),
    }
    return [
        pytest.param(f"{rule} {target}", model, config_class, {**kwargs, **SMALL, **settings}, id=f"{rule}-{target}")
        for config_class, _, rule, settings in KINDS
        for target, (model, kwargs) in targets.items()
        if rule
        in ("one expert", "top-k", "pools", "one rank", "ranks by a router", "domains", "bottlenecks by a gate")
        or target in ("first", "Conv1D", "and a saved module")
    ]


def _pairs() -> list:
    """`(test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2)`; both are active at once."""
    lin0, lin1 = {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}
    tokens_0 = {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [0, 1, 2]}}
    tokens_1 = {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [3, 4, 5, 6]}}
    kinds = {
        "same": (None, lin0, lin0),
        "different": (None, lin0, lin1),
        "with tokens": ("lora+trainable_tokens", tokens_0, tokens_1),
    }
    return [
        pytest.param(
            f"{rule} {kind}",
            method or name,
            config_class,
            {**first, **SMALL, **settings, "init_weights": False},
            {**second, **SMALL, **settings, **_other_r(config_class, settings, 2), "init_weights": False},
            id=f"{rule}-{kind}",
        )
        for config_class, name, rule, settings in KINDS
        for kind, (method, first, second) in kinds.items()
    ]


def _mixed(first: dict, second: dict) -> list:
    """`(test_name, config0, config1)` for batches whose rows name their adapters."""
    return [
        pytest.param(
            rule,
            config_class(**{**SMALL, **settings, **first, "init_weights": False}),
            config_class(
                **{**SMALL, **settings, **second, **_other_r(config_class, settings, 8), "init_weights": False}
            ),
            id=rule,
        )
        for config_class, _, rule, settings in KINDS
    ]


def _other_r(config_cls: type, settings: dict, r: int) -> dict:
    """For the second of two adapters: another rank, but where the rank says how many experts there are."""
    return {"r": settings["r"]} if config_cls in (RankMoeConfig, BottleneckMoeConfig) else {"r": r}


def _check_requires_grad(self, model, *expected: str) -> None:
    """Upstream's check, in our names: what it calls `lora_A.x.weight` lies in `linear_moe_experts.x` here."""
    ours = {re.sub(r"lora_([AB])\.(\w+)\.weight$", r"linear_moe_experts.\2.lora_\1", name) for name in expected}
    ours |= {name.replace(".lora_A", ".router") for name in ours if name.endswith(".lora_A")}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == ours


LIN0, LIN1, BOTH = ({"target_modules": names} for names in (["lin0"], ["lin1"], ["lin0", "lin1"]))
CONV1D = {"target_modules": ["conv1d"]}
MODEL_CASES = {"test_name,model_id,config_cls,config_kwargs": _cases()}
CLASS_CASES = {"config_cls": [pytest.param(LinearMoeConfig, id="LinearMoeConfig")]}

TestPeftCustomModel = rebuild(
    "test_custom_models",
    "TestPeftCustomModel",
    {
        **MODEL_CASES,
        **CLASS_CASES,
        "config0": [
            pytest.param(config_class(**{**LIN0, **SMALL, **settings, "init_weights": False}), id=rule)
            for config_class, _, rule, settings in KINDS
        ],
        "test_add_adapter_rejects_duplicate_name_without_mutation:mixed": [False],  # PeftMixedModel knows LoRA etc.
    },
    say_lora=(
        "test_add_adapter_rejects_duplicate_name_without_mutation",
        "test_delete_adapter_multiple_adapters_with_*",
        "test_delete_adapter_with_multiple_adapters_works",
        "test_existing_model_card",
        "test_ignore_mismatched_sizes_with_scalar_modules_to_save",
        "test_load_does_not_overwrite_similarly_named_sibling",
        "test_multiple_active_adapters_with_*_trainable_token_indices_*",
        "test_non_existing_model_card",
        "test_save_embedding_layers_excludes_similarly_named_sibling",
        "test_set_adapter_non_overlapping_trainable_token_indices",
        "test_weight_bias_attributes",
    ),
)

TestMultipleActiveAdapters = rebuild(
    "test_custom_models",
    "TestMultipleActiveAdapters",
    {"test_name,tuner_method,config_cls,config_kwargs_1,config_kwargs_2": _pairs()},
)

TestRequiresGrad = rebuild(
    "test_custom_models",
    "TestRequiresGrad",
    CLASS_CASES,
    say_lora=(
        "test_loading_adapter_preserves_custom_requires_grad",
        "test_loading_model_with_trainble_tokens_requires_grad_set_correctly",
        "test_requires_grad_follows_inference_mode_*",
        "test_requires_grad_lora_*_targets",
        "test_requires_grad_modules_to_save_*",
    ),
    check_requires_grad=_check_requires_grad,
)

TestMixedAdapterBatches = rebuild(
    "test_custom_models",
    "TestMixedAdapterBatches",
    {
        "test_name,config0,config1": _mixed(LIN0, LIN0),
        "*_different_target_layers:test_name,config0,config1": _mixed(LIN0, LIN1),
        "*_partly_overlapping_target_layers:test_name,config0,config1": _mixed(LIN0, BOTH),
        "*_batches_multiple_modules_to_save:test_name,config0,config1": _mixed(
            {**LIN0, "modules_to_save": ["lin1"]}, {**LIN0, "modules_to_save": ["lin1"]}
        ),
        "*_unsupported_layer_raises:test_name,config0,config1": _mixed(
            {**LIN0, "modules_to_save": ["gru"]}, {**LIN0, "modules_to_save": ["gru"]}
        ),
        "*_conv1d_emb:test_name,config0,config1": _mixed(CONV1D, CONV1D),
        "*_conv1d_emb_multiple_modules_to_save:test_name,config0,config1": _mixed(
            {**CONV1D, "modules_to_save": ["lin0"]}, {**CONV1D, "modules_to_save": ["lin0"]}
        ),
        "test_name,config": [pytest.param("", LinearMoeConfig(**LIN0, init_weights=False), id="LinearMoeConfig")],
    },
)

TestDefaultTargetModules = rebuild("test_custom_models", "TestDefaultTargetModules", CLASS_CASES)

TestPeftFsdpStateDict = rebuild("test_custom_models", "TestPeftFsdpStateDict", MODEL_CASES)
