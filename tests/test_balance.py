"""The balance losses: their values where these are known, against transformers', and in which direction they push."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe_peft.balance import expert_counts, localized_loss, mean_probability, switch_gradient, switch_loss
from moe_peft.routing import Routing, dense_weights, softmax, softmax_top_k, top_1


TOKENS, EXPERTS = 24, 4


def random_logits(tokens=TOKENS, experts=EXPERTS, seed=0):
    return torch.randn(tokens, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2


def pattern(rows) -> torch.Tensor:
    """Logits whose softmax is near certain of what `rows` choose."""
    return torch.tensor(rows, dtype=torch.float64) * 50


HALF = torch.arange(TOKENS) % 2 == 0


def test_switch_is_one_when_even_whatever_k_is():
    uniform = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64)
    for k in (1, 2, 3, 4):
        # P is 1/E for every expert, so that the value is 1 whatever f is, also where ties go to the same experts
        assert switch_loss(softmax_top_k(uniform, k)) == pytest.approx(1.0)
    turns = pattern([[float(e == t % EXPERTS) for e in range(EXPERTS)] for t in range(TOKENS)])
    assert switch_loss(top_1(turns, 1)) == pytest.approx(1.0)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_switch_is_e_over_k_when_k_experts_take_everything(k):
    collapsed = pattern([[1.0] * k + [0.0] * (EXPERTS - k)] * TOKENS)
    rule = top_1 if k == 1 else softmax_top_k
    assert switch_loss(rule(collapsed, k)) == pytest.approx(EXPERTS / k)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_switch_is_that_of_transformers_over_k(k, masked):
    logits = random_logits()
    mask = HALF if masked else None
    theirs = load_balancing_loss_func((logits,), EXPERTS, k, None if mask is None else mask.view(4, 6))
    assert float(switch_loss(softmax_top_k(logits, k), mask)) == pytest.approx(float(theirs) / k, rel=1e-6)


def test_padding_counts_for_nothing():
    logits = random_logits()
    masked = logits.clone()
    masked[~HALF] = 1e4 * random_logits(seed=1)[~HALF]
    for rule in (softmax_top_k, top_1, softmax):
        ours, theirs = rule(masked, 2), rule(logits[HALF], 2)
        assert torch.equal(expert_counts(ours, HALF), expert_counts(theirs, None))
        torch.testing.assert_close(switch_loss(ours, HALF), switch_loss(theirs))
        torch.testing.assert_close(mean_probability(masked, HALF), mean_probability(logits[HALF], None))
    types = torch.tensor([0, 1, 1, 0])
    rows = HALF.view(4, 6)
    short = softmax(logits.view(4, 6, EXPERTS)[rows].flatten(0, -2), 0)
    torch.testing.assert_close(localized_loss(softmax(masked, 0), types, 0.3, HALF), localized_loss(short, types, 0.3))


def test_no_real_token_gives_zero_and_no_nan():
    logits, nothing = random_logits(), torch.zeros(TOKENS, dtype=torch.bool)
    assert switch_loss(softmax_top_k(logits, 2), nothing) == 0
    assert not switch_gradient(logits, nothing, torch.full((EXPERTS,), 0.25).double()).any()
    assert torch.isfinite(localized_loss(softmax(logits, 0), torch.tensor([0, 1]), 0.1, nothing))


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("own_load", [False, True])
def test_the_closed_form_gradient_is_autograds(k, masked, own_load):
    logits = random_logits().requires_grad_()
    mask = HALF if masked else None
    routing = softmax_top_k(logits, k)
    counts = expert_counts(routing, mask)
    load = counts / counts.sum() if own_load else torch.tensor([0.7, 0.2, 0.1, 0.0], dtype=torch.float64)
    (expected,) = torch.autograd.grad(switch_loss(routing, mask, None if own_load else load), logits)
    found = switch_gradient(logits.detach(), mask, load)
    assert (found - expected).abs().max() <= 1e-12
    assert (k == EXPERTS and own_load) == bool(expected.abs().max() < 1e-9)  # nothing to gain where all are visited
    if masked:
        assert not found[~HALF].any()


def test_switch_evens_the_experts_out():
    logits = (random_logits(240) + torch.tensor([6.0, 0.0, 0.0, -6.0])).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    before = switch_loss(softmax_top_k(logits, 2)).item()
    for _ in range(300):
        optimizer.zero_grad()
        switch_loss(softmax_top_k(logits, 2)).backward()
        optimizer.step()
    counts = expert_counts(softmax_top_k(logits, 2), None)
    assert before > 1.2
    assert switch_loss(softmax_top_k(logits, 2)).item() == pytest.approx(1.0, abs=0.02)
    assert counts.min() / counts.max() > 0.5


def expected_localized(weights, types, delta, real=None):
    """The paper's equations as a double loop: weights `[B, S, E]`."""
    rows, length, experts = weights.shape
    values = []
    for m in range(rows):
        kept = [s for s in range(length) if real is None or real[m, s]]
        for e in range(experts):
            importance = sum(float(weights[m, s, e]) for s in kept) / len(kept)
            expert_type = 1 if e < experts // 2 else 0
            values.append(importance * (1 + delta if expert_type == types[m] else 1 - delta))
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return variance, mean


