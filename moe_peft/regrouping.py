"""Fewer experts under the same router: experts that are used alike are merged, and their choices share the result.

MC-SMoE (arXiv:2310.01334), read with its released code: of each layer the most used experts are dominant; every other
one joins the dominant expert that it is most like; a group becomes the mean of its experts, weighted by usage; the router
is left as it is, and the choices of a group stand for one expert.

    "router"    likeness: the cosine of two experts' logits over the calibration tokens (the paper's choice)
    "outputs"   the cosine of their outputs over those tokens (Sub-MoE, arXiv:2506.23266)

Linear experts need no alignment: their products B_e A_e live in one basis. So a group is merged as a sum of products,
W = sum_e B_e Z_e [A_1; A_2; ..], and cut back to rank r where its output on the group's own tokens suffers least. Z is

    "usage"   the published mean: usage_e / sum usage on the diagonal
    "lstsq"   the least squares from calibration text, min sum_t |sum_e g_te E_e(x_t) - w_t W x_t|^2, w = sum_e g_te

Departures from the release: usage is the summed weight and not the count of choices, so that rules that use all experts can
be grouped; the number of groups is given by layer, where the release finds it with one threshold for all layers; there
is no further compression of the merged experts.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from moe_peft.errors import nearest, refuse
from moe_peft.merge import Batch, observing, on_device
from moe_peft.resizing import chosen_layers, refit, resizable_layers, with_counts
from moe_peft.routing import routing_dtype
from moe_peft.tuners.base import layer_place
from moe_peft.tuners.linear_moe import LinearMoeLinear, RoutedLora


SIMILARITIES = ("router", "outputs")
MERGES = ("usage", "lstsq")


class GroupedLayer(NamedTuple):
    """One line of what `group_experts` does.

    Attributes:
        layer: the module's name.
        groups: numbers of the experts before, the dominant one of each group first.
        share: of the layer's summed usage, what the dominant experts have.
    """

    layer: str
    groups: list[list[int]]
    share: float


class _Groups(NamedTuple):
    """How one layer is grouped: the experts of each group, its dominant first; each choice's group `[N]`; the share."""

    groups: list[list[int]]
    of: Tensor
    share: float


def group_experts(
    model: PeftModel,
    calibration: Iterable[Batch],
    groups: int | dict[int, int],
    similarity: str = "router",
    merge: str = "usage",
    dry_run: bool = False,
    adapter_name: str = "default",
) -> list[GroupedLayer]:
    """Merge the experts of each layer into fewer, in place; the router and `num_experts` stay, `num_distinct_experts` is set.

    An expert that forms a group by itself keeps its weights bit for bit; so do router, shared and constant experts. An
    A that all experts share stays as it is too, and the mean of the Bs is exact. Experts that were frozen are free
    afterwards. Make a new optimizer before training on; balance goes on over the router's choices.

    Args:
        model: with a LINEAR_MOE adapter, active.
        calibration: batches for `model(**batch)`, read twice; a generator is kept in memory.
        groups: how many experts each layer is left with, for all or by layer number.
        similarity: "router" or "outputs"; see the module.
        merge: "usage" or "lstsq"; see the module.
        dry_run: return the table and change nothing.

    Returns:
        a line for each module that loses experts.

    Raises:
        ValueError: unknown words, more groups than experts, no text, another adapter type, an adapter grouped before.
        RuntimeError: while a trainer runs on the model.
    """
    for field, value, allowed in (("similarity", similarity, SIMILARITIES), ("merge", merge, MERGES)):
        if value not in allowed:
            raise refuse(field, value, " or ".join(map(repr, allowed)), nearest(str(value), allowed))
    layers = resizable_layers(model, adapter_name, "Grouping experts", blocks=False)
    config = model.peft_config[adapter_name]
    if config.routing in ("random", "given"):
        raise refuse("routing", config.routing, "one with a router", "No choice of a token could be grouped by.")
    wanted = _wanted(model, groups, {name: layer.num_experts[adapter_name] for name, layer in layers.items()})
    smaller = {
        name: layers[name] for name, number in wanted.items() if number < layers[name].num_experts[adapter_name]
    }
    new_config = with_counts(model, config, wanted, "num_distinct_experts")
    batches = list(calibration)
    found = {
        name: _grouped(usage, likeness, wanted[name])
        for name, (usage, likeness) in _likeness(model, smaller, batches, adapter_name, similarity).items()
    }
    merged = _merged(model, smaller, batches, adapter_name, found, merge)
    if not dry_run:
        config.num_distinct_experts = new_config.num_distinct_experts
        for name, layer in layers.items():
            refit(layer, adapter_name, new_config, layer.num_experts[adapter_name], _with(merged.get(name)))
            if name in found:
                layer.experts(adapter_name).expert_map.copy_(found[name].of)
    return [GroupedLayer(name, group.groups, group.share) for name, group in found.items()]


