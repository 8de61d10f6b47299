"""The offline yardstick: catalogue methods against plain LoRA at equal trainable parameters, on the pocket backbone.

    python eval/yardstick.py                          # the full form, about an hour and a half on one core
    python eval/yardstick.py --quick                  # two seeds, one suite, no sweep: under five minutes
    python eval/yardstick.py --methods lora molora --suites fact8tag --seeds 10
    python eval/yardstick.py --report                 # trains nothing: tables and plot of the trials on disk

Every method gets the same backbone (NF4), rows, steps and batch, and a rank solved from its config so that its trainable
parameters come closest to the budget. Its learning rate is swept on seeds of its own, from the same three rates for every
method and outwards by the same factor until the best rate lies at no edge; then it runs on the reported seeds, paired: the
same seed is the same rows in the same order. Each trial is appended to a file as it ends, so that an interrupted run goes on
where it stopped. Written at the end: JSON, tables and a plot, with every seed.

What this cannot show: absolute gains on models of useful size. It shows interference, routing, stability, forgetting.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

from yardstick_report import Sweep, summarise, write_report  # noqa: E402


RESULTS = Path(__file__).parent / "results" / "yardstick"

# Arguments of the suites, searched on seeds 100 to 103 with plain LoRA alone, so that LoRA in its best placement ends
# between .5 and .8 with little spread between seeds. Facts are taught 1 to 16 times: each doubling is learnt a little
# later, so the score rises slowly. Long texts and balanced chains do the same for the operations.
DIFFICULTY: dict[str, dict[str, Any]] = {
    "fact8tag": {"repeats": [1, 2, 4, 8, 16]},
    "opconf8tag": {"balanced": True, "shortest": 4, "longest": 8},
}

CENTRE, FACTOR = 4.5e-3, 1.5  # learning rates are CENTRE * FACTOR**step
START = (-1, 0, 1)  # the steps that every method's sweep begins with
LIMIT = 5  # no step beyond this, either way: 0.6e-3 to 34e-3
SWEEP_SEEDS = (100, 101)


class Method(NamedTuple):
    """A row of the comparison: a config made from a catalogue name, or plain LoRA, and where it is placed.

    LoRA's scale `lora_alpha / r` is tuned like everything else: 2 is common, 4 turned out better on the FFN.
    """

    name: str
    catalogue: str | None
    target_modules: str | list[str]
    overrides: dict[str, Any] = {}
    lora_scale: float = 2.0


FFN = ["gate_proj", "up_proj", "down_proj"]
METHODS = {
    method.name: method
    for method in (
        Method("lora", None, "all-linear"),
        Method("lora-ffn", None, FFN, lora_scale=4.0),
        Method("molora", "molora", FFN),
        Method("mola", "mola", "all-linear", {"lora_dropout": 0.0}),
        Method("loramoe", "loramoe", FFN, {"lora_dropout": 0.0, "balance": "none"}),
        Method("mixlora", "mixlora", "all-linear", {"lora_dropout": 0.0, "num_experts": 4}),
        Method("mixlora-switch", "mixlora-switch", "all-linear", {"lora_dropout": 0.0, "num_experts": 4}),
        Method("mixlora-dynamic", "mixlora-dynamic", "all-linear", {"lora_dropout": 0.0, "num_experts": 4}),
        # The further methods stand where LoRA does best, on the FFN, and with the scale that is best for LoRA there.
        *(
            Method(name, name, FFN, {"lora_dropout": 0.0, "lora_alpha": alpha, **more})
            for name, alpha, more in (
                ("adamoe", 32, {}),
                ("moe-plus-plus", 32, {}),
                ("dynamic-moe", 32, {}),
                ("ld-mole", 32, {}),
                ("evomoe", 32, {"schedule_steps": 150}),
                ("smoe-dropout", 16, {"schedule_steps": 150}),
                ("thor", 32, {}),
                (
                    "deepseek-moe",
                    8,
                    {"num_experts": 12, "num_shared_experts": 1, "top_k": 4, "router_scope": "linear"},
                ),
                ("hydralora", 32, {}),
                ("llava-mole", 128, {}),
                ("global-lora-moe", 16, {}),
                ("mod-squad", 16, {"num_experts": 8, "top_k": 2}),
                ("smora", 32, {}),
                ("moram", 32, {}),
                ("mos", 32, {}),
                ("mosa", 32, {}),
            )
        ),
    )
}


def config_for(method: Method, budget: int) -> Any:
    """The method's config with the rank that fits the budget."""
    from transformers import AutoConfig

    from moe_peft import from_catalogue
    from moe_peft.budget import equal_budget_lora, fit_to_budget, meta_backbone
    from moe_peft.pocket import POCKET_DIR

    backbone = meta_backbone(AutoConfig.from_pretrained(POCKET_DIR))
    if method.catalogue is None:
        return equal_budget_lora(backbone, budget, method.target_modules, method.lora_scale)
    config = from_catalogue(method.catalogue, target_modules=method.target_modules, **method.overrides)
    return fit_to_budget(backbone, config, budget)


