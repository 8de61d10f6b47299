"""FFN mixtures on real blocks: every family against whole experts, the two paths against each other, and what is refused.

The definition is taken at its word here: expert e is the family's own block with expert e merged into its weights, and
the mixture is the weighted sum of what these blocks give.
"""

import ast
import copy
import pickle
import re
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_tiny_llama
from families import FAMILIES, make_family
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from moe_peft import FfnMoeConfig
from moe_peft.balance import switch_loss
from moe_peft.ffn_names import GLU_CLASSES, TWO_MATRIX_CLASSES
from moe_peft.rules import top_1_hard
from moe_peft.tuners.ffn_blocks import find_blocks
from moe_peft.tuners.ffn_fast import FastForward
from moe_peft.tuners.ffn_moe import FfnMoeLinear, MixedBlock


EXACT = {"rtol": 1e-9, "atol": 1e-11}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

RULES = {
    "softmax_top_k": {"top_k": 2},
    "softmax": {"routing": "softmax"},
    "top_1": {"routing": "top_1"},
    "top_p": {"routing": "top_p", "top_p": 0.6},
    "sigmoid": {"routing": "sigmoid_top_k", "top_k": 2},
    "hard": {"routing": "top_1_hard"},
    "straight-through": {"routing": "top_1_straight_through"},
    "null": {"top_k": 2, "num_null_experts": 3},
    "shared": {"top_k": 2, "num_shared_experts": 2},
    "bias": {"top_k": 2, "router_bias": True, "router_scale": 3.0},
}
FAST = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "phi", "gpt_neox", "olmo2", "granite"}
FAST |= {"cohere2", "falcon", "glm4"}


def adapt(model, **settings) -> PeftModel:
    """With experts that do something and a router that has preferences; in eval mode."""
    torch.manual_seed(2)
    settings = {"num_experts": 4, "r": 3, "lora_alpha": 24, "init_weights": False, "router_init_std": 1.0, **settings}
    model = get_peft_model(model, FfnMoeConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("router_bias", "selection_bias")):
                tensor.normal_()
            elif "lora_B" in name:
                tensor.normal_(std=0.3)
    return model


def blocks_of(model: nn.Module) -> list[MixedBlock]:
    found = {id(m.block): m.block for m in model.modules() if isinstance(m, FfnMoeLinear) and m.block is not None}
    return list(found.values())


def slow(model: PeftModel) -> PeftModel:
    """The model with the fast path switched off."""
    for block in blocks_of(model):
        if block.fast is not None:
            block.fast.enabled = False
    return model


def merged_block(block: MixedBlock, parent: nn.Module, expert: int | None) -> nn.Module:
    """The family's own block with the shared experts and expert `expert` merged into its weights; None: no expert."""
    dense = copy.deepcopy(parent)
    dense.__dict__.pop("forward", None)
    for name in block.names.all:
        layer: FfnMoeLinear = getattr(dense, name)
        experts = layer.ffn_moe_experts["default"]
        chosen = list(range(experts.num_routed, len(experts.lora_A))) + ([] if expert is None else [expert])
        delta = sum((experts.lora_B[e].T @ experts.lora_A[e] for e in chosen), torch.zeros(()).double())
        linear = copy.deepcopy(layer.base_layer)
        if chosen:
            linear.weight.data += experts.scaling * (delta.T if type(linear).__name__ == "Conv1D" else delta)
        setattr(dense, name, linear)
    return dense


def definition(block: MixedBlock, parent: nn.Module, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    """The weighted sum over whole experts."""
    first = block.layers[block.names.ins[0]]
    routing = first.ffn_moe_experts["default"].route(x, first.context)
    num_experts = first.num_experts["default"]
    outputs = [merged_block(block, parent, e)(x, *rest) for e in range(num_experts)]
    outputs.append(merged_block(block, parent, None)(x, *rest))
    stacked = torch.stack([output.reshape(-1, x.shape[-1]) for output in outputs], 1)
    weights, index = routing.top_k_weights, routing.top_k_index
    if index is not None:
        weights = weights.new_zeros(len(weights), num_experts + 1).scatter_add(
            1, index.clamp(max=num_experts), weights
        )
    return (weights.unsqueeze(-1) * stacked[:, : weights.shape[1]]).sum(1).view(x.shape)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"opt"}))
