"""The static factors of one decoder layer, from the text that has reached it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_peft.merge import Experts, Factors, observing
from moe_peft.merging.decoder import Decoder
from moe_peft.merging.gram import Cross, Gram, Readout, least_squares, truncated
from moe_peft.routing import dense_weights
from moe_peft.tuners.ffn_experts import FfnExperts
from moe_peft.tuners.ffn_moe import FfnMoeLinear, MixedBlock
from moe_peft.tuners.layer import MoeTunerLayer


class Stream:
    """Text on its way through the layers: hidden states, calls and which tokens count, batch by batch."""

    def __init__(self, hidden: list[Tensor], calls: list[list[Any]], counted: list[Tensor]) -> None:
        self.hidden, self.calls, self.counted = hidden, calls, counted

    def outputs(self, decoder: Decoder, index: int) -> Iterator[Tensor]:
        """The layer's output for each batch, as the layer is now."""
        for hidden, calls, counted in zip(self.hidden, self.calls, self.counted, strict=True):
            yield decoder.step(index, hidden, calls[index], counted)


def fit_layer(
    decoder: Decoder, index: int, stream: Stream, method: str, alpha: float, rank: int | None
) -> dict[str, Factors]:
    """Factors for every adapted linear of one decoder layer.

    Args:
        decoder: of the model, the adapter active.
        stream: what has reached the layer.
        method: "ls" or "usage".
        alpha: of the ridge, see `gram`.
        rank: at most; None keeps every direction.
    """
    layers = decoder.adapted[index]
    static = {name: layer for name, layer in layers.items() if layer.is_static(decoder.adapter_name)}
    factors = {name: _static(layer, decoder.adapter_name, rank) for name, layer in static.items()}
    routed = {name: layer for name, layer in layers.items() if name not in static}
    blocks = {id(layer.block): layer.block for layer in routed.values() if isinstance(layer, FfnMoeLinear)}
    if blocks:
        for block in blocks.values():
            assert block is not None
            factors |= _fit_block(decoder, index, block, routed, factors, stream, method, alpha, rank)
    elif routed:
        factors |= _fit_linears(decoder, index, routed, stream, method, alpha, rank)
    return {name: factors[name] for name in layers}


def _static(layer: MoeTunerLayer, adapter_name: str, rank: int | None) -> Factors:
    A, B = layer.static_factors(adapter_name)
    if rank is None or rank >= len(A):
        return Factors(A.detach().float(), B.detach().float().T.contiguous())
    return truncated(Readout(A.double(), B.double()), rank)


class _Moments:
    """The sums of all routed linears of a layer; those that read the same tensor share one Gram."""

    def __init__(self, with_grams: bool) -> None:
        self.with_grams = with_grams
        self.grams: dict[str, Gram] = {}  # by the first linear that reads the input
        self.shared: dict[str, str] = {}
        self.crosses: dict[str, Cross] = {}
        self._last: tuple[str, Tensor, Tensor] | None = None  # the linear before, its input and that input's tokens

    def see(self, name: str, experts: Experts, x: Tensor, y: Tensor, gates: Tensor, real: Tensor | None) -> None:
        tokens = self._tokens(name, x, real)
        gates = gates if real is None else gates[real]
        spread = gates.float().repeat_interleave(experts.r, dim=1)
        A = experts.stacked()[0]
        cross = self.crosses.get(name)
        if cross is None:
            cross = self.crosses[name] = Cross(len(A), x.shape[-1], x.device)
        cross.gates += spread.sum(0).double()
        if self.with_grams:
            cross.add(spread * (tokens @ A.float().T), tokens)

    def _tokens(self, name: str, x: Tensor, real: Tensor | None) -> Tensor:
        """The tokens of x that count, in fp32; the Gram gets them from the first linear that reads x."""
        if self._last is not None and self._last[1] is x:
            self.shared[name] = self.shared[self._last[0]]
            self._last = (name, x, self._last[2])
            return self._last[2]
        tokens = x.reshape(-1, x.shape[-1])
        tokens = (tokens if real is None else tokens[real]).float()
        self.shared[name] = name
        if name not in self.grams:
            self.grams[name] = Gram(x.shape[-1] if self.with_grams else 0, x.device)
        if self.with_grams:
            self.grams[name].add(tokens)
        else:
            self.grams[name].tokens += len(tokens)
        self._last = (name, x, tokens)
        return tokens

    def forget(self) -> None:
        """A batch is over: its tensors are let go."""
        self._last = None


