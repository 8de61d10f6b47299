"""The speed benchmark runs and reports honestly; what it measures is not tested, as seconds are nobody's promise."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch


EVAL = Path(__file__).resolve().parent.parent / "eval"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(EVAL))
    yield importlib.import_module("bench_speed")
    for name in [name for name in sys.modules if name.startswith("speed_") or name == "bench_speed"]:
        del sys.modules[name]


def tiny(bench, kind: str, **settings):
    return bench.Case(kind, 64, 32, 2, 4, "fp32", **settings)


@pytest.mark.parametrize("kind", ["train", "decode"])
def test_every_contender_takes_its_turn_in_every_round(bench, kind):
    taken = bench.measure(tiny(bench, kind), [], rounds=3)
    assert bench.LORA in taken
    assert all(len(times) == 3 and all(t > 0 for t in times) for times in taken.values())
    balanced = {name for name in taken if "balanced" in name}
    assert bool(balanced) == (kind == "train")


def test_a_whole_model_takes_a_step_under_every_contender(bench):
    case = bench.ModelCase("fp32", layers=1, width=64, inner=32, vocabulary=50, rows=2, length=8)
    taken = bench.measure(case, [], rounds=1)
    assert len(taken) == 5


def test_ratios_are_taken_within_a_round(bench):
    """The second round ran on a machine twice as slow: the ratio does not see it."""
    taken = {bench.LORA: [1.0, 2.0, 1.0], "other": [3.0, 6.0, 3.0]}
    summary = bench.summarise(taken, bench.LORA, {"other": 1.5})
    assert summary[bench.LORA]["ratio"] == 1
    assert summary["other"] == {"seconds": 3, "ratio": 3, "ratio_q1": 3, "ratio_q3": 3, "roofline": 0.5}


def a_run(**settings):
    machine = {
        "cpu": "some",
        "bf16": [],
        "cores": 2,
        "threads": 1,
        "load": (0.0, 0.0, 0.0),
        "versions": {"torch": "2"},
        "ceilings": {"cpu": {"bf16": 1e9, "fp32": 1e9, "bytes": 1e9}},
    }
    run = {"command": "python", "date": "2026-01-01", "minutes": 1.0, "machine": machine, "rival": None}
    return run | settings


def a_row(name: str, ratios: dict[str, float], arithmetic: dict[str, float], rows: str = "layer"):
    """As if every contender had taken its ratio in seconds, in three rounds."""
    parts = {"ratio_q1": 1.0, "ratio_q3": 2.0}
    summary = {who: {"ratio": ratio, "seconds": ratio} | parts for who, ratio in ratios.items()}
    row = {"rows": rows, "name": name, "case": {"rows": 2, "length": 512}, "rounds": 3, "arithmetic": arithmetic}
    return row | {"summary": summary, "seconds": {who: [ratio] * 3 for who, ratio in ratios.items()}}


def test_a_missed_target_is_called_missed(bench):
    name = "ours top-2 of 8"
    row = a_row("train bf16 4096→4096 T=1024", {name: 1.3}, {name: 1.0744})
    text = bench.write_markdown({"runs": {"layer": a_run()}, "cases": [row]})
    assert "| ≤ 1.05 | 1.300 | 1.07 | **missed** |" in text


def test_the_targets_of_the_ffn_rows_are_judged(bench):
    """Ours against LoRA in either balance, and against each of the rival's paths."""
    ffn = importlib.import_module("speed_ffn")
    ratios = {bench.LORA: 1.0, ffn.MIXED: 1.2, ffn.MIXED_BALANCED: 1.6, ffn.EFFICIENT: 2.4, ffn.MIXLORA: 1.8}
    row = a_row("ffn bf16 4096/14336 T=256", ratios, {ffn.MIXED: 1.01, ffn.MIXED_BALANCED: 1.01}, "ffn")
    run = a_run(differences={ffn.EFFICIENT: 3e-7})
    text = bench.write_markdown({"runs": {"ffn": run}, "cases": [row]})
    assert f"| {ffn.MIXED}, {row['name']} | ≤ 1.50 | 1.200 | 1.01 | met |" in text
    assert f"| {ffn.MIXED_BALANCED}, {row['name']} | ≤ 1.50 | 1.600 | 1.01 | **missed** |" in text
    assert f"over {ffn.EFFICIENT}, {row['name']} | ≥ 1.70 × | 2.00 × | 2.38 × | met |" in text
    assert f"over {ffn.MIXLORA}, {row['name']} | ≥ 1.70 × | 1.50 × | 1.78 × | **missed** |" in text
    assert f"over {ffn.COMPATIBLE}" not in text  # its process had ended
    assert "efficient 3e-07" in text


