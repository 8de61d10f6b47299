"""DMoERM from pairs to a reward model: TRL's own trainer in every stage, and two experts together beat either alone."""

import json
import random
import re
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from test_reward_fusion import CATEGORIES, classifier, experts  # noqa: E402

from moe_peft.backbone import load_tokenizer  # noqa: E402
from moe_peft.pocket import POCKET_DIR  # noqa: E402
from moe_peft.reward_fusion import RewardFusionModel, fuse, load_classifier  # noqa: E402
from moe_peft.reward_router import fit_router, padded  # noqa: E402


ROOT = Path(__file__).parent.parent
QUIET = {"use_cpu": not torch.cuda.is_available(), "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
         "gradient_checkpointing": False}  # fmt: skip


# ----- Two capabilities that pull against each other -----


def answer(rng):
    """Token ids: 10 to 19 are kind words, 20 to 29 are not; 2 ends it."""
    return [
        rng.choice(range(10, 20)) if rng.random() < 0.5 else rng.choice(range(20, 30))
        for _ in range(rng.randint(3, 9))
    ]


def kind(ids):
    return sum(i < 20 for i in ids)


def brief(ids):
    return -len(ids)


def whole(ids):
    return 3 * kind(ids) + 2 * brief(ids)


def pairs(judge, number, seed):
    rng, rows = random.Random(seed), []
    while len(rows) < number:
        first, second = answer(rng), answer(rng)
        if judge(first) != judge(second):
            better, worse = (first, second) if judge(first) > judge(second) else (second, first)
            rows.append({"chosen_ids": [*better, 2], "rejected_ids": [*worse, 2]})
    return Dataset.from_list(rows)


def trained(model, rows, steps, tmp_path, learning_rate=1e-2):
    arguments = trl.RewardConfig(output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=32, seed=0,
                                 learning_rate=learning_rate, logging_steps=1000, **QUIET)  # fmt: skip
    tokenizer = load_tokenizer("pocket")
    trainer = trl.RewardTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return trainer


def test_two_experts_together_beat_either_alone(tmp_path):
    base = classifier()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    held_out, alone, model = pairs(whole, 300, seed=9), {}, None
    for name, judge in (("kind", kind), ("brief", brief)):
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj"], task_type="SEQ_CLS")
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
            model.set_adapter(name)
        trainer = trained(model, pairs(judge, 600, seed=len(name)), 40, tmp_path)
        assert trainer.evaluate(pairs(judge, 200, seed=7))["eval_accuracy"] > 0.8
        alone[name] = trainer.evaluate(held_out)["eval_accuracy"]
    fused = fuse(model)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = trained(fused, pairs(whole, 800, seed=5), 100, tmp_path)
    together = trainer.evaluate(held_out)["eval_accuracy"]
    trainer.save_model(str(tmp_path / "checkpoint"))  # as its checkpoints do
    again = RewardFusionModel.from_pretrained(tmp_path / "checkpoint", backbone=classifier())
    ids = torch.tensor([held_out[0]["chosen_ids"]])
    assert torch.equal(again.eval()(ids).logits, fused.eval()(ids).logits)
    print(f"alone {alone}, together {together}")
    assert together > max(alone.values()) + 0.03
    assert all(torch.equal(frozen[name], tensor) for name, tensor in model.state_dict().items())
    bare = model.unload().state_dict()
    assert all(torch.equal(before[name], bare[name]) for name in before if "score" not in name)


# ----- The script -----


WORDS = ("abc", "de", "fghi", "jk", "lmn", "op", "qrs", "tu")


def write(path, category=False):
    rows = []
    for number, word in enumerate(WORDS * 3):
        label = ("kind", "brief", "")[number % 3]
        row = {"prompt": f"rev:{word}>", "chosen": word[::-1], "rejected": word + "x", "capability": label}
        rows.append(row | ({"category": ("chat", "facts")[number % 2]} if category else {}))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(*argv):
    options = [item for key, value in QUIET.items() for item in (f"--{key}", str(value))]
    more = ["--per_device_train_batch_size", "4", "--max_steps", "1", "--set", "r=2"]
    runpy.run_path(str(ROOT / "train_scripts" / "reward_dmoerm.py"))["main"]([*options, *more, *argv])


