"""Every field goes to JSON and back; every wrong value is refused in a sentence that says what to do instead."""

import dataclasses
import json
import re

import pytest
import torch
from conftest import make_tiny_llama
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from moe_peft import LinearMoeConfig, registration
from moe_peft.config import FfnMoeConfig
from moe_peft.rules import ROUTING_RULES as EVERY_RULE
from moe_peft.selection import ROUTINGS
from moe_peft.tuners.base import MoeTunerLayer


registration.reserve("ffn_moe")


@pytest.fixture
def known_to_peft(monkeypatch):
    """PEFT finds the class of a file by its type."""
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, "FFN_MOE", FfnMoeConfig)


def refusal(field: str, value: object, allowed: str, remedy: str) -> str:
    """A regex for the four parts of a refusal; `allowed` and `remedy` are regexes."""
    return f"`{field}` is {re.escape(repr(value))}, but must be {allowed}.*{remedy}"


# --- what a config says without being told ---


@pytest.mark.parametrize(
    ("given", "filled_in"),
    [
        ({}, {"top_k": 2, "balance": "switch"}),
        ({"num_experts": 1}, {"top_k": 1, "balance": "switch"}),
        ({"num_experts": "2:8"}, {"top_k": 2}),
        ({"routing": "softmax"}, {"top_k": None, "balance": "none"}),
        ({"routing": "top_1"}, {"top_k": None, "balance": "switch"}),
        ({"routing": "top_1", "top_k": 1}, {"top_k": 1}),
        ({"routing": "softmax", "balance": "localized"}, {"balance": "localized"}),
        ({"target_modules": ["b", "a"]}, {"target_modules": {"a", "b"}}),
        ({"exclude_modules": ["b", "a"]}, {"exclude_modules": {"a", "b"}}),
        ({"target_modules": "all-linear"}, {"target_modules": "all-linear"}),
    ],
)
def test_what_is_left_out_follows_from_the_rest(given, filled_in):
    config = LinearMoeConfig(**given)
    assert {name: getattr(config, name) for name in filled_in} == filled_in


@pytest.mark.parametrize(
    ("given", "filled_in"),
    [
        (
            {},
            {
                "top_k": 2,
                "balance": "switch",
                "top_p": None,
                "num_null_experts": 0,
                "router_z_loss_coef": 0.0,
                "router_jitter_noise": 0.0,
                "router_bias": False,
                "peft_type": "FFN_MOE",
            },
        ),
        ({"routing": "top_p"}, {"top_p": 0.8, "top_k": None, "balance": "switch"}),
        ({"routing": "top_p", "top_p": 1, "top_k": 1}, {"top_p": 1, "top_k": 1}),
        ({"routing": "top_p", "num_experts": "2:4", "top_k": 4}, {"top_k": 4}),
        ({"routing": "top_p", "balance": "none"}, {"balance": "none"}),
        ({"routing": "sigmoid_top_k"}, {"top_k": 2, "balance": "switch", "top_p": None}),
        ({"routing": "sigmoid_top_k", "num_experts": 1}, {"top_k": 1}),
        ({"routing": "softmax"}, {"top_k": None, "balance": "none"}),
        ({"routing": "softmax", "balance": "localized"}, {"balance": "localized"}),
        ({"routing": "top_1_hard"}, {"top_k": None, "balance": "switch"}),
        ({"routing": "top_1_straight_through", "top_k": 1, "balance": "none"}, {"top_k": 1, "balance": "none"}),
        ({"num_experts": 4, "num_null_experts": 8, "top_k": 6}, {"top_k": 6}),
        ({"num_experts": 2, "num_null_experts": 1}, {"top_k": 2}),
        ({"router_z_loss_coef": 0.001, "routing": "softmax"}, {"router_z_loss_coef": 0.001}),
    ],
)
def test_what_is_left_out_follows_from_the_rest_for_blocks(given, filled_in):
    config = FfnMoeConfig(**given)
    assert {name: getattr(config, name) for name in filled_in} == filled_in


@pytest.mark.parametrize("config_class", [LinearMoeConfig, FfnMoeConfig])
@pytest.mark.parametrize("name", ROUTINGS)
def test_each_type_has_all_rules(config_class, name):
    assert config_class(routing=name).routing == name


def test_a_list_of_targets_stays_the_users():
    targets = ["q_proj", "v_proj"]
    LinearMoeConfig(target_modules=targets)
    assert targets == ["q_proj", "v_proj"]


# --- JSON ---

