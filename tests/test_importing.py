"""`moe-peft import`: a MixLoRA checkpoint of TUDB-Labs gives the same outputs here, or is refused by name.

The reference is written from the paper's formulas (arXiv:2404.15159, section 3) and knows nothing of this package. The
slow tests run the packages themselves, each in a process of its own.
"""

import importlib.util
import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama
from families import make_family
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear

from moe_peft import FfnMoeConfig
from moe_peft.importing import import_mixlora, mixlora_to_ours


LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
FFN = {"gate_proj", "up_proj", "down_proj", "fc1", "fc2", "gate_up_proj"}
KEY = "mixlora.layers.1.mlp.up_proj.experts.2.lora_A.weight"


def their_settings(**changes):
    settings = {
        "bias": "none",
        "peft_type": "MIXLORA",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "target_modules": LLAMA,
        "routing_strategy": "mixlora",
        "num_experts": 4,
        "act_fn": "silu",
        "top_k": 2,
        "base_model_name_or_path": "someone/base",
        "task_type": "CAUSAL_LM",
    }
    settings.update(changes)
    return {name: value for name, value in settings.items() if value is not None}


def their_tensors(model, settings, seed=0):
    """Random weights, none of them zero, in the layout that `moe_peft.trainer.save_adapter_weight` of theirs writes."""
    torch.manual_seed(seed)
    tensors, expert = {}, {**settings, **settings.get("expert_lora", {})}
    named = settings["target_modules"]
    wanted = [name for name in named if not isinstance(named, dict) or named[name]]
    for i, layer in enumerate(model.model.layers):
        prefix = f"mixlora.layers.{i}"
        width = model.config.hidden_size
        tensors[f"{prefix}.mlp.moe_gate.weight"] = torch.randn(settings["num_experts"], width)
        for name in wanted:
            for e in range(settings["num_experts"]) if name in FFN else [None]:
                part, r = ("self_attn", settings["r"]) if e is None else ("mlp", expert["r"])
                module = getattr(getattr(layer, part), name)
                key = f"{prefix}.{part}.{name}" + ("" if e is None else f".experts.{e}")
                tensors[f"{key}.lora_A.weight"] = torch.randn(r, module.in_features) / module.in_features**0.5
                tensors[f"{key}.lora_B.weight"] = torch.randn(module.out_features, r) / (3 * r**0.5)
    return tensors


