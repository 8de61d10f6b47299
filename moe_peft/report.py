"""The routing report: which expert answers which domain, layer by layer, as a table, a picture and JSON.

Never pooled over layers: one collapsed router hides behind the average of the others.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from moe_peft.errors import refuse
from moe_peft.merge import on_device, routed_layers
from moe_peft.pictures import pyplot
from moe_peft.watch import DEAD_SHARE, active_experts


class RouterHealth(NamedTuple):
    """One router over some text; K slots per token, E experts.

    Attributes:
        load: `[E]` share of the slots that each expert got, summing to 1.
        entropy: of a token's probabilities, averaged and divided by log E: 0 is certain, 1 is undecided.
        max_load: the largest share times E: 1 when even, E when one expert gets everything.
        dead: number of experts below `DEAD_SHARE` of an even share; null ones, which nothing is lost by, are not counted.
        domain_information: mutual information of expert and domain over the entropy of the domains: 0 when the
            expert says nothing of the domain, 1 when it names it. 0 with fewer than two domains.
        active: experts that a token chose, null ones left out, on average; None where every token chooses as many.
    """

    load: list[float]
    entropy: float
    max_load: float
    dead: int
    domain_information: float
    active: float | None = None


class RoutingReport(NamedTuple):
    """Everything that the report shows.

    Attributes:
        domains: the names given, in order.
        counts: layer name -> slots by domain and expert, `[D][E]`; summed probabilities where a token visits all experts.
        health: layer name -> [`RouterHealth`].
        experts: the names of the choices, where they have any: the domains of named experts, then "null".
    """

    domains: list[str]
    counts: dict[str, list[list[float]]]
    health: dict[str, RouterHealth]
    experts: list[str] | None = None

    def save(self, path: Path) -> None:
        """Write as JSON, in place of whatever was there, in one step."""
        content = {
            "domains": self.domains,
            **({"experts": self.experts} if self.experts else {}),
            "layers": {
                name: {**health._asdict(), "counts": self.counts[name]} for name, health in self.health.items()
            },
        }
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1))
        temporary.replace(path)

    def most_telling_layer(self) -> str:
        """The layer whose experts tell the domains apart best (the most even one without domains)."""
        return max(self.health, key=lambda name: (self.health[name].domain_information, -self.health[name].max_load))


@torch.no_grad()
def routing_report(
    model: nn.Module,
    batches: Mapping[str, Iterable[dict[str, Any]]],
    adapter_name: str = "default",
    answers_only: bool = False,
) -> RoutingReport:
    """Route text of each domain and count where its tokens go.

    Args:
        model: with the adapter active; left in the mode it was in.
        batches: domain name -> batches for `model(**batch)`; padding is not counted.
        answers_only: count only the positions that predict a token with a label. Prompts of one format route much
            alike; where the answer is made, experts differ most.

    Raises:
        ValueError: if the model holds no such adapter, or none of its layers has a choice of experts.
    """
    layers = routed_layers(model, adapter_name)
    experts = {name: layer.experts(adapter_name) for name, layer in layers.items()}
    experts = {name: e for name, e in experts.items() if getattr(e, "routes", False)}
    routing = getattr(next(iter(layers.values())).experts(adapter_name), "routing", None)
    if not experts and routing in ("given", "random"):
        raise refuse(
            "routing", routing, "one with a router for a report", "There is no router whose choices could be shown."
        )
    if not experts:
        raise ValueError(
            f"Adapter '{adapter_name}' has one expert in every layer, or a method without a router, so nothing is routed and "
            "there is nothing to report. It is a plain LoRA: `merge_and_unload()` folds it into the base."
        )
    context = next(iter(layers.values())).context
    counts: dict[str, list[Tensor]] = {name: [] for name in experts}
    entropy: dict[str, list[Tensor]] = {name: [] for name in experts}
    was_training, was_recording = model.training, context.recording
    model.eval()
    context.recording = True
    try:
        for domain, texts in batches.items():
            for e in experts.values():
                e.state.reset()
            for batch in texts:
                batch = on_device(batch, model)
                context.counted = _predicting(batch, domain) if answers_only else None
                model(**batch)
            for name, e in experts.items():
                if e.state.counts is None or e.state.entropy is None or e.state.tokens is None:
                    raise ValueError(f"Domain '{domain}' has no text. Give at least one batch for it.")
                # Where every token visits all experts, only how it weighs them says anything.
                all_alike = bool((e.state.counts == e.state.tokens).all())
                counts[name].append((e.state.probability if all_alike else e.state.counts).double().cpu())
                entropy[name].append(torch.stack((e.state.entropy, e.state.tokens)).double().cpu())
                e.state.reset()
    finally:
        context.recording, context.counted = was_recording, None
        model.train(was_training)
    tables = {name: torch.stack(rows) for name, rows in counts.items()}
    health = {name: _health(experts[name], table, torch.stack(entropy[name]).sum(0)) for name, table in tables.items()}
    counted = {name: table.tolist() for name, table in tables.items()}
    return RoutingReport(list(batches), counted, health, _names(next(iter(experts.values()))))


def _names(experts: Any) -> list[str] | None:
    domains = getattr(experts, "domains", None)
    return None if not isinstance(domains, list) else [*domains, *["null"] * (experts.num_experts - len(domains))]


def _predicting(batch: dict[str, Any], domain: str) -> Tensor:
    """The positions whose next token has a label, `[B, S]`."""
    if "labels" not in batch:
        raise ValueError(
            f"`answers_only` is True, but domain '{domain}' has no `labels`. Give them, or set it to False."
        )
    wanted = batch["labels"][:, 1:] != -100
    return torch.cat((wanted, torch.zeros_like(wanted[:, :1])), dim=1)


def _health(router: Any, counts: Tensor, entropy_and_tokens: Tensor) -> RouterHealth:
    num_experts = counts.shape[1]
    load = counts.sum(0) / counts.sum()
    return RouterHealth(
        load=load.tolist(),
        entropy=float(entropy_and_tokens[0] / entropy_and_tokens[1] / math.log(num_experts)),
        max_load=float(load.max() * num_experts),
        dead=int((load[: num_experts - router.num_null] * num_experts < DEAD_SHARE).sum()),
        domain_information=domain_information(counts),
        active=active_experts(router, counts.sum(0).tolist(), float(entropy_and_tokens[1])),
    )


def domain_information(counts: Tensor) -> float:
    """I(domain; expert) / H(domain) with every domain weighted alike, 0..1.

    Args:
        counts: `[D, E]`.
    """
    if counts.shape[0] < 2:
        return 0.0
    conditional = counts / counts.sum(1, keepdim=True).clamp(min=1e-30)  # P(expert | domain)
    marginal = conditional.mean(0)
    ratio = (conditional / marginal.clamp(min=1e-30)).clamp(min=1e-30).log()
    return float((conditional * ratio).sum(1).mean() / math.log(counts.shape[0]))


def verdict(report: RoutingReport) -> str:
    """The report in one sentence: whether the experts follow the domains, by the router that tells most."""
    if len(report.domains) < 2:
        return "One domain: the picture shows how evenly its tokens are shared out."
    told = report.health[report.most_telling_layer()].domain_information
    if told > 0.3:
        return f"The experts follow the domains: one choice of expert tells {told:.0%} of which domain it is."
    if told > 0.05:
        return f"The experts follow the domains in part: one choice of expert tells {told:.0%} of which domain it is."
    return f"The experts do not follow the domains ({told:.0%} told at best): they share out tokens by something else, as routers by token mostly do."


def health_verdict(report: RoutingReport) -> str:
    """Whether the routers are healthy on this text, in one sentence."""
    dead = {name: h.dead for name, h in report.health.items() if h.dead}
    busiest = max(report.health, key=lambda name: report.health[name].max_load)
    times = f"{report.health[busiest].max_load:.1f} times an even share ({short_name(busiest)})"
    if not dead:
        return f"Healthy: every router uses all of its experts on this text; the busiest expert of all gets {times}."
    worst = max(dead, key=lambda name: dead[name])
    cure = (
        "In training a larger `router_aux_loss_coef`, a lower learning rate or more steps bring experts in; `moe-peft shrink` "
        "cuts them out."
    )
    if report.experts:
        cure = "Give text of every domain (`--by`): an expert that its own domain's text does not reach has a gate that fails."
    return (
        f"{len(dead)} of {len(report.health)} routers have experts that this text hardly visits, {sum(dead.values())} in all, "
        f"most of them in {short_name(worst)}; the busiest expert of all gets {times}. {cure}"
    )


def health_table(report: RoutingReport) -> Table:
    """One row per router, for a terminal."""
    table = Table(
        title="Routers, layer by layer",
        caption="load: share of each expert, in percent; busiest: 1 is even; domain: how far the expert tells it"
        + ("; active: experts per token" if any(h.active is not None for h in report.health.values()) else "")
        + (f"; experts: {', '.join(report.experts)}" if report.experts else ""),
    )
    table.add_column("layer", no_wrap=True)
    table.add_column("load", justify="right", no_wrap=True)
    free = any(h.active is not None for h in report.health.values())
    for title in ("busiest", "entropy", "dead", "domain", *(["active"] if free else [])):
        table.add_column(title, justify="right")
    for name, h in report.health.items():
        load = " ".join(f"{100 * share:2.0f}" for share in h.load)
        dead = f"[red]{h.dead}[/red]" if h.dead else "0"
        numbers = f"{h.max_load:.2f}", f"{h.entropy:.2f}", dead, f"{100 * h.domain_information:.0f} %"
        active = [] if not free else ["" if h.active is None else f"{h.active:.2f}"]
        table.add_row(short_name(name), load, *numbers, *active)
    return table


def short_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj` -> `3 mlp.up_proj`; a name without a layer number is kept."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return " ".join((part, ".".join(parts[position + 1 :])))
    return name


def heat_map(report: RoutingReport, path: Path, title: str = "Which expert answers which domain") -> None:
    """Draw the report as a PNG: the most telling router large, every router small.

    Experts are put in the order that brings the domains they serve to the diagonal, so that separation is seen as a
    diagonal and mixing as a flat field.

    Raises:
        ImportError: without matplotlib and scipy (`pip install matplotlib scipy`).
    """
    plt = pyplot()
    best = report.most_telling_layer()
    layers, projections, values = _grid(report)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), width_ratios=(1.15, 1), layout="constrained")
    figure.suptitle(f"{title}\n{verdict(report)}", fontsize=13, fontweight="bold")
    _draw_domains(figure, left, report, best)
    image = right.imshow(values, cmap="Blues", vmin=0, vmax=max(0.2, float(values[values == values].max())))
    right.set_xticks(range(len(projections)), projections, rotation=30, ha="right")
    right.set_yticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    right.set_title("How well each router tells the domains apart\n(0 = not at all, 1 = each has its own experts)")
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            value = float(values[row, column])
            if value == value:
                shade = "white" if value > 0.6 * image.norm.vmax else "black"
                right.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9, color=shade)
    dead = sum(h.dead for h in report.health.values())
    even = max(h.max_load for h in report.health.values())
    right.set_xlabel(
        f"dead experts: {dead} of {sum(len(h.load) for h in report.health.values())}; "
        f"busiest expert of any router: {even:.1f} x its even share"
    )
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(path)


def _draw_domains(figure: Any, axes: Any, report: RoutingReport, layer: str) -> None:
    from scipy.optimize import linear_sum_assignment

    counts = torch.tensor(report.counts[layer])
    share = counts / counts.sum(1, keepdim=True).clamp(min=1e-30)
    _, chosen = linear_sum_assignment(-share.numpy())
    order = [*chosen.tolist(), *(e for e in range(share.shape[1]) if e not in set(chosen.tolist()))]
    image = axes.imshow(share[:, order], cmap="viridis", vmin=0, aspect="auto")
    axes.set_xticks(
        range(len(order)), [report.experts[expert] if report.experts else f"E{expert}" for expert in order]
    )
    axes.set_yticks(range(len(report.domains)), report.domains)
    axes.set_xlabel("expert (ordered so that a domain's own expert is on the diagonal)")
    axes.set_ylabel("domain")
    axes.set_title(f"{short_name(layer)}: share of a domain's tokens that each expert gets")
    figure.colorbar(image, ax=axes, format=lambda value, _: f"{100 * value:.0f} %")


def _grid(report: RoutingReport) -> tuple[list[str], list[str], Tensor]:
    """Layers x projections of the domain information; NaN where a layer has no such router."""
    places = [short_name(name).split(" ", 1) if " " in short_name(name) else ["0", name] for name in report.health]
    layers = list(dict.fromkeys(layer for layer, _ in places))
    projections = list(dict.fromkeys(projection for _, projection in places))
    values = torch.full((len(layers), len(projections)), float("nan"))
    for (layer, projection), health in zip(places, report.health.values(), strict=True):
        values[layers.index(layer), projections.index(projection)] = health.domain_information
    return layers, projections, values