OTHER_VALUES = {
    "task_type": "CAUSAL_LM",
    "peft_type": "LINEAR_MOE",
    "auto_mapping": {"base_model_class": "M", "parent_library": "m"},
    "peft_version": "0.21.0",
    "base_model_name_or_path": "some/model",
    "revision": "main",
    "inference_mode": True,
    "r": [2, 4],
    "num_experts": "2:4:6:8",
    "num_shared_experts": 1,
    "top_k": 2,
    "lora_alpha": 7.5,
    "use_rslora": True,
    "lora_dropout": 0.25,
    "routing": "top_1",
    "balance": "none",
    "router_aux_loss_coef": 0.5,
    "balance_delta": 0.3,
    "router_init_std": 0.02,
    "router_scale": 3.0,
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": ["k_proj"],
    "modules_to_save": ["lm_head"],
    "layers_to_transform": [0, 2],
    "layers_pattern": "layers",
    "trainable_token_indices": [1, 2],
    "init_weights": False,
    "plugin": "a_fork_of_moe_peft",
    "scoring_func": "cosine",
    "norm_topk_prob": False,
    "routed_scaling_factor": 2.5,
    "top_p": 0.5,
    "sparsegen_lambda": -1.0,
    "num_null_experts": 3,
    "freeze_router": True,
    "router_bias": True,
    "router_act": "tanh",
    "router_jitter_noise": 0.1,
    "router_granularity": "sequence",
    "expert_groups": [[0, 1], [2]],
    "schedule_steps": 10,
    "top_k_start": 8,
    "router_temperature_start": 2.0,
    "balance_weights": [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0],
    "bias_update_speed": 0.1,
    "target_active": 1.5,
    "router_z_loss_coef": 0.01,
    "router_entropy_coef": 0.01,
}
OTHER_VALUES_OF_LINEAR = {
    "share_A": True,
    "num_constant_experts": 2,
    "router_scope": "block",
    "num_distinct_experts": [2, 3],
}
NEEDS = {
    "layers_pattern": {"layers_to_transform": [0]},
    "norm_topk_prob": {"routing": "top_k"},
    "top_p": {"routing": "top_p"},
    "sparsegen_lambda": {"routing": "sparsegen"},
    "schedule_steps": {"top_k_start": 8},
    "top_k_start": {"schedule_steps": 10},
    "router_temperature_start": {"schedule_steps": 10},
    "target_active": {"balance": "bias", "num_null_experts": 2},
    "bias_update_speed": {"balance": "bias"},
    "balance_delta": {"balance": "localized", "routing": "softmax"},
}


def test_the_table_above_knows_every_field():
    fields = {field.name: field.default for field in dataclasses.fields(LinearMoeConfig)}
    values = {**OTHER_VALUES, **OTHER_VALUES_OF_LINEAR}
    assert values.keys() == fields.keys()
    same = [name for name, default in fields.items() if values[name] == default]
    assert same == []


@pytest.mark.parametrize("field", [*OTHER_VALUES, *OTHER_VALUES_OF_LINEAR])
def test_every_field_survives_json(tmp_path, field):
    written = {**OTHER_VALUES, **OTHER_VALUES_OF_LINEAR}[field]
    config = LinearMoeConfig(**{field: written, **NEEDS.get(field, {})})
    config.save_pretrained(tmp_path)
    for loaded in (PeftConfig.from_pretrained(tmp_path), LinearMoeConfig.from_pretrained(tmp_path)):
        assert loaded == config
        value = getattr(loaded, field)
        assert value == (set(written) if isinstance(value, set) else written)
        assert type(value) is type(getattr(config, field))


def test_blocks_have_the_shared_fields_and_no_others():
    fields = {field.name for field in dataclasses.fields(FfnMoeConfig)}
    assert fields == {*OTHER_VALUES, "num_distinct_experts"}


OF_BLOCKS = {**OTHER_VALUES, "num_distinct_experts": [2, 3], "peft_type": "FFN_MOE", "routing": "top_1_hard"}
del OF_BLOCKS["routed_scaling_factor"]  # which is 1 there


@pytest.mark.parametrize("field", OF_BLOCKS)
def test_every_field_of_blocks_survives_json(tmp_path, field, known_to_peft):
    value = OF_BLOCKS[field]
    needs = {**NEEDS, "routing": {"balance": "switch"}}
    config = FfnMoeConfig(**{field: value, **needs.get(field, {})})
    config.save_pretrained(tmp_path)
    for loaded in (PeftConfig.from_pretrained(tmp_path), FfnMoeConfig.from_pretrained(tmp_path)):
        assert type(loaded) is FfnMoeConfig
        assert loaded == config
        found = getattr(loaded, field)
        assert found == (set(value) if isinstance(found, set) else value)
        assert type(found) is type(getattr(config, field))