def write(folder: Path, settings, tensors, kind="bin") -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if kind == "bin":  # they save the parameters themselves
        torch.save({k: torch.nn.Parameter(t) for k, t in tensors.items()}, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


# --- the reference ---


def scale(settings):
    return settings["lora_alpha"] / (math.sqrt(settings["r"]) if settings.get("use_rslora") else settings["r"])


def gates(h, router, settings):
    """The weight of every expert for every token, `[T, E]`."""
    p = torch.softmax(linear(h, router), -1)
    g = torch.zeros_like(p)
    for t, row in enumerate(p):
        order = row.argsort(descending=True)
        if settings["routing_strategy"] == "mixlora":
            chosen = order[: settings["top_k"]]
            g[t, chosen] = row[chosen] / row[chosen].sum()
        elif settings["routing_strategy"] == "mixlora-dynamic":
            total = 0.0
            for e in order:
                g[t, e] = row[e]
                total += row[e]
                if total > settings["top_p"]:
                    break
        else:  # what is trained, no token dropped
            g[t, order[0]] = row[order[0]]
    return g


def apply_reference(model, settings, tensors):
    """Change a plain model so that it computes MixLoRA: every expert is run on every token."""
    weights = {key: tensor.to(model.dtype) for key, tensor in tensors.items()}
    expert = {**settings, **settings.get("expert_lora", {})}

    def with_lora(module, x, key, kind):
        A, B = (weights.get(f"{key}.lora_{side}.weight") for side in "AB")
        y = linear(x, module.weight, module.bias)
        return y if A is None else y + scale(kind) * linear(linear(x, A), B)

    def one_expert(mlp, h, prefix, e):
        def run(name, x):
            return with_lora(getattr(mlp, name), x, f"{prefix}.{name}.experts.{e}", expert)

        act = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn
        if hasattr(mlp, "fc1"):
            return run("fc2", act(run("fc1", h)))
        gate, up = run("gate_up_proj", h).chunk(2, -1) if hasattr(mlp, "gate_up_proj") else (None, None)
        if gate is None:
            gate, up = run("gate_proj", h), run("up_proj", h)
        return run("down_proj", act(gate) * up)

    def block(mlp, prefix):
        def forward(x):
            h = x.reshape(-1, x.shape[-1])
            g = gates(h, weights[f"{prefix}.moe_gate.weight"], settings)
            y = sum(g[:, e, None] * one_expert(mlp, h, prefix, e) for e in range(settings["num_experts"]))
            return y.view_as(x)

        return forward

    def plain(module, key):
        return lambda x: with_lora(module, x, key, settings)

    for i, layer in enumerate(model.model.layers):
        layer.mlp.forward = block(layer.mlp, f"mixlora.layers.{i}.mlp")
        for name, module in layer.self_attn.named_children():
            if f"mixlora.layers.{i}.self_attn.{name}.lora_A.weight" in weights:
                module.forward = plain(module, f"mixlora.layers.{i}.self_attn.{name}")
    return model


def relative(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


CASES = {
    "top-2": ("llama", {}),
    "safetensors": ("llama", {"kind": "safetensors"}),
    "top-1 of mixlora": ("llama", {"top_k": 1}),
    "dynamic": ("llama", {"routing_strategy": "mixlora-dynamic", "top_k": None, "top_p": 0.7, "temperature": 0.0}),
    "switch": ("llama", {"routing_strategy": "mixlora-switch", "top_k": None, "expert_capacity": 32}),
    "rslora": ("llama", {"use_rslora": True}),
    "experts wider": ("llama", {"expert_lora": {"r": 6, "lora_alpha": 20}}),
    "attention wider": ("llama", {"expert_lora": {"r": 3, "lora_alpha": 5, "lora_dropout": 0.1}}),
    "rslora in experts alone": ("llama", {"expert_lora": {"r": 2, "lora_alpha": 7, "use_rslora": True}}),
    "one expert": ("llama", {"num_experts": 1, "top_k": 1}),
    "dict of targets": ("llama", {"target_modules": dict.fromkeys(LLAMA, True) | {"k_proj": False, "fc1": False}}),
    "no gate": ("llama", {"target_modules": ["q_proj", "up_proj", "down_proj"]}),
    "up alone": ("llama", {"target_modules": ["up_proj"]}),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {}),
    "gemma2": ("gemma2", {"act_fn": "gelu_pytorch_tanh"}),
    "phi": ("phi", {"act_fn": "gelu_new", "target_modules": ["q_proj", "dense", "fc1", "fc2"]}),
    "phi top-p": (
        "phi",
        {
            "act_fn": "gelu_new",
            "routing_strategy": "mixlora-dynamic",
            "top_p": 0.6,
            "target_modules": ["q_proj", "fc1", "fc2"],
        },
    ),
    "phi3": ("phi3", {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    "phi3 gate_up alone": ("phi3", {"target_modules": ["gate_up_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_logits_are_those_of_the_formulas(case, dtype, limit, tmp_path):
    family, changes = CASES[case]
    kind = changes.get("kind", "bin")
    settings = their_settings(**{k: v for k, v in changes.items() if k != "kind"})
    tensors = their_tensors(make_family(family), settings)
    make_family(family).config.save_pretrained(tmp_path / "base")
    report = import_mixlora(
        write(tmp_path / "theirs", settings, tensors, kind), tmp_path / "ours", str(tmp_path / "base")
    )
    tokens = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain = make_family(family, dtype)(tokens).logits
        wanted = apply_reference(make_family(family, dtype), settings, tensors)(tokens).logits
        model = PeftModel.from_pretrained(make_family(family, dtype), tmp_path / "ours").to(dtype).eval()
        got = model(tokens).logits
    assert relative(got, wanted) <= limit
    assert relative(plain, wanted) > 1e-2  # the adapter does something
    assert (report.layers, report.experts) == (2, settings["num_experts"])
    assert report.parameters == sum(p.numel() for n, p in model.named_parameters() if "ffn_moe_" in n)
    assert report.tensors == len(load_file(tmp_path / "ours" / "adapter_model.safetensors"))


def test_saved_config_says_what_was_imported(tmp_path):
    settings = their_settings(router_aux_loss_coef=0.01, jitter_noise=0.02, lora_alpha=12)
    source = write(tmp_path / "theirs", settings, their_tensors(make_tiny_llama(), settings))
    import_mixlora(source, tmp_path / "ours")
    config = PeftConfig.from_pretrained(tmp_path / "ours")
    assert isinstance(config, FfnMoeConfig)
    assert (config.r, config.lora_alpha, config.num_experts, config.top_k) == (4, 12, 4, 2)
    assert (config.routing, config.balance) == ("softmax_top_k", "switch")
    assert config.router_aux_loss_coef == pytest.approx(0.02)  # their loss is worth 2 when even, ours 1
    assert (config.router_jitter_noise, config.lora_dropout) == (0.02, 0.05)
    assert (config.base_model_name_or_path, config.task_type) == ("someone/base", "CAUSAL_LM")
    record = json.loads((tmp_path / "ours" / "moe_peft_import.json").read_text())
    assert record["settings"] == settings


@pytest.mark.parametrize(("key", "value"), [("router_loss", False), ("router_aux_loss_coef", 0.5)])
def test_a_switch_checkpoint_keeps_its_losses(key, value):
    settings = their_settings(routing_strategy="mixlora-switch", top_k=None, **{key: value})
    config, _ = mixlora_to_ours(settings, their_tensors(make_tiny_llama(), settings))
    assert config.balance == ("none" if key == "router_loss" else "switch")
    assert config.router_aux_loss_coef == (0.5 if key == "router_aux_loss_coef" else 0.001)
    assert (config.router_z_loss_coef, config.router_jitter_noise) == (0.001, 0.01)  # their defaults


def test_what_was_not_trained_stays_zero():
    settings = their_settings(target_modules=["q_proj", "up_proj"], expert_lora={"r": 2, "lora_alpha": 4})
    config, state = mixlora_to_ours(settings, their_tensors(make_tiny_llama(), settings))
    mlp = "base_model.model.model.layers.0.mlp"
    assert config.r == 4
    assert not state[f"{mlp}.gate_proj.ffn_moe_experts.lora_A"].any()
    assert not state[f"{mlp}.up_proj.ffn_moe_experts.lora_B"][:, 2:].any()
    assert state[f"{mlp}.up_proj.ffn_moe_experts.lora_B"].shape == (4, 4, 96)


def test_an_imported_adapter_can_be_trained_further(tmp_path, tokens):
    settings = their_settings()
    source = write(tmp_path / "a", settings, their_tensors(make_tiny_llama(), settings))
    import_mixlora(source, tmp_path / "b")
    model = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "b", is_trainable=True).train()
    model(tokens, labels=tokens).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert len(trained) == 4 * (7 * 2 + 1)  # every factor and router of every layer


def test_half_precision_is_widened():
    settings = their_settings()
    tensors = {k: t.bfloat16() for k, t in their_tensors(make_tiny_llama(), settings).items()}
    _, state = mixlora_to_ours(settings, tensors)
    assert {t.dtype for t in state.values()} == {torch.float32}


# --- warnings ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, r"not saved by MoE-PEFT: router_aux_loss_coef, router_loss, jitter_noise\..*router_aux_loss_coef=0\.002"),
        ({}, r"base model not looked at: .*act_fn: silu"),
        (
            {"routing_strategy": "mixlora-switch", "top_k": None},
            r"without the FFN.*routing='top_1'.*expert_capacity=32",
        ),
        ({"routing_strategy": "mixlora-switch", "top_k": None}, r"not saved.*router_z_loss_coef\..*coef=0\.001"),
        ({"routing_strategy": "mixlora-switch", "ffn_dropout": 0.1, "expert_capacity": 7}, r"=7.*ffn_dropout=0\.1"),
        ({"top_k": 1}, r"top_k=1: .*the task trains the router"),
        (
            {"expert_lora": {"r": 8, "lora_alpha": 8}},
            r"experts have r=8 and scale 1, attention r=4 and 2\. Here one r=8",
        ),
        ({"expert_lora": {"lora_alpha": 16}}, r"the package `mixlora` passes over it"),
        ({"use_rslora": True, "expert_lora": {"r": 4}}, r"expert_lora.use_rslora: .*true is taken over"),
        ({"expert_lora": {"lora_dropout": 0.2}}, r"lora_dropout: 0\.2 of the experts for all; attention had 0\.05"),
        ({"target_modules": ["up_proj"]}, r"no LoRA on gate_proj, down_proj of the FFN"),
        ({"task_type": "QUESTION_ANS"}, r"QUESTION_ANS: .*imported as CAUSAL_LM"),
        ({"warmup_steps": 3, "optim": "adamw"}, r"ignored, as MoE-PEFT ignores them: optim, warmup_steps"),
    ],
)
def test_warnings_name_what_is_lost(changes, said, tmp_path):
    settings = their_settings(**changes)
    report = import_mixlora(
        write(tmp_path / "a", settings, their_tensors(make_tiny_llama(), settings)), tmp_path / "b"
    )
    assert any(re.search(said, sentence) for sentence in report.warnings), report.warnings


def test_a_whole_config_and_a_known_base_give_no_warning(tmp_path):
    settings = their_settings(router_aux_loss_coef=0.001, router_loss=True, jitter_noise=0.0)
    make_tiny_llama().config.save_pretrained(tmp_path / "base")
    source = write(tmp_path / "a", settings, their_tensors(make_tiny_llama(), settings))
    assert import_mixlora(source, tmp_path / "b", str(tmp_path / "base")).warnings == []


# --- refusals ---


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "LORAMOE"}, r"`peft_type` is 'LORAMOE', but must be one of 'MIXLORA'"),
        ({"routing_strategy": "mola"}, r"`routing_strategy` is 'mola'"),
        ({"routing_strategy": None}, r"`routing_strategy` is None"),
        ({"bias": "all"}, r"`bias` is 'all'"),
        ({"task_type": "SEQ_CLS"}, r"`task_type` is 'SEQ_CLS'.*classification head"),
        ({"num_experts": 0}, r"`num_experts` is 0"),
        ({"r": 2.0}, r"`r` is 2.0"),
        ({"lora_alpha": "16"}, r"`lora_alpha` is '16'"),
        ({"use_rslora": 1}, r"`use_rslora` is 1"),
        ({"top_k": True}, r"`top_k` is True"),
        ({"router_aux_loss_coef": "0.01"}, r"`router_aux_loss_coef` is '0.01', but must be a number"),
        ({"router_aux_loss_coef": float("nan")}, r"`router_aux_loss_coef` is nan"),
        ({"routing_strategy": "mixlora-switch", "router_z_loss_coef": "0"}, r"`router_z_loss_coef` is '0'"),
        ({"jitter_noise": "0.1"}, r"`jitter_noise` is '0.1', but must be a number"),
        ({"router_loss": "no"}, r"`router_loss` is 'no', but must be true or false"),
        ({"top_k": 5}, r"`top_k` is 5, but must be at most 4"),
        ({"use_dora": True}, r"`use_dora` is True.*no magnitudes"),
        ({"expert_lora": {"use_dora": True}}, r"`expert_lora.use_dora` is True"),
        ({"expert_lora": {"r": -1}}, r"`expert_lora.r` is -1"),
        ({"expert_lora": [4]}, r"`expert_lora` is \[4\]"),
        ({"routing_strategy": "mixlora-dynamic", "temperature": 0.5}, r"`temperature` is 0.5.*after the softmax"),
        ({"routing_strategy": "mixlora-dynamic", "top_p": 1.5}, r"`top_p` is 1.5"),
        ({"target_modules": "all-linear"}, r"`target_modules` is 'all-linear', but must be a list of names"),
        ({"target_modules": {"q_proj": 1}}, r"`target_modules` is \{'q_proj': 1\}"),
        ({"target_modules": ["q_proj", "v_proj"]}, r"`target_modules`.*one of gate_proj, up_proj, down_proj"),
        ({"target_modules": LLAMA[:-1]}, r"`tensors` is \['mixlora.layers.0.mlp.up_proj.experts.0.lora_A"),
        ({"num_experts": 5}, r"must be in the file"),
        ({"r": 8}, r"lora_A.weight` is '\(4, 64\) torch.float32', but must be floating-point, of shape 8 x 64"),
    ],
)
def test_settings_are_refused(changes, match):
    tensors = their_tensors(make_tiny_llama(), their_settings())
    with pytest.raises(ValueError, match=match):
        mixlora_to_ours(their_settings(**changes), tensors)


