"""`moe-peft merge` through the command line: what it prints and writes, and when it writes nothing."""

import json
import shutil
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from moe_peft import FfnMoeConfig, LinearMoeConfig, ShardPoolConfig, cli
from moe_peft.loaded import load_adapter
from moe_peft.merge import Factors
from moe_peft.merging import writing
from moe_peft.merging.dense import DensePlan, advice
from moe_peft.merging.methods import merge_static
from moe_peft.merging.writing import check_record
from moe_peft.pocket import POCKET_DIR, make_suite
from moe_peft.saving import save_adapter
from moe_peft.trial import load_pocket


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("merge")
    torch.manual_seed(0)
    settings = {"num_experts": 4, "r": 2, "init_weights": False, "task_type": "CAUSAL_LM"}
    for name, config in (
        ("linears", LinearMoeConfig(lora_alpha=128, target_modules=["up_proj", "q_proj"], **settings)),
        ("ffn", FfnMoeConfig(lora_alpha=32, **settings)),
        ("pool", ShardPoolConfig(r=2, target_modules=["up_proj"], init_weights=False, task_type="CAUSAL_LM")),
    ):
        save_adapter(get_peft_model(load_pocket()[0], config), root / name)
    rows = make_suite("fact8tag", 0, num_people=6).test
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    return stopped.value.code


def refusal(capsys, *arguments: object) -> str:
    assert run(*arguments) == cli.USER_ERROR
    return " ".join(capsys.readouterr().err.split())


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 30)[None]).logits


def test_a_merge_ends_in_a_table_a_record_and_a_picture(folder, tmp_path, capsys):
    out, rows = tmp_path / "plain", folder / "rows.jsonl"
    merge = ("merge", folder / "linears", "--calibration", rows, "--output", out, "--rank", 4)
    assert run(*merge, "--eval", rows, "--max-kl", 50) == 0
    said = " ".join(capsys.readouterr().out.split())
    served = f"vllm serve {POCKET_DIR} --enable-lora --lora-modules plain={out}"
    table = ("Static merge into one plain LoRA of rank 4", "KL from routed", "exact match", "s for each layer")
    for words in (*table, served):
        assert words in said
    record = check_record(out)
    assert list(record["models"]) == ["base", "routed", "merged"]
    assert record["models"]["routed"]["kl"] == 0
    assert record["models"]["merged"]["kl"] == min(record["kl_by_ridge"].values())
    assert len(record["layer_error"]) == len(record["seconds_per_layer"]) == 4
    assert record["adapter_sha256"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert record["models"]["routed"]["score"] is not None
    assert (out / writing.PLOT_FILE).read_bytes()[:4] == b"\x89PNG"
    assert PeftModel.from_pretrained(load_pocket()[0], out).peft_config["default"].r == 4
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]  # nothing half written beside it


def test_layers_are_read_from_disk_one_by_one_if_asked(folder, tmp_path):
    out = tmp_path / "plain"
    merge = ("merge", folder / "linears", "--calibration", folder / "rows.jsonl", "--output", out)
    assert run(*merge, "--load-in", "layers") == 0
    assert check_record(out)["models"]["merged"]["kl"] < check_record(out)["models"]["base"]["kl"]


