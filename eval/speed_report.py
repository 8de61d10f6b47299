"""From measured seconds to tables and verdicts; the machine's ceilings, and how near to them a step comes."""

import math
import os
import platform
import statistics
from importlib import metadata
from pathlib import Path

import torch
from speed_contenders import BALANCED, BASE, DENSE, LORA, OURS
from speed_ffn import FFN_ARITHMETIC, ffn_arithmetic_ratios, ffn_roofline_seconds, ffn_verdicts, same_function
from speed_ranks import RANK_ARITHMETIC, rank_arithmetic_ratios, rank_verdicts
from speed_shared import DTYPES, EXPERTS, RANK, TOP_K, Case, FfnCase, ModelCase, RankCase, seconds


TARGETS = [
    ("train bf16 4096→4096", OURS, "at most", 1.05),
    ("train bf16 1024→1024", OURS, "at most", 1.20),
    ("train fp32 1024→1024", OURS, "at most", 1.30),
    ("decode", OURS, "at most", 1.25),
    ("model", BALANCED, "at most", 1 / 0.80),
    ("model", DENSE, "at most", 1 / 0.80),
]
"""Start of a case's name, contender, and what its time over that of PEFT's LoRA is to be."""


ARITHMETIC = [
    "The column `arithmetic` is the ratio of the products' operations alone. With n = 128 ranks in 8 experts and m = 8 rows",
    "of router against LoRA's 32 ranks, a layer d → o has",
    "(2do + 3((n + m)d + no)) / (2do + 3·32(d + o)) in training and (do + (n + m)d + no) / (do + 32(d + o)) in decoding; a",
    "whole model adds its attention scores and its head to both sides. Every expert is computed for every token: that costs",
    "nothing where a byte costs more than a hundred operations, as a GPU's does on paper, and its full price where it costs",
    "ten. There a layer can be faster than this ratio only by what LoRA spends on passes over wide tensors, a few per cent.",
    "A short decoding step waits for calls as well, which the ratio does not count.",
]


