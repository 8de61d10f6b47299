"""What cannot be exported is refused before anything is written, with the reason and a way out."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export_helpers import make_adapter, make_base

from moe_peft.export import ROUTES, TARGETS, export_moe, plan_export
from moe_peft.export.checkpoint import Checkpoint


WAYS = "Train with routing='sigmoid_top_k'.*serve the adapter routed"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base")


def refused(base, adapter, match, **options):
    """`plan_export` and `export_moe` refuse it alike, and nothing is left."""
    out = adapter.parent / "out"
    with pytest.raises(ValueError, match=match):
        plan_export(str(base), str(adapter), **options)
    with pytest.raises(ValueError, match=match):
        export_moe(str(base), str(adapter), out, **options)
    assert not list(adapter.parent.glob("*out*"))


def edit(adapter, **values):
    """The adapter with other fields in its config, or without those that are None."""
    path = adapter / "adapter_config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return adapter


def change(adapter, edit_tensors):
    """The adapter with other tensors."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    edit_tensors(tensors)
    save_file(tensors, path)
    return adapter


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (
            {"peft_type": "LINEAR_MOE"},
            "`peft_type` is 'LINEAR_MOE', .*router on each linear layer.*`moe-peft merge` makes",
        ),
        ({"peft_type": "LORA"}, "`peft_type` is 'LORA', but must be 'FFN_MOE' for an export.*`merge_and_unload`"),
        ({"peft_type": "RANK_MOE"}, "`peft_type` is 'RANK_MOE', .*Only FFN mixtures such as 'mixlora'"),
        ({"routing": "top_p"}, "`routing` is 'top_p', .*No stock MoE model visits a varying number of experts"),
        ({"router_bias": True}, "`router_bias` is True, but must be False for an export"),
        (
            {"num_null_experts": 2},
            "`num_null_experts` is 2, but must be 0 for an export.*gives their weight to the others",
        ),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save` is .*, but must be None for an export"),
        ({"trainable_token_indices": [3]}, "`trainable_token_indices` is .*, but must be None for an export"),
    ],
)
def test_configs(values, match, llama, tmp_path):
    refused(llama, edit(make_adapter(tmp_path / "adapter", llama), **values), match)


KEY = "base_model.model.model.layers.2.mlp.{}.ffn_moe_experts.{}"


@pytest.mark.parametrize(
    ("gone", "match"),
    [
        (KEY.format("up_proj", "lora_A"), "lacks the tensor '.*layers.2.mlp.up_proj.ffn_moe_experts.lora_A'"),
        (KEY.format("down_proj", "lora_B"), "lacks the tensor '.*layers.2.mlp.down_proj.ffn_moe_experts.lora_B'"),
        (KEY.format("gate_proj", "router"), "lacks the tensor '.*layers.2.mlp.*.ffn_moe_experts.router'"),
    ],
)
def test_a_missing_tensor_is_named(gone, match, llama, tmp_path):
    refused(llama, change(make_adapter(tmp_path / "adapter", llama), lambda tensors: tensors.pop(gone)), match)


def test_a_missing_linear_is_named(llama, tmp_path):
    def without(tensors):
        for part in ("lora_A", "lora_B"):
            tensors.pop(KEY.format("up_proj", part))

    match = "lacks the tensor '.*layers.2.mlp.up_proj.ffn_moe_experts.lora_A', without which an expert is not whole"
    refused(llama, change(make_adapter(tmp_path / "adapter", llama), without), match)


def test_a_missing_expert_is_seen(llama, tmp_path):
    def fewer(tensors):
        for part in ("lora_A", "lora_B"):
            tensors[KEY.format("up_proj", part)] = tensors[KEY.format("up_proj", part)][:3].clone()

    match = "'model.layers.2.mlp.up_proj' holds 3 experts, but its router and `num_shared_experts` = 0 ask for 4"
    refused(llama, change(make_adapter(tmp_path / "adapter", llama), fewer), match)


def test_partial_blocks(llama, tmp_path):
    def without_down(tensors):
        for name in [name for name in tensors if "down_proj" in name]:
            del tensors[name]

    match = "has experts on gate_proj, up_proj of the FFN, but a llama block consists of down_proj, gate_proj, up_proj"
    refused(llama, change(make_adapter(tmp_path / "adapter", llama), without_down), match)


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        (KEY.format("gate_proj", "router_bias"), (4,), "`router_bias` is True, but must be False"),
        (
            "base_model.model.lm_head.weight",
            (3, 3),
            "has a tensor 'base_model.model.lm_head.weight', which no stock MoE",
        ),
        (
            KEY.format("up_proj", "lora_B"),
            (4, 3, 96),
            r"lora_A for 4 experts of rank 4, but lora_B of shape \[4, 3, 96\]",
        ),
        ("base_model.model.model.router_x.ffn_moe_experts.router", (4, 64), "is not in a decoder layer's `mlp`"),
    ],
)
def test_stray_tensors(name, shape, match, llama, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", llama)
    refused(llama, change(adapter, lambda tensors: tensors.update({name: torch.zeros(shape)})), match)


def test_routed_attention(llama, tmp_path):
    key = "base_model.model.model.layers.0.self_attn.q_proj.ffn_moe_experts.lora_{}"

    def routed(tensors):
        for part in "AB":
            tensors[key.format(part)] = tensors[key.format(part)].repeat(3, 1, 1)

    match = "'model.layers.0.self_attn.q_proj' holds 3 experts outside the FFN.*serve the adapter routed"
    refused(llama, change(make_adapter(tmp_path / "adapter", llama), routed), match)


def test_no_experts_and_no_routers(llama, tmp_path):
    refused(llama, make_adapter(tmp_path / "one", llama, 1), "Every layer of .* has one expert, .*`merge_and_unload`")

    def attention_only(tensors):
        for name in [name for name in tensors if ".mlp." in name]:
            del tensors[name]

    adapter = change(make_adapter(tmp_path / "adapter", llama), attention_only)
    refused(llama, adapter, "adapts no FFN: it is a plain LoRA")
    refused(llama, change(adapter, dict.clear), "has no experts in its adapter_model.safetensors")


def test_adapters_that_are_not_there_or_damaged(llama, tmp_path):
    refused(llama, tmp_path / "nowhere", "There is no folder '.*nowhere'")
    (tmp_path / "empty").mkdir()
    refused(llama, tmp_path / "empty", "'.*empty' holds no adapter: there is no adapter_config.json in it")
    adapter = make_adapter(tmp_path / "adapter", llama)
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(llama, adapter, "adapter_model.safetensors` cannot be read: .*interrupted")
    file.unlink()
    refused(llama, adapter, "has no adapter_model.safetensors.")
    (adapter / "adapter_model.bin").write_bytes(b"pickle")
    refused(llama, adapter, "has pickled weights")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target": "mixtrall"}, "`target` is 'mixtrall', but must be 'auto' or one of .* Did you mean 'mixtral'?"),
        ({"target": "qwen3_moe"}, "`target` is 'qwen3_moe', but must be 'mixtral', .* or 'auto' for a llama model"),
        ({"base_weights": "dequantised"}, "`base_weights` is 'dequantised', but must be .* mean 'dequantized'?"),
        ({"dtype": "bf16"}, "`dtype` is 'bf16', but must be 'auto' or one of 'float32', 'bfloat16', 'float16'"),
    ],
)
def test_options(options, match, llama, tmp_path):
    refused(llama, make_adapter(tmp_path / "adapter", llama), match, **options)


