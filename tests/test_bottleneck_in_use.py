"""Bottleneck experts as people run them: half-precision bases, autocast, copies, torch.compile, accumulated gradients."""

import copy

import pytest
import torch
from conftest import make_tiny_llama
from peft import get_peft_model

from moe_peft import BottleneckMoeConfig


FORMS = {
    "domains": {"gate": "none"},
    "task": {"gate": "mlp", "gate_dropout": 0.0, "freeze_domains": True, "r": 2},
    "jointly": {"gate": "sigmoid", "r": 2},
}
"""The first stage, the second, and both in one by a gate for each token."""

forms = pytest.mark.parametrize("form", FORMS)


def make_model(form: str, dtype: torch.dtype = torch.float64, **settings):
    torch.manual_seed(2)
    config = BottleneckMoeConfig(
        domains=["law", "code"],
        gate_size=8,
        task_type="CAUSAL_LM",
        **{"init_weights": False, **FORMS[form], **settings},
    )
    return get_peft_model(make_tiny_llama(layers=3, dtype=dtype), config).train()


def rows(number: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    tokens = torch.randint(1, 100, (number, 9))
    labels = tokens.clone()
    labels[:, :3] = -100
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@forms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_base_trains_as_the_same_weights_in_fp32(form, dtype):
    model = make_model(form, dtype)
    twin = copy.deepcopy(model).float()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}  # PEFT's autocast_adapter_dtype
    loss = model(**rows()).loss
    loss.backward()
    twin(**rows()).loss.backward()
    found, expected = gradients(model), gradients(twin)
    assert found.keys() == expected.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in found.items():
        assert torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.98, name


@forms
def test_autocast_gives_what_the_layers_alone_give(form):
    model = make_model(form, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = model(**rows())
    under.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(under.logits.float(), model(**rows()).logits, rtol=0.05, atol=0.05)


@forms
def test_a_copy_is_a_model_of_its_own(form):
    model = make_model(form)
    other = copy.deepcopy(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [name for name, p in other.named_parameters() if p.requires_grad]
    before = model(**rows()).logits
    torch.testing.assert_close(other(**rows()).logits, before, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert not torch.allclose(other(**rows()).logits, before)
    torch.testing.assert_close(model(**rows()).logits, before, rtol=0, atol=0)


@forms
def test_accumulated_gradients_are_those_of_the_whole_batch(form):
    whole, pieces, batch = make_model(form), make_model(form), rows()
    whole(**batch).loss.backward()
    for part in (slice(0, 1), slice(1, 4)):
        piece = {name: value[part] for name, value in batch.items()}
        (pieces(**piece).loss * (piece["labels"].shape[0] / 4)).backward()  # as many labels in each row
    for name, gradient in gradients(pieces).items():
        torch.testing.assert_close(gradient, gradients(whole)[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["task", "jointly"])
def test_a_compiled_model_computes_the_same(form):
    plain = make_model(form)
    compiled = torch.compile(copy.deepcopy(plain), backend="eager")
    expected, found = plain(**rows()), compiled(**rows())
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-11)
    expected.loss.backward()
    found.loss.backward()
    names = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients(compiled).items()}
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(names[name], gradient, rtol=1e-9, atol=1e-11)
