"""One plain LoRA in place of a routed adapter, and what that costs, measured.

A routed adapter is no weight, so no merge of it is exact (with one expert it is, and PEFT's own `merge_and_unload` does
it). What can be had is the best static LoRA on calibration text. Writing h = A_cat x for the experts' hidden values,
g for the weights of the token spread over the ranks, and z = [A_cat x ; R x] with R the router's rows, the least-squares
read-out of the routed output from z is

    Z = G S^-1,    S = sum z z^T,    G = sum (g * h) z^T,    W = s B_cat Z [A_cat ; R]

(RegMean, arXiv:2212.09849, generalised to soft gates and restricted to z). The left factor B_cat cancels from the
normal equations, so that the statistics of a layer are (E r + E)^2 numbers, whatever the width of the model and however
much text is read, and the frozen weight is never touched: a 4-bit backbone stays as it is.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from moe_peft.errors import nearest, refuse
from moe_peft.portable_lora import Factors, lora_config, lora_state, portable, write_portable_lora
from moe_peft.routing import routing_dtype
from moe_peft.tuners.domain_moe import DomainMoeLinear
from moe_peft.tuners.layer import MoeTunerLayer
from moe_peft.tuners.linear_moe import LinearMoeLinear, RoutedLora
from moe_peft.tuners.rank_moe import RankExperts, RankMoeLinear


METHODS = ("lstsq", "mean")
"""How `fit_static` reads the routed output: least squares, or the mean weight of each expert."""

Batch = dict[str, Any]

Experts = RoutedLora | RankExperts


def routed_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, MoeTunerLayer]:
    """Module name -> layer, for every layer that holds the adapter; names as a stock PEFT checkpoint spells them."""
    prefix = "base_model.model."
    layers = {
        name.removeprefix(prefix): module
        for name, module in model.named_modules()
        if isinstance(module, MoeTunerLayer) and module.holds(adapter_name)
    }
    if not layers:
        raise ValueError(
            f"No layer of this model holds a routed adapter named '{adapter_name}'. Load it first with "
            "`PeftModel.from_pretrained`, or give its name."
        )
    return layers


def on_device(batch: Batch, model: nn.Module) -> Batch:
    """The batch where the model is.

    Raises:
        ValueError: if it is no batch but a text or a tensor.
    """
    if not isinstance(batch, Mapping):
        remedy = 'Give a list of what the tokenizer returns: `[tokenizer(texts, return_tensors="pt"), ...]`.'
        raise refuse("calibration", type(batch).__name__, "of batches that map names to tensors", remedy)
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _check_mergeable(model: PeftModel, layers: dict[str, MoeTunerLayer], adapter_name: str) -> None:
    """Refuse what a plain LoRA could not carry, before anything is computed."""
    if any(adapter_name not in layer.active_adapters for layer in layers.values()):
        raise ValueError(f"Adapter '{adapter_name}' is not active. Call `model.set_adapter('{adapter_name}')` first.")
    if not all(isinstance(layer, (LinearMoeLinear, RankMoeLinear, DomainMoeLinear)) for layer in layers.values()):
        raise ValueError(
            f"Adapter '{adapter_name}' is an FFN mixture. Its experts differ inside the non-linearity, which no LoRA on the "
            "linears can follow from statistics of the inputs alone. `moe_peft.merging.methods.merge_static`, which `moe-peft "
            "merge` calls, fits one by the block's outputs; `moe-peft export --to moe` writes it exactly, as a stock MoE checkpoint."
        )
    config = model.peft_config[adapter_name]
    if getattr(config, "num_constant_experts", 0):
        remedy = "What they add is a bias, which a plain LoRA does not have: serve the adapter routed."
        raise refuse("num_constant_experts", config.num_constant_experts, "0 for a static merge", remedy)
    for field in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, field, None):
            remedy = "The plain LoRA would lose the weights that were trained there: serve the adapter routed."
            raise refuse(field, getattr(config, field), "None for a static merge", remedy)


class _Statistics:
    """S and G of one layer, accumulated in fp64 from a hook on its experts."""

    def __init__(self, experts: Experts) -> None:
        n, rows = len(experts.stacked()[0]), len(router_rows(experts))
        device = experts.lora_A.device
        self.S = torch.zeros(n + rows, n + rows, dtype=torch.float64, device=device)
        self.G = torch.zeros(n, n + rows, dtype=torch.float64, device=device)
        self.gate_sum = torch.zeros(n // experts.r, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, experts: Experts, x: Tensor, gates: Tensor, real: Tensor | None) -> None:
        tokens = x.reshape(-1, x.shape[-1])
        if real is not None:
            tokens, gates = tokens[real], gates[real]
        hidden, z = hidden_and_features(experts, tokens)
        spread = gates.repeat_interleave(experts.r, dim=1)
        self.S += (z.T @ z).double()
        self.G += ((spread * hidden).T @ z).double()
        self.gate_sum += gates.sum(0).double()
        self.tokens += tokens.shape[0]


def router_rows(experts: Experts) -> Tensor:
    """The rows of a router that reads the layer's own input, `[N, d_in]`; none where another decides."""
    A, router = experts.lora_A, getattr(experts, "router", None)
    return A.new_zeros(0, A.shape[-1]) if router is None or router.shape[1] != A.shape[-1] else router