@pytest.mark.parametrize("routing", EVERY_RULE)
def test_what_was_filled_in_survives_json(tmp_path, routing, known_to_peft):
    config = FfnMoeConfig(routing=routing)
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config


def test_a_changed_copy_is_checked_again():
    config = dataclasses.replace(LinearMoeConfig(), r=3)
    assert config.r == 3
    with pytest.raises(ValueError, match=refusal("r", 0, "a whole number", "Correct")):
        dataclasses.replace(config, r=0)


# --- refusals ---

NUMBERS = ["a", None, True, float("nan"), float("inf"), -1]
REFUSALS = [
    ({"r": 0}, refusal("r", 0, "a whole number of at least 1", "Correct the entry")),
    ({"r": "4:x"}, refusal("r", "4:x", "a whole number of at least 1", "Write digits separated by colons")),
    ({"num_experts": [4, -1]}, refusal("num_experts", [4, -1], "a whole number of at least 1", "Correct the entry")),
    *(
        ({"num_shared_experts": n}, refusal("num_shared_experts", n, "a whole number of at least 0", "0 is none"))
        for n in (-1, 1.0, True, "1", None)
    ),
    *(({"lora_alpha": x}, refusal("lora_alpha", x, "a positive number", "16 is")) for x in [0, *NUMBERS]),
    *(
        ({"lora_dropout": x}, refusal("lora_dropout", x, "at least 0 and below 1", "such as 0.05"))
        for x in [1.0, 1.5, *NUMBERS]
    ),
    *(
        ({"router_init_std": x}, refusal("router_init_std", x, "at least 0, or None", "0.02"))
        for x in NUMBERS
        if x is not None
    ),
    *(({"router_scale": x}, refusal("router_scale", x, "a positive number", "1.0 leaves")) for x in [0, *NUMBERS]),
    *(
        ({"router_aux_loss_coef": x}, refusal("router_aux_loss_coef", x, "at least 0", "0 turns balancing off"))
        for x in NUMBERS
    ),
    *(
        (
            {"balance": "localized", "routing": "softmax", "balance_delta": x},
            refusal("balance_delta", x, "at least 0 and below 1", "LoRAMoE uses 0.1"),
        )
        for x in [1.0, *NUMBERS]
    ),
    (
        {"routing": "softmax_topk"},
        refusal("routing", "softmax_topk", "one of 'softmax", "Did you mean 'softmax_top_k'"),
    ),
    (
        {"routing": "hash"},
        refusal("routing", "hash", "one of 'softmax", "Choose one of: 'all', 'given', "),
    ),
    ({"routing": None}, refusal("routing", None, "one of 'softmax", "Choose one of")),
    (
        {"routing": "softmax", "top_k": 2},
        refusal("top_k", 2, "left out .*'softmax', .* every expert", "Remove `top_k`"),
    ),
    ({"routing": "top_1", "top_k": 2}, refusal("top_k", 2, "left out .*'top_1', .* one expert", "Remove `top_k`")),
    *(
        ({"top_k": k}, refusal("top_k", k, "a whole number of at least 1", "2 is what"))
        for k in (0, -1, 2.0, "2", True)
    ),
    ({"num_experts": 4, "top_k": 5}, refusal("top_k", 5, "at most 4, as `num_experts` = 4 gives", "lower `top_k` or")),
    (
        {"num_experts": "2:4", "top_k": 3},
        refusal("top_k", 3, "at most 2, as `num_experts` = '2:4'", "raise the small"),
    ),
    (
        {"num_experts": [1, 4], "top_k": 2},
        refusal("top_k", 2, r"at most 1, as `num_experts` = \[1, 4\]", "has: raise the smallest"),
    ),
    *(
        (
            {"num_experts": experts},
            refusal(
                "num_experts", experts, "at least 2 in every layer .* `top_k` was not given", "'top_1' or 'softmax'"
            ),
        )
        for experts in ([1, 4], "1:2:4")
    ),
    ({"top_k": 1}, refusal("top_k", 1, "at least 2", "never train the router: use `routing` = 'top_1'")),
    ({"balance": "swich"}, refusal("balance", "swich", "one of 'switch'", "Did you mean 'switch'")),
    (
        {"balance": "switch", "routing": "softmax"},
        refusal("balance", "switch", "'localized', 'cv2', 'mi' or 'none'", "is constant"),
    ),
    (
        {"balance": "localized", "routing": "softmax", "num_experts": "2:3"},
        refusal("num_experts", "2:3", "even numbers", "Change 3 to 4"),
    ),
    ({"balance_delta": 0.3}, refusal("balance_delta", 0.3, "left out with `balance` = 'switch'", "to 'localized'")),
    (
        {"router_bias": True, "freeze_router": True},
        refusal("router_bias", True, "False with `freeze_r", "every choice"),
    ),
    (
        {"layers_to_transform": [0], "target_modules": "q_proj"},
        "`layers_to_transform` cannot be used when .*the regex",
    ),
    ({"layers_pattern": "h", "target_modules": "q_proj"}, "`layers_pattern` cannot be used when .*the regex"),
    ({"layers_pattern": "h", "target_modules": ["q_proj"]}, "`layers_to_transform` must also be specified"),
    (
        {"modules_to_save": "lm_head"},
        refusal("modules_to_save", "lm_head", "a list of names", "Write `modules_to_save="),
    ),
    ({"target_modules": 5}, refusal("target_modules", 5, "a list of names, or one text", "in quotes")),
    ({"exclude_modules": [3, "a"]}, refusal("exclude_modules", [3, "a"], "a list of names, or one text", "in quotes")),
    *(
        (
            {"layers_to_transform": n},
            refusal("layers_to_transform", n, "a whole number of at least 0", "0 is the first"),
        )
        for n in ("0", [0, "1"], -1, True, 1.0)
    ),
    ({"rank_pattern": {"q_proj": 4}}, "`rank_pattern` is not a field of LinearMoeConfig: `r` says the rank of each"),
    ({"alpha_pattern": {}}, "`alpha_pattern` is not a field of LinearMoeConfig: `lora_alpha` is one number"),
    ({"task_type": "SING"}, "Invalid task type: 'SING'. Must be one of the following task types"),
    ({"top": 2}, "`top` is not a field of LinearMoeConfig. Did you mean 'top_[kp]'?"),
    ({"n_experts": 2}, "`n_experts` is not a field of LinearMoeConfig. Did you mean 'num_experts'?"),
    ({"bias": "all"}, "`bias` is not a field of LinearMoeConfig. Choose one of: 'auto_mapping', 'balance', "),
]


