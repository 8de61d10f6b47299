"""Ranks as experts: the rules against their definitions, the bias that only selects, and what a config refuses."""

import dataclasses
import math
import re

import pytest
import torch
from conftest import make_tiny_llama
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from moe_peft import RankMoeConfig
from moe_peft.budget import count_parameters
from moe_peft.context import RoutingContext
from moe_peft.rank_config import SELF
from moe_peft.rank_rules import moram_naive, own_logits, rank_top_k, self_activated, smora_naive
from moe_peft.report import routing_report
from moe_peft.routing import assignments, dense_weights
from moe_peft.tuners.rank_moe import RankExperts, RankMoeLinear
from moe_peft.watch import find_routers, read_windows


EXACT = {"rtol": 1e-9, "atol": 1e-11}
T, R, D_IN, D_OUT = 40, 12, 10, 7


def experts(frozen: int = 0, training: bool = True, **settings) -> RankExperts:
    """In fp64, with every weight drawn."""
    torch.manual_seed(0)
    config = RankMoeConfig(**{"r": R, "top_k": 4, "lora_alpha": 3.0, "init_weights": False, **settings})
    module = RankExperts(config, D_IN, D_OUT, frozen, R).double().train(training)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    if module.selection_bias is not None:
        module.selection_bias.normal_(std=0.3)
    return module


