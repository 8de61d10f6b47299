"""How FFN blocks are known: by the names and widths of their linears, and the ones of transformers by their code.

A block is a module with linear layers whose outputs become the hidden units (one or two of them), and one linear layer
that takes the hidden units back. Nothing else about it is assumed, so a family that nobody listed is found as well; OPT
has no module of its own for the FFN, and its decoder layer is found instead.
"""

from typing import Any, NamedTuple

from torch import nn


GATES = ("gate_proj", "w1", "wi_0", "gate")
UPS = ("up_proj", "w3", "wi_1", "up")
ALONE = ("gate_up_proj", "fc1", "c_fc", "dense_h_to_4h", "fc_in", "wi", "lin1", "up_proj", "w1")
OUTS = ("down_proj", "w2", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "wo", "lin2", "down")


class BlockNames(NamedTuple):
    """The linears of one FFN block, as names within their parent.

    Attributes:
        kind: "glu" (gate and up), "fused_glu" (one linear of twice the width, gate first) or "mlp" (one linear).
        ins: the linears that read the block's input; the first one carries the router.
        out: the linear that writes the block's output.
    """

    kind: str
    ins: tuple[str, ...]
    out: str

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.ins, self.out)


def block_among(widths: dict[str, tuple[int, int]]) -> BlockNames | None:
    """The FFN block that the linears of one module form, or None.

    Args:
        widths: name -> `(d_in, d_out)`.
    """
    out = next((name for name in OUTS if name in widths), None)
    if out is None:
        return None
    d_model, hidden = widths[out][1], widths[out][0]
    gate = next((name for name in GATES if widths.get(name) == (d_model, hidden)), None)
    up = next((name for name in UPS if widths.get(name) == (d_model, hidden)), None)
    if gate is not None and up is not None:
        return BlockNames("glu", (gate, up), out)
    for name in ALONE:
        if widths.get(name) == (d_model, hidden):
            return BlockNames("mlp", (name,), out)
        if widths.get(name) == (d_model, 2 * hidden):
            return BlockNames("fused_glu", (name,), out)
    return None


GLU_CLASSES = frozenset(
    f"{family}MLP"
    for family in (
        *("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Olmo", "Olmo2", "Olmo3", "Granite"),
        *("Cohere", "Cohere2", "SmolLM3", "Ministral", "Phi3", "Glm", "Glm4", "Ernie4_5", "Helium"),
    )
)
TWO_MATRIX_CLASSES = frozenset({"PhiMLP", "GPTNeoXMLP", "FalconMLP"})
ACTIVATIONS = ("act_fn", "activation_fn", "act")


def fast_activation(parent: nn.Module) -> Any:
    """The block's activation if its forward is exactly `out(act(gate) * up)` or `out(act(in))`, else None.

    By name of transformers' own classes, each of which a test holds against the source: a class of the user's own may do
    more between its linears, and so may a function that somebody has put in the place of the class's forward. Then only
    that code will do.
    """
    kind = type(parent)
    if not kind.__module__.startswith("transformers.models."):
        return None
    if kind.__name__ not in GLU_CLASSES and kind.__name__ not in TWO_MATRIX_CLASSES:
        return None
    if not _has_its_own_forward(kind):
        return None
    return next((getattr(parent, name) for name in ACTIVATIONS if callable(getattr(parent, name, None))), None)


def _has_its_own_forward(kind: type[nn.Module]) -> bool:
    """Whether nobody has replaced or wrapped the forward that the class was defined with."""
    forward = kind.forward
    own = kind.__module__, f"{kind.__name__}.forward"
    return (forward.__module__, forward.__qualname__) == own and not hasattr(forward, "__wrapped__")
