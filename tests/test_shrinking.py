"""`moe-peft shrink`: the smaller adapter is written with what it loses, or nothing is."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model

from moe_peft import FfnMoeConfig, LinearMoeConfig, cli, prune_experts
from moe_peft.loaded import batches_of
from moe_peft.merge import routed_layers
from moe_peft.pocket import make_suite
from moe_peft.recovering import distillation_loss, recover
from moe_peft.saving import save_adapter
from moe_peft.shrinking import measure_shrunk
from moe_peft.shrinking_report import RECORD_FILE
from moe_peft.trial import load_pocket


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("shrink")
    torch.manual_seed(0)
    model, tokenizer = load_pocket()
    config = LinearMoeConfig(
        num_experts=4, r=2, lora_alpha=128, target_modules=["up_proj"], init_weights=False, router_init_std=0.5
    )
    save_adapter(get_peft_model(model, config), root / "adapter")
    tokenizer.save_pretrained(root / "adapter")
    rows = make_suite("fact8tag", 0, num_people=2).test
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    return stopped.value.code or 0


def refusal(capsys, *arguments: object) -> str:
    assert run(*arguments) == 2
    return " ".join(capsys.readouterr().err.split())


def shrink(folder, output, *more: object) -> tuple:
    return ("shrink", folder / "adapter", "--calibration", folder / "rows.jsonl", "--output", output, *more)


def test_a_pruned_adapter_is_written_with_its_table(folder, tmp_path, capsys):
    out, log = tmp_path / "small", folder / "adapter" / "training_log.json"
    log.write_text('{"settings": {"load_in": "4bit"}}')
    assert run(*shrink(folder, out, "--keep", 2)) == 0
    assert (out / log.name).read_bytes() == log.read_bytes()  # an export asks it how the base was loaded
    log.unlink()
    said = " ".join(capsys.readouterr().out.split())
    assert "What shrinking costs" in said
    assert "LINEAR_MOE, 2 experts of rank 2" in (out / "README.md").read_text()
    record = json.loads((out / RECORD_FILE).read_text())
    assert record["parameters"]["default"] == 4 * (4 * 2 * (128 + 352) + 4 * 128)
    assert record["parameters"]["shrunk"] == 4 * (2 * 2 * (128 + 352) + 2 * 128)
    assert all(len(line["kept"]) == 2 for line in record["layers"])
    assert 0 < record["kl_merged"]
    assert 0 < record["top1_merged"] <= 1
    assert record["tokens"] > 0
    assert not (out / "shrunk").exists()
    assert (out / "tokenizer_config.json").is_file()
    again = PeftModel.from_pretrained(load_pocket()[0], out)
    assert again.peft_config["default"].num_experts == 2
    old = PeftModel.from_pretrained(load_pocket()[0], folder / "adapter")
    for line in record["layers"]:
        kept, whole = (routed_layers(m)[line["layer"]].experts("default").lora_B for m in (again, old))
        assert torch.equal(kept, whole[line["kept"]])


def test_an_ffn_mixture_is_shrunk_and_recovered(folder, tmp_path, capsys):
    model, _ = load_pocket()
    config = FfnMoeConfig(num_experts=4, r=2, lora_alpha=128, init_weights=False, router_init_std=0.5)
    save_adapter(get_peft_model(model, config), tmp_path / "adapter")
    out, rows = tmp_path / "small", ("--calibration", folder / "rows.jsonl", "--model", "pocket")
    assert run("shrink", tmp_path / "adapter", *rows, "--output", out, "--keep", 2, "--recover", 2) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "What shrinking costs" in said
    assert "Largest errors" not in said
    record = json.loads((out / RECORD_FILE).read_text())
    assert [line["layer"] for line in record["layers"]] == [f"model.layers.{n}.mlp" for n in range(4)]
    assert record["parameters"]["shrunk"] < record["parameters"]["default"]
    assert record["kl_merged"] > 0
    assert PeftModel.from_pretrained(load_pocket()[0], out).peft_config["default"].num_experts == 2
    out, by_group = tmp_path / "grouped", ("--method", "group", "--groups", 2)
    assert run("shrink", tmp_path / "adapter", *rows, "--output", out, *by_group, "--similarity", "outputs") == 0
    record = json.loads((out / RECORD_FILE).read_text())
    assert record["parameters"]["shrunk"] < record["parameters"]["default"]
    assert all(sorted(sum(line["groups"], [])) == [0, 1, 2, 3] for line in record["layers"])
    config = PeftModel.from_pretrained(load_pocket()[0], out).peft_config["default"]
    assert (config.num_experts, config.num_distinct_experts) == (4, 2)
    assert "4 experts of rank 2 (2 with weights of their own)" in (out / "README.md").read_text()
    capsys.readouterr()
    wrong = ("shrink", tmp_path / "adapter", *rows, "--output", tmp_path / "x", *by_group, "--merge", "lst")
    assert "`--merge` is 'lst', but must be 'lstsq' or 'usage'. Did you mean 'lstsq'?" in refusal(capsys, *wrong)


def test_the_table_is_the_definition(folder):
    """Each figure from logits of models that were loaded by themselves."""
    model, tokenizer = load_pocket()
    model = PeftModel.from_pretrained(model, folder / "adapter").eval()
    model.load_adapter(folder / "adapter", "shrunk")
    batches = batches_of(str(folder / "rows.jsonl"), tokenizer, limit=20)["all"]
    model.set_adapter("shrunk")
    prune_experts(model, 2, calibration=batches, adapter_name="shrunk")
    model.set_adapter("default")
    found = measure_shrunk(model, batches)
    assert model.active_adapter == "default"
    other = copy.deepcopy(model)
    other.set_adapter("shrunk")
    other.delete_adapter("default")
    loss, kl, same = [], [], []
    for batch in batches:
        with torch.no_grad():
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            p, q = (m(**inputs).logits[:, :-1].log_softmax(-1) for m in (model, other))
        for row, column in (batch["labels"][:, 1:] != -100).nonzero().tolist():
            loss.append(-float(q[row, column, batch["labels"][row, column + 1]]))
            kl.append(float((p[row, column].exp() * (p[row, column] - q[row, column])).sum()))
            same.append(float(p[row, column].argmax() == q[row, column].argmax()))
    assert found.tokens == len(loss)
    for mine, wanted in ((found.loss_merged, loss), (found.kl_merged, kl), (found.top1_merged, same)):
        assert mine == pytest.approx(sum(wanted) / len(wanted), rel=1e-4, abs=1e-6)
    assert all(0 < error < 2 for error in found.layer_error.values())


def test_an_adapter_beside_its_own_copy_loses_nothing(folder):
    model, tokenizer = load_pocket()
    model = PeftModel.from_pretrained(model, folder / "adapter").eval()
    model.load_adapter(folder / "adapter", "shrunk")
    found = measure_shrunk(model, batches_of(str(folder / "rows.jsonl"), tokenizer, limit=8)["all"])
    assert found.kl_merged == 0
    assert found.top1_merged == 1
    assert found.loss_merged == found.loss_routed
    assert set(found.layer_error.values()) == {0.0}


def test_what_is_mistyped_gets_a_sentence_and_nothing_is_written(folder, tmp_path, capsys):
    out = tmp_path / "x"

    def said(*more: object) -> str:
        return refusal(capsys, *shrink(folder, out, *more))

    assert "`--method` is 'prun', but must be" in said("--method", "prun", "--keep", 2)
    assert "`--keep` is None, but must be the number of experts" in said()
    assert "`keep` is 9, but must be at most 4" in said("--keep", 9)
    assert "`keep` is 1, but must be at least 2, the adapter's `top_k`" in said("--keep", 1)
    assert "`--by` is 'use', but must be 'easy_ep' or 'usage'. Did you mean 'usage'?" in said(
        "--keep", 2, "--by", "use"
    )
    assert "`--max-kl` is 0.0, but must be a number above 0" in said("--keep", 2, "--max-kl", 0)
    assert "above `--max-kl` 1e-07: nothing was written" in said("--keep", 2, "--max-kl", 1e-7)
    assert "too little to keep a part for measuring" in said("--keep", 2, "--limit", 4)
    assert not out.exists()
    occupied = shrink(folder, folder / "adapter", "--keep", 2)
    assert "`output` is" in refusal(capsys, *occupied)
    assert "must be a new or empty folder" in refusal(capsys, *occupied)


def test_a_grouped_adapter_is_written_and_loads(folder, tmp_path, capsys):
    out = tmp_path / "small"
    assert run(*shrink(folder, out, "--method", "group", "--groups", 2, "--merge", "lstsq")) == 0
    record = json.loads((out / RECORD_FILE).read_text())
    assert (record["method"], record["groups"], record["merge"]) == ("group", 2, "lstsq")
    assert "keep" not in record
    assert record["parameters"]["shrunk"] == 4 * (2 * 2 * (128 + 352) + 4 * 128)  # the routers stay as they were
    assert all(sorted(sum(line["groups"], [])) == [0, 1, 2, 3] for line in record["layers"])
    again = PeftModel.from_pretrained(load_pocket()[0], out)
    assert again.peft_config["default"].num_distinct_experts == 2
    assert "What shrinking costs" in capsys.readouterr().out


def test_recovery_brings_the_shrunk_model_back_and_leaves_the_teacher(folder, tmp_path, capsys):
    out = tmp_path / "small"
    same = folder / "rows.jsonl"  # what is trained on is what is measured: it must come down
    assert run(*shrink(folder, out, "--keep", 2, "--recover", 12, "--learning-rate", 3e-3, "--held-out", same)) == 0
    record = json.loads((out / RECORD_FILE).read_text())
    assert record["recover_steps"] == 12
    assert record["loss_merged"] < record["before_recovery"]["loss_merged"]
    assert record["loss_routed"] == record["before_recovery"]["loss_routed"]
    assert "recovered" in capsys.readouterr().out


def test_the_recovery_loss_is_its_definition():
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(5, 7), torch.randn(5, 7), torch.randint(0, 7, (5,))
    wanted = 0.0
    for s, t, label in zip(student, teacher, labels, strict=True):
        p, q = (t / 2).softmax(-1), (s / 2).softmax(-1)
        wanted += float(-s.softmax(-1)[label].log() + 0.2 * 4 * sum(p[i] * (p[i] / q[i]).log() for i in range(7))) / 5
    assert float(distillation_loss(student, teacher, labels)) == pytest.approx(wanted, rel=1e-5)


def test_recovery_moves_the_student_alone(folder):
    model, tokenizer = load_pocket()
    model = PeftModel.from_pretrained(model, folder / "adapter").eval()
    model.load_adapter(folder / "adapter", "shrunk")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches = batches_of(str(folder / "rows.jsonl"), tokenizer, limit=16)["all"]
    assert len(recover(model, batches, 2, 1e-2)) == 2
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(".shrunk." in name for name in moved)
    assert model.active_adapter == "default"
    with pytest.raises(ValueError, match="`steps` is 0, but must be a whole number"):
        recover(model, batches, 0)
    with pytest.raises(ValueError, match="no text with labels to recover on"):
        recover(model, [], 2)


def test_options_of_the_other_method_are_refused(folder, tmp_path, capsys):
    def said(*more: object) -> str:
        return refusal(capsys, *shrink(folder, tmp_path / "x", *more))

    group = ("--method", "group")
    assert "`--groups` is None, but must be the number of experts that each layer is left with" in said(*group)
    assert "`--keep` is 2, but must be left out with `--method group`" in said(*group, "--groups", 2, "--keep", 2)
    assert "`--groups` is 2, but must be left out with `--method prune`" in said("--keep", 2, "--groups", 2)
    assert "`--similarity` is 'out'" in said(*group, "--groups", 2, "--similarity", "out")
    assert "Did you mean 'lstsq'?" in said(*group, "--groups", 2, "--merge", "lsqst")
    assert "`groups` is 9, but must be at most 4" in said(*group, "--groups", 9)
    assert "`--recover` is -1, but must be a number of steps" in said("--keep", 2, "--recover", -1)
    assert "`--learning-rate` is 0.0, but must be a number above 0" in said("--keep", 2, "--learning-rate", 0)
    assert not (tmp_path / "x").exists()
