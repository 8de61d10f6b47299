"""How fast a routed layer trains and decodes, beside PEFT's LoRA, PEFT's X-LoRA and the rival's package.

    python eval/bench_speed.py --quick           # under two minutes
    python eval/bench_speed.py                   # everything; on a GPU also layers of 7-8B models
    python eval/bench_speed.py --rival FOLDER    # where the rival's release lies, or is to be installed

Writes `eval/results/bench_speed.json` (every measurement) and `bench_speed.md` (tables, verdicts).

Method: one thread and process CPU time, so that other jobs on the machine count little; contenders in turn within each
round; a ratio is the median over rounds of the ratio within one round. glibc is told to keep big buffers, as CUDA's
caching allocator does: without that PEFT's LoRA, which makes more temporaries, looks slower than it is.
"""

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
    "HF_HUB_OFFLINE": "1",
}
if __name__ == "__main__" and any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})  # read at start only

import torch  # noqa: E402
from speed_contenders import LORA, layer_contenders, model_contenders  # noqa: E402
from speed_report import describe_machine, roofline_seconds, summarise, write_markdown  # noqa: E402
from speed_shared import Case, ModelCase, repeats_of, seconds  # noqa: E402


HERE = Path(__file__).resolve().parent
RIVAL = "moe-peft==2.0.2"
RIVAL_METHODS = {"rival mola top-2 of 8": "MOLA", "rival loramoe dense 8": "LORAMOE"}

QUICK = [
    Case("train", 1024, 1024, 4, 512, "bf16"),
    Case("train", 1024, 1024, 4, 512, "fp32"),
    Case("decode", 1024, 1024, 1, 1, "fp32"),
    ModelCase("bf16", layers=2),
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
    ModelCase("bf16"),
    ModelCase("fp32"),
]
ON_GPU = [
    Case(kind, d_in, d_out, rows, length, "bf16", nf4, "cuda")
    for nf4 in (False, True)
    for d_in, d_out in ((4096, 4096), (4096, 14336), (14336, 4096))
    for kind, rows, length in (("train", 1, 512), ("train", 2, 2048), ("decode", 1, 1), ("decode", 8, 1))
] + [ModelCase("bf16", device="cuda")]


class Rival:
    """The process in which the rival's layers run. Answers None where they cannot."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "moe_peft").is_dir():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), RIVAL]
            subprocess.run(pip, check=True)
        command = [sys.executable, str(HERE / "speed_rival.py"), str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request: object) -> float | None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = next(line for line in self.process.stdout if line.startswith("seconds "))
        except (BrokenPipeError, StopIteration):
            return None
        return float(line.split()[1])

    def contenders(self, case: Case | ModelCase) -> dict[str, Callable[[], float | None]]:
        settings = dataclasses.asdict(case)
        for number, (name, method) in enumerate(RIVAL_METHODS.items()):
            if self.ask(prepare=name, case=settings, method=method, first=number == 0) is None:
                return {}
        return {name: lambda name=name: self.ask(run=name) for name in RIVAL_METHODS}

    def state(self) -> str:
        """Ends the process; says whether it was still there."""
        ended = self.process.poll()
        self.process.terminate()
        self.process.wait()
        return f"{RIVAL}, its layers alone" if ended is None else f"{RIVAL} ended with exit status {ended}"


def measure(case: Case | ModelCase, rival: Rival | None, rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round; the contenders take turns."""
    steps = (layer_contenders if isinstance(case, Case) else model_contenders)(case)
    repeats = repeats_of(case)
    contenders: dict[str, Callable[[], float | None]] = {
        name: lambda step=step: seconds(step, case.device, repeats) for name, step in steps.items()
    }
    for step in steps.values():
        for _ in range(2 if case.device == "cpu" else 5):
            step()
    contenders |= rival.contenders(case) if rival else {}
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            taken[name].append(contender() or float("nan"))
    return taken


def rounds_of(case: Case | ModelCase, quick: bool) -> int:
    """More rounds where a step is short. Odd, so that the median is a measurement."""
    if case.device != "cpu":
        return 51
    if isinstance(case, ModelCase):
        return 3 if quick else 5
    work = case.tokens * case.d_in * case.d_out
    return (7 if quick else 21) if work < 5e9 else (5 if quick else 9)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cases and rounds")
    parser.add_argument("--only", default="", help="run only the cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=0, help="rounds for every case")
    parser.add_argument("--rival", type=Path, default=Path.home() / ".cache" / "moe_peft_rival", help="its folder")
    parser.add_argument("--no-rival", action="store_true", help="leave the rival's package out")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder for the results")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    cases = list(QUICK if options.quick else FULL) + (ON_GPU if torch.cuda.is_available() else [])
    command = " ".join(["python", "eval/bench_speed.py", *map(shlex.quote, arguments)])
    result = {"command": command, "machine": describe_machine(), "cases": []}
    rival = None if options.no_rival else Rival(options.rival)
    started = time.time()
    for case in (case for case in cases if options.only in str(case)):
        rounds = options.rounds or rounds_of(case, options.quick)
        taken = measure(case, rival, rounds)
        floors = roofline_seconds(case, result["machine"]["ceilings"][case.device])
        row = {"case": dataclasses.asdict(case), "name": str(case), "rounds": rounds, "seconds": taken}
        result["cases"].append(row | {"summary": summarise(taken, LORA, floors)})
        print(case, {name: round(s["ratio"], 3) for name, s in result["cases"][-1]["summary"].items()}, flush=True)
    result["minutes"] = (time.time() - started) / 60
    result["rival"] = rival.state() if rival else None
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "bench_speed.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.output / "bench_speed.md").write_text(write_markdown(result))


if __name__ == "__main__":
    main(sys.argv[1:])
