"""The further rules against loops over tokens, their gradients against autograd, and what null experts and jitter do."""

import copy
import math
import pickle

import pytest
import torch
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

from moe_peft import rules
from moe_peft.balance import expert_counts, switch_gradient, switch_loss
from moe_peft.routing import DENSE_RULES, assignments, dense_weights, softmax, softmax_top_k, top_1
from moe_peft.routing import ROUTING_RULES as FIRST_RULES
from moe_peft.rules import (
    NORMALISED_RULES,
    ROUTING_RULES,
    TOP_1_RULES,
    TOP_K_RULES,
    jittered,
    make_rule,
    null_pooled,
    probabilities,
    sigmoid_top_k,
    softmax_top_k_null,
    softmax_top_p,
    switch_gradient_sigmoid,
    switch_loss_sigmoid,
    top_1_hard,
    top_1_straight_through,
    z_gradient,
    z_loss,
)


EXPERTS = 6
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def random_logits(tokens=50, experts=EXPERTS, dtype=torch.float64, spread=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, experts, dtype=torch.float64, generator=generator) * spread).to(dtype)


def softmax_of(row: list[float]) -> list[float]:
    largest = max(row)
    powers = [math.exp(value - largest) for value in row]
    return [power / sum(powers) for power in powers]


def ranked(values: list[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda e: -values[e])


def sigmoid_of(value: float) -> float:
    return 1 / (1 + math.exp(-value))


# --- every rule against its definition, token by token: {expert: weight} of what was chosen ---


def top_p_by_hand(row, top_k, threshold):
    p, kept, total = softmax_of(row), {}, 0.0
    for e in ranked(p)[:top_k]:
        if total >= threshold and threshold < 1:
            break
        kept[e] = p[e]
        total += p[e]
    return kept


def top_1_by_hand(row, top_k):
    return {ranked(row)[0]: 1.0}


def sigmoid_by_hand(row, top_k, bias=(0.0,) * EXPERTS):
    scores = [sigmoid_of(value) for value in row]
    kept = ranked([s + b for s, b in zip(scores, bias, strict=True)])[:top_k]
    return {e: scores[e] / sum(scores[j] for j in kept) for e in kept}


def null_by_hand(row, top_k, num_null):
    p, num_experts = softmax_of(row), len(row) - num_null
    kept = ranked(p)[:top_k]
    counted = [e for e in kept if e < num_experts] or kept
    return {e: p[e] / sum(p[j] for j in counted) if e in counted else 0.0 for e in kept}


def chosen(routing, token: int) -> dict[int, float]:
    """The used slots; empty ones must weigh exactly nothing."""
    slots = zip(routing.top_k_index[token].tolist(), routing.top_k_weights[token].tolist(), strict=True)
    columns, found = routing.router_logits.shape[1], {}
    for e, weight in slots:
        assert 0 <= e <= columns
        if e == columns:
            assert weight == 0.0
        else:
            assert e not in found
            found[e] = weight
    return found


BIAS = torch.tensor([0.5, -0.4, 0.0, 0.3, -0.2, 0.1], dtype=torch.float64)
DEFINITIONS = [
    *(
        (f"top_p {p} of {k}", make_rule("top_p", top_p=p), k, lambda row, k, p=p: top_p_by_hand(row, k, p))
        for p in (0.05, 0.4, 0.8, 0.99, 1.0)
        for k in (1, 2, 6)
    ),
    ("top_1_hard", make_rule("top_1_hard"), 1, top_1_by_hand),
    ("top_1_straight_through", make_rule("top_1_straight_through"), 1, top_1_by_hand),
    *((f"sigmoid {k}", make_rule("sigmoid_top_k"), k, sigmoid_by_hand) for k in (1, 2, 5, 6)),
    *(
        (
            f"sigmoid with bias {k}",
            make_rule("sigmoid_top_k", selection_bias=BIAS),
            k,
            lambda row, k: sigmoid_by_hand(row, k, BIAS.tolist()),
        )
        for k in (1, 2, 5, 6)
    ),
    *(
        (f"{n} null of {k}", make_rule("softmax_top_k", num_null=n), k, lambda row, k, n=n: null_by_hand(row, k, n))
        for n in (1, 3, 4)
        for k in (1, 2, 5, 6)
    ),
]


@pytest.mark.parametrize(("rule", "top_k", "by_hand"), [d[1:] for d in DEFINITIONS], ids=[d[0] for d in DEFINITIONS])
@pytest.mark.parametrize("tokens", [0, 1, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_rule_is_its_definition(rule, top_k, by_hand, tokens, dtype):
    logits = random_logits(tokens, dtype=dtype)
    routing = rule(logits, top_k)
    assert routing.router_logits is logits
    assert routing.top_k_weights.shape == routing.top_k_index.shape == (tokens, top_k)
    assert routing.top_k_weights.dtype == dtype
    assert routing.top_k_index.dtype == torch.int64
    for t, row in enumerate(logits.double().tolist()):
        expected = by_hand(row, top_k)
        assert chosen(routing, t) == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-5)
        row_of = [float(e in expected) for e in range(EXPERTS)]
        assert assignments(routing)[t].tolist() == row_of
        assert dense_weights(routing)[t].tolist() == pytest.approx([expected.get(e, 0.0) for e in range(EXPERTS)])


def test_the_table_and_its_groups():
    assert {name: ROUTING_RULES[name] for name in FIRST_RULES} == FIRST_RULES
    assert (TOP_K_RULES | TOP_1_RULES | DENSE_RULES | {"top_p"}) == set(ROUTING_RULES)
    for name, rule in ROUTING_RULES.items():
        sums = rule(random_logits(), 3).top_k_weights.sum(-1)
        assert (name in NORMALISED_RULES) == bool((sums - 1).abs().max() < 1e-12)
        hand_made = {rule(random_logits(), k).top_k_weights.shape[1] for k in (2, 3)}
        assert hand_made == ({6} if name in DENSE_RULES else {1} if name in TOP_1_RULES else {2, 3})


@pytest.mark.parametrize("name", ROUTING_RULES)
@pytest.mark.parametrize("case", ["one expert", "tied", "huge"])
def test_degenerate_logits(name, case):
    logits = {
        "one expert": random_logits(5, 1),
        "tied": torch.zeros(5, EXPERTS, dtype=torch.float64),
        "huge": random_logits(5, spread=1e4),
    }[case]
    routing = ROUTING_RULES[name](logits, 1 if case == "one expert" else 2)
    assert bool(torch.isfinite(routing.top_k_weights).all())
    rows = assignments(routing).sum(-1)
    assert bool((rows >= 1).all())
    if case == "one expert":
        torch.testing.assert_close(dense_weights(routing), torch.ones(5, 1, dtype=torch.float64), **EXACT)
    if name in NORMALISED_RULES and (name, case) != ("sigmoid_top_k", "huge"):  # there all scores may be 0
        torch.testing.assert_close(dense_weights(routing).sum(-1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(ROUTING_RULES))
def test_the_choice_of_one_token_does_not_depend_on_the_others(name):
    logits = random_logits()
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(1))
    together, apart = ROUTING_RULES[name](logits, 2), ROUTING_RULES[name](logits[order], 2)
    assert torch.equal(dense_weights(together)[order], dense_weights(apart))


# --- top_p ---


def test_top_p_of_equal_probabilities_takes_as_many_as_reach_it():
    logits = torch.zeros(1, 8, dtype=torch.float64)
    for threshold, kept in ((0.125, 1), (0.126, 2), (0.5, 4), (0.51, 5), (0.8, 7), (1.0, 8)):
        assert assignments(softmax_top_p(logits, 8, threshold)).sum() == kept


def test_top_p_of_one_keeps_all_also_where_the_sum_rounds_to_one_early():
    logits = torch.tensor([[0.0, -40.0, -80.0, -120.0]])
    assert logits.softmax(-1).cumsum(-1)[0, 0] == 1
    routing = softmax_top_p(logits, 4, 1.0)
    assert assignments(routing).tolist() == [[1.0] * 4]
    assert torch.equal(routing.top_k_weights, logits.softmax(-1))
    assert torch.equal(
        dense_weights(softmax_top_p(random_logits(), 6, 1.0)), dense_weights(softmax(random_logits(), 6))
    )


def test_top_p_with_a_cap_of_one_is_top_1():
    ours, theirs = softmax_top_p(random_logits(), 1, 0.8), top_1(random_logits(), 1)
    assert torch.equal(ours.top_k_index, theirs.top_k_index)
    assert torch.equal(ours.top_k_weights, theirs.top_k_weights)


def test_top_p_takes_a_cap_above_the_number_of_experts_as_none():
    assert torch.equal(softmax_top_p(random_logits(), 99).top_k_index, softmax_top_p(random_logits(), 6).top_k_index)


def test_the_load_under_top_p_counts_used_slots_only():
    logits = torch.tensor([[9.0, 0, 0, 0], [1.0, 1.0, -9.0, -9.0]], dtype=torch.float64)
    routing = softmax_top_p(logits, 4, 0.8)
    assert expert_counts(routing, None).tolist() == [2.0, 1.0, 0.0, 0.0]
    assert expert_counts(routing, torch.tensor([True, False])).tolist() == [1.0, 0.0, 0.0, 0.0]
    load = torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=torch.float64) / 3
    expected = 4 * (load * logits.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(switch_loss(routing), expected, **EXACT)


# --- gradients ---


@pytest.mark.parametrize(
    "rule",
    [
        make_rule("top_p", top_p=0.7),
        make_rule("top_p", top_p=1.0),
        sigmoid_top_k,
        make_rule("sigmoid_top_k", selection_bias=BIAS[:4]),
        make_rule("softmax_top_k", num_null=2),
    ],
)
@pytest.mark.parametrize("top_k", [2, 4])
def test_weights_carry_the_right_gradient(rule, top_k):
    logits = random_logits(7, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dense_weights(rule(x, top_k)), logits)


def test_the_hard_rule_gives_the_router_nothing():
    routing = top_1_hard(random_logits().requires_grad_(), 1)
    assert not routing.top_k_weights.requires_grad
    assert bool((routing.top_k_weights == 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1e-3, 3.0, 1e4])
def test_straight_through_is_exactly_one_with_the_gradient_of_log_p(dtype, spread):
    logits = random_logits(500, dtype=dtype, spread=spread).requires_grad_()
    routing = top_1_straight_through(logits, 1)
    assert bool((routing.top_k_weights == 1).all())
    assert torch.equal(routing.top_k_index, top_1_hard(logits, 1).top_k_index)
    upstream = random_logits(500, 1, dtype, seed=1)
    (found,) = torch.autograd.grad(routing.top_k_weights, logits, upstream)
    p = logits.softmax(-1).detach()
    by_hand = upstream * (torch.nn.functional.one_hot(routing.top_k_index[:, 0], EXPERTS) - p)
    torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-6 if dtype == torch.float32 else 1e-12)
    p_of = logits.softmax(-1).gather(-1, routing.top_k_index)
    (of_p,) = torch.autograd.grad((p_of * upstream / p_of.detach()).sum(), logits)
    torch.testing.assert_close(found, of_p)


# --- sigmoid scores ---


def test_the_bias_steers_the_choice_and_never_enters_the_weight():
    logits = random_logits()
    bias = torch.tensor([9.0, 0, 0, 0, 0, 8.0], dtype=torch.float64).requires_grad_()
    routing = sigmoid_top_k(logits.requires_grad_(), 2, bias)
    assert routing.top_k_index.tolist() == [[0, 5]] * len(logits)
    scores = logits.sigmoid()[:, [0, 5]]
    torch.testing.assert_close(routing.top_k_weights, scores / scores.sum(-1, keepdim=True), **EXACT)
    (gradient,) = torch.autograd.grad(routing.top_k_weights.square().sum(), bias, allow_unused=True)
    assert gradient is None


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_sigmoid_top_k_is_the_router_of_transformers(top_k):
    config = Glm4MoeConfig(
        hidden_size=8,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=top_k,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
    )
    config.routed_scaling_factor = 1.0
    router = Glm4MoeTopkRouter(config)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    router.e_score_correction_bias.copy_(BIAS)
    x = random_logits(40, 8, torch.float32)
    logits, weights, index = router(x)
    ours = sigmoid_top_k(logits, top_k, router.e_score_correction_bias)
    theirs = torch.zeros_like(logits).scatter(-1, index, weights)
    torch.testing.assert_close(dense_weights(ours), theirs, rtol=1e-6, atol=1e-7)
    assert torch.equal(dense_weights(ours) > 0, theirs > 0)


def test_probabilities_are_what_the_rule_scores_by():
    logits = random_logits()
    for name in ROUTING_RULES:
        scores = logits.sigmoid() if name == "sigmoid_top_k" else logits.exp()
        torch.testing.assert_close(probabilities(name, logits), scores / scores.sum(-1, keepdim=True), **EXACT)
    vanishing = torch.tensor([[-200.0, -201.0]])
    torch.testing.assert_close(probabilities("sigmoid_top_k", vanishing), vanishing.softmax(-1))


REAL = torch.arange(24) % 3 != 1


@pytest.mark.parametrize("real", [None, REAL, torch.zeros(24, dtype=torch.bool)])
@pytest.mark.parametrize("own_load", [False, True])
def test_the_switch_loss_under_sigmoid_and_its_closed_form(real, own_load):
    logits = random_logits(24).requires_grad_()
    routing = sigmoid_top_k(logits, 2, BIAS)
    counts = expert_counts(routing, real)
    load = counts / counts.sum().clamp(min=1) if own_load else torch.arange(6.0).double() / 15
    kept = range(24) if real is None else [t for t in range(24) if real[t]]
    scores = logits.sigmoid()
    q = [sum(scores[t, e] / scores[t].sum() for t in kept) / max(len(kept), 1) for e in range(EXPERTS)]
    by_hand = EXPERTS * sum(load[e] * q[e] for e in range(EXPERTS))
    loss = switch_loss_sigmoid(routing, real, None if own_load else load)
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-12, abs=1e-12)
    (of_definition,) = torch.autograd.grad(loss, logits)
    found = switch_gradient_sigmoid(logits.detach(), real, load)
    assert (found - of_definition).abs().max() <= 1e-12
    if len(kept):
        (of_hand,) = torch.autograd.grad(by_hand, logits)
        assert (found - of_hand).abs().max() <= 1e-12
        assert (found - switch_gradient(logits.detach(), real, load)).abs().max() > 1e-3
    if real is not None:
        assert not found[~real].any()


