"""What the README and the cards say can be typed, can be typed; what they point to is there."""

import re
from pathlib import Path

import pytest

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


def test_the_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:\n|`)make (\w+)", (ROOT / "README.md").read_text()):
        assert f"\n{target}:" in makefile
