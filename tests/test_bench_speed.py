"""The speed benchmark runs and reports honestly; what it measures is not tested, as seconds are nobody's promise."""

import importlib
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
    taken = bench.measure(tiny(bench, kind), None, rounds=3)
    assert bench.LORA in taken
    assert all(len(times) == 3 and all(t > 0 for t in times) for times in taken.values())
    balanced = {name for name in taken if "balanced" in name}
    assert bool(balanced) == (kind == "train")


def test_a_whole_model_takes_a_step_under_every_contender(bench):
    case = bench.ModelCase("fp32", layers=1, width=64, inner=32, vocabulary=50, rows=2, length=8)
    taken = bench.measure(case, None, rounds=1)
    assert len(taken) == 5


def test_ratios_are_taken_within_a_round(bench):
    """The second round ran on a machine twice as slow: the ratio does not see it."""
    taken = {bench.LORA: [1.0, 2.0, 1.0], "other": [3.0, 6.0, 3.0]}
    summary = bench.summarise(taken, bench.LORA, {"other": 1.5})
    assert summary[bench.LORA]["ratio"] == 1
    assert summary["other"] == {"seconds": 3, "ratio": 3, "ratio_q1": 3, "ratio_q3": 3, "roofline": 0.5}


def test_a_missed_target_is_called_missed(bench):
    summary = {"ratio": 1.3, "ratio_q1": 1.2, "ratio_q3": 1.4, "seconds": 0.1}
    case = {"rows": 2, "length": 512}
    row = {"name": "train bf16 4096→4096 T=1024", "case": case, "rounds": 3, "summary": {"ours top-2 of 8": summary}}
    machine = {
        "cpu": "some",
        "bf16": [],
        "cores": 2,
        "threads": 1,
        "load": (0.0, 0.0, 0.0),
        "versions": {"torch": "2"},
        "ceilings": {"cpu": {"bf16": 1e9, "fp32": 1e9, "bytes": 1e9}},
    }
    text = bench.write_markdown(
        {"command": "python", "minutes": 1.0, "machine": machine, "cases": [row], "rival": None}
    )
    assert "| ≤ 1.05 | 1.300 | **missed** |" in text


def test_the_roofline_of_a_larger_rank_is_never_lower(bench):
    ceiling = {"bf16": 1e12, "fp32": 1e11, "bytes": 1e10}
    for kind in ("train", "decode"):
        floors = list(bench.roofline_seconds(tiny(bench, kind), ceiling).values())  # in the order of their ranks
        assert floors == sorted(floors)
        assert floors[0] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_benchmark_runs_on_a_gpu(bench):
    for nf4 in (False, True):
        for kind in ("train", "decode"):
            taken = bench.measure(tiny(bench, kind, nf4=nf4, device="cuda"), None, rounds=1)
            assert all(t > 0 for times in taken.values() for t in times)
