"""What the routers of a model did, read from their states: loads averaged over ranks, windows for the log, collapse.

The sums live on the routers' devices; `read_windows` brings those of all layers to the host at once.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_peft.tuners.router import Router


COLLAPSED = 0.9
"""A router has collapsed when its K busiest experts are this far from an even share towards taking every token.

With s the share of all slots that the K busiest experts get, the measure is (s - K/E) / (1 - K/E): 0 when even, 1 when
the other E - K experts get nothing. With every expert in use (K = E), s is the largest weight and K counts as 1.
"""

COLLAPSE_TOKENS = 100
"""Tokens per expert that a logging window must hold before a router is called collapsed: one prompt proves nothing."""

DEAD_SHARE = 0.01
"""An expert is dead when it gets less than this share of what it would get if all were used evenly."""


class RouterWindow(NamedTuple):
    """What one router did between two log lines, over all ranks.

    Attributes:
        load: `E` numbers, the share of the slots that each expert got, summing to 1.
        entropy: of a token's probabilities, averaged and divided by log E: 0 is certain, 1 is undecided.
        balance: the Switch loss of the window: 1 when even, whatever the balance that is trained.
        tokens: how many real tokens were routed.
        active: experts that a token chose, null ones left out, on average; None where every token chooses as many.
    """

    load: list[float]
    entropy: float
    balance: float
    tokens: float
    active: float | None = None


def find_routers(model: nn.Module) -> dict[str, Router]:
    """The modules of `model` that route, under the name of the layer that they are on.

    A layer's name is that of the base model; an adapter that is not called "default" is appended.
    """
    routers: dict[str, Router] = {}
    for name, module in model.named_modules():
        if isinstance(module, Router) and module.routes:
            wrappers = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
            parts = [part for part in name.split(".") if part not in wrappers]
            layer = ".".join(parts[:-2]).removeprefix("module.").removeprefix("base_model.model.")
            routers[layer if parts[-1] == "default" else f"{layer}.{parts[-1]}"] = module
    return routers


@torch.no_grad()
def average_loads(routers: dict[str, Router]) -> None:
    """Make the load of every router its mean over the ranks, in one all-reduce; nothing in a single process."""
    balanced = [router for router in routers.values() if router.balances_load]
    if not balanced or not _world_size():
        return
    device = device_of(balanced[0])
    sizes = [router.num_experts for router in balanced]
    # A rank may not have seen a backward pass of some layer; all the same every rank sends as much.
    loads = [_or_zeros(router.state.load, n, device) for router, n in zip(balanced, sizes, strict=True)]
    fused = torch.cat(loads)
    dist.all_reduce(fused)
    for router, load in zip(balanced, (fused / _world_size()).split(sizes), strict=True):
        router.state.load = load.to(device_of(router), copy=True)


def unseen_domains(routers: dict[str, Router]) -> tuple[list[str], list[str]]:
    """Of which domains a gate that labels teach has met samples in training, on any rank, and of which none.

    Both are empty where no gate is taught by labels, or in a compiled model, which does not keep count.
    """
    taught: Any = next((r for r in routers.values() if getattr(r, "supervised", False)), None)
    if taught is None:
        return [], []
    seen = taught.state.types_seen
    if _world_size():
        here = _or_zeros(None if seen is None else seen.float(), len(taught.domains), device_of(taught))
        dist.all_reduce(here)
        seen = here > 0
    marks = [False] if seen is None else seen.tolist()
    if not any(marks):
        return [], []
    domains: list[str] = taught.domains
    met = [name for name, mark in zip(domains, marks, strict=True) if mark]
    return met, [name for name in domains if name not in met]


@torch.no_grad()
def move_biases(routers: Iterable[Router]) -> None:
    """Move every selection bias by what its experts got in the optimizer step that has ended, in one all-reduce.

    `MoeCallback` calls it; a loop of your own calls `update_selection_bias(model)` after `optimizer.step()`.
    """
    balanced = [router for router in routers if router.balances_bias]
    if not balanced:
        return
    device = device_of(balanced[0])
    sizes = [router.num_experts + 1 for router in balanced]
    counts = [_or_zeros(router.state.step_counts, n, device) for router, n in zip(balanced, sizes, strict=True)]
    fused = torch.cat(counts)
    if _world_size():
        dist.all_reduce(fused)
    for router, seen in zip(balanced, fused.split(sizes), strict=True):
        router.move_bias(seen)


def update_selection_bias(model: nn.Module) -> None:
    """One step of loss-free balancing (`balance="bias"`), for a training loop of your own: call it after
    `optimizer.step()`, on every rank."""
    move_biases([module for module in model.modules() if isinstance(module, Router)])


@torch.no_grad()
def read_windows(routers: dict[str, Router]) -> dict[str, RouterWindow]:
    """What each router saw since its sums were last reset, summed over the ranks; those that saw nothing are left out."""
    if not routers:
        return {}
    device = device_of(next(iter(routers.values())))
    sizes = [router.num_experts for router in routers.values()]
    parts = []
    for router, n in zip(routers.values(), sizes, strict=True):
        s = router.state
        parts += [_or_zeros(s.counts, n, device), _or_zeros(s.probability, n, device)]
        parts += [_or_zeros(s.entropy, 1, device), _or_zeros(s.tokens, 1, device)]
    fused = torch.cat(parts)
    if _world_size():
        dist.all_reduce(fused)
    numbers = iter(fused.tolist())
    windows = {}
    for name, n in zip(routers, sizes, strict=True):
        counts, probability = _take(n, numbers), _take(n, numbers)
        entropy, tokens = _take(2, numbers)
        if tokens > 0:
            load = [count / sum(counts) for count in counts]
            balance = n * sum(f * p / tokens for f, p in zip(load, probability, strict=True))
            active = active_experts(routers[name], counts, tokens)
            windows[name] = RouterWindow(load, entropy / tokens / math.log(n), balance, tokens, active)
    return windows


def active_experts(router: Router, counts: list[float], tokens: float) -> float | None:
    """How many experts a token chose on average, null ones left out; None where every token chooses as many.

    Args:
        counts: by choice, how many tokens chose it; the null experts are the last.
        tokens: how many there were.
    """
    return sum(counts[: router.num_experts - router.num_null]) / tokens if router.chooses_freely else None


def collapse(load: list[float], top_k: int) -> float:
    """How far a router is from even use (0) towards `top_k` experts taking everything (1); see `COLLAPSED`."""
    k = top_k if top_k < len(load) else 1
    even = k / len(load)
    return (sum(sorted(load)[-k:]) - even) / (1 - even)


def _take(n: int, numbers: Iterator[float]) -> list[float]:
    return [next(numbers) for _ in range(n)]


def _or_zeros(value: Tensor | None, size: int, device: torch.device) -> Tensor:
    if value is None:
        return torch.zeros(size, device=device)
    return value.detach().reshape(size).to(device, torch.float32)


def device_of(router: Router) -> torch.device:
    """Where the router's state is, or will be."""
    seen = router.state.counts if router.state.load is None else router.state.load
    return next(router.parameters()).device if seen is None else seen.device


def _world_size() -> int:
    """How many ranks there are to agree with; 0 for a single process."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else 0
