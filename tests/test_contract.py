"""THE CONTRACT: what every adapter promises, each type and routing rule against each promise.

Tolerances: fp64 where an identity is exact up to rounding, and then `EXACT`; `CLOSE` in fp32. Bitwise means bitwise.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from moe_peft import (
    BottleneckMoeConfig,
    DomainMoeConfig,
    FfnMoeConfig,
    LinearMoeConfig,
    RankMoeConfig,
    ShardPoolConfig,
)
from moe_peft.tuners.base import MoeTunerLayer


EXACT = {"rtol": 1e-9, "atol": 1e-11}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
LINEAR_RULES = {
    "softmax_top_k": {"num_experts": 4, "top_k": 2},
    "softmax": {"num_experts": 3, "routing": "softmax"},
    "top_1": {"num_experts": 4, "routing": "top_1"},
    "one expert": {"num_experts": 1},
    "per layer": {"num_experts": "2:4", "top_k": 2, "r": [2, 4, 4, 8]},
    "shared": {"num_experts": 4, "top_k": 2, "num_shared_experts": 1, "use_rslora": True},
    "bias": {"num_experts": 4, "routing": "sigmoid_top_k", "balance": "bias", "routed_scaling_factor": 2.0},
    "cosine": {"num_experts": 4, "routing": "top_k", "scoring_func": "cosine", "router_act": "tanh", "balance": "mi"},
    "null and constant": {"num_experts": 3, "top_k": 3, "num_null_experts": 2, "num_constant_experts": 1},
    "sparsegen": {"num_experts": 4, "routing": "sparsegen", "balance": "cv2", "router_bias": True},
    "top_p": {"num_experts": 4, "routing": "top_p", "router_entropy_coef": 0.01, "freeze_router": True},
    "share_A": {"num_experts": 3, "routing": "softmax", "share_A": True},
    "block": {"num_experts": 3, "routing": "softmax", "router_scope": "block"},
    "group": {"num_experts": 4, "top_k": 2, "router_scope": "group"},
}
BLOCK = {"target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]}
FFN_RULES = {
    "softmax_top_k": {"num_experts": 4, "top_k": 2, "router_z_loss_coef": 0.01},
    "softmax": {"num_experts": 3, "routing": "softmax"},
    "straight-through": {"num_experts": 4, "routing": "top_1_straight_through", "router_bias": True},
    "sigmoid": {"num_experts": 4, "routing": "sigmoid_top_k", "use_rslora": True},
    "one expert": {"num_experts": 1},
    "per layer": {"num_experts": "2:4", "top_k": 2, "r": [2, 4, 4, 8]},
    "shared and null": {"num_experts": 3, "top_k": 2, "num_shared_experts": 1, "num_null_experts": 2},
    "cosine": {"num_experts": 4, "routing": "all", "scoring_func": "cosine", "freeze_router": True},
    "bias": {"num_experts": 4, "top_k": 2, "balance": "bias"},
    "sparsegen": {"num_experts": 4, "routing": "sparsegen", "router_act": "gelu"},
}
OWN = {"routing": "self_activated", "temperature": 0.2}
RANK_RULES = {
    "sigmoid": {"r": 8, "top_k": 4, "balance": "switch"},
    "shared rows": {"r": 8, "top_k": 4, "rank_partition": 2, "bias_in_gates": True, "use_rslora": True},
    "self-activated": {"r": 8, "top_k": 4, **OWN},
    "threshold": {"r": 6, "top_k": 3, "threshold": 0.4, **OWN},
    "one rank": {"r": 1},
    "per layer": {"r": [2, 4, 4, 8], "top_k": 2},
}
SHARD_RULES = {
    "one for each layer": {},
    "pools": {"equivalent_rank": 2, "shards_per_vector": 4, "use_rslora": True},
    "split B": {"num_splits": 4},
    "both split": {"num_splits": 2, "split_factors": "both"},
}
DOMAINS = {"domains": ["law", "code", "C++"]}
DOMAIN_RULES = {
    "unequal ranks": {**DOMAINS, "domain_ranks": [1, 4, 3], "rank_pattern": {"up_proj": [2, 0, 2]}},
    "null": {**DOMAINS, "num_null_experts": 2, "top_k": 3, "balance": "switch"},
    "arrow": {**DOMAINS, "gate": "arrow", "top_k": 2},
    "one domain": {"domains": ["law"]},
}
BOTTLENECK = {"domains": ["law", "medicine"], "gate_size": 8, "r": 0}
BOTTLENECK_RULES = {
    "softmax gate": {"gate": "mlp", "gate_input": "token", "gate_dropout": 0.0},
    "sigmoid gate": {"gate": "sigmoid"},
    "without a gate": {"gate": "none", "domains": ["law"], "bottleneck_size": 3},
    "and a task": {"gate": "sigmoid", "r": 4, "task_modules": TARGETS, "target_modules": ["1.mlp.down_proj"]},
}
CASES = [pytest.param(LinearMoeConfig, rule, id=f"LINEAR_MOE-{name}") for name, rule in LINEAR_RULES.items()]
CASES += [pytest.param(FfnMoeConfig, {**BLOCK, **rule}, id=f"FFN_MOE-{name}") for name, rule in FFN_RULES.items()]
CASES += [pytest.param(RankMoeConfig, rule, id=f"RANK_MOE-{name}") for name, rule in RANK_RULES.items()]
CASES += [pytest.param(ShardPoolConfig, rule, id=f"SHARD_POOL-{name}") for name, rule in SHARD_RULES.items()]
CASES += [pytest.param(DomainMoeConfig, rule, id=f"DOMAIN_MOE-{name}") for name, rule in DOMAIN_RULES.items()]
CASES += [
    pytest.param(BottleneckMoeConfig, {**BOTTLENECK, **rule}, id=f"BOTTLENECK_MOE-{name}")
    for name, rule in BOTTLENECK_RULES.items()
]
ONE = {LinearMoeConfig: {"num_experts": 1}, FfnMoeConfig: {"num_experts": 1}, RankMoeConfig: {"r": 1}}  # not routed
ONE[DomainMoeConfig] = {"domains": ["law"]}
ROUTED = [case for case in CASES if case.values[1] | ONE.get(case.values[0], {}) != case.values[1]]
LINEAR = [c for c in CASES if c.values[0] is not FfnMoeConfig and "router_scope" not in c.values[1]]

over_cases = pytest.mark.parametrize(("config_class", "rule"), CASES)
over_routed_cases = pytest.mark.parametrize(("config_class", "rule"), ROUTED)
over_linear_cases = pytest.mark.parametrize(("config_class", "rule"), LINEAR)  # layers that promise this by themselves


def adapt(model, config_class, rule, name: str = "default", seed: int = 2, **settings) -> PeftModel:
    """The model with an adapter that does something, unless `init_weights=True` says otherwise."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 32, "target_modules": TARGETS, "init_weights": False, **rule, **settings}
    coef = settings.pop("router_aux_loss_coef", 0)
    config = config_class(task_type="CAUSAL_LM", **settings)
    if coef and getattr(config, "balance", "none") not in ("none", "bias"):
        config = config_class(task_type="CAUSAL_LM", router_aux_loss_coef=coef, **settings)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        return model
    return get_peft_model(model, config, adapter_name=name).eval()


