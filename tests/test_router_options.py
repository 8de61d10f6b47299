"""Every option of the router against its definition on one layer, under both kinds of checkpointing, and in generation."""

import copy
import gc
import re

import pytest
import torch
from conftest import make_tiny_llama
from families import make_family
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, T5Config, T5ForConditionalGeneration

from moe_peft import FfnMoeConfig, LinearMoeConfig, context, task_types, to_lora
from moe_peft.attach import RoutingContext
from moe_peft.balance import localized_loss, switch_loss
from moe_peft.balance_terms import cv2_loss, information_loss, sequence_loss, token_entropy
from moe_peft.context import set_step
from moe_peft.rules import z_loss
from moe_peft.tuners import router as router_module
from moe_peft.tuners.linear_moe import RoutedLora
from moe_peft.tuners.scopes import RouterUnit
from moe_peft.watch import find_routers, update_selection_bias


EXACT = {"rtol": 1e-9, "atol": 1e-11}
MODES = ("none", "reentrant", "non-reentrant")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GROUPS = {"expert_groups": [[0, 1], [1, 2, 3]]}
SEQUENCE = {"router_granularity": "sequence"}


def make_model(mode="none", config_class=LinearMoeConfig, base=None, **settings):
    base = make_tiny_llama(layers=2, dtype=torch.float64) if base is None else base
    torch.manual_seed(2)
    settings = {"num_experts": 4, "init_weights": False, "target_modules": ALL, "r": 4, **settings}
    model = get_peft_model(base, config_class(**settings))
    if mode != "none":
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
    return model.train()


def padded(prompt=5, **more):
    """Three rows, the first with two padding tokens on its left; a prompt and an answer in each."""
    torch.manual_seed(1)
    tokens = torch.randint(1, 100, (3, 10))
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels, **more}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# --- one layer against its definition ---


def layer_by_hand(layer, config, x, y, types=None):
    """Token by token, choice by choice: scores, what is kept, the weights, and what each choice adds."""
    outputs = []
    num_choices, E, C = layer.num_experts, layer.num_routed, layer.num_constant
    for t, token in enumerate(x):
        u = layer.router @ token
        if config.scoring_func == "cosine":
            u = u / (token.norm() * layer.router.norm(dim=1))
        if config.router_bias:
            u = u + layer.router_bias
        if config.router_act == "tanh":
            u = u.tanh()
        u = u * config.router_scale
        allowed = set(range(num_choices))
        if types is not None:
            allowed = set(config.expert_groups[types[t]]) | set(range(E, num_choices))
        sigmoid = config.scoring_func == "sigmoid" or config.routing == "sigmoid_top_k"
        total = sum(u[c].exp() for c in allowed)
        score = {c: u[c].sigmoid() if sigmoid else u[c].exp() / total for c in allowed}
        bias = torch.zeros(num_choices) if layer.selection_bias is None else layer.selection_bias
        kept = sorted(allowed, key=lambda c: -float((score[c] + bias[c]).detach()))
        kept = kept if config.routing in ("softmax", "all") else kept[: config.top_k]
        true = [c for c in kept if c < E + C]
        normalised = config.routing != "softmax" and config.norm_topk_prob is not False
        norm = sum(score[c] for c in true) if normalised else 1.0
        out = y[t]
        for c in true:
            weight = score[c] / norm * config.routed_scaling_factor
            if c < E:
                A = layer.lora_A[0 if config.share_A else c]
                out = out + weight * layer.scaling * (layer.lora_B[c].T @ (A @ token))
            else:
                out = out + weight * layer.constant[c - E]
        outputs.append(out)
    return torch.stack(outputs)


OPTIONS = [
    {"num_null_experts": 2, "top_k": 3},
    {"num_constant_experts": 2, "top_k": 3},
    {"num_constant_experts": 1, "routing": "softmax"},
    {"num_null_experts": 2, "num_constant_experts": 1, "top_k": 4, "routing": "sigmoid_top_k"},
    {"share_A": True},
    {"share_A": True, "routing": "softmax", "router_bias": True},
    {"scoring_func": "cosine", "router_scale": 5.0},
    {"routing": "all", "scoring_func": "cosine", "router_scale": 5.0},
    {"router_act": "tanh", "router_bias": True, "router_scale": 2.0},
    {"routing": "sigmoid_top_k", "balance": "bias", "routed_scaling_factor": 2.5},
    {"balance": "bias"},
    {"routed_scaling_factor": 0.5},
    {"routing": "top_k", "scoring_func": "sigmoid", "norm_topk_prob": False, "num_null_experts": 1},
    {"freeze_router": True},
    GROUPS,
    {**GROUPS, "routing": "softmax"},
    {**GROUPS, "top_k": 3, "num_null_experts": 1},
    {"expert_groups": [[0], [3]], "top_k": 2},
]


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("settings", OPTIONS, ids=str)
def test_an_option_is_its_definition(settings, by_token):
    torch.manual_seed(0)
    config = LinearMoeConfig(**{"num_experts": 4, "r": 2, "init_weights": False, "balance": "none", **settings})
    layer = RoutedLora(config, 6, 5, 4, 2).double().eval()
    with torch.no_grad():
        for name in ("lora_B", "constant", "router_bias", "selection_bias"):
            if getattr(layer, name, None) is not None:
                getattr(layer, name).normal_(std=0.5)
        if isinstance(layer.router, nn.Parameter):
            layer.router.normal_()
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    state, types = RoutingContext(), None
    if config.expert_groups:
        state.task_types = torch.tensor([0, 1, 1])
        types = [0] * 4 + [1] * 8
        if by_token:
            types = [0, 1] * 6
            state.task_types = torch.tensor(types).view(3, 4)
    elif by_token:
        pytest.skip("no types")
    wanted = layer_by_hand(layer, config, x.view(12, 6), y.view(12, 5), types).view(3, 4, 5)
    leaves = [x, y, *layer.parameters()]
    probe = torch.randn_like(wanted)
    theirs = torch.autograd.grad((wanted * probe).sum(), leaves, allow_unused=True, materialize_grads=True)
    for training in (True, False):
        out = layer.train(training)(x, y, state)
        torch.testing.assert_close(out, wanted, **EXACT)
        ours = torch.autograd.grad((out * probe).sum(), leaves, allow_unused=True, materialize_grads=True)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, **EXACT)
    known = state.task_types
    with torch.no_grad():  # the way of a few tokens; what a pass knows is kept apart from a pass with gradient
        state.task_types = known
        torch.testing.assert_close(layer.eval()(x, y, state), wanted, **EXACT)


