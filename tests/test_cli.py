"""The command `moe-peft`: what it prints, and one sentence and code 2 for whatever a user can set right."""

import json
import runpy
import sys
from importlib.metadata import PackageNotFoundError

import pytest
from families import make_family

from moe_peft import cli, rival
from moe_peft.catalogue import methods


def left_with(capsys, *argv):
    """Run the command; returns its exit code, and what it printed to out and err."""
    with pytest.raises(SystemExit) as leaving:
        cli.main(list(argv))
    captured = capsys.readouterr()
    return leaving.value.code, captured.out, captured.err


def test_methods_lists_the_catalogue(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = left_with(capsys, "methods")
    assert code == 0
    for word in (*methods(), "LINEAR_MOE", "2:4:6:8", "softmax_top_k, top 2", "localized"):
        assert word in out


def test_a_narrow_terminal_gets_what_a_reader_chooses_by(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = left_with(capsys, "methods", "mola")
    assert (code, "balance" in out, "more experts higher up" in " ".join(out.split())) == (0, False, True)


def test_methods_compares_sizes_on_a_backbone(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    make_family("gpt2").config.save_pretrained(tmp_path)
    code, out, _ = left_with(capsys, "methods", "task-moe", "hydralora", "--compare", "--model", str(tmp_path))
    assert code == 0
    one = 2 * (32 + 96 + 32 + 32 + 32 + 64 + 64 + 32)  # rank 1 on every linear of both layers
    assert f"{40 * one:,}" in out
    assert f"r = 40: {40 * one:,}" in out
    assert "does not fit: " in out
    assert "mola" not in out


@pytest.mark.parametrize("argv", [["--help"], ["demo", "--help"]])
def test_help(capsys, argv):
    code, out, _ = left_with(capsys, *argv)
    assert code == 0
    assert "Usage: moe-peft" in out


def test_help_of_train_is_short_unless_all_is_asked_for(capsys):
    pytest.importorskip("trl")
    code, out, _ = left_with(capsys, "train", "--help")
    assert code == 0
    assert "--adapter" in out
    assert "--adam_beta1" not in out
    code, out, _ = left_with(capsys, "train", "--help_all")
    assert code == 0
    assert "--adam_beta1" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "`moe-peft trian` is not a command. Did you mean 'train'?"),
        (["xyz"], "`moe-peft xyz` is not a command. Choose one of: "),
        (["methods", "--quick"], "No such option: --quick"),
        (["methods", "moola"], "'moola' is not in the catalogue. Did you mean 'mola'?"),
        (["methods", "moola", "--compare"], "'moola' is not in the catalogue. Did you mean 'mola'?"),
        (["methods", "--model", "x"], "`--model` is 'x', but there is nothing to count. Give `--compare` as well."),
        (["methods", "--compare", "--model", "./no"], "`--model` is './no', but must be a folder with a config.json"),
        (["demo", "--steps", "many"], "Invalid value for '--steps':"),
        (["train", "--adaptr", "mola"], "`--adaptr` is not an option. Did you mean 'adapter'?"),
        (["train", "--adapter", "moola"], "'moola' is neither in the catalogue nor a folder. Did you mean 'mola'?"),
        (["train", "--dataset", "no.jsonl"], "There is no file or folder 'no.jsonl'"),
        (["train"], "`--dataset` is missing"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(capsys, argv, message):
    if argv[0] == "train":
        pytest.importorskip("trl")
    code, _, err = left_with(capsys, *argv)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(capsys):
    with pytest.raises(ValueError, match="is not a command"):
        cli.main(["--debug", "trian"])


def test_errors_that_may_be_ours_name_the_way_to_the_traceback(capsys, monkeypatch):
    def broken():
        raise RuntimeError("out of memory [cuda:0]")

    monkeypatch.setattr("moe_peft.catalogue.methods", broken)
    code, _, err = left_with(capsys, "methods")
    assert (code, err.splitlines()) == (
        2,
        ["out of memory [cuda:0]", "`moe-peft --debug ...` shows where this comes from."],
    )

    def bug():
        raise KeyError("x")

    monkeypatch.setattr("moe_peft.catalogue.methods", bug)
    with pytest.raises(KeyError):
        cli.main(["methods"])


def test_an_interruption_says_how_to_go_on(capsys, monkeypatch):
    training = pytest.importorskip("moe_peft.training")

    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "main", interrupted)
    code, _, err = left_with(capsys, "train")
    assert code == 130
    assert "`--resume_from_checkpoint` goes on from the last checkpoint" in err


def test_training_without_trl_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "moe_peft.training", raising=False)
    monkeypatch.delitem(sys.modules, "moe_peft.arguments", raising=False)
    code, _, err = left_with(capsys, "train")
    assert code == 2
    assert "Training needs trl: pip install trl datasets bitsandbytes" in err


def test_python_m_is_the_same_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moe_peft", "trian"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_module("moe_peft", run_name="__main__")
    assert leaving.value.code == 2
    assert "`moe-peft trian` is not a command. Did you mean 'train'?" in capsys.readouterr().err


def test_the_rivals_distribution_is_refused(monkeypatch):
    def found(name):
        assert name == "moe-peft"
        return type("Distribution", (), {"version": "2.0.2"})

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(rival, "distribution", found)
    with pytest.raises(
        ImportError, match=r"also has the distribution 'moe-peft' 2.0.2, another project .*pip uninstall"
    ):
        rival.refuse_rival()
    monkeypatch.setattr(rival, "distribution", missing)
    rival.refuse_rival()


def test_the_catalogues_entries_are_plain_json():
    from moe_peft.catalogue import entry_folder

    for name in methods():
        json.loads((entry_folder(name) / "adapter_config.json").read_text())
