"""What the README and the cards say can be typed, can be typed; what they point to is there."""

import re
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama
from peft import LoraConfig, get_peft_model

import moe_peft
from moe_peft import cli
from moe_peft.arguments import _names, make_parser


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "adapters").glob("**/README.md"))]


def commands() -> list[str]:
    text = "\n".join(page.read_text() for page in PAGES)
    return sorted({line.split("#")[0].strip() for line in re.findall(r"^moe-peft [^\n]*", text, flags=re.MULTILINE)})


@pytest.mark.parametrize("command", commands())
def test_every_command_and_option_exists(command, capsys):
    words = command.split()
    options = [word.removeprefix("--") for word in words if word.startswith("--")]
    if words[1] == "train":
        assert set(options) <= set(_names(make_parser("moe-peft train")))
        return
    with pytest.raises(SystemExit) as leaving:
        cli.main([words[1], "--help"])
    assert not leaving.value.code
    shown = capsys.readouterr().out
    assert all(f"--{option}" in shown for option in options)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_every_file_that_is_named_is_there(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    paths = re.findall(r"`((?:tests|eval|train_scripts|adapters)/[\w./-]+)`", text)
    # The benchmark's table is written by the command that stands beside it.
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_the_python_lines_of_the_readme_hold():
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert block is not None
    lines = [line for line in block.group(1).splitlines() if line.strip()]

    namespace: dict = {}
    exec("\n".join(line for line in lines if line.startswith(("import", "config"))), namespace)
    assert isinstance(namespace["config"], moe_peft.LinearMoeConfig)


def test_the_lines_on_domains_run(tmp_path, monkeypatch):
    """With a tiny base in the place of the reader's, and LoRAs where the lines look for them."""
    text = (ROOT / "README.md").read_text()
    block = next(b for b in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "from_loras" in b)
    monkeypatch.chdir(tmp_path)
    for name in ("law", "code"):
        config = LoraConfig(target_modules=["up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(make_tiny_llama(), config).save_pretrained(f"loras/{name}")
    ids = torch.arange(1, 9)[None]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    base = make_tiny_llama()
    base.generation_config.max_new_tokens = 2
    known = {"base": base, "law_batches": batches, "code_batches": batches, "inputs": batches[0], "moe_peft": moe_peft}
    exec(block, known)
    assert list(known["model"].peft_config["default"].domains) == ["law", "code"]


def test_the_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:\n|`)make (\w+)", (ROOT / "README.md").read_text()):
        assert f"\n{target}:" in makefile