@pytest.mark.parametrize("field", ["router_aux_loss_coef", "router_z_loss_coef", "jitter_noise", "router_loss"])
def test_a_null_is_not_taken_for_the_default(field):
    settings = their_settings(routing_strategy="mixlora-switch")
    tensors = their_tensors(make_tiny_llama(), settings)
    with pytest.raises(ValueError, match=rf"`{field}` is None, but must be"):
        mixlora_to_ours({**settings, field: None}, tensors)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(KEY), rf"`tensors` is \['{KEY}'\], but must be in the file.*fresh random LoRA"),
        (lambda t: t.pop("mixlora.layers.2.mlp.moe_gate.weight"), r"layers.2.mlp.moe_gate.weight'\], but must be in"),
        (lambda t: t.update(classifier=torch.ones(2, 2)), r"`tensors` is \['classifier'\].*no others"),
        (lambda t: t.update({KEY.replace("1.mlp", "999999.mlp"): t[KEY]}), r"layers.4.mlp.moe_gate.weight"),
        (lambda t: t.update({KEY: t[KEY][:, 1:]}), rf"`{KEY}` is '\(4, 63\).*of shape 4 x 64"),
        (lambda t: t.update({KEY: t[KEY][0]}), rf"`{KEY}` is '\(64,\)"),
        (lambda t: t.update({KEY: t[KEY].int()}), rf"`{KEY}` is .*torch.int32', but must be floating-point"),
        (lambda t: t.update({KEY: t[KEY] / 0}), rf"`{KEY}` is 'not finite'"),
        (lambda t: t.clear(), r"`tensors` is \[\], but must be named 'mixlora.layers.0"),
        (
            lambda t: t.update({KEY.replace("up_proj", "dense_h_to_4h"): t[KEY]}),
            r"mlp.dense_h_to_4h.*ChatGLM's base is code of its own",
        ),
        (lambda t: t.update({KEY.replace("up_proj", "w1"): t[KEY]}), r"'mlp.w1'.*MoE-PEFT does not give"),
    ],
)
def test_tensors_are_refused_by_name(change, match):
    tensors = their_tensors(make_tiny_llama(), their_settings())
    change(tensors)
    with pytest.raises(ValueError, match=match):
        mixlora_to_ours(their_settings(), tensors)