def logits(model, tokens) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def adapter_gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def layers_of(model) -> list[MoeTunerLayer]:
    return [module for module in model.modules() if isinstance(module, MoeTunerLayer)]


def is_adapters(key) -> bool:
    return "_moe_experts." in key or ".shard_pool_" in key


def base_state(model) -> dict[str, torch.Tensor]:
    """Everything that is not an adapter's, cloned: also what bitsandbytes keeps beside a packed weight."""
    return {key: value.clone() for key, value in model.state_dict().items() if not is_adapters(key)}


def assert_same_bits(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny_llama")
    make_tiny_llama().save_pretrained(folder)
    return str(folder)


def make_nf4_llama(checkpoint: str, device: str = "cpu"):
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=quantization, device_map={"": device})
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # so that it can be run before it has an adapter
            module.support_avx512bf16_for_cpu = False
    return model.eval()


BASES = {
    "fp32": lambda checkpoint: make_tiny_llama(),
    "bf16": lambda checkpoint: make_tiny_llama(dtype=torch.bfloat16),
    "nf4": make_nf4_llama,
    "nf4 on a GPU": lambda checkpoint: make_nf4_llama(checkpoint, "cuda"),
}


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.gpu] * name.endswith("GPU")) for name in BASES])
def base(request, checkpoint):
    if request.param.endswith("GPU") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return BASES[request.param](checkpoint)


