"""Dense weights against the factors that they hold, in families that store a linear's weight in their own way."""

import pytest
import torch
from families import make_family
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from moe_peft import LinearMoeConfig
from moe_peft.merge import Factors, instead_of_routing, routed_layers
from moe_peft.merging.dense import DensePlan
from moe_peft.saving import save_adapter


@pytest.mark.parametrize("family", ["gpt2", "phi3", "qwen2", "gemma2"])
def test_dense_weights_compute_what_the_factors_do(tmp_path, family):
    """GPT-2 stores [d_in, d_out], also where a linear is square; Phi-3 has q, k and v in one weight."""
    make_family(family).save_pretrained(tmp_path / "base")
    config = LinearMoeConfig(num_experts=2, r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(0)
    factors = {
        name: Factors(torch.randn(3, layer.in_features), 0.1 * torch.randn(layer.out_features, 3))
        for name, layer in routed_layers(model, "default").items()
    }
    assert any(len(f.B) == f.A.shape[1] for f in factors.values())  # a square one
    ids = torch.arange(3, 23)[None]
    with torch.no_grad(), instead_of_routing(model, factors, "default"):
        expected = model(ids).logits
    (tmp_path / "dense").mkdir()
    DensePlan(str(tmp_path / "base"), str(tmp_path / "adapter")).write(factors, tmp_path / "dense")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