@pytest.mark.parametrize(
    ("part", "side", "wanted"),
    [
        ("mlp.moe_gate.weight", 1, "4 x 64"),
        ("mlp.gate_proj.experts.0.lora_B.weight", 0, "96 x 4"),
        ("self_attn.q_proj.lora_B.weight", 0, r"\d+ x 4"),
        ("self_attn.o_proj.lora_A.weight", 1, r"4 x \d+"),
    ],
)
def test_a_layer_of_another_width_than_the_first_is_refused(part, side, wanted):
    """Without the base model nothing else would say so before the adapter is loaded."""
    tensors = their_tensors(make_tiny_llama(), their_settings())
    for key in [key for key in tensors if ".layers.1." in key]:
        if key.endswith(part) or (part.startswith("mlp.moe") and tensors[key].shape[1] == 64):
            tensors[key] = tensors[key].narrow(side, 1, tensors[key].shape[side] - 1)
    with pytest.raises(ValueError, match=rf"`mixlora.layers.1.{part}` .*of shape {wanted}"):
        mixlora_to_ours(their_settings(), tensors)


def test_the_family_is_asked_for_where_names_leave_it_open():
    settings = their_settings(target_modules=["o_proj", "down_proj"])
    tensors = their_tensors(make_tiny_llama(), settings)
    with pytest.raises(ValueError, match=r"tell the base model's family.*Name the base model"):
        mixlora_to_ours(settings, tensors)
    assert any("gate_proj" in name for name in mixlora_to_ours(settings, tensors, "llama")[1])
    with pytest.raises(ValueError, match=r"`base` is 'chatglm', but must be a model of type llama"):
        mixlora_to_ours(settings, tensors, "chatglm")
    with pytest.raises(ValueError, match=r"must be on the linears of phi\."):
        mixlora_to_ours(settings, tensors, "phi")