def test_the_report_says_when_each_kind_of_rows_was_measured(bench):
    old, new = a_run(), a_run(command="python --rows ffn", date="2026-02-02")
    text = bench.write_markdown({"runs": {"layer": old, "ffn": new, "model": a_run()}, "cases": []})
    assert "Rows of layer, model: `python`, 1 minutes, 2026-01-01." in text
    assert "Rows of ffn: `python --rows ffn`, 1 minutes, 2026-02-02." in text


def test_rows_that_are_not_measured_are_kept(bench, tmp_path):
    file = tmp_path / "bench_speed.json"
    assert bench.kept_results(file, ["ffn"]) == ({}, [])
    cases = [{"rows": rows, "name": f"{rows} {number}"} for rows in ("layer", "ffn") for number in range(2)]
    file.write_text(json.dumps({"runs": {"layer": {"date": "a"}, "ffn": {"date": "b"}}, "cases": cases}))
    assert bench.kept_results(file, ["ffn", "model"]) == ({"layer": {"date": "a"}}, cases[:2])
    assert bench.kept_results(file, list(bench.ROWS)) == ({}, [])


def test_the_committed_report_is_that_of_the_committed_measurements(bench):
    results = EVAL / "results"
    assert bench.write_markdown(json.loads((results / "bench_speed.json").read_text())) == (
        results / "bench_speed.md"
    ).read_text(encoding="utf-8")


def test_a_case_comes_back_from_another_process(bench):
    shared = importlib.import_module("speed_shared")
    for case in (
        bench.Case("train", 4, 4, 1, 1, "fp32"),
        bench.FfnCase(4, 8, 1, 1, "bf16"),
        bench.ModelCase("fp32"),
        bench.RankCase("train", 8, 1, 1, "bf16"),
    ):
        assert shared.case_of(json.loads(json.dumps(dataclasses.asdict(case)))) == case


def test_every_contender_trains_the_block(bench):
    ffn = importlib.import_module("speed_ffn")
    taken = bench.measure(bench.FfnCase(64, 96, 2, 8, "bf16"), [], rounds=1)
    assert list(taken) == [ffn.FROZEN, ffn.LORA, ffn.MIXED, ffn.MIXED_BALANCED]


def test_our_block_computes_whole_experts(bench):
    """What the rival's is held against, as a loop over the experts; and the balance reaches the router."""
    ffn, shared = importlib.import_module("speed_ffn"), importlib.import_module("speed_shared")
    ours = ffn.our_outcome()
    linears, w = shared.make_ffn_linears(ffn.CHECK), shared.make_experts(ffn.CHECK)
    x = shared.make_inputs(ffn.CHECK)[0]
    weights, index = (x @ w["router"].T).softmax(-1).topk(shared.TOP_K)
    weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.zeros_like(x)
    for e in range(shared.EXPERTS):

        def linear(name, x, e=e):
            return linears[name](x) + x @ w[f"{name}.A"][e].T @ w[f"{name}.B"][e]

        h = torch.nn.functional.silu(linear("gate_proj", x)) * linear("up_proj", x)
        expected += (weights * (index == e)).sum(-1, keepdim=True) * linear("down_proj", h)
    assert torch.allclose(ours["y"], expected, atol=1e-5)
    balanced = ffn.OurBlock(ffn.CHECK, balance=1.0)
    changed = shared.outcome(ffn.CHECK, balanced, balanced.gradients)
    assert torch.equal(changed["y"], ours["y"])
    assert not torch.allclose(changed["router"], ours["router"])


