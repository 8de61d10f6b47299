"""The export's own check: against the adapter through PEFT, on all layers or on the first, and what it lets through."""

import json

import psutil
import pytest
import torch
from peft import get_peft_model
from test_export_helpers import left_padded_logits, load_whole, make_adapter, make_base, naive_model
from transformers import AutoModelForCausalLM

from moe_peft.config import FfnMoeConfig
from moe_peft.export import check, export_moe, weights
from moe_peft.saving import save_adapter


CASES = [
    ("llama", 4, {"num_shared_experts": 1, "use_rslora": True, "router_scale": 0.5}),
    ("llama", [2, 3, 4, 6], {}),
    ("llama", [4, 0, 4, 1], {"routing": "softmax"}),
    ("llama", 4, {"routing": "top_1"}),
    ("llama tied, head_dim", [2, 3, 4, 6], {"routing": "sigmoid_top_k"}),
    ("phi3", 4, {"routing": "top_1_straight_through"}),
    ("qwen2", [0, 4, 4, 0], {}),
    ("qwen3", 4, {"routing": "top_1_hard"}),
    ("granite", 4, {}),
    ("olmo2", 4, {}),
]


def record(folder):
    return json.loads((folder / "moe_peft_export.json").read_text())["check"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[1]} {case[2]}")
def test_peft_agrees(case, tmp_path):
    family, experts, config = case
    base = make_base(tmp_path / "base", family)
    adapter = make_adapter(tmp_path / "adapter", base, experts, **config)
    export_moe(str(base), str(adapter), tmp_path / "out")
    found = record(tmp_path / "out")
    assert found["done"]
    assert found["layers"] == 4
    assert found["tokens"] == 3 * 24 - 5 - 11
    assert found["fp32_largest_relative_error"] < 3e-5
    assert found["stored_relative_error_rms"] < 1e-5
    assert found["stored_same_top_token"] == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


@pytest.mark.parametrize(
    "config",
    [
        {"num_experts": 4, "r": 4},
        {"num_experts": "2:4", "r": "4:8", "target_modules": "all-linear", "num_shared_experts": 1},
        {"num_experts": [2, 3, 4, 5], "routing": "sigmoid_top_k", "target_modules": "all-linear"},
        {"num_experts": 6, "num_distinct_experts": [2, 3, 4, 6], "num_shared_experts": 1},
        {"num_experts": 3, "routing": "top_1", "layers_to_transform": [1, 2], "lora_dropout": 0.1},
    ],
    ids=str,
)
def test_an_adapter_as_peft_saves_it(config, tmp_path):
    base = make_base(tmp_path / "base")
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), FfnMoeConfig(**config, init_weights=False))
    for name, parameter in model.named_parameters():
        if name.endswith("router"):
            torch.nn.init.normal_(parameter, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_map"):
            buffer.copy_(buffer.flip(0).roll(1))
    save_adapter(model, tmp_path / "adapter")
    plan = export_moe(str(base), str(tmp_path / "adapter"), tmp_path / "out")
    assert record(tmp_path / "out")["fp32_largest_relative_error"] < 3e-5
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = left_padded_logits(model.eval())
    assert (left_padded_logits(exported) - expected).abs().max() < 3e-5 * expected.abs().max(), plan.target


@pytest.mark.parametrize(
    ("family", "experts", "config", "dtype"),
    [
        ("llama", [2, 3, 4, 6], {"num_experts": [2, 3, 4, 6]}, "float32"),
        ("llama", [2, 2, 4, 4], {"num_experts": "2:4", "r": 4}, "bfloat16"),
        ("qwen2 window", 4, {"num_experts": 4}, "float32"),
        (
            "qwen3",
            [0, 4, 4, 0],
            {"layers_to_transform": [1, 2], "target_modules": ["gate_proj", "up_proj", "down_proj"]},
            "float32",
        ),
        ("cohere2", 4, {}, "bfloat16"),
    ],
)
def test_the_first_layers_of_a_large_model(family, experts, config, dtype, tmp_path, monkeypatch):
    base = make_base(tmp_path / "base", family)
    attention = "layers_to_transform" not in config
    adapter = make_adapter(tmp_path / "adapter", base, experts, attention=attention, **config)
    monkeypatch.setattr(check, "SMALL", 1)
    export_moe(str(base), str(adapter), tmp_path / "out", dtype=dtype)
    found = record(tmp_path / "out")
    assert found["layers"] == 2
    assert found["fp32_largest_relative_error"] < 3e-5
    assert (1e-4 if dtype == "bfloat16" else 0) < found["stored_relative_error_rms"]
    assert found["stored_relative_error_rms"] < (0.1 if dtype == "bfloat16" else 1e-5)


def test_the_first_mixture_is_among_the_first_layers(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base", "qwen2")
    adapter = make_adapter(tmp_path / "adapter", base, [0, 0, 4, 4])
    monkeypatch.setattr(check, "SMALL", 1)
    export_moe(str(base), str(adapter), tmp_path / "out")
    assert record(tmp_path / "out")["layers"] == 3


def test_dequantised_weights_agree_with_peft_on_the_same(tmp_path):
    pytest.importorskip("bitsandbytes")
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    export_moe(str(base), str(adapter), tmp_path / "out", base_weights="dequantized")
    assert record(tmp_path / "out")["fp32_largest_relative_error"] < 3e-5


def swapped(self, layer):
    return self.sources.adapter.router(layer).flip(0)


def unscaled(self, module, expert=0, rows=None, heads=0):
    return self.frozen(module).float()


def forgetting(word):
    return lambda *args: [tensor for tensor in plan_tensors(*args) if word not in tensor.name]


plan_tensors = weights.plan_tensors


@pytest.mark.parametrize(
    ("where", "name", "wrong", "match"),
    [
        (weights._Planner, "_rows", swapped, "does not compute what the adapter does: on 4 layers in fp32"),
        (weights.Sources, "matrix", unscaled, "does not compute what the adapter does.*Nothing is written"),
        (
            check,
            "plan_tensors",
            forgetting("1.input_lay"),
            "Qwen2MoeForCausalLM does not load the export whole: missing",
        ),
        (check, "plan_tensors", forgetting("3.up_proj"), "transformers does not load the export whole"),
    ],
)
def test_a_wrong_export_is_not_left_behind(where, name, wrong, match, tmp_path, monkeypatch):
    base = make_base(tmp_path / "base", "qwen2")
    adapter = make_adapter(tmp_path / "adapter", base)
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(ValueError, match=match):
        export_moe(str(base), str(adapter), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_folder_that_differs_from_its_plan_is_not_left_behind(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    monkeypatch.setattr(check, "logits_of", lambda model: next(results))
    results = iter([torch.ones(4, 9), torch.ones(4, 9), torch.zeros(4, 9)])
    with pytest.raises(ValueError, match="The folder that was written differs from the adapter by 1.0e[+]00"):
        export_moe(str(base), str(adapter), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_memory_the_record_says_so(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    export_moe(str(base), str(adapter), tmp_path / "out")
    assert "of memory, and 0.0 MB are free" in record(tmp_path / "out")["why"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = left_padded_logits(naive_model(base, adapter))
    assert (left_padded_logits(exported) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert load_whole(tmp_path / "out")["model.norm.weight"].dtype == torch.float32
