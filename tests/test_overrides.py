"""Experts switched off, forced, weighted and cut at one router, against a loop over tokens and experts."""

import math

import pytest
import torch

from moe_peft.overrides import Override, chosen, overridden
from moe_peft.rank_rules import rank_top_k
from moe_peft.routing import assignments, dense_weights
from moe_peft.rules import make_rule
from moe_peft.selection import Selection, selection_rule, sparsegen


T, N = 40, 6
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def bias():
    return torch.tensor([0.0, 2.0, -1.0, 0.5, 3.0, 0.0], dtype=torch.float64)


def softmax(row):
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def sigmoid(row):
    return [1 / (1 + math.exp(-v)) for v in row]


RULES = {
    "softmax_top_k": (make_rule("softmax_top_k"), softmax, None, True, 1.0, None),
    "softmax": (make_rule("softmax"), softmax, None, True, 1.0, "all"),
    "top_1": (make_rule("top_1"), softmax, None, False, 1.0, 1),
    "top_p": (make_rule("top_p", top_p=0.7), softmax, None, False, 1.0, 0.7),
    "sigmoid_top_k": (make_rule("sigmoid_top_k", selection_bias=bias()), sigmoid, bias(), True, 1.0, None),
    "rank_top_k": (lambda: None, sigmoid, bias(), "k", 1.0, None),
    "free": (selection_rule(Selection("softmax", "top_k", False, 2.5)), softmax, None, False, 2.5, None),
    "free, biased": (selection_rule(Selection("softmax", "top_k", True), bias()), softmax, bias(), True, 1.0, None),
    "free, top_p": (selection_rule(Selection("sigmoid", "top_p", True, 1.0, 0.9)), sigmoid, None, True, 1.0, 0.9),
}


def rule_named(name):
    from functools import partial

    return partial(rank_top_k, selection_bias=bias()) if name == "rank_top_k" else RULES[name][0]


def naive(name, logits, top_k, disable=(), force=(), ablate=(), weights=None, floor=None):
    """One token: its weights, by the words of `moe_peft.routing`."""
    _, score, selection_bias, norm, factor, cut = RULES[name]
    weights = weights or {}
    there = [e for e in range(N) if e not in disable]
    scores = dict(zip(there, score([float(logits[e]) for e in there]), strict=True))
    order = sorted(there, key=lambda e: -(scores[e] + (0 if selection_bias is None else float(selection_bias[e]))))
    force = sorted({*force, *weights})
    slots = len(there) if cut == "all" else 1 if cut == 1 else min(top_k, len(there))
    chosen = order[:slots]
    if isinstance(cut, float):
        chosen = [e for i, e in enumerate(chosen) if sum(scores[o] for o in chosen[:i]) < cut]
    others = [e for e in chosen if e not in force][: slots - len(force)]
    kept = [*force, *others]
    total = sum(scores[e] for e in kept)
    norm_to = {True: 1.0, "k": float(min(top_k, len(there)))}.get(norm)
    result = {e: factor * (scores[e] if norm_to is None else norm_to * scores[e] / total) for e in kept}
    if floor is not None:
        most, before = max(result.values()), sum(result.values())
        dropped = {e: 0.0 if w < floor * most and e not in force else w for e, w in result.items()}
        result = {e: w * before / sum(dropped.values()) for e, w in dropped.items()}
    result.update(weights)
    result.update(dict.fromkeys(ablate, 0.0))
    return [result.get(e, 0.0) for e in range(N)]


def asked(disable=(), force=(), ablate=(), weights=None, floor=None, top_k=None):
    def mask(experts):
        found = torch.zeros(N, dtype=torch.bool)
        found[list(experts)] = True
        return found if len(list(experts)) else None

    weights = weights or {}
    force = sorted({*force, *weights})
    given = torch.zeros(N, dtype=torch.float64)
    given[list(weights)] = torch.tensor(list(weights.values()), dtype=torch.float64)
    return Override(
        mask(disable), mask(force), mask(ablate), mask(weights), given, top_k, floor, None, len(disable), len(force)
    )