def run_one(job: dict[str, Any]) -> dict[str, Any]:
    """One trial in a worker process; the job is returned with its result."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    import moe_peft  # noqa: F401  (registers the adapter types)
    from moe_peft.pocket import make_suite
    from moe_peft.trial import TrialSettings, run_trial

    settings = TrialSettings(learning_rate=job["rate"], steps=job["steps"], seed=job["seed"])
    config = config_for(METHODS[job["method"]], job["budget"])
    suite = make_suite(job["suite"], job["seed"], **job["difficulty"])
    with tempfile.TemporaryDirectory() as folder:
        result = run_trial(suite, config, settings, Path(folder))
    return {**job, "rank": config.r, **result._asdict()}


def key(job: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two trials the same one."""
    plain = tuple(job[name] for name in ("method", "suite", "budget", "steps", "rate", "seed"))
    return (*plain, json.dumps(job["difficulty"], sort_keys=True))


class Trials:
    """The trials done so far, on disk: one JSON object per line, appended as they end.

    Args:
        train: whether `run` trains what is not on disk yet, or leaves it out.
    """

    def __init__(self, path: Path, train: bool = True) -> None:
        self.path, self.train = path, train
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        # Trials that recorded no difficulty were run with the suites' defaults.
        trials = ({"difficulty": {}, **json.loads(line)} for line in lines if line)
        self.done = {key(trial): trial for trial in trials}

    def run(self, jobs: list[dict[str, Any]], workers: int) -> list[dict[str, Any]]:
        """The results of the jobs, in order."""
        missing = [job for job in jobs if key(job) not in self.done] if self.train else []
        if missing:
            from rich.progress import Progress

            with Progress() as progress, ProcessPoolExecutor(workers) as pool:
                task = progress.add_task("{method} on {suite}".format(**missing[0]), total=len(missing))
                for future in as_completed([pool.submit(run_one, job) for job in missing]):
                    self._keep(future.result())
                    progress.advance(task)
        return [self.done[key(job)] for job in jobs if key(job) in self.done]

    def _keep(self, trial: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(trial) + "\n")
        self.done[key(trial)] = trial


def rate_of(step: int) -> float:
    """Learning rate of a step of the sweep, to four digits, so that it is the same number wherever it is read."""
    return float(f"{CENTRE * FACTOR**step:.4g}")


def sweep(run: Callable[[float], list[dict[str, Any]]], say: Callable[[str], None] = print) -> Sweep:
    """The rate with the best mean score, searched outwards until it lies at no edge or the limit is reached.

    Args:
        run: the sweep's trials at a rate.
        say: is told why a rate is added, and when the limit stops the search.
    """
    tried: dict[int, list[dict[str, Any]]] = {}
    wanted = list(START)
    while True:
        tried.update({step: run(rate_of(step)) for step in wanted})
        mean = {step: statistics.mean(trial["score"] for trial in trials) for step, trials in tried.items()}
        best = max(mean, key=lambda step: mean[step])
        outwards = (best == max(tried)) - (best == min(tried))
        at_edge = outwards != 0
        found = f"{rate_of(best):g} is best ({mean[best]:.3f}) and an edge of the sweep"
        if at_edge and abs(best + outwards) <= LIMIT:
            wanted = [best + outwards]
            say(f"{found}: {rate_of(wanted[0]):g} is added")
            continue
        if at_edge:
            say(f"{found}, which ends here")
        return Sweep(rate_of(best), at_edge, {rate_of(step): tried[step] for step in sorted(tried)})