def hidden_and_features(experts: Experts, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """`(A x [T, (E + S) r], what the read-out may use: A x and the router's products [T, (E + S) r + N])` in fp32."""
    x = tokens.to(routing_dtype(tokens.dtype))
    hidden = x @ experts.stacked()[0].to(x.dtype).T
    return hidden, torch.cat((hidden, x @ router_rows(experts).to(x.dtype).T), dim=1)


@contextmanager
def observing(model: nn.Module, layers: dict[str, MoeTunerLayer], adapter_name: str, see: Any) -> Iterator[None]:
    """Call `see(name, experts, x, y, gates, real)` for every layer in every forward pass, with padding masked."""
    handles = []
    context = next(iter(layers.values())).context

    def hook(name: str, experts: Experts) -> Any:
        def before(module: nn.Module, args: tuple) -> None:
            x, y, _, *routing = args
            if y is not None:  # not where a layer is only asked for its routing
                see(
                    name, experts, x, y, experts.gates(x, context, *routing), context.real_tokens(x.shape[:-1].numel())
                )

        return experts.register_forward_pre_hook(before)

    was_recording, was_training = context.recording, model.training
    context.recording = True
    model.eval()
    try:
        handles = [hook(name, layer.experts(adapter_name)) for name, layer in layers.items()]
        yield
    finally:
        for handle in handles:
            handle.remove()
        context.recording = was_recording
        model.train(was_training)


@torch.no_grad()
def fit_static(
    model: PeftModel,
    calibration: Iterable[Batch],
    rank: int | None = None,
    method: str = "lstsq",
    adapter_name: str = "default",
) -> dict[str, Factors]:
    """The static LoRA of each layer that comes closest to the routed adapter on the calibration text.

    Args:
        model: with the routed adapter active; frozen weights, 4-bit or not, are left as they are.
        calibration: batches for `model(**batch)`; 128 to 512 sequences of the training mix are enough.
        rank: of the result; None keeps every direction (number of experts x r of the layer), which costs nothing on
            calibration text but parameters. Truncation minimises the error of the output on that text.
        method: "lstsq", or "mean" for the mean weight of each expert.
        adapter_name: which adapter.

    Raises:
        ValueError: unknown method, rank below 1, or no calibration text.
    """
    if method not in METHODS:
        raise refuse("method", method, "one of " + ", ".join(map(repr, METHODS)), nearest(method, METHODS))
    if rank is not None and rank < 1:
        raise refuse("rank", rank, "a whole number of at least 1, or None", "None keeps every direction.")
    layers = routed_layers(model, adapter_name)
    _check_mergeable(model, layers, adapter_name)
    statistics = {name: _Statistics(layer.experts(adapter_name)) for name, layer in layers.items()}

    def see(name: str, experts: Experts, x: Tensor, y: Tensor, gates: Tensor, real: Tensor | None) -> None:
        statistics[name].add(experts, x, gates, real)

    with observing(model, layers, adapter_name, see):
        for batch in calibration:
            model(**on_device(batch, model))
    if not all(s.tokens for s in statistics.values()):
        raise ValueError("The calibration text holds no token. Give at least a few sequences of the training mix.")
    return {
        name: _solve(layer.experts(adapter_name), statistics[name], rank, method) for name, layer in layers.items()
    }


def _solve(experts: Experts, stats: _Statistics, rank: int | None, method: str) -> Factors:
    """From the statistics to two factors, the truncation weighted by the data."""
    A, B = (factor.double() for factor in experts.stacked())
    rows, n = torch.cat((A, router_rows(experts).double())), len(A)
    values, vectors = torch.linalg.eigh(stats.S)
    values = values.clamp(min=1e-6 * float(values.mean().clamp(min=1e-12)))  # calibration text may not span z
    root, inverse_root = vectors * values.sqrt(), (vectors / values.sqrt()).T  # root @ root.T = S
    if method == "mean":
        gates = (stats.gate_sum / stats.tokens).repeat_interleave(experts.r)
        Z = torch.zeros(n, rows.shape[0], dtype=torch.float64, device=rows.device)
        Z[:, :n] = torch.diag(gates)
    else:
        Z = stats.G @ (vectors / values) @ vectors.T
    Q, R = torch.linalg.qr(B.T)  # [d_out, n]
    U, sigma, Vh = torch.linalg.svd(R @ Z @ root, full_matrices=False)
    keep = min(rank or n, sigma.numel())
    A = Vh[:keep] @ inverse_root @ rows
    return Factors(A.float(), (Q @ U[:, :keep] * sigma[:keep]).float())


def factors_to_peft(
    factors: dict[str, Factors], base_model: str | None, task_type: str | None = "CAUSAL_LM"
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and state dict of a plain PEFT LoRA whose scale is exactly 1, for any PEFT and LoRA server.

    All layers get the rank of the largest, filled up with zeros (`portable_lora`).
    """
    same = portable(factors)
    return lora_config(same, base_model, task_type), lora_state(same)


@contextmanager
def instead_of_routing(model: PeftModel, factors: dict[str, Factors], adapter_name: str = "default") -> Iterator[None]:
    """Run the model with the static factors in place of the routed adapter, without loading anything."""
    handles = []

    def hook(f: Factors) -> Any:
        def after(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            delta = args[0].to(f.A.dtype) @ f.A.T @ f.B.T
            return output + delta.to(output.dtype)

        return after

    layers = routed_layers(model, adapter_name)
    with model.disable_adapter():
        try:
            handles = [layer.register_forward_hook(hook(factors[name])) for name, layer in layers.items()]
            yield
        finally:
            for handle in handles:
                handle.remove()


def save_static(
    factors: dict[str, Factors],
    folder: Path,
    base_model: str | None,
    also: dict[str, str] | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> LoraConfig:
    """`write_portable_lora`: the static LoRA as a plain PEFT adapter that servers take.

    Raises:
        ValueError: as it does.
    """
    return write_portable_lora(factors, folder, base_model, task_type=task_type, also=also)
