"""One trial end to end on the shipped backbone, the demo's smallest form, and the yardstick's arithmetic."""

import argparse
import importlib
import itertools
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
    path = sys.path.copy()
    sys.path.insert(0, str(ROOT / "eval"))
    yield importlib.import_module("yardstick")
    sys.path[:] = path
    for name in [name for name in sys.modules if name.startswith("yardstick")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def report(yardstick):
    return importlib.import_module("yardstick_report")


def trials_of(scores, knowledge=0.5, first_seed=0):
    rest = {"knowledge": knowledge, "seconds": 1.0, "trainable": 10, "rank": 2}
    return [{"seed": first_seed + n, "score": score, **rest} for n, score in enumerate(scores)]


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
    assert result["merge"]["routed"]["kl"] == 0.0 < result["merge"]["base"]["kl"]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"molora", "merged_lora", "routing.png", "routing.json", "demo.json"} <= written
    assert json.loads((tmp_path / "out" / "demo.json").read_text())["steps"] == 3


def test_the_paired_test_is_exact_for_few_seeds(report):
    ours, theirs = [0.9, 0.8, 0.7, 0.9, 0.8], [0.1, 0.2, 0.1, 0.2, 0.1]
    assert report.paired_p_value(ours, theirs) == pytest.approx(2 / 2**5)  # all signs alike, one way or the other
    assert report.paired_p_value(ours, ours) == 1.0


def test_budgets_are_equal_for_every_method(yardstick):
    from transformers import AutoConfig

    from moe_peft.budget import count_config, meta_backbone
    from moe_peft.pocket import POCKET_DIR

    backbone = meta_backbone(AutoConfig.from_pretrained(POCKET_DIR))
    for method in yardstick.METHODS.values():
        trainable = count_config(backbone, yardstick.config_for(method, 190_000)).trainable
        assert math.isclose(trainable, 190_000, rel_tol=0.12), method.name  # whole ranks: the closest there is


@pytest.mark.parametrize("peak", range(-5, 6))
def test_the_sweep_goes_outwards_until_the_best_rate_is_at_no_edge(yardstick, peak):
    step_of = {yardstick.rate_of(step): step for step in range(-yardstick.LIMIT, yardstick.LIMIT + 1)}
    asked, said = [], []

    def run(rate):
        asked.append(step_of[rate])
        return trials_of([-abs(step_of[rate] - peak), -abs(step_of[rate] - peak)])

    found = yardstick.sweep(run, said.append)
    assert found.rate == yardstick.rate_of(peak)
    assert found.at_edge == (abs(peak) == yardstick.LIMIT)
    # Every rate once, from those that all methods begin with to one beyond the best, or to the limit.
    beyond = max(-yardstick.LIMIT, min(yardstick.LIMIT, peak + (peak > 0) - (peak < 0)))
    expected = set(yardstick.START) | set(range(min(0, beyond), max(0, beyond) + 1))
    assert len(asked) == len(set(asked))
    assert set(asked) == expected
    assert len(said) == len(expected) - len(yardstick.START) + found.at_edge


def test_the_sweep_takes_the_mean_of_its_seeds(yardstick):
    scores = {yardstick.rate_of(step): pair for step, pair in {-1: (0.9, 0.0), 0: (0.5, 0.6), 1: (0.8, 0.1)}.items()}
    assert yardstick.sweep(lambda rate: trials_of(scores[rate])).rate == yardstick.rate_of(0)


def test_neighbouring_rates_differ_by_the_same_factor(yardstick):
    rates = [yardstick.rate_of(step) for step in range(-yardstick.LIMIT, yardstick.LIMIT + 1)]
    assert [b / a for a, b in itertools.pairwise(rates)] == pytest.approx(
        [yardstick.FACTOR] * (len(rates) - 1), rel=1e-3
    )


