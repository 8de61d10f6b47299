"""What `moe-peft serve` adds to `generate`, and what it does with 64 clients at once.

    python eval/bench_serve.py            # some minutes on a CPU; writes eval/results/serve.{json,md}

The pocket backbone with `molora` on random weights, in a bundle that knows no end of text, so that every answer has the
length that was asked for. The server is the command itself, in a process of its own; `generate` runs here, as one would
run it without a server. One client: a request and a `generate` of the same prompt take turns, and a ratio is the median
over rounds of the ratio within one round. Wall time is what a client waits; CPU time is that of the process that
generates, and is what to look at on a machine that others use. 64 clients: each asks once, all at the same moment.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any


if __name__ == "__main__" and os.environ.get("OMP_NUM_THREADS") != "1":
    os.execve(
        sys.executable, [sys.executable, *sys.argv], {**os.environ, "OMP_NUM_THREADS": "1"}
    )  # read at start only

import openai  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from peft import PeftModel, get_peft_model  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from moe_peft import from_catalogue  # noqa: E402
from moe_peft.backbone import load_backbone  # noqa: E402
from moe_peft.pocket import POCKET_DIR, make_suite  # noqa: E402
from moe_peft.saving import save_adapter  # noqa: E402
from moe_peft.serving.bundle import write_bundle  # noqa: E402


RESULTS = Path(__file__).parent / "results"
WAYS = ("--no-continuous-batching", "--continuous-batching")
GOAL = 1.10


def make_bundle(folder: Path) -> Path:
    """molora on the pocket backbone, without an end of text."""
    base = folder / "base"
    shutil.copytree(POCKET_DIR, base)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((base / name).read_text())
        values.pop("eos_token_id", None)
        (base / name).write_text(json.dumps(values))
    torch.manual_seed(0)
    config = from_catalogue("molora", init_weights=False, lora_alpha=1)
    save_adapter(get_peft_model(load_backbone(str(base), "none", "cpu"), config), folder / "adapter")
    return write_bundle(str(folder / "adapter"), folder / "bundle", model=str(base), load_in="none").folder


@contextmanager
def server(bundle: Path, way: str) -> Iterator[tuple[openai.OpenAI, psutil.Process]]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "moe_peft", "serve", str(bundle), "--port", "0", way]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        said = process.stdout.readline() if process.stdout else ""
        address = said.split(" at ")[1].split(": chat")[0]
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=5, timeout=600)
        yield client, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


class Generator:
    """`generate` in this process."""

    def __init__(self, bundle: Path) -> None:
        backbone = load_backbone(str(bundle), "none", "cpu", adapter_kwargs={"subfolder": "none"})
        self.model: Any = PeftModel.from_pretrained(backbone, bundle).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(bundle)

    def __call__(self, prompt: str, tokens: int) -> str:
        inputs = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = self.model.generate(**inputs, max_new_tokens=tokens)[0, inputs["input_ids"].shape[1] :]
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def ask(client: openai.OpenAI, prompt: str, tokens: int, stream: bool) -> str:
    """The answer of a server."""
    given: dict[str, Any] = {
        "model": "bundle",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
    }
    if not stream:
        return client.chat.completions.create(**given).choices[0].message.content or ""
    return "".join(c.choices[0].delta.content or "" for c in client.chat.completions.create(**given, stream=True))


def one_client(bundle: Path, prompts: list[str], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """The ratio to `generate`, for each way to serve, whole and streamed."""
    generate, rows = Generator(bundle), []
    for way in WAYS:
        with server(bundle, way) as (client, process):
            for stream in (False, True):
                wall, cpu, alone, equal = [], [], [], True
                for number in range(rounds + 1):
                    prompt = prompts[number % len(prompts)]
                    start, used = time.perf_counter(), time.process_time()
                    wanted = generate(prompt, tokens)
                    here, here_cpu = time.perf_counter() - start, time.process_time() - used
                    start, used = time.perf_counter(), sum(process.cpu_times()[:2])
                    equal &= ask(client, prompt, tokens, stream) == wanted
                    there, there_cpu = time.perf_counter() - start, sum(process.cpu_times()[:2]) - used
                    if number:  # the first round warms up
                        wall.append(there / here)
                        cpu.append(there_cpu / here_cpu)
                        alone.append(here / tokens)
                rows.append(
                    {
                        "continuous_batching": way == WAYS[1],
                        "stream": stream,
                        "generate_ms_per_token": 1e3 * statistics.median(alone),
                        "wall_ratio": statistics.median(wall),
                        "wall_quartiles": statistics.quantiles(wall, n=4),
                        "cpu_ratio": statistics.median(cpu),
                        "answers_equal": equal,
                    }
                )
    return rows


def many_clients(bundle: Path, prompts: list[str], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Throughput and waiting times of as many clients as there are prompts."""
    generate = Generator(bundle)
    wanted = [generate(prompt, tokens) for prompt in prompts]
    rows = []
    for way in WAYS:
        with server(bundle, way) as (client, _):
            waited: list[float] = []
            seconds, equal = [], 0

            def timed(number: int, client: openai.OpenAI = client, waited: list[float] = waited) -> bool:
                start = time.perf_counter()
                answer = ask(client, prompts[number], tokens, stream=number % 2 == 1)
                waited.append(time.perf_counter() - start)
                return answer == wanted[number]

            ask(client, prompts[0], 2, False)
            for _ in range(rounds):
                start = time.perf_counter()
                with ThreadPoolExecutor(len(prompts)) as pool:
                    equal += sum(pool.map(timed, range(len(prompts))))
                seconds.append(time.perf_counter() - start)
            cuts = statistics.quantiles(waited, n=20)
            rows.append(
                {
                    "continuous_batching": way == WAYS[1],
                    "clients": len(prompts),
                    "rounds": rounds,
                    "tokens_per_second": len(prompts) * tokens / statistics.median(seconds),
                    "p50_seconds": statistics.median(waited),
                    "p95_seconds": cuts[18],
                    "answers_equal": equal,
                    "answers": rounds * len(prompts),
                    "different_answers": len(set(wanted)),
                }
            )
    return rows


