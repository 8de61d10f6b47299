"""The card: a section for whatever is known, nothing where nothing is known, and every word of a user's kept."""

import json

import pytest
import torch
from conftest import make_tiny_llama
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model

from moe_peft import LinearMoeConfig, cli
from moe_peft.card import SECTIONS, describe_adapter, routers_section, sections_of, update_card, with_sections
from moe_peft.pocket import make_suite
from moe_peft.saving import save_adapter


MINE = "## What I think\n\nIt answers well, see <b>below</b>."


def adapted(**settings) -> PeftModel:
    torch.manual_seed(0)
    given = {"num_experts": 4, "r": 2, "target_modules": ["up_proj"], "task_type": "CAUSAL_LM", **settings}
    return get_peft_model(make_tiny_llama(layers=2), LinearMoeConfig(**given))


def card(folder) -> str:
    return (folder / "README.md").read_text()


def test_sections_are_put_in_order_and_replaced_in_place():
    text = with_sections("Mine.\n", {"merge": "M1", "title": "T1"})
    assert text.index("T1") < text.index("M1") < text.index("Mine.")
    text = text.replace("<!-- /moe_peft: title -->", "<!-- /moe_peft: title -->\n\nBetween.")
    again = with_sections(text, {"merge": "M2", "method": "X", "settings": ""})
    assert "M1" not in again
    assert [again.index(part) for part in ("T1", "X", "Between.", "M2", "Mine.")] == sorted(
        again.index(part) for part in ("T1", "X", "Between.", "M2", "Mine.")
    )
    assert with_sections(again, {"merge": "M2", "method": "X"}) == again
    assert "settings" not in again


def test_a_lonely_mark_before_a_section_takes_no_text_with_it():
    block = with_sections("", {"method": "A"})
    text = with_sections(f"<!-- moe_peft: method (x) -->\n{MINE}\n{block}", {"method": "B"})
    assert MINE in text
    assert "B" in text.replace(MINE, "")


@pytest.mark.parametrize("lost", ["<!-- /moe_peft: method -->", "<!-- moe_peft: method ("])
def test_a_mark_that_somebody_removed_takes_no_text_with_it(lost):
    text = with_sections("", {"method": "A", "merge": "B"}).replace(lost, MINE, 1)
    for step in range(3):
        text = with_sections(text, {"method": f"new {step}", "merge": "B"})
        assert MINE in text
    assert text.count("new 2") == 1
    assert "new 1" not in text


def test_saving_keeps_what_peft_and_a_user_wrote(tmp_path):
    model, folder = adapted(), tmp_path / "mine"
    save_adapter(model, folder)
    first = card(folder)
    assert "LINEAR_MOE, 4 experts of rank 2" in first
    assert "### Framework versions" in first  # PEFT's
    found = ModelCard.load(folder / "README.md")
    assert found.data["library_name"] == "peft"
    assert {"mixture-of-lora-experts"} <= set(found.data["tags"])
    (folder / "README.md").write_text(first.replace("\n---\n", "\nlicense: mit\n---\n" + MINE + "\n", 1) + "\n" + MINE)
    model.peft_config["default"].num_experts = 3
    save_adapter(model, folder)
    second = card(folder)
    assert second.count(MINE) == 2
    assert "3 experts of rank 2" in second
    assert "4 experts of rank 2" not in second
    assert ModelCard.load(folder / "README.md").data["license"] == "mit"
    save_adapter(model, folder)
    assert card(folder) == second


def test_a_card_with_broken_metadata_stops_no_save_and_is_kept(tmp_path):
    broken = "---\ntags: [a\n---\n" + MINE
    (tmp_path / "README.md").write_text(broken)
    with pytest.warns(UserWarning, match=r"metadata of .* cannot be read .* kept as"):
        save_adapter(adapted(), tmp_path)
    assert (tmp_path / "README.before.md").read_text() == broken
    assert (tmp_path / "adapter_model.safetensors").is_file()
    (tmp_path / "README.md").write_text(broken)
    with pytest.warns(UserWarning, match="was left as it is: its metadata cannot be read"):
        update_card(tmp_path, {"method": "X"})
    assert card(tmp_path) == broken