@pytest.mark.parametrize(("given", "sentence"), REFUSALS, ids=[str(given) for given, _ in REFUSALS])
def test_a_wrong_value_is_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        LinearMoeConfig(**given)


REFUSALS_OF_BLOCKS = [
    *(
        ({"routing": "top_p", "top_p": p}, refusal("top_p", p, "above 0 and at most 1", "MixLoRA uses 0.8"))
        for p in [0, 1.01, *NUMBERS]
        if p is not None
    ),
    *(
        (
            {"routing": rule, "top_p": 0.8},
            refusal("top_p", 0.8, f"left out with `routing` = '{rule}'", "Remove `top_p`"),
        )
        for rule in EVERY_RULE
        if rule != "top_p"
    ),
    *(
        ({"routing": "top_p", "top_k": k}, refusal("top_k", k, "a whole number of at least 1", "2 is what"))
        for k in (0, -1, 2.0, "2", True)
    ),
    (
        {"routing": "top_p", "num_experts": "2:4", "top_k": 5},
        refusal("top_k", 5, "at most 4, or left out, with `routing` = 'top_p'", "No layer has more"),
    ),
    *(
        ({"routing": rule, "top_k": 2}, refusal("top_k", 2, f"left out .*'{rule}', .* one expert", "Remove `top_k`"))
        for rule in ("top_1", "top_1_hard", "top_1_straight_through")
    ),
    ({"top_k": 1}, refusal("top_k", 1, "at least 2 with `routing` = 'softmax_top_k'", "use `routing` = 'top_1'")),
    (
        {"routing": "sigmoid_top_k", "top_k": 1},
        refusal("top_k", 1, "at least 2 with `routing` = 'sigmoid_top_k'", "use `routing` = 'top_1_straight_through'"),
    ),
    (
        {"routing": "sigmoid_top_k", "num_experts": 4, "top_k": 5},
        refusal("top_k", 5, "at most 4, as `num_experts` = 4 gives", "lower `top_k` or"),
    ),
    (
        {"routing": "sigmoid_top_k", "num_experts": "1:2"},
        refusal("num_experts", "1:2", "at least 2 in every layer with `routing` = 'sigmoid_top_k'", "Raise"),
    ),
    *(
        ({"num_null_experts": n}, refusal("num_null_experts", n, "a whole number of at least 0", "is common"))
        for n in (-1, 1.0, True, "1", None)
    ),
    *(
        (
            {"routing": rule, "num_null_experts": 2},
            refusal("num_null_experts", 2, f"0 with `routing` = '{rule}'", "set `routing` to 'softmax_top_k'"),
        )
        for rule in EVERY_RULE
        if rule not in ("softmax_top_k", "sigmoid_top_k")
    ),
    (
        {"num_null_experts": 2, "num_experts": "1:4"},
        refusal("num_null_experts", 2, "0 with `num_experts` = '1:4', which", "raise `num_experts` to at least 2"),
    ),
    *(
        (
            {"num_null_experts": 3, "num_experts": "2:4", "top_k": k},
            refusal("top_k", k, "below 5, the sum of 3 null or constant experts and of .* '2:4'", "lower `top_k`"),
        )
        for k in (5, 9)
    ),
    (
        {"num_null_experts": 3, "top_k": 1},
        refusal("top_k", 1, "at least 2 with `routing` = 'softmax_top_k'", "use `routing` = 'top_1'"),
    ),
    *(({"router_z_loss_coef": x}, refusal("router_z_loss_coef", x, "at least 0", "0 turns it off")) for x in NUMBERS),
    (
        {"router_z_loss_coef": 0.1, "routing": "sigmoid_top_k"},
        refusal(
            "router_z_loss_coef",
            0.1,
            "0 with `routing` = 'sigmoid_top_k'",
            "about a softmax over the experts.* remove it",
        ),
    ),
    *(
        ({"router_jitter_noise": x}, refusal("router_jitter_noise", x, "at least 0 and below 1", "0 turns it off"))
        for x in [1, 1.0, *NUMBERS]
    ),
    (
        {"routing": "top_1_hard", "balance": "none"},
        refusal(
            "balance", "none", "'switch' with `routing` = 'top_1_hard'", "no gradient at all. 'top_1_straight_thro"
        ),
    ),
    (
        {"routing": "top_1_hard", "router_aux_loss_coef": 0},
        refusal("router_aux_loss_coef", 0, "above 0 with `routing` = 'top_1_hard'", "no gradient at all"),
    ),
    *(
        (
            {"routing": rule, "balance": "localized"},
            refusal("balance", "localized", f"'switch' or 'none' with `routing` = '{rule}'", "`routing` to 'softmax'"),
        )
        for rule in EVERY_RULE
        if rule not in ("softmax", "top_1_hard")
    ),
    (
        {"routing": "top_1_hard", "balance": "localized"},
        refusal("balance", "localized", "'switch' with `routing` = 'top_1_hard'", "`routing` to 'softmax'"),
    ),
    (
        {"routing": "softmax", "balance": "switch"},
        refusal("balance", "switch", "'localized', 'cv2', 'mi' or 'none'", "is constant"),
    ),
    ({"routing": "top_q"}, refusal("routing", "top_q", "one of 'softmax_top_k', ", "Did you mean 'top_p'")),
    (
        {"routing": "softmx_top_k", "num_null_experts": 2},
        refusal("routing", "softmx_top_k", "one of", "softmax_top_k'"),
    ),
    ({"num_null": 2}, "`num_null` is not a field of FfnMoeConfig. Did you mean 'num_null_experts'?"),
]


