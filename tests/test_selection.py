"""Each free choice of routing against a loop that follows the words of its definition, gradients included."""

import math

import pytest
import torch

from moe_peft.routing import dense_weights
from moe_peft.rules import ROUTING_RULES, make_rule
from moe_peft.selection import (
    MASKED,
    Selection,
    at_random,
    evenly,
    given,
    only_allowed,
    select,
    selection_rule,
    sparsegen,
)


EXACT = {"rtol": 1e-9, "atol": 1e-12}


def logits(tokens: int = 40, columns: int = 6, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return (2 * torch.randn(tokens, columns, dtype=torch.float64)).requires_grad_()


def select_by_hand(row, top_k, how, bias, masked=()):
    """One token, in Python: `{column: weight}` of what it keeps."""
    columns = range(len(row))
    if how.scoring_func == "softmax":
        total = sum(row[c].exp() for c in columns)
        score = [row[c].exp() / total for c in columns]
    else:
        score = [1 / (1 + (-row[c]).exp()) for c in columns]
    order = sorted((c for c in columns if c not in masked), key=lambda c: -(float(score[c].detach()) + bias[c]))
    if how.select == "all":
        kept = list(columns)
    elif how.select == "top_k":
        kept = order[:top_k]
    else:
        kept, mass = [], 0.0
        for column in order[:top_k]:
            if mass >= how.top_p:
                break
            kept.append(column)
            mass += float(score[column].detach())
    null = [c for c in kept if c >= len(row) - how.num_null]
    if how.select != "all" and len(null) < len(kept):
        weights = {c: 0 * score[c] if c in null else score[c] for c in kept}
    else:
        weights = {c: score[c] for c in kept}
    if how.norm_topk_prob:
        total = sum(weights.values())
        weights = {c: w / total for c, w in weights.items()}
    return {c: w * how.routed_scaling_factor for c, w in weights.items()}


CHOICES = [
    Selection(),
    Selection("sigmoid"),
    Selection("softmax", "top_k", False, 2.5),
    Selection("sigmoid", "all", True, 0.5),
    Selection("softmax", "all", False),
    Selection("softmax", "top_p", False, 1.0, 0.7),
    Selection("softmax", "top_p", True, 1.0, 0.9),
    Selection("softmax", "top_k", True, 1.0, 1.0, 2),
    Selection("sigmoid", "top_k", False, 1.0, 1.0, 3),
]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("how", CHOICES, ids=str)
def test_select_is_its_definition(how, with_bias):
    u = logits()
    bias = torch.linspace(-0.4, 0.6, 6, dtype=torch.float64) if with_bias else None
    routing = select(u, 3, how, bias)
    ours = dense_weights(routing)
    wanted = torch.zeros_like(ours)
    rows = []
    for token in range(len(u)):
        weights = select_by_hand(u[token], 3, how, [0.0] * 6 if bias is None else bias.tolist())
        rows.append(torch.stack([weights.get(c, u.new_zeros(())) for c in range(6)]))
        if routing.top_k_index is not None:
            assert set(weights) == {c for c in routing.top_k_index[token].tolist() if c < 6}
    wanted = torch.stack(rows)
    torch.testing.assert_close(ours, wanted, **EXACT)
    probe = torch.randn_like(ours)
    mine, theirs = (torch.autograd.grad((w * probe).sum(), u, retain_graph=True)[0] for w in (ours, wanted))
    torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("softmax_top_k", Selection()),
        ("softmax", Selection("softmax", "all")),
        ("sigmoid_top_k", Selection("sigmoid")),
        ("top_p", Selection("softmax", "top_p", False, 1.0, 0.8)),
    ],
)
def test_the_named_rules_are_points_of_the_space(name, how):
    u = logits()
    torch.testing.assert_close(dense_weights(select(u, 3, how)), dense_weights(ROUTING_RULES[name](u, 3)), **EXACT)


def test_null_experts_are_those_of_the_named_rule():
    u, how = logits(columns=9), Selection(num_null=5)
    named = make_rule("softmax_top_k", num_null=5)
    ours, theirs = (dense_weights(rule(u, 2)) for rule in (selection_rule(how), named))
    torch.testing.assert_close(ours[:, :4], theirs[:, :4], **EXACT)
    torch.testing.assert_close(ours.sum(-1), torch.ones(40, dtype=torch.float64), **EXACT)


