"""`moe-peft inspect` and `moe-peft merge` on an adapter of the pocket backbone, through the command line."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from moe_peft import LinearMoeConfig, ShardPoolConfig, cli
from moe_peft.loaded import batches_of
from moe_peft.pocket import make_suite
from moe_peft.saving import save_adapter
from moe_peft.trial import load_pocket


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspect")
    torch.manual_seed(0)
    model, _ = load_pocket()
    config = LinearMoeConfig(
        num_experts=4, r=2, lora_alpha=128, target_modules=["up_proj"], init_weights=False, task_type="CAUSAL_LM"
    )
    save_adapter(get_peft_model(model, config), root / "adapter")
    rows = make_suite("fact8tag", 0, num_people=4).test
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    return stopped.value.code or 0


def refusal(capsys, *arguments: object) -> str:
    assert run(*arguments) == 2
    return " ".join(capsys.readouterr().err.split())


def test_inspect_counts_parameters_and_names_the_lora_of_the_same_size(folder, capsys):
    assert run("inspect", folder / "adapter") == 0
    said = capsys.readouterr().out
    trained = 4 * (4 * 2 * (128 + 352) + 4 * 128)
    assert f"{trained:,}" in said
    assert "4 of rank 2" in said
    assert "r = 9" in said  # LoRA on up_proj: 1920 parameters per rank


def test_inspect_routes_text_by_domain_and_writes_the_picture(folder, tmp_path, capsys):
    out = tmp_path / "report"
    assert run("inspect", folder / "adapter", "--data", folder / "rows.jsonl", "--by", "domain", "--output", out) == 0
    report = json.loads((out / "routing.json").read_text())
    assert sorted(report["domains"]) == list("ABCDEFGH")
    assert len(report["layers"]) == 4
    assert (out / "routing.png").read_bytes()[:4] == b"\x89PNG"
    assert "Routers, layer by layer" in capsys.readouterr().out


def test_merge_writes_a_plain_lora_with_its_loss(folder, tmp_path, capsys):
    out = tmp_path / "plain"
    assert run("merge", folder / "adapter", "--calibration", folder / "rows.jsonl", "--output", out) == 0
    record = json.loads((out / "moe_peft_merge.json").read_text())
    models = record["models"]
    assert 0 == models["routed"]["kl"] <= models["merged"]["kl"] <= models["base"]["kl"]
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    model, _ = load_pocket()
    PeftModel.from_pretrained(model, out)
    assert "Static merge into one plain LoRA of rank 8" in capsys.readouterr().out


def test_what_is_mistyped_gets_a_sentence(folder, tmp_path, capsys):
    adapter, rows = folder / "adapter", folder / "rows.jsonl"
    assert "holds no adapter: there is no adapter_config.json" in refusal(capsys, "inspect", folder)
    assert "`--by` is 'domain', but there is no `--data`" in refusal(capsys, "inspect", adapter, "--by", "domain")
    assert "domian" in refusal(capsys, "inspect", adapter, "--data", rows, "--by", "domian")
    assert "`limit` is 0, but must be" in refusal(capsys, "inspect", adapter, "--data", rows, "--limit", 0)
    assert "'4bits'" in refusal(capsys, "inspect", adapter, "--load-in", "4bits")
    merge = ("merge", adapter, "--calibration", rows, "--output", tmp_path / "x")
    assert "Did you mean 'usage'?" in refusal(capsys, *merge, "--method", "usgae")
    assert "`rank` is 0, but must be" in refusal(capsys, *merge, "--rank", 0)
    before = sorted(path.name for path in adapter.iterdir())
    assert "a new or empty folder" in refusal(capsys, *merge[:-1], adapter)
    assert sorted(path.name for path in adapter.iterdir()) == before
    assert "too little to keep a part for measuring" in refusal(capsys, *merge, "--limit", 4)
    assert not (tmp_path / "x").exists()


def test_a_plain_lora_has_no_routers_to_look_into(tmp_path, capsys):
    model, _ = load_pocket()
    save_adapter(get_peft_model(model, LoraConfig(r=1, target_modules=["up_proj"])), tmp_path)
    assert "is a LORA adapter, without routers" in refusal(capsys, "inspect", tmp_path)


def test_an_adapter_smaller_than_any_lora_of_its_layers_is_still_inspected(tmp_path, capsys):
    model, _ = load_pocket()
    config = LinearMoeConfig(num_experts=2, r=1, target_modules=["up_proj"], layers_to_transform=[0])
    save_adapter(get_peft_model(model, config), tmp_path)
    assert run("inspect", tmp_path) == 0
    assert "r = 3" in capsys.readouterr().out  # 1216 parameters over 480 per rank on that one layer


@pytest.mark.parametrize(
    "row",
    [
        {"text": "abc"},
        {"prompt": "ab", "completion": "c"},
        {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]},
        {"instruction": "ab", "input": "", "output": "c"},
    ],
    ids=lambda row: next(iter(row)),
)
def test_text_of_every_form_becomes_batches_with_labels_on_the_answer(tmp_path, row):
    _, tokenizer = load_pocket(quantize=False)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for _ in range(3)))
    (batch,) = batches_of(str(tmp_path / "rows.jsonl"), tokenizer)["all"]
    labelled = batch["labels"] != -100
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    assert tokenizer.decode(batch["labels"][0][labelled[0]]).rstrip().startswith("c") or "prompt" not in row
    assert labelled.any()


@pytest.mark.parametrize("settings", [{"equivalent_rank": 1, "shards_per_vector": 2}, {"num_splits": 4}])
def test_an_adapter_without_routing_is_inspected_and_written_exactly(folder, tmp_path, capsys, settings):
    model, _ = load_pocket()
    config = ShardPoolConfig(r=2, target_modules=["up_proj"], init_weights=False, task_type="CAUSAL_LM", **settings)
    save_adapter(get_peft_model(model, config), tmp_path / "adapter")
    assert run("inspect", tmp_path / "adapter") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{4 * (config.equivalent_rank) * (128 + 352):,}, of them 0 in routers" in said
    assert f"r = {config.equivalent_rank}" in said
    assert run("merge", tmp_path / "adapter", "--output", tmp_path / "lora") == 0
    assert "a plain PEFT LoRA of rank 2, which computes what the adapter computes" in " ".join(
        capsys.readouterr().out.split()
    )
    tokens = torch.arange(1, 9)[None]
    adapted, plain = (
        PeftModel.from_pretrained(load_pocket()[0], tmp_path / name).eval() for name in ("adapter", "lora")
    )
    assert isinstance(plain.peft_config["default"], LoraConfig)
    torch.testing.assert_close(plain(tokens).logits, adapted(tokens).logits, rtol=1e-4, atol=1e-5)
    rows = folder / "rows.jsonl"
    merging = "merge", tmp_path / "adapter", "--output", tmp_path / "lora2"
    assert "`--calibration` is" in refusal(capsys, *merging, "--calibration", rows)
    assert "`--rank` is 1, but must be left out" in refusal(capsys, *merging, "--rank", 1)
    assert "nothing is routed" in refusal(capsys, "inspect", tmp_path / "adapter", "--data", rows)
    assert not (tmp_path / "lora2").exists()


def test_a_routed_adapter_is_not_merged_without_text(folder, tmp_path, capsys):
    message = refusal(capsys, "merge", folder / "adapter", "--output", tmp_path / "out")
    assert "`--calibration` is None, but must be text" in message
