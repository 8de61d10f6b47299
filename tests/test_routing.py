"""The routing rules against their papers' formulas, written out, and their invariants on random and degenerate logits."""

import pytest
import torch
from parameterized import parameterized

from moe_peft.routing import (
    DENSE_RULES,
    ROUTING_RULES,
    assignments,
    dense_weights,
    routing_dtype,
    softmax,
    softmax_top_k,
    top_1,
    with_shared,
)


def random_logits(tokens=50, experts=6, dtype=torch.float64, spread=3.0):
    return torch.randn(tokens, experts, dtype=dtype, generator=torch.Generator().manual_seed(0)) * spread


EVERY_RULE = [(name, k) for name in ROUTING_RULES for k in ((1, 2, 5, 6) if name == "softmax_top_k" else (2,))]


@pytest.mark.parametrize(("rule", "top_k"), EVERY_RULE)
@pytest.mark.parametrize("case", ["random", "huge", "tied", "one token", "no token"])
def test_every_rule_gives_a_routing(rule, top_k, case):
    logits = {
        "random": random_logits(),
        "huge": random_logits(spread=1e4),
        "tied": torch.zeros(7, 6, dtype=torch.float64),
        "one token": random_logits(1),
        "no token": random_logits(0),
    }[case]
    routing = ROUTING_RULES[rule](logits, top_k)
    tokens = logits.shape[0]
    assert routing.router_logits is logits
    assert (routing.top_k_index is None) == (rule in DENSE_RULES)
    k = {"softmax_top_k": top_k, "softmax": 6, "top_1": 1}[rule]
    assert routing.top_k_weights.shape == (tokens, k)
    assert routing.top_k_weights.dtype == logits.dtype
    assert bool((routing.top_k_weights >= 0).all())
    assert bool((routing.top_k_weights <= 1).all())
    if rule != "top_1":
        torch.testing.assert_close(routing.top_k_weights.sum(-1), torch.ones(tokens, dtype=logits.dtype))
    if routing.top_k_index is not None:
        assert routing.top_k_index.dtype == torch.int64
        assert all(len(set(row)) == k and set(row) <= set(range(6)) for row in routing.top_k_index.tolist())
    assert bool((assignments(routing).sum(-1) == k).all())
    assert bool(((dense_weights(routing) != 0) <= (assignments(routing) != 0)).all())


@parameterized.expand([(1,), (2,), (3,), (6,)])
def test_softmax_top_k_is_softmax_then_top_k_then_rescaled(k):
    logits = random_logits()
    probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
    kept, index = probabilities.topk(k, dim=-1)
    routing = softmax_top_k(logits, k)
    assert torch.equal(routing.top_k_index, index)
    torch.testing.assert_close(routing.top_k_weights, kept / kept.sum(-1, keepdim=True), rtol=1e-12, atol=1e-12)


def test_top_k_of_all_experts_is_the_dense_softmax():
    logits = random_logits()
    torch.testing.assert_close(
        dense_weights(softmax_top_k(logits, 6)), dense_weights(softmax(logits, 6)), rtol=1e-12, atol=1e-12
    )


def test_softmax_has_the_formula_of_loramoe():
    logits = random_logits()
    expected = logits.exp() / logits.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(softmax(logits, 0).top_k_weights, expected, rtol=1e-12, atol=1e-12)


def test_top_1_is_the_largest_probability_and_teaches_the_router():
    logits = random_logits().requires_grad_()
    routing = top_1(logits, 1)
    probabilities = logits.softmax(-1)
    assert torch.equal(routing.top_k_index[:, 0], probabilities.argmax(-1))
    torch.testing.assert_close(routing.top_k_weights[:, 0], probabilities.max(-1).values)
    (gradient,) = torch.autograd.grad(routing.top_k_weights.sum(), logits)
    assert bool((gradient.abs().sum(-1) > 1e-6).all())
    # Rescaled as in softmax_top_k the weight would be 1 whatever the logits are. This is why the two differ.
    (nothing,) = torch.autograd.grad(softmax_top_k(logits, 1).top_k_weights.sum(), logits)
    assert not nothing.any()


def test_the_choice_of_one_token_does_not_depend_on_the_others():
    logits = random_logits()
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(1))
    for rule in ROUTING_RULES.values():
        together, apart = rule(logits, 2), rule(logits[order], 2)
        assert torch.equal(dense_weights(together)[order], dense_weights(apart))


def test_weights_carry_the_right_gradient():
    logits = random_logits(5, 4).requires_grad_()
    for rule in ROUTING_RULES.values():
        assert torch.autograd.gradcheck(lambda x, rule=rule: dense_weights(rule(x, 2)), logits)


def test_shared_experts_stand_behind_the_routed_ones_with_weight_one():
    logits = random_logits()
    for rule in (softmax_top_k, top_1):
        routing = rule(logits, 2)
        both = with_shared(routing, 2)
        assert torch.equal(both.top_k_index[:, :-2], routing.top_k_index)
        assert both.top_k_index[:, -2:].tolist() == [[6, 7]] * len(logits)
        assert torch.equal(both.top_k_weights[:, :-2], routing.top_k_weights)
        assert bool((both.top_k_weights[:, -2:] == 1).all())
    dense = with_shared(softmax(logits, 6), 1)
    assert dense.top_k_index is None
    assert dense.top_k_weights.shape == (50, 7)
    assert with_shared(dense, 0) is dense


def test_routing_is_done_in_single_precision_or_better():
    assert (
        routing_dtype(torch.bfloat16) == routing_dtype(torch.float16) == routing_dtype(torch.float32) == torch.float32
    )
    assert routing_dtype(torch.float64) == torch.float64