@pytest.mark.parametrize(
    ("changes", "layers", "match"),
    [
        ({}, 3, r"`base` is 'a model of 3 layers', but must be one of 4"),
        ({"act_fn": "relu"}, 4, r"`act_fn` is 'relu', but must be the base model's own"),
        ({"act_fn": "none"}, 4, r"`act_fn` is 'none'"),
    ],
)
def test_another_base_is_refused(changes, layers, match, tmp_path):
    settings = their_settings(**changes)
    source = write(tmp_path / "a", settings, their_tensors(make_tiny_llama(), settings))
    make_tiny_llama(layers=layers).config.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=match):
        import_mixlora(source, tmp_path / "b", str(tmp_path / "base"))
    assert not (tmp_path / "b").exists()


def test_a_base_of_other_widths_is_refused(tmp_path):
    source = write(tmp_path / "a", their_settings(), their_tensors(make_family("llama"), their_settings()))
    make_tiny_llama(layers=2).config.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"`base` is 'model.layers.0.mlp.gate_proj from 64 to 96'.*from 32 to \d+"):
        import_mixlora(source, tmp_path / "b", str(tmp_path / "base"))


# --- files ---


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (pickle.dumps({"a": Malicious()}), r"not loaded: a pickle can run any code"),
        (b"", r"damaged"),
        (b"no pickle at all", r"is no pickle of tensors"),
    ],
    ids=["asks for mkdir", "empty", "text"],
)
def test_a_pickle_that_is_not_tensors_is_refused(content, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "a", their_settings(), {})
    (source / "adapter_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        import_mixlora(source, tmp_path / "b")
    assert not (tmp_path / "harmed").exists()
    assert not (tmp_path / "b").exists()


def test_a_zipped_pickle_is_refused_and_what_it_asks_for_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "a", their_settings(), {})
    torch.save({"a": Malicious()}, source / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"asks for `\w+\.mkdir`"):
        import_mixlora(source, tmp_path / "b")
    assert not (tmp_path / "harmed").exists()
    torch.save([1, 2], source / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"`adapter_model.bin` is 'list', but must be tensors by name"):
        import_mixlora(source, tmp_path / "b")