def job(method: str, suite: str, rate: float, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """A trial to run, as plain data."""
    return {
        "method": method,
        "suite": suite,
        "difficulty": DIFFICULTY.get(suite, {}),
        "rate": rate,
        "seed": seed,
        "budget": arguments.budget,
        "steps": arguments.steps,
    }


def find_rate(trials: Trials, method: str, suite: str, arguments: argparse.Namespace) -> Sweep | None:
    """The method's sweep on a suite; `None` where it is not wanted or, in a report, not complete."""
    if arguments.rate:
        return Sweep(arguments.rate, False, {})

    def run(rate: float) -> list[dict[str, Any]]:
        seeds = SWEEP_SEEDS[: arguments.sweep_seeds]
        done = trials.run([job(method, suite, rate, seed, arguments) for seed in seeds], arguments.workers)
        if len(done) < len(seeds):
            raise LookupError(rate)
        return done

    try:
        return sweep(run, lambda sentence: print(f"{method} on {suite}: {sentence}"))
    except LookupError:
        return None


def parse_arguments() -> argparse.Namespace:
    """The command line; a wrong name is refused by argparse with the list of right ones."""
    from moe_peft.pocket import SUITES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--suites", nargs="+", choices=list(SUITES), default=list(DIFFICULTY))
    parser.add_argument("--seeds", type=int, default=10, help="how many reported seeds")
    parser.add_argument("--first-seed", type=int, default=10, help="the first of them; 0 to 9 were used while tuning")
    parser.add_argument("--sweep-seeds", type=int, choices=(1, 2), default=2, help="seeds of the sweep over rates")
    parser.add_argument("--budget", type=int, default=190_000, help="trainable parameters")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, help="one learning rate for all, without a sweep")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="two seeds of lora and molora on fact8tag, no sweep")
    parser.add_argument("--report", action="store_true", help="train nothing; report what is on disk")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.methods, arguments.suites, arguments.seeds = ["lora", "molora"], ["fact8tag"], 2
        arguments.rate = arguments.rate or 4.5e-3
    return arguments


def measure(trials: Trials, method: str, suite: str, arguments: Any) -> tuple[Sweep, list[dict[str, Any]]] | None:
    """The rate by the sweep, and the trials at it; None where some are missing and may not be run."""
    found = find_rate(trials, method, suite, arguments)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    done = found and trials.run([job(method, suite, found.rate, s, arguments) for s in seeds], arguments.workers)
    return (found, done) if found and done else None


def reported(arguments: Any) -> list[dict[str, Any]]:
    """Rows of every method that is whole on disk, also of those that this call was not about: one table for all."""
    trials = Trials(arguments.output / "trials.jsonl", train=False)
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    sweeps: dict[tuple[str, str], Sweep] = {}
    suites = dict.fromkeys((*DIFFICULTY, *arguments.suites))
    for suite in suites:
        for method in METHODS:
            if measured := measure(trials, method, suite, arguments):
                sweeps[suite, method], runs[suite, method] = measured
    return [row for suite in suites for row in summarise(suite, runs, sweeps)]


def main() -> None:
    arguments = parse_arguments()
    trials = Trials(arguments.output / "trials.jsonl", train=not arguments.report)
    # One method after another, on every suite: what an interrupted run has, it has whole.
    if not arguments.report:
        for method in arguments.methods:
            for suite in arguments.suites:
                measure(trials, method, suite, arguments)
    rows = reported(arguments)
    if not rows:
        raise SystemExit(f"{trials.path} holds no trials of these methods and suites; run without --report first.")
    settings = {"steps": arguments.steps, "budget": arguments.budget, "batch": 32, "difficulty": DIFFICULTY}
    print(write_report(rows, settings, arguments.output))
    print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