def test_a_block_is_the_weighted_sum_of_whole_experts(family, rule):
    base = make_family(family, torch.float64)
    parents = list(find_blocks(base))
    model = adapt(base, **rule)
    block, parent = blocks_of(model)[0], base.get_submodule(parents[0])
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rest = (torch.zeros_like(x),) if family == "bloom" else ()  # which adds the residual inside
    assert (block.fast is not None) == (family in FAST)
    wanted = definition(block, parent, x, *rest)
    torch.testing.assert_close(parent(x, *rest), wanted, **EXACT)
    slow(model)
    torch.testing.assert_close(parent(x, *rest), wanted, **EXACT)
    with model.disable_adapter():
        assert not torch.allclose(parent(x, *rest), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_that_always_gets_one_expert_gets_the_dense_model_with_it_merged(family):
    """OPT has no module for its FFN, so the whole model is compared, for every family."""
    tokens = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(4))
    model = adapt(make_family(family, torch.float64), routing="top_1_hard", router_bias=True)
    dense = make_family(family, torch.float64)
    with torch.no_grad():
        for name, module in model.base_model.model.named_modules():
            if isinstance(module, FfnMoeLinear):
                experts = module.ffn_moe_experts["default"]
                if experts.router_bias is not None:
                    experts.router_bias.copy_(torch.tensor([0.0, 0.0, 1e6, 0.0]))
                linear = dense.get_submodule(name)
                delta = experts.scaling * experts.lora_B[2].T @ experts.lora_A[2]
                linear.weight += delta.T if type(linear).__name__ == "Conv1D" else delta
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, **EXACT)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("family", ["llama", "phi3", "phi", "gpt2", "opt"])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_both_paths_have_the_same_gradients(family, rule, checkpointing):
    tokens = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(4))
    found = []
    for path in (lambda model: model, slow):
        settings = {
            "router_aux_loss_coef": 0.0 if rule.get("routing") == "softmax" else 0.5,
            "target_modules": "all-linear",
        }
        model = path(adapt(make_family(family, torch.float64), **settings, **rule)).train()
        if checkpointing is not None and path is not slow:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model(input_ids=tokens, labels=tokens).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    fast, general = found
    for name, gradient in general.items():
        if gradient is not None:
            torch.testing.assert_close(fast[name], gradient, **EXACT, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", [lambda model: model, slow], ids=["fast", "general"])
def test_a_fresh_adapter_is_the_base_bit_for_bit_whatever_the_router_says(family, path):
    tokens = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(4))
    base = make_family(family)
    before = base(tokens).logits
    settings = {"task_type": "CAUSAL_LM", "router_init_std": 1.0, "lora_dropout": 0.2}
    for rule in ({"top_k": 3}, {"routing": "softmax"}, {"routing": "sigmoid_top_k"}):
        model = path(get_peft_model(copy.deepcopy(base), FfnMoeConfig(**settings, **rule)))
        assert torch.equal(model(tokens).logits, before)
        assert torch.equal(model.eval()(tokens).logits, before)