def test_files_that_cannot_be_read_are_refused(tmp_path):
    settings = their_settings()
    source = write(tmp_path / "a", settings, their_tensors(make_tiny_llama(), settings), "safetensors")
    whole = (source / "adapter_model.safetensors").read_bytes()
    (source / "adapter_model.safetensors").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"is damaged: it has"):
        import_mixlora(source, tmp_path / "b")
    (source / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"it has both"):
        import_mixlora(source, tmp_path / "b")
    for file in source.glob("adapter_model.*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"it has neither"):
        import_mixlora(source, tmp_path / "b")
    (source / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"is not valid JSON"):
        import_mixlora(source, tmp_path / "b")
    (source / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"must be a JSON object"):
        import_mixlora(source, tmp_path / "b")
    with pytest.raises(ValueError, match=r"`source` is .*a folder with adapter_config.json"):
        import_mixlora(tmp_path / "nowhere", tmp_path / "b")


def test_an_output_that_holds_something_is_left_alone(tmp_path):
    settings = their_settings()
    source = write(tmp_path / "a", settings, their_tensors(make_tiny_llama(), settings))
    out = tmp_path / "b"
    (out / ".unfinished").mkdir(parents=True)  # of an import that was stopped
    import_mixlora(source, out)
    assert {p.name for p in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "moe_peft_import.json",
    }
    before = (out / "adapter_model.safetensors").read_bytes()
    for taken in (out, source / "adapter_config.json"):
        with pytest.raises(ValueError, match=r"`output` is .*an empty folder, or none yet"):
            import_mixlora(source, taken)
    assert (out / "adapter_model.safetensors").read_bytes() == before


def test_an_id_is_fetched_from_the_hub(tmp_path, monkeypatch):
    settings = their_settings()
    source = write(tmp_path / "a", settings, their_tensors(make_tiny_llama(), settings))
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **_: asked.append(repo) or str(source))
    assert import_mixlora("someone/mixlora", tmp_path / "b").layers == 4
    assert asked == ["someone/mixlora"]


