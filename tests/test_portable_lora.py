"""Plain LoRA folders: the same maps for stock PEFT, vLLM's loader and llama.cpp's, nothing of anybody else's overwritten."""

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from moe_peft import LinearMoeConfig
from moe_peft import portable_lora as module
from moe_peft.plain_lora import lora_factors, save_lora
from moe_peft.portable_lora import Factors, check_may_write, max_lora_rank_flag, portable, write_portable_lora


STOCK = """
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

class Forbidden(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name.partition(".")[0] in ("moe_peft", "moe_peft_vllm") else None

    def exec_module(self, module):
        raise AssertionError(f"{module.__name__} must not be imported here")

sys.meta_path.insert(0, Forbidden())
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
base, adapter, tokens, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    save_file({"logits": model(load_file(tokens)["tokens"]).logits.contiguous()}, out)
assert "moe_peft" not in sys.modules
"""


def factors(*ranks: int, width: int = 6) -> dict[str, Factors]:
    torch.manual_seed(2)
    return {f"layers.{i}.up": Factors(torch.randn(r, width), torch.randn(width + 2, r)) for i, r in enumerate(ranks)}


def test_layers_get_one_rank_and_stay_the_same_maps():
    before, after = factors(2, 5, 3), portable(factors(2, 5, 3))
    assert {f.A.shape[0] for f in after.values()} == {f.B.shape[1] for f in after.values()} == {5}
    for name, f in after.items():
        torch.testing.assert_close(f.B @ f.A, before[name].B @ before[name].A)


def test_a_cut_is_the_nearest_map_of_that_rank():
    before, after = factors(5, 2), portable(factors(5, 2), rank=3)
    U, sigma, Vh = torch.linalg.svd((before["layers.0.up"].B @ before["layers.0.up"].A).double())
    torch.testing.assert_close(
        after["layers.0.up"].B @ after["layers.0.up"].A,
        ((U[:, :3] * sigma[:3]) @ Vh[:3]).float(),
        rtol=1e-5,
        atol=1e-5,
    )
    torch.testing.assert_close(
        after["layers.1.up"].B @ after["layers.1.up"].A, before["layers.1.up"].B @ before["layers.1.up"].A
    )
    assert after["layers.1.up"].A.shape[0] == 3


@pytest.mark.parametrize(("r", "flag"), [(1, ""), (16, ""), (17, 32), (64, 64), (129, 256), (300, 320), (512, 512)])
def test_the_flag_of_vllm(r, flag):
    assert max_lora_rank_flag(r) == (f"--max-lora-rank {flag}" if flag else "")


def test_what_is_written_leaves_nothing_to_be_read_differently(tmp_path):
    write_portable_lora(factors(2, 20), tmp_path / "a", "base", also={"note.txt": "hello"})
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["bias"]) == (20, 20, False, "none")
    assert (config["rank_pattern"], config["alpha_pattern"], config["modules_to_save"]) == ({}, {}, None)
    assert config["init_lora_weights"] is True
    assert not config["use_dora"]
    keys = {f"base_model.model.layers.{i}.up.lora_{part}.weight" for i in (0, 1) for part in "AB"}
    assert set(load_file(tmp_path / "a/adapter_model.safetensors")) == keys
    record = json.loads((tmp_path / "a/moe_peft_export.json").read_text())
    assert record["vllm_flag"] == "--max-lora-rank 32"
    assert record["ranks"] == {"layers.0.up": 2, "layers.1.up": 20}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").iterdir()} == {0o644}
    assert record["files"] == module.hashes(tmp_path / "a")
    write_portable_lora(factors(2), tmp_path / "b", None, sources={"law": tmp_path / "a"})
    sources = json.loads((tmp_path / "b/moe_peft_export.json").read_text())["sources"]
    assert sources == {"law": record["files"]}