WISHES = [
    {"disable": [4, 1]},
    {"disable": [0, 1, 2, 3]},
    {"force": [2]},
    {"force": [2], "disable": [4]},
    {"ablate": [4, 0]},
    {"weights": {3: 0.25}},
    {"weights": {3: 0.0}, "ablate": [1]},
    {"floor": 0.6},
    {"floor": 0.9, "force": [5]},
    {"disable": [1], "force": [5], "floor": 0.5, "ablate": [0]},
]


@pytest.mark.parametrize("wish", WISHES, ids=str)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("top_k", [2, 3])
def test_every_wish_against_its_words(name, wish, top_k):
    torch.manual_seed(0)
    logits = 2 * torch.randn(T, N, dtype=torch.float64)
    top_k = {"top_1": 1}.get(name, top_k)
    weights = dense_weights(overridden(logits, top_k, rule_named(name), asked(**wish)))
    expected = torch.tensor([naive(name, row, top_k, **wish) for row in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, **EXACT)


def test_two_forced_experts_take_both_slots():
    torch.manual_seed(0)
    logits = torch.randn(T, N, dtype=torch.float64)
    routing = overridden(logits, 2, make_rule("softmax_top_k"), asked(weights={0: 0.7, 5: 0.4}))
    assert torch.equal(dense_weights(routing), torch.tensor([0.7, 0, 0, 0, 0, 0.4], dtype=torch.float64).expand(T, N))


def test_a_hole_is_chosen_and_a_disabled_expert_is_not():
    torch.manual_seed(0)
    logits = torch.randn(T, N, dtype=torch.float64)
    plain = assignments(make_rule("softmax_top_k")(logits, 2))
    holes = overridden(logits, 2, make_rule("softmax_top_k"), asked(ablate=[3]))
    assert torch.equal(assignments(holes), plain)
    assert float(plain[:, 3].sum()) > 0
    assert float(dense_weights(holes)[:, 3].abs().sum()) == 0
    off = overridden(logits, 2, make_rule("softmax_top_k"), asked(disable=[3]))
    assert float(assignments(off)[:, 3].sum()) == 0
    assert torch.equal(assignments(off).sum(-1), plain.sum(-1))


@pytest.mark.parametrize("name", RULES)
def test_more_slots_are_what_an_adapter_with_more_slots_has(name):
    torch.manual_seed(0)
    logits, rule = torch.randn(T, N, dtype=torch.float64), rule_named(name)
    assert torch.equal(
        dense_weights(overridden(logits, 2, rule, asked(top_k=4))), dense_weights(overridden(logits, 4, rule, asked()))
    )


def test_under_sparsegen_a_disabled_expert_gives_the_others_its_share():
    torch.manual_seed(0)
    logits = torch.randn(T, N, dtype=torch.float64)
    off = overridden(logits, N, sparsegen, asked(disable=[0])).top_k_weights
    torch.testing.assert_close(off[:, 1:], sparsegen(logits[:, 1:], N).top_k_weights, **EXACT)
    assert float(off[:, 0].sum()) == 0


@pytest.mark.parametrize("name", RULES)
def test_of_whole_blocks_the_frozen_part_stays(name):
    torch.manual_seed(0)
    logits, rule = torch.randn(T, N, dtype=torch.float64), rule_named(name)
    top_k = {"top_1": 1}.get(name, 2)
    for wish in ({"ablate": [0, 3]}, {"weights": {2: 0.9}}, {"weights": {2: 0.1}, "ablate": [2]}):
        forced = {"force": list(wish.get("weights", {}))}
        before = overridden(logits, top_k, rule, asked(**forced), whole_blocks=True)
        routing = overridden(logits, top_k, rule, asked(**wish), whole_blocks=True)
        torch.testing.assert_close(routing.top_k_weights.sum(-1), before.top_k_weights.sum(-1), **EXACT)
        experts = dense_weights(overridden(logits, top_k, rule, asked(**wish)))
        torch.testing.assert_close(dense_weights(routing), experts, **EXACT)


def test_a_domain_is_one_expert_of_weight_one():
    domains = torch.tensor([2, 0, 5])
    weights = dense_weights(chosen(domains, N, torch.float64))
    assert torch.equal(weights, torch.nn.functional.one_hot(domains, N).double())