# --- a fresh adapter, and one that is switched off ---


@over_cases
@pytest.mark.parametrize("training", [False, True])
def test_a_fresh_adapter_changes_nothing(base, tokens, config_class, rule, training):
    tokens = tokens.to(base.device)
    before = logits(base, tokens)
    model = adapt(base, config_class, rule, init_weights=True, lora_dropout=0.1).train(training)
    assert torch.equal(logits(model, tokens), before)


@over_cases
def test_disabling_restores_the_base(base, tokens, config_class, rule):
    tokens = tokens.to(base.device)
    before = logits(base, tokens)
    model = adapt(base, config_class, rule)
    adapted = logits(model, tokens)
    assert not torch.equal(adapted, before)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), before)
    assert torch.equal(logits(model, tokens), adapted)


@over_cases
def test_unloading_restores_the_base(base, tokens, config_class, rule):
    tokens = tokens.to(base.device)
    before, types = logits(base, tokens), [type(module) for module in base.modules()]
    unloaded = adapt(base, config_class, rule).unload()
    assert [type(module) for module in unloaded.modules()] == types
    assert not any(module._forward_pre_hooks for module in unloaded.modules())
    assert torch.equal(logits(unloaded, tokens), before)


@over_linear_cases
def test_a_layer_returns_what_its_base_returns(base, config_class, rule):
    model = adapt(base, config_class, rule)
    for layer in layers_of(model):
        dtype = base.lm_head.weight.dtype
        x = torch.randn(2, 3, layer.in_features, dtype=dtype, device=base.device)
        y = layer(x)
        assert (y.shape, y.dtype) == ((2, 3, layer.out_features), layer.base_layer(x).dtype)
        assert {p.dtype for p in layer.experts("default").parameters()} == {torch.float32}


# --- saving and loading ---

IN_A_NEW_PROCESS = """
import json, sys
from pathlib import Path
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
import moe_peft

torch.set_num_threads(1)
root, checkpoint = Path(sys.argv[1]), sys.argv[2]
for folder in sorted(root.iterdir()):
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    model = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    with torch.no_grad():
        logits = model(input_ids=load_file(folder / "tokens.safetensors")["tokens"]).logits
    save_file({"logits": logits}, folder / "logits.safetensors")
    fields = {k: sorted(v) if isinstance(v, set) else v for k, v in model.peft_config["default"].to_dict().items()}
    (folder / "fields.json").write_text(json.dumps(fields))
"""


@pytest.fixture(scope="module")
def reloaded(checkpoint, tmp_path_factory):
    """Case -> (folder of the saved adapter, its logits and its config before); loaded again by one other process."""
    root, before = tmp_path_factory.mktemp("adapters"), {}
    tokens = torch.randint(1, 100, (2, 9), generator=torch.Generator().manual_seed(3))
    for case in CASES:
        model = adapt(AutoModelForCausalLM.from_pretrained(checkpoint), *case.values)
        model.save_pretrained(root / case.id)
        save_file({"tokens": tokens}, root / case.id / "tokens.safetensors")
        before[str(case.values)] = (root / case.id, logits(model, tokens), model.peft_config["default"])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, str(root), checkpoint]
    subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    return before


@over_cases
def test_a_saved_adapter_gives_the_same_logits_in_a_new_process(reloaded, config_class, rule):
    folder, before, _ = reloaded[str((config_class, rule))]
    torch.testing.assert_close(load_file(folder / "logits.safetensors")["logits"], before, **CLOSE)


@over_cases
def test_a_saved_config_is_equal_in_every_field(reloaded, config_class, rule):
    folder, _, config = reloaded[str((config_class, rule))]
    fields = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    assert json.loads((folder / "fields.json").read_text()) == fields


