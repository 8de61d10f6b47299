"""Self-contrast held against a definition that runs both models over the whole text for each token."""

import gc
import math

import pytest
import torch
from conftest import make_tiny_llama
from peft import LoraConfig, get_peft_model

from moe_peft import FfnMoeConfig, LinearMoeConfig, RankMoeConfig, SelfContrast
from moe_peft.merge import routed_layers


STEPS = 6


def adapted(kind=LinearMoeConfig, **settings):
    torch.manual_seed(3)
    given = {"num_experts": 4, "r": 2, "lora_alpha": 64, "init_weights": False, "router_init_std": 1.0}
    given = {**given, "target_modules": ["up_proj"]} if kind is LinearMoeConfig else given
    base = make_tiny_llama(layers=2, dtype=torch.float64)
    return get_peft_model(base, kind(**{**given, "task_type": "CAUSAL_LM", **settings})).double().eval()


def prompts() -> dict[str, torch.Tensor]:
    """Three rows of different length, padded on the left."""
    ids = torch.randint(1, 100, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]])
    return {"input_ids": ids * mask, "attention_mask": mask}


def next_logits(model, ids, mask) -> torch.Tensor:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]


def weak_logits(model, against, ids, mask) -> torch.Tensor:
    """By weights, not by routing: the adapter is edited so that it is the weak one, and put back."""
    if against == "base":
        with model.disable_adapter():
            return next_logits(model, ids, mask)
    experts = [layer.experts("default") for layer in routed_layers(model).values()]
    before = [e.lora_B.detach().clone() for e in experts]
    rules = [(e.rule, e.bound, e.top_k) for e in experts]
    for e in experts:
        if against == "shared":
            e.lora_B.data[: e.num_routed] = 0
        else:
            e.rule = lambda logits, top_k: second(logits)
    try:
        return next_logits(model, ids, mask)
    finally:
        for e, B, rule in zip(experts, before, rules, strict=True):
            e.lora_B.data.copy_(B)
            e.rule, e.bound, e.top_k = rule


def second(logits):
    from moe_peft.routing import Routing

    index = logits.argsort(dim=-1, descending=True)[:, 1:2]
    return Routing(logits, torch.ones_like(index, dtype=logits.dtype), index)


@torch.no_grad()
def definition(model, against, beta, alpha) -> tuple[torch.Tensor, list[torch.Tensor]]:
    ids, mask, scores = *prompts().values(), []
    for _ in range(STEPS):
        strong, weak = next_logits(model, ids, mask), weak_logits(model, against, ids, mask)
        z = torch.full_like(strong, -math.inf)
        for row in range(len(ids)):
            for token in range(strong.shape[1]):
                if strong[row, token] >= strong[row].max() + math.log(alpha):
                    z[row, token] = (1 + beta) * strong[row, token] - beta * weak[row, token]
        scores.append(z)
        ids = torch.cat((ids, z.argmax(-1, keepdim=True)), 1)
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
    return ids, scores


def generated(model, contrast, **more):
    given = {"max_new_tokens": STEPS, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        return model.generate(**prompts(), **{**given, **more}, logits_processor=[contrast])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("against", "kind", "settings"),
    [
        ("base", LinearMoeConfig, {}),
        ("expert", LinearMoeConfig, {}),
        ("expert", LinearMoeConfig, {"routing": "softmax", "num_shared_experts": 1}),
        ("shared", LinearMoeConfig, {"num_shared_experts": 1}),
        ("base", FfnMoeConfig, {}),
        ("expert", FfnMoeConfig, {}),
        ("shared", FfnMoeConfig, {"num_shared_experts": 1}),
        ("shared", FfnMoeConfig, {"num_shared_experts": 1, "num_distinct_experts": 2}),
        ("expert", FfnMoeConfig, {"num_distinct_experts": 2}),
    ],
)
def test_it_generates_what_the_definition_does(against, kind, settings, use_cache):
    model = adapted(kind, **settings)
    ids, scores = definition(model, against, 0.7, 0.05)
    contrast = SelfContrast(model, against, beta=0.7, alpha=0.05)
    for _ in range(2):  # the second call starts anew
        found = generated(model, contrast, use_cache=use_cache)
        assert torch.equal(found.sequences, ids)
        for mine, wanted in zip(found.scores, scores, strict=True):
            torch.testing.assert_close(mine.double(), wanted, rtol=1e-5, atol=1e-5)  # generate scores in fp32
    plain = generated(model, lambda ids, scores: scores)
    assert not torch.equal(plain.sequences, ids)  # the contrast says something here