def test_jitter_shakes_what_the_router_sees_alone():
    torch.manual_seed(0)
    config = LinearMoeConfig(num_experts=3, routing="softmax", router_jitter_noise=0.2, init_weights=False)
    layer = RoutedLora(config, 6, 5, 3, 8).double()
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.zeros(7, 5, dtype=torch.float64)
    torch.manual_seed(4)
    out = layer(x, y, RoutingContext())
    torch.manual_seed(4)
    noise = torch.empty_like(x).uniform_(0.8, 1.2)
    weights = ((x * noise) @ layer.router.T).softmax(-1)
    wanted = layer.scaling * torch.einsum("te,ero,eri,ti->to", weights, layer.lora_B, layer.lora_A, x)
    torch.testing.assert_close(out, wanted, **EXACT)
    assert not torch.equal(layer(x, y, RoutingContext()), out)
    layer.eval()
    assert torch.equal(layer(x, y, RoutingContext()), layer(x, y, RoutingContext()))


def test_given_and_random_at_the_layer():
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 6, dtype=torch.float64), torch.zeros(2, 5, 5, dtype=torch.float64)
    made = {}
    for routing in ("given", "random"):
        config = LinearMoeConfig(num_experts=3, routing=routing, init_weights=False)
        made[routing] = RoutedLora(config, 6, 5, 3, 8).double()
        assert made[routing].router is None
    each = lambda layer: layer.scaling * torch.einsum("ero,eri,bti->ebto", layer.lora_B, layer.lora_A, x)  # noqa: E731
    state = RoutingContext()
    state.task_types = torch.tensor([2, 0])
    out = made["given"](x, y, state)
    torch.testing.assert_close(out[0], each(made["given"])[2, 0], **EXACT)
    torch.testing.assert_close(out[1], each(made["given"])[0, 1], **EXACT)
    experts = each(made["random"])
    out = made["random"](x, y, RoutingContext())
    matches = torch.isclose(out, experts, rtol=1e-9, atol=1e-12).all(-1)
    assert (matches.sum(0) == 1).all()  # each token one expert, weight 1
    assert matches.any((1, 2)).sum() > 1
    torch.testing.assert_close(made["random"].eval()(x, y, RoutingContext()), experts.mean(0), **EXACT)


@pytest.mark.parametrize("settings", [{}, {"share_A": True}, {"num_shared_experts": 1}], ids=str)
def test_random_merges_into_what_it_computes_in_use(settings):
    model = make_model(routing="random", **settings).eval()
    tokens = padded()["input_ids"]
    with torch.no_grad():
        before = model(tokens).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, before, **EXACT)


def test_a_frozen_router_stays_as_it_was_drawn(tmp_path):
    model = make_model(freeze_router=True, target_modules=["q_proj"])
    assert model.peft_config["default"].balance == "none"  # a loss would teach the layers below alone
    before = {name: router.router.clone() for name, router in find_routers(model).items()}
    model.set_adapter("default")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**padded()).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_tiny_llama(layers=2, dtype=torch.float64), tmp_path, is_trainable=True)
    for where in (model, loaded):
        for name, router in find_routers(where).items():
            torch.testing.assert_close(router.router, before[name].to(router.router.dtype))
            assert not router.router.requires_grad
            assert router.router not in set(router.parameters())
    assert all(torch.equal(find_routers(model)[name].router, before[name]) for name in before)


@pytest.mark.parametrize(
    "settings",
    [{"router_scope": "model"}, {"router_scope": "block"}, {"router_jitter_noise": 0.1}, {}],
    ids=str,
)
def test_a_frozen_router_is_counted_where_its_input_has_no_gradient(settings):
    model = make_model(freeze_router=True, balance="bias", **settings)
    model(**padded()).loss.backward()
    calls = 14 if settings.get("router_scope") == "model" else 1
    for router in find_routers(model).values():
        assert float(router.state.step_counts[-1]) == 28 * calls
    update_selection_bias(model)
    assert all(router.selection_bias.any() for router in find_routers(model).values())


# --- checkpointing, for every option ---

WHOLE = {
    "block": {"router_scope": "block"},
    "group": {"router_scope": "group", "router_jitter_noise": 0.1},
    "model": {"router_scope": "model", "balance": "switch", "router_aux_loss_coef": 0.1},
    "sequence": SEQUENCE,
    "sequence of the model": {**SEQUENCE, "router_scope": "model"},
    "groups": GROUPS,
    "given": {"routing": "given"},
    "random": {"routing": "random"},
    "bias": {"balance": "bias"},
}


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("config_class", [LinearMoeConfig, FfnMoeConfig])
@pytest.mark.parametrize("name", WHOLE)
def test_checkpointing_changes_no_gradient(name, config_class, mode):
    settings = dict(WHOLE[name])
    if config_class is FfnMoeConfig and "router_scope" in settings:
        pytest.skip("a block has one router anyway")
    batch = padded(task_types=torch.tensor([0, 1, 1])) if name in ("groups", "given") else padded()
    found = []
    for how in ("none", mode):
        model = make_model(how, config_class, **settings)
        torch.manual_seed(5)
        model(**batch).loss.backward()
        found.append((gradients(model), [r.state.step_counts for r in find_routers(model).values()]))
    assert largest_difference(found[0][0], found[1][0]) <= 1e-12
    if name == "bias":
        assert all(float(counts[-1]) == 28 for counts in found[1][1])
        assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