@over_cases
def test_the_file_holds_the_adapters_tensors_and_nothing_else(reloaded, config_class, rule):
    folder, _, config = reloaded[str((config_class, rule))]
    keys = load_file(folder / "adapter_model.safetensors").keys()
    prefix = config.peft_type.value.lower() + "_"
    assert keys
    assert all(f".{prefix}" in key and "default" not in key and "base_layer" not in key for key in keys)


@over_cases
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_under_another_name_gives_the_same_logits(tokens, tmp_path, config_class, rule, low_cpu_mem_usage):
    model = adapt(make_tiny_llama(), config_class, rule, name="first")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        make_tiny_llama(), tmp_path / "first", adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
    )
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), **CLOSE)


# --- several adapters ---


@over_linear_cases
def test_two_active_adapters_add_up(config_class, rule):
    model = adapt(make_tiny_llama(dtype=torch.float64), config_class, rule, name="first", seed=3)
    other = {
        LinearMoeConfig: {"num_experts": 2, "routing": "softmax"},
        RankMoeConfig: {"r": 4, "top_k": 2},
        DomainMoeConfig: {"domains": ["one", "two"], "routing": "softmax"},
        ShardPoolConfig: {"equivalent_rank": 1},
        BottleneckMoeConfig: {**BOTTLENECK, "domains": ["code"], "gate": "none"},
    }[config_class]
    adapt(model, config_class, other, name="second", seed=4)
    for layer in layers_of(model):
        x = torch.randn(2, 5, layer.in_features, dtype=torch.float64)
        y = layer.base_layer(x)
        outputs = {}
        for names in (["first"], ["second"], ["first", "second"]):
            layer.set_adapter(names)
            outputs[" + ".join(names)] = layer(x)
        added = y + (outputs["first"] - y) + (outputs["second"] - y)
        torch.testing.assert_close(outputs["first + second"], added, **EXACT)
        assert not torch.allclose(outputs["first + second"], outputs["first"])


@over_cases
def test_deleting_one_adapter_leaves_the_other(tokens, config_class, rule):
    model = adapt(make_tiny_llama(), config_class, rule, name="kept", seed=3)
    before = logits(model, tokens)
    adapt(model, config_class, rule, name="other", seed=4)
    model.set_adapter("other")
    assert not torch.equal(logits(model, tokens), before)
    model.delete_adapter("other")
    model.set_adapter("kept")
    assert torch.equal(logits(model, tokens), before)
    assert not any("other" in name for name, _ in model.named_modules())


@over_linear_cases
def test_rows_that_name_their_adapter_get_it(tokens, config_class, rule):
    model = adapt(make_tiny_llama(), config_class, rule, name="first", seed=3)
    adapt(model, config_class, rule, name="second", seed=4)
    alone = []
    for row, name in zip(tokens, ("first", "second"), strict=False):
        model.set_adapter(name)
        alone.append(logits(model, row[None]))
    with model.disable_adapter():
        alone.append(logits(model, tokens[2:3]))
    with torch.no_grad():
        mixed = model(input_ids=tokens, adapter_names=["first", "second", "__base__"]).logits
    torch.testing.assert_close(mixed, torch.cat(alone), **CLOSE)


# --- training ---


@over_cases
def test_a_step_changes_the_adapter_and_not_one_bit_of_the_base(base, tokens, config_class, rule):
    tokens = tokens.to(base.device)
    before = base_state(base)
    model = adapt(base, config_class, rule, lora_dropout=0.1).train()
    assert all(is_adapters(name) == p.requires_grad for name, p in model.named_parameters())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [name for name in trained if torch.equal(trained[name], start[name])] == []
    assert_same_bits(before, base_state(model.unload()))