@pytest.mark.parametrize("category", [False, True])
def test_the_script_trains_every_stage_and_what_it_saves_comes_back(category, tmp_path, capsys):
    out = tmp_path / "out"
    load_in = "none" if category else "4bit"
    if not category:
        pytest.importorskip("bitsandbytes")
    more = ["--load_in", load_in, *(["--categories", "chat=kind,brief", "facts=brief"] if category else [])]
    path = write(tmp_path / "pairs.jsonl", category)
    run("--dataset", path, "--output_dir", str(out), "--held_out", "0.25", *more)
    printed = capsys.readouterr().out
    for part in ("kind: 8 pairs.", "brief: 8 pairs.", "kind alone", "fusion, chat" if category else "fusion, all"):
        assert part in printed
    model = RewardFusionModel.from_pretrained(out, load_in=load_in)
    assert model.config.capabilities == ["kind", "brief"]
    assert model.config.categories == ({"chat": ["kind", "brief"], "facts": ["brief"]} if category else None)
    for name in ("kind", "brief"):
        weights = load_file(out / "experts" / name / "adapter_model.safetensors")
        assert any(key.endswith("score.weight") for key in weights)
        assert all(tensor.any() for key, tensor in weights.items() if "lora_B" in key)
    before = {path: path.read_bytes() for path in (out / "experts").rglob("adapter_model.safetensors")}
    with pytest.raises(
        ValueError, match=r"`categories.chat` is 'kin', but must be among 'kind', 'brief'. Did you mean 'kind'"
    ):
        run(
            "--dataset",
            write(tmp_path / "c.jsonl", True),
            "--output_dir",
            str(tmp_path / "x"),
            "--categories",
            "chat=kin",
            "facts=brief",
        )
    with pytest.raises(ValueError, match="`held_out` is 1.0, a share, but must be above 0 and below 1"):
        run("--dataset", path, "--held_out", "1")
    with pytest.raises(ValueError, match=r"`output_dir` is .*, which is not empty. Name another"):
        run("--dataset", path, "--output_dir", str(out))
    (out / "experts" / "brief" / "adapter_config.json").unlink()  # killed before the second was saved
    run("--dataset", path, "--output_dir", str(out), "--held_out", "0.25", "--resume_from_checkpoint", "true", *more)
    printed = capsys.readouterr().out
    assert "kind: taken from" in printed
    assert "brief: 8 pairs." in printed
    kept = out / "experts" / "kind" / "adapter_model.safetensors"
    assert kept.read_bytes() == before[kept]


# ----- The outer layer -----


def test_the_router_learns_where_prompts_belong():
    tokenizer = load_tokenizer("pocket")
    base = load_classifier(str(POCKET_DIR), tokenizer.pad_token_id)
    model = fuse(experts(["kind", "brief", "true"], base), categories=CATEGORIES)
    rng = random.Random(0)

    def prompts(number):
        words = ["".join(rng.choices("abcdefgh", k=4)) for _ in range(number)]
        labels = [("chat", "facts")[i % 2] for i in range(number)]
        return [
            f"rev:{w}>" if l == "chat" else f"{rng.randint(1, 30)}+{len(w)}>"
            for w, l in zip(words, labels, strict=True)
        ], labels

    asked, wanted = prompts(40)
    assert fit_router(model, tokenizer, asked, wanted) == 1.0
    asked, wanted = prompts(20)
    assert model.route(**padded(tokenizer, asked)) == wanted
    assert model.route(**padded(tokenizer, asked[:1])) == wanted[:1]


@pytest.mark.parametrize(
    ("categories", "labels", "message"),
    [
        (None, ["chat"], "`categories` is None, but must be there, to choose from"),
        (
            CATEGORIES,
            ["chat", "fact"],
            "`category` is 'fact', but must be a category of the model. Did you mean 'facts'?",
        ),
        (
            CATEGORIES,
            ["chat", "chat"],
            "`category` is 'facts', but must be the label of at least one prompt. Add rows of it",
        ),
    ],
)
def test_a_router_that_cannot_be_fitted_is_refused(categories, labels, message):
    model = fuse(experts(["kind", "brief", "true"]), categories=categories)
    with pytest.raises(ValueError, match=re.escape(message)):
        fit_router(model, load_tokenizer("pocket"), ["a"] * len(labels), labels)
