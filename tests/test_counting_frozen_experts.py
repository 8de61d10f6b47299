"""Parameter counts where a stage holds experts still: what is trained is what gets a gradient, used is more than that."""

import re

import pytest
from conftest import make_tiny_llama
from peft import get_peft_model

from moe_peft import BottleneckMoeConfig, DomainMoeConfig
from moe_peft.budget import count_config, count_parameters, fit_to_budget, train_as_configured


def numbers(model) -> tuple[int, int]:
    own = [(name, p) for name, p in model.named_parameters() if model.base_model.prefix in name]
    return sum(p.numel() for _, p in own if p.requires_grad), sum(p.numel() for _, p in own)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_bottlenecks_are_used_and_not_trained(frozen):
    config = BottleneckMoeConfig(domains=["law", "code"], gate="sigmoid", gate_size=8, r=2, freeze_domains=frozen)
    model = get_peft_model(make_tiny_llama(layers=3), config)
    trained, held = numbers(model)
    count = count_parameters(model)
    assert (count.trainable, count.active) == (trained, held)
    assert (trained < held) == frozen
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # as it is loaded
    train_as_configured(model)
    assert count_parameters(model) == count


@pytest.mark.parametrize("trained_domains", [[], ["law"], None])
def test_frozen_domains_are_used_and_not_trained(trained_domains):
    rank, widths = 2, 4 * (64 + 96)  # up_proj of four layers
    config = DomainMoeConfig(
        domains=["law", "code", "art"], r=rank, target_modules=["up_proj"], train_domains=trained_domains, gate="token"
    )
    model = get_peft_model(make_tiny_llama(), config)
    count = count_parameters(model)
    of_experts = len(config.names if trained_domains is None else trained_domains) * rank * widths
    assert count.trainable == of_experts + count.router
    visited = config.top_k or len(config.names)
    assert count.active == visited * rank * widths + count.router
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    train_as_configured(model)
    assert count_parameters(model) == count


def test_a_budget_fits_the_rank_of_the_tasks_lora():
    config = BottleneckMoeConfig(domains=["law", "code"], gate="sigmoid", gate_size=8, r=2, freeze_domains=True)
    base = make_tiny_llama(layers=3)
    wanted = BottleneckMoeConfig(domains=["law", "code"], gate="sigmoid", gate_size=8, r=7, freeze_domains=True)
    assert fit_to_budget(base, config, count_config(base, wanted).trainable).r == 7


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            BottleneckMoeConfig(domains=["law"], gate="sigmoid", gate_size=8),
            "`r` is 0, but must be at least 1 where a rank is fitted to a budget. Its bottlenecks are sized by `bottleneck",
        ),
        (
            DomainMoeConfig(domains=["law", "code"], r=2, target_modules=["up_proj"], train_domains=[], gate="token"),
            "`r` is 2, but must be the rank of something that is trained, to be fitted to a budget. Its experts are held",
        ),
    ],
)
def test_a_budget_that_no_rank_answers_is_refused(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fit_to_budget(make_tiny_llama(layers=3), config, 10_000)
