"""An 8-bit base: bitsandbytes' layer computes from its state, so that is what a merge must put back."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from moe_peft import LinearMoeConfig


bnb = pytest.importorskip("bitsandbytes")


@pytest.fixture
def eight_bit():
    torch.manual_seed(0)
    model = nn.Sequential(bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False))
    model.load_state_dict({"0.weight": torch.randn(64, 64)})
    return model.to("cpu")


def test_an_8_bit_base_is_as_it_was_after_merge_and_unmerge(eight_bit):
    config = LinearMoeConfig(num_experts=1, r=4, lora_alpha=64, target_modules=["0"], init_weights=False)
    model = get_peft_model(eight_bit, config).eval()
    x = torch.randn(5, 64)
    with torch.no_grad():
        before = model(x)
        with model.disable_adapter():
            base = model(x)
        for _ in range(3):
            model.merge_adapter()
            model(x)
            model.unmerge_adapter()
        after = model(x)
        with model.disable_adapter():
            base_after = model(x)
    assert not torch.equal(before, base)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    torch.testing.assert_close(base_after, base, rtol=0, atol=0)


@pytest.mark.parametrize("routing", ["softmax_top_k", "softmax"])
def test_a_routed_adapter_trains_on_an_8_bit_base(eight_bit, routing):
    model = get_peft_model(
        eight_bit, LinearMoeConfig(num_experts=4, r=2, target_modules=["0"], routing=routing)
    ).train()
    x = torch.randn(6, 64)
    packed = copy.deepcopy(eight_bit[0].base_layer.weight.data)
    model(x).square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert grads
    assert all(grad is not None for grad in grads.values())
    assert torch.equal(eight_bit[0].base_layer.weight.data, packed)