def _fit_linears(
    decoder: Decoder,
    index: int,
    layers: dict[str, MoeTunerLayer],
    stream: Stream,
    method: str,
    alpha: float,
    rank: int | None,
) -> dict[str, Factors]:
    moments = _Moments(with_grams=method == "ls")
    with observing(decoder.model, layers, decoder.adapter_name, moments.see):
        for _ in stream.outputs(decoder, index):
            moments.forget()
    factors: dict[str, Factors] = {}
    for first, gram in list(moments.grams.items()):
        L, ridge = gram.root(alpha) if method == "ls" else (None, 0.0)
        for name in [name for name, its in moments.shared.items() if its == first]:
            A, B = layers[name].experts(decoder.adapter_name).stacked()
            cross = moments.crosses.pop(name)
            decoder.usage[name] = (cross.gates / gram.tokens).view(-1, layers[name].experts(decoder.adapter_name).r)[
                :, 0
            ]
            prior = (cross.gates / gram.tokens).unsqueeze(1) * A.double()
            M = prior if L is None else least_squares(cross, gram.tokens, prior, L, ridge)
            factors[name] = truncated(Readout(M, B.double()), _limit(rank, len(A)), L)
    return factors


def _limit(rank: int | None, n: int) -> int:
    return n if rank is None else min(rank, n)


def _fit_block(
    decoder: Decoder,
    index: int,
    block: MixedBlock,
    layers: dict[str, MoeTunerLayer],
    static: dict[str, Factors],
    stream: Stream,
    method: str,
    alpha: float,
    rank: int | None,
) -> dict[str, Factors]:
    """An FFN mixture: the usage mean on what reads the block's input; on its last linear the usage mean or, for the hidden
    units that come of it, the least-squares change towards the routed block's output."""
    names = {
        short: next(name for name, layer in layers.items() if layer is block.layers[short])
        for short in block.names.all
    }
    parent_name = names[block.names.out].rpartition(".")[0]
    parent = decoder.model.get_base_model().get_submodule(parent_name)
    first = block.layers[block.names.ins[0]].experts(decoder.adapter_name)
    inputs, outputs, gates = _through_block(decoder, index, parent, first, stream)
    decoder.usage |= dict.fromkeys(names.values(), gates)
    usage = {name: _usage(layers[name].experts(decoder.adapter_name), gates) for name in names.values()}
    factors = {name: truncated(readout, _limit(rank, len(readout.M))) for name, readout in usage.items()}
    if method != "ls":
        return factors
    out_name = names[block.names.out]
    factors[out_name] = _fit_last(
        decoder, index, parent, layers[out_name], factors | static, usage[out_name], inputs, outputs, alpha, rank
    )
    return factors


def _through_block(
    decoder: Decoder, index: int, parent: nn.Module, first: FfnExperts, stream: Stream
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The tokens that count before and after the routed block, and the experts' mean weights `[E + S]`."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    total = torch.zeros(len(first.lora_B), dtype=torch.float64, device=first.lora_B.device)

    def see(module: nn.Module, args: Any, output: Tensor) -> None:
        x = args[0]
        real = decoder.context.real_tokens(x.shape[:-1].numel())
        weights = dense_weights(first("route", x, decoder.context))[:, : first.num_routed]
        weights = torch.cat((weights, weights.new_ones(len(weights), first.num_shared)), dim=1)
        keep = slice(None) if real is None else real
        total.add_(weights[keep].sum(0).double())
        inputs.append(x.reshape(-1, x.shape[-1])[keep])
        outputs.append(output.reshape(-1, output.shape[-1])[keep])

    handle = parent.register_forward_hook(see)
    try:
        for _ in stream.outputs(decoder, index):
            pass
    finally:
        handle.remove()
    return inputs, outputs, total / sum(map(len, inputs))


def _usage(experts: FfnExperts, gates: Tensor) -> Readout:
    A, B = experts.lora_A.flatten(0, 1).double(), experts.scaling * experts.lora_B.flatten(0, 1).double()
    return Readout(gates.repeat_interleave(experts.r).unsqueeze(1) * A, B)


def _fit_last(
    decoder: Decoder,
    index: int,
    parent: nn.Module,
    last: MoeTunerLayer,
    factors: dict[str, Factors],
    prior: Readout,
    inputs: list[Tensor],
    outputs: list[Tensor],
    alpha: float,
    rank: int | None,
) -> Factors:
    """The change of the last linear with which the block, merged before it, comes closest to the routed one."""
    gram = Gram(last.in_features, inputs[0].device)
    cross = Cross(last.out_features, last.in_features, inputs[0].device)
    wanted: list[Tensor] = []

    def see(module: nn.Module, args: Any) -> None:
        h = args[0].reshape(-1, args[0].shape[-1])
        missing = wanted.pop() - last.base_layer(h)  # the frozen bias, where there is one, is on both sides
        gram.add(h.float())
        cross.add(missing.float(), h.float())

    handle = last.register_forward_pre_hook(see)
    try:
        with decoder.without(index, factors), torch.no_grad():
            for x, y in zip(inputs, outputs, strict=True):
                wanted.append(y)
                parent(x)
    finally:
        handle.remove()
    L, ridge = gram.root(alpha)
    M = least_squares(cross, gram.tokens, prior.B.T @ prior.M, L, ridge)  # [d_out, d_in]
    identity = torch.eye(len(M), dtype=torch.float64, device=M.device)
    return truncated(Readout(M, identity), rank, L)