# --- null experts ---


def test_null_weights_are_for_tokens_with_nothing_else():
    logits = torch.tensor(
        [
            [2.0, 0.0, 1.0, -9.0],  # one true, one null
            [2.0, 1.0, 0.0, 0.0],  # two true
            [0.0, 0.0, 3.0, 1.0],  # two null
            [-500.0, -900.0, 700.0, -800.0],  # a true one that a softmax over both would lose
        ]
    )
    routing = softmax_top_k_null(logits, 2, num_null=2)
    assert routing.top_k_index.tolist() == [[0, 2], [0, 1], [2, 3], [2, 0]]
    one, null = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    expected = torch.tensor([[1, 0], [one, 1 - one], [null, 1 - null], [0, 1]])
    torch.testing.assert_close(routing.top_k_weights, expected)
    assert routing.top_k_weights[0].tolist() == [1.0, 0.0]
    # chosen, and so counted, although it weighs nothing
    assert assignments(routing).sum(0).tolist() == [3.0, 1.0, 3.0, 1.0]


@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_weights_sum_to_one_with_null_experts(top_k):
    weights = softmax_top_k_null(random_logits(), top_k, num_null=3).top_k_weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(50).double())


def test_without_null_experts_it_is_softmax_top_k():
    assert torch.equal(softmax_top_k_null(random_logits(), 3).top_k_weights, softmax_top_k(random_logits(), 3)[1])