# --- the packages themselves ---

THEIR_LAYERS = """
import json, sys, types, torch
from collections import namedtuple
sys.modules["evaluate"] = types.ModuleType("evaluate")  # for its metrics alone
import moe_peft
assert moe_peft.__file__.startswith(sys.argv[1])
from moe_peft.adapters import lora_config_factory
from moe_peft.common import FeedForward, Linear, LLMBatchConfig, LLMModelInput
from moe_peft.model import init_lora_layer_weight
from moe_peft.models.modeling_llama import LlamaDecoderLayer, LlamaMLP
from transformers import AutoModelForCausalLM

folder, Args = sys.argv[2], namedtuple("Args", "device_ hidden_act_ dim_")
args = Args("cpu", "silu", 32)
settings = json.load(open(f"{folder}/theirs/adapter_config.json"))
config = lora_config_factory(settings)
config.adapter_name = "a"
config.act_fn_ = config.act_fn_ or "silu"
weights = torch.load(f"{folder}/theirs/adapter_model.bin", weights_only=False)
base = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
layer = LlamaDecoderLayer(1)
mlp, names = base.model.layers[1].mlp, ["q_proj", "k_proj", "v_proj", "o_proj"]
layer.mlp_ = FeedForward(LlamaMLP(mlp.gate_proj, mlp.down_proj, mlp.up_proj, args))
own = {name: Linear(getattr(base.model.layers[1].self_attn, name), "cpu") for name in names}
layer.self_attn_ = types.SimpleNamespace(state_dict=lambda: own)
init_lora_layer_weight(layer, args, config, weights)
linears = [*own.values(), *layer.mlp_.state_dict().values()]
x, found = torch.load(f"{folder}/x.pt"), {}

def run(dropout, efficient, inference):
    for lora in (lora for linear in linears for lora in linear.loras_.values()):
        lora.dropout_.p = dropout
    batch = [LLMBatchConfig("a", 0, len(x))]
    given = LLMModelInput(batch_configs_=batch, efficient_operator_=efficient, inference_mode_=inference)
    torch.manual_seed(0)
    return [layer.mlp_(x.clone(), given)[0].detach(), own["q_proj"](x.clone(), given).detach()]

found["moe"] = type(layer.mlp_.moes_["a"]).__name__
layer.mlp_.moes_["a"].jitter_noise_ = 0.0
for efficient in (True, False):
    for inference in (True, False):
        found[efficient, inference] = run(1e-12, efficient, inference)  # 0 fails an assertion of theirs
found["dropout"] = run(0.5, True, True)
torch.save(found, f"{folder}/found.pt")
"""