def inputs(tokens: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(tokens, D_IN, dtype=torch.float64), torch.randn(tokens, D_OUT, dtype=torch.float64)


def outcome(module: RankExperts, compute, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and every gradient under one cotangent."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    out = compute(x, y)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}
    return {"out": out.detach(), "x": x.grad, **gradients}


def by_definition(module: RankExperts):
    A, B = (w.flatten(0, 1) for w in (module.lora_A, module.lora_B))
    if not module.self_activated:

        def smora(x, y):
            out = smora_naive(x, A, B, module.router, 4, module.selection_bias, module.bias_in_gates)
            return y + module.scaling * out

        return smora
    lowest = None if module.training or module.lowest is None else module.lowest * module.temperature
    if module.frozen_A is not None:
        A = torch.cat((module.frozen_A.flatten(0, 1), A))
        B = torch.cat((module.frozen_B.flatten(0, 1), module.scaling * B))
        return lambda x, y: y + moram_naive(x, A, B, 4, module.temperature, lowest)
    return lambda x, y: y + module.scaling * moram_naive(x, A, B, 4, module.temperature, lowest)


CASES = {
    "SMoRA": {},
    "no bias": {"balance": "none"},
    "bias in gates": {"bias_in_gates": True},
    "shared rows": {"rank_partition": 2},
    "rslora": {"use_rslora": True},
    "all ranks": {"top_k": R},
    "MoRAM": {"routing": SELF, "temperature": 0.1},
    "threshold": {"routing": SELF, "temperature": 0.3, "threshold": 0.3},
    "earlier tasks": {"routing": SELF, "temperature": 0.1, "threshold": 0.3, "frozen": 5},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", [case for name, case in CASES.items() if name != "all ranks"], ids=str)
def test_the_layer_is_the_definition_with_every_gradient(settings, training):
    module = experts(training=training, **settings)
    if module.selection_bias is not None and module.partition > 1:
        module.selection_bias.copy_(module.selection_bias[::2].repeat_interleave(2))  # as equal loads leave it
    x, y = inputs()
    ours = outcome(module, lambda x, y: module(x, y, RoutingContext()), x, y)
    for name, expected in outcome(module, by_definition(module), x, y).items():
        torch.testing.assert_close(ours[name], expected, **EXACT, msg=name)
    assert all(ours[name].any() for name in ours)


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
@pytest.mark.parametrize("tokens", [1, 5, T])
def test_few_tokens_without_gradient_take_the_shorter_way_to_the_same_place(settings, tokens):
    module = experts(training=False, **settings)
    x, y = inputs(tokens)
    with torch.no_grad():
        short = module(x, y, RoutingContext())
    torch.testing.assert_close(short, module(x, y, RoutingContext()).detach(), **EXACT)


def test_no_tokens_are_no_error():
    for settings in CASES.values():
        module = experts(training=False, **settings)
        x, y = inputs(0)
        assert module(x, y, RoutingContext()).shape == y.shape


def test_all_ranks_with_equal_scores_are_pefts_lora_of_the_same_alpha_and_r():
    module = experts(top_k=R, balance="none")
    nn.init.zeros_(module.router)
    x, y = inputs()
    A, B = (w.flatten(0, 1) for w in (module.lora_A, module.lora_B))
    torch.testing.assert_close(module(x, y, RoutingContext()), y + 3.0 / R * x @ A.T @ B, **EXACT)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_scale_divides_by_what_the_weights_sum_to(use_rslora):
    by = math.sqrt if use_rslora else float
    assert experts(use_rslora=use_rslora).scaling == 3.0 / by(4)
    assert experts(use_rslora=use_rslora, routing=SELF).scaling == 3.0 / by(R)


# --- the rules ---


def test_gates_sum_to_k_and_the_bias_moves_the_choice_alone():
    logits = torch.randn(T, R, dtype=torch.float64)
    bias = torch.zeros(R, dtype=torch.float64)
    bias[3], bias[5] = 5.0, -5.0
    routing = rank_top_k(logits, 4, bias)
    torch.testing.assert_close(routing.top_k_weights.sum(1), torch.full((T,), 4.0, dtype=torch.float64))
    chosen = assignments(routing)
    assert chosen[:, 3].all()
    assert not chosen[:, 5].any()
    scores = logits.sigmoid() * chosen
    torch.testing.assert_close(dense_weights(routing), 4 * scores / scores.sum(1, keepdim=True))
    biased = rank_top_k(logits, 4, bias, bias_in_gates=True)
    assert torch.equal(biased.top_k_index.sort().values, routing.top_k_index.sort().values)
    assert (dense_weights(biased)[:, 3] > dense_weights(routing)[:, 3]).all()


def test_the_bias_gets_no_gradient_and_stays_fp32_in_any_dtype():
    for dtype in (torch.bfloat16, torch.float64):
        module = experts()
        before = module.selection_bias.clone()
        module.to(dtype)
        assert torch.equal(module.selection_bias, before)
        assert module.selection_bias.dtype == torch.float32
        assert "selection_bias" not in dict(module.named_parameters())


def test_logits_far_below_zero_still_have_gates():
    routing = rank_top_k(torch.full((1, R), -200.0), 4)
    assert routing.top_k_weights.isfinite().all()


def test_responses_that_are_zero_are_shared_evenly():
    zeros = torch.zeros(2, R, requires_grad=True)
    routing = self_activated(own_logits(zeros, 0.03), 4)
    torch.testing.assert_close(routing.top_k_weights, torch.full((2, 4), 0.25))
    routing.top_k_weights.square().sum().backward()
    assert zeros.grad.isfinite().all()


def test_a_negative_response_is_never_preferred_and_a_rank_below_the_threshold_leaves_its_slot_empty():
    responses = torch.tensor([[3.0, -4.0, 0.1, 0.2]])
    routing = self_activated(own_logits(responses, 0.5), 2, lowest=0.5 / 0.5)
    assert routing.top_k_index.tolist() == [[0, 4]]  # 3 and 0.2, the latter cut
    n = responses / 25.05**0.5
    kept = torch.exp(n[0, 0] / 0.5) / (torch.exp(n[0, 0] / 0.5) + torch.exp(n[0, 3] / 0.5))
    torch.testing.assert_close(routing.top_k_weights, torch.tensor([[kept, 0.0]]))


def test_the_threshold_is_of_inference_alone():
    module = experts(routing=SELF, threshold=1.0)
    x, y = inputs()
    assert not torch.allclose(module(x, y, RoutingContext()), y)
    torch.testing.assert_close(module.eval()(x, y, RoutingContext()), y, **EXACT)


# --- counts, reports, the model ---

TARGETS = {"target_modules": ["up_proj"]}


def test_a_token_uses_the_router_and_the_ranks_it_visits():
    count = count_parameters(get_peft_model(make_tiny_llama(), RankMoeConfig(r=16, top_k=4, **TARGETS)))
    assert count.layers == 4
    assert count.router == 4 * 16 * 64
    assert count.trainable == 4 * 16 * (64 + 96) + count.router
    assert count.active == 4 * 4 * (64 + 96) + count.router
    shared = count_parameters(get_peft_model(make_tiny_llama(), RankMoeConfig(r=16, rank_partition=4, **TARGETS)))
    assert shared.router == count.router // 4
    own = count_parameters(get_peft_model(make_tiny_llama(), RankMoeConfig(r=16, top_k=4, routing=SELF, **TARGETS)))
    assert (own.router, own.trainable, own.active) == (0, 4 * 16 * (64 + 96), 4 * (16 * 64 + 4 * 96))


@pytest.mark.parametrize("settings", [{}, {"rank_partition": 2}, {"routing": SELF}], ids=str)
def test_the_report_knows_what_ranks_did(tokens, settings):
    model = get_peft_model(make_tiny_llama(), RankMoeConfig(r=8, top_k=2, **settings, **TARGETS))
    report = routing_report(model, {"a": [{"input_ids": tokens}], "b": [{"input_ids": tokens[:1]}]})
    assert len(report.counts) == 4
    for rows in report.counts.values():
        assert [sum(row) for row in rows] == [2 * tokens.numel(), 2 * tokens[:1].numel()]
        assert len(rows[0]) == 8


def test_training_counts_where_somebody_watches(tokens):
    model = get_peft_model(make_tiny_llama(), RankMoeConfig(r=8, top_k=2, routing=SELF, init_weights=False, **TARGETS))
    routers = find_routers(model)
    next(iter(routers.values())).state.reset()
    context = model.base_model.model.model.layers[0].mlp.up_proj.context
    context.watching = True
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    windows = read_windows(routers)
    assert {w.tokens for w in windows.values()} == {tokens.numel()}


def test_a_bias_is_saved_loaded_and_used(tokens, tmp_path):
    def adapted(seed):
        torch.manual_seed(seed)
        config = RankMoeConfig(r=8, top_k=2, init_weights=False, lora_alpha=64, task_type="CAUSAL_LM", **TARGETS)
        return get_peft_model(make_tiny_llama(), config).eval()

    model = adapted(0)
    before = model(tokens).logits
    for router in find_routers(model).values():
        router.selection_bias.copy_(torch.linspace(-1, 1, 8))
    biased = model(tokens).logits
    assert not torch.equal(biased, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_tiny_llama(), tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, biased)
    assert {r.selection_bias.dtype for r in find_routers(loaded).values()} == {torch.float32}


def test_an_adapter_made_from_the_config_of_another_chooses_as_it_does(tokens):
    """TRL's reference adapter: it copies the parameters, and the bias must not be left behind."""
    config = RankMoeConfig(r=8, top_k=2, init_weights=False, lora_alpha=64, **TARGETS)
    model = get_peft_model(make_tiny_llama(), config).eval()
    for router in find_routers(model).values():
        router.selection_bias.copy_(torch.linspace(-1, 1, 8))
    before = model(tokens).logits
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(model(tokens).logits, before)
    model.add_adapter("other", dataclasses.replace(config))
    biases = [m.selection_bias for n, m in model.named_modules() if n.endswith("experts.other")]
    assert biases
    assert not any(bias.any() for bias in biases)


@pytest.mark.parametrize("settings", [{}, {"routing": SELF}], ids=str)
def test_a_single_rank_is_pefts_lora_and_merges(tokens, settings):
    lora = get_peft_model(make_tiny_llama(dtype=torch.float64), LoraConfig(r=1, lora_alpha=8, **TARGETS)).eval()
    ours = get_peft_model(
        make_tiny_llama(dtype=torch.float64),
        RankMoeConfig(r=1, lora_alpha=8, init_weights=False, **settings, **TARGETS),
    ).eval()
    layers = [m for m in lora.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    for layer, mine in zip(layers, (m for m in ours.modules() if isinstance(m, RankMoeLinear)), strict=True):
        layer.lora_A["default"].weight.data.copy_(mine.experts("default").lora_A[0])
        layer.lora_B["default"].weight.data.copy_(mine.experts("default").lora_B[0].T)
    before = ours(tokens).logits
    torch.testing.assert_close(lora(tokens).logits, before, **EXACT)
    torch.testing.assert_close(ours.merge_and_unload()(tokens).logits, before, **EXACT)


def test_a_single_rank_under_a_threshold_is_routed():
    model = get_peft_model(make_tiny_llama(), RankMoeConfig(r=1, routing=SELF, threshold=0.0, **TARGETS))
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()


@pytest.mark.parametrize(
    "settings",
    [{}, {"balance": "none", "rank_partition": 2}, {"balance": "switch"}, {"routing": SELF, "threshold": 0.2}],
    ids=str,
)
def test_a_compiled_layer_computes_the_same(settings):
    module = experts(training=True, **settings)
    x, y = inputs()
    context = RoutingContext()
    expected = outcome(module, lambda x, y: module(x, y, context), x, y)
    compiled = torch.compile(lambda x, y: module(x, y, context), backend="aot_eager")
    for name, value in outcome(module, compiled, x, y).items():
        torch.testing.assert_close(value, expected[name], **EXACT, msg=name)


# --- the config ---

OTHER_VALUES = {
    "r": [4, 8],
    "top_k": 2,
    "routing": SELF,
    "rank_partition": 2,
    "bias_in_gates": True,
    "temperature": 0.5,
    "threshold": 0.25,
    "balance": "switch",
    "frozen_r": [8, "4:8"],
    "lora_alpha": 7.5,
    "use_rslora": True,
    "router_init_std": 0.02,
    "router_scale": 2.0,
}
NEEDS = dict.fromkeys(("temperature", "threshold", "frozen_r"), {"routing": SELF})


def test_the_table_above_knows_every_further_field():
    from moe_peft.config import MoeConfig

    ours = {field.name for field in dataclasses.fields(RankMoeConfig)}
    assert ours - {field.name for field in dataclasses.fields(MoeConfig)} <= OTHER_VALUES.keys()
    defaults = RankMoeConfig()
    assert [name for name, value in OTHER_VALUES.items() if getattr(defaults, name) == value] == []


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_every_field_survives_json(tmp_path, field):
    config = RankMoeConfig(**{field: OTHER_VALUES[field], **NEEDS.get(field, {})})
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is RankMoeConfig
    assert loaded == config
    assert getattr(loaded, field) == OTHER_VALUES[field]


@pytest.mark.parametrize(
    ("given", "filled_in"),
    [
        ({}, {"r": 64, "top_k": 8, "balance": "bias", "temperature": None, "num_experts": None}),
        ({"r": "4:16"}, {"top_k": 4}),
        ({"r": 1}, {"top_k": 1}),
        ({"routing": SELF}, {"top_k": 8, "balance": "none", "temperature": 0.03, "threshold": None}),
    ],
    ids=str,
)
def test_what_is_left_out_follows_from_the_rest(given, filled_in):
    config = RankMoeConfig(**given)
    assert {name: getattr(config, name) for name in filled_in} == filled_in


def refusal(field: str, value: object, allowed: str, remedy: str) -> str:
    return f"`{field}` is {re.escape(repr(value))}, but must be {allowed}.*{remedy}"


OWN = {"routing": SELF}
REFUSALS = [
    ({"num_experts": 8}, refusal("num_experts", 8, "left out", "Each rank is an expert .* set `r`")),
    ({"num_shared_experts": 1}, refusal("num_shared_experts", 1, "0 for ranks", "plain LoRA as a second")),
    ({"r": 0}, refusal("r", 0, "a whole number of at least 1", "Correct the entry")),
    ({"r": "8:x"}, refusal("r", "8:x", "a whole number", "Write digits")),
    *(({"top_k": k}, refusal("top_k", k, "a whole number of at least 1", "use 8")) for k in (0, -1, 2.0, "2", True)),
    ({"r": "4:16", "top_k": 8}, refusal("top_k", 8, "at most 4, the smallest `r` of '4:16'", "lower `top_k`")),
    ({"top_k": 1}, refusal("top_k", 1, "at least 2 where a layer has 64 ranks", "never train the choice")),
    ({"r": [1, 4]}, refusal("top_k", 1, "at least 2", "and the smallest `r` with it")),
    (
        {"routing": "softmax"},
        refusal("routing", "softmax", "one of 'sigmoid_top_k', 'self_activated'", "LinearMoeConfig"),
    ),
    ({"routing": "self_activate"}, refusal("routing", "self_activate", "one of", "Did you mean 'self_activated'")),
    ({"routing": None}, refusal("routing", None, "one of", "Choose one of")),
    *(
        ({"rank_partition": n}, refusal("rank_partition", n, "a whole number of at least 1", "a row of its own"))
        for n in (0, 1.0, True, "2", None)
    ),
    ({"r": 10, "rank_partition": 4}, refusal("rank_partition", 4, "a divisor of `r` = 10", "cannot be split")),
    ({"r": 9, "top_k": 4, "rank_partition": 3}, refusal("rank_partition", 3, "a divisor of `top_k` = 4", "to chance")),
    ({"bias_in_gates": 1}, refusal("bias_in_gates", 1, "True or False", "A word")),
    (
        {"bias_in_gates": True, "balance": "none"},
        refusal("bias_in_gates", True, "left out with `balance` = 'none'", "There is no bias without it"),
    ),
    *(
        (
            {**OWN, name: value},
            refusal(name, value, "left out with `routing` = 'self_activated'", "There is no router"),
        )
        for name, value in {
            "rank_partition": 2,
            "bias_in_gates": True,
            "router_scale": 2.0,
            "router_init_std": 0.1,
        }.items()
    ),
    *(
        ({name: value}, refusal(name, value, "left out with `routing` = 'sigmoid_top_k'", f"Remove `{name}`"))
        for name, value in {"temperature": 0.1, "threshold": 0.2, "frozen_r": [8]}.items()
    ),
    *(
        ({**OWN, "temperature": x}, refusal("temperature", x, "above 0", "0.03 for text"))
        for x in (0, -1.0, "a", True, float("nan"))
    ),
    *(
        ({**OWN, "threshold": x}, refusal("threshold", x, "from -1 to 1, or None", "0.2"))
        for x in (1.5, -2, "a", True, float("nan"))
    ),
    *(
        ({**OWN, "frozen_r": x}, refusal("frozen_r", x, "a list with one entry", "`moe_peft.grow` writes it"))
        for x in (8, [], "8")
    ),
    ({**OWN, "frozen_r": [0]}, refusal("frozen_r", 0, "a whole number of at least 1", "Correct the entry")),
    ({"balance": "localized"}, refusal("balance", "localized", "one of 'bias', 'switch', 'none'", "Choose one of")),
    ({"balance": "bais"}, refusal("balance", "bais", "one of 'bias'", "Did you mean 'bias'")),
    ({**OWN, "balance": "switch"}, refusal("balance", "switch", "'none' with `routing`", "no router to balance")),
    ({"router_aux_loss_coef": -1}, refusal("router_aux_loss_coef", -1, "at least 0", "0 turns balancing off")),
    ({"lora_alpha": 0}, refusal("lora_alpha", 0, "a positive number", "16 is")),
    ({"lora_dropout": 1.0}, refusal("lora_dropout", 1.0, "at least 0 and below 1", "such as 0.05")),
    ({"layers_pattern": "h", "target_modules": ["q_proj"]}, "`layers_to_transform` must also be specified"),
    ({"topk": 2}, "`topk` is not a field of RankMoeConfig. Did you mean 'top_k'?"),
]


@pytest.mark.parametrize(("given", "sentence"), REFUSALS, ids=[str(given) for given, _ in REFUSALS])
def test_a_wrong_value_is_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        RankMoeConfig(**given)