# --- balances, as gradients ---


def explicit(monkeypatch, batch, aux, **settings):
    """Gradients of the task's loss plus `aux` of every router, with the injection replaced by a note of the logits."""
    seen = []

    def noted(logits, state, rule, top_k, coef, gradient, real, task_types, *context_and_rows):
        seen.append((rule(logits, top_k), real, task_types))
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(router_module, "balanced", noted)
        model = make_model(**settings)
        loss = model(**batch).loss + sum(aux(*item) for item in seen)
        loss.backward()
    assert len(seen) == 14
    return gradients(model)


def by_types(routing, real, types):
    groups = types.repeat_interleave(10) if types.dim() == 1 else types.reshape(-1)
    return information_loss(routing.router_logits, groups, 2, real)


def weighted(routing, real, types, weights=(0.5, 1.0, 2.0, 4.0)):
    chosen = torch.nn.functional.one_hot(routing.top_k_index, 4).sum(1).double()[real].sum(0)
    load = chosen / chosen.sum() * torch.tensor(weights, dtype=torch.float64)
    return switch_loss(routing, real, load)


ROWS = torch.arange(3).repeat_interleave(10)
TYPES = torch.tensor([0, 1, 1])
COEF = 0.1
LOSSES = [
    ({"balance": "switch_local"}, None, lambda r, real, _: COEF * switch_loss(r, real)),
    ({"balance": "sequence"}, None, lambda r, real, _: COEF * sequence_loss(r, 3, real)),
    ({"balance": "cv2", "routing": "softmax"}, None, lambda r, real, _: COEF * cv2_loss(r, real)),
    ({"balance": "cv2"}, None, lambda r, real, _: COEF * cv2_loss(r, real)),
    ({"balance": "mi"}, None, lambda r, real, _: COEF * information_loss(r.router_logits, ROWS, 3, real)),
    ({"balance": "mi"}, TYPES, lambda *seen: COEF * by_types(*seen)),
    ({"balance": "mi"}, torch.arange(30).view(3, 10) % 2, lambda *seen: COEF * by_types(*seen)),
    (
        {"balance": "none", "router_aux_loss_coef": 0.0, "router_entropy_coef": 0.3, "routing": "top_p"},
        None,
        lambda r, real, _: 0.3 * token_entropy(r.router_logits, real),
    ),
    (
        {"balance": "sequence", "router_entropy_coef": 0.3, "router_z_loss_coef": 0.2},
        None,
        lambda r, real, _: (
            COEF * sequence_loss(r, 3, real)
            + 0.3 * token_entropy(r.router_logits, real)
            + 0.2 * z_loss(r.router_logits, real)
        ),
    ),
    (
        {"balance": "switch_local", "balance_weights": [0.5, 1.0, 2.0, 4.0]},
        None,
        lambda *seen: COEF * weighted(*seen),
    ),
    ({"balance": "switch", "balance_weights": [0.5, 1, 2, 4]}, None, lambda *seen: COEF * weighted(*seen)),
    ({"balance": "switch_local", **GROUPS}, TYPES, lambda r, real, _: COEF * switch_loss(r, real)),
    ({"balance": "localized", "routing": "softmax"}, TYPES, lambda r, real, t: COEF * localized_loss(r, t, 0.1, real)),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("settings", "types", "aux"), LOSSES, ids=[str(case[0]) + str(case[1]) for case in LOSSES])
def test_a_balance_is_its_explicit_loss(settings, types, aux, mode, monkeypatch):
    settings = {"router_aux_loss_coef": COEF, **settings}
    batch = padded() if types is None else padded(task_types=types)
    expected = explicit(monkeypatch, batch, aux, **settings)
    model = make_model(mode, **settings)
    model(**batch).loss.backward()
    assert largest_difference(gradients(model), expected) <= 1e-12
    without = {"router_aux_loss_coef": 0.0, "router_entropy_coef": 0.0, "router_z_loss_coef": 0.0}
    model = make_model(**{**settings, **without})
    model(**batch).loss.backward()
    assert largest_difference(gradients(model), expected) > 1e-6


def test_one_loss_for_the_router_of_a_whole_model(monkeypatch):
    """Each of 14 layers asks it, and all together count once, over as many micro-batches as ever."""
    settings = {"router_scope": "model", "balance": "switch_local", "router_aux_loss_coef": COEF}
    expected = explicit(monkeypatch, padded(), lambda r, real, _: COEF / 14 * switch_loss(r, real), **settings)
    model = make_model(**settings)
    model(**padded()).loss.backward()
    assert largest_difference(gradients(model), expected) <= 1e-12
    (router,) = find_routers(model).values()
    assert router.state.window == 140


def test_null_experts_come_to_their_target():
    """A toy run of the controller alone: the mean number of true experts per token approaches `target_active`."""
    model = make_model(
        base=make_tiny_llama(layers=1), target_modules=["q_proj"], num_null_experts=4, top_k=3, balance="bias",
        target_active=1.0, bias_update_speed=0.01,
    )  # fmt: skip
    (router,) = find_routers(model).values()
    for _ in range(60):
        torch.manual_seed(0)
        tokens = torch.randint(1, 100, (4, 40))
        model(tokens, labels=tokens).loss.backward()
        active = float(router.state.step_counts[:4].sum() / router.state.step_counts[-1])
        update_selection_bias(model)
    assert abs(active - 1.0) < 0.15
    assert router.state.step_counts is None
    assert not router.selection_bias[4:].any()


