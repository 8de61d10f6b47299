"""One trial end to end on the shipped backbone, the demo's smallest form, and the yardstick's arithmetic."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
from peft import LoraConfig
from rich.console import Console

from moe_peft import from_catalogue
from moe_peft.pocket import make_suite
from moe_peft.trial import TrialSettings, run_trial


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def yardstick():
    spec = importlib.util.spec_from_file_location("yardstick", ROOT / "eval" / "yardstick.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["yardstick"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("quantize", [True, False], ids=["nf4", "fp32"])
def test_a_trial_trains_scores_and_is_repeatable(tmp_path, quantize):
    suite = make_suite("fact8tag", 0, num_people=8)
    settings = TrialSettings(learning_rate=3e-3, steps=4, batch_size=256, quantize=quantize)
    first, second = (
        run_trial(suite, LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"), settings, tmp_path)
        for _ in range(2)
    )
    assert first.losses == second.losses
    assert first.by_domain == second.by_domain
    assert first.losses[-1] < first.losses[0]  # every step sees all rows
    assert set(first.by_domain) == set(suite.domains)
    assert first.trainable == 4 * 2 * (128 + 352)


def test_the_demo_runs_from_end_to_end(tmp_path):
    from moe_peft.demo import run

    console = Console(record=True, width=120, quiet=True)
    result = run(tmp_path / "out", steps=3, console=console)
    assert result["reload_max_logit_difference"] == 0.0
    assert {"base", "LoRA, all linears", "LoRA, FFN", "molora"} == set(result["scores"])
    budgets = [row["trainable"] for name, row in result["scores"].items() if name != "base"]
    assert max(budgets) <= 1.05 * min(budgets)
    assert result["scores"]["base"]["knowledge"] > 0.95
    assert result["merge"]["tokens"] > 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"molora", "merged_lora", "routing.png", "routing.json", "demo.json"} <= written
    assert json.loads((tmp_path / "out" / "demo.json").read_text())["steps"] == 3


def test_the_paired_test_is_exact_for_few_seeds(yardstick):
    ours, theirs = [0.9, 0.8, 0.7, 0.9, 0.8], [0.1, 0.2, 0.1, 0.2, 0.1]
    assert yardstick.paired_p_value(ours, theirs) == pytest.approx(2 / 2**5)  # all signs alike, one way or the other
    assert yardstick.paired_p_value(ours, ours) == 1.0


def test_budgets_are_equal_for_every_method(yardstick):
    from transformers import AutoConfig

    from moe_peft.budget import count_config, meta_backbone
    from moe_peft.pocket import POCKET_DIR

    backbone = meta_backbone(AutoConfig.from_pretrained(POCKET_DIR))
    for method in yardstick.METHODS.values():
        trainable = count_config(backbone, yardstick.config_for(method, 190_000)).trainable
        assert math.isclose(trainable, 190_000, rel_tol=0.12), method.name  # whole ranks: the closest there is


def test_trials_are_kept_and_not_run_again(yardstick, tmp_path):
    job = {"method": "lora", "suite": "fact8tag", "budget": 1, "steps": 1, "rate": 0.1, "seed": 0}
    trials = yardstick.Trials(tmp_path / "trials.jsonl")
    trials._keep({**job, "score": 0.5})
    again = yardstick.Trials(tmp_path / "trials.jsonl")
    assert again.run([job], workers=1) == [{**job, "score": 0.5}]


def test_the_summary_shows_every_seed_and_tests_against_lora(yardstick, tmp_path):
    def runs(scores):
        return [{"score": s, "knowledge": 0.5, "seconds": 1.0, "trainable": 10} for s in scores]

    rows = yardstick.summarise(
        "fact8tag", {"lora": runs([0.5, 0.6, 0.7]), "molora": runs([0.8, 0.9, 1.0])}, {"lora": 0.1, "molora": 0.2}
    )
    assert rows[1]["mean"] == pytest.approx(0.9)
    assert rows[1]["worst"] == 0.8
    assert rows[1]["p_score_lora"] == pytest.approx(2 / 2**3)
    assert rows[1]["p_knowledge_lora"] == 1.0
    assert "p_score_lora" not in rows[0]
    assert "0.80 0.90 1.00" in yardstick.table(rows)
    yardstick.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_molora_in_the_catalogue_is_the_yardsticks(yardstick):
    ours = yardstick.config_for(yardstick.METHODS["molora"], 190_000)
    entry = from_catalogue("molora")
    assert ours.lora_alpha / ours.r == entry.lora_alpha / entry.r
    assert (ours.num_experts, ours.num_shared_experts, ours.top_k) == (entry.num_experts, entry.num_shared_experts, 2)
