"""Experts with names: what counts experts by number refuses them and says the way, and that way works; errors name fields."""

import pytest
import torch
from conftest import make_tiny_llama
from peft import LoraConfig, get_peft_model

from moe_peft import (
    BottleneckMoeConfig,
    DomainMoeConfig,
    add_experts,
    from_loras,
    init_experts_from_lora,
    init_routers,
    prune_experts,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, found = tmp_path_factory.mktemp("loras"), {}
    for seed, name in enumerate(("law", "code", "art")):
        torch.manual_seed(seed)
        config = LoraConfig(r=2 + seed, target_modules=["up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(make_tiny_llama(), config).save_pretrained(root / name)
        found[name] = root / name
    return found


NAMED = {
    "from_loras": DomainMoeConfig(domains=["law", "code"], r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"),
    "load_domains": BottleneckMoeConfig(domains=["law", "code"], gate="sigmoid", gate_size=8, task_type="CAUSAL_LM"),
}
DOING = {
    "Adding experts": lambda model, folders: add_experts(model),
    "Pruning experts": lambda model, folders: prune_experts(model, 1, scores={}),
    "Starting experts from a LoRA": lambda model, folders: init_experts_from_lora(
        model, folders["law"], check_base=False
    ),
}


@pytest.mark.parametrize("way", NAMED)
@pytest.mark.parametrize("doing", DOING)
def test_experts_with_names_do_not_come_and_go_by_number(folders, way, doing):
    model = get_peft_model(make_tiny_llama(), NAMED[way])
    kind = NAMED[way].peft_type.value
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^{doing} is for experts that have numbers; 'default' is {kind}.*{way}"):
        DOING[doing](model, folders)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_further_domain_leaves_the_earlier_ones_as_they_were(folders):
    """What the refusal advises."""
    two = {name: folders[name] for name in ("law", "code")}
    smaller = from_loras(two, make_tiny_llama(), gate="given", check_base=False).eval()
    larger = from_loras(folders, make_tiny_llama(), gate="given", check_base=False).eval()
    tokens = torch.arange(1, 9)[None]
    for name in two:
        with torch.no_grad():
            few, many = (model(input_ids=tokens, domain=name).logits for model in (smaller, larger))
        torch.testing.assert_close(many, few)


@pytest.mark.parametrize("labels", [False, True])
def test_a_missing_prompt_is_said_of_the_gate(labels):
    config = DomainMoeConfig(
        domains=["law", "code"], gate="sequence", r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(make_tiny_llama(), config).train()
    tokens = torch.arange(1, 9)[None]
    with pytest.raises(ValueError, match="^`gate` is 'sequence' or 'prototype', but must be 'token' where"):
        model(input_ids=tokens, labels=tokens if labels else None)


def domain_model(gate: str = "token"):
    torch.manual_seed(0)
    config = DomainMoeConfig(domains=["law", "code"], gate=gate, r=2, target_modules=["up_proj"])
    return get_peft_model(make_tiny_llama(), config)


def test_a_router_with_names_starts_each_row_from_its_own_domain():
    """Whatever the order of the texts."""
    texts = {"law": [{"input_ids": torch.arange(1, 9)[None]}], "code": [{"input_ids": torch.arange(40, 48)[None]}]}
    there, back = domain_model(), domain_model()
    assert init_routers(there, texts) == init_routers(back, dict(reversed(texts.items()))) == {"law": [0], "code": [1]}
    for (name, one), (_, other) in zip(there.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("gate", "texts", "message"),
    [
        ("token", ["law", "art"], "`batches` is .*must be of the adapter's domains, all of them: law, code"),
        ("prototype", ["law", "code"], "`gate` is 'prototype', but must be 'token' .*set_prototypes"),
    ],
)
def test_a_router_with_names_refuses_other_domains_and_gates(gate, texts, message):
    with pytest.raises(ValueError, match=message):
        init_routers(domain_model(gate), {name: [] for name in texts})
