"""SHARD_POOL beyond the contract: budgets, sharing, draws, exact merges, plain LoRA without this package, refusals."""

import copy
import os
import subprocess
import sys

import accelerate
import pytest
import torch
from conftest import make_tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

import moe_peft
from moe_peft import LinearMoeConfig, ShardPoolConfig
from moe_peft.budget import count_config, count_parameters, fit_to_budget, meta_backbone
from moe_peft.plain_lora import is_plain, save_lora, to_lora
from moe_peft.shards import assembled_naive
from moe_peft.tuners.shard_pool import ShardPool, ShardPoolLinear


EXACT = {"rtol": 1e-9, "atol": 1e-11}
TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]
FORMS = {
    "own": {},
    "pools": {"equivalent_rank": 2, "shards_per_vector": 4},
    "pools without private shards": {"equivalent_rank": 2, "private_rank": 0},
    "split B": {"num_splits": 4},
    "split A": {"num_splits": 4, "split_factors": "A"},
    "both split": {"num_splits": 2, "split_factors": "both"},
}
over_forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
over_splits = pytest.mark.parametrize("form", [f for f in FORMS.values() if "num_splits" in f])


def adapt(model, name="default", **settings):
    torch.manual_seed(2)
    settings = {"r": 4, "lora_alpha": 32, "target_modules": TARGETS, "init_weights": False, **settings}
    task_type = None if isinstance(model, nn.Sequential) else "CAUSAL_LM"
    config = ShardPoolConfig(task_type=task_type, **settings)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        return model
    return get_peft_model(model, config, adapter_name=name).eval()


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def layers_of(model) -> dict[str, ShardPoolLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, ShardPoolLinear)}


# --- what is shared ---


@pytest.mark.parametrize(("e", "parameters"), [(2, 4_997_120), (8, 19_988_480)])
def test_the_budget_is_that_of_a_lora_of_the_equivalent_rank(e, parameters):
    backbone = meta_backbone(
        LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    )
    settings = {"r": 16, "shards_per_vector": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    count = count_config(backbone, ShardPoolConfig(equivalent_rank=e, **settings))
    lora = count_config(backbone, LoraConfig(r=e, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert count == (parameters, 0, parameters, 224)
    assert lora.trainable == parameters


def test_layers_of_one_kind_share_one_pair_of_pools_that_is_registered_once():
    targets = [*TARGETS, "gate_proj"]  # of the same widths as up_proj
    model = adapt(make_tiny_llama(), equivalent_rank=2, shards_per_vector=4, target_modules=targets)
    pools = [m for m in model.modules() if isinstance(m, ShardPool)]
    assert len(pools) == len(targets)
    for target in targets:
        layers = [layer for name, layer in layers_of(model).items() if name.endswith(target)]
        assert len(layers) == 4
        assert len({id(layer.experts("default")) for layer in layers}) == 1
        assert "default" in layers[0].shard_pool_weights
        assert not any("default" in layer.shard_pool_weights for layer in layers[1:])
    assert sum(p.numel() for pool in pools for p in pool.parameters()) == count_parameters(model).trainable


def test_a_layer_is_assembled_from_its_own_choice_by_the_definition():
    model = adapt(make_tiny_llama(dtype=torch.float64), equivalent_rank=2, shards_per_vector=4)
    choices = set()
    for layer in layers_of(model).values():
        pool, index = layer.experts("default"), layer.shard_pool_index["default"]
        A, B = (assembled_naive(p, i, 4) for p, i in ((pool.lora_A, index.index_A), (pool.lora_B, index.index_B)))
        x = torch.randn(3, layer.in_features, dtype=torch.float64)
        torch.testing.assert_close(layer(x), layer.base_layer(x) + 8.0 * x @ A.T @ B, **EXACT)
        assert not torch.equal(index.index_A, index.index_B)  # the pair is dissociated
        choices |= {tuple(index.index_A.tolist()), tuple(index.index_B.tolist())}
    assert len(choices) == 2 * 16


def test_modules_of_one_name_and_two_widths_have_pools_of_their_own():
    model = nn.Sequential()
    for number, width in enumerate((8, 8, 16)):
        block = nn.Module()
        block.proj = nn.Linear(width, 8)
        model.append(block)
        assert number < 3
    adapted = get_peft_model(model, ShardPoolConfig(r=4, equivalent_rank=2, target_modules=["proj"]))
    assert [tuple(m.lora_A.shape) for m in adapted.modules() if isinstance(m, ShardPool)] == [(4, 8), (2, 16)]


def test_pool_a_starts_as_a_whole_matrix_would_and_pool_b_at_zero():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4096, 64, bias=False))
    adapted = get_peft_model(base, ShardPoolConfig(r=8, equivalent_rank=4, shards_per_vector=16, target_modules="0"))
    pool = next(m for m in adapted.modules() if isinstance(m, ShardPool))
    assert 0.99 / 64 < pool.lora_A.abs().max() <= 1 / 64  # 1 / sqrt(4096), whatever the length of a shard
    assert not pool.lora_B.any()


def test_the_choice_follows_the_seed_alone_and_is_saved(tmp_path, tokens):
    models = [adapt(make_tiny_llama(), equivalent_rank=2, index_seed=seed) for seed in (1, 1, 2)]
    chosen = [
        torch.cat([layer.shard_pool_index["default"].index_A for layer in layers_of(m).values()]) for m in models
    ]
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])
    models[0].save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("index_" in key for key in saved) == 2 * len(layers_of(models[0]))
    assert (
        sum(value.numel() for key, value in saved.items() if "lora_" in key) == count_parameters(models[0]).trainable
    )
    config = ShardPoolConfig.from_pretrained(tmp_path)
    config.index_seed = 5  # the file decides
    assert torch.equal(
        logits(PeftModel.from_pretrained(make_tiny_llama(), tmp_path, config=config).eval(), tokens),
        logits(models[0], tokens),
    )


