"""Bottleneck experts with names: the definition, the gates as published, what stays frozen, and what is refused."""

import re

import pytest
import torch
from conftest import make_tiny_llama
from families import make_family
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

from moe_peft import BottleneckMoeConfig
from moe_peft.bottleneck import bottleneck_experts, bottleneck_experts_naive, pooled
from moe_peft.budget import count_parameters
from moe_peft.report import routing_report
from moe_peft.tuners.bottleneck_moe import BottleneckExperts, BottleneckMoeLinear, GateContext, second_linears
from moe_peft.watch import find_routers


EXACT = {"rtol": 1e-9, "atol": 1e-11}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
DOMAINS = ["law", "medicine", "code"]
T, D_IN, D_OUT = 20, 12, 7
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 100,
}


def experts(r: int = 0, domains: int = 3, **settings) -> BottleneckExperts:
    """In fp64, with every weight drawn."""
    torch.manual_seed(0)
    config = BottleneckMoeConfig(**{"domains": DOMAINS, "gate_size": 5, "bottleneck_size": 4, "r": r, **settings})
    module = BottleneckExperts(config, D_IN, D_OUT, domains, r).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def adapted(model: nn.Module, name: str = "default", **settings) -> PeftModel:
    torch.manual_seed(2)
    settings = {"domains": DOMAINS, "gate_size": 8, "gate_dropout": None, "init_weights": False, **settings}
    return get_peft_model(model, BottleneckMoeConfig(**settings), adapter_name=name).eval()


def roberta(kind=RobertaForMaskedLM, **settings):
    torch.manual_seed(0)
    return kind(RobertaConfig(**{**TINY, "max_position_embeddings": 40, "pad_token_id": 0, **settings})).eval()


def layers_of(model) -> dict[str, BottleneckMoeLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, BottleneckMoeLinear)}


# --- the experts ---


def gradients(compute, x, *weights):
    leaves = [w.clone().requires_grad_() for w in (x, *weights)]
    out = compute(*leaves)
    return [out.detach(), *torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), leaves)]


def test_the_dense_products_are_the_definition():
    torch.manual_seed(0)
    m = experts()
    x, weights = torch.randn(T, D_IN).double(), torch.rand(T, 3).double()
    factors = (m.down.detach(), m.down_bias.detach(), m.up.detach(), m.up_bias.detach())
    fast, naive = (gradients(f, x, *factors, weights) for f in (bottleneck_experts, bottleneck_experts_naive))
    for a, b in zip(fast, naive, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    alone = bottleneck_experts(x, *factors, None)
    torch.testing.assert_close(alone, bottleneck_experts_naive(x, *factors, torch.ones(T, 3).double()), **EXACT)


def published_gate(m: BottleneckExperts, q: torch.Tensor) -> torch.Tensor:
    """As a stack of modules, in the order of the released code, or the paper's two matrices."""
    if m.gate == "sigmoid":
        return torch.sigmoid(torch.sigmoid(q @ m.router_in.T) @ m.router_out.T)
    stack = nn.Sequential()
    for name in ("router_in", "router_mid_1", "router_mid_2", "router_out"):
        weight, bias = getattr(m, name), getattr(m, f"{name}_bias")
        linear = nn.Linear(weight.shape[1], weight.shape[0]).double()
        linear.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
        if name != "router_in":
            stack.append(nn.ReLU())
        stack.append(nn.Dropout(0.2)).append(linear)
    return stack.eval()(q).softmax(-1)


@pytest.mark.parametrize("gate", ["mlp", "sigmoid"])
@pytest.mark.parametrize("gate_ffn", [False, True])
@pytest.mark.parametrize("r", [0, 2])
def test_a_layer_is_the_published_sum(gate, gate_ffn, r):
    m = experts(r, gate=gate, gate_input="token", gate_ffn=gate_ffn).eval()
    torch.manual_seed(1)
    x, y = torch.randn(T, D_IN).double(), torch.randn(T, D_OUT).double()
    g = published_gate(m, x)
    assert g.shape == (T, 3 + (gate == "mlp" or gate_ffn))
    expected = (g[:, 3:] if gate_ffn else 1) * y
    expected = expected + bottleneck_experts_naive(x, m.down, m.down_bias, m.up, m.up_bias, g[:, :3])
    if r:
        expected = expected + 16 / r * x @ m.lora_A[0].T @ m.lora_B[0]
    torch.testing.assert_close(m(x, y, GateContext()), expected, **EXACT)


@pytest.mark.parametrize("last", [False, True])
def test_a_gate_of_sequences_sees_the_tokens_that_it_may_and_no_others(last):
    x = torch.randn(3, 5, 4).double()
    seen = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).unsqueeze(-1).double()
    expected = [x[0, 2] if last else x[0, 1:3].mean(0), x[1, 4] if last else x[1].mean(0), torch.zeros(4).double()]
    torch.testing.assert_close(pooled(x, seen, last), torch.stack(expected), **EXACT)
    x[0, 3:] = torch.inf  # what is not seen may hold anything
    torch.testing.assert_close(pooled(x, seen, last), torch.stack(expected), **EXACT)


