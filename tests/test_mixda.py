"""Domains that were trained apart, joined for MixDA's second stage; and both scripts from end to end."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_bottleneck_moe import layers_of, roberta
from transformers import RobertaForSequenceClassification

from moe_peft import BottleneckMoeConfig
from moe_peft.labelled import labelled_text
from moe_peft.mixda import domains_config, load_domains, named_paths
from moe_peft.pocket.tokenizer import make_tokenizer


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


# --- the scripts ---


def script(name):
    path = Path(__file__).parent.parent / "train_scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, word in (("law", "court"), ("code", "loop"), ("wiki", "river")):
        (folder / f"{name}.txt").write_text("\n".join(f"the {word} of {i} is {word}{i % 3}" for i in range(30)))
    rows = [{"text": f"the {word} is near {i}", "label": word} for i in range(8) for word in ("court", "loop")]
    (folder / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"prompt": f"{i}:", "completion": f"{i % 2}"} for i in range(16)]
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    roberta(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


STEPS = "--max_steps 2 --per_device_train_batch_size 2 --use_cpu true --report_to none --save_strategy no".split()


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_both_stages_from_text_to_labels(kind, texts, encoder, tmp_path, capsys):
    pytest.importorskip("trl")
    model = ["--model", "pocket" if kind == "decoder" else encoder]
    first = [*model, "--domain", f"law={texts / 'law.txt'}", "--domain", f"code={texts / 'code.txt'}"]
    first += ["--general", str(texts / "wiki.txt"), "--output_dir", str(tmp_path / "domains"), *STEPS]
    first += ["--block_size", "24", "--set", "bottleneck_size=4", "--learning_rate", "1e-2"]
    script("mixda_domains")(first)
    printed = capsys.readouterr().out
    assert ("causal" if kind == "decoder" else "masked") in printed
    saved = load_file(tmp_path / "domains" / "law" / "adapter_model.safetensors")
    assert any(tensor.any() for key, tensor in saved.items() if key.endswith(".up"))
    script("mixda_domains")(first)
    assert capsys.readouterr().out.count("finished already") == 2

    second = [*model, *(x for name in ("law", "code") for x in ("--domain", f"{name}={tmp_path / 'domains' / name}"))]
    for data, task in (("labelled", "SEQ_CLS"), ("answers", "CAUSAL_LM")):
        if kind == "encoder" and task == "CAUSAL_LM":
            continue
        out, rows = tmp_path / data, str(texts / f"{data}.jsonl")
        script("mixda_task")([*second, "--dataset", rows, "--eval_dataset", rows, "--output_dir", str(out), *STEPS])
        assert ("eval_accuracy" in capsys.readouterr().out) == (task == "SEQ_CLS")
        config = json.loads((out / "adapter_config.json").read_text())
        assert (config["domains"], config["task_type"], config["r"]) == (["law", "code"], task, 8)
        joined = load_file(out / "adapter_model.safetensors")
        for key, tensor in saved.items():
            assert torch.equal(joined[key][:1], tensor), key


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["law"], "`--domain` is 'law', but must be a domain's name and a path, as law=data/law.txt"),
        ([], "`--domain` is [], but must be a list of names, at least one"),
        (["law=a", "law=b"], "but must be all different. Two domains are called 'law'"),
    ],
)
def test_domains_on_a_command_line(pairs, message):
    assert named_paths(["law=a", "code=b=c"]) == {"law": "a", "code": "b=c"}
    with pytest.raises(ValueError, match=re.escape(message)):
        named_paths(pairs)


def test_a_domain_without_text_stops_the_run_before_training(texts, tmp_path):
    pytest.importorskip("trl")
    (tmp_path / "empty.txt").write_text("\n\n")
    argv = ["--domain", f"law={texts / 'law.txt'}", "--domain", f"empty={tmp_path / 'empty.txt'}"]
    with pytest.raises(ValueError, match=r"empty\.txt"):
        script("mixda_domains")([*argv, "--output_dir", str(tmp_path / "out"), *STEPS])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        (
            [{"text": "a", "label": 1}, {"text": "b", "label": 0}],
            ["0", "2"],
            "`label` is '1', but must be one of ['0', '2']",
        ),
        ([{"text": "a", "label": "x"}], None, "`label` is ['x'], but must be at least two classes"),
        ([{"text": "a", "label": "x"}, {"text": " ", "label": "y"}], None, "Row 1 of "),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": ""}], None, "has no label."),
        ([{"text": "a", "labels": "x"}], None, "have no column `label`. Did you mean 'labels'?"),
    ],
)
def test_labels_that_are_refused(rows, names, message, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=re.escape(message)):
        labelled_text(str(tmp_path / "rows.jsonl"), names=names)


def test_labels_are_numbered_in_order(tmp_path):
    rows = [{"text": "a", "label": n} for n in (10, 9, 10)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = labelled_text(str(tmp_path / "rows.jsonl"))
    assert (found.names, list(found.dataset["label"])) == (["9", "10"], [1, 0, 1])
