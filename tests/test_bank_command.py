"""`moe-peft bank` from a folder of LoRAs to a trained mixture, on the pocket backbone."""

import io
import json
import re

import pytest
import torch
from banks import linears, rewrite_config, write_lora
from rich.console import Console
from safetensors.torch import load_file

from moe_peft import catalogue
from moe_peft.plain_loras import read_lora


pytest.importorskip("trl")
pytest.importorskip("bitsandbytes")

from moe_peft.bank_command import BankOptions, select_from_bank  # noqa: E402
from moe_peft.cli import main as cli_main  # noqa: E402
from moe_peft.training import main as train_main  # noqa: E402
from moe_peft.trial import load_pocket  # noqa: E402


WORDS = ("abc", "de", "fghi", "jk", "lmn", "op")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def given(tmp_path):
    """A bank of five, one of them for another backbone, with shots and open rows."""
    layers = linears(load_pocket(quantize=False)[0], "q_proj", "up_proj")
    for i in range(5):
        write_lora(tmp_path / "bank" / f"l{i}", layers, r=2 + i % 2, seed=i, base="x/weights", scale=0.1)
    rewrite_config(tmp_path / "bank" / "l4", base_model_name_or_path="someone/else")
    shots = write(tmp_path / "shots.jsonl", [{"prompt": f"rev:{w}>", "completion": w[::-1]} for w in WORDS])
    others = [{"prompt": f"rev:{w}{w}>", "completion": (w + w)[::-1]} for w in WORDS]
    more = write(tmp_path / "open.jsonl", [*others, others[0], {"prompt": "1+1>", "completion": "2"}])
    options = BankOptions(
        tmp_path / "bank", shots, tmp_path / "chosen", select=2, candidates=3, open_rows=more, open_limit=4
    )
    return options._replace(skip_unusable=True)


def run(options):
    out = io.StringIO()
    choice = select_from_bank(Console(file=out, width=180), options)
    return choice, out.getvalue()


def test_a_bank_becomes_a_mixture_that_trains(given, tmp_path):
    choice, printed = run(given)
    out = given.output
    assert len(choice.chosen) == 2
    assert f"moe-peft train --adapter {out} --output_dir output/rocket" in printed
    assert "Left out: l4: `base_model_name_or_path` is 'someone/else'" in printed
    for name in choice.chosen:
        assert re.search(rf"chosen +│ {name}", printed)
    found = json.loads((out / "selection.json").read_text())
    assert [folder.rsplit("/", 1)[-1] for folder in found["chosen"]] == choice.chosen
    assert found["scores"].keys() == {"l0", "l1", "l2", "l3"}
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 6 + 4
    source = catalogue.adapter_config(str(out))
    assert (source.config.num_experts, source.config.target_modules) == (2, {"q_proj", "up_proj"})
    assert source.config.r == max(len(p.A) for f in found["chosen"] for p in read_lora(f).pairs.values())
    assert source.recipe["learning_rate"] == catalogue.recipe("rocket")["learning_rate"]

    log = io.StringIO()
    trained = tmp_path / "trained"
    train_main(
        ["--adapter", str(out), "--output_dir", str(trained), "--max_steps", "1", "--learning_rate", "1e-30", "--disable_tqdm",
         "--load_in", "none", "--max_length", "64"],
        Console(file=log, width=180),
    )  # fmt: skip
    assert f"The experts start from {found['chosen'][0]}" in log.getvalue()
    weights = load_file(trained / "adapter_model.safetensors")
    for expert, folder in enumerate(found["chosen"]):
        for module, pair in read_lora(folder).pairs.items():
            key = next(k for k in weights if k.startswith(f"base_model.model.{module}.") and "lora_A" in k)
            A, B = (weights[key.replace("lora_A", f)][expert].double() for f in ("lora_A", "lora_B"))
            torch.testing.assert_close(B.T @ A, (pair.B.T @ pair.A).double(), rtol=1e-4, atol=1e-7)


def test_run_again_it_goes_on_from_the_scores(given, monkeypatch):
    first, _ = run(given)
    lines = (given.output / "scores.jsonl").read_text()

    def fails(*args):
        raise AssertionError("scored again")

    monkeypatch.setattr("moe_peft.bank_scores.perplexity_and_accuracy", fails)
    again, _ = run(given._replace(select=1, open_rows=None))
    assert (given.output / "scores.jsonl").read_text() == lines
    assert again.ranks == first.ranks
    assert len((given.output / "train.jsonl").read_text().splitlines()) == 6
    assert catalogue.adapter_config(str(given.output)).config.top_k == 1


def test_the_command_says_in_one_sentence_what_is_wrong(given, tmp_path, capsys):
    arguments = ["bank", str(given.bank), "--shots", given.shots, "--output", str(given.output), "--load-in", "none"]
    wrong = {
        "l4: `base_model_name_or_path` is 'someone/else'": [],
        "`select` is 0, but must be a whole number of at least 1": ["--select", "0"],
        "`candidates` is 2, but must be at least `select` = 4": ["--candidates", "2"],
        "`select` is 6, but must be a whole number from 1 to 4": ["--select", "6", "--skip-unusable"],
    }
    for message, more in wrong.items():
        with pytest.raises(SystemExit) as leaving:
            cli_main([*arguments, *more])
        assert leaving.value.code == 2
        assert message in capsys.readouterr().err
        assert not (given.output / "selection.json").exists()


def test_an_output_with_other_things_in_it_is_left_alone(given):
    given.output.mkdir()
    (given.output / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"`output` is .*, but must be a new folder, .*This one holds thesis.tex."):
        run(given)


def test_open_rows_are_of_the_shots_kind(given, tmp_path):
    talk = [[{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]]
    more = write(tmp_path / "talk.jsonl", [{"prompt": talk[0], "completion": talk[1]}])
    with pytest.raises(ValueError, match="are of different kinds: one has texts, the other messages"):
        run(given._replace(open_rows=more))


def test_layers_that_only_some_have_are_named_in_full(given):
    from moe_peft.bank_command import _target_modules

    model = load_pocket(quantize=False)[0]
    every = set(linears(model, "q_proj"))
    assert _target_modules(model, every) == ["q_proj"]
    one = {min(every)}
    assert _target_modules(model, one) == sorted(one)
