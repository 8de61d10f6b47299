"""The maths of pools and splits: fast paths against their definitions, gradients included; what a draw promises."""

import pytest
import torch

from moe_peft.shards import (
    assembled,
    assembled_naive,
    draw_index,
    draw_splits,
    expected,
    expected_naive,
    low_rank_added,
    low_rank_added_naive,
    sampled,
)


EXACT = {"rtol": 1e-9, "atol": 1e-11}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("shards", "width", "r", "per_vector"), [(6, 5, 3, 1), (7, 3, 2, 4), (1, 4, 1, 1)])
def test_assembling_agrees_with_the_definition(shards, width, r, per_vector, dtype):
    torch.manual_seed(0)
    pool, index = random(shards, width), torch.randint(shards, (r * per_vector,), dtype=dtype)
    want, got = assembled_naive(pool, index, r), assembled(pool, index, r)
    assert got.shape == (r, width * per_vector)
    assert torch.equal(got, want)
    weight = torch.randn_like(want)
    gradients = [torch.autograd.grad((factor * weight).sum(), pool)[0] for factor in (want, got)]
    torch.testing.assert_close(*gradients, **EXACT)


@pytest.mark.parametrize("T", [1, 7])
def test_the_low_rank_output_agrees_with_the_definition(T):
    torch.manual_seed(0)
    arguments = random(2, T, 6), random(2, T, 5), random(3, 6), random(3, 5)
    outputs = [f(*arguments, 0.7) for f in (low_rank_added_naive, low_rank_added)]
    torch.testing.assert_close(*outputs, **EXACT)
    gradients = [torch.autograd.grad(output.square().sum(), arguments) for output in outputs]
    for want, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, **EXACT)


def test_the_output_keeps_the_dtype_of_the_frozen_layer():
    y = torch.randn(4, 5, dtype=torch.bfloat16)
    out = low_rank_added(torch.randn(4, 6, dtype=torch.bfloat16), y, torch.randn(3, 6), torch.zeros(3, 5), 1.0)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, y)


def test_dropout_drops_whole_entries_of_the_input_and_scales_the_rest():
    torch.manual_seed(0)
    x, A, B = torch.ones(1000, 1), torch.ones(1, 1), torch.ones(1, 1)
    out = low_rank_added(x, torch.zeros(1000, 1), A, B, 1.0, dropout=0.25)
    torch.testing.assert_close(out[out != 0].unique(), torch.tensor([4 / 3]))
    assert 0.15 < (out == 0).double().mean() < 0.35


def test_a_choice_has_public_shards_without_repeats_and_the_layers_own():
    layers, r, e, per_vector, private = 4, 5, 3, 2, 1
    generator, public = seeded(), (e - private) * layers * per_vector
    seen: set[int] = set()
    for layer in range(layers):
        index = draw_index(layers, layer, r, e, per_vector, private, generator)
        assert index.dtype == torch.int32
        assert index.shape == (r * per_vector,)
        taken, own = index[: (r - private) * per_vector].tolist(), index[(r - private) * per_vector :].tolist()
        assert len(set(taken)) == len(taken)
        assert all(0 <= shard < public for shard in taken)
        assert all(public <= shard < e * layers * per_vector for shard in own)
        assert not seen & set(own)
        seen |= set(own)
    assert len(seen) == layers * private * per_vector


def test_few_layers_draw_in_rounds():
    index = draw_index(1, 0, 5, 2, 1, 0, seeded()).tolist()
    assert sorted(index[:2]) == sorted(index[2:4]) == [0, 1]
    assert index[4] in (0, 1)


def test_the_same_seed_draws_the_same_and_another_one_does_not():
    draws = [draw_index(8, 0, 16, 4, 2, 1, seeded(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("num_splits", [2, 3, 6])
def test_splits_are_disjoint_equally_large_and_cover_all(num_splits):
    splits = draw_splits(4, 9, num_splits, seeded())
    assert splits.dtype == torch.uint8
    assert torch.bincount(splits.flatten()).tolist() == [36 // num_splits] * num_splits
    assert not torch.equal(splits, splits.flatten().sort().values.view(4, 9))  # in no order


def test_the_mean_over_parts_is_the_expectation_and_a_part_sees_only_its_own_gradient():
    change, splits = random(4, 6), draw_splits(4, 6, 3, seeded())
    torch.testing.assert_close(expected(change, 3), expected_naive(change, splits, 3), **EXACT)
    parts = [sampled(change, splits, torch.tensor([i])) for i in range(3)]
    assert torch.equal(sum(parts), change)
    for i, part in enumerate(parts):
        (gradient,) = torch.autograd.grad(part.sum(), change)
        assert torch.equal(gradient, (splits == i).double())