# --- schedules ---


def test_schedules_without_a_trainer():
    model = make_model(num_experts=6, top_k=2, top_k_start=6, router_temperature_start=4.0, router_scale=2.0,
                       schedule_steps=10, target_modules=["q_proj"])  # fmt: skip
    router, state = (
        next(iter(find_routers(model).values())),
        next(m.context for m in model.modules() if hasattr(m, "context")),
    )
    for step, slots, temperature in [(0, 6, 4.0), (5, 4, 2.25), (10, 2, 0.5), (99, 2, 0.5), (None, 2, 0.5)]:
        set_step(model, step)
        assert router.slots(state) == slots
        assert router.scale(state) == pytest.approx(1 / temperature)
        model(**padded()).loss.backward()
        router.eval()
        assert router.slots(state) == 2
        assert router.scale(state) == 2.0
        router.train()


# --- whole sequences ---


def decisions(model, batch, monkeypatch):
    """What every router decided, `[routers, B, S, E]`."""
    from moe_peft.routing import dense_weights
    from moe_peft.tuners.router import Router

    seen, true = [], Router.routed
    with monkeypatch.context() as patch:
        patch.setattr(Router, "routed", lambda self, *a, **k: (seen.append(true(self, *a, **k)), seen[-1])[1])
        with torch.no_grad():
            model(**batch)
    return torch.stack([dense_weights(routing).view(*batch["input_ids"].shape, -1) for routing in seen])


@pytest.mark.parametrize("config_class", [LinearMoeConfig, FfnMoeConfig])
def test_the_prompt_alone_decides(config_class, monkeypatch):
    settings = {} if config_class is FfnMoeConfig else {"router_scope": "model"}
    model = make_model(config_class=config_class, **SEQUENCE, **settings).eval()
    batch = padded()
    before = decisions(model, batch, monkeypatch)
    assert torch.equal(before, before[:, :, :1].expand_as(before))
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, 5:] = 7
    torch.testing.assert_close(decisions(model, other, monkeypatch), before, **EXACT)
    other["input_ids"][:, 4] = 8
    assert not torch.allclose(decisions(model, other, monkeypatch), before)
    for left in (True, False):
        wider = {}
        for name, value in batch.items():
            more = torch.full((3, 4), {"labels": -100, "input_ids": 9, "attention_mask": 0}[name])
            wider[name] = torch.cat((more, value) if left else (value, more), 1)
        after = decisions(model, wider, monkeypatch)
        torch.testing.assert_close(after[:, :, 4:] if left else after[:, :, :10], before, rtol=1e-6, atol=1e-8)


def test_a_later_turn_of_the_user_is_not_the_prompt(monkeypatch):
    model, batch = make_model(**SEQUENCE, router_scope="model").eval(), padded()
    batch["labels"][:, 8:] = -100
    before = decisions(model, batch, monkeypatch)
    batch["input_ids"][:, 8:] = 3
    torch.testing.assert_close(decisions(model, batch, monkeypatch), before, **EXACT)


@pytest.mark.parametrize("mode", MODES)
def test_two_passes_before_one_backward_keep_their_prompts(mode):
    first, second = padded(), padded(prompt=3)
    expected = make_model(**SEQUENCE, balance="none")
    for batch in (first, second):
        expected(**batch).loss.backward()
    model = make_model(mode, **SEQUENCE, balance="none")
    (model(**first).loss + model(**second).loss).backward()
    assert largest_difference(gradients(model), gradients(expected)) <= 1e-12


def test_what_cannot_be_routed_by_sequence_is_refused():
    model, batch = make_model(**SEQUENCE), padded()
    with pytest.raises(
        ValueError, match="`router_granularity` is 'sequence', but must be 'token' where the model is not told"
    ):
        model(input_ids=batch["input_ids"])  # as DPO calls it
    model(input_ids=batch["input_ids"], prompt_mask=batch["labels"] == -100).logits.sum().backward()
    with pytest.raises(ValueError, match="'token' where a row has no prompt .* Mask the prompt in `labels`"):
        model(**padded(prompt=0))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    with pytest.raises(ValueError, match="'token' where one row holds several samples.* Turn packing"):
        model(input_ids=batch["input_ids"][1:2], labels=batch["labels"][1:2], position_ids=positions)
    left = batch["attention_mask"].cumsum(1).sub(1).clamp(min=0)
    model(**batch, position_ids=left)  # zeros under padding are no new sample
    bloom = make_model(base=make_family("bloom"), target_modules="all-linear", **SEQUENCE)
    with pytest.raises(ValueError, match="`router_granularity` is 'sequence', but must be 'token'"):
        bloom(input_ids=batch["input_ids"] % 60, labels=batch["labels"].clamp(max=60))


