"""Rows like the shots, without near copies: against the definition in plain loops."""

import math

import pytest
import torch

from moe_peft.similar_rows import mean_embeddings, most_similar


def by_definition(shots, others, limit, max_cosine):
    """Lists of floats and the words of the docstring."""
    rows = [*shots, *others]
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    def cosine(x, y):
        x, y = ([a - m for a, m in zip(v, mean, strict=True)] for v in (x, y))
        return sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))

    nearest = [max(cosine(other, shot) for shot in shots) for other in others]
    taken = []
    for index in sorted(range(len(others)), key=lambda i: -nearest[i]):
        if len(taken) < limit and all(cosine(others[index], others[j]) <= max_cosine for j in taken):
            taken.append(index)
    return taken


@pytest.mark.parametrize(("limit", "max_cosine"), [(5, 0.9), (40, 0.9), (40, 0.5), (1, 0.9), (40, 1.0)])
def test_the_fast_way_is_the_definition(limit, max_cosine):
    torch.manual_seed(0)
    shots, others = torch.randn(4, 3, dtype=torch.float64) + 2, torch.randn(40, 3, dtype=torch.float64) + 2
    found = most_similar(shots, others, limit, max_cosine)
    assert found == by_definition(shots.tolist(), others.tolist(), limit, max_cosine)
    assert len(found) == min(limit, 40) or max_cosine < 1


def test_a_copy_is_left_out_and_the_nearest_comes_first():
    shots = torch.tensor([[1.0, 0.0, 0.0]])
    others = torch.tensor([[0.0, 1.0, 0.0], [0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])
    found = most_similar(shots, others)
    assert found[0] == 1
    assert 2 not in found


def test_a_vector_is_the_mean_of_the_tokens_embeddings():
    embedding = torch.nn.Embedding(7, 5).half()
    rows = [[1, 2, 2], [6], []]
    found = mean_embeddings(rows, embedding)
    weight = embedding.weight.float()
    torch.testing.assert_close(found[0], (weight[1] + 2 * weight[2]) / 3)
    torch.testing.assert_close(found[1], weight[6])
    assert found.dtype == torch.float32
    assert not found[2].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "`limit` is 0, but must be a whole number of at least 1"),
        ({"max_cosine": 0.0}, "`max_cosine` is 0.0, but must be above 0 and at most 1"),
    ],
)
def test_what_is_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        most_similar(torch.eye(2), torch.eye(2), **settings)
