"""`moe-peft bundle`: one folder with everything, a record of what it is, and a sentence for each way to get it wrong."""

import json
import os
import shutil

import pytest
import torch
from families import make_family
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_peft import FfnMoeConfig, LinearMoeConfig, RankMoeConfig, ShardPoolConfig, cli
from moe_peft.backbone import keep_trainable, load_backbone
from moe_peft.loaded import load_adapter
from moe_peft.merging.writing import write_record
from moe_peft.pocket import POCKET_DIR
from moe_peft.saving import save_adapter
from moe_peft.serving.bundle import RECORD_FILE, open_bundle, write_bundle
from moe_peft.trial import load_pocket


KINDS = {
    "linear": LinearMoeConfig(num_experts=3, r=2, lora_alpha=64, init_weights=False, task_type="CAUSAL_LM"),
    "ffn": FfnMoeConfig(num_experts=3, r=2, lora_alpha=32, init_weights=False, task_type="CAUSAL_LM"),
    "rank": RankMoeConfig(init_weights=False, task_type="CAUSAL_LM"),
    "shards": ShardPoolConfig(init_weights=False, task_type="CAUSAL_LM"),
    "lora": LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM"),
}


def make_adapter(folder, kind="linear"):
    torch.manual_seed(0)
    model, _ = load_pocket(quantize=False)
    save_adapter(get_peft_model(model, KINDS[kind]), folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("linear") / "adapter")


@pytest.fixture
def bundle(adapter, tmp_path):
    return write_bundle(str(adapter), tmp_path / "bundle").folder


