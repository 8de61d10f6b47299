"""The fast path of an FFN mixture: a block's forward in which one autograd function stands between the frozen products.

It takes the place of `forward` on blocks of transformers whose code is known to be `out(act(gate) * up)` or
`out(act(in))`, and steps back to that code wherever anything else is wanted: no mixture active, hooks on a linear,
another activation or class forward than at injection, an adapter whose weights are sharded away. Then the linears fan
out and in by themselves, with the same result.
"""

from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, nn

from moe_peft.ffn import mixed_hidden
from moe_peft.ffn_block import ffn_block
from moe_peft.ffn_names import fast_activation
from moe_peft.products import stacked_products
from moe_peft.rules import jittered
from moe_peft.tuners.ffn_experts import FfnExperts
from moe_peft.tuners.router import compute_dtype


if TYPE_CHECKING:
    from moe_peft.tuners.ffn_moe import MixedBlock


class FastForward:
    """In the place of one block's `forward`. Copies and pickles with the model."""

    def __init__(self, block: "MixedBlock", parent: nn.Module, act: Any) -> None:
        self.block, self.parent = block, parent
        self.kind = ffn_block(block.names.kind, act)  # type: ignore[arg-type]
        self.enabled = True

    @classmethod
    def install(cls, block: "MixedBlock", parent: nn.Module) -> Optional["FastForward"]:
        """Take the place of `parent.forward` if its code is known and nobody else has replaced it."""
        act = fast_activation(parent)
        if act is None or "forward" in parent.__dict__:
            return None
        fast = cls(block, parent, act)
        parent.forward = fast.forward
        return fast

    def remove(self) -> None:
        """Give the block its own forward back."""
        if getattr(self.parent.__dict__.get("forward"), "__self__", None) is self:
            del self.parent.__dict__["forward"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapter_name = self.applies(args, kwargs)
        if adapter_name is None:
            return type(self.parent).forward(self.parent, *args, **kwargs)
        return self.mixed(args[0], adapter_name)

    def applies(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """The adapter to run on the fast path, or None where only the block's own code will do."""
        names = self.block.names.all
        layers = [self.block.layers.get(name) for name in names]
        if not self.enabled or kwargs or len(args) != 1 or any(layer is None for layer in layers):
            return None
        if fast_activation(self.parent) is not self.kind.act:  # it or the class's forward was replaced
            return None
        for name, layer in zip(names, layers, strict=True):
            if layer is not getattr(self.parent, name) or layer.disable_adapters or layer.merged or _hooked(layer):
                return None
        adapter_name = layers[0].coupled_adapter()
        if adapter_name is None or any(not layer.holds(adapter_name) for layer in layers):
            return None
        if layers[0].experts(adapter_name).router is None:  # nothing to ask
            return None
        leaves = [layer.ffn_moe_experts[adapter_name] for layer in layers]
        return adapter_name if all(_direct(leaf) for leaf in leaves) else None

    def mixed(self, x: Tensor, adapter_name: str) -> Tensor:
        """The block's output for `x [*, d]` with the experts of that adapter."""
        block = self.block
        ins = [block.layers[name] for name in block.names.ins]
        out = block.layers[block.names.out]
        leaves: list[FfnExperts] = [layer.experts(adapter_name) for layer in ins]
        last: FfnExperts = out.experts(adapter_name)
        hidden, logits, seen = self.products(x, leaves)
        rows = x.shape[0] if x.dim() == 3 else None
        routing = leaves[0].of_experts(leaves[0].routed(logits, ins[0].context, seen, rows))
        base = [
            leaf.added(layer.below(x), rows, leaf.num_routed).reshape(-1, layer.out_features)
            for layer, leaf, rows in zip(ins, leaves, hidden, strict=True)
        ]
        kept = None
        if last.training and last.dropout:
            kept = torch.empty(base[0].shape[0], last.lora_A.shape[-1], dtype=torch.bool, device=x.device)
            kept.bernoulli_(1 - last.dropout)
        mixed, z = mixed_hidden(
            tuple(base),
            tuple(rows[: leaf.num_routed * leaf.r] for leaf, rows in zip(leaves, hidden, strict=True)),
            tuple(leaf.lora_B[: leaf.num_routed].to(hidden[0].dtype) for leaf in leaves),
            last.lora_A[: last.num_routed].to(compute_dtype(x, last.lora_A)),
            routing.top_k_weights,
            routing.top_k_index,
            self.kind,
            leaves[0].scaling,
            normalised=last.normalised,
            kept=kept,
            dropout=last.dropout,
        )
        mixed = mixed.view(*x.shape[:-1], mixed.shape[-1])
        y = out.weighted_bias(out.below(mixed), routing, last.normalised)
        return last.back(mixed, y, z)

    def products(self, x: Tensor, leaves: list[FfnExperts]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Every linear's `A x` in rank space and the router's logits, from one product where they see the same x; and
        what the router saw, `[T, d]`."""
        first = leaves[0]
        assert first.router is not None
        dtype = compute_dtype(x, first.lora_A)
        factors = [leaf.lora_A.flatten(0, 1).to(dtype) for leaf in leaves]
        router = first.router.to(dtype)
        dropping = first.training and (first.dropout or first.jitter)
        if not dropping:
            *hidden, logits = stacked_products(x, (*factors, router))
            return hidden, logits.T, x.reshape(-1, x.shape[-1])
        hidden = list(stacked_products(first.dropped(x), tuple(factors)))
        tokens = jittered(x.reshape(-1, x.shape[-1]), first.jitter, first.training)
        return hidden, nn.functional.linear(tokens.to(dtype), router), tokens


def _hooked(module: nn.Module) -> bool:
    """Whether somebody wants to see it called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _direct(leaf: nn.Module) -> bool:
    """Whether the adapter's weights can be used without calling their module: nobody watches it (as `frozen` does), and
    they are here; ZeRO-3 and FSDP put them away between calls."""
    if type(leaf) is not FfnExperts or _hooked(leaf):
        return False
    return not any(hasattr(p, "ds_id") or p.is_meta or p.numel() == 0 for p in leaf.parameters())