def _wanted(model: PeftModel, groups: int | dict[int, int], counts: dict[str, int]) -> dict[str, int]:
    """Experts that each module is left with."""
    wanted = dict(counts)
    for name in chosen_layers(model, counts, groups if isinstance(groups, dict) else None, "groups"):
        place = layer_place(name)
        number = groups[place[1]] if isinstance(groups, dict) and place is not None else groups
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            allowed = "a whole number of at least 1, or such numbers by layer"
            raise refuse("groups", groups, allowed, "A quarter of the experts is what MC-SMoE keeps.")
        if number > counts[name]:
            raise refuse(
                "groups", groups, f"at most {counts[name]}, the experts of {name}", "Name fewer, or that layer not."
            )
        wanted[name] = number
    return wanted


@torch.no_grad()
def _read(
    model: PeftModel,
    layers: dict[str, LinearMoeLinear],
    batches: list[Batch],
    adapter_name: str,
    add: Callable[[str, RoutedLora, Tensor, Tensor, Tensor], None],
) -> None:
    """Call `add(name, experts, x, gates, logits)` with every layer's real tokens: `[T, d_in]`, `[T, E]`, `[T, E]`."""
    seen = 0

    def see(name: str, experts: RoutedLora, x: Tensor, y: Tensor, gates: Tensor, real: Tensor | None) -> None:
        nonlocal seen
        logits = experts._route(x, layers[name].context).router_logits[:, : experts.num_routed]
        x = x.reshape(-1, x.shape[-1])
        if real is not None:
            x, gates, logits = x[real], gates[real], logits[real]
        add(name, experts, x.to(routing_dtype(x.dtype)), gates[:, : experts.num_routed], logits)
        seen += len(x)

    with observing(model, layers, adapter_name, see):
        for batch in batches:
            model(**on_device(batch, model))
    if layers and not seen:
        raise ValueError(
            "The calibration text reached no expert. Give at least a few batches, and call "
            f"`model.set_adapter('{adapter_name}')` if another adapter is active."
        )