def test_a_file_without_the_choice_is_refused(tmp_path):
    adapt(make_tiny_llama(), equivalent_rank=2).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if "index_B" not in key}
    save_file(kept, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: .*index_B"):
        PeftModel.from_pretrained(make_tiny_llama(), tmp_path)


@over_forms
def test_a_copy_has_pools_of_its_own(tokens, form):
    model = adapt(make_tiny_llama(), **form)
    before, other = logits(model, tokens), copy.deepcopy(model)
    assert torch.equal(logits(other, tokens), before)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if "shard_pool" in name:
                p.add_(1.0)
    assert torch.equal(logits(model, tokens), before)
    assert not torch.equal(logits(other, tokens), before)


@over_forms
def test_the_layers_take_part_in_every_adapter_and_forget_a_deleted_one(tokens, form):
    model = adapt(make_tiny_llama(), "first", **form)
    adapt(model, "second", **{**form, "index_seed": 7, "target_modules": ["up_proj"]})
    before = logits(model, tokens)
    model.set_adapter("second")
    assert not torch.equal(logits(model, tokens), before)
    assert {n.split(".second.")[0][-7:] for n, p in model.named_parameters() if p.requires_grad} == {"weights"}
    model.delete_adapter("second")
    assert torch.equal(logits(model, tokens), before)
    status = model.get_model_status()
    assert status.available_adapters == ["first"]
    assert not any("second" in layer.pool_containers for layer in layers_of(model).values())


def test_training_with_pools_reaches_the_shards_that_some_layer_uses_and_no_others(tokens):
    model = adapt(make_tiny_llama(), equivalent_rank=2, shards_per_vector=2).train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    for target in TARGETS:
        layers = [layer for name, layer in layers_of(model).items() if name.endswith(target)]
        for factor in ("A", "B"):
            gradient = getattr(layers[0].experts("default"), f"lora_{factor}").grad.abs().sum(1) > 0
            used = {int(i) for lay in layers for i in getattr(lay.shard_pool_index["default"], f"index_{factor}")}
            assert {i for i, here in enumerate(gradient.tolist()) if here} == used


@over_forms
def test_an_adapter_of_the_same_config_with_copied_parameters_is_the_same(tokens, tmp_path, form):
    """What TRL does for its reference: it copies parameters, not buffers."""
    adapt(make_tiny_llama(), **form).save_pretrained(tmp_path)
    config = ShardPoolConfig.from_pretrained(tmp_path)
    config.index_seed = 5  # so that the choice is the file's alone
    model = PeftModel.from_pretrained(make_tiny_llama(), tmp_path, config=config, is_trainable=True).eval()
    before = logits(model, tokens)
    model.add_adapter("ref", model.peft_config["default"])
    for name, p in list(model.named_parameters()):
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(p.data)
    model.set_adapter("ref")
    assert torch.equal(logits(model, tokens), before)


# --- what is sampled ---


@over_splits
def test_training_uses_one_part_and_inference_the_mean(form):
    layer = adapt(nn.Sequential(nn.Linear(8, 8)).double(), target_modules="0", **form).base_model.model[0]
    own, x = layer.experts("default"), torch.randn(5, 8, dtype=torch.float64)
    parts = []
    for i in range(form["num_splits"]):
        A, B = own.factors(torch.tensor([i]))
        parts.append(layer.base_layer(x) + 8.0 * x @ A.T @ B)
    A, B = own.factors(None)
    mean = layer.base_layer(x) + 8.0 * x @ A.T @ B
    torch.testing.assert_close(layer(x), mean, **EXACT)
    if form.get("split_factors") != "both":  # a product of two means is not the mean of the products
        torch.testing.assert_close(torch.stack(parts).mean(0), mean, **EXACT)
    layer.train()
    drawn = [layer(x) for _ in range(40)]
    nearest = [min(range(len(parts)), key=lambda i: (out - parts[i]).abs().max()) for out in drawn]
    assert set(nearest) == set(range(len(parts)))
    for out, i in zip(drawn, nearest, strict=True):
        torch.testing.assert_close(out, parts[i], **EXACT)


def test_an_adapter_that_is_added_to_an_evaluated_model_does_not_sample(tokens):
    model = adapt(make_tiny_llama(), "first", target_modules=["q_proj"])
    adapt(model, "second", num_splits=4, lora_dropout=0.5, target_modules=["q_proj", "up_proj"])
    adapt(model, "third", equivalent_rank=2, lora_dropout=0.5, target_modules=["down_proj"])
    for name in ("second", "third"):
        model.set_adapter(name)
        assert torch.equal(logits(model, tokens), logits(model, tokens))


@over_splits
def test_a_split_factor_learns_the_drawn_entries_only_and_starts_as_published(form):
    base = nn.Sequential(nn.Linear(8, 8))
    own = get_peft_model(base, ShardPoolConfig(r=4, target_modules="0", **form)).base_model.model[0].experts("default")
    A, B = own.factors(None)
    assert not B.any()
    assert A.abs().sum(1).all()  # A's start is the same dense matrix for every part
    assert torch.equal(A, own.factors(torch.tensor([1]))[0])
    with torch.no_grad():
        own.lora_B.fill_(1.0)
    for factor, splits in (("lora_A", "splits_A"), ("lora_B", "splits_B")):
        part = getattr(own, splits, None)
        if part is None:
            continue
        A, B = own.factors(torch.tensor([1]))
        (gradient,) = torch.autograd.grad((torch.randn(3, 8) @ A.T @ B).square().sum(), getattr(own, factor))
        assert not gradient[part != 1].any()
        assert gradient[part == 1].any()


def test_layers_and_passes_draw_for_themselves():
    torch.manual_seed(0)
    seen = {}
    model = adapt(make_tiny_llama(), num_splits=4).train()
    for name, layer in layers_of(model).items():
        own, original = layer.experts("default"), layer.experts("default").factors
        own.factors = lambda chosen, name=name, original=original: (
            seen.setdefault(name, []).append(int(chosen)),
            original(chosen),
        )[1]
    for _ in range(30):
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
    assert all(set(draws) == {0, 1, 2, 3} for draws in seen.values())
    assert len({tuple(draws) for draws in seen.values()}) == len(seen) == 16


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_layer_draws_the_same_part_again(tokens, use_reentrant):
    """Without the generator's state put back, a recomputed layer would get the gradient of another part."""
    gradients = []
    for checkpointing in (False, True):
        model = adapt(make_tiny_llama(dtype=torch.float64), num_splits=8, lora_dropout=0.1).train()
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(5)
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **EXACT, msg=name)


