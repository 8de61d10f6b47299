"""Finds the FFN blocks of a model by their shape."""

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from moe_peft.ffn_names import ALONE, GATES, OUTS, UPS, BlockNames, block_among
from moe_peft.tuners.base import linear_features


def block_of(parent: nn.Module) -> BlockNames | None:
    """The FFN block that the direct children of `parent` form, or None."""
    return block_among(dict(_linears(parent)))


def find_blocks(model: nn.Module) -> dict[str, BlockNames]:
    """Every FFN block of the model by the name of its parent module."""
    modules = ((name, module) for name, module in model.named_modules() if not isinstance(module, BaseTunerLayer))
    found = ((name, block_of(module)) for name, module in modules)
    return {name: block for name, block in found if block is not None}


def _linears(parent: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    for name, child in parent.named_children():
        try:
            yield name, linear_features(child.get_base_layer() if isinstance(child, BaseTunerLayer) else child)
        except TypeError:
            continue


def looked_for() -> str:
    """For the error that a model without an FFN block gets."""
    return (
        "a module with a linear layer named "
        + " or ".join(OUTS)
        + " that takes the hidden units back, beside a pair ("
        + ", ".join(GATES)
        + ") and ("
        + ", ".join(UPS)
        + "), or one of "
        + ", ".join(ALONE)
        + ", of matching widths"
    )