def test_a_null_expert_gets_no_gradient_from_the_weights_of_others():
    logits = torch.tensor([[2.0, 1.0, 1.5, -9.0]]).requires_grad_()
    (gradient,) = torch.autograd.grad(softmax_top_k_null(logits, 3, num_null=2).top_k_weights[0, 0], logits)
    assert gradient[0, 2:].tolist() == [0.0, 0.0]
    assert bool((gradient[0, :2] != 0).all())


def test_the_load_of_null_experts_is_shared_among_them():
    load = torch.tensor([0.1, 0.2, 0.0, 0.4, 0.3], dtype=torch.float64)
    pooled = null_pooled(load, 2)
    torch.testing.assert_close(
        pooled, torch.tensor([0.1, 0.2, 0.7 / 3, 0.7 / 3, 0.7 / 3], dtype=torch.float64), **EXACT
    )
    assert torch.equal(null_pooled(load, 5), load)
    # then the balance does not tell null experts apart
    logits = random_logits(24, 5)
    swapped = logits[:, [0, 1, 4, 3, 2]]
    ours, theirs = (switch_gradient(x, None, pooled) for x in (logits, swapped))
    torch.testing.assert_close(ours[:, [0, 1, 4, 3, 2]], theirs, **EXACT)


# --- z-loss and jitter ---