@pytest.mark.parametrize(
    ("given", "sentence"), REFUSALS_OF_BLOCKS, ids=[str(given) for given, _ in REFUSALS_OF_BLOCKS]
)
def test_a_wrong_value_for_blocks_is_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        FfnMoeConfig(**given)


@pytest.mark.parametrize("field", [f for f in OTHER_VALUES_OF_LINEAR if f not in OF_BLOCKS])
def test_what_belongs_to_linear_layers_is_no_field_of_blocks(field):
    with pytest.raises(ValueError, match=f"`{field}` is not a field of FfnMoeConfig"):
        FfnMoeConfig(**{field: OTHER_VALUES_OF_LINEAR[field]})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lora_apha": 32}, "`lora_apha` is not a field of LinearMoeConfig. Did you mean 'lora_alpha'?"),
        ({"r": 0}, refusal("r", 0, "a whole number", "Correct")),
        ({"routing": "softmax"}, refusal("top_k", 2, "left out", "Remove `top_k`")),
    ],
)
@pytest.mark.parametrize("config_class", [PeftConfig, LinearMoeConfig])
def test_a_wrong_value_in_a_file_is_refused(tmp_path, changes, sentence, config_class):
    LinearMoeConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=sentence):
        config_class.from_pretrained(tmp_path)


