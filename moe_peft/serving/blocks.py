"""A mixture of FFN blocks for a server: `ffn_moe` on a block of transformers whose code is known.

The frozen products are paid once, whatever `top_k` is, and no expert is ever materialised: the block costs what it
weighs, plus its low-rank factors.
"""

from typing import Any

from torch import Tensor, nn

from moe_peft.bound_rules import scaling, sums_to_one
from moe_peft.errors import refuse
from moe_peft.experts import experts_out
from moe_peft.ffn import mixed_hidden, out_product
from moe_peft.ffn_block import ffn_block
from moe_peft.ffn_names import BlockNames, fast_activation
from moe_peft.routing import grouped
from moe_peft.serving.routed import Routes, Shapes, frozen, hosted


class BlockLinear(nn.Module):
    """One linear of a block with its part of the experts; the block, not this, computes.

    Parameters: lora_A `[E + S, r, d_in]`, lora_B `[E + S, r, d_out]`. The last S experts are shared.
    """

    def __init__(self, base_layer: nn.Module, config: Any, shapes: Shapes) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = (frozen(shapes[part], base_layer.weight) for part in ("lora_A", "lora_B"))
        self.num_routed, self.scaling = (
            shapes["lora_A"][0] - config.num_shared_experts,
            scaling(config, shapes["lora_A"][1]),
        )
        self.routes = Routes(config, shapes, self.lora_A) if "router" in shapes else None

    def hidden(self, tokens: Tensor, first: int = 0) -> Tensor:
        """`A x` of the experts from `first` on, `[n, T]`."""
        return self.lora_A[first:].flatten(0, 1) @ tokens.to(self.lora_A.dtype).T

    def with_shared(self, y: Tensor, shared: Tensor) -> Tensor:
        """`y [T, d_out]` plus the shared experts' output for their part of the hidden values, `[S r, T]`."""
        B = self.lora_B[self.num_routed :]
        if not len(B):
            return y
        return experts_out(y, shared, B, shared.new_ones(shared.shape[1], len(B)), None, self.scaling)


class Mixture:
    """What the linears of one block do together; the equations are in `moe_peft.tuners.ffn_moe`.

    Not a module: the block holds the weights, and this knows the order.
    """

    def __init__(self, names: BlockNames, config: Any, act: Any) -> None:
        self.names, self.kind = names, ffn_block(names.kind, act)  # type: ignore[arg-type]
        self.normalised = sums_to_one(config)

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        ins: list[BlockLinear] = [getattr(block, name) for name in self.names.ins]
        out: BlockLinear = getattr(block, self.names.out)
        tokens, n = x.reshape(-1, x.shape[-1]), out.num_routed
        routes = ins[0].routes
        assert routes is not None
        routing = routes(tokens.to(routes.router.dtype))
        if routes.expert_map is not None:
            routing = grouped(routing, routes.expert_map, n)
        hidden = [part.hidden(tokens) for part in ins]
        split = [part.num_routed * part.lora_A.shape[1] for part in ins]
        base = tuple(
            part.with_shared(part.base_layer(tokens), rows[k:])
            for part, rows, k in zip(ins, hidden, split, strict=True)
        )
        mixed, z = mixed_hidden(
            base,
            tuple(rows[:k] for rows, k in zip(hidden, split, strict=True)),
            tuple(part.lora_B[:n] for part in ins),
            out.lora_A[:n],
            routing.top_k_weights,
            routing.top_k_index,
            self.kind,
            ins[0].scaling,
            normalised=self.normalised,
            schedule="static",
        )
        y = self._weighted_bias(out.base_layer(mixed), out.base_layer, routing.top_k_weights)
        y = out.with_shared(y, out.hidden(mixed, n))
        return out_product(y, z, out.lora_B[:n], out.scaling).view(x.shape)

    def _weighted_bias(self, y: Tensor, base_layer: nn.Module, weights: Tensor) -> Tensor:
        bias = getattr(base_layer, "bias", None)
        if self.normalised or bias is None:
            return y
        return y + ((weights.sum(-1, keepdim=True) - 1) * bias.to(weights.dtype)).to(y.dtype)


def _forward(self: nn.Module, x: Tensor) -> Tensor:
    return self.moe_peft_mixture(self, x)  # pyright: ignore[reportCallIssue]


def mix(block: nn.Module, place: str, names: BlockNames, config: Any, shapes: dict[str, Shapes]) -> None:
    """Put a mixture in the place of a block's forward.

    Args:
        block: changed in place.
        place: its name, for the error.
        names: of its linears.
        config: of the adapter.
        shapes: of each linear.

    Raises:
        ValueError: if the block's code is not known.
    """
    act = fast_activation(block)
    if act is None:
        remedy = "`moe-peft export --to moe` writes such a mixture as a stock MoE checkpoint where that is possible."
        allowed = f"a class whose forward is known to be out(act(gate) * up) or out(act(in)), at '{place}'"
        raise refuse("the FFN block", type(block).__name__, allowed, remedy)
    for name in names.all:
        setattr(block, name, BlockLinear(getattr(block, name), config, shapes[name]))
    block.moe_peft_mixture = Mixture(names, config, act)
    hosted(block, names.all, _forward)