@pytest.mark.parametrize("masked", [False, True])
def test_localized_is_the_dispersion_of_the_weighted_importance(masked):
    logits, types = random_logits(), [1, 0, 1]
    real = HALF.view(3, 8) if masked else None
    variance, mean = expected_localized(logits.softmax(-1).view(3, 8, EXPERTS), types, 0.3, real)
    given = (softmax(logits, 0), torch.tensor(types), 0.3, None if real is None else real.flatten())
    assert float(localized_loss(*given)) == pytest.approx(variance / (mean**2 + 1e-10), rel=1e-12)
    assert float(localized_loss(*given, variant="var_over_mean")) == pytest.approx(
        variance / (mean + 1e-10), rel=1e-12
    )


@pytest.mark.parametrize("variant", ["cv2", "var_over_mean"])
def test_localized_favours_the_half_that_it_multiplies_by_less(variant):
    """At the minimum Z is constant: the half with 1 + delta holds (1 - delta) / (1 + delta) of the other's weight."""
    delta, types = 0.4, torch.tensor([0, 1, 0, 1])
    logits = random_logits(32).requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure():
        optimizer.zero_grad()
        loss = localized_loss(softmax(logits, 0), types, delta, variant=variant)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure().item() == pytest.approx(0.0, abs=1e-9)
    mass = dense_weights(softmax(logits, 0)).detach().view(4, 8, EXPERTS).mean(1)
    first, second = mass[:, :2].sum(1), mass[:, 2:].sum(1)
    ratio = (1 - delta) / (1 + delta)
    torch.testing.assert_close(
        first[types == 1] / second[types == 1], torch.full((2,), ratio).double(), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        second[types == 0] / first[types == 0], torch.full((2,), ratio).double(), rtol=1e-4, atol=0
    )


def test_localized_with_delta_zero_is_the_coefficient_of_variation():
    routing = softmax(random_logits(), 0)
    importance = dense_weights(routing).view(4, 6, EXPERTS).mean(1)
    expected = importance.var() / importance.mean() ** 2
    torch.testing.assert_close(localized_loss(routing, torch.tensor([0, 1, 1, 0]), 0.0), expected)


def test_localized_gives_every_token_a_gradient():
    logits = random_logits().requires_grad_()
    (gradient,) = torch.autograd.grad(localized_loss(softmax(logits, 0), torch.tensor([0, 1]), 0.3), logits)
    assert bool((gradient.abs().sum(-1) > 0).all())


def test_localized_works_where_experts_are_selected():
    routing = softmax_top_k(random_logits(), 2)
    assert isinstance(routing, Routing)
    variance, mean = expected_localized(dense_weights(routing).view(2, 12, EXPERTS), [0, 1], 0.2)
    assert float(localized_loss(routing, torch.tensor([0, 1]), 0.2)) == pytest.approx(
        variance / (mean**2 + 1e-10), rel=1e-12
    )


def test_localized_refuses_task_types_that_do_not_fit():
    with pytest.raises(
        ValueError, match=r"`task_types` is \[5\], but must be .* one number per row: 24 tokens are not 5"
    ):
        localized_loss(softmax(random_logits(), 0), torch.tensor([0, 1, 0, 1, 0]), 0.1)
