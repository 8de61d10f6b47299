"""Linear layers that follow one router: which they are, and how its decision gets from the first to the others."""

from typing import Any

from torch import nn

from moe_peft.routing import Routing


_SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
"""Names of the linear layers that read the same tensor, in the families of transformers."""


def unit_key(scope: str, parent_key: str, name: str) -> str:
    """Which unit a layer belongs to.

    Args:
        scope: "group", "block" or "model".
        parent_key: of the module that holds the layer.
        name: of the layer in it.
    """
    if scope == "model":
        return ""
    if scope == "block":
        return parent_key
    group = next((names for names in _SHARED_INPUTS if name in names), (name,))
    return f"{parent_key}.{'+'.join(group)}"


class RouterUnit:
    """The layers that follow one router, for one scope; shared by all adapters of that scope.

    Attributes:
        scope: "group", "block" or "model".
        first: by adapter, the layer that has the router.
        members: by adapter, how many layers follow it, itself included.
        pending: by adapter, the decision on its way to the layers that have not run yet, and how many those are.
    """

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self.first: dict[str, nn.Module] = {}
        self.members: dict[str, int] = {}
        self.pending: dict[str, tuple[Routing, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not in the middle of a pass."""
        return {**self.__dict__, "pending": {}}

    def join(self, adapter_name: str, layer: nn.Module) -> bool:
        """Become a member; True for the first, who makes the router."""
        if self.first.setdefault(adapter_name, layer) is layer:
            self.members[adapter_name] = 1
            return True
        self.members[adapter_name] += 1
        return False

    def leave(self, adapter_name: str) -> None:
        """The adapter is deleted."""
        for by_adapter in (self.first, self.members, self.pending):
            by_adapter.pop(adapter_name, None)

    def hand_on(self, adapter_name: str, routing: Routing) -> None:
        """The first layer has decided."""
        if self.members[adapter_name] > 1:
            self.pending[adapter_name] = routing, self.members[adapter_name] - 1

    def take(self, adapter_name: str, tokens: int) -> Routing:
        """What the first layer decided on these tokens; forgotten once all have it, so that no graph is kept alive.

        Raises:
            RuntimeError: if the first layer has not run on them.
        """
        routing, left = self.pending.pop(adapter_name, (None, 0))
        if routing is None or routing.top_k_weights.shape[0] != tokens:
            raise RuntimeError(
                f"A layer with `router_scope` = {self.scope!r} ran before the first of its {self.scope}, which has the "
                "router. Call the block as a whole. Where the model itself calls its layers in another order than it defines "
                "them, as OPT and BART do, set `router_scope` to 'linear'."
            )
        if left > 1:
            self.pending[adapter_name] = routing, left - 1
        return routing
