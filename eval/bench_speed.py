"""How fast routed layers and FFN blocks train and decode, beside PEFT's LoRA, PEFT's X-LoRA and the rival's packages.

    python eval/bench_speed.py --quick           # about two minutes
    python eval/bench_speed.py                   # everything; on a GPU also layers and blocks of 7-8B models
    python eval/bench_speed.py --rows ffn        # the FFN blocks only; the other rows stay as they were measured
    python eval/bench_speed.py --rival FOLDER    # where the rival's release lies, or is to be installed

Writes `eval/results/bench_speed.json` (every measurement) and `bench_speed.md` (tables, verdicts).

Method: one thread and process CPU time, so that other jobs on the machine count little; contenders in turn within each
round; a ratio is the median over rounds of the ratio within one round. glibc is told to keep big buffers, as CUDA's
caching allocator does: without that PEFT's LoRA, which makes more temporaries, looks slower than it is.
"""

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench_process import start_steady


if __name__ == "__main__":
    start_steady()

import torch  # noqa: E402
from speed_contenders import LORA, layer_contenders, model_contenders  # noqa: E402
from speed_ffn import CHECK, ffn_contenders, our_outcome  # noqa: E402
from speed_peers import MIXLORA_PACKAGE, MOE_PEFT, Rival  # noqa: E402
from speed_ranks import LORA_64, rank_contenders  # noqa: E402
from speed_report import arithmetic_ratios, describe_machine, roofline_seconds, summarise, write_markdown  # noqa: E402
from speed_shared import Case, FfnCase, ModelCase, RankCase, repeats_of, seconds  # noqa: E402


AnyCase = Case | FfnCase | ModelCase | RankCase
HERE = Path(__file__).resolve().parent
ROWS = {"layer": Case, "ffn": FfnCase, "model": ModelCase, "rank": RankCase}