@pytest.mark.parametrize("config_class", [LinearMoeConfig, FfnMoeConfig])
@pytest.mark.parametrize(("balance", "more"), [("sequence", ""), ("mi", ", or give `task_types`")])
def test_a_balance_by_row_refuses_rows_of_several_samples(config_class, balance, more):
    """A packed row would count as one sequence, and in a padding-free batch the information of one group is always 0."""
    model, tokens = make_model(config_class=config_class, balance=balance), padded()["input_ids"][:1]
    packed = {"input_ids": tokens, "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])}
    with pytest.raises(ValueError, match=f"`balance` is '{balance}', but must be 'switch', .*free batches off{more}"):
        model(**packed)
    with torch.no_grad():
        model(**packed)
    if balance == "mi":
        model(**packed, task_types=torch.tensor([[0] * 5 + [1] * 5])).logits.sum().backward()
    model(input_ids=tokens).logits.sum().backward()  # nothing of the passes before is left
    model.eval()(**packed)
    indifferent = make_model(config_class=config_class, balance=balance, router_aux_loss_coef=0.0)
    indifferent(**packed).logits.sum().backward()


def test_an_adapter_that_is_not_active_asks_for_no_prompt():
    model, tokens = make_model(**SEQUENCE), padded()["input_ids"]
    model.add_adapter("other", LinearMoeConfig(target_modules=ALL, num_experts=4))
    model.set_adapter("other")
    model(tokens)
    model.delete_adapter("default")
    model(tokens)


# --- generation ---

GENERATING = [
    (LinearMoeConfig, {"router_scope": "block"}, None),
    (LinearMoeConfig, {"router_scope": "model"}, None),
    (LinearMoeConfig, SEQUENCE, None),
    (LinearMoeConfig, {**SEQUENCE, "router_scope": "model"}, None),
    (FfnMoeConfig, SEQUENCE, None),
    (LinearMoeConfig, GROUPS, [0, 1, 0]),
    (FfnMoeConfig, GROUPS, [0, 1, 0]),
    (LinearMoeConfig, {"routing": "given"}, [0, 1, 2]),
]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("config_class", "settings", "types"), GENERATING, ids=str)
def test_generation_agrees_with_and_without_a_cache(config_class, settings, types, beams):
    model, batch = make_model(config_class=config_class, lora_alpha=64, **settings).eval(), padded()
    del batch["labels"]

    def generated(rows=slice(None), use_cache=True):
        with task_types(model, [0, 0, 0] if types is None else types[rows]):
            part = {name: value[rows] for name, value in batch.items()}
            return model.generate(
                **part, max_new_tokens=5, do_sample=False, num_beams=beams, use_cache=use_cache, eos_token_id=None
            )

    with_cache = generated()
    assert torch.equal(with_cache, generated(use_cache=False))
    if types is not None:  # and each row has its own type
        for row in (1, 2):
            assert torch.equal(generated(slice(row, row + 1)), with_cache[row : row + 1])


# --- one router for several layers ---


def test_a_group_follows_the_router_of_its_first_layer():
    """Copied into every layer of the group, the router gives the same model without sharing."""
    shared, apart = make_model(router_scope="group", balance="none"), make_model(balance="none")
    routers, every = find_routers(shared), find_routers(apart)
    with torch.no_grad():
        for name, layer in layers_of(apart).items():
            layer.lora_A.copy_(layers_of(shared)[name].lora_A)
            layer.lora_B.copy_(layers_of(shared)[name].lora_B)
            first = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
            every[name].router.copy_(routers[first].router)
    assert len(routers) == 8
    for batch in (padded(), padded(prompt=2)):
        torch.testing.assert_close(shared(**batch).logits, apart(**batch).logits, **EXACT)
    shared(**padded()).loss.backward()
    apart(**padded()).loss.backward()
    for first in routers:
        names = [
            first,
            *(first.replace(a, b) for a, b in (("q_proj", "k_proj"), ("q_proj", "v_proj"), ("gate", "up"))),
        ]
        wanted = sum(every[name].router.grad for name in set(names))
        torch.testing.assert_close(routers[first].router.grad, wanted, **EXACT)


def layers_of(model, adapter="default"):
    return {
        name.removeprefix("base_model.model."): module.experts(adapter)
        for name, module in model.named_modules()
        if hasattr(module, "linear_moe_experts")
    }


@pytest.mark.parametrize("scope", ["block", "model"])
def test_a_block_or_a_model_follows_one_decision(scope):
    """Against a loop that hands every layer the routing that its unit should have."""
    model = make_model(router_scope=scope).eval()
    seen, hidden = {}, {}
    handles = []
    for name, experts in layers_of(model).items():

        def note(module, args, output, name=name):
            if args[1] is None:
                return
            seen[name] = args[3]
            hidden[name] = args[0]

        handles.append(experts.register_forward_hook(note))
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(padded()["input_ids"])
        model(**{k: v for k, v in padded().items() if k != "labels"})
    routers = find_routers(model)
    assert len(routers) == {"block": 4, "model": 1}[scope]
    for name, routing in seen.items():
        first = next(iter(routers)) if scope == "model" else name.replace(name.rpartition(".")[2], "")
        first = first if scope == "model" else first + ("q_proj" if "attn" in name else "gate_proj")
        x = embeddings if scope == "model" else hidden[first]
        logits = x.reshape(-1, 64) @ routers[first].router.to(x.dtype).T
        torch.testing.assert_close(routing.router_logits, logits, rtol=1e-6, atol=1e-8)


def pending(model):
    units = {id(u): u for m in model.modules() for u in getattr(m, "units", {}).values()}
    return [unit.pending for unit in units.values() if unit.pending]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scope", ["group", "block", "model"])
def test_no_graph_is_kept_alive(scope, mode):
    model = make_model(mode, router_scope=scope)
    model(**padded()).loss.backward()
    assert pending(model) == []


def test_two_adapters_of_a_whole_model_then_one_then_a_copy(tmp_path):
    model, batch = make_model(router_scope="model").eval(), padded()
    alone = model(**batch).logits
    torch.manual_seed(7)
    settings = {"num_experts": 4, "init_weights": False, "r": 4, "target_modules": ALL}
    model.add_adapter("second", LinearMoeConfig(router_scope="model", **settings))
    model.base_model.set_adapter(["default", "second"])
    assert not torch.allclose(model(**batch).logits, alone)
    model.save_pretrained(tmp_path)
    model.delete_adapter("second")
    model.set_adapter("default")
    torch.testing.assert_close(model(**batch).logits, alone, rtol=0, atol=0)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(find_routers(twin).values())).router.zero_()
        assert not torch.allclose(twin(**batch).logits, alone)
        torch.testing.assert_close(model(**batch).logits, alone, rtol=0, atol=0)
    base = make_tiny_llama(layers=2, dtype=torch.float64)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded(**batch).logits, alone, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()