# --- sizes ---


@pytest.mark.parametrize("layers", [1, 2])
def test_parameters_are_as_many_as_published(layers):
    """RoBERTa-large: 256 * 4096 + 256 + 256 * 1024 + 1024 for each adapter and layer."""
    config = RobertaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, vocab_size=50
    )
    with torch.device("meta"):
        model = RobertaForMaskedLM(config)
    chosen = None if layers == 2 else [7]
    settings = BottleneckMoeConfig(domains=["law"], gate="none", layers_to_transform=chosen)
    model = get_peft_model(model, settings, low_cpu_mem_usage=True)
    assert sorted(settings.target_modules) == [f"layer.{n}.output.dense" for n in ((11, 7) if layers == 2 else (7,))]
    assert count_parameters(model).trainable == layers * 1_312_000
    gate = 768 * 4096 + 768 + 2 * (768 * 768 + 768) + 768 * 2 + 2
    model.add_adapter("gated", BottleneckMoeConfig(domains=["law"], layers_to_transform=chosen))
    model.set_adapter("gated")
    count = count_parameters(model, "gated")
    assert (count.trainable, count.router, count.active) == (
        layers * (1_312_000 + gate),
        layers * gate,
        count.trainable,
    )


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"layers.1.mlp.down_proj"}),
        ("opt", {"layers.1.fc2"}),
        ("gpt2", {"h.1.mlp.c_proj"}),
        ("bloom", {"h.1.mlp.dense_4h_to_h"}),
        ("phi", {"layers.1.mlp.fc2"}),
    ],
)
def test_the_second_linear_of_an_ffn_is_found(family, expected):
    assert second_linears(make_family(family), None) == expected  # of 2 layers, round(2 * 7 / 24) = round(2 * 11 / 24)
    model = adapted(make_family(family), gate="sigmoid")
    assert all(layer.in_features == 64 or family == "bloom" for layer in layers_of(model).values())
    assert len(layers_of(model)) == 1


def test_the_attention_of_an_encoder_is_left_alone():
    bert = BertForMaskedLM(BertConfig(**TINY))
    assert second_linears(bert, None) == {"layer.1.output.dense", "layer.2.output.dense"}
    assert all(layer.in_features == 48 for layer in layers_of(adapted(bert)).values())


def test_a_model_without_ffns_is_refused():
    with pytest.raises(ValueError, match="Please specify `target_modules`.* no FFN of this model"):
        adapted(nn.Sequential(nn.Linear(3, 3)))


# --- in a model ---


@pytest.mark.parametrize("gate_input", ["mean", "last_nonpad"])
@pytest.mark.parametrize("padded", [False, True])
def test_generation_keeps_what_the_prompt_decided(tokens, gate_input, padded):
    model = adapted(make_tiny_llama(dtype=torch.float64), gate_input=gate_input, task_type="CAUSAL_LM")
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


def gate_weights(model, **batch) -> torch.Tensor:
    """Of the first adapted layer, `[B, S, N]`."""
    seen = []
    experts = next(iter(layers_of(model).values())).experts("default")
    original = experts.gates
    experts.gates = lambda x, context: (
        seen.append(original(x, context).view(*x.shape[:2], -1)) or seen[-1].flatten(0, 1)
    )
    with torch.no_grad():
        model(**batch)
    experts.gates = original
    return seen[0]