class Unpackings(TorchDispatchMode):
    """Counts how often a 4-bit weight is read: once per product, whichever way bitsandbytes goes."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in ("bitsandbytes::gemm_4bit", "bitsandbytes::dequantize_4bit")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", [lambda model: model, slow], ids=["fast", "general"])
def test_three_unpackings_per_pass_however_many_experts(tmp_path, path):
    pytest.importorskip("bitsandbytes")
    make_tiny_llama(layers=1).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, device_map={"": "cpu"})
    path(adapt(base, num_experts=8, top_k=4)).train()
    mlp = base.model.layers[0].mlp
    x = torch.randn(2, 33, 64, requires_grad=True)
    with Unpackings() as forward:
        y = mlp(x)
    with Unpackings() as backward:
        y.sum().backward()
    assert (forward.count, backward.count) == (3, 3)


@pytest.mark.parametrize("routing", ["softmax_top_k", "sigmoid_top_k"])
def test_an_adapter_loads_on_a_base_with_layers_on_disk(routing, tokens, tmp_path, monkeypatch):
    """Accelerate brings parameters back from the disk; the selection bias is a buffer."""
    monkeypatch.chdir(tmp_path)  # PEFT makes a folder `tmp` where it stands
    base = make_tiny_llama(layers=2)
    base.save_pretrained(tmp_path / "base")
    model = adapt(base, routing=routing)
    model.save_pretrained(tmp_path / "adapter")
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb"), "cpu")
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    with torch.no_grad():
        wanted = model(tokens).logits
        offloaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", device_map=places, offload_folder=tmp_path / "off"
        )
        places = {f"base_model.model.{name}": place for name, place in places.items()}
        loaded = PeftModel.from_pretrained(
            offloaded, tmp_path / "adapter", device_map=places, offload_folder=tmp_path / "off2"
        )
        torch.testing.assert_close(loaded.eval()(tokens).logits, wanted, **CLOSE)


# --- the fast path steps back, copies, pickles, compiles ---


def test_a_hook_on_a_linear_of_the_block_is_called():
    model = adapt(make_tiny_llama())
    block = blocks_of(model)[0]
    x, seen = torch.randn(2, 5, 64), []
    wanted = block.fast.parent(x)
    handle = block.layers["up_proj"].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    torch.testing.assert_close(block.fast.parent(x), wanted, **CLOSE)
    assert seen == [(2, 5, 2, 96)]
    handle.remove()
    block.fast.parent(x)
    assert len(seen) == 1


def test_a_block_whose_forward_somebody_else_replaces_takes_the_general_path():
    """Liger and others put a function of their own on `mlp.forward` after the adapter is there."""
    model = adapt(make_tiny_llama())
    tokens = torch.randint(1, 99, (2, 6))
    wanted = model(tokens).logits
    for layer in model.base_model.model.model.layers:
        mlp = layer.mlp
        mlp.forward = lambda x, mlp=mlp: mlp.down_proj(nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    torch.testing.assert_close(model(tokens).logits, wanted, **CLOSE)


def test_a_class_of_the_users_own_takes_the_general_path():
    base = make_tiny_llama()
    mlp = base.model.layers[0].mlp
    mlp.__class__ = type("LlamaMLP", (type(mlp),), {"__module__": "mine"})
    assert [block.fast is None for block in blocks_of(adapt(base))] == [True, False, False, False]


@pytest.mark.parametrize("name", sorted(GLU_CLASSES | TWO_MATRIX_CLASSES))
def test_a_class_of_the_fast_path_does_nothing_but_what_the_fast_path_does(name):
    """By transformers' source: Seed-OSS, for one, has a dropout of its own after the last linear."""
    found = sources_of(name)
    assert found
    forms = TWO_MATRIX_FORMS if name in TWO_MATRIX_CLASSES else GLU_FORMS
    assert all(any(re.fullmatch(form, source) for form in forms) for source in found), found


def sources_of(name: str) -> list[str]:
    """The body of `forward` in every class of that name in transformers, as one line with `x` for its argument."""
    bodies = []
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                forward = next(f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "forward")
                argument = forward.args.args[1].arg
                bodies.append(re.sub(rf"\b{argument}\b", "x", "; ".join(map(ast.unparse, forward.body))))
    return bodies


GLU_FORMS = (
    r"(down_proj = |return )self\.down_proj\(self\.act_fn\(self\.gate_proj\(x\)\) \* self\.up_proj\(x\)\)(; return down_proj)?",
    r"(\w+) = self\.gate_up_proj\(x\); gate, \1 = \1\.chunk\(2, dim=-1\); \1 = \1 \* self\.activation_fn\(gate\); "
    r"return self\.down_proj\(\1\)",
)
TWO_MATRIX_FORMS = (
    r"x = self\.(\w+)\(x\); x = self\.act(?:ivation_fn)?\(x\); x = self\.(\w+)\(x\); return x",
    r"x = self\.act\(self\.(\w+)\(x\)\); x = self\.(\w+)\(x\); return x",
)


def test_seed_oss_keeps_the_dropout_at_the_end_of_its_block():
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    settings |= {"num_key_value_heads": 2, "vocab_size": 64, "head_dim": 8, "residual_dropout": 0.99}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("seed_oss", **settings))
    mlp = adapt(base).train().base_model.model.model.layers[0].mlp
    assert (mlp(torch.randn(4, 32)) == 0).float().mean() > 0.9


@contextmanager
def doubled(wrap):
    """Llama's block with another forward at its class."""
    before = LlamaMLP.forward
    LlamaMLP.forward = wrap(lambda self, x: 2 * before(self, x))
    try:
        yield
    finally:
        LlamaMLP.forward = before


