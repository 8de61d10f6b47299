"""What each expert of an FFN mixture makes of a whole block, and EASY-EP's score of that.

The block is run once more for each expert, with a routing that sends every token there, so that its own code says what an
expert computes, whatever stands between its linears. With F the frozen block (shared experts included) and O_e the block
with expert e, the terms of `pruning` are E_e(x) = O_e(x) - F(x) and h = F(x).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from moe_peft.errors import refuse
from moe_peft.routing import Routing, dense_weights, routing_dtype
from moe_peft.tuners.ffn_moe import FfnMoeLinear, Pending


def easy_ep_of_outputs(g: Tensor, norms: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """EASY-EP's score, `[E]`: weights and lengths of the outputs `[T, E]`, the stream before and after them `[T, d]`."""
    moved = (1 - torch.cosine_similarity(before, after, dim=-1)).clamp(min=0)
    return (g * norms * moved.unsqueeze(-1)).sum(0)


@contextmanager
def observing_blocks(model: PeftModel, layers: dict[str, FfnMoeLinear], adapter_name: str, see: Any) -> Iterator[None]:
    """Call `see(name, layer, x, routing, real)` for every block in every forward pass, with padding masked.

    Args:
        layers: name of the block -> the one of its linears that has the router.
        see: gets x `[*, d]` as the block got it.
    """
    handles, busy = [], [False]
    context = next(iter(layers.values())).context

    def hook(name: str, layer: FfnMoeLinear) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            if args[0] != "route":
                return
            if busy[0]:
                raise RuntimeError(
                    f"The block '{name}' copies its input before its linears read it, so its experts cannot be asked one "
                    "by one. Score them `by='usage'`."
                )
            busy[0] = True
            try:
                see(name, layer, args[1], result, context.real_tokens(args[1].shape[:-1].numel()))
            finally:
                busy[0] = False

        return layer.experts(adapter_name).register_forward_hook(after)

    was_recording, was_training = context.recording, model.training
    context.recording = True
    model.eval()
    try:
        handles = [hook(name, layer) for name, layer in layers.items()]
        yield
    finally:
        for handle in handles:
            handle.remove()
        context.recording = was_recording
        model.train(was_training)


def block_easy_ep(
    parent: nn.Module, layer: FfnMoeLinear, adapter_name: str, x: Tensor, routing: Routing, real: Tensor | None
) -> Tensor:
    """EASY-EP's score of every expert of a block on the tokens `x [*, d]`, `[E]`.

    Args:
        parent: the block; it is called E + 1 times.
        layer: its first linear.
        routing: of these tokens.
        real: `[T]`, which tokens count.
    """
    number = layer.num_experts[adapter_name]
    g = dense_weights(routing)[:, :number]
    g = (g if real is None else g[real]).to(routing_dtype(x.dtype))
    before, changes = block_changes(parent, layer, adapter_name, x, routing, real)
    after, norms = before.clone(), torch.empty_like(g)
    for expert, change in enumerate(changes):
        norms[:, expert] = change.norm(dim=-1)
        after += g[:, expert : expert + 1] * change
    return easy_ep_of_outputs(g, norms, before, after)


def block_changes(
    parent: nn.Module, layer: FfnMoeLinear, adapter_name: str, x: Tensor, routing: Routing, real: Tensor | None
) -> tuple[Tensor, Iterator[Tensor]]:
    """`F(x) [T, d]` of the tokens that count, and the `E_e(x) [T, d]`, one after another; arguments as above."""

    def through(expert: int) -> Tensor:
        y = parent.forward(_sent_to(layer, adapter_name, x, routing, expert))
        y = y.reshape(-1, y.shape[-1])
        return (y if real is None else y[real]).to(routing_dtype(y.dtype))

    number = layer.num_experts[adapter_name]
    before = through(number)  # an index that no expert has is the frozen block
    return before, (through(expert) - before for expert in range(number))


def check_own_modules(layers: dict[str, Any], field: str, value: str, remedy: str) -> None:
    """Refuse what asks whole blocks where they are no module of their own, as in OPT: nothing could be called for one expert.

    Raises:
        ValueError: naming the field.
    """
    for name, layer in layers.items():
        if name.rpartition(".")[2] == layer.name:
            allowed = f"another where the linears of a block stand in the decoder layer itself, as {name}"
            raise refuse(field, value, allowed, remedy)


def _sent_to(layer: FfnMoeLinear, adapter_name: str, x: Tensor, routing: Routing, expert: int) -> Tensor:
    """x, after the block was told that all of its tokens go to this expert."""
    assert layer.block is not None
    tokens = x.shape[:-1].numel()
    index = torch.full((tokens, 1), expert, dtype=torch.long, device=x.device)
    weights = routing.top_k_weights.new_ones(tokens, 1)
    layer.block.pending = Pending(x, adapter_name, routing._replace(top_k_weights=weights, top_k_index=index))
    return x