def test_another_function_is_seen(bench):
    peers = importlib.import_module("speed_peers")
    ours = {"y": torch.tensor([1.0, -4.0]), "x": torch.tensor([2.0])}
    assert peers.difference(ours, {name: t.clone() for name, t in ours.items()}) == 0
    assert peers.difference(ours, {"y": torch.tensor([1.0, -3.0]), "x": torch.tensor([2.0])}) == 0.25


def test_the_arithmetic_of_the_block_is_that_of_its_products(bench):
    from torch.utils.flop_counter import FlopCounterMode

    def in_place(c, a, b, **_):  # torch counts the out-of-place one only
        return 2 * a[0] * a[1] * b[1]

    ffn = importlib.import_module("speed_ffn")
    case = bench.FfnCase(64, 96, 2, 40, "fp32")
    work = ffn.ffn_work(case)
    for name, step in ffn.ffn_contenders(case).items():
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
            step()
        assert counter.get_total_flops() == pytest.approx(2 * case.tokens * work[name])


@pytest.mark.parametrize("kind", ["train", "decode"])
def test_the_rows_of_ranks_count_what_torch_counts_and_run(bench, kind):
    from torch.utils.flop_counter import FlopCounterMode

    ranks = importlib.import_module("speed_ranks")
    case, counted = bench.RankCase(kind, 128, 2, 40, "fp32"), {}
    for name, step in ranks.rank_contenders(case).items():
        with FlopCounterMode(display=False) as counter:
            step()
        counted[name] = counter.get_total_flops()
    for name, expected in bench.arithmetic_ratios(case).items():
        assert counted[name] / counted[ranks.LORA_64] == pytest.approx(expected)
    taken = bench.measure(case, [], rounds=1)
    assert list(taken) == list(counted)


def test_the_target_of_ranks_is_judged(bench):
    ranks = importlib.import_module("speed_ranks")
    name = "ranks train bf16 1024→1024 T=2048"
    row = a_row(
        name, {ranks.LORA_64: 1.0, ranks.SMORA: 1.2, ranks.MORAM: 1.3}, {ranks.SMORA: 1.08, ranks.MORAM: 1.0}, "rank"
    )
    text = bench.write_markdown({"runs": {"rank": a_run()}, "cases": [row]})
    assert f"| {ranks.SMORA}, {name} | ≤ 1.25 | 1.200 | 1.08 | met |" in text
    assert f"| {ranks.MORAM}, {name} | ≤ 1.25 | 1.300 | 1.00 | **missed** |" in text


def test_the_arithmetic_is_that_of_the_products(bench):
    """Counted by torch, for LoRA's layer and ours, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    for kind in ("train", "decode"):
        case = bench.Case(kind, 64, 48, 2, 40, "fp32")
        steps, counted = bench.layer_contenders(case), {}
        expected = bench.arithmetic_ratios(case)
        for name in (bench.LORA, *expected):
            if name in steps:
                with FlopCounterMode(display=False) as counter:
                    steps[name]()
                counted[name] = counter.get_total_flops()
        for name in counted.keys() & expected.keys():
            assert counted[name] / counted[bench.LORA] == pytest.approx(expected[name])


def test_the_roofline_of_a_larger_rank_is_never_lower(bench):
    ceiling = {"bf16": 1e12, "fp32": 1e11, "bytes": 1e10}
    for case in (tiny(bench, "train"), tiny(bench, "decode"), bench.FfnCase(64, 96, 2, 8, "bf16")):
        floors = list(bench.roofline_seconds(case, ceiling).values())  # in the order of their ranks
        assert floors == sorted(floors)
        assert floors[0] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_benchmark_runs_on_a_gpu(bench):
    for nf4 in (False, True):
        for kind in ("train", "decode"):
            taken = bench.measure(tiny(bench, kind, nf4=nf4, device="cuda"), [], rounds=1)
            assert all(t > 0 for times in taken.values() for t in times)
        taken = bench.measure(bench.FfnCase(64, 128, 2, 4, "bf16", nf4, "cuda"), [], rounds=1)
        assert all(t > 0 for times in taken.values() for t in times)