# --- one linear map ---


def test_an_adapter_of_its_own_for_each_layer_is_pefts_lora(tokens):
    ours = adapt(make_tiny_llama(dtype=torch.float64), use_rslora=True)
    config = LoraConfig(r=4, lora_alpha=32, use_rslora=True, target_modules=TARGETS, task_type="CAUSAL_LM")
    lora = get_peft_model(make_tiny_llama(dtype=torch.float64), config)
    pairs = []
    others = [m for m in lora.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    for layer, other in zip(layers_of(ours).values(), others, strict=True):
        own, A, B = layer.experts("default"), other.lora_A["default"].weight, other.lora_B["default"].weight
        with torch.no_grad():
            A.copy_(own.lora_A)
            B.copy_(own.lora_B.T)
        pairs.append((own, A, B))
    torch.testing.assert_close(logits(ours, tokens), logits(lora, tokens), **EXACT)
    for model in (ours, lora):
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
    for own, A, B in pairs:
        torch.testing.assert_close(own.lora_A.grad, A.grad, **EXACT)
        torch.testing.assert_close(own.lora_B.grad.T, B.grad, **EXACT)


@over_forms
@pytest.mark.parametrize("training", [False, True])
def test_merging_is_exact_and_can_be_undone(tokens, form, training):
    model = adapt(make_tiny_llama(dtype=torch.float64), **form)
    base = {k: v.clone() for k, v in model.state_dict().items() if "shard_pool" not in k}
    before = logits(model, tokens)
    model.train(training)  # what is merged is what inference uses, whenever it is
    model.merge_adapter()
    model.eval()
    torch.testing.assert_close(logits(model, tokens), before, **EXACT)
    model.unmerge_adapter()
    for key, value in base.items():
        torch.testing.assert_close(model.state_dict()[key], value, **EXACT)
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), before, **EXACT)