def test_the_bias_chooses_and_never_weighs():
    u = logits()
    bias = torch.tensor([9.0, 8.0, 0, 0, 0, 0], dtype=torch.float64)
    routing = select(u, 2, Selection("sigmoid", "top_k", False), bias)
    assert routing.top_k_index.sort(-1).values.tolist() == [[0, 1]] * 40
    torch.testing.assert_close(dense_weights(routing)[:, :2], u[:, :2].sigmoid(), **EXACT)


@pytest.mark.parametrize("how", [Selection(), Selection("sigmoid", "top_k", False), Selection("softmax", "all")])
def test_masked_experts_get_nothing_and_no_slot(how):
    u = logits()
    groups = torch.tensor([[True] * 2 + [False] * 4, [False, True, True, True, True, False]])
    types = torch.arange(40) % 2
    routing = select(only_allowed(u, groups, types), 3, how)
    weights = dense_weights(routing)
    assert not weights[~groups[types]].any()
    assert torch.isfinite(torch.autograd.grad(weights.sum(), u)[0]).all()
    if routing.top_k_index is not None:  # two allowed, three slots: one is empty
        assert ((routing.top_k_index[0::2] < 6).sum(-1) == 2).all()
        assert ((routing.top_k_index[1::2] < 6).sum(-1) == 3).all()
    log_probs = only_allowed(u, groups, types).log_softmax(-1)
    assert torch.isfinite(log_probs.exp() * log_probs).all()  # so that the entropy of a masked router is a number
    assert MASKED < -1e20


def sparsemax_by_bisection(u, room):
    """`max(0, (u - tau) / room)` with tau so that it sums to 1, by bisection: no sorting, no closed form."""
    low, high = float(u.min()) - room - 1, float(u.max())
    for _ in range(200):
        tau = (low + high) / 2
        total = float(((u - tau) / room).clamp(min=0).sum())
        low, high = (tau, high) if total > 1 else (low, tau)
    return ((u - (low + high) / 2) / room).clamp(min=0)


@pytest.mark.parametrize("sparsity", [-5.0, -1.0, 0.0, 0.5, 0.9])
def test_sparsegen_is_the_projection_on_the_simplex(sparsity):
    u = logits()
    weights = sparsegen(u, 6, sparsity).top_k_weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(40, dtype=torch.float64), **EXACT)
    wanted = torch.stack([sparsemax_by_bisection(row, 1 - sparsity) for row in u.detach()])
    torch.testing.assert_close(weights.detach(), wanted, rtol=1e-8, atol=1e-10)
    assert torch.autograd.gradcheck(lambda x: sparsegen(x, 6, sparsity).top_k_weights, (logits(8),))


def test_sparsegen_uses_fewer_experts_the_higher_its_sparsity():
    u = logits(200)
    active = [float((sparsegen(u, 6, s).top_k_weights > 0).sum(-1).double().mean()) for s in (-20.0, -1.0, 0.0, 0.9)]
    assert active == sorted(active, reverse=True)
    assert active[0] > 5
    assert active[-1] < 1.5


def test_sparsegen_leaves_out_masked_experts():
    u = logits()
    weights = sparsegen(
        only_allowed(u, torch.tensor([[True, True, False, False, True, True]]), torch.zeros(40).long()), 6
    )
    assert not weights.top_k_weights[:, 2:4].any()
    torch.testing.assert_close(weights.top_k_weights.sum(-1), torch.ones(40, dtype=torch.float64), **EXACT)


def test_given_shares_a_token_equally_among_the_experts_of_its_type():
    groups = torch.tensor([[True, False, True], [False, True, False]])
    routing = given(groups, torch.tensor([0, 1, 1, 0]), torch.float64)
    assert routing.top_k_weights.tolist() == [[0.5, 0, 0.5], [0, 1, 0], [0, 1, 0], [0.5, 0, 0.5]]


def test_random_is_even_and_its_expectation_is_the_mean():
    torch.manual_seed(0)
    like = torch.zeros((), dtype=torch.float64)
    routing = at_random(8000, 4, like)
    share = dense_weights(routing).mean(0)
    bound = 4 * math.sqrt(0.25 * 0.75 / 8000)  # four standard deviations
    assert (share - 0.25).abs().max() < bound
    assert torch.equal(evenly(3, 4, like).top_k_weights, torch.full((3, 4), 0.25, dtype=torch.float64))