def test_its_own_adapter_is_replaced_and_nobody_elses(tmp_path):
    folder = tmp_path / "lora"
    write_portable_lora(factors(2), folder, None)
    (folder / "thesis.txt").write_text("years of work")
    write_portable_lora(factors(3), folder, None)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3
    assert (folder / "thesis.txt").exists()
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 3', '"lora_alpha": 6'))
    with pytest.raises(ValueError, match=r"this one was changed since.*name another folder"):
        write_portable_lora(factors(2), folder, None)
    assert json.loads(config.read_text())["lora_alpha"] == 6
    routed = tmp_path / "routed"
    get_peft_model(make_tiny_llama(layers=1), LinearMoeConfig(target_modules=["q_proj"])).save_pretrained(str(routed))
    before = (routed / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"`output` is .*holds adapter_config.json and adapter_model.safetensors"):
        write_portable_lora(factors(2), routed, None)
    assert (routed / "adapter_model.safetensors").read_bytes() == before
    (routed / "moe_peft_export.json").write_text("[]")
    with pytest.raises(ValueError, match="was changed since, or is another's"):
        check_may_write(routed)
    with pytest.raises(ValueError, match="must be a folder"):
        write_portable_lora(factors(2), config, None)


def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch):
    write_portable_lora(factors(2), tmp_path, None)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fails(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(module, "save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        write_portable_lora(factors(4), tmp_path, None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("bad", "rank", "message"),
    [
        ({}, None, "There is no layer"),
        (factors(600, width=600), None, "`rank` is 600, but must be at most 512.*singular values.*dense"),
        (factors(2), 0, "`rank` is 0, but must be a whole number of at least 1"),
        ({"x": Factors(torch.ones(2, 4), torch.ones(4, 3))}, None, "factors of 'x' do not fit each other"),
        ({"x": Factors(torch.ones(2, 4), torch.full((4, 2), float("nan")))}, None, "'x' are not finite"),
    ],
)
def test_refused_before_a_folder_is_made(tmp_path, bad, rank, message):
    with pytest.raises(ValueError, match=message):
        write_portable_lora(bad, tmp_path / "new", None, rank=rank)
    assert not (tmp_path / "new").exists()


def exact_lora(folder: Path, base_folder: Path | None = None) -> torch.nn.Module:
    """A mixture with one expert and two shared ones per layer, rsLoRA, written as a plain LoRA; the model itself."""
    base = make_tiny_llama(layers=2)
    if base_folder is not None:
        base.save_pretrained(base_folder)
    settings = {"num_experts": 1, "num_shared_experts": 2, "r": "2:7", "use_rslora": True, "init_weights": False}
    torch.manual_seed(4)
    model = get_peft_model(base, LinearMoeConfig(target_modules="all-linear", **settings)).eval()
    save_lora(model, folder)
    return model


def test_stock_peft_gives_equal_logits_without_this_package(tmp_path, tokens):
    from safetensors.torch import save_file

    model = exact_lora(tmp_path / "lora", tmp_path / "base")
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    arguments = [tmp_path / name for name in ("base", "lora", "tokens.safetensors", "logits.safetensors")]
    done = subprocess.run([sys.executable, "-c", STOCK, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        want = model(tokens).logits
        with model.disable_adapter():
            assert (model(tokens).logits - want).abs().max() > 1e-2
    torch.testing.assert_close(load_file(tmp_path / "logits.safetensors")["logits"], want, rtol=1e-5, atol=1e-5)


def test_every_lora_of_this_package_goes_through_here(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("moe_peft.merge.write_portable_lora", lambda *a, **k: calls.append(a) or LoraConfig())
    exact_lora(tmp_path / "lora")
    assert len(calls) == 1
    text = {path.name for path in Path(module.__file__).parent.rglob("*.py") if "LoraConfig(\n" in path.read_text()}
    assert text == {"portable_lora.py"}
    assert {f.A.shape[0] for f in lora_factors(exact_lora(tmp_path / "lora")).values()} == {6, 21}