def test_nothing_is_said_of_what_is_not_known(tmp_path):
    save_adapter(adapted(), tmp_path / "fresh")
    assert set(sections_of(tmp_path / "fresh")) == {"title", "method", "parameters"}
    model = adapted()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    save_adapter(model, tmp_path / "frozen")
    assert set(sections_of(tmp_path / "frozen")) == {"title", "method"}
    assert sections_of(tmp_path) == {}
    lora = get_peft_model(make_tiny_llama(layers=2), LoraConfig(r=2, target_modules=["up_proj"]))
    save_adapter(lora, tmp_path / "lora")
    assert "import moe_peft" not in card(tmp_path / "lora")


def test_parameters_stand_beside_the_lora_of_the_same_size(tmp_path):
    save_adapter(adapted(), tmp_path)
    said = sections_of(tmp_path)["parameters"]
    trained = 2 * (4 * 2 * (64 + 96) + 4 * 64)
    assert f"| trained | {trained:,} | r = {round(trained / (2 * (64 + 96)))} |" in said
    assert f"| of them in routers | {2 * 4 * 64:,} |" in said


def test_a_card_that_cannot_be_made_stops_no_save(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_peft.card.title_section", lambda *args: 1 / 0)
    with pytest.warns(UserWarning, match="The card of .* was not written: ZeroDivisionError"):
        describe_adapter(adapted(), tmp_path, "x")
    assert not (tmp_path / "README.md").exists()


def test_router_health_is_the_reports():
    health = {"load": [0.5, 0.5], "entropy": 0.25, "max_load": 1.5, "dead": 1, "domain_information": 0.125}
    said = routers_section({"domains": ["a", "b"], "layers": {"model.layers.0.up_proj": {**health, "counts": []}}})
    assert "| `model.layers.0.up_proj` | 1.50 | 0.25 | 1 | 12% |" in said
    assert routers_section({"domains": [], "layers": {}}) == ""


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    return stopped.value.code or 0


def test_train_inspect_and_merge_leave_a_card_with_every_section(tmp_path):
    rows = [{k: row[k] for k in ("prompt", "completion")} for row in make_suite("fact8tag", 0, num_people=8).test[:64]]
    data, out, merged = tmp_path / "rows.jsonl", tmp_path / "out", tmp_path / "merged"
    data.write_text("\n".join(map(json.dumps, rows)))
    train = ("train", "--adapter", "molora", "--model", "pocket", "--dataset", data, "--output_dir", out)
    quick = ("--max_steps", 1, "--save_steps", 1, "--report_to", "none", "--set", "num_experts=2", "--set", "r=1")
    assert run(*train, *quick) == 0
    assert set(sections_of(out)) == {"title", "method", "data", "settings", "parameters"}
    (out / "README.md").write_text(card(out) + "\n" + MINE)
    assert run("inspect", out, "--data", data, "--output", tmp_path / "report") == 0
    assert run("merge", out, "--calibration", data, "--output", merged) == 0
    assert set(sections_of(out)) == set(SECTIONS[:6])
    assert set(sections_of(merged)) == {"title", "method", "data", "settings", "merge", "export"}
    assert "as a plain LoRA" in sections_of(merged)["title"]
    assert "Made from LINEAR_MOE, 2 experts" in sections_of(merged)["method"]
    assert "One plain PEFT LoRA of rank" in sections_of(merged)["export"]
    record = json.loads((merged / "moe_peft_merge.json").read_text())
    found = record["models"]["merged"]
    assert f"| merged | {found['loss']:.3f} | {found['kl']:.4f} |" in card(merged)
    assert "import moe_peft" not in card(merged)
    assert str(data) in sections_of(merged)["data"]
    assert MINE not in card(merged)
    small = tmp_path / "small"
    shrink = ("shrink", out, "--calibration", data, "--method", "group", "--groups", 1, "--output", small)
    assert run(*shrink) == 0
    assert set(sections_of(small)) == {"title", "method", "data", "settings", "shrink"}
    # A run that goes on in the same folder, whose checkpoints write TRL's card there: the user's words stay.
    assert run(*train, *quick, "--resume_from_checkpoint", "true", "--max_steps", 2) == 0
    assert card(out).count(MINE) == 1
    assert "routers" in sections_of(out)