def describe_machine() -> dict:
    """What the figures depend on: processor, versions, load, and what the machine can do at best."""
    packages = ("torch", "peft", "transformers", "bitsandbytes")
    cpu = next(
        (line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")), platform.machine()
    )
    flags = next((line.split(":")[1].split() for line in _cpu_lines() if line.startswith("flags")), [])
    machine = {
        "cpu": cpu,
        "bf16": [flag for flag in ("amx_bf16", "avx512_bf16", "avx_ne_convert") if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "ceilings": {"cpu": ceilings("cpu")},
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
        machine["ceilings"]["cuda"] = ceilings("cuda")
    return machine


def _cpu_lines() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text().splitlines() if info.exists() else []


def ceilings(device: str) -> dict[str, float]:
    """Measured best: floating-point operations per second of a large product, bytes per second of a copy."""
    size, best = (2048 if device == "cpu" else 8192), {}
    for name, dtype in DTYPES.items():
        a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
        best[name] = 2 * size**3 / _fastest(lambda a=a, b=b: a @ b, device)
    source = torch.zeros(2**28, dtype=torch.float32 if device == "cuda" else torch.uint8, device=device)
    target = torch.zeros_like(source)
    best["bytes"] = 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)
    return best


def _fastest(step, device: str) -> float:
    step()
    return min(seconds(step, device) for _ in range(5))


def roofline_seconds(case: Case | FfnCase | ModelCase | RankCase, ceiling: dict[str, float]) -> dict[str, float]:
    """The least time that a step can take on this machine, by contender: its arithmetic or its traffic at full speed.

    Counted as if everything were fused: per pass, x and W are read and y is written once; in training dy and W are read,
    dx is written, and x is read again for the factors' gradients. The factors are read once a pass and their gradients
    written once. Decoding reads what the method can do with: a routed layer the chosen experts only.
    """
    if isinstance(case, (ModelCase, RankCase)):
        return {}
    if isinstance(case, FfnCase):
        return ffn_roofline_seconds(case, ceiling)
    train, size = case.kind == "train", DTYPES[case.dtype].itemsize
    weight = case.d_in * case.d_out * (0.53 if case.nf4 else size)  # NF4: 4 bits and a scale for each 64 values
    wide = case.tokens * (case.d_in + case.d_out) * size
    floors = {}
    every = EXPERTS * RANK
    ranks = {BASE: (0, 0), LORA: (TOP_K * RANK,) * 2, OURS: (TOP_K * RANK, every), DENSE: (every, every)}
    for name, (active, stored) in ranks.items():
        read = stored if train else min(stored, active * case.tokens)
        factors = read * (case.d_in + case.d_out) * size
        again = case.tokens * case.d_in * size if train and active else 0
        operations = 2 * case.tokens * case.d_in * case.d_out * (2 if train else 1)
        operations += 2 * case.tokens * active * (case.d_in + case.d_out) * (3 if train else 1)
        traffic = (weight + wide) * (2 if train else 1) + again + factors * (3 if train else 1)
        floors[name] = max(operations / ceiling[case.dtype], traffic / ceiling["bytes"])
    return floors


def arithmetic_ratios(case: Case | FfnCase | ModelCase | RankCase) -> dict[str, float]:
    """What the products of each method alone make of its time over LoRA's, where only arithmetic counts.

    Per token a frozen linear layer takes `d * o` multiply-adds a pass, and factors of n ranks, of which A holds m rows
    more for the router, take `(n + m) * d + n * o`. Training passes the frozen layer twice (y and dx) and the factors
    three times (their gradients as well). A routed layer computes all its experts for every token, so its ratio is
    above 1 on any machine that is not held up by memory; a GPU is, up to some hundred ranks (see the ceilings).
    Of a whole model the attention scores and the head are counted too: they are the same for all.
    """
    if isinstance(case, FfnCase):
        return ffn_arithmetic_ratios(case)
    if isinstance(case, RankCase):
        return rank_arithmetic_ratios(case)
    frozen, factors, other = _work_of_a_layer(case) if isinstance(case, Case) else _work_of_a_model(case)
    every = EXPERTS * RANK
    ranks = {LORA: (TOP_K * RANK, 0), **dict.fromkeys((OURS, BALANCED, DENSE), (every, EXPERTS))}
    passes = (1, 1) if isinstance(case, Case) and case.kind == "decode" else (2, 3)
    totals = {}
    for name, (rank, rows) in ranks.items():
        inner = sum((rank + rows) * d_in + rank * d_out for d_in, d_out in factors)
        totals[name] = other + passes[0] * frozen + passes[1] * inner
    return {name: total / totals[LORA] for name, total in totals.items() if name != LORA}


def _work_of_a_layer(case: Case) -> tuple[int, list[tuple[int, int]], float]:
    """Multiply-adds per token and pass of the frozen layers, their widths, and all that is the same for everyone."""
    return case.d_in * case.d_out, [(case.d_in, case.d_out)], 0.0


def _work_of_a_model(case: ModelCase) -> tuple[int, list[tuple[int, int]], float]:
    widths = [(case.width, case.width)] * 4 + [(case.width, case.inner)] * 2 + [(case.inner, case.width)]
    frozen = sum(d_in * d_out for d_in, d_out in widths)
    scores = 3 * 2 * case.length * case.width  # two products forward, four backward
    head = 2 * case.width * case.vocabulary / case.layers
    return frozen, widths, scores + head


def summarise(taken: dict[str, list[float]], reference: str, floors: dict[str, float]) -> dict[str, dict[str, float]]:
    """Median and quartiles of the seconds and of the ratio to the reference within each round."""
    summary = {}
    for name, times in taken.items():
        if any(math.isnan(t) for t in times):
            continue  # the rival's process ended on the way
        ratios = [t / r for t, r in zip(times, taken[reference], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        summary[name] = {"seconds": statistics.median(times), "ratio": middle, "ratio_q1": low, "ratio_q3": high}
        if name in floors:
            summary[name]["roofline"] = floors[name] / summary[name]["seconds"]
    return summary


def write_markdown(result: dict) -> str:
    lines = ["# Speed", "", *_runs(result["runs"])]
    lines += [
        "Ratios are times over that of PEFT's LoRA of the same active rank (median of same-round ratios, quartiles in",
        "brackets): below 1 is faster. The roofline is the share of the step's least possible time on this machine.",
        "",
        *ARITHMETIC,
        "",
    ]
    if "ffn" in result["runs"]:
        lines += [*FFN_ARITHMETIC, ""]
    if "rank" in result["runs"]:
        lines += [*RANK_ARITHMETIC, ""]
    lines += _verdicts(result)
    for row in result["cases"]:
        lines += ["", *_table(row)]
    return "\n".join(lines) + "\n"


def _runs(runs: dict[str, dict]) -> list[str]:
    """When and where each kind of rows was measured, those of one run together."""
    lines: list[str] = []
    told: list[dict] = []
    for run in runs.values():
        if run not in told:
            told.append(run)
            lines += [*_run([name for name, other in runs.items() if other == run], run), ""]
    return lines


def _run(rows: list[str], run: dict) -> list[str]:
    machine = run["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    gpu = f" and {machine['gpu']}" if "gpu" in machine else ""
    lines = [
        f"Rows of {', '.join(rows)}: `{run['command']}`, {run['minutes']:.0f} minutes, {run['date']}.",
        f"{machine['cpu']}{gpu} ({', '.join(machine['bf16']) or 'no bf16 instructions'}), {machine['cores']} cores, "
        f"{machine['threads']} thread, load {machine['load'][0]:.1f} at the start; {versions}.",
        *(_ceiling(device, best) for device, best in machine["ceilings"].items()),
        f"Rival: {run['rival'] or 'left out'}.",
    ]
    if run.get("differences"):
        lines.append(same_function(run["differences"]))
    return lines


def _ceiling(device: str, best: dict[str, float]) -> str:
    return (
        f"Ceilings measured on {device}: bf16 {best['bf16'] / 1e9:.0f} GFLOP/s, fp32 {best['fp32'] / 1e9:.0f} GFLOP/s, "
        f"copy {best['bytes'] / 1e9:.1f} GB/s; so {best['bf16'] / best['bytes']:.0f} bf16 operations pay for one byte."
    )


def _verdicts(result: dict) -> list[str]:
    lines = ["| target | asked | measured | arithmetic | |", "|---|---|---|---|---|"]
    for prefix, name, _, limit in TARGETS:
        for row in result["cases"]:
            if row["name"].startswith(prefix) and name in row["summary"]:
                ratio = row["summary"][name]["ratio"]
                verdict = "met" if ratio <= limit else "**missed**"
                alone = f"{row['arithmetic'][name]:.2f}" if name in row.get("arithmetic", {}) else ""
                lines.append(f"| {name}, {row['name']} | ≤ {limit:.2f} | {ratio:.3f} | {alone} | {verdict} |")
    for row in result["cases"]:
        for mine, other in ((BALANCED, "rival mola top-2 of 8"), (DENSE, "rival loramoe dense 8")):
            if row["name"].startswith("model") and other in row["summary"]:
                faster = row["summary"][other]["ratio"] / row["summary"][mine]["ratio"]
                verdict = "met" if faster >= 2 else "**missed**"
                lines.append(f"| {mine} over {other}, {row['name']} | ≥ 2.00 × | {faster:.2f} × | | {verdict} |")
    return lines + ffn_verdicts(result["cases"]) + rank_verdicts(result["cases"])


def _table(row: dict) -> list[str]:
    tokens = row["case"]["rows"] * row["case"]["length"]
    speed = row["name"].startswith("model")
    lines = [
        f"## {row['name']} ({row['rounds']} rounds)",
        "",
        f"| contender | ms | {'tokens/s | ' if speed else ''}ratio to LoRA | {'' if speed else 'roofline | '}",
        f"|---|---|{'---|' if speed else ''}---|{'' if speed else '---|'}",
    ]
    lines = [line.rstrip() for line in lines]
    for name, s in row["summary"].items():
        ratio = f"{s['ratio']:.3f} [{s['ratio_q1']:.3f}, {s['ratio_q3']:.3f}]"
        share = f"{s['roofline']:.0%}" if "roofline" in s else ""
        middle = f"{tokens / s['seconds']:.0f} | {ratio} |" if speed else f"{ratio} | {share} |"
        lines.append(f"| {name} | {1000 * s['seconds']:.3f} | {middle}")
    return lines
