"""Each further balance loss at the points where its value is known, and in the direction that its words say."""

import math

import pytest
import torch

from moe_peft.balance_terms import (
    BIAS_LIMIT,
    cv2_loss,
    information_loss,
    sequence_loss,
    token_entropy,
    updated_bias,
)
from moe_peft.routing import Routing, softmax, softmax_top_k


EXACT = {"rtol": 1e-9, "atol": 1e-9}
SURE = 200.0


def to(experts: list[int], num_experts: int = 4) -> torch.Tensor:
    """Logits of tokens that are sure of their expert."""
    return SURE * torch.nn.functional.one_hot(torch.tensor(experts), num_experts).double()


def test_cv2_is_zero_when_even_and_largest_when_one_expert_takes_all():
    assert float(cv2_loss(softmax(torch.zeros(8, 4, dtype=torch.float64), 4))) == pytest.approx(0.0)
    assert float(cv2_loss(softmax(to([0, 1, 2, 3] * 2), 4))) == pytest.approx(0.0)
    assert float(cv2_loss(softmax(to([2] * 8), 4))) == pytest.approx(3.0)  # E - 1
    importance = torch.tensor([3.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    wanted = importance.var(unbiased=False) / importance.mean() ** 2
    assert float(cv2_loss(softmax(to([0, 0, 0, 1]), 4))) == pytest.approx(float(wanted))


def test_cv2_moves_weight_from_the_busy_to_the_idle():
    u = torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(cv2_loss(softmax(u, 3)), u)
    assert gradient[0, 0] > 0 > gradient[0, 1]


def test_the_sequence_loss_is_one_when_each_row_is_even_and_blind_to_nothing_within_a_row():
    even = to([0, 1, 2, 3] * 2)
    assert float(sequence_loss(softmax_top_k(even, 1), rows=2)) == pytest.approx(1.0)
    by_row = to([0] * 4 + [1] * 4)  # even over two experts in all, collapsed in each row
    assert float(sequence_loss(softmax_top_k(by_row, 1), rows=2)) == pytest.approx(4.0)  # E / K
    real = torch.tensor([True, False, False, False] + [False] * 4)
    assert float(sequence_loss(softmax_top_k(by_row, 1), 2, real)) == pytest.approx(4.0)


def test_padding_changes_none_of_them():
    torch.manual_seed(0)
    u = torch.randn(12, 4, dtype=torch.float64)
    real = torch.tensor([True] * 4 + [False] * 2 + [True] * 4 + [False] * 2)
    other = u.masked_fill(~real.unsqueeze(-1), 7.0)
    groups = torch.tensor([0] * 6 + [1] * 6)
    for loss in (
        lambda x: cv2_loss(softmax(x, 4), real),
        lambda x: sequence_loss(softmax_top_k(x, 2), 2, real),
        lambda x: token_entropy(x, real),
        lambda x: information_loss(x, groups, 2, real),
    ):
        torch.testing.assert_close(loss(u), loss(other), **EXACT)


def test_token_entropy_knows_certainty_and_doubt():
    assert float(token_entropy(torch.zeros(5, 4, dtype=torch.float64))) == pytest.approx(math.log(4))
    assert float(token_entropy(to([0, 1, 2]))) == pytest.approx(0.0)


def test_mutual_information_at_its_ends():
    groups = torch.tensor([0, 0, 1, 1])
    alike = information_loss(to([0, 1, 0, 1]), groups, 2)
    apart = information_loss(to([0, 0, 1, 1]), groups, 2)
    doubtful = information_loss(torch.zeros(4, 4, dtype=torch.float64), groups, 2)
    assert float(alike) == pytest.approx(0.0)
    assert float(doubtful) == pytest.approx(0.0)
    assert float(apart) == pytest.approx(-math.log(2))


def test_mutual_information_is_that_of_the_joint_distribution():
    """Against the textbook sum over group and expert."""
    torch.manual_seed(1)
    u, groups = torch.randn(9, 3, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2])
    joint = torch.stack([u.softmax(-1)[groups == g].sum(0) / 9 for g in range(3)])
    wanted = 0.0
    for g in range(3):
        for e in range(3):
            wanted += float(joint[g, e] * (joint[g, e] / (joint[g].sum() * joint[:, e].sum())).log())
    assert float(information_loss(u, groups, 3)) == pytest.approx(-wanted)


def test_the_bias_lifts_the_idle_and_lowers_the_busy_by_equal_steps():
    counts = torch.tensor([10.0, 0.0, 2.0, 4.0])
    bias = updated_bias(torch.zeros(4), counts, torch.tensor(8.0), 0.1, 4)
    torch.testing.assert_close(
        bias, torch.tensor([-0.1, 0.1, 0.1, 0.0]) - 0.1 / 4
    )  # 4 is the mean: no step, then centred
    assert torch.equal(updated_bias(torch.zeros(4), torch.full((4,), 4.0), torch.tensor(8.0), 0.1, 4), torch.zeros(4))
    far = torch.tensor([BIAS_LIMIT, 0.0, 0.0, 0.0])
    assert updated_bias(far, torch.tensor([0.0, 9.0, 9.0, 9.0]), torch.tensor(9.0), 5.0, 4).abs().max() == BIAS_LIMIT


def test_a_target_moves_true_experts_only():
    counts = torch.tensor([1.0, 9.0, 50.0, 40.0])  # two true experts, two null; 50 tokens, one each wanted
    bias = updated_bias(torch.zeros(4), counts, torch.tensor(5.0), 0.1, 2, target_active=2.0)
    torch.testing.assert_close(bias, torch.tensor([0.1, -0.1, 0.0, 0.0]))


def test_the_controller_evens_out_a_skewed_router():
    """Closed loop on fixed logits: the busiest expert's load comes down to within 10 % of even."""
    torch.manual_seed(0)
    u = torch.randn(4000, 6) + torch.tensor([1.5, 1.0, 0.0, 0.0, -0.5, -1.0])
    bias, scores = torch.zeros(6), u.sigmoid()

    def counts() -> torch.Tensor:
        return torch.nn.functional.one_hot((scores + bias).topk(2).indices, 6).sum((0, 1)).float()

    before = counts().max() / counts().mean()
    for _ in range(200):
        bias = updated_bias(bias, counts(), torch.tensor(4000.0), 0.01, 6)
    assert before > 1.5
    assert counts().max() / counts().mean() < 1.1


def test_losses_have_gradients_that_agree_with_finite_differences():
    torch.manual_seed(3)
    u = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([0, 1, 0, 1, 0, 1])
    assert torch.autograd.gradcheck(lambda x: cv2_loss(softmax(x, 3)), (u,))
    assert torch.autograd.gradcheck(token_entropy, (u,))
    assert torch.autograd.gradcheck(lambda x: information_loss(x, groups, 2), (u,))
    # The load in the sequence loss carries no gradient: with it held, the loss is linear in the probabilities.
    chosen = softmax_top_k(u, 2)
    held = lambda x: sequence_loss(Routing(x, chosen.top_k_weights.detach(), chosen.top_k_index), 2)  # noqa: E731
    assert torch.autograd.gradcheck(held, (u,))