THEIR_MODEL = """
import sys, torch
import mixlora
assert mixlora.__file__.startswith(sys.argv[1])
folder = sys.argv[2]
model, config = mixlora.MixLoraModelForCausalLM.from_pretrained(f"{folder}/theirs")
model.eval()
tokens = torch.load(f"{folder}/x.pt")
with torch.no_grad():
    noisy = model(tokens).logits
    for layer in model.model.layers:
        for moe in layer.mlp.mixlora_moes.values():
            for lora in moe.experts_.values():  # in a plain dict, so that eval() does not reach their dropout
                lora.eval()
    torch.save({"logits": model(tokens).logits, "noisy": noisy}, f"{folder}/found.pt")
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with both packages, without what they depend on."""
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("moe-peft imports datasets, which is not here")
    target = tmp_path_factory.mktemp("packages")
    wanted = ["mixlora==0.2.3", "moe-peft==2.0.2"]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    if done.returncode:
        pytest.skip(f"pip could not install {' and '.join(wanted)}: {done.stderr.strip().splitlines()[-1]}")
    return target


def run_theirs(script, packages, folder):
    command = [sys.executable, "-c", script, str(packages), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / "found.pt")


def prepare(folder, x, **changes):
    """Base, checkpoint and input on disk, and our model with the imported adapter."""
    settings = their_settings(base_model_name_or_path=str(folder / "base"), **changes)
    make_family("llama").save_pretrained(folder / "base")
    torch.save(x, folder / "x.pt")
    source = write(folder / "theirs", settings, their_tensors(make_family("llama"), settings))
    import_mixlora(source, folder / "ours", str(folder / "base"))
    return PeftModel.from_pretrained(make_family("llama"), folder / "ours").eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "MixtralSparseMoe"),
        ({"target_modules": ["q_proj", "up_proj"]}, "MixtralSparseMoe"),
        ({"use_rslora": True, "top_k": 3}, "MixtralSparseMoe"),
        ({"expert_lora": {"r": 6, "lora_alpha": 20}}, "MixtralSparseMoe"),
        ({"routing_strategy": "mixlora-dynamic", "top_p": 0.7}, "DynamicSparseMoe"),
        ({"routing_strategy": "mixlora-dynamic", "top_p": 0.7, "temperature": 1.0}, "DynamicSparseMoe"),
        ({"routing_strategy": "mixlora-switch"}, "SwitchSparseMoe"),
    ],
)
def test_a_layer_of_moe_peft_gives_the_same(changes, kind, packages, tmp_path):
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(4))
    model = prepare(tmp_path, x, **changes)
    found = run_theirs(THEIR_LAYERS, packages, tmp_path)
    assert found["moe"] == kind
    layer = model.base_model.model.model.layers[1]
    with torch.no_grad():
        ours = [layer.mlp(x), layer.self_attn.q_proj(x)]
    for efficient in (True, False):
        for inference in (True, False):
            block, query = found[efficient, inference]
            assert relative(ours[1], query) <= 1e-5
            if kind == "SwitchSparseMoe" and inference:
                assert torch.equal(block, x)  # what the warning says
            else:
                assert relative(ours[0], block) <= 1e-5
    assert relative(found["dropout"][1], ours[1]) > 1e-2  # their dropout is on in inference


@pytest.mark.slow
def test_the_model_of_mixlora_gives_the_same(packages, tmp_path):
    tokens = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(5))
    model = prepare(tmp_path, tokens, lora_dropout=0.3)
    found = run_theirs(THEIR_MODEL, packages, tmp_path)
    with torch.no_grad():
        ours = model(tokens).logits
    assert relative(ours, found["logits"]) <= 1e-5
    assert relative(ours, found["noisy"]) > 1e-3  # eval() left their dropout on
