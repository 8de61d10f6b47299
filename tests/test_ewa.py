"""Experts weights averaging: the step is the definition's, what is shared stays, and it runs under TRL's trainer."""

import pytest
import torch
from conftest import make_tiny_llama
from peft import get_peft_model

from moe_peft import EwaCallback, FfnMoeConfig, LinearMoeConfig, RankMoeConfig, freeze_experts
from moe_peft.ewa import average_experts, averaged
from moe_peft.pocket.tokenizer import make_tokenizer
from moe_peft.tuners.router import Router


def adapted(config_class=LinearMoeConfig, **settings):
    torch.manual_seed(3)
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    given = {"num_experts": 3, "r": 2, "target_modules": targets, "init_weights": False, "task_type": "CAUSAL_LM"}
    return get_peft_model(make_tiny_llama(layers=2), config_class(**given, **settings))


def tensors(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def by_definition(theta: torch.Tensor, beta: float) -> torch.Tensor:
    rows = []
    for e in range(len(theta)):
        others = [theta[j] for j in range(len(theta)) if j != e]
        rows.append((1 - beta) * theta[e] + beta * sum(others) / len(others))
    return torch.stack(rows)


@pytest.mark.parametrize("beta", [0.001, 0.3, 0.999])
def test_a_step_is_the_definition(beta):
    theta = torch.randn(4, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(averaged(theta, beta), by_definition(theta, beta), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(averaged(theta, beta).mean(0), theta.mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config_class", [LinearMoeConfig, FfnMoeConfig])
@pytest.mark.parametrize("average_A", [False, True])
def test_routed_experts_are_averaged_and_nothing_else(config_class, average_A):
    model = adapted(config_class, num_shared_experts=1)
    before = tensors(model)
    average_experts(model, 0.1, average_A)
    changed = [name for name, new in tensors(model).items() if not torch.equal(new, before[name])]
    factors = ("lora_A", "lora_B") if average_A else ("lora_B",)
    assert changed
    assert all(name.endswith(factors) for name in changed)
    assert any(name.endswith("lora_A") for name in changed) == average_A
    mixed = [name for name, module in model.named_modules() if isinstance(module, Router) and len(module.lora_B) == 4]
    for name in mixed:
        for factor in factors:
            new, old = dict(model.named_parameters())[f"{name}.{factor}"], before[f"{name}.{factor}"]
            torch.testing.assert_close(new[:3], by_definition(old[:3], 0.1))
            assert torch.equal(new[3:], old[3:])
    assert len(changed) == len(mixed) * len(factors)


def test_with_one_A_for_all_the_products_are_averaged_exactly():
    model = adapted()
    for module in model.modules():
        if isinstance(module, Router):
            with torch.no_grad():
                module.lora_A[:] = module.lora_A[:1].clone()
            product = torch.einsum("ero,eri->eoi", module.lora_B, module.lora_A).detach()
            average_experts(module, 0.2)
            found = torch.einsum("ero,eri->eoi", module.lora_B, module.lora_A)
            torch.testing.assert_close(found, by_definition(product, 0.2))


def test_experts_that_are_held_still_are_not_moved():
    model = adapted()
    freeze_experts(model, [0, 2])
    before = tensors(model)
    average_experts(model, 0.1)
    moved = [name for name in before if name.endswith("lora_B")]
    for name in moved:
        new, old = model.get_parameter(name), before[name]
        assert torch.equal(new[[0, 2]], old[[0, 2]])
        torch.testing.assert_close(new[1], by_definition(old, 0.1)[1])
    assert moved


def test_ranks_are_refused_as_their_b_would_become_one():
    model = get_peft_model(make_tiny_llama(layers=2), RankMoeConfig(r=4, init_weights=False))
    before = tensors(model)
    average_experts(model, 0.1)
    assert all(torch.equal(value, before[name]) for name, value in tensors(model).items())
    with pytest.raises(ValueError, match="the experts of RankMoeConfig are the ranks of one LoRA: .*LinearMoeConfig"):
        EwaCallback().on_train_begin(None, None, None, model=model)


def test_an_adapter_that_is_not_trained_stays():
    model = adapted()
    model.add_adapter("other", LinearMoeConfig(num_experts=2, target_modules=["q_proj"], init_weights=False))
    before = tensors(model)
    average_experts(model, 0.1)
    changed = [name for name, new in tensors(model).items() if not torch.equal(new, before[name])]
    assert changed
    assert all(".default." in name for name in changed)


@pytest.mark.parametrize("beta", [0, 1, -0.1, "0.1", True, float("nan")])
def test_another_beta_is_refused(beta):
    with pytest.raises(ValueError, match=f"`beta` is {beta!r}, but must be above 0 and below 1"):
        EwaCallback(beta)


def test_sharded_experts_are_refused(monkeypatch):
    monkeypatch.setattr("moe_peft.ewa._is_sharded", lambda: True)
    with pytest.raises(ValueError, match="averages whole experts, and FSDP or DeepSpeed has sharded them"):
        EwaCallback().on_train_begin(None, None, None)


def test_it_runs_under_a_trl_trainer(tmp_path):
    """With a learning rate of 0 the averaging is all that happens: `steps` times the definition."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = adapted()
    before = tensors(model)
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=3, learning_rate=0.0, per_device_train_batch_size=2, use_cpu=True,
        gradient_accumulation_steps=2, report_to="none", save_strategy="no", disable_tqdm=True, bf16=False,
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{"prompt": "abc=", "completion": "cba"}] * 12)
    trl.SFTTrainer(
        model, args=arguments, train_dataset=rows, processing_class=make_tokenizer(), callbacks=[EwaCallback(0.1)]
    ).train()
    for name, new in tensors(model).items():
        wanted = before[name]
        for _ in range(3 * name.endswith("lora_B")):
            wanted = by_definition(wanted, 0.1)
        torch.testing.assert_close(new, wanted)
