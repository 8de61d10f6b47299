"""`train_scripts/domains.py`: a folder per domain becomes experts and a gate; what is finished is not trained again."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from rich.console import Console

import moe_peft  # noqa: F401
from moe_peft import domain_training
from moe_peft.domain_arguments import parse_domains
from moe_peft.domain_training import main
from moe_peft.gate_accuracy import gate_accuracy, gate_confusion


SCRIPT = Path(__file__).parents[1] / "train_scripts" / "domains.py"
FAST = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--r", "2", "--report_to", "none"]
FAST += ["--load_in", "none", "--target_modules", "q_proj", "--gate_steps", "2", "--save_steps", "1"]


@pytest.fixture
def folder(tmp_path):
    """Two domains, one a file and one a folder, of prompts whose letters tell them apart."""
    (tmp_path / "data" / "upper").mkdir(parents=True)
    rows = {"lower.jsonl": "abc", "upper/train.jsonl": "XYZ"}
    for name, letters in rows.items():
        lines = [{"prompt": f"{letters[n % 3]}{letters[n % 2]}:>", "completion": letters} for n in range(12)]
        (tmp_path / "data" / name).write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path / "data"


def trained(folder, out, *more):
    console = Console(record=True, width=200)
    main(["--domains", str(folder), "--output_dir", str(out), *FAST, *more], console)
    return console.export_text()


def test_experts_gate_and_adapter_and_no_second_training(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    printed = trained(folder, out)
    assert "1/2 lower: 12 rows of prompt" in printed
    assert "2/2 upper" in printed
    assert "How often the gate" in printed
    model = AutoPeftModelForCausalLM.from_pretrained(out)
    assert model.peft_config["default"].domains == ["lower", "upper"]
    weights = {
        name: (out / "experts" / name / "adapter_model.safetensors").read_bytes() for name in ("lower", "upper")
    }
    monkeypatch.setattr(domain_training, "_train_expert", lambda *_: pytest.fail("trained again"))
    again = trained(folder, out, "--gate", "prototype")
    assert again.count("finished before") == 2
    assert {n: (out / "experts" / n / "adapter_model.safetensors").read_bytes() for n in weights} == weights
    assert AutoPeftModelForCausalLM.from_pretrained(out).peft_config["default"].gate == "prototype"


def test_an_interrupted_run_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    out, write = tmp_path / "out", domain_training._write_record

    def stopped(file, record):
        if file.name == "domain.json":
            raise KeyboardInterrupt
        write(file, record)

    monkeypatch.setattr(domain_training, "_write_record", stopped)
    with pytest.raises(KeyboardInterrupt):
        trained(folder, out)
    assert not (out / "experts" / "lower" / "domain.json").exists()
    monkeypatch.setattr(domain_training, "_write_record", write)
    before = (folder / "lower.jsonl").read_text()
    (folder / "lower.jsonl").write_text(before + json.dumps({"prompt": "new:>", "completion": "row"}) + "\n")
    with pytest.raises(ValueError, match=r"`output_dir` is .*lower'.*made as asked for now \(data "):
        trained(folder, out)  # its checkpoint is of other data
    (folder / "lower.jsonl").write_text(before)
    started = out / "experts" / "lower" / "domain.started.json"
    record = started.read_text()
    started.write_text("{")
    with pytest.raises(ValueError, match=r"but must be one whose domain.started.json can be read .* Remove"):
        trained(folder, out)
    started.write_text(record)
    resumed = []
    inner = domain_training.checkpoint_to_resume
    monkeypatch.setattr(domain_training, "checkpoint_to_resume", lambda *a: resumed.append(inner(*a)) or resumed[-1])
    trained(folder, out)
    assert resumed[0].endswith("checkpoint-2")
    assert resumed[1] is None
    assert not started.exists()


def test_an_expert_made_from_other_data_is_refused_before_anything_is_trained(folder, tmp_path):
    out = tmp_path / "out"
    trained(folder, out)
    with (folder / "lower.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "new:>", "completion": "row"}) + "\n")
    with pytest.raises(ValueError, match=r"`output_dir` is .*lower'.*made as asked for now \(data .*Remove"):
        trained(folder, out)
    with pytest.raises(ValueError, match=r"`output_dir` is .*r 2 -> 3"):
        trained(folder, out, "--r", "3")


def test_the_gate_is_counted_token_by_token(folder, tmp_path):
    out = tmp_path / "out"
    trained(folder, out, "--gate", "prototype")
    model = AutoPeftModelForCausalLM.from_pretrained(out)
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    confusion = gate_confusion(model, {"lower": [batch]})
    assert sum(confusion["lower"].values()) == pytest.approx(1)
    gate = moe_peft.prototypes.gate_of_model(model)
    with torch.no_grad():
        pools = moe_peft.prototypes.prompt_pools(model, [batch])
        rows = gate.prompt_scores(pools).argmax(-1).tolist()
    expected = (
        sum(tokens for row, tokens in zip(rows, (3, 2), strict=True) if row == 0) / 5
    )  # real tokens, all layers alike
    assert gate_accuracy(model, {"lower": [batch]})["lower"] == pytest.approx(expected)
    with pytest.raises(
        ValueError, match=r"`batches` is 'lowr', but must be of the domains lower, upper. Did you mean"
    ):
        gate_accuracy(model, {"lowr": [batch]})
    with pytest.raises(ValueError, match=r"`batches` is \['upper'\], but must be of domains that have text"):
        gate_accuracy(model, {"upper": []})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--domain", "x"], r"`--domain` is not an option. Did you mean 'domains'"),
        (["--domains", "nowhere"], r"`domains` is 'nowhere', but must be a folder. Make one with a folder or a jsonl"),
        (["--gate", "tokens"], r"Argument --gate: invalid choice: 'tokens' \(choose from"),
        (["--gate_steps", "0"], r"`gate_steps` is 0, but must be at least 1 with the gate 'token'"),
        (["--packing", "true"], r"`packing` is True, but must be False for domains"),
        (["--r", "0"], r"`r` is 0, but must be a whole number of at least 1"),
    ],
)
def test_a_mistyped_option_gets_a_sentence(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_domains(["--domains", str(folder), *arguments])


def test_folders_that_are_no_domains_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"but must be a folder with at least two domains, not \[\]"):
        parse_domains(["--domains", str(tmp_path)])
    for name in ("law.jsonl", "Law.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"two domains have one name: 'Law' and 'law'. Rename the folder or file"):
        parse_domains(["--domains", str(tmp_path)])


def test_the_script_says_what_is_wrong_in_a_sentence(tmp_path):
    for name in ("law", "code"):
        (tmp_path / name).mkdir()
    (tmp_path / "law" / "train.jsonl").write_text('{"text": "x"}\n')
    run = subprocess.run(
        [sys.executable, SCRIPT, "--domains", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 1
    assert "error: Domain 'code'" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("script", "given", "sentence"),
    [
        ("mixda_domains", ["--domains", "law=x"], "`--domains` is not an option. Did you mean 'domain'?"),
        ("mixda_task", ["--dataset", "x", "--domian", "x"], "`--domian` is not an option. Did you mean 'domain'?"),
        (
            "reward_dmoerm",
            ["--dataset", "x", "--hold_out", "1"],
            "`--hold_out` is not an option. Did you mean 'held_out'",
        ),
    ],
)
def test_the_other_scripts_take_no_option_that_they_have_not(script, given, sentence):
    main = runpy.run_path(str(Path(SCRIPT).with_name(f"{script}.py")))["main"]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        main(given)