QUICK = [
    Case("train", 1024, 1024, 4, 512, "bf16"),
    Case("train", 1024, 1024, 4, 512, "fp32"),
    Case("decode", 1024, 1024, 1, 1, "fp32"),
    FfnCase(1024, 2816, 1, 512, "bf16"),
    ModelCase("bf16", layers=2),
    RankCase("train", 1024, 4, 512, "bf16"),
]
FULL = [
    Case("train", 4096, 4096, 2, 512, "bf16"),
    Case("train", 1024, 2816, 4, 512, "bf16"),
    Case("train", 1024, 1024, 4, 512, "bf16"),
    Case("train", 1024, 2816, 4, 512, "fp32"),
    Case("train", 1024, 1024, 4, 512, "fp32"),
    Case("train", 1024, 1024, 4, 512, "bf16", nf4=True),
    *(Case("decode", 1024, 1024, rows, 1, "fp32") for rows in (1, 8)),
    *(Case("decode", 1024, 1024, rows, 1, "bf16") for rows in (1, 8)),
    *(Case("decode", 4096, 4096, rows, 1, "bf16") for rows in (1, 8)),
    Case("decode", 4096, 4096, 1, 1, "bf16", nf4=True),
    FfnCase(4096, 14336, 1, 256, "bf16"),
    FfnCase(4096, 14336, 1, 512, "bf16"),
    FfnCase(1024, 2816, 1, 512, "bf16"),
    FfnCase(1024, 2816, 4, 512, "bf16"),
    FfnCase(1024, 2816, 1, 512, "fp32"),
    FfnCase(1024, 2816, 4, 512, "fp32"),
    ModelCase("bf16"),
    ModelCase("fp32"),
    *(RankCase("train", width, 8192 // width, 256, dtype) for width in (4096, 1024) for dtype in ("bf16", "fp32")),
    *(RankCase("decode", width, 1, 1, "bf16") for width in (4096, 1024)),
]
ON_GPU = [
    Case(kind, d_in, d_out, rows, length, "bf16", nf4, "cuda")
    for nf4 in (False, True)
    for d_in, d_out in ((4096, 4096), (4096, 14336), (14336, 4096))
    for kind, rows, length in (("train", 1, 512), ("train", 2, 2048), ("decode", 1, 1), ("decode", 8, 1))
]
ON_GPU += [
    FfnCase(hidden, inner, rows, length, "bf16", nf4, "cuda")
    for nf4 in (False, True)
    for hidden, inner in ((4096, 14336), (3584, 18944))
    for rows, length in ((1, 512), (2, 2048))
]
ON_GPU += [ModelCase("bf16", device="cuda")]
ON_GPU += [
    RankCase(kind, 4096, rows, length, "bf16", "cuda")
    for kind, rows, length in (("train", 2, 2048), ("decode", 1, 1), ("decode", 8, 1))
]


def measure(case: AnyCase, rivals: Sequence[Rival], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round; the contenders take turns."""
    makers = {Case: layer_contenders, FfnCase: ffn_contenders, ModelCase: model_contenders, RankCase: rank_contenders}
    steps = makers[type(case)](case)
    repeats = repeats_of(case)
    contenders: dict[str, Callable[[], float | None]] = {
        name: lambda step=step: seconds(step, case.device, repeats) for name, step in steps.items()
    }
    for step in steps.values():
        for _ in range(2 if case.device == "cpu" else 5):
            step()
    for rival in [] if isinstance(case, RankCase) else rivals:  # none of them routes ranks
        contenders |= rival.contenders(case)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            taken[name].append(contender() or float("nan"))
    return taken


def rounds_of(case: AnyCase, quick: bool) -> int:
    """More rounds where a step is short. Odd, so that the median is a measurement."""
    if case.device != "cpu":
        return 51
    if isinstance(case, ModelCase):
        return 3 if quick else 5
    width = 3 * case.inner if isinstance(case, FfnCase) else case.d_out
    work = case.tokens * case.d_in * width
    return (7 if quick else 21) if work < 5e9 else (5 if quick else 9)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cases and rounds")
    parser.add_argument("--rows", choices=ROWS, nargs="+", help="measure these only, and keep the others' results")
    parser.add_argument("--only", default="", help="run only the cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=0, help="rounds for every case")
    cache = Path.home() / ".cache"
    parser.add_argument("--rival", type=Path, default=cache / "moe_peft_rival", help="folder of moe-peft")
    parser.add_argument("--mixlora", type=Path, default=cache / "mixlora_rival", help="folder of mixlora")
    parser.add_argument("--no-rival", action="store_true", help="leave the rival's packages out")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder for the results")
    return parser.parse_args(arguments)


def kept_results(file: Path, measured: Sequence[str]) -> tuple[dict, list[dict]]:
    """The runs and cases of an earlier result, without the rows that are measured again."""
    if set(measured) == set(ROWS) or not file.exists():
        return {}, []
    earlier = json.loads(file.read_text())
    runs = {rows: run for rows, run in earlier["runs"].items() if rows not in measured}
    return runs, [case for case in earlier["cases"] if case["rows"] in runs]


def run_cases(
    cases: Sequence[AnyCase], rivals: Sequence[Rival], machine: dict, options: argparse.Namespace
) -> list[dict]:
    """Each case's measurements and what follows from them."""
    results = []
    for case in cases:
        rounds = options.rounds or rounds_of(case, options.quick)
        taken = measure(case, rivals, rounds)
        kind = next(name for name, of in ROWS.items() if isinstance(case, of))
        row = {"rows": kind, "case": dataclasses.asdict(case), "name": str(case), "rounds": rounds, "seconds": taken}
        row["arithmetic"] = arithmetic_ratios(case)
        floors = roofline_seconds(case, machine["ceilings"][case.device])
        results.append(row | {"summary": summarise(taken, LORA_64 if kind == "rank" else LORA, floors)})
        print(case, {name: round(s["ratio"], 3) for name, s in results[-1]["summary"].items()}, flush=True)
    return results


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    measured = options.rows or list(ROWS)
    kinds = tuple(ROWS[name] for name in measured)
    cases = list(QUICK if options.quick else FULL) + (ON_GPU if torch.cuda.is_available() else [])
    cases = [case for case in cases if isinstance(case, kinds) and options.only in str(case)]
    run = {"command": " ".join(["python", "eval/bench_speed.py", *map(shlex.quote, arguments)])}
    run |= {"date": time.strftime("%Y-%m-%d"), "machine": describe_machine()}
    rivals = []
    if not options.no_rival:
        rivals = [Rival(MOE_PEFT, options.rival)]
        rivals += [Rival(MIXLORA_PACKAGE, options.mixlora)] if "ffn" in measured else []
    if rivals and "ffn" in measured:
        ours = our_outcome()
        run["differences"] = {name: gap for rival in rivals for name, gap in rival.differences(CHECK, ours).items()}
    started = time.time()
    results = run_cases(cases, rivals, run["machine"], options)
    run["minutes"] = (time.time() - started) / 60
    run["rival"] = "; ".join(rival.state() for rival in rivals) or None
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "bench_speed.json"
    runs, kept = kept_results(file, measured)
    order = list(ROWS)
    result = {"runs": {name: runs.get(name, run) for name in order if name in runs or name in measured}}
    result["cases"] = sorted(kept + results, key=lambda row: order.index(row["rows"]))
    file.write_text(json.dumps(result, indent=1) + "\n")
    (options.output / "bench_speed.md").write_text(write_markdown(result))


if __name__ == "__main__":
    main(sys.argv[1:])