def _likeness(
    model: PeftModel, layers: dict[str, LinearMoeLinear], batches: list[Batch], adapter_name: str, similarity: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name -> (usage `[E]`, likeness `[E, E]` from -1 to 1), in fp64 on the CPU."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(name: str, experts: RoutedLora, x: Tensor, gates: Tensor, logits: Tensor) -> None:
        inner = (logits.T @ logits) if similarity == "router" else output_products(experts, x)
        usage, products = sums.get(name, (0.0, 0.0))
        sums[name] = usage + gates.sum(0).double().cpu(), products + inner.double().cpu()

    _read(model, layers, batches, adapter_name, add)
    found = {}
    for name, (usage, products) in sums.items():
        norms = products.diagonal().clamp(min=1e-30).sqrt()
        found[name] = usage, products / norms / norms.unsqueeze(1)
    return found


def output_products(experts: RoutedLora, x: Tensor) -> Tensor:
    """`sum_t <E_i(x_t), E_j(x_t)>` of the routed experts, `[E, E]`; no output is ever formed."""
    n = experts.num_routed
    A, B = experts.lora_A.to(x.dtype).expand(len(experts.lora_B), -1, -1)[:n], experts.lora_B[:n].to(x.dtype)
    hidden = torch.einsum("td,erd->ter", x, A)
    moments = torch.einsum("tir,tjs->irjs", hidden, hidden)
    return torch.einsum("irjs,ird,jsd->ij", moments, B, B)


def _grouped(usage: Tensor, likeness: Tensor, number: int) -> _Groups:
    """The `number` most used are dominant; every other expert joins the dominant one that it is most like."""
    dominant = usage.argsort(descending=True, stable=True)[:number].sort().values
    of = likeness[:, dominant].argmax(1)
    of[dominant] = torch.arange(number)
    groups = [[int(d)] for d in dominant]
    for expert in range(len(usage)):
        if expert not in dominant.tolist():
            groups[int(of[expert])].append(expert)
    total = float(usage.sum())
    return _Groups(groups, of, float(usage[dominant].sum()) / total if total else 1.0)


class _Sums:
    """What merging one layer's groups needs; h holds the hidden values of a group's experts, n ranks in all.

    S `[n, n]` = sum w^2 h h', M `[n, n]` = sum w (g * h) h', by group; usage `[E]` = sum g.
    """

    def __init__(self) -> None:
        self.S: dict[int, Tensor] = {}
        self.M: dict[int, Tensor] = {}
        self.usage: Tensor = torch.zeros(())

    def add(self, experts: RoutedLora, x: Tensor, gates: Tensor, groups: list[list[int]]) -> None:
        A = experts.lora_A.to(x.dtype).expand(len(experts.lora_B), -1, -1)
        gates = gates.to(x.dtype)
        for number, group in enumerate(groups):
            hidden = x @ A[group].flatten(0, 1).T
            weighted = hidden * gates[:, group].repeat_interleave(experts.r, dim=1)
            shared = hidden * gates[:, group].sum(1, keepdim=True)
            self.S[number] = self.S.get(number, 0.0) + (shared.T @ shared).double()
            self.M[number] = self.M.get(number, 0.0) + (weighted.T @ shared).double()
        self.usage = self.usage.to(gates.device) + gates.sum(0).double()


def _merged(
    model: PeftModel,
    layers: dict[str, LinearMoeLinear],
    batches: list[Batch],
    adapter_name: str,
    found: dict[str, _Groups],
    merge: str,
) -> dict[str, dict[str, Tensor]]:
    """Module name -> its new lora_A and lora_B."""
    sums = {name: _Sums() for name in layers}

    def add(name: str, experts: RoutedLora, x: Tensor, gates: Tensor, logits: Tensor) -> None:
        sums[name].add(experts, x, gates, found[name].groups)

    _read(model, layers, batches, adapter_name, add)
    return {
        name: _merged_layer(layer.experts(adapter_name), found[name].groups, sums[name], merge)
        for name, layer in layers.items()
    }


@torch.no_grad()
def _merged_layer(experts: RoutedLora, groups: list[list[int]], sums: _Sums, merge: str) -> dict[str, Tensor]:
    n, one_A = experts.num_routed, len(experts.lora_A) == 1
    old_A, old_B = experts.lora_A.double(), experts.lora_B.double()
    new_A, new_B = [], []
    for number, group in enumerate(groups):
        shares = _shares(sums.usage, group)
        if one_A or len(group) == 1:
            a, b = old_A[0 if one_A else group[0]], torch.einsum("e,erd->rd", shares, old_B[group])
        else:
            mean = torch.diag(shares.repeat_interleave(experts.r))
            Z = mean if merge == "usage" else _least_squares(sums.S[number], sums.M[number], mean)
            a, b = cut(old_A[group].flatten(0, 1), old_B[group].flatten(0, 1), Z, sums.S[number], experts.r)
        new_A.append(a)
        new_B.append(b)
    A = old_A if one_A else torch.cat((torch.stack(new_A), old_A[n:]))
    return {"lora_A": A.to(experts.lora_A), "lora_B": torch.cat((torch.stack(new_B), old_B[n:])).to(experts.lora_B)}


def _shares(usage: Tensor, group: list[int]) -> Tensor:
    """Of the group's usage what each of its experts has; equal where no token came."""
    of_group = usage[group]
    total = of_group.sum()
    return of_group / total if total > 0 else torch.full_like(of_group, 1 / len(group))


def _least_squares(S: Tensor, M: Tensor, mean: Tensor, ridge: float = 1e-4) -> Tensor:
    """`M S^-1`, drawn to the mean where the text says little."""
    weight = ridge * S.diagonal().mean().clamp(min=1e-12)
    damped = S + weight * torch.eye(len(S), dtype=S.dtype, device=S.device)
    return torch.linalg.solve(damped, M + weight * mean, left=False)


def cut(A: Tensor, B: Tensor, Z: Tensor, S: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The rank-r factors a `[r, d_in]`, b `[r, d_out]` whose `b' a x` is closest to `B' Z A x` where A x has moments S.

    Args:
        A, B: `[n, d_in]` and `[n, d_out]`, fp64.
        Z: `[n, n]`.
        S: `[n, n]`, of A x over the tokens that count.
    """
    values, vectors = torch.linalg.eigh(S)
    values = values.clamp(min=1e-6 * float(values.mean().clamp(min=1e-12)))  # the text may not span A x
    root, inverse_root = vectors * values.sqrt(), (vectors / values.sqrt()).T  # root @ root.T = S
    Q, R = torch.linalg.qr(B.T)
    U, sigma, Vh = torch.linalg.svd(R @ Z @ root, full_matrices=False)
    a, b = Vh[:r] @ inverse_root @ A, (Q @ U[:, :r] * sigma[:r]).T
    size = (b.norm(dim=1) / a.norm(dim=1).clamp(min=1e-30)).clamp(min=1e-30).sqrt().unsqueeze(1)
    a, b = a * size, b / size  # as large as each other, so that both can go on learning
    missing = r - len(a)
    return torch.cat((a, A[:missing])) if missing > 0 else a, torch.nn.functional.pad(b, (0, 0, 0, max(missing, 0)))


def _with(new: dict[str, Tensor] | None) -> Callable[[str, Tensor], Tensor]:
    """Tensors for `refit`: the new ones by name, the rest as they were."""
    return lambda name, old: (new or {}).get(name, old).detach().clone()