@pytest.mark.parametrize("real", [None, REAL, torch.zeros(24, dtype=torch.bool)])
def test_the_z_loss_and_its_closed_form(real):
    logits = random_logits(24).requires_grad_()
    kept = range(24) if real is None else [t for t in range(24) if real[t]]
    by_hand = sum(math.log(sum(math.exp(v) for v in logits[t].tolist())) ** 2 for t in kept) / max(len(kept), 1)
    loss = z_loss(logits, real)
    assert loss.item() == pytest.approx(by_hand, rel=1e-12)
    (expected,) = torch.autograd.grad(loss, logits)
    found = z_gradient(logits.detach(), real)
    assert (found - expected).abs().max() <= 1e-12
    assert torch.autograd.gradcheck(lambda x: z_loss(x, real), logits)
    assert bool(found.any()) == bool(len(kept))
    if real is not None:
        assert not found[~real].any()


def test_the_z_loss_at_known_points():
    assert float(z_loss(torch.zeros(3, 4))) == pytest.approx(math.log(4) ** 2)
    assert float(z_loss(torch.full((3, 4), -math.log(4)))) == pytest.approx(0.0, abs=1e-6)
    assert float(z_loss(torch.zeros(0, 4))) == 0.0
    assert z_gradient(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_jitter_is_uniform_around_one_and_leaves_its_input_alone(dtype):
    torch.manual_seed(0)
    x = torch.full((200, 500), 2.0, dtype=dtype)
    seen = jittered(x, 0.1, training=True)
    assert bool((x == 2).all())
    assert (seen.shape, seen.dtype) == (x.shape, dtype)
    factors = seen.double() / 2
    slack = 0.004 if dtype == torch.bfloat16 else 1e-6
    assert 0.9 - slack <= float(factors.min()) < 0.901
    assert 1.099 < float(factors.max()) <= 1.1 + slack
    assert float(factors.mean()) == pytest.approx(1.0, abs=1e-3)
    assert float(factors.std()) == pytest.approx(0.2 / math.sqrt(12), rel=0.02)
    assert float(factors.std(1).min()) > 0.05  # not one factor per token


def test_jitter_is_off_in_inference_and_at_zero():
    x = torch.ones(3, 4)
    assert jittered(x, 0.1, training=False) is x
    assert jittered(x, 0.0, training=True) is x


def test_jitter_lets_the_gradient_through():
    x = torch.ones(3, 4, requires_grad=True)
    seen = jittered(x, 0.1, training=True)
    (gradient,) = torch.autograd.grad(seen.sum(), x)
    assert torch.equal(gradient, seen.detach())


# --- make_rule ---


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in ROUTING_RULES),
        ("top_p", {"top_p": 0.3}),
        ("sigmoid_top_k", {"selection_bias": BIAS}),
        ("softmax_top_k", {"num_null": 2}),
    ],
)
def test_a_rule_can_be_copied_and_pickled(name, settings):
    rule = make_rule(name, **settings)
    assert (rule is ROUTING_RULES[name]) == (not settings)
    expected = rule(random_logits(), 2)
    if settings:
        assert not torch.equal(dense_weights(expected), dense_weights(ROUTING_RULES[name](random_logits(), 2)))
    for again in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        found = again(random_logits(), 2)
        assert torch.equal(dense_weights(found), dense_weights(expected))


def test_the_default_threshold_is_that_of_mixlora():
    assert rules.TOP_P == 0.8
    ours, theirs = make_rule("top_p")(random_logits(), 6), make_rule("top_p", top_p=0.8)(random_logits(), 6)
    assert torch.equal(ours.top_k_index, theirs.top_k_index)


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("top_q", {}, "`routing` is 'top_q', but must be one of 'softmax_top_k', .* Did you mean 'top_p'"),
        (None, {}, "`routing` is None, but must be one of"),
        (
            "softmax",
            {"top_p": 0.5},
            "`routing` is 'softmax', but must be 'top_p' where `top_p` is given. Leave `top_p`",
        ),
        ("top_1", {"selection_bias": BIAS}, "must be 'sigmoid_top_k' where `selection_bias` is given"),
        ("top_p", {"num_null": 1}, "must be 'softmax_top_k' where `num_null` is given"),
    ],
)
def test_a_wrong_setting_is_refused(name, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_rule(name, **settings)
