"""How fast pools and splits train beside PEFT's LoRA of the rank that they materialise.

    python eval/bench_shard_pool.py            # some minutes on a CPU; on a GPU it measures there

A stack of frozen layers of one kind that share a pair of pools, forward and backward, the gradient of the input included.
One process, contenders in turn within each round, process CPU time (on a GPU: wall time between synchronisations); a
ratio is the median over rounds of the ratio within one round.
"""

import copy
import statistics
import time
from collections.abc import Callable

from bench_process import start_steady


if __name__ == "__main__":
    start_steady()

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from torch import nn  # noqa: E402

from moe_peft import ShardPoolConfig  # noqa: E402


R, E, SHARDS = 8, 2, 4
LORA = "PEFT LoRA r=8"
CASES = [  # width, layers, tokens, dtype
    (1024, 8, 512, torch.float32),
    (1024, 8, 512, torch.bfloat16),
    (4096, 4, 512, torch.float32),
    (4096, 4, 512, torch.bfloat16),
]
ON_GPU = [(width, 32, tokens, torch.bfloat16) for width in (1024, 4096) for tokens in (512, 4096)]


def contenders(width: int, layers: int, dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    linears = [nn.Linear(width, width, bias=False, device=device, dtype=dtype) for _ in range(layers)]
    lora = LoraConfig(r=R, lora_alpha=16, target_modules=["proj"], init_lora_weights=False)
    shared = {"r": R, "target_modules": ["proj"], "init_weights": False}
    configs = {
        LORA: lora,
        "own, r=8": ShardPoolConfig(**shared),
        "MoS e=2 r=8 l=4": ShardPoolConfig(equivalent_rank=E, shards_per_vector=SHARDS, **shared),
        "MoS e=2 r=32 l=4": ShardPoolConfig(equivalent_rank=E, shards_per_vector=SHARDS, **{**shared, "r": 4 * R}),
        "PEFT LoRA r=32": LoraConfig(r=4 * R, lora_alpha=16, target_modules=["proj"], init_lora_weights=False),
        "MoSA N=4 r=8": ShardPoolConfig(num_splits=4, **shared),
    }
    models = {}
    for name, config in configs.items():
        stack = nn.Sequential()
        for linear in linears:
            block = nn.Module()
            block.proj = linear  # the frozen weights are the same for all
            block.forward = lambda x, block=block: block.proj(x)
            stack.append(block)
        models[name] = get_peft_model(stack, copy.copy(config), autocast_adapter_dtype=False).train()
    return models


def step_of(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        y = model(x)
        torch.autograd.grad(y, [x, *trained], torch.ones_like(y))

    return step


def seconds(step: Callable[[], None], device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(width: int, layers: int, tokens: int, dtype: torch.dtype, device: str, rounds: int) -> dict[str, float]:
    """Name -> median seconds over those of the LoRA of the same rank, in the same round."""
    x = torch.randn(1, tokens, width, device=device, dtype=dtype, requires_grad=True)
    steps = {name: step_of(model, x) for name, model in contenders(width, layers, dtype, device).items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            spent = seconds(step, device)
            if turn >= 2:
                taken[name].append(spent)
    print(f"  {LORA}: {statistics.median(taken[LORA]) * 1e3:.2f} ms")
    of = {name: "PEFT LoRA r=32" if "r=32" in name else LORA for name in taken}
    return {n: statistics.median(a / b for a, b in zip(taken[n], taken[of[n]], strict=True)) for n in taken}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(torch.cuda.get_device_name() if device == "cuda" else "CPU, one thread", "torch", torch.__version__)
    for width, layers, tokens, dtype in ON_GPU if device == "cuda" else CASES:
        print(f"{layers} layers {width} x {width}, {tokens} tokens, {dtype}", flush=True)
        ratios = measure(width, layers, tokens, dtype, device, 31 if device == "cuda" else 9)
        print("  " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()), flush=True)


if __name__ == "__main__":
    main()