def test_a_copy_in_the_middle_of_a_pass_is_whole():
    unit = RouterUnit("block")
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    assert unit.join("default", first)
    assert not unit.join("default", second)
    unit.pending["default"] = (None, 1)
    assert copy.deepcopy(unit).pending == {}
    assert unit.pending


MIXED = [{"router_scope": scope} for scope in ("group", "block", "model")]
MIXED += [SEQUENCE, GROUPS, {"routing": "given"}]


@pytest.mark.parametrize("settings", MIXED, ids=str)
def test_rows_of_a_mixed_batch_are_as_if_alone(settings):
    """Each row knows its own padding, type, prompt and embeddings."""
    model = make_model(**settings).eval()
    torch.manual_seed(9)
    model.add_adapter(
        "b", LinearMoeConfig(**{"target_modules": ALL, "num_experts": 4, "init_weights": False, **settings})
    )
    batch, names = padded(), ["default", "b", "default"]
    del batch["labels"]
    if "routing" in settings or "expert_groups" in settings:
        batch["task_types"] = torch.tensor([0, 1, 1])
    with torch.no_grad():
        mixed = model(**batch, adapter_names=names).logits
        for row, name in enumerate(names):
            model.set_adapter(name)
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(mixed[row][real], model(**batch).logits[row][real], **EXACT)


def test_a_compiled_block_trains_alike():
    model, batch = make_model(router_scope="block"), padded()
    model(**batch).loss.backward()
    expected = gradients(model)
    compiled = make_model(router_scope="block")
    for layer in compiled.base_model.model.model.layers:
        layer.compile(backend="eager")
    compiled(**batch).loss.backward()
    assert largest_difference(gradients(compiled), expected) <= 1e-12
    assert pending(compiled) == []


def test_a_model_that_hides_its_embeddings_is_told_so(monkeypatch):
    model = make_model(base=make_family("bloom"), target_modules="all-linear", router_scope="model")
    with pytest.raises(ValueError, match="`router_scope` is 'model', but must be another scope.*Use 'block'"):
        model(input_ids=torch.ones(2, 4, dtype=torch.long))
    base = make_tiny_llama(layers=2)
    monkeypatch.setattr(base, "get_input_embeddings", lambda: nn.Identity())
    with pytest.raises(ValueError, match="`router_scope` is 'model', but must be .*`embedding_dim`.*Use 'block'"):
        make_model(base=base, router_scope="model")
    opt = make_model(base=make_family("opt"), target_modules="all-linear", router_scope="block")
    with pytest.raises(RuntimeError, match="ran before the first of its block.*OPT.*`router_scope` to 'linear'"):
        opt(input_ids=torch.ones(2, 4, dtype=torch.long))


# --- task types ---


@pytest.mark.parametrize(
    ("types", "sentence"),
    [
        (None, "`expert_groups` is 'given', but must be None where the model is not told .*`with moe_peft.task_types"),
        (
            torch.tensor([0, 1, 2]),
            "`task_types` is .*0, 1, 2.*, but must be whole numbers from 0 to 1, as `expert_groups`",
        ),
        (torch.tensor([0, 1, -1]), "`task_types` is .*-1.*, but must be whole numbers from 0"),
        (torch.tensor([0.0, 1.0, 1.0]), "`task_types` is .*1.0.*, but must be whole numbers"),
        (torch.tensor([0, 1]), r"`task_types` is \[2\], but must be of the shape of 3 numbers"),
    ],
)
@pytest.mark.parametrize("config_class", [LinearMoeConfig, FfnMoeConfig])
def test_wrong_task_types_are_refused(types, sentence, config_class):
    model, batch = make_model(config_class=config_class, **GROUPS), padded()
    with pytest.raises(ValueError, match=sentence):
        model(**batch) if types is None else model(**batch, task_types=types)


@pytest.mark.parametrize("types", [[0, 1], [0, 1, 0, 1, 0, 1]])
def test_fixed_types_fit_the_rows(types):
    model = make_model(**GROUPS).eval()
    with (
        task_types(model, types),
        pytest.raises(ValueError, match=r"`task_types` is \[\d\], but must be .* 3 numbers"),
    ):
        model(**padded())


def test_localized_is_about_samples():
    model = make_model(routing="softmax", balance="localized")
    with pytest.raises(ValueError, match=r"`task_types` is \[3, 10\], but must be of the shape of one number per row"):
        model(**padded(task_types=torch.zeros(3, 10, dtype=torch.long)))


def make_t5(**settings):
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=4, d_kv=8, vocab_size=64, decoder_start_token_id=0)
    return make_model(base=T5ForConditionalGeneration(config), target_modules=["q", "k", "v", "wi", "wo"], **settings)


def test_an_encoder_decoder_is_refused_in_words():
    tokens = torch.ones(2, 6, dtype=torch.long)
    for scope in ("group", "block", "model"):
        with pytest.raises(
            ValueError, match=f"`router_scope` is '{scope}', but must be 'linear' for an encoder-decoder"
        ):
            make_t5(router_scope=scope)
    model = make_t5(**SEQUENCE)
    with pytest.raises(ValueError, match="`router_granularity` is 'sequence', but must be 'token' where .* a decoder"):
        model(input_ids=tokens, labels=tokens[:, :4])