def test_a_merge_beyond_the_bound_writes_nothing(folder, tmp_path, capsys):
    merge = ("merge", folder / "linears", "--calibration", folder / "rows.jsonl", "--output", tmp_path / "x")
    message = refusal(capsys, *merge, "--max-kl", 1e-9)
    assert "nats from the routed model, above `--max-kl` 1e-09: nothing was written" in message
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    message = refusal(capsys, "merge", folder / "linears", "--calibration", folder / "rows.jsonl", "--output", out)
    assert "a new or empty folder" in message
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_a_merge_that_is_stopped_leaves_nothing(folder, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_peft.merging.command.write_record", stop)
    run("merge", folder / "linears", "--calibration", folder / "rows.jsonl", "--output", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_changes_while_it_is_merged_is_not_written(folder, tmp_path, capsys, monkeypatch):
    adapter = tmp_path / "adapter"
    shutil.copytree(folder / "linears", adapter)

    def changing(*arguments):
        (adapter / "adapter_model.safetensors").write_bytes(b"trained on")

    monkeypatch.setattr("moe_peft.merging.command._check_bound", changing)
    merge = ("merge", adapter, "--calibration", folder / "rows.jsonl", "--output", tmp_path / "x", "--method", "usage")
    assert "was changed after its record was written" in refusal(capsys, *merge)
    assert not (tmp_path / "x").exists()


def test_nobody_loses_a_merge_for_want_of_a_picture(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "plain"
    assert run("merge", folder / "linears", "--calibration", folder / "rows.jsonl", "--output", out) == 0
    assert "Without a picture of the layers. The picture needs matplotlib" in " ".join(capsys.readouterr().out.split())
    assert check_record(out)["method"] == "ls"
    assert not (out / writing.PLOT_FILE).exists()


def test_a_record_beside_other_weights_is_not_believed(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("merge", folder / "pool", "--output", out) == 0
    assert check_record(out)["exact"]
    weights = out / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors` of .* was changed after its record was written"):
        check_record(out)
    assert "was changed after its record" in refusal(capsys, "merge", out, "--output", tmp_path / "y")


def test_one_lora_for_each_domain(folder, tmp_path, capsys):
    out, rows = tmp_path / "out", tmp_path / "rows.jsonl"
    texts = [row for row in make_suite("fact8tag", 0, num_people=8).test if row["domain"] in "AB"]
    rows.write_text("\n".join(json.dumps({**row, "domain": f"{row['domain']}/x"}) for row in texts))
    assert run("merge", folder / "linears", "--calibration", rows, "--output", out, "--per-domain") == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"{domain}_x" for domain in sorted({row["domain"] for row in texts})]
    assert len(names) == 2
    for name in names:
        assert check_record(out / name)["models"]["merged"]["kl"] >= 0
    first, second = (logits(PeftModel.from_pretrained(load_pocket()[0], out / name).eval()) for name in names)
    assert (first - second).abs().max() > 1e-3
    plain = tmp_path / "plain.jsonl"
    plain.write_text("\n".join(json.dumps({"text": "abcdef"}) for _ in range(64)))
    merge = ("merge", folder / "linears", "--calibration", plain, "--output", tmp_path / "y", "--per-domain")
    assert "needs a column `domain` or `task_type`, but the rows" in refusal(capsys, *merge)


@pytest.mark.parametrize("kind", ["linears", "ffn"])
def test_dense_weights_are_the_merge(folder, tmp_path, capsys, kind):
    """Loaded as a stock model, they compute what the factors compute on the base."""
    out = tmp_path / "dense"
    merge = ("merge", folder / kind, "--calibration", folder / "rows.jsonl", "--output", out, "--dense")
    assert run(*merge, "--dtype", "float32", "--load-in", "none") == 0
    assert "float32 keeps 100.0% of it" in " ".join(capsys.readouterr().out.split())
    record = check_record(out)
    assert record["dense"]["base_weights"] == "original"
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert not hasattr(model.config, "quantization_config")
    kl = record["models"]["merged"]["kl"]
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert 0 < kl < record["models"]["base"]["kl"]
    assert rows
    base, _ = load_pocket(quantize=False)
    assert (logits(model) - logits(base)).abs().max() > 1e-2


def test_a_static_adapter_becomes_dense_weights_exactly(folder, tmp_path, capsys):
    out = tmp_path / "dense"
    assert run("merge", folder / "pool", "--output", out, "--dense", "--dtype", "float32") == 0
    assert "exactly" in capsys.readouterr().out
    adapted = PeftModel.from_pretrained(load_pocket(quantize=False)[0], folder / "pool").eval()
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(out).eval()), logits(adapted), rtol=1e-4, atol=1e-4
    )


def test_dense_weights_of_a_4_bit_base_are_those_it_computed_with(folder, tmp_path, capsys):
    out = tmp_path / "dense"
    dense = ("--dense", "--base-weights", "dequantized")
    assert run("merge", folder / "pool", "--output", out, *dense, "--dtype", "float32") == 0
    assert check_record(out)["dense"]["base_weights"] == "dequantized"
    adapted = PeftModel.from_pretrained(load_pocket(quantize=True)[0], folder / "pool").eval()
    found = logits(AutoModelForCausalLM.from_pretrained(out).eval())
    torch.testing.assert_close(found, logits(adapted), rtol=1e-3, atol=1e-3)
    unlike = PeftModel.from_pretrained(load_pocket(quantize=False)[0], folder / "pool").eval()
    assert (found - logits(unlike)).abs().max() > 0.01  # the two bases do differ


def test_without_text_there_is_the_usage_mean_and_a_warning(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert "Without text there is only `--method usage`" in refusal(
        capsys, "merge", folder / "linears", "--output", out
    )
    assert run("merge", folder / "linears", "--output", out, "--method", "usage") == 0
    assert "No text: usage and loss are measured on random tokens" in " ".join(capsys.readouterr().out.split())
    assert check_record(out)["calibration"] is None


BAD = {
    "rank of no server": (
        ("--rank", 600),
        "`--rank` is 600, but must be at most 512, the largest rank that vLLM takes",
    ),
    "no bound": (("--max-kl", -1), "`--max-kl` is -1.0, but must be a number above 0"),
    "dtype of a LoRA": (("--dtype", "float16"), "`--dtype` is 'float16', but must be left out for a plain LoRA"),
    "no dtype": (("--dense", "--dtype", "bfloat61"), "Did you mean 'bfloat16'?"),
    "no weights": (("--dense", "--base-weights", "orignal"), "Did you mean 'original'?"),
    "dense domains": (("--dense", "--per-domain"), "`--dense` is True, but must be False with `--per-domain`"),
    "no suite": (("--eval", "fact8tags"), "Did you mean 'fact8tag'?"),
    "too few rows": (("--limit", 4), "too little to keep a part for measuring"),
    "no steps": (("--method", "learned", "--steps", 0), "`steps` is 0, but must be"),
}


@pytest.mark.parametrize(("options", "words"), BAD.values(), ids=BAD)
def test_what_cannot_be_done_gets_a_sentence(folder, tmp_path, capsys, options, words):
    merge = ("merge", folder / "linears", "--calibration", folder / "rows.jsonl", "--output", tmp_path / "x")
    assert words in refusal(capsys, *merge, *options)
    assert not (tmp_path / "x").exists()


def test_text_that_is_too_short_or_of_no_format_gets_a_sentence(folder, tmp_path, capsys):
    model, _ = load_adapter(str(folder / "linears"))
    row = [{"input_ids": torch.tensor([[1, 2, 3]])}]
    with pytest.raises(ValueError, match="has 3 tokens to fit to, fewer than the adapter's 8 directions"):
        merge_static(model, row, row)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"chosen": "a", "rejected": "b"}) for _ in range(20)))
    merge = ("merge", folder / "linears", "--calibration", rows, "--output", tmp_path / "x")
    assert "preference pairs" in refusal(capsys, *merge)
    assert not (tmp_path / "x").exists()


def test_what_static_factors_cannot_carry_is_refused():
    config = LinearMoeConfig(num_experts=2, r=2, target_modules=["up_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(load_pocket(quantize=False)[0], config)
    with pytest.raises(ValueError, match=r"`modules_to_save` is .* but must be None for a static merge"):
        merge_static(model, [], [])
    config = LinearMoeConfig(num_experts=4, num_constant_experts=2, r=2, top_k=2, target_modules=["up_proj"])
    model = get_peft_model(load_pocket(quantize=False)[0], config)
    with pytest.raises(ValueError, match="`num_constant_experts` is 2, but must be 0 for a static merge"):
        merge_static(model, [], [])


def test_a_4_bit_base_is_bit_identical_after_twenty_merges(folder):
    """`merge_adapter` re-quantises, which NF4 does not undo: the packed weights themselves are kept and put back."""
    model = PeftModel.from_pretrained(load_pocket(quantize=True)[0], folder / "pool").eval()
    frozen = {name: p for name, p in model.named_parameters() if "base_layer" in name}
    before, wanted = {name: p.detach().clone() for name, p in frozen.items()}, logits(model)
    assert any(p.dtype == torch.uint8 for p in before.values())
    for _ in range(20):
        model.merge_adapter()
        model.unmerge_adapter()
    after = {name: p for name, p in model.named_parameters() if "base_layer" in name}
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize(("scale", "advised"), [(1e-3, True), (3e-2, False)])
def test_the_share_of_the_change_that_a_dtype_keeps(folder, tmp_path, scale, advised):
    """Against the definition, and fp16 advised where bf16 eats a small change (export.md B.3)."""
    base, _ = load_pocket(quantize=False)
    name = "model.layers.0.mlp.up_proj"
    weight = base.get_submodule(name).weight.detach()
    torch.manual_seed(0)
    A, B = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    B *= scale * weight.norm() / (B @ A).norm()
    plan = DensePlan(str(POCKET_DIR), str(folder / "pool"), dtype="bfloat16")
    (tmp_path / "out").mkdir()
    found = plan.write({name: Factors(A, B)}, tmp_path / "out")
    change = B @ A
    kept = (weight + change).bfloat16().float() - weight
    assert found.size == pytest.approx(scale, rel=1e-3)
    assert found.share == pytest.approx(float((kept * change).sum() / change.square().sum()), rel=1e-4)
    assert found.error == pytest.approx(float((kept - change).norm() / change.norm()), rel=1e-4)
    assert ("--dtype float16" in advice(found, torch.bfloat16)) == advised
    fine = DensePlan(str(POCKET_DIR), str(folder / "pool"), dtype="float16")
    (tmp_path / "fine").mkdir()
    assert fine.write({name: Factors(A, B)}, tmp_path / "fine").error < found.error / 4


def test_no_text_and_a_bound_do_not_go_together(folder, tmp_path, capsys):
    merge = ("merge", folder / "linears", "--output", tmp_path / "x", "--method", "usage", "--max-kl", 0.1)
    assert "The loss has to be measured on text" in refusal(capsys, *merge)