def test_a_merge_that_was_changed_since_is_not_bundled(tmp_path):
    folder = make_adapter(tmp_path / "adapter", "lora")
    write_record(folder, {"method": "ls"})
    write_bundle(str(folder), tmp_path / "as_it_was")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="`adapter_model.safetensors` of .* was changed after its record was written"):
        write_bundle(str(folder), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("load_in", ["none", "4bit"])
def test_a_bundle_computes_what_the_adapter_does_on_its_base(kind, load_in, tmp_path):
    folder = make_adapter(tmp_path / "adapter", kind)
    bundle = write_bundle(str(folder), tmp_path / "bundle", load_in=load_in).folder
    tokens = torch.randint(4, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    wanted = load_adapter(str(folder), load_in=load_in)[0]
    as_one_model = keep_trainable(AutoModelForCausalLM.from_pretrained(bundle)).eval()
    in_two_steps = PeftModel.from_pretrained(
        load_backbone(str(bundle), "none", "cpu", adapter_kwargs={"subfolder": "none"}), bundle
    )
    with torch.no_grad():
        logits = wanted(tokens).logits
        torch.testing.assert_close(as_one_model(tokens).logits, logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(in_two_steps.eval()(tokens).logits, logits)
        with wanted.disable_adapter():
            assert not torch.allclose(wanted(tokens).logits, logits)


def test_weights_are_linked_and_everything_is_recorded(adapter, bundle):
    assert os.path.samefile(bundle / "model.safetensors", POCKET_DIR / "model.safetensors")
    record = json.loads((bundle / RECORD_FILE).read_text())
    recorded = {name for part in ("base", "adapter", "others") for name in record[f"{part}_sha256"]}
    assert recorded == {path.name for path in bundle.iterdir()} - {RECORD_FILE}
    assert {"chat_template.jinja", "generation_config.json", "tokenizer.json", "adapter_config.json"} <= recorded
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (bundle / name).read_bytes() == (adapter / name).read_bytes()


def test_copies_on_request_and_where_links_are_not_possible(adapter, tmp_path, monkeypatch):
    weights = POCKET_DIR / "model.safetensors"
    copied = write_bundle(str(adapter), tmp_path / "copied", copy=True).folder
    assert not os.path.samefile(copied / weights.name, weights)

    def other_disk(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    copied = write_bundle(str(adapter), tmp_path / "elsewhere").folder
    assert (copied / weights.name).read_bytes() == weights.read_bytes()


def test_auto_stores_the_base_as_it_was_trained_on(adapter, tmp_path):
    logged = shutil.copytree(adapter, tmp_path / "adapter")
    (logged / "training_log.json").write_text(json.dumps({"settings": {"adapter": "molora"}}))
    record = write_bundle(str(logged), tmp_path / "bundle").record
    assert record["load_in"] == "4bit"
    assert "quantization_config" in json.loads((tmp_path / "bundle" / "config.json").read_text())


def test_the_base_must_be_the_one_it_was_trained_on(adapter, tmp_path):
    logged = shutil.copytree(adapter, tmp_path / "adapter")
    log = {"settings": {"load_in": "none"}, "base_sha256": {"model.safetensors": "0" * 64}}
    (logged / "training_log.json").write_text(json.dumps(log))
    with pytest.raises(
        ValueError, match=r"is not the base that the adapter was trained on: by its hash, model.safetensors"
    ):
        write_bundle(str(logged), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    log["base_sha256"] = write_bundle(str(logged), tmp_path / "bundle", any_base=True).record["base_source_sha256"]
    (logged / "training_log.json").write_text(json.dumps(log))
    write_bundle(str(logged), tmp_path / "again")


def test_a_base_of_another_shape_is_refused_before_anything_is_written(adapter, tmp_path):
    other = make_family("llama")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="The adapter does not fit '.*other'"):
        write_bundle(str(adapter), tmp_path / "bundle", model=str(tmp_path / "other"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


def test_what_cannot_be_bundled(adapter, bundle, tmp_path):
    with pytest.raises(
        ValueError, match="`output` is '.*', but must be a new or empty folder. Nothing is overwritten"
    ):
        write_bundle(str(adapter), bundle)
    with pytest.raises(
        ValueError, match="`load_in` is '4bits', but must be 'auto', '4bit', '8bit' or 'none'. Did you"
    ):
        write_bundle(str(adapter), tmp_path / "new", load_in="4bits")
    with pytest.raises(ValueError, match="holds no adapter: there is no adapter_config.json"):
        write_bundle(str(tmp_path), tmp_path / "new")
    empty = shutil.copytree(adapter, tmp_path / "empty")
    (empty / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no adapter: there is no adapter_model.safetensors"):
        write_bundle(str(empty), tmp_path / "new")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(POCKET_DIR / name, bare / name)
    with pytest.raises(ValueError, match="has a tokenizer that can be loaded. Copy the tokenizer's files"):
        write_bundle(str(adapter), tmp_path / "new", model=str(bare))
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_changed_bundle_is_not_opened(bundle):
    open_bundle(bundle)
    tensors = load_file(bundle / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1e-3
    kept = (bundle / "adapter_model.safetensors").read_bytes()
    save_file(tensors, bundle / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapter_model.safetensors` was changed after its record was written"):
        open_bundle(bundle)
    (bundle / "adapter_model.safetensors").write_bytes(kept)
    open_bundle(bundle)

    base = load_file(bundle / "model.safetensors")
    (bundle / "model.safetensors").unlink()  # a link: the original stays as it is
    save_file({key: tensor * 1.001 for key, tensor in base.items()}, bundle / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="is not the base model's that was bundled"):
        open_bundle(bundle)
    (bundle / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks 'model.safetensors', which its record names"):
        open_bundle(bundle)


def test_a_changed_chat_template_is_not_opened(bundle):
    with (bundle / "chat_template.jinja").open("a") as file:
        file.write("!")
    with pytest.raises(ValueError, match="chat_template.jinja` was changed .* prompts would be read otherwise"):
        open_bundle(bundle)


def test_what_is_no_bundle(adapter, bundle, tmp_path):
    with pytest.raises(ValueError, match="There is no folder '.*no'. Give one that `moe-peft bundle` wrote"):
        open_bundle(tmp_path / "no")
    with pytest.raises(
        ValueError, match="It holds an adapter alone. Make one with `moe-peft bundle .*adapter --output"
    ):
        open_bundle(adapter)
    with pytest.raises(ValueError, match=f"is no bundle: there is no {RECORD_FILE}"):
        open_bundle(POCKET_DIR)
    for broken in ("{", '{"adapter_sha256": {}}'):
        (bundle / RECORD_FILE).write_text(broken)
        with pytest.raises(ValueError, match="cannot be read .* Bundle the adapter anew"):
            open_bundle(bundle)


def test_the_command(adapter, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bundle", str(adapter), "--output", str(tmp_path / "bundle")])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"moe-peft serve {tmp_path / 'bundle'}" in out
    open_bundle(tmp_path / "bundle")
    for argv, message in (
        ([str(adapter)], "Missing option '--output'"),
        ([str(adapter), "--outptu", "x"], "No such option: --outptu"),
        ([str(adapter), "--output", str(tmp_path / "bundle")], "but must be a new or empty folder"),
        ([str(adapter), "--output", str(tmp_path / "new"), "--load-in", "5bit"], "`load_in` is '5bit'"),
        ([str(adapter), "--output", str(tmp_path / "new"), "--model", "./no"], "There is no model folder './no'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["bundle", *argv])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
