"""`moe-peft export` and `moe-peft import` through the command line, on an adapter of the pocket backbone."""

import json
import socket

import psutil
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_peft import FfnMoeConfig, LinearMoeConfig, cli, export
from moe_peft.export import stock_moe
from moe_peft.loaded import load_adapter
from moe_peft.merge import fit_static
from moe_peft.pocket import make_suite
from moe_peft.saving import save_adapter
from moe_peft.trial import load_pocket


def adapter_of(config, folder):
    torch.manual_seed(0)
    model, tokenizer = load_pocket()
    save_adapter(get_peft_model(model, config).eval(), folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    config = FfnMoeConfig(num_experts=3, r=2, lora_alpha=64, init_weights=False, task_type="CAUSAL_LM")
    return adapter_of(config, tmp_path_factory.mktemp("mixture") / "adapter")


def run(capsys, *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return stopped.value.code or 0, " ".join((said.out + said.err).split())


def test_check_says_what_would_be_and_writes_nothing(mixture, capsys):
    before = sorted(mixture.iterdir())
    code, said = run(capsys, "export", mixture, "--check")
    assert code == 0
    for words in ("MixtralForCausalLM", "3 in each of 4 layers, top 2", "original", "Nothing was written."):
        assert words in said
    assert sorted(mixture.iterdir()) == before


def test_an_export_is_a_model_of_transformers_that_answers_as_the_adapter_does(mixture, tmp_path, capsys):
    code, said = run(capsys, "export", mixture, "--output", tmp_path / "moe", "--dtype", "float32")
    assert code == 0
    assert "Compared with the adapter on its backbone, 4 layers" in said
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    routed, _ = load_adapter(str(mixture), load_in="none")
    assert type(exported).__name__ == "MixtralForCausalLM"
    prompts = [row["prompt"] for row in make_suite("fact8tag", 0, num_people=2).test[:4]]
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(exported(tokens).logits, routed(tokens).logits, rtol=1e-4, atol=1e-4)
    record = json.loads((tmp_path / "moe" / "moe_peft_export.json").read_text())
    assert record["check"]["done"]
    assert record["base_weights"] == "original"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "gguf", "--check"], "`--to` is 'gguf', but must be 'moe'"),
        ([], "`--output` is None, but must be a new or empty folder"),
        (["--target", "mixtrall", "--check"], "Did you mean 'mixtral'?"),
        (["--dtype", "int8", "--check"], "`dtype` is 'int8', but must be"),
        (["--base-weights", "orignal", "--check"], "Did you mean 'original'?"),
        (["--model", "nowhere", "--check"], "There is no model folder 'nowhere'"),
    ],
)
def test_what_is_mistyped_gets_a_sentence(mixture, capsys, arguments, message):
    code, said = run(capsys, "export", mixture, *arguments)
    assert code == 2
    assert message in said


def test_an_export_is_planned_once_and_clears_up_after_a_killed_one(mixture, tmp_path, capsys, monkeypatch):
    plans = []
    for module in (export, stock_moe):
        plan = module.plan_export
        monkeypatch.setattr(module, "plan_export", lambda *args, plan=plan: plans.append(args) or plan(*args))
    monkeypatch.setattr(psutil, "pid_exists", lambda pid: pid != 123)
    (tmp_path / f".moe.{socket.gethostname()}.123.abc.unfinished").mkdir()
    code, said = run(capsys, "export", mixture, "--output", tmp_path / "moe", "--no-verify")
    assert code == 0, said
    assert len(plans) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_a_folder_that_holds_something_is_left_alone(mixture, tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("kept")
    code, said = run(capsys, "export", mixture, "--output", tmp_path)
    assert code == 2
    assert "must be a new or empty folder. Nothing is overwritten" in said
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_an_adapter_that_routes_per_linear_is_sent_to_merge(tmp_path, capsys):
    config = LinearMoeConfig(num_experts=2, r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    code, said = run(capsys, "export", adapter_of(config, tmp_path / "adapter"), "--check")
    assert code == 2
    assert "`moe-peft merge`" in said


def test_a_mixture_is_sent_to_export_by_merge(mixture):
    model, _ = load_adapter(str(mixture), load_in="none")
    with pytest.raises(ValueError, match=r"'default' is an FFN mixture.*`moe-peft export --to moe`"):
        fit_static(model, [])


def test_import_says_what_became_of_the_checkpoint(tmp_path, capsys):
    experts, r, d, f = 2, 2, 8, 12
    source, tensors = tmp_path / "theirs", {}
    for name, (width_in, width_out) in {"gate": (d, f), "up": (d, f), "down": (f, d)}.items():
        for expert in range(experts):
            key = f"mixlora.layers.0.mlp.{name}_proj.experts.{expert}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(r, width_in)
            tensors[f"{key}.lora_B.weight"] = torch.randn(width_out, r)
    tensors["mixlora.layers.0.mlp.moe_gate.weight"] = torch.randn(experts, d)
    source.mkdir()
    save_file(tensors, source / "adapter_model.safetensors")
    modules = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), True)
    settings = {
        "peft_type": "MIXLORA",
        "task_type": "CAUSAL_LM",
        "routing_strategy": "mixlora",
        "num_experts": experts,
        "top_k": 2,
        "r": r,
    }
    settings |= {
        "lora_alpha": 4,
        "lora_dropout": 0.05,
        "target_modules": modules,
        "base_model_name_or_path": "x/llama",
    }
    (source / "adapter_config.json").write_text(json.dumps(settings))
    code, said = run(capsys, "import", source, "--output", tmp_path / "ours")
    assert code == 0, said
    assert "2 experts in each of 1 layers, routing 'softmax_top_k'" in said
    config = FfnMoeConfig.from_pretrained(str(tmp_path / "ours"))
    assert (config.num_experts, config.r, config.lora_alpha) == (2, 2, 4)


def test_import_of_nothing_gets_a_sentence(tmp_path, capsys):
    code, said = run(capsys, "import", tmp_path / "nowhere", "--output", tmp_path / "ours")
    assert code == 2
    assert "must be a folder with adapter_config.json" in said