def as_markdown(found: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        "# `moe-peft serve` beside `generate`",
        "",
        f"`python eval/bench_serve.py`: {found['machine']}. `molora` on the pocket backbone, {found['tokens']} new tokens with one",
        f"client ({found['rounds']} rounds), {found['load_tokens']} with 64.",
        "",
        f"One client. The goal is a ratio of at most {GOAL:.2f} to `generate`'s time per token.",
        "",
        "| served | answer | `generate`, ms per token | wall time, ratio (quartiles) | CPU time, ratio | answers equal `generate`'s |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["one_client"]:
        low, _, high = row["wall_quartiles"]
        lines.append(
            f"| {_way(row)} | {'streamed' if row['stream'] else 'whole'} | {row['generate_ms_per_token']:.2f} "
            f"| {row['wall_ratio']:.3f} ({low:.3f} to {high:.3f}) | {row['cpu_ratio']:.3f} "
            f"| {'all' if row['answers_equal'] else 'NOT ALL'} |"
        )
    lines += [
        "",
        "64 clients with 64 prompts at the same moment, half of them streaming.",
        "",
        "| served | tokens per second | p50, s | p95, s | answers equal `generate`'s |",
        "|---|---|---|---|---|",
    ]
    for row in found["many_clients"]:
        lines.append(
            f"| {_way(row)} | {row['tokens_per_second']:.0f} | {row['p50_seconds']:.2f} | {row['p95_seconds']:.2f} "
            f"| {row['answers_equal']} of {row['answers']} ({row['different_answers']} different) |"
        )
    return "\n".join(lines) + "\n"


def _way(row: dict[str, Any]) -> str:
    return "in batches" if row["continuous_batching"] else "one after the other"


def measure(tokens: int, rounds: int, load_tokens: int, load_rounds: int, clients: int = 64) -> dict[str, Any]:
    """Everything that the report holds."""
    prompts = [row["prompt"] for row in make_suite("fact8tag", 0).test[:clients]]
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_bundle(Path(folder))
        load = os.getloadavg()[0]
        return {
            "machine": f"{os.cpu_count()} CPU cores, one thread each for server and `generate`; load average {load:.1f} at the start",
            "versions": {"torch": torch.__version__, "openai": openai.__version__},
            "tokens": tokens,
            "rounds": rounds,
            "load_tokens": load_tokens,
            "one_client": one_client(bundle, prompts, tokens, rounds),
            "many_clients": many_clients(bundle, prompts, load_tokens, load_rounds),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--load-tokens", type=int, default=32)
    parser.add_argument("--load-rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(given.tokens, given.rounds, given.load_tokens, given.load_rounds)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "serve.json").write_text(json.dumps(found, indent=1) + "\n")
    (given.output / "serve.md").write_text(as_markdown(found))
    print(as_markdown(found))


if __name__ == "__main__":
    main()