def test_a_4_bit_base_that_was_evaluated_before_still_trains():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    linears = [bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32) for _ in "ab"]
    base = torch.nn.Sequential(*linears).to("cpu").eval()
    x, states = torch.randn(5, 64), [linear.weight.quant_state for linear in linears]
    with torch.no_grad():
        before = base(x)
    if not all(getattr(state, "packing_format_for_cpu", False) for state in states):
        pytest.skip("this CPU has no AVX512-BF16, for which bitsandbytes repacks weights")
    with pytest.warns(UserWarning, match="evaluated before the adapter was added") as warned:
        model = get_peft_model(base, LinearMoeConfig(target_modules=["0", "1"], init_weights=False))
    assert len(warned) == 1
    with model.disable_adapter():
        close = (
            2**-6 * before.abs().max().item()
        )  # bfloat16 keeps 8 bits of a scale, and the product adds up 64 of them
        torch.testing.assert_close(model(x), before, rtol=0, atol=close)
    model.eval()(x).sum().backward()
    assert all(gradient.any() for gradient in adapter_gradients(model).values())


def two_batches(tokens) -> list[dict[str, torch.Tensor]]:
    """Padded on different sides, so that a mask that outlives its batch would be seen."""
    left, right = torch.ones_like(tokens), torch.ones_like(tokens)
    left[0, :4], right[1, -3:] = 0, 0
    return [
        {"input_ids": rows, "attention_mask": mask, "labels": rows.masked_fill(mask == 0, -100)}
        for rows, mask in ((tokens, left), (tokens.flip(1), right))
    ]


@over_cases
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_are_the_same_under_checkpointing(tokens, config_class, rule, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = adapt(make_tiny_llama(), config_class, rule, router_aux_loss_coef=1.0, lora_dropout=0.1).train()
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(5)  # of dropout
        sum(model(**batch).loss for batch in two_batches(tokens)).backward()
        gradients.append(adapter_gradients(model))
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **CLOSE, msg=name)


@over_cases
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"),
    [("sdpa", torch.float64, EXACT), ("eager", torch.float32, CLOSE)],  # eager masks are too large for fp64's softmax
)
def test_padding_changes_neither_a_real_token_nor_a_gradient(
    tokens, config_class, rule, side, attention, dtype, tolerance
):
    found = []
    for pads in (0, 4):
        base = make_tiny_llama(dtype=dtype)
        base.set_attn_implementation(attention)
        model = adapt(base, config_class, rule, router_aux_loss_coef=1.0).train()
        padding = torch.randint(1, 100, (len(tokens), pads), generator=torch.Generator().manual_seed(6))
        real = (torch.zeros_like(padding), torch.ones_like(tokens))
        order = 1 if side == "left" else -1
        rows, mask = torch.cat((padding, tokens)[::order], 1), torch.cat(real[::order], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # given, as Llama rotates by them in fp32
        output = model(input_ids=rows, attention_mask=mask, position_ids=positions).logits
        output = output[mask.bool()].view(*tokens.shape, -1)
        torch.nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        found.append((output, adapter_gradients(model)))
    (output, gradients), (padded_output, padded_gradients) = found
    torch.testing.assert_close(padded_output, output, **tolerance)
    for name, gradient in gradients.items():
        torch.testing.assert_close(padded_gradients[name], gradient, **tolerance, msg=name)


# --- generation ---


@over_cases
@pytest.mark.parametrize("padded", [False, True])
def test_generation_agrees_with_and_without_a_cache(tokens, config_class, rule, padded):
    model = adapt(make_tiny_llama(dtype=torch.float64), config_class, rule)
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :4] = 0
    kwargs = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, full = (
        model.generate(input_ids=tokens, attention_mask=mask, use_cache=use_cache, **kwargs)
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, full.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(full.logits), **EXACT)


# --- merging ---

MERGES = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "safely": lambda model: model.merge_and_unload(safe_merge=True),
    "merge_adapter": lambda model: model.merge_adapter(),
    "by name": lambda model: model.merge_adapter(adapter_names=["default"]),
    "unload by name": lambda model: model.merge_and_unload(adapter_names=["default"]),
    "after another": lambda model: model.merge_adapter(adapter_names=["static", "default"]),
}


