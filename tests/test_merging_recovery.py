"""Distillation and learned mixing: towards the routed model, and nothing but the factors moves."""

import pytest
import torch
from conftest import make_tiny_llama
from peft import get_peft_model
from test_merging_walk import KINDS, text

from moe_peft.merge import Factors
from moe_peft.merging.decoder import Decoder
from moe_peft.merging.gram import balanced
from moe_peft.merging.methods import METHODS, merge_static
from moe_peft.merging.recovery import distill, learned_mixing, stacked
from moe_peft.merging.walk import Fit, walk


def adapted(kind: str):
    torch.manual_seed(3)
    return get_peft_model(make_tiny_llama(layers=2), KINDS[kind](init_weights=False)).eval()


@pytest.mark.parametrize("kind", ["linears", "ranks", "ffn"])
@pytest.mark.parametrize("method", ["distill", "learned"])
def test_training_brings_the_merge_nearer_and_moves_nothing_else(kind, method):
    model, batches = adapted(kind), text(4)
    decoder = Decoder(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    usage = walk(decoder, batches, None, batches, Fit("usage", 0.0, None))
    if method == "distill":
        factors = distill(model, usage.factors, batches, steps=30)
    else:
        factors = learned_mixing(model, decoder.usage, batches, steps=30)
    found = walk(decoder, batches, factors)
    assert found.figures["merged"].kl < 0.9 * usage.figures["merged"].kl
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_mixing_starts_at_the_usage_mean():
    """Before its first step has an effect the learnt numbers are the mean weights: with a rate that is 0 at once."""
    model, batches = adapted("linears"), text(2)
    decoder = Decoder(model)
    usage = walk(decoder, batches, None, batches, Fit("usage", 0.0, None))
    for name, gates in decoder.usage.items():
        A, B = stacked(decoder.adapted[int(name.split(".")[2])][name].experts("default"))
        wanted = (B.T * gates.float().repeat_interleave(2)) @ A
        torch.testing.assert_close(usage.factors[name].B @ usage.factors[name].A, wanted, rtol=1e-4, atol=1e-5)
        assert float(gates.sum()) == pytest.approx(1.0, abs=1e-5)


def test_balanced_factors_are_the_same_map():
    f = Factors(torch.randn(3, 7) * torch.tensor([[1e-3], [1.0], [1e3]]), torch.randn(5, 3))
    even = balanced(f)
    torch.testing.assert_close(even.B @ even.A, f.B @ f.A, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(even.A.norm(dim=1), even.B.norm(dim=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_in_figures_of_three_models(method):
    merged = merge_static(
        adapted("linears"), text(3), text(1, seed=1), method, rank=3, steps=3, scored=text(1, seed=2)
    )
    figures = merged.measured.figures
    assert figures["routed"].kl == 0 < figures["merged"].kl
    assert {len(f.A) for f in merged.measured.factors.values()} == {3}
    assert all(0 <= f.score <= 1 and 0 <= f.top1 <= 1 for f in figures.values())
    assert (len(merged.ridges) == 3) == method.startswith("ls")


def test_no_method_is_guessed():
    with pytest.raises(ValueError, match="Did you mean 'distill'?"):
        merge_static(adapted("ffn"), text(1), text(1), "distil")
    with pytest.raises(ValueError, match="`steps` is 0, but must be"):
        merge_static(adapted("linears"), text(1), text(1), "distill", steps=0)
    with pytest.raises(ValueError, match="`tokens` is 'prompts', but must be 'all' or 'answers'"):
        merge_static(adapted("linears"), text(1), text(1), "ls", tokens="prompts")
