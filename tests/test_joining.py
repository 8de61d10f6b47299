"""`moe-peft join`: ready LoRAs become one adapter that computes each of them, and a mistake leaves nothing behind."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from moe_peft import cli
from moe_peft.merge import routed_layers
from moe_peft.prototypes import gate_of_model
from moe_peft.trial import load_pocket


PROMPTS = {"law": "the court rules that", "code": "def f(x): return", "none": "0123456789 0123456789"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("join")
    for seed, name in enumerate(("law", "code")):
        torch.manual_seed(seed)
        config = LoraConfig(r=2 + seed, lora_alpha=16, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        get_peft_model(load_pocket(quantize=False)[0], config).save_pretrained(root / name)
    rows = [
        {"prompt": f"{PROMPTS[name]} {n}", "completion": " x", "domain": name}
        for n in range(8)
        for name in ("law", "code")
    ]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    strange = [{"prompt": f"{PROMPTS['none']} {n}", "completion": " x"} for n in range(8)]
    (root / "strange.jsonl").write_text("\n".join(map(json.dumps, strange)))
    return root


def join(capsys, folder, output, *more: object) -> tuple[int, str]:
    arguments = [
        "join",
        f"law={folder / 'law'}",
        f"code={folder / 'code'}",
        "--output",
        output,
        "--model",
        "pocket",
        *more,
    ]
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return stopped.value.code or 0, " ".join((said.out + said.err).split())


def logits(model, text, **kwargs):
    _, tokenizer = load_pocket(quantize=False)
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt"), **kwargs).logits


def alone(folder, name):
    return PeftModel.from_pretrained(load_pocket(quantize=False)[0], folder / name).eval()


def test_each_domain_gets_its_own_lora_and_strange_prompts_the_base_model(folder, tmp_path, capsys):
    data = ("--data", folder / "rows.jsonl", "--unknown", folder / "strange.jsonl")
    code, said = join(capsys, folder, tmp_path / "out", *data)
    assert code == 0, said
    assert "of the known ones 100% stay, of the unknown ones 100% are turned away" in said
    assert "│ law │ 2 │ 100% │ │ code │ 3 │ 100% │" in said
    joined = PeftModel.from_pretrained(load_pocket(quantize=False)[0], tmp_path / "out").eval()
    assert joined.peft_config["default"].domains == ["law", "code"]
    assert (tmp_path / "out" / "README.md").is_file()
    for name in ("law", "code"):
        torch.testing.assert_close(
            logits(joined, PROMPTS[name]), logits(alone(folder, name), PROMPTS[name]), rtol=1e-4, atol=1e-4
        )
    base = load_pocket(quantize=False)[0]
    torch.testing.assert_close(logits(joined, PROMPTS["none"]), logits(base, PROMPTS["none"]), rtol=1e-4, atol=1e-4)


def test_prototypes_are_made_of_three_quarters_of_the_rows(folder, tmp_path, capsys):
    assert join(capsys, folder, tmp_path / "out", "--data", folder / "rows.jsonl")[0] == 0
    joined = PeftModel.from_pretrained(load_pocket(quantize=False)[0], tmp_path / "out")
    _, tokenizer = load_pocket(quantize=False)
    embed, found = joined.get_input_embeddings(), gate_of_model(joined).router
    mean = {}
    for name in ("law", "code"):
        prompts = [tokenizer(f"{PROMPTS[name]} {n}", return_tensors="pt")["input_ids"] for n in range(8)]
        mean[name] = torch.stack([embed(ids)[0].mean(0) for ids in prompts])
    for number, name in enumerate(("law", "code")):  # a mean of six of these eight
        six = torch.combinations(torch.arange(8), 6)
        distances = (mean[name][six].mean(1) - found[number].float()).abs().amax(1)
        assert float(distances.min()) < 1e-4
        assert float((mean[name].mean(0) - found[number].float()).abs().max()) > 1e-4


def test_arrow_and_given_need_no_text(folder, tmp_path, capsys):
    for gate in ("arrow", "given"):
        code, said = join(capsys, folder, tmp_path / gate, "--gate", gate)
        assert code == 0, said
        joined = PeftModel.from_pretrained(load_pocket(quantize=False)[0], tmp_path / gate).eval()
        assert joined.peft_config["default"].gate == gate
        assert len(routed_layers(joined)) == 8
    types = torch.tensor([1])
    torch.testing.assert_close(
        logits(joined, PROMPTS["law"], task_types=types),
        logits(alone(folder, "code"), PROMPTS["law"]),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            ["--gate", "token"],
            "`--gate` is 'token', but must be one of 'prototype', 'arrow', 'given'. That one learns",
        ),
        (["--gate", "prototypes"], "Did you mean 'prototype'?"),
        ([], "`--data` is None, but must be rows with a column of domains"),
        (["--gate", "arrow", "--unknown", "x.jsonl"], "`--unknown` is 'x.jsonl', but must be left out without"),
        (["art"], "`loras` is 'art', but must be a name and a folder, as law=loras/law"),
        (["law=elsewhere"], "`loras` is 'law=elsewhere', but must be of another name"),
        (["--data", "ROWS", "--by", "prompt"], "but must be names of the LoRAs: 'law', 'code'"),
        (["--data", "ROWS", "--by", "topic"], "have no `topic`"),
    ],
    ids=str,
)
def test_what_cannot_be_joined_gets_a_sentence_and_nothing_is_written(folder, tmp_path, capsys, more, sentence):
    more = [str(folder / "rows.jsonl") if entry == "ROWS" else entry for entry in more]
    code, said = join(capsys, folder, tmp_path / "out", *more)
    assert code == 2
    assert sentence in said
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(folder, capsys):
    code, said = join(capsys, folder, folder / "law", "--gate", "given")
    assert code == 2
    assert "must be a new or empty folder" in said
