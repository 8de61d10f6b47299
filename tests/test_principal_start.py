"""`init_weights="pissa"`: A from the frozen weight, which stays as it is; and `use_dora`, which is refused with its reason."""

import math

import pytest
import torch
from conftest import make_tiny_llama
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from moe_peft import FfnMoeConfig, LinearMoeConfig
from moe_peft.merge import routed_layers
from moe_peft.tuners import principal


def decaying(d_out: int, d_in: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight whose singular values halve one after the other, and its right singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    n = min(d_out, d_in)
    U = torch.linalg.qr(torch.randn(d_out, n, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(d_in, n, generator=generator))[0]
    return U * 0.5 ** torch.arange(n) @ V.T, V.T


def adapted(base: nn.Module, config_class=LinearMoeConfig, **settings) -> PeftModel:
    torch.manual_seed(3)
    given = {"num_experts": 3, "r": 2, "init_weights": "pissa", **settings}
    return get_peft_model(base, config_class(**given)).eval()


def linear(d_out: int = 10, d_in: int = 12, kind=nn.Linear) -> tuple[nn.Module, torch.Tensor]:
    weight, vectors = decaying(d_out, d_in)
    layer = nn.Linear(d_in, d_out) if kind is nn.Linear else Conv1D(d_out, d_in)
    with torch.no_grad():
        layer.weight.copy_(weight if kind is nn.Linear else weight.T)
    return nn.Sequential(layer), vectors


def up_to_sign(rows: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    return (rows * vectors).sum(-1).sign().unsqueeze(-1) * rows


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_the_experts_share_out_the_principal_right_singular_vectors(kind):
    base, vectors = linear(kind=kind)
    before = base[0].weight.clone()
    model = adapted(base, target_modules=["0"], num_shared_experts=1)
    experts = routed_layers(model)["0"].experts("default")
    A = experts.lora_A.detach().flatten(0, 1) * math.sqrt(3)
    torch.testing.assert_close(up_to_sign(A, vectors[:8]), vectors[:8], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(A @ A.T, torch.eye(8), rtol=1e-5, atol=1e-5)
    assert torch.equal(model.base_model.model[0].base_layer.weight, before)
    assert not experts.lora_B.any()


def test_the_rows_are_as_long_as_they_are_by_default():
    lengths = [
        routed_layers(adapted(nn.Sequential(nn.Linear(512, 512)), target_modules=["0"], init_weights=how))["0"]
        .experts("default")
        .lora_A.norm(dim=-1)
        for how in (True, "pissa")
    ]
    torch.testing.assert_close(lengths[1], lengths[0].mean().expand(3, 2), rtol=0.05, atol=0)


def test_where_the_vectors_run_out_the_slices_come_again_turned():
    base, vectors = linear(d_out=4)
    model = adapted(base, target_modules=["0"], num_experts=5)
    A = routed_layers(model)["0"].experts("default").lora_A.detach() * math.sqrt(3)
    torch.testing.assert_close(up_to_sign(A[:2].flatten(0, 1), vectors[:4]), vectors[:4], rtol=1e-3, atol=1e-3)
    for again, first in ((2, 0), (3, 1), (4, 0)):
        assert not torch.allclose(A[again], A[first], atol=1e-2)
        torch.testing.assert_close(A[again].T @ A[again], A[first].T @ A[first], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(A[4], A[2], atol=1e-2)


def test_it_is_the_same_every_time_and_leaves_the_random_stream_alone():
    starts, streams = [], []
    for how, seed in (("pissa", 1), ("pissa", 2), (True, 1)):
        base = make_tiny_llama(layers=1)
        torch.manual_seed(seed)
        model = get_peft_model(base, LinearMoeConfig(target_modules=["q_proj"], init_weights=how))
        starts.append(next(iter(routed_layers(model).values())).experts("default").lora_A)
        streams.append(torch.get_rng_state())
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(streams[0], streams[2])


@pytest.mark.parametrize("config_class", [LinearMoeConfig, FfnMoeConfig])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing_bit_for_bit(config_class, dtype, tokens):
    base = make_tiny_llama(layers=2, dtype=dtype)
    before = base(tokens).logits
    state = {name: value.clone() for name, value in base.state_dict().items()}
    model = adapted(base, config_class, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    assert torch.equal(model(tokens).logits, before)
    base = model.unload()
    assert all(torch.equal(value, state[name]) for name, value in base.state_dict().items())


def test_a_4_bit_weight_is_dequantised_and_stays_as_it_is():
    bnb = pytest.importorskip("bitsandbytes")
    base, vectors = linear(d_out=64, d_in=64)
    packed = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    packed.load_state_dict({"weight": base[0].weight.detach()})
    base = nn.Sequential(packed.to("cpu"))
    before = base[0].weight.clone()
    model = adapted(base, target_modules=["0"], num_experts=2, r=1)
    weight = bnb.functional.dequantize_4bit(before, base[0].weight.quant_state)
    wanted = torch.linalg.svd(weight).Vh[:2]
    A = routed_layers(model)["0"].experts("default").lora_A.detach().flatten(0, 1) * math.sqrt(3)
    torch.testing.assert_close(up_to_sign(A, wanted), wanted, rtol=1e-2, atol=1e-2)
    assert torch.equal(model.base_model.model[0].base_layer.weight, before)


@pytest.mark.parametrize("load", ["from_pretrained", "to train on", "load_adapter", "low memory"])
def test_a_saved_adapter_is_loaded_without_the_decomposition(load, tmp_path, tokens, monkeypatch):
    model = adapted(make_tiny_llama(layers=2), target_modules=["q_proj"], task_type="CAUSAL_LM")
    for layer in routed_layers(model).values():
        nn.init.normal_(layer.experts("default").lora_B)
    wanted = model(tokens).logits
    model.save_pretrained(tmp_path)
    other = adapted(make_tiny_llama(layers=2), target_modules=["q_proj"], init_weights=True)
    monkeypatch.setattr(principal, "principal_directions", None)  # calling it is an error
    if load == "load_adapter":
        other.load_adapter(tmp_path, "again")
        other.set_adapter("again")
        again = other
    else:
        settings = {
            "from_pretrained": {},
            "to train on": {"is_trainable": True},
            "low memory": {"low_cpu_mem_usage": True},
        }
        again = PeftModel.from_pretrained(make_tiny_llama(layers=2), tmp_path, **settings[load])
    assert torch.equal(again.eval()(tokens).logits, wanted)
    assert again.peft_config[again.active_adapter].init_weights == "pissa"


def test_a_config_without_weights_is_decomposed(tmp_path):
    LinearMoeConfig(target_modules=["q_proj"], init_weights="pissa").save_pretrained(tmp_path)
    for read in (PeftConfig.from_pretrained, LinearMoeConfig.from_pretrained):
        model = get_peft_model(make_tiny_llama(layers=1), read(tmp_path))
        A = next(iter(routed_layers(model).values())).experts("default").lora_A
        torch.testing.assert_close(A.norm(dim=-1), torch.full(A.shape[:2], 1 / math.sqrt(3)))


def test_a_base_that_cannot_be_read_is_refused(monkeypatch):
    from moe_peft.tuners.linear_moe import LinearMoeLinear

    def unreadable(self):
        raise TypeError("Dequantization is not supported for gptq layers.")

    monkeypatch.setattr(LinearMoeLinear, "get_base_weight", unreadable)
    with pytest.raises(
        ValueError, match="`init_weights` is 'pissa', but must be True or False .* type Linear. .* gptq"
    ):
        adapted(linear()[0], target_modules=["0"])


@pytest.mark.parametrize("config_class", [LinearMoeConfig, FfnMoeConfig])
@pytest.mark.parametrize("value", ["piza", None, 1, "olora"])
def test_another_start_is_refused(config_class, value):
    with pytest.raises(ValueError, match=f"`init_weights` is {value!r}, but must be True, False or 'pissa'"):
        config_class(init_weights=value)


@pytest.mark.parametrize("config_class", [LinearMoeConfig, FfnMoeConfig])
def test_dora_is_refused_with_its_reason(config_class):
    with pytest.raises(
        ValueError, match="`use_dora` is not a field of .*: DoRA rescales the rows of the whole weight"
    ):
        config_class(use_dora=True)