# --- what only the model can tell ---


def layer_settings(model) -> list[tuple[str, int, int]]:
    return [
        (name.split(".layers.")[1], layer.num_experts["default"], layer.r["default"])
        for name, layer in model.named_modules()
        if isinstance(layer, MoeTunerLayer)
    ]


@pytest.mark.parametrize(
    ("num_experts", "r", "expected"),
    [
        ("2:4", 4, [(2, 4), (2, 4), (4, 4), (4, 4)]),
        (4, "1:2:3:4", [(4, 1), (4, 2), (4, 3), (4, 4)]),
        ([2, 3, 4, 5], [8, 4, 2, 1], [(2, 8), (3, 4), (4, 2), (5, 1)]),
    ],
)
def test_each_layer_gets_its_number_of_experts_and_its_rank(tiny_llama, num_experts, r, expected):
    config = LinearMoeConfig(num_experts=num_experts, r=r, target_modules=["q_proj", "down_proj"])
    settings = layer_settings(get_peft_model(tiny_llama, config))
    names = [f"{i}.{name}" for i in range(4) for name in ("self_attn.q_proj", "mlp.down_proj")]
    assert settings == [(name, *expected[int(name[0])]) for name in names]


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 3]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 3], "layers_pattern": "layers"},
        {"target_modules": r".*\.[13]\..*q_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.[02]\..*"},
    ],
)
def test_a_layer_keeps_its_number_when_others_are_left_out(tiny_llama, targets):
    model = get_peft_model(tiny_llama, LinearMoeConfig(num_experts=[2, 3, 4, 5], **targets))
    assert [(name[0], experts) for name, experts, _ in layer_settings(model)] == [("1", 3), ("3", 5)]


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"num_experts": [2, 4]}, ValueError, refusal("num_experts", [2, 4], "a list of 4 numbers", "It has 2")),
        ({"r": [2] * 5}, ValueError, refusal("r", [2] * 5, "a list of 4 numbers", "It has 5")),
        ({"r": "1:2:3:4:5"}, ValueError, refusal("r", "1:2:3:4:5", "a pattern of at most 4 groups", "drop 1")),
        (
            {"r": "1:2", "target_modules": ["lm_head"]},
            ValueError,
            "`r` = '1:2' differ between layers, but the target 'lm_head' has no layer number .*exclude that module",
        ),
        (
            {"target_modules": ["nope"]},
            ValueError,
            "Target modules .*nope.* not found in the base model. Please check the target modules",
        ),
        (
            {"target_modules": ["embed_tokens"]},
            TypeError,
            "Target module of type Embedding is not supported: .*linear layers.*Narrow `target_modules`",
        ),
    ],
)
def test_what_does_not_suit_the_model_is_refused_before_it_is_touched(tiny_llama, tokens, given, error, sentence):
    before = tiny_llama(tokens).logits
    with pytest.raises(error, match=sentence):
        get_peft_model(tiny_llama, LinearMoeConfig(**{"target_modules": ["q_proj"], **given}))
    assert not any(isinstance(module, MoeTunerLayer) for module in tiny_llama.modules())
    assert torch.equal(tiny_llama(tokens).logits, before)


def test_a_model_without_default_targets_is_told_so():
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LinearMoeConfig())


def test_the_default_targets_are_those_of_lora():
    model = get_peft_model(make_tiny_llama(), LinearMoeConfig())
    assert {name.rsplit(".", 1)[1] for name in model.targeted_module_names} == {"q_proj", "v_proj"}


def test_settings_of_a_balance_that_is_not_there_are_refused():
    for balance, why in (("none", "nothing to weigh"), ("bias", "no loss")):
        with pytest.raises(
            ValueError, match=rf"`router_aux_loss_coef` is 0.01, but must be left out .*{balance}.*{why}"
        ):
            LinearMoeConfig(balance=balance, router_aux_loss_coef=0.01)
        LinearMoeConfig(balance=balance, router_aux_loss_coef=0.0)  # says the same as the balance does
    with pytest.raises(
        ValueError, match=r"`bias_update_speed` is 0.1, but must be left out .*'switch'.*set `balance`"
    ):
        LinearMoeConfig(bias_update_speed=0.1)