def test_the_yardsticks_suites_can_be_made_from_what_is_recorded(yardstick):
    for name, difficulty in json.loads(json.dumps(yardstick.DIFFICULTY)).items():
        suite = make_suite(name, 0, **difficulty)
        counts = [sum(row["domain"] == domain for row in suite.train) for domain in suite.domains]
        assert counts == [len(suite.train) // 8] * 8


def test_trials_are_kept_and_not_run_again(yardstick, tmp_path):
    arguments = argparse.Namespace(budget=1, steps=1)
    job = yardstick.job("lora", "fact8tag", 0.1, 0, arguments)
    trials = yardstick.Trials(tmp_path / "trials.jsonl")
    trials._keep({**job, "score": 0.5})
    again = yardstick.Trials(tmp_path / "trials.jsonl")
    assert again.run([job], workers=1) == [{**job, "score": 0.5}]
    # Another difficulty is another trial, and a report trains nothing.
    report_only = yardstick.Trials(tmp_path / "trials.jsonl", train=False)
    assert report_only.run([{**job, "difficulty": {"repeats": [1]}}], workers=1) == []


def test_a_report_takes_whole_sweeps_only(yardstick, tmp_path):
    arguments = argparse.Namespace(budget=1, steps=1, workers=1, rate=None, sweep_seeds=2)
    trials = yardstick.Trials(tmp_path / "trials.jsonl", train=False)
    jobs = [
        yardstick.job("lora", "fact8tag", yardstick.rate_of(step), seed, arguments)
        for step in yardstick.START
        for seed in yardstick.SWEEP_SEEDS
    ]
    for job in jobs[:-1]:
        trials._keep({**job, "score": float(job["rate"] == yardstick.rate_of(0))})
    assert yardstick.find_rate(trials, "lora", "fact8tag", arguments) is None
    trials._keep({**jobs[-1], "score": 0.0})
    assert yardstick.find_rate(trials, "lora", "fact8tag", arguments).rate == yardstick.rate_of(0)


def test_the_summary_shows_every_seed_and_tests_against_lora(report, tmp_path):
    runs = {
        ("fact8tag", "lora"): trials_of([0.5, 0.6, 0.7]),
        ("fact8tag", "molora"): trials_of([0.8, 0.9, 1.0]),
        ("fact8tag", "mola"): trials_of([0.9, 0.9], first_seed=1),  # interrupted: pairs with the seeds it has
        ("multi", "lora"): trials_of([0.1]),
    }
    swept = report.Sweep(0.2, False, {0.1: trials_of([0.3, 0.5], 0.75), 0.2: trials_of([0.6, 0.8], 0.25)})
    rows = report.summarise("fact8tag", runs, dict.fromkeys(runs, swept))
    lora, molora, mola = rows
    assert molora["mean"] == pytest.approx(0.9)
    assert molora["worst"] == 0.8
    assert molora["p_score_lora"] == pytest.approx(2 / 2**3)
    assert molora["p_knowledge_lora"] == 1.0
    assert mola["p_score_lora"] == pytest.approx(2 / 2**2)
    assert "p_score_lora" not in lora
    assert "0.80 0.90 1.00" in report.table(rows)
    # Facts kept stand beside the score at every rate, so that methods compare at equal rates.
    assert report.sweep_table(rows).count("| 0.40 / 0.75 | 0.70 / 0.25 |") == len(rows)
    report.write_report(rows, {"steps": 1}, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["rows"] == json.loads(json.dumps(rows))
    assert (tmp_path / "summary.png").stat().st_size > 1000


def test_molora_in_the_catalogue_is_the_yardsticks(yardstick):
    ours = yardstick.config_for(yardstick.METHODS["molora"], 190_000)
    entry = from_catalogue("molora")
    assert ours.lora_alpha / ours.r == entry.lora_alpha / entry.r
    assert (ours.num_experts, ours.num_shared_experts, ours.top_k) == (entry.num_experts, entry.num_shared_experts, 2)
