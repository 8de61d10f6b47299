"""Parameter counts against the arithmetic of the papers, and budgets that are met."""

import pytest
from conftest import make_tiny_llama
from families import make_family
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from moe_peft import LinearMoeConfig, from_catalogue
from moe_peft.budget import count_config, count_parameters, equal_budget_lora, fit_to_budget, meta_backbone
from moe_peft.comparing import compare


FFN = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def llama_2_7b():
    return meta_backbone(LlamaConfig(intermediate_size=11008, num_hidden_layers=32))


def llama_parameters(experts: list[int], r: int, targets: list[str], d: int = 4096, f: int = 11008) -> tuple[int, int]:
    """(all, routers) by arithmetic: E (r (d_in + d_out) + d_in) for every adapted linear of every layer."""
    shapes = {"q_proj": (d, d), "k_proj": (d, d), "v_proj": (d, d), "o_proj": (d, d)}
    shapes |= {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}
    pairs = [(e, *shapes[target]) for e in experts for target in targets]
    routers = sum(e * d_in for e, d_in, _ in pairs)
    return routers + sum(e * r * (d_in + d_out) for e, d_in, d_out in pairs), routers


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", *FFN]


@pytest.mark.parametrize(
    ("config", "experts", "r", "targets"),
    [
        (from_catalogue("mola"), [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8, 8, ALL),
        (from_catalogue("loramoe"), [6] * 32, 4, FFN),
        (from_catalogue("loramoe", num_experts=8), [8] * 32, 4, FFN),
    ],
    ids=["mola", "loramoe", "loramoe-8"],
)
def test_llama_2_7b_has_as_many_parameters_as_the_papers_arithmetic_says(llama_2_7b, config, experts, r, targets):
    count = count_config(llama_2_7b, config)
    assert (count.trainable, count.router) == llama_parameters(experts, r, targets)


def test_a_token_uses_the_router_and_the_experts_it_visits():
    config = LinearMoeConfig(num_experts=8, num_shared_experts=1, r=2, target_modules=["up_proj"])
    count = count_parameters(get_peft_model(make_tiny_llama(), config))
    per_expert = 2 * (64 + 96)
    assert count.layers == 4
    assert count.trainable == 4 * (9 * per_expert + 8 * 64)
    assert count.router == 4 * 8 * 64
    assert count.active == 4 * (3 * per_expert + 8 * 64)


def test_plain_lora_uses_all_that_it_trains():
    count = count_parameters(get_peft_model(make_tiny_llama(), LoraConfig(r=2, target_modules=["up_proj"])))
    assert count.trainable == count.active == 4 * 2 * (64 + 96)
    assert count.router == 0


def test_the_lora_of_an_equal_budget_is_the_closest_one():
    backbone = meta_backbone(make_tiny_llama().config)
    per_rank = count_config(backbone, LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM")).trainable
    budget = 7 * per_rank + per_rank // 3
    config = equal_budget_lora(backbone, budget, "all-linear", lora_alpha_over_r=4)
    assert (config.r, config.lora_alpha) == (7, 28)


def test_a_config_is_fitted_to_a_budget_by_its_rank_and_keeps_its_scale():
    backbone = meta_backbone(make_tiny_llama().config)
    wanted = LinearMoeConfig(num_experts=4, r=3, lora_alpha=6, target_modules=FFN)
    budget = count_config(backbone, wanted).trainable
    fitted = fit_to_budget(
        backbone, LinearMoeConfig(num_experts=4, r=8, lora_alpha=16, target_modules=FFN), budget + 9
    )
    assert (fitted.r, fitted.lora_alpha) == (3, 6)


def test_the_scale_is_kept_under_rslora_too():
    backbone = meta_backbone(make_tiny_llama().config)
    config = LinearMoeConfig(num_experts=4, r=4, lora_alpha=16, use_rslora=True, target_modules=FFN)
    fitted = fit_to_budget(backbone, config, 3 * count_config(backbone, config).trainable)
    assert fitted.r > 4
    assert fitted.lora_alpha / fitted.r**0.5 == pytest.approx(16 / 4**0.5)


def test_budgets_that_cannot_be_met_are_refused():
    backbone = meta_backbone(make_tiny_llama().config)
    with pytest.raises(ValueError, match="`budget` is 10, but must be at least .* rank 1 costs"):
        equal_budget_lora(backbone, 10)
    with pytest.raises(ValueError, match="Use fewer experts"):
        fit_to_budget(backbone, LinearMoeConfig(target_modules=FFN), 10)
    with pytest.raises(ValueError, match="what rank 1 costs"):
        fit_to_budget(backbone, LinearMoeConfig(r="2:4", target_modules=FFN), 10)


@pytest.mark.parametrize(("r", "doubled"), [("1:2:3:4", "2:4:6:8"), ([4, 1, 1, 2], [8, 2, 2, 4])])
@pytest.mark.parametrize("experts", [4, "2:4", [2, 3, 4, 5]])
def test_ranks_that_differ_between_layers_are_scaled_as_a_whole(r, doubled, experts):
    backbone = meta_backbone(make_tiny_llama().config)
    config = LinearMoeConfig(num_experts=experts, r=r, lora_alpha=10, target_modules=FFN)
    budget = count_config(backbone, LinearMoeConfig(num_experts=experts, r=doubled, target_modules=FFN)).trainable
    fitted = fit_to_budget(backbone, config, budget)
    assert (fitted.r, fitted.lora_alpha, fitted.num_experts) == (doubled, 20, experts)
    assert fit_to_budget(backbone, fitted, count_config(backbone, config).trainable).r == r


def test_of_ranks_that_differ_between_layers_the_closest_are_taken():
    backbone = meta_backbone(make_tiny_llama().config)
    config = LinearMoeConfig(r="2:3:5:7", lora_alpha=7, target_modules=FFN)
    scaled = [[max(1, round(n * k / 7)) for n in (2, 3, 5, 7)] for k in range(1, 30)]
    costs = [count_config(backbone, LinearMoeConfig(r=r, target_modules=FFN)).trainable for r in scaled]
    for budget in range(costs[0], costs[20], 7919):
        found = count_config(backbone, fit_to_budget(backbone, config, budget)).trainable
        assert abs(found - budget) == min(abs(cost - budget) for cost in costs)


def test_one_a_for_all_experts_is_always_used():
    config = LinearMoeConfig(num_experts=4, share_A=True, r=2, target_modules=["up_proj"])
    count = count_parameters(get_peft_model(make_tiny_llama(), config))
    assert count.trainable == 4 * (2 * 64 + 4 * 2 * 96 + 4 * 64)
    assert count.active == 4 * (2 * 64 + 2 * 2 * 96 + 4 * 64)


@pytest.mark.parametrize(
    ("groups", "routing", "used"),
    [(None, "given", 1), ([[0, 1], [2], [0, 2, 3]], "given", 3), ([[0], [1, 2, 3]], "softmax_top_k", 2)],
)
def test_a_token_uses_no_more_than_the_experts_of_its_group(groups, routing, used):
    settings = {} if routing == "given" else {"top_k": 2}
    config = LinearMoeConfig(
        num_experts=4,
        expert_groups=groups,
        routing=routing,
        balance="none",
        num_shared_experts=1,
        r=2,
        target_modules=["up_proj"],
        **settings,
    )
    count = count_parameters(get_peft_model(make_tiny_llama(), config))
    assert count.trainable - count.active == 4 * (4 - used) * 2 * (64 + 96)


def test_methods_are_compared_with_the_lora_on_the_same_modules():
    backbone = meta_backbone(make_tiny_llama().config)
    rows = {row.name: row for row in compare(backbone, ["task-moe", "hydralora", "mixlora"])}
    every = count_config(backbone, LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM")).trainable
    assert (rows["task-moe"].lora_rank, rows["task-moe"].lora_parameters) == (5 * 8, 5 * 8 * every)
    assert rows["task-moe"].count == count_config(backbone, from_catalogue("task-moe"))
    q_v = 4 * ((64 + 64) + (64 + 32))
    trainable = rows["hydralora"].count.trainable
    assert rows["hydralora"].lora_rank == round(trainable / q_v)
    assert rows["mixlora"].lora_parameters % every == 0


def test_a_method_that_does_not_fit_the_backbone_says_why():
    rows = compare(meta_backbone(make_family("gpt2").config), ["hydralora", "task-moe"])
    assert rows[0].count is None
    assert "q_proj" in rows[0].reason
    assert rows[1].count.trainable > 0
    with pytest.raises(ValueError, match="'hydralor' is not in the catalogue. Did you mean 'hydralora'"):
        compare(meta_backbone(make_tiny_llama().config), ["hydralor"])