def test_task_types_reach_an_encoder_decoder_or_it_says_so():
    model, tokens = make_t5(**GROUPS), torch.arange(1, 13).view(2, 6)
    with task_types(model, [0, 1]):
        model(input_ids=tokens, labels=tokens[:, :4].contiguous()).loss.backward()
    assert all(router.router.grad.any() for router in find_routers(model).values())


def test_a_classifier_reads_all_of_a_row():
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=100,
            pad_token_id=0,
            num_labels=3,
        )  # fmt: skip
    )
    model = make_model(base=base, target_modules=["q_proj"], **SEQUENCE)
    model(input_ids=padded()["input_ids"], labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(router.router.grad.any() for router in find_routers(model).values())


def test_contexts_go_with_their_models():
    gc.collect()
    before = len(context._live)
    model = make_model(router_scope="model")
    model(**padded()).loss.backward()
    del model
    gc.collect()
    assert len(context._live) == before


# --- what a config refuses ---


def refusal(field, value, rest):
    return f"`{field}` is {re.escape(repr(value))}, but must be .*{rest}"


BAD = {
    "routed_scaling_factor": ([0, -1, "2", None, True, float("nan")], "a positive number"),
    "sparsegen_lambda": ([1, 1.5, "0", float("inf")], "a number below 1"),
    "router_act": (["relu", 3, ["tanh"]], "None or one of 'tanh'"),
    "router_granularity": (["row", None, ["token"]], "'token' or 'sequence'"),
    "router_jitter_noise": ([1.0, -0.1, "a", None, True], "at least 0 and below 1"),
    "num_null_experts": ([-1, 1.0, "1", True, None], "a whole number of at least 0"),
    "num_constant_experts": ([-1, 1.0, "1", True, None], "a whole number of at least 0"),
    "schedule_steps": ([-1, 1.5, "3", True, None], "a whole number of at least 0"),
    "router_z_loss_coef": ([-1, "a", None, True], "at least 0"),
    "router_entropy_coef": ([-1, "a", None, True], "at least 0"),
    "bias_update_speed": ([-1, "a", None, True, float("nan")], "at least 0"),
    "freeze_router": ([1, "no", None], "True or False"),
    "router_bias": ([1, "no", None], "True or False"),
    "share_A": ([1, "no", None], "True or False"),
    "router_scope": (["layer", None, ["x"]], "one of 'linear', 'group', 'block', 'model'"),
    "balance": (["even", ["switch"], 3], "one of 'switch'"),
    "expert_groups": (
        [[], [[]], [[8]], [[-1]], [[True]], [["0"]], [0], "0", ((0,),)],
        "a list of lists that are not empty, with whole numbers from 0 to 7",
    ),
}
WRONG = [
    (
        {"sparsegen_lambda": value} | {"routing": "sparsegen"} if field == "sparsegen_lambda" else {field: value},
        field,
        rest,
    )
    for field, (values, rest) in BAD.items()
    for value in values
]
DENSE = {"routing": "softmax"}
NULL = {"num_null_experts": 2, "top_k": 3}
WRONG += [
    ({"scoring_func": "relu", "routing": "all"}, "scoring_func", "one of 'softmax', 'sigmoid', 'cosine'"),
    ({"scoring_func": "sigmoid"}, "scoring_func", "one of 'softmax', 'cosine' with `routing` = 'softmax_top_k'"),
    ({"scoring_func": "softmax", "routing": "sparsegen"}, "scoring_func", "left out .* which says it"),
    ({"norm_topk_prob": True}, "norm_topk_prob", "left out with .* which says it"),
    ({"norm_topk_prob": 1, "routing": "top_k"}, "norm_topk_prob", "True or False"),
    *(
        (
            {"routed_scaling_factor": 2.0, "routing": rule, "balance": None},
            "routed_scaling_factor",
            "1.0 .*`lora_alpha`",
        )
        for rule in ("top_1_hard", "top_1_straight_through", "sparsegen", "random", "given")
    ),
    ({"top_p": 0.5}, "top_p", "left out with .*Remove `top_p`"),
    ({"sparsegen_lambda": 0.5}, "sparsegen_lambda", "left out with .*'sparsegen'"),
    *(
        ({"routing": routing, name: value}, name, f"left out with `routing` = '{routing}', which has no router")
        for routing in ("random", "given")
        for name, value in {
            "router_bias": True,
            "router_act": "tanh",
            "router_jitter_noise": 0.1,
            "freeze_router": True,
            "router_init_std": 0.02,
            "router_scale": 2.0,
            "router_granularity": "sequence",
        }.items()
    ),
    (
        {"routing": "random", "router_temperature_start": 2.0, "schedule_steps": 3},
        "router_temperature_start",
        "left out .* which has no router",
    ),
    ({"routing": "random", "router_scope": "block"}, "router_scope", "'linear' with .* no router to share"),
    ({"routing": "random", "balance": "cv2"}, "balance", "'none' .*no router that a balance could teach"),
    ({"routing": "random", "router_entropy_coef": 0.1}, "router_entropy_coef", "0 with `routing` = 'random'"),
    ({**DENSE, "num_null_experts": 2}, "num_null_experts", "0 with `routing` = 'softmax'"),
    ({"num_experts": "1:4", "num_null_experts": 2}, "num_null_experts", "0 with .* gives some layers only 1"),
    ({"num_experts": 2, "top_k": 4, "num_null_experts": 2}, "top_k", "below 4, the sum of 2 null"),
    ({"routing": "top_1", "num_constant_experts": 1}, "num_constant_experts", "0 with `routing` = 'top_1'"),
    (
        {**DENSE, "num_experts": "1:4", "num_constant_experts": 1},
        "num_constant_experts",
        "0 with .* some layers only 1",
    ),
    (
        {**DENSE, "num_constant_experts": 2, "balance": "localized"},
        "num_constant_experts",
        "0 with `balance` = 'localized'",
    ),
    ({**NULL, "balance": "cv2"}, "balance", "'switch' or 'bias' with null experts"),
    ({"scoring_func": "cosine", "router_init_std": 0}, "router_init_std", "above 0 with `scoring_func` = 'cosine'"),
    ({"routing": "given", "num_experts": "2:4"}, "num_experts", "one number with `routing` = 'given'"),
    (
        {"num_experts": "2:4", "expert_groups": [[0], [2]]},
        "expert_groups",
        "from 0 to 1, the last expert of the small",
    ),
    ({**DENSE, "balance": "localized", "expert_groups": [[0], [1]]}, "balance", "another with `expert_groups`"),
    ({"schedule_steps": 5}, "schedule_steps", "0 without a start.*`top_k_start` or"),
    ({"top_k_start": 4}, "top_k_start", "left out with `schedule_steps` = 0"),
    ({"router_temperature_start": 2.0}, "router_temperature_start", "left out with `schedule_steps` = 0"),
    *(
        ({"top_k_start": k, "schedule_steps": 5}, "top_k_start", "a whole number of at least 1")
        for k in (0, -1, 2.0, "2", True)
    ),
    ({"top_k_start": 9, "schedule_steps": 5}, "top_k_start", "at most 8.*No layer has more"),
    ({**DENSE, "top_k_start": 2, "schedule_steps": 5}, "top_k_start", "left out with .*has no `top_k`"),
    *(
        ({"router_temperature_start": t, "schedule_steps": 5}, "router_temperature_start", "a positive number")
        for t in (0, -1, "2", True, float("inf"))
    ),
    ({**DENSE, "balance": "sequence"}, "balance", "'localized', 'cv2', 'mi' or 'none' .*is constant"),
    ({**DENSE, "balance": "bias"}, "balance", "'localized', 'cv2', 'mi' or 'none' .*is constant"),
    ({"routing": "sparsegen", "balance": "switch"}, "balance", "'cv2', 'mi' or 'none'"),
    ({"routing": "top_1_hard", "balance": "bias"}, "balance", "'switch' .*The bias needs"),
    ({"routing": "top_1_hard", "balance": "cv2"}, "balance", "'switch' with `routing` = 'top_1_hard'"),
    ({"routing": "sigmoid_top_k", "balance": "mi"}, "balance", "'switch' or 'bias' .*no distribution"),
    ({"routing": "sigmoid_top_k", "router_z_loss_coef": 0.1}, "router_z_loss_coef", "0 with .*'sigmoid_top_k'"),
    ({"routing": "sparsegen", "router_z_loss_coef": 0.1}, "router_z_loss_coef", "0 with `routing` = 'sparsegen'"),
    ({"balance": "bias", "balance_weights": [1.0] * 8}, "balance_weights", "left out with `balance` = 'bias'"),
    ({"balance_weights": [1.0] * 7}, "balance_weights", "one positive number for each of 8 choices"),
    ({"balance_weights": [0] * 8}, "balance_weights", "one positive number for each of 8 choices"),
    ({"balance_weights": 2.0}, "balance_weights", "one positive number for each of 8 choices"),
    ({**NULL, "balance_weights": [1.0] * 8}, "balance_weights", "one positive number for each of 10 choices"),
    ({"num_experts": "2:4", "balance_weights": [1.0] * 4}, "balance_weights", "each of 2 or 4 choices"),
    ({"target_active": 1.0}, "target_active", "left out with `balance` = 'switch' and `num_null_experts` = 0"),
    ({"balance": "bias", "target_active": 1.0}, "target_active", "left out .*add null experts"),
    *(
        ({**NULL, "balance": "bias", "target_active": x}, "target_active", "above 0 and below `top_k` = 3")
        for x in (0, 3, "a", True)
    ),
    ({"share_A": True, "num_shared_experts": 1}, "num_shared_experts", "0 with `share_A` = True"),
    ({"router_scope": "model", "router_jitter_noise": 0.1}, "router_jitter_noise", "0 with `router_scope` = 'model'"),
]


@pytest.mark.parametrize(("given", "field", "rest"), WRONG, ids=[str(case[0]) for case in WRONG])
def test_a_wrong_value_or_pair_is_refused(given, field, rest):
    with pytest.raises(ValueError, match=refusal(field, given[field], rest)):
        LinearMoeConfig(**given)


def test_a_block_is_not_scaled():
    with pytest.raises(ValueError, match=refusal("routed_scaling_factor", 2.0, "1.0 in FfnMoeConfig.*`lora_alpha`")):
        FfnMoeConfig(routed_scaling_factor=2.0)


def test_layers_with_one_decision_have_equally_many_experts():
    with pytest.raises(
        ValueError, match="`router_scope` is 'model', but must be 'linear' or 'block' where `num_experts`"
    ):
        make_model(num_experts="2:4", top_k=2, router_scope="model")


@pytest.mark.parametrize("extra", [{}, {"share_A": True}, {"num_shared_experts": 1}], ids=str)
def test_experts_by_lot_become_one_plain_lora_that_answers_as_they_do(extra):
    """In evaluation THOR's experts are averaged, so the LoRA of all of them at one n-th of the scale is the adapter."""
    config = LinearMoeConfig(
        routing="random", num_experts=3, r=4, target_modules=["q_proj", "up_proj"], init_weights=False, **extra
    )
    model = get_peft_model(make_tiny_llama(), config).eval()
    tokens = torch.randint(1, 90, (2, 7))
    want = model(tokens).logits
    lora_config, state = to_lora(model)
    lora = get_peft_model(make_tiny_llama(), lora_config).eval()
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(lora(tokens).logits, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(tokens).logits, want, rtol=1e-5, atol=1e-5)
