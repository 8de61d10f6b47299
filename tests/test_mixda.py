"""Domains that were trained apart, joined for MixDA's second stage; and both scripts from end to end."""

import pytest
import torch
from conftest import make_tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from test_bottleneck_moe import layers_of, roberta
from transformers import RobertaForSequenceClassification

from moe_peft import BottleneckMoeConfig
from moe_peft.mixda import domains_config, load_domains


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def domain(folder, base=None, seed=0, **settings):
    """A domain's adapter as the first stage leaves it, saved; returns the model."""
    torch.manual_seed(seed)
    settings = {"domains": [folder.name], "gate": "none", "bottleneck_size": 4, "init_weights": False, **settings}
    model = get_peft_model(base or make_tiny_llama(), BottleneckMoeConfig(**settings)).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture
def folders(tmp_path):
    domain(tmp_path / "law", seed=3)
    domain(tmp_path / "code", seed=4)
    return {"law": tmp_path / "law", "code": tmp_path / "code"}


def test_joined_domains_add_what_each_added(folders, tokens):
    config = domains_config(folders, gate="none", freeze_domains=False)
    joined = get_peft_model(make_tiny_llama(), config).eval()
    load_domains(joined, folders)
    apart = PeftModel.from_pretrained(make_tiny_llama(), folders["law"], adapter_name="law")
    apart.load_adapter(folders["code"], "code")
    apart.base_model.set_adapter(["law", "code"])
    with torch.no_grad():
        torch.testing.assert_close(joined(input_ids=tokens).logits, apart.eval()(input_ids=tokens).logits, **CLOSE)


def test_the_second_stage_trains_the_gate_and_the_task_alone(folders, tokens, tmp_path):
    config = domains_config(folders, gate="sigmoid", gate_size=4, r=2, task_type="CAUSAL_LM")
    assert (config.domains, config.freeze_domains, config.bottleneck_size) == (["law", "code"], True, 4)
    model = get_peft_model(make_tiny_llama(), config)
    load_domains(model, folders)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {n.rpartition(".")[2] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"router_in", "router_out", "lora_A", "lora_B"}
    model.save_pretrained(tmp_path / "task")
    again = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "task", is_trainable=True).eval()
    assert not any(p.requires_grad for n, p in again.named_parameters() if n.endswith((".up", ".down")))
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)


def test_a_folder_may_hold_several_domains_and_be_renamed(folders, tmp_path):
    both = domain(tmp_path / "both", seed=5, domains=["law", "code"])
    given = {"code": tmp_path / "both", "juice": folders["law"]}
    joined = get_peft_model(make_tiny_llama(), domains_config(given))
    load_domains(joined, given)
    layer, from_both = (next(iter(layers_of(m).values())).experts("default") for m in (joined, both))
    assert torch.equal(layer.up[0], from_both.up[1])


def test_an_encoders_domains_go_into_a_classifier(tmp_path, tokens):
    trained = domain(tmp_path / "law", roberta())
    config = domains_config({"law": tmp_path / "law"}, gate_size=4, task_type="SEQ_CLS")
    model = get_peft_model(roberta(RobertaForSequenceClassification), config)
    load_domains(model, {"law": tmp_path / "law"})
    for layer, source in zip(layers_of(model).values(), layers_of(trained).values(), strict=True):
        assert torch.equal(layer.experts("default").down, source.experts("default").down)


def test_everything_that_does_not_fit_is_named_at_once(folders, tmp_path):
    domain(tmp_path / "wide", bottleneck_size=5, layers_to_transform=[3])
    LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path / "lora")
    domain(tmp_path / "two", domains=["a", "b"])
    given = {
        **folders,
        "wide": tmp_path / "wide",
        "lora": tmp_path / "lora",
        "two": tmp_path / "two",
        "gone": tmp_path / "gone",
    }
    with pytest.raises(ValueError, match="These domains cannot be joined, and nothing was loaded:") as refused:
        domains_config(given)
    said = str(refused.value)
    for text in (
        f"'wide' ({tmp_path / 'wide'}): `bottleneck_size` is 5, but 4 for 'law'",
        f"'wide' ({tmp_path / 'wide'}): `layers_to_transform` is [3], but None for 'law'",
        "`peft_type` is LORA, but a domain is a BOTTLENECK_MOE adapter",
        "'two' (", "`domains` is ['a', 'b'], none of which has this name",
        "'gone' (", "its adapter_config.json cannot be read",
    ):  # fmt: skip
        assert text in said


def test_weights_that_do_not_fit_the_model_are_not_loaded(folders):
    config = domains_config(folders)
    model = get_peft_model(make_tiny_llama(), config)
    with pytest.raises(ValueError, match="'code': the adapter has this domain, but no folder was given for it"):
        load_domains(model, {"law": folders["law"]})
    with pytest.raises(ValueError, match=r"'x' \(.*law\): the adapter has no such domain"):
        load_domains(model, {**folders, "x": folders["law"]})
    other = get_peft_model(make_tiny_llama(layers=2), domains_config(folders))
    before = {name: p.clone() for name, p in other.named_parameters()}
    with pytest.raises(ValueError, match=r"'law' .*: model.layers.2.mlp.down_proj.down has no place in this model"):
        load_domains(other, folders)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())
    with pytest.raises(ValueError, match="`bottleneck_size` is what the domains were trained with"):
        domains_config(folders, bottleneck_size=8)
    with pytest.raises(ValueError, match="`folders` is .*, but must be a list of names, at least one"):
        domains_config({})
    lora = get_peft_model(make_tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="Adapter 'default' is no BottleneckMoeConfig adapter"):
        load_domains(lora, folders)