@pytest.mark.parametrize(
    ("family", "more", "experts", "config", "match"),
    [
        (
            "gemma2",
            {},
            4,
            {},
            "'gemma2' is a dense model without a twin.*llama, mistral, phi3, qwen2.*`moe-peft merge`",
        ),
        ("llama", {"mlp_bias": True}, 4, {}, "mixtral: its FFN has biases .`mlp_bias`."),
        ("phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, 4, {}, "rotates a part"),
        ("qwen2", {}, [2, 3, 4, 6], {}, f"qwen2_moe: its router has no selection bias.*2, 3, 4, 6.*{WAYS}"),
        ("qwen3", {}, [2, 3, 4, 6], {}, "qwen3_moe: its router has no selection bias"),
        ("qwen3", {}, [7, 5, 3, 2], {"routing": "softmax"}, "evening them out would take 210 in each"),
        ("granite", {}, 4, {"routing": "top_1"}, "granitemoe: it rescales the weights of the chosen experts"),
        (
            "olmo2",
            {},
            [4, 0, 4, 4],
            {"routing": "top_1"},
            "flex_olmo: it has no dense layers, and layer 1 has no router",
        ),
        ("granite", {}, 4, {"routing": "sigmoid_top_k"}, "granitemoe: its router takes a softmax, not a sigmoid"),
        ("mistral window", {}, [2, 3, 4, 6], {}, "ernie4_5_moe: its attention has a sliding window"),
        ("llama attention_bias", {}, [2, 3, 4, 6], {}, "ernie4_5_moe: its attention has biases"),
        ("ernie4_5", {"use_bias": True}, 4, {}, "its linear layers have biases .`use_bias`."),
    ],
)
def test_mixtures_that_no_stock_model_computes(family, more, experts, config, match, tmp_path):
    base = make_base(tmp_path / "base", family, **more)
    refused(base, make_adapter(tmp_path / "adapter", base, experts, **config), match)


def test_bases_that_do_not_fit(llama, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", llama)
    base = shutil.copytree(llama, tmp_path / "base")
    file = base / "model.safetensors"
    tensors = load_file(file)

    save_file({k: v for k, v in tensors.items() if "embed" not in k}, file)
    refused(base, adapter, "lacks the tensor 'model.embed_tokens.weight', which its config asks for")
    save_file({k: v for k, v in tensors.items() if "3.mlp.up_proj" not in k}, file)
    refused(base, adapter, "lacks the tensor 'model.layers.3.mlp.up_proj.weight', which its config asks for")

    wider = make_base(tmp_path / "wider", hidden_size=80)
    refused(
        wider, adapter, r"The adapter changes '.*' \(\d+ x \d+\), but '.*wider' has a weight of .*it was trained on"
    )
    shorter = make_base(tmp_path / "shorter", num_hidden_layers=2)
    refused(shorter, adapter, "but '.*shorter' has no such layer. Give the base model that it was trained on: .*base")
    phi = make_base(tmp_path / "phi", "phi3")
    refused(phi, adapter, "but a phi3 block consists of down_proj, gate_up_proj")

    file.write_bytes(b"not one")
    refused(base, adapter, "model.safetensors` cannot be read")
    file.rename(base / "pytorch_model.bin")
    refused(base, adapter, "has no model.safetensors. It has pickled weights")

    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    refused(base, adapter, "is quantised already. Give the model that it was made from")
    refused(tmp_path / "nowhere", adapter, "There is no model folder '.*nowhere'")


def test_a_shard_that_is_missing(tmp_path):
    base = make_base(tmp_path / "base", max_shard_size="100KB")
    next(iter(sorted(base.glob("model-*.safetensors")))).unlink()
    refused(base, make_adapter_of_whole(tmp_path), r"lacks model-00001-of-.*, which its index names \(1 of \d+ shards")
    with pytest.raises(
        ValueError, match="'.*whole' has no tensor 'model.norm.weigth'.*The nearest is 'model.norm.weight'"
    ):
        Checkpoint(tmp_path / "whole").read("model.norm.weigth")


def make_adapter_of_whole(folder):
    return make_adapter(folder / "adapter", make_base(folder / "whole"))


def test_a_name_that_the_hub_does_not_give(llama, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", llama)
    refused(
        "someone/no-such-model",
        adapter,
        "'someone/no-such-model' is no folder here and cannot be fetched from the Hub",
    )


def test_weights_in_eight_bits(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, base / "model.safetensors")
    refused(
        base,
        make_adapter(tmp_path / "adapter", llama),
        "stores tensors as 'F8_E4M3', .* Give the model in 16 or 32 bits",
    )


def test_a_folder_that_is_not_empty(llama, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", llama)
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "mine").write_text("x")
    with pytest.raises(ValueError, match="`output` is '.*place', but must be a new or empty folder"):
        export_moe(str(llama), str(adapter), tmp_path / "place")
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["mine"]


def test_the_tables_fit_together():
    for family, routes in ROUTES.items():
        assert routes, family
        for route in routes:
            assert route.target in TARGETS
    assert {route.target for routes in ROUTES.values() for route in routes} == set(TARGETS)
