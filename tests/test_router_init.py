"""Routers that are set from labelled text send each domain to its own experts, and change nothing else."""

import pytest
import torch
from conftest import make_tiny_llama
from peft import get_peft_model

from moe_peft import FfnMoeConfig, LinearMoeConfig, init_routers
from moe_peft.report import routing_report


def text(low: int, high: int, seed: int) -> list[dict]:
    """Rows of tokens from one part of the vocabulary: a domain that the embeddings tell at once; the last row is padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(low, high, (6, 10), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 5:] = 0
    return [{"input_ids": ids, "attention_mask": mask}]


def adapted(config_class=LinearMoeConfig, **settings):
    torch.manual_seed(0)
    targets = {"target_modules": ["q_proj", "up_proj", "gate_proj", "down_proj"]}
    return get_peft_model(make_tiny_llama(), config_class(r=4, **{**targets, **settings})).eval()


DOMAINS = {"a": text(0, 3, 1), "b": text(40, 43, 2), "c": text(80, 83, 3)}
HELD_OUT = {"a": text(0, 3, 11), "b": text(40, 43, 12), "c": text(80, 83, 13)}


@pytest.mark.parametrize("config_class", [LinearMoeConfig, FfnMoeConfig])
@pytest.mark.parametrize(
    "settings", [{"router_scale": 0.5}, {"num_null_experts": 1}, {"router_bias": True}, {"router_scope": "model"}]
)
def test_a_domain_goes_to_its_experts(config_class, settings):
    if config_class is FfnMoeConfig and "router_scope" in settings:
        pytest.skip("blocks have one router each")
    rule = {} if "num_null_experts" in settings else {"routing": "softmax"}
    model = adapted(config_class, num_experts=3, **rule, **settings)
    before = routing_report(model, HELD_OUT)
    assert init_routers(model, DOMAINS, strength=20.0) == {"a": [0], "b": [1], "c": [2]}
    after = routing_report(model, HELD_OUT)
    first = next(name for name in after.health if ".0." in name)
    assert after.health[first].domain_information > before.health[first].domain_information + (0.4 if rule else 0)
    for domain, counts in enumerate(torch.tensor(after.counts[first])[:, :3]):
        assert int(counts.argmax()) == domain


def test_only_the_routers_change():
    model = adapted(num_experts=4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert init_routers(model, DOMAINS) == {"a": [0, 3], "b": [1], "c": [2]}
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.endswith(".router")}


def test_the_mean_of_a_domain_has_the_logit_that_was_asked_for_and_none_favours_an_expert():
    model = adapted(num_experts=3)
    name, layer = next((n, m) for n, m in model.named_modules() if n.endswith("0.self_attn.q_proj"))
    seen: dict[str, list[torch.Tensor]] = {d: [] for d in DOMAINS}
    init_routers(model, DOMAINS, strength=2.0)
    for domain, batches in DOMAINS.items():
        handle = layer.register_forward_pre_hook(
            lambda m, a, d=domain, b=batches: seen[d].append(a[0][b[0]["attention_mask"].bool()])
        )
        with torch.no_grad():
            model(**batches[0])
        handle.remove()
    means = torch.stack([torch.cat(x).mean(0) for x in seen.values()])
    logits = means @ layer.experts("default").router.T
    assert float(logits.diagonal().mean()) == pytest.approx(2.0, rel=1e-3)
    torch.testing.assert_close(logits.mean(0), torch.zeros(3), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("batches", "settings", "sentence"),
    [
        ({"a": DOMAINS["a"]}, {}, r"`batches` is \['a'\], but must be of at least two domains.*nothing to tell"),
        (
            DOMAINS,
            {"num_experts": 2},
            "`batches` is '3 domains', but must be at most 2, .*`num_experts` to at least 3",
        ),
        ({**DOMAINS, "b": []}, {"num_experts": 4}, "Domain 'b' has no text.*at least one batch"),
        (DOMAINS, {"num_experts": 1}, "`adapter_name` is 'default', but must be an adapter with routers"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(batches, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        init_routers(adapted(**settings), batches)


def test_a_strength_that_is_none_is_refused():
    with pytest.raises(ValueError, match="`strength` is 0, but must be a positive number"):
        init_routers(adapted(num_experts=4), DOMAINS, strength=0)
