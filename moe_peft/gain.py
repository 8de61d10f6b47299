"""What each layer has to gain from experts and rank: measured on the frozen model, before anything is trained.

Of every linear y = W x that is to be adapted, the inputs x and the loss gradients g at the outputs are seen once over
some text. A change of W by one expert of rank r can lower the loss as far as the g x^T of the tokens agree with one
another (`grouping` has the formula, in nats). E experts may each make a change of their own for a part of the tokens: they
gain more where tokens want different changes. A router is linear in x, so only parts that x tells apart count. The inputs
are clustered first, into `CELLS` cells, few enough for a linear router to tell any groups of them apart; then the cells
are joined by their gradients, step by step, to E groups for every E.

Noise looks like a gain, and more so the more groups there are. So every other batch is held out: groups and directions
come from one half of the text, and what counts is how far the other half agrees with them, both ways round.

Inputs and gradients are seen through random projections to `SKETCH` dimensions (all of them where a layer has fewer), so
that a linear costs 4 CELLS SKETCH^2 numbers however wide it is and however much text is read; no matrix of the size
of a weight is made, and a 4-bit weight is never opened. The text is read twice: for the cells, then for the gradients.
The figures speak of the first steps of training, and a projection sees a part of a wide layer: they rank layers, they do
not foretell losses.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_peft.errors import refuse
from moe_peft.grouping import Sums, gain_table


SKETCH = 32
"""Dimensions of the random projections."""

CELLS = 32
"""Clusters of inputs that experts are made of. `SKETCH` + 1 in general position can be told apart in any grouping."""

_SEEN = 2048
"""Inputs of a site that its cells are found from."""

Batch = Mapping[str, Any]
Progress = Callable[[int, int], None]


class Site(NamedTuple):
    """Linears that one router serves, or one linear without a router.

    Attributes:
        layer: number of the model's layer that it lies in.
        linears: module names; the first `readers` of them read what the router reads.
        readers: how many.
        routed: whether the number of experts concerns it.
    """

    layer: int
    linears: tuple[str, ...]
    readers: int = 1
    routed: bool = True


def measure_gain(
    model: nn.Module,
    batches: Iterable[Batch],
    sites: Sequence[Site],
    max_experts: int,
    progress: Progress | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """The gain table of every site, `[max_experts, ranks]` (of a site without a router `[1, ranks]`).

    Entry `[E - 1, r - 1]` is the gain of E experts of rank r, in nats per token with a label. It is held out, so it may
    fall with E or r, and be below 0 where the text shows no gain.

    Args:
        model: frozen or not, quantised or not; weights, modes and `requires_grad` are as before afterwards.
        batches: keyword arguments for `model`, with `labels`; the result has a `loss`, the mean over the labels. Every
            other batch is held out from the rest, so their order should be random.
        sites: names in `model`.
        max_experts: at most `CELLS`.
        progress: called with (batches done, batches in all), of both readings.
        seed: of the projections and the cells.

    Raises:
        ValueError: no labels, fewer than two batches with any, too many experts, or no gradient reaches the sites.
    """
    if max_experts > CELLS:
        raise refuse("max_experts", max_experts, f"at most {CELLS}, the parts that inputs are told into", "Lower it.")
    batches = list(batches)
    usable = [batch for batch in batches if _num_labels(batch)]
    if len(usable) < 2:
        raise ValueError(
            f"{len(usable)} of {len(batches)} batches of calibration text have labels, but one half of them is held against "
            "the other: at least 2 are needed, and 16 or more are better. Give more text, or smaller batches."
        )
    probes = [_Probe(site, seed) for site in sites]
    with _watching(model, probes):
        for done, batch in enumerate((*usable, *usable)):
            if done == len(usable):
                for probe in probes:
                    probe.find_cells()
            _backward(model, batch, probes, half=done % len(usable) % 2)
            if progress is not None:
                progress(done + 1, 2 * len(usable))
    if not any(probe.sums for probe in probes):
        raise ValueError("No gradient reached the adapted layers: the loss of this model does not depend on them.")
    labels = sum(_num_labels(batch) for batch in usable)
    return [probe.gains(max_experts) / labels for probe in probes]


def _num_labels(batch: Batch) -> int:
    """Tokens that the loss is averaged over: in a causal model nothing predicts the first one."""
    if not isinstance(batch, Mapping):
        remedy = "Each is what the model takes as keyword arguments: `{'input_ids': ..., 'labels': ...}`."
        raise refuse("batches", type(batch).__name__, "of batches that map names to tensors", remedy)
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise ValueError(
            "A batch of calibration text has no `labels`, so there is no loss and no gradient. Add them: a copy of "
            "`input_ids` with -100 where nothing is to be learnt."
        )
    return int((labels[..., 1:] != -100).sum())


def _backward(model: nn.Module, batch: Batch, probes: list["_Probe"], half: int) -> None:
    device = next(model.parameters()).device
    for probe in probes:
        probe.half, probe.scale, probe.cell_of = half, float(_num_labels(batch)), None
    with torch.enable_grad():
        output = model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
        if output.loss.requires_grad:
            output.loss.backward()


@contextmanager
def _watching(model: nn.Module, probes: list["_Probe"]) -> Iterator[None]:
    """The model frozen, in evaluation mode and with a hook on every linear; all as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = []
    try:
        for module in model.modules():
            # bitsandbytes on some CPUs repacks 4-bit weights at the first evaluation; see `backbone.keep_trainable`.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (nn.Module types it as a tensor)
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        for probe in probes:
            for name in probe.site.linears:
                handles.append(model.get_submodule(name).register_forward_hook(probe.hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode


class _Probe:
    """Watches one site: first for a sample of its inputs, then, once there are cells, for the sums of each."""

    def __init__(self, site: Site, seed: int) -> None:
        self.site, self.seed = site, seed
        self.half, self.scale = 0, 1.0
        self.inputs = torch.empty(0, 0)  # [T, k] a uniform sample, by
        self.keys = torch.empty(0)  # [T] random numbers, the largest of which stay
        self.draw = torch.Generator().manual_seed(seed)
        self.cells: _Cells | None = None
        self.cell_of: Tensor | None = None  # of every token of the pass that is going on
        self.sums: dict[str, Sums] = {}

    def hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        """For the linear of that name: project its input now, and its gradient when it comes."""
        reads = name in self.site.linears[: self.site.readers]

        def after(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            x = _sketched(args[0], self.seed)
            if self.cells is not None and reads:
                self.cell_of = self.cells.of(x)
            cells = self.cell_of
            # Below the first of them nothing asks for a gradient, so the graph begins here.
            y = y if y.requires_grad else y.detach().requires_grad_()
            y.register_hook(lambda gradient: self.see(name, x, gradient, cells))
            return y

        return after

    def see(self, name: str, x: Tensor, gradient: Tensor, cells: Tensor | None) -> None:
        """Tokens without a gradient (padding; in the last layer, positions that predict nothing) bear on no loss."""
        flat = gradient.reshape(-1, gradient.shape[-1])
        live = (flat != 0).any(1)
        if cells is not None:
            g = self.scale * _sketched(flat[live], self.seed + 1)
            _add(self.sums, name, x[live], g, cells[live], self.half)
        elif name == self.site.linears[0] and self.cells is None:
            self.keep(x[live])

    def keep(self, x: Tensor) -> None:
        keys = torch.rand(x.shape[0], generator=self.draw).to(x.device)
        if len(self.inputs):
            x, keys = torch.cat((self.inputs, x)), torch.cat((self.keys, keys))
        self.keys, index = keys.topk(min(_SEEN, keys.numel()))
        self.inputs = x[index]

    def find_cells(self) -> None:
        if len(self.inputs):
            self.cells = _Cells(self.inputs, self.draw)

    def gains(self, max_experts: int) -> Tensor:
        most = max_experts if self.site.routed else 1
        if not self.sums:
            return torch.zeros(most, 1, dtype=torch.float64)
        return gain_table([Sums(*(s.cpu().double() for s in sums)) for sums in self.sums.values()], most)


def _add(sums: dict[str, Sums], name: str, x: Tensor, g: Tensor, cells: Tensor, half: int) -> None:
    """Add tokens to the sums of the linear of that name."""
    if name not in sums:
        o, i = g.shape[1], x.shape[1]
        shapes = ((2, CELLS, o, i), (CELLS, o, o), (CELLS, i, i), (2, CELLS))
        sums[name] = Sums(*(torch.zeros(shape, device=x.device) for shape in shapes))
    member = nn.functional.one_hot(cells, CELLS).to(x.dtype)
    into = sums[name]
    into.G[half].add_(torch.einsum("tc,to,ti->coi", member, g, x))
    into.L.add_(torch.einsum("tc,to,tq->coq", member * x.square().sum(1, keepdim=True), g, g))
    into.R.add_(torch.einsum("tc,ti,tj->cij", member * g.square().sum(1, keepdim=True), x, x))
    into.counts[half].add_(member.sum(0))


class _Cells:
    """Clusters of inputs, by k-means in the coordinates in which the sample has unit covariance.

    Args:
        sample: `[T, k]`.
    """

    def __init__(self, sample: Tensor, draw: torch.Generator) -> None:
        self.mean = sample.mean(0)
        centred = sample - self.mean
        values, vectors = torch.linalg.eigh((centred.T @ centred / len(sample)).cpu().double())
        values = values.clamp(min=0) + 1e-3 * values.mean() + 1e-30
        self.whiten = (vectors / values.sqrt()).to(sample)
        self.centres = k_means(centred @ self.whiten, CELLS, draw)

    def of(self, x: Tensor) -> Tensor:
        """`[T]` number of the nearest cell."""
        return torch.cdist((x - self.mean) @ self.whiten, self.centres).argmin(1)


def k_means(x: Tensor, k: int, draw: torch.Generator, steps: int = 20) -> Tensor:
    """`[k, d]` centres of the points `x [T, d]`, started by k-means++; with fewer than k different points some coincide."""
    centres = x[:1]
    for _ in range(k - 1):
        distance = torch.cdist(x, centres).amin(1).square().cpu().double() + 1e-12
        centres = torch.cat((centres, x[torch.multinomial(distance, 1, generator=draw).to(x.device)]))
    for _ in range(steps):
        member = nn.functional.one_hot(torch.cdist(x, centres).argmin(1), k).to(x.dtype)
        size = member.sum(0)[:, None]
        centres = torch.where(size > 0, member.T @ x / size.clamp(min=1), centres)
    return centres


def _sketched(x: Tensor, seed: int) -> Tensor:
    """`[T, min(d, SKETCH)]` in fp32; all linears that read one vector see it alike."""
    flat = x.detach().reshape(-1, x.shape[-1]).float()
    if flat.shape[1] <= SKETCH:
        return flat
    key = (flat.shape[1], seed, flat.device)
    if key not in _PROJECTIONS:
        draw = torch.Generator().manual_seed(seed)
        _PROJECTIONS[key] = torch.randn(flat.shape[1], SKETCH, generator=draw).to(flat.device) / SKETCH**0.5
    return flat @ _PROJECTIONS[key]


_PROJECTIONS: dict[tuple[int, int, torch.device], Tensor] = {}
"""By width, seed and device: as many as a model has widths, twice."""