@pytest.mark.parametrize("wrap", [lambda f: f, wraps(LlamaMLP.forward)], ids=["plain", "wrapped"])
def test_a_forward_that_is_replaced_at_the_class_is_followed(wrap):
    """Liger and others do so, before the adapter is there or after."""
    x, early = torch.randn(2, 5, 64), adapt(make_tiny_llama(layers=1))
    wanted = 2 * blocks_of(early)[0].fast.parent(x)
    with doubled(wrap):
        late = adapt(make_tiny_llama(layers=1))
        assert blocks_of(late)[0].fast is None
        for model in (early, late):
            torch.testing.assert_close(model.base_model.model.model.layers[0].mlp(x), wanted, **CLOSE)
    torch.testing.assert_close(2 * blocks_of(early)[0].fast.parent(x), wanted, rtol=0, atol=0)


def test_an_activation_that_is_replaced_is_followed():
    model = adapt(make_tiny_llama(layers=1))
    mlp, x = model.base_model.model.model.layers[0].mlp, torch.randn(2, 5, 64)
    before, mlp.act_fn = mlp(x), nn.Tanh()
    after = mlp(x)
    torch.testing.assert_close(after, slow(model) and mlp(x), **CLOSE)
    assert not torch.allclose(after, before)


def test_copies_and_pickles_are_models_of_their_own(tokens):
    model = adapt(make_tiny_llama())
    wanted = model(tokens).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens).logits, wanted)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if "lora_" in name:
                    parameter.zero_()
        assert not torch.equal(other(tokens).logits, wanted)
        assert not {id(block) for block in blocks_of(other)} & {id(block) for block in blocks_of(model)}
        assert all(block.fast.parent in list(other.modules()) for block in blocks_of(other))
    assert torch.equal(model(tokens).logits, wanted)


def test_unloading_gives_the_block_its_forward_back(tokens):
    base = make_tiny_llama()
    before = base(tokens).logits
    unloaded = adapt(base).unload()
    assert not any("forward" in module.__dict__ for module in unloaded.modules())
    assert torch.equal(unloaded(tokens).logits, before)