@pytest.mark.parametrize("gate_input", ["mean", "last_nonpad"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_decision(tokens, gate_input, side):
    model = adapted(roberta(), gate_input=gate_input)
    whole = gate_weights(model, input_ids=tokens)
    assert not torch.allclose(whole[0, 0], whole[1, 0])
    torch.testing.assert_close(whole, whole[:, :1].expand_as(whole))
    padding = torch.full((3, 4), 7)
    order = 1 if side == "left" else -1
    rows = torch.cat((padding, tokens)[::order], 1)
    mask = torch.cat((torch.zeros(3, 4).long(), torch.ones_like(tokens))[::order], 1)
    positions = mask.cumsum(1)  # RoBERTa counts from its pad token on, which is 0 here
    padded = gate_weights(model, input_ids=rows, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(padded[:, 0], whole[:, 0], **CLOSE)


def test_a_decoders_gate_sees_the_prompt_alone_while_it_learns(tokens):
    model = adapted(make_tiny_llama(), gate_input="mean", gate_dropout=0.0, task_type="CAUSAL_LM").train()
    labels = tokens.clone()
    labels[:, :6] = -100
    first = gate_weights(model, input_ids=tokens, labels=labels)
    other = tokens.clone()
    other[:, 6:] = 5
    torch.testing.assert_close(gate_weights(model, input_ids=other, labels=labels), first)
    with pytest.raises(ValueError, match="`gate_input` is 'mean' or 'last_nonpad', but must be 'token' where"):
        model(input_ids=tokens)
    with pytest.raises(ValueError, match="`gate_input` is .* a row has no prompt before its first label"):
        model(input_ids=tokens, labels=tokens)


@pytest.mark.parametrize("kind", [RobertaForSequenceClassification, LlamaForSequenceClassification])
@pytest.mark.parametrize("gate", ["mlp", "sigmoid"])
def test_sequences_are_classified(kind, gate, tokens, tmp_path):
    def base():
        if kind is RobertaForSequenceClassification:
            return roberta(kind, num_labels=3)
        torch.manual_seed(0)
        return kind(
            make_tiny_llama().config.__class__(
                **{**TINY, "num_key_value_heads": 2, "num_labels": 3, "pad_token_id": 0}
            )
        )

    model = adapted(base(), gate=gate, r=4, task_type="SEQ_CLS", gate_dropout=None).train()
    labels = torch.tensor([0, 1, 2])
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert any("modules_to_save" in name for name, p in model.named_parameters() if p.requires_grad)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    batch = {"input_ids": tokens, "attention_mask": mask}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


def test_the_task_has_a_lora_on_every_layer_and_domains_on_two():
    model = adapted(make_tiny_llama(), r=2)
    assert model.peft_config["default"].task_modules == {"q_proj", "v_proj"}
    held = {name.partition("layers.")[2]: layer.experts("default") for name, layer in layers_of(model).items()}
    assert {name for name, e in held.items() if e.domains} == {"1.mlp.down_proj", "2.mlp.down_proj"}
    assert {name for name, e in held.items() if e.r} == {f"{n}.self_attn.{p}_proj" for n in range(4) for p in "qv"}
    everywhere = adapted(make_tiny_llama(), r=2, task_modules="all-linear")
    assert len(layers_of(everywhere)) == 4 * 7
    assert sum(bool(layer.experts("default").domains) for layer in layers_of(everywhere).values()) == 2


def test_frozen_domains_stay_frozen(tokens):
    model = adapted(make_tiny_llama(), freeze_domains=True, gate="sigmoid", r=2, task_type="CAUSAL_LM").train()

    def trained():
        return {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}

    expected = {"router_in", "router_out", "lora_A", "lora_B"}
    assert trained() == expected
    with model.disable_adapter():
        model(input_ids=tokens)
    assert trained() == expected
    model.add_adapter("other", BottleneckMoeConfig(domains=["x"], gate="none", task_type="CAUSAL_LM"))
    model.set_adapter("other")
    assert trained() == {"down", "down_bias", "up", "up_bias"}
    model.set_adapter("default")
    assert trained() == expected
    before = {
        name: p.detach().clone() for name, p in model.named_parameters() if re.search(r"\.(up|down)(_bias)?$", name)
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert [name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])] == []


MERGES = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_adapter": lambda model: model.merge_adapter(),
    "a layer": lambda model: next(iter(layers_of(model).values())).merge(),
}


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_merging_is_refused_before_anything_is_touched(tokens, merge):
    model = adapted(make_tiny_llama(), gate="none")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="'default' cannot be merged.* a GELU stands between .*Serve it unmerged"):
        merge(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(layer.merged for layer in layers_of(model).values())


def test_a_weighed_ffn_stands_alone(tokens):
    model = adapted(make_tiny_llama(), gate="mlp", gate_input="token", gate_ffn=True, init_weights=True)
    with torch.no_grad():
        changed = model(input_ids=tokens).logits
        with model.disable_adapter():
            assert not torch.allclose(
                model(input_ids=tokens).logits, changed
            )  # published: fresh, it changes the model
    model.add_adapter("other", BottleneckMoeConfig(domains=["x"], gate="none"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="`gate_ffn` = True: it weighs the frozen layer.*Activate it alone"):
        model(input_ids=tokens)


def test_the_sources_have_names_and_loads(tokens):
    model = adapted(make_tiny_llama(), gate="mlp", gate_input="last_nonpad", r=2)
    for name, layer in layers_of(model).items():
        assert layer.expert_names("default") == ([*DOMAINS, "ffn"] if "down_proj" in name else [])
    assert adapted(make_tiny_llama(), gate="sigmoid").peft_config["default"].sources == DOMAINS
    assert set(find_routers(model)) == {f"model.layers.{n}.mlp.down_proj" for n in (1, 2)}
    report = routing_report(model, {"some": [{"input_ids": tokens}]})
    assert {len(by_source) for counts in report.counts.values() for by_source in counts} == {4}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"domains": None}, "`domains` is None, but must be a list of names, at least one. Name what"),
        ({"domains": []}, "`domains` is [], but must be a list of names"),
        ({"domains": "law"}, "`domains` is 'law', but must be a list of names"),
        ({"domains": ["law", " "]}, "' ' is no name"),
        ({"domains": ["a", "b", "a"]}, "but must be all different. Two domains are called 'a'"),
        ({"domains": ["ffn"]}, "must be names other than 'ffn'"),
        ({"gate": "softmax"}, "`gate` is 'softmax', but must be one of 'mlp', 'sigmoid', 'none'"),
        ({"gate_input": "last"}, "`gate_input` is 'last', but must be one of 'token', 'mean', 'last_nonpad'"),
        ({"gate": "none", "gate_input": "mean"}, "`gate_input` is 'mean', but must be left out with `gate` = 'none'"),
        ({"gate": "none", "gate_ffn": True}, "`gate_ffn` is True, but must be left out with `gate` = 'none'"),
        (
            {"gate": "sigmoid", "gate_dropout": 0.1},
            "`gate_dropout` is 0.1, but must be left out with `gate` = 'sigmoid'",
        ),
        ({"gate_dropout": 1.0}, "`gate_dropout` is 1.0, but must be at least 0 and below 1"),
        ({"gate_size": 0}, "`gate_size` is 0, but must be a whole number of at least 1"),
        ({"bottleneck_size": 0}, "`bottleneck_size` is 0, but must be a whole number of at least 1, or None"),
        ({"r": -1}, "`r` is -1, but must be a whole number of at least 0"),
        ({"r": 2, "lora_alpha": 0}, "`lora_alpha` is 0, but must be a positive number"),
        ({"task_modules": ["q_proj"]}, "`task_modules` is ['q_proj'], but must be left out with `r` = 0"),
        ({"gate": "none", "freeze_domains": True}, "nothing is left to train: set `gate` or `r`"),
        ({"freeze_domains": "yes"}, "`freeze_domains` is 'yes', but must be True or False"),
        ({"domain": ["law"]}, "`domain` is not a field of BottleneckMoeConfig. Did you mean 'domains'?"),
    ],
    ids=str,
)
def test_what_a_config_refuses(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BottleneckMoeConfig(**{"domains": ["law"], **settings})


def test_defaults_are_those_published():
    config = BottleneckMoeConfig(domains=["law"])
    assert (config.gate, config.gate_input, config.gate_dropout, config.gate_size) == ("mlp", "last_nonpad", 0.2, 768)
    assert BottleneckMoeConfig(domains=["law"], gate="sigmoid").gate_input == "token"
    assert BottleneckMoeConfig(domains=["law"], gate="none").gate_input is None