@over_forms
def test_merging_into_packed_weights_and_back_leaves_them_bit_identical(tokens, form):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
    model = adapt(nn.Sequential(linear).to("cpu"), target_modules="0", **form)
    x, packed = torch.randn(3, 64), model.base_model.model[0].weight.data.clone()
    before = model(x)
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
    assert torch.equal(model.base_model.model[0].weight.data, packed)
    assert torch.equal(model(x), before)


def test_conv1d_layers_merge_in_their_own_layout(tokens):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=32)).double().eval()
    model = adapt(base, equivalent_rank=2, target_modules=["c_attn", "c_fc"])
    before = logits(model, tokens)
    torch.testing.assert_close(logits(model.merge_and_unload(), tokens), before, **EXACT)


IN_A_PROCESS_WITHOUT_THIS_PACKAGE = """
import sys
from pathlib import Path
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
root = Path(sys.argv[1])
tokens = load_file(root / "tokens.safetensors")["tokens"]
for folder in sorted(p for p in root.iterdir() if (p / "adapter_config.json").exists()):
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    with torch.no_grad():
        logits = PeftModel.from_pretrained(base, folder).eval()(input_ids=tokens).logits
    save_file({"logits": logits}, folder / "logits.safetensors")
assert not any(name.startswith("moe_peft") for name in sys.modules)
"""