@over_routed_cases
@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_merging_a_routed_adapter_raises_before_anything_is_touched(tokens, config_class, rule, merge):
    model = adapt(make_tiny_llama(), config_class, rule)
    static = {**ONE[config_class], "target_modules": rule.get("target_modules", TARGETS)}
    adapt(model, config_class, static, name="static")
    state, output = copy.deepcopy(model.state_dict()), logits(model, tokens)
    with pytest.raises(
        ValueError, match=r"Adapter 'default' cannot be merged.*depends on the token.*`moe-peft merge`"
    ):
        merge(model)
    assert_same_bits(state, model.state_dict())
    assert not any(layer.merged for layer in layers_of(model))
    assert torch.equal(logits(model, tokens), output)


def test_an_adapter_that_routes_in_some_layers_only_is_not_merged_in_the_others(tokens):
    model = adapt(make_tiny_llama(), LinearMoeConfig, {"num_experts": "1:2", "routing": "softmax"})
    assert {layer.is_static("default") for layer in layers_of(model)} == {True, False}
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    assert_same_bits(state, model.state_dict())


@pytest.mark.parametrize("config_class", [LinearMoeConfig, FfnMoeConfig])
def test_a_static_adapter_is_merged_by_name_beside_an_active_routed_one(tokens, config_class):
    targets = {"target_modules": ["gate_proj", "up_proj", "down_proj"]}
    model = adapt(make_tiny_llama(dtype=torch.float64), config_class, {"num_experts": 3, **targets})
    adapt(model, config_class, {"num_experts": 1, **targets}, name="static")
    routed = logits(model, tokens)
    model.set_adapter("static")
    static = logits(model, tokens)
    model.set_adapter("default")
    model.merge_adapter(["static"])
    torch.testing.assert_close(logits(model, tokens), static, **EXACT)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, tokens), routed, **EXACT)
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=["static"]), tokens), static, **EXACT)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("num_shared_experts", [0, 2])
def test_merging_a_one_expert_adapter_is_exact(tokens, use_rslora, num_shared_experts):
    rule = {"num_experts": 1, "use_rslora": use_rslora, "num_shared_experts": num_shared_experts}
    model = adapt(make_tiny_llama(dtype=torch.float64), LinearMoeConfig, rule)
    before, base = logits(model, tokens), base_state(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens), before, **EXACT)
    model.unmerge_adapter()
    for key, value in base_state(model).items():
        torch.testing.assert_close(value, base[key], **EXACT)
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), before, **EXACT)


def test_merging_again_and_again_leaves_packed_weights_bit_identical(checkpoint, tokens):
    model = adapt(make_nf4_llama(checkpoint), LinearMoeConfig, {"num_experts": 1})
    before, output = base_state(model), logits(model, tokens)
    for _ in range(20):
        model.merge_adapter()
        model.unmerge_adapter()
    assert_same_bits(before, base_state(model))
    assert torch.equal(logits(model, tokens), output)


# --- a plain LoRA is one of ours ---


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_one_expert_adapter_is_pefts_lora(tokens, use_rslora):
    settings = {"r": 4, "lora_alpha": 32, "use_rslora": use_rslora, "target_modules": TARGETS}
    ours = adapt(make_tiny_llama(dtype=torch.float64), LinearMoeConfig, {"num_experts": 1, "use_rslora": use_rslora})
    lora = get_peft_model(make_tiny_llama(dtype=torch.float64), LoraConfig(task_type="CAUSAL_LM", **settings))
    pairs = []
    for (name, layer), other in zip(
        ((n, m) for n, m in ours.named_modules() if isinstance(m, MoeTunerLayer)),
        (m for m in lora.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")),
        strict=True,
    ):
        experts = layer.linear_moe_experts["default"]
        A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
        with torch.no_grad():
            A.copy_(experts.lora_A[0])
            B.copy_(experts.lora_B[0].T)
        pairs.append((name, experts, A, B))
    torch.testing.assert_close(logits(ours, tokens), logits(lora, tokens), **EXACT)
    for model in (ours, lora):
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
    for name, experts, A, B in pairs:
        torch.testing.assert_close(experts.lora_A.grad[0], A.grad, **EXACT, msg=name)
        torch.testing.assert_close(experts.lora_B.grad[0].T, B.grad, **EXACT, msg=name)