def test_without_contrast_it_is_the_strong_model():
    model = adapted()
    plain = generated(model, lambda ids, scores: scores).sequences
    assert torch.equal(generated(model, SelfContrast(model, "expert", beta=0)).sequences, plain)
    assert torch.equal(
        generated(model, SelfContrast(model, "base", alpha=1.0)).sequences, plain
    )  # the best alone is left


def test_the_best_expert_alone_is_rank_1_and_sampling_works():
    model = adapted(routing="top_1")
    # With one expert chosen and weighed p, rank 1 is the strong model itself: (1 + b) z - b z = z.
    contrast = SelfContrast(model, "expert", rank=1, alpha=1e-30)
    found = generated(model, contrast)
    plain = generated(model, lambda ids, scores: scores)
    for mine, wanted in zip(found.scores, plain.scores, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
    assert generated(model, contrast, do_sample=True, num_return_sequences=2).sequences.shape == (6, 7 + STEPS)


def test_nothing_stays_behind():
    model = adapted()
    hooks = len(model.get_base_model()._forward_pre_hooks)
    contrast = SelfContrast(model, "expert")
    assert len(model.get_base_model()._forward_pre_hooks) == hooks + 1
    generated(model, contrast)
    assert all("routed" not in vars(layer.experts("default")) for layer in routed_layers(model).values())
    del contrast
    gc.collect()
    assert len(model.get_base_model()._forward_pre_hooks) == hooks


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"num_beams": 2}, "log-probabilities, as in beam search"),
        ({"cache_implementation": "static"}, "this call has a static cache"),
        ({"prompt_lookup_num_tokens": 2}, "Self-contrast asks its second model once for each token"),
    ],
)
def test_other_ways_of_decoding_are_refused(more, why):
    model = adapted()
    given = {"input_ids": prompts()["input_ids"][1:2], "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    if "prompt_lookup_num_tokens" in more:
        given["input_ids"] = torch.tensor([[5, 6, 7, 5, 6, 7, 5]])
    with pytest.raises(ValueError, match=why):
        model.generate(**given, max_new_tokens=8, logits_processor=[SelfContrast(model)], **more)


def test_a_cache_that_was_filled_before_is_refused():
    model = adapted()
    given = {"attention_mask": torch.ones(1, 7, dtype=torch.long), "input_ids": prompts()["input_ids"][1:2]}
    cache = model(input_ids=given["input_ids"][:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="this cache was filled before"):
        model.generate(**given, past_key_values=cache, logits_processor=[SelfContrast(model)], max_new_tokens=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"against": "bse"}, "`against` is 'bse', but must be one of .* Did you mean 'base'"),
        ({"beta": -1}, "`beta` is -1, but must be a number of at least 0"),
        ({"alpha": 0}, "`alpha` is 0, but must be above 0 and at most 1"),
        ({"rank": 2}, "`rank` is 2, but must be left out with `against` = 'base'"),
        ({"against": "expert", "rank": 0}, "`rank` is 0, but must be a whole number"),
        ({"against": "expert", "rank": 5}, "`rank` is 5, but must be at most 4"),
        ({"against": "shared"}, "`against` is 'shared', but must be 'expert' or 'base' without shared experts"),
    ],
)
def test_what_is_mistyped_gets_a_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        SelfContrast(adapted(), **settings)


def test_adapters_without_a_choice_are_contrasted_with_the_base_alone():
    base = make_tiny_llama(layers=2)
    with pytest.raises(TypeError, match="`model` is a LlamaForCausalLM, but must be a PeftModel"):
        SelfContrast(base)
    ranks = get_peft_model(make_tiny_llama(layers=2), RankMoeConfig(r=8, target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match="`against` is 'expert', but must be 'base' for an adapter whose layers route"
    ):
        SelfContrast(ranks, "expert")
    torch.manual_seed(0)
    model = get_peft_model(
        base.double(), LoraConfig(r=4, lora_alpha=64, init_lora_weights=False, task_type="CAUSAL_LM")
    )
    model = model.double().eval()
    ids, _ = definition(model, "base", 0.5, 0.1)
    assert torch.equal(generated(model, SelfContrast(model)).sequences, ids)