def test_stock_peft_loads_the_plain_lora_with_equal_logits(tmp_path, tokens):
    base, before = make_tiny_llama(), {}
    base.save_pretrained(tmp_path / "base")
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    for name, form in FORMS.items():
        model = adapt(make_tiny_llama(), **form)
        before[name] = logits(model, tokens)
        save_lora(model, tmp_path / name)
        assert torch.equal(logits(model, tokens), before[name])  # the model is left as it is
    command = [sys.executable, "-c", IN_A_PROCESS_WITHOUT_THIS_PACKAGE, str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    for name, expected in before.items():
        got = load_file(tmp_path / name / "logits.safetensors")["logits"]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_plain_lora_has_the_rank_and_the_task_and_no_more():
    lora, state = to_lora(adapt(make_tiny_llama(), equivalent_rank=2))
    assert (lora.r, lora.task_type, lora.rank_pattern) == (4, "CAUSAL_LM", {})
    assert len(state) == 2 * 16
    assert {value.shape[0] for key, value in state.items() if "lora_A" in key} == {4}


def test_a_mixture_of_one_is_a_plain_lora_too(tokens):
    settings = {"r": 4, "target_modules": TARGETS, "init_weights": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(make_tiny_llama(), LinearMoeConfig(num_experts=1, num_shared_experts=1, **settings)).eval()
    lora, state = moe_peft.to_lora(model)
    other = get_peft_model(make_tiny_llama(), lora).eval()
    keys = {key.replace(".weight", ".default.weight"): value for key, value in state.items()}
    assert not other.load_state_dict(keys, strict=False).unexpected_keys
    assert lora.r == 8
    torch.testing.assert_close(logits(other, tokens), logits(model, tokens), rtol=1e-5, atol=1e-6)


def test_what_a_plain_lora_cannot_be_is_refused():
    routed = get_peft_model(make_tiny_llama(), LinearMoeConfig(target_modules=TARGETS))
    assert not is_plain(routed)
    with pytest.raises(ValueError, match=r"'default' is routed in 16 layers .*no plain LoRA equals it"):
        to_lora(routed)
    with pytest.raises(ValueError, match=r"`modules_to_save` is \['lm_head'\], but must be None for a plain LoRA"):
        to_lora(adapt(make_tiny_llama(), modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="No layer of this model holds a routed adapter named 'other'"):
        to_lora(adapt(make_tiny_llama()), "other")


# --- precisions, compiling, putting away ---


@over_forms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_bases_and_autocast_keep_the_output_close(tokens, form, dtype):
    exact = logits(adapt(make_tiny_llama(), **form), tokens)
    half = adapt(make_tiny_llama(dtype=dtype), **form)
    close = 0.05 * exact.abs().max().item()
    assert logits(half, tokens).dtype == dtype
    torch.testing.assert_close(logits(half, tokens).float(), exact, rtol=0, atol=close)
    cast = adapt(make_tiny_llama(), **form).train()
    cast.eval() if "num_splits" in form else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = cast(input_ids=tokens, labels=tokens)
    torch.testing.assert_close(output.logits.float(), exact, rtol=0, atol=close)
    output.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in cast.parameters() if p.requires_grad)


@over_forms
@pytest.mark.parametrize("training", [False, True])
def test_it_compiles_into_one_graph(form, training):
    torch._dynamo.reset()
    linears = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    model = adapt(linears, target_modules=["0", "1"], **form).train(training)
    x = torch.randn(5, 8, dtype=torch.float64)
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    outputs, gradients = [], []
    for run in (model, compiled):
        torch.manual_seed(4)
        outputs.append(run(x))
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(outputs[-1].sum(), trained))
    torch.testing.assert_close(outputs[1], outputs[0], **EXACT)
    for got, want in zip(*gradients[::-1], strict=True):
        torch.testing.assert_close(got, want, **EXACT)


@over_forms
def test_weights_that_accelerate_puts_away_come_back_for_every_layer(tokens, form):
    model = adapt(make_tiny_llama(), **form)
    before = logits(model, tokens)
    offloaded = accelerate.cpu_offload(model, execution_device="cpu")
    first = next(iter(layers_of(model).values()))
    assert first.experts("default").lora_A.device.type == "meta"
    assert torch.equal(logits(offloaded, tokens), before)


# --- budgets ---


def test_a_budget_is_met_by_the_equivalent_rank():
    backbone = meta_backbone(make_tiny_llama().config)
    config = ShardPoolConfig(r=8, equivalent_rank=2, lora_alpha=16, target_modules=TARGETS)
    fitted = fit_to_budget(backbone, config, 3 * count_config(backbone, config).trainable)
    assert (fitted.r, fitted.equivalent_rank, fitted.private_rank, fitted.lora_alpha) == (24, 6, 1, 48)
    config = ShardPoolConfig(r=2, target_modules=TARGETS)
    own = fit_to_budget(backbone, config, 3 * count_config(backbone, config).trainable)
    assert (own.r, own.equivalent_rank, own.private_rank) == (6, 6, 6)


# --- refusals ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"`r` is 0, but must be a whole number of at least 1"),
        ({"r": "2:4"}, r"`r` is '2:4', but must be a whole number of at least 1. Layers have one rank"),
        ({"r": True}, r"`r` is True"),
        ({"equivalent_rank": 9}, r"`equivalent_rank` is 9, but must be a whole number from 1 to `r` = 8"),
        ({"equivalent_rank": 0}, r"`equivalent_rank` is 0"),
        ({"equivalent_rank": 2.0}, r"`equivalent_rank` is 2.0"),
        ({"equivalent_rank": 2, "private_rank": 3}, r"`private_rank` is 3, .* from 0 to `equivalent_rank` = 2"),
        ({"equivalent_rank": 2, "private_rank": -1}, r"`private_rank` is -1"),
        (
            {"equivalent_rank": 2, "private_rank": 2},
            r"`private_rank` is 2, but must be below `equivalent_rank` = 2 when `r` is 8. With all 2 ranks private",
        ),
        ({"shards_per_vector": 0}, r"`shards_per_vector` is 0, but must be a whole number of at least 1"),
        ({"shards_per_vector": 2}, r"`shards_per_vector` is 2, but must be 1 when nothing is shared"),
        ({"num_splits": 0}, r"`num_splits` is 0, but must be a whole number of at least 1"),
        ({"num_splits": 256}, r"`num_splits` is 256, but must be at most 255"),
        ({"num_splits": 2, "equivalent_rank": 4}, r"`num_splits` is 2, but must be 1 when layers share pools"),
        ({"num_splits": 2, "split_factors": "b"}, r"`split_factors` is 'b', but must be one of 'B', 'A', 'both'"),
        ({"split_factors": "A"}, r"`split_factors` is 'A', but must be left out when `num_splits` is 1"),
        ({"index_seed": -1}, r"`index_seed` is -1, but must be a whole number of at least 0"),
        ({"index_seed": None}, r"`index_seed` is None"),
        ({"lora_alpha": 0}, r"`lora_alpha` is 0, but must be a positive number"),
        ({"lora_alpha": float("nan")}, r"`lora_alpha` is nan"),
        ({"lora_dropout": 1.0}, r"`lora_dropout` is 1.0, but must be at least 0 and below 1"),
        ({"init_weights": "pissa"}, r"`init_weights` is 'pissa', but must be True or False"),
        ({"use_rslora": "no"}, r"`use_rslora` is 'no', but must be True or False"),
        ({"modules_to_save": "lm_head"}, r"`modules_to_save` is 'lm_head', but must be a list of names"),
        ({"num_experts": 4}, r"`num_experts` is not a field of ShardPoolConfig"),
        ({"equivalent_ranks": 4}, r"`equivalent_ranks` is not a field of ShardPoolConfig. Did you mean 'equivalent_r"),
        ({"target_modules": "q", "layers_to_transform": [0]}, r"`layers_to_transform` cannot be used when"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ShardPoolConfig(**settings)


def test_what_does_not_come_out_even_is_refused():
    with pytest.raises(
        ValueError, match=r"`shards_per_vector` is 3, but must be a divisor of 64, the width of an adapted"
    ):
        adapt(make_tiny_llama(), equivalent_rank=2, shards_per_vector=3)
    with pytest.raises(
        ValueError, match=r"`num_splits` is 3, but must be a divisor of 256, the entries of a factor of rank"
    ):
        adapt(make_tiny_llama(), num_splits=3, target_modules=["q_proj"])
    adapt(make_tiny_llama(), num_splits=3, target_modules=["up_proj"])  # 4 * 96
    with pytest.raises(ValueError, match=r"divisor of 256"):
        adapt(make_tiny_llama(), num_splits=3, split_factors="both", target_modules=["up_proj"])
    with pytest.raises(TypeError, match="Embedding is not supported"):
        adapt(make_tiny_llama(), target_modules=["embed_tokens"])


def test_defaults_follow_from_what_was_given():
    def ranks(**settings):
        config = ShardPoolConfig(**settings)
        return config.r, config.equivalent_rank, config.private_rank, config.shares

    assert ranks() == (8, 8, 8, False)
    assert ranks(equivalent_rank=8, private_rank=0) == (8, 8, 0, True)
    assert ranks(equivalent_rank=2) == (8, 2, 1, True)
    assert ranks(equivalent_rank=1) == (8, 1, 0, True)