@pytest.mark.parametrize("balanced", [0.0, 0.5])
def test_the_static_schedule_compiles_into_one_graph(balanced):
    model = adapt(make_tiny_llama(layers=1, dtype=torch.float64), router_aux_loss_coef=balanced).train()
    mlp = model.base_model.model.model.layers[0].mlp
    x = torch.randn(2, 9, 64, dtype=torch.float64)
    found = []
    for run in (mlp, torch.compile(mlp, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append((y, [p.grad.clone() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[1], found[0], **EXACT)


def test_autocast_and_bf16_stay_close_to_fp32():
    model = adapt(make_tiny_llama(layers=1))
    mlp = model.base_model.model.model.layers[0].mlp
    x = torch.randn(2, 9, 64)
    wanted = mlp(x)
    with torch.autocast("cpu", torch.bfloat16):
        fast, general = mlp(x), slow(model) and mlp(x)
    assert fast.dtype == general.dtype == torch.bfloat16
    for found in (fast, general):
        assert (found.float() - wanted).norm() < 0.02 * wanted.norm()


# --- training only ---


@pytest.mark.parametrize("path", [lambda model: model, slow], ids=["fast", "general"])
def test_dropout_touches_what_the_experts_see_and_not_the_frozen_block(path):
    model = path(adapt(make_tiny_llama(layers=1, dtype=torch.float64), lora_dropout=0.3)).train()
    block = blocks_of(model)[0]
    x = torch.randn(1, 40, 64, dtype=torch.float64)
    assert not torch.allclose(block.fast.parent(x), block.fast.parent(x))
    for layer in block.layers.values():
        layer.ffn_moe_experts["default"].lora_B.data.zero_()
    with model.disable_adapter():
        wanted = block.fast.parent(x)
    torch.testing.assert_close(block.fast.parent(x), wanted, **EXACT)


def test_jitter_moves_the_router_alone_and_in_training_only():
    model = adapt(make_tiny_llama(layers=1), routing="softmax", router_jitter_noise=0.5)
    block = blocks_of(model)[0]
    x = torch.randn(1, 6, 64)
    kept = x.clone()
    assert torch.equal(block.fast.parent(x), block.fast.parent(x))
    model.train()
    assert not torch.equal(block.fast.parent(x), block.fast.parent(x))
    for layer in block.layers.values():
        layer.ffn_moe_experts["default"].lora_B.data.zero_()
    torch.testing.assert_close(block.fast.parent(x), block.fast.parent(x), rtol=0, atol=0)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("path", [lambda model: model, slow], ids=["fast", "general"])
def test_the_z_loss_reaches_the_router(path):
    gradients = []
    for coef in (0.0, 0.1):
        model = path(adapt(make_tiny_llama(layers=1, dtype=torch.float64), balance="none", router_z_loss_coef=coef))
        block = blocks_of(model.train())[0]
        experts = block.layers["gate_proj"].ffn_moe_experts["default"]
        x = torch.randn(2, 5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        block.fast.parent(x).sum().backward()
        gradients.append(experts.router.grad)
    router = experts.router.detach().requires_grad_()
    (0.1 * (x.flatten(0, 1) @ router.T).logsumexp(-1).square().mean()).backward()
    torch.testing.assert_close(gradients[1] - gradients[0], router.grad, **EXACT)


@pytest.mark.parametrize("path", [lambda model: model, slow], ids=["fast", "general"])
def test_the_balance_loss_reaches_a_router_that_the_task_cannot_reach(path):
    settings = {"routing": "top_1_hard", "router_aux_loss_coef": 0.3, "target_modules": None}
    model = path(adapt(make_tiny_llama(layers=1, dtype=torch.float64), **settings)).train()
    block = blocks_of(model)[0]
    experts = block.layers["gate_proj"].ffn_moe_experts["default"]
    x = torch.randn(2, 9, 64, dtype=torch.float64)
    block.fast.parent(x).sum().backward()
    router = experts.router.detach().requires_grad_()
    logits = x.flatten(0, 1) @ router.T
    (0.3 * switch_loss(top_1_hard(logits, 1))).backward()
    assert router.grad.abs().sum() > 0
    torch.testing.assert_close(experts.router.grad, router.grad, **EXACT)


# --- what is refused ---


def test_a_part_of_a_block_is_refused():
    with pytest.raises(
        ValueError, match=r"`target_modules` is .*all linears of an FFN block or none.*but not .*gate_proj"
    ):
        adapt(make_tiny_llama(), target_modules=["up_proj", "down_proj", "q_proj"])


def test_a_part_that_is_excluded_is_refused_with_what_was_written():
    with pytest.raises(ValueError, match=r"`target_modules` is 'all-linear', .* but not .*up_proj.*`exclude_modules`"):
        adapt(make_tiny_llama(), target_modules="all-linear", exclude_modules=["up_proj"])


def test_no_tokens_are_no_error():
    model = adapt(make_tiny_llama(layers=1)).train()
    x = torch.zeros(0, 5, 64, requires_grad=True)
    y = model.base_model.model.model.layers[0].mlp(x)
    y.sum().backward()
    assert y.shape == (0, 5, 64)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_targets_without_a_block_are_refused():
    with pytest.raises(
        ValueError, match=r"`target_modules` .*such as gate_proj, up_proj, down_proj.*`peft.LoraConfig`"
    ):
        adapt(make_tiny_llama(), target_modules=["q_proj"])


def test_a_model_without_a_block_is_refused_with_what_was_looked_for():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    with pytest.raises(
        ValueError, match=r"Odd has no FFN block .*Looked for .*down_proj.*that are there: first, second"
    ):
        get_peft_model(Odd(), FfnMoeConfig(target_modules=["first"]))


def test_two_mixtures_at_once_are_refused(tokens):
    model = adapt(make_tiny_llama())
    model.add_adapter("second", FfnMoeConfig(num_experts=3))
    before = model(tokens).logits
    with pytest.raises(ValueError, match="'default' and 'second' cannot be active at once.*one router only"):
        model.base_model.set_adapter(["default", "second"])
    assert torch.equal(model(tokens).logits, before)


def test_rows_that_name_their_mixture_are_refused(tokens):
    model = adapt(make_tiny_llama())
    with pytest.raises(ValueError, match="`adapter_names` asks for 'default', an FFN mixture.*separate batches"):
        model(input_ids=tokens, adapter_names=["default", "__base__", "default"])
    base_only = model(input_ids=tokens, adapter_names=["__base__"] * 3).logits
    with model.disable_adapter():
        torch.testing.assert_close(base_only, model(tokens).logits)


def test_closing_a_block_that_was_not_opened_is_refused():
    model = slow(adapt(make_tiny_llama()))
    block = blocks_of(model)[0]
    with pytest.raises(RuntimeError, match="`down_proj` of an FFN mixture was called before gate_proj and up_proj"):
        block.layers["down_proj"](torch.randn(1, 2, 96))


def test_the_fast_path_is_only_installed_once():
    model = adapt(make_tiny_llama())
    model.add_adapter("second", FfnMoeConfig(num_experts=3))
    assert len(blocks_of(model)) == 4
    assert all(isinstance(block.fast, FastForward) for block in blocks_of(model))
