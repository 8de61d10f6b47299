"""How the balance gradient reaches any trainer, and what it counts on the way.

A balance loss cannot be returned: a wrapped linear keeps its return type, TRL computes its losses from other outputs,
and a value stashed on the module is lost under re-entrant checkpointing. So it is never formed in the forward pass at
all. `balanced` is the identity on the router's logits whose backward adds the loss's gradient to theirs. Backward runs
exactly once per micro-batch in every checkpointing mode, so the counting is done there too.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd import Function

from moe_peft.balance import LOAD_WINDOW, localized_loss, switch_gradient
from moe_peft.context import RoutingContext, set_aux_scale
from moe_peft.routing import Routing, RoutingRule, assignments
from moe_peft.row_types import no_task_types


__all__ = [
    "BalanceGradient",
    "MicroBatch",
    "RouterState",
    "RoutingContext",
    "balanced",
    "localized_step",
    "loss_step",
    "remember_choice",
    "set_aux_scale",
    "switch_step",
]

_states: "WeakValueDictionary[int, RouterState]" = WeakValueDictionary()
_numbers = itertools.count()


class MicroBatch(NamedTuple):
    """What backward knows of one micro-batch of T tokens.

    Attributes:
        routing: computed again from the logits.
        real: `[T]` bool or None.
        task_types: `[B]` or None.
        counts: `[E]`, how many real tokens chose each expert (under a dense rule the weight that it got).
        probs: `[T, E]`, the softmax of the logits.
        rows: B, or 0 where it is not known.
    """

    routing: Routing
    real: Tensor | None
    task_types: Tensor | None
    counts: Tensor
    probs: Tensor
    rows: int = 0


class RouterState:
    """What one router has seen: the load over the last micro-batches, and sums for the report.

    Plain tensors on the router's device, not buffers: DDP broadcasts buffers from rank 0, which would overwrite the
    other ranks' counts. Nothing here is saved with the adapter, and nothing is read on the host until asked for.

    Attributes:
        load: `[E]`, decaying counts of the slots that each expert got (over `window` updates), or None.
        routers: how many routers share one loss on labels, whose mean is taken over them.
        window: `LOAD_WINDOW`, times the layers that ask this router in each micro-batch.
        step_counts: `[E + 1]`, the same since the last optimizer step and not decaying, then the number of tokens; None
            before any. Kept where `collects` is set, for the selection bias.
        counts, probability: `[E]`, sums over the tokens seen since `reset`, or None before any.
        entropy, tokens: scalars, likewise; entropy in nats, summed over tokens.
        types_seen: `[E]` bool, the samples' domains that a router taught by labels has met in training; None before any.
    """

    def __init__(self) -> None:
        self.types_seen: Tensor | None = None
        self.load: Tensor | None = None
        self.window = LOAD_WINDOW
        self.routers = 1
        self.collects = False
        self.step_counts: Tensor | None = None
        self.reset()
        self._register()

    def _register(self) -> None:
        number = next(_numbers)
        _states[number] = self
        # A tensor, so that one compiled graph serves the routers of all layers; here, whatever device a model is made on.
        self.number = torch.tensor(number, device="cpu")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("number", "settings")}

    def __setstate__(self, values: dict[str, Any]) -> None:
        """A copy is a state of its own."""
        self.__dict__.update(values)
        self._register()

    def mark_types(self, types: Tensor, count: int) -> None:
        """Remember that samples of these domains, of `count` that there are, came by."""
        if self.types_seen is None:
            self.types_seen = torch.zeros(count, dtype=torch.bool, device=types.device)
        self.types_seen[types.flatten().long()] = True

    def reset(self) -> None:
        """Forget the sums for the report; the load that balancing uses stays."""
        self._sums: Tensor | None = None  # [3 E + 1]: counts, probabilities, entropy by expert, tokens

    @torch.no_grad()
    def observe(self, routing: Routing, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add one micro-batch to the sums; returns its counts `[E]` and the tokens' probabilities `[T, E]`."""
        log_probs = routing.router_logits.log_softmax(-1)
        probs = log_probs.exp()
        # Under a dense rule every expert is "chosen" by every token; its load is the weight that it gets.
        used = routing.top_k_weights if routing.top_k_index is None else assignments(routing)
        columns = torch.cat((used, probs, probs * log_probs, probs.new_ones(probs.shape[0], 1)), dim=1)
        sums = columns.sum(0) if real is None else real.to(probs.dtype) @ columns  # one pass over the tokens for all
        self._sums = sums if _is_other(self._sums, sums) else torch.add(sums, self._sums)
        return sums[: probs.shape[1]], probs

    @torch.no_grad()
    def collect(self, counts: Tensor, tokens: Tensor) -> None:
        """Add one micro-batch to the counts of this optimizer step."""
        new = torch.cat((counts, tokens.reshape(1)))
        self.step_counts = new if _is_other(self.step_counts, new) else torch.add(new, self.step_counts)

    @property
    def counts(self) -> Tensor | None:
        return None if self._sums is None else self._sums[:-1].chunk(3)[0]

    @property
    def probability(self) -> Tensor | None:
        return None if self._sums is None else self._sums[:-1].chunk(3)[1]

    @property
    def entropy(self) -> Tensor | None:
        return None if self._sums is None else -self._sums[:-1].chunk(3)[2].sum()

    @property
    def tokens(self) -> Tensor | None:
        return None if self._sums is None else self._sums[-1]

    @torch.no_grad()
    def updated_load(self, counts: Tensor) -> Tensor:
        """Add one micro-batch to the decaying counts and return each expert's share, `[E]`, summing to 1."""
        if _is_other(self.load, counts):
            self.load = counts
        else:
            self.load = torch.add(counts, self.load, alpha=1 - 1 / self.window)
        return self.load / self.load.sum().clamp(min=1)


def _is_other(so_far: Tensor | None, new: Tensor) -> bool:
    """Whether there is nothing yet to add to, or the model has moved to another device since."""
    return so_far is None or so_far.device != new.device or so_far.shape != new.shape


BalanceGradient = Callable[[RouterState, MicroBatch, RoutingRule, int], Tensor]
"""`(state, micro_batch, rule, top_k)` -> the gradient of a balance loss with respect to the logits, `[T, E]`."""


def switch_step(state: RouterState, batch: MicroBatch, rule: RoutingRule, top_k: int) -> Tensor:
    """The gradient of the Switch loss over the window, `[T, E]`; the state's load takes up this micro-batch."""
    return switch_gradient(batch.routing.router_logits, batch.real, state.updated_load(batch.counts), batch.probs)


def localized_step(delta: float, variant: str = "cv2") -> BalanceGradient:
    """LoRAMoE's constraint for a given delta; its gradient is taken by autograd from the definition."""

    def step(state: RouterState, batch: MicroBatch, rule: RoutingRule, top_k: int) -> Tensor:
        task_types = batch.task_types
        if task_types is None:
            raise no_task_types()

        def loss(logits: Tensor) -> Tensor:
            return localized_loss(rule(logits, top_k), task_types, delta, batch.real, variant)

        return torch.func.grad(loss)(batch.routing.router_logits)  # plain autograd is off inside an operator

    return step


def loss_step(loss: Callable[[Tensor, MicroBatch, RoutingRule, int], Tensor]) -> BalanceGradient:
    """The gradient of `loss(logits, micro_batch, rule, top_k)`, by autograd from its definition."""

    def step(state: RouterState, batch: MicroBatch, rule: RoutingRule, top_k: int) -> Tensor:
        return torch.func.grad(lambda logits: loss(logits, batch, rule, top_k))(batch.routing.router_logits)

    return step


class _Settings(NamedTuple):
    """What backward needs besides tensors and the state."""

    rule: RoutingRule
    top_k: int
    coef: float
    gradient: BalanceGradient | None
    context: RoutingContext


def _counted(
    grad: Tensor,
    logits: Tensor,
    real: Tensor | None,
    task_types: Tensor | None,
    state: RouterState,
    rows: int,
    index: Tensor | None = None,
) -> Tensor:
    """`grad` plus the balance gradient; the state counts the micro-batch.

    `index [T, K]` is what the forward pass chose, where it left it; else the rule is asked again.
    """
    rule, top_k, coef, gradient, context = state.settings
    if index is None:
        routing = rule(logits, top_k)
    else:  # under a rule that selects, nothing here reads the weights
        routing = Routing(logits, logits.new_ones(()).expand(index.shape), index)
    if gradient is None and not context.watching:
        counts, probs = _counts(routing, real), None
    else:
        counts, probs = state.observe(routing, real)
    if state.collects:
        state.collect(counts, logits.new_tensor(logits.shape[0]) if real is None else real.sum().to(logits.dtype))
    if gradient is None or probs is None or not coef:
        return grad
    batch = MicroBatch(routing, real, task_types, counts, probs, rows)
    return torch.add(grad, gradient(state, batch, rule, top_k), alpha=coef * context.scale)


def _counts(routing: Routing, real: Tensor | None) -> Tensor:
    """How many real tokens chose each expert, `[E]`; under a dense rule the weight that it got."""
    used = routing.top_k_weights if routing.top_k_index is None else assignments(routing)
    return used.sum(0) if real is None else real.to(used.dtype) @ used


def remember_choice(routing: Routing) -> None:
    """Leave what the forward pass chose for the backward pass of its own `balanced` logits, which counts it.

    The tensor itself, which the experts' kernel keeps as well, and with the node of the graph, not the module: the same
    router may be asked many times before any backward pass. A compiled graph asks the rule again.
    """
    if torch.compiler.is_compiling():
        return
    index, node = routing.top_k_index, routing.router_logits.grad_fn
    if index is not None and getattr(node, "_forward_cls", None) is _Balanced:
        node.index = index


# It looks at Python objects, so no CUDA graph may hold it. torch < 2.9 has no such tag, and partitions no graphs.
_TAGS = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op("moe_peft::counted", mutates_args=(), **_TAGS)
def _counted_by_number(
    grad: Tensor, logits: Tensor, real: Tensor | None, task_types: Tensor | None, number: Tensor, rows: int
) -> Tensor:
    """`_counted` for a compiled graph, which may neither hold nor change Python objects: it knows the state by number.

    It takes `grad` so that the compiler cannot move it into the forward pass, where it would count too often.
    """
    result = _counted(grad, logits, real, task_types, _states[int(number)], rows)
    return grad.clone() if result is grad else result  # an operator may not return what it was given


@_counted_by_number.register_fake
def _(
    grad: Tensor, logits: Tensor, real: Tensor | None, task_types: Tensor | None, number: Tensor, rows: int
) -> Tensor:
    return torch.empty_like(grad)


class _Balanced(Function):
    """Identity on the logits; backward adds `coef * scale * gradient` and counts the micro-batch."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        real: Tensor | None,
        task_types: Tensor | None,
        number: Tensor,
        state: RouterState,
        rows: int,
    ) -> Tensor:
        ctx.save_for_backward(logits, real, task_types, number)
        ctx.state, ctx.rows = state, rows
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, real, task_types, number = ctx.saved_tensors
        if torch.compiler.is_compiling():
            grad = _counted_by_number(grads[0], logits, real, task_types, number, ctx.rows)
        else:
            grad = _counted(grads[0], logits, real, task_types, ctx.state, ctx.rows, getattr(ctx, "index", None))
        return grad, None, None, None, None, None


def balanced(
    logits: Tensor,
    state: RouterState,
    rule: RoutingRule,
    top_k: int,
    coef: float,
    gradient: BalanceGradient | None,
    real: Tensor | None,
    task_types: Tensor | None,
    context: RoutingContext,
    rows: int = 0,
) -> Tensor:
    """The logits, unchanged; in backward `coef * scale * d(balance loss)/d(logits)` joins their gradient.

    The same as adding `coef * loss` to the loss of the trainer, for any trainer (see `set_aux_scale`).

    Args:
        logits: `[T, E]`.
        state: of this router; counts the micro-batch once, in backward.
        rule, top_k: how the tokens are routed; the selection is computed again in backward, nothing is saved for it.
        coef: `router_aux_loss_coef`.
        gradient: `switch_step`, the result of `localized_step`, or None to count only.
        real: `[T]` bool or None.
        task_types: `[B]` or None.
        context: of the model, for its scale.
        rows: how many rows the tokens are of, or 0 where it is not known.
    """
    state.settings = _Settings(rule, top_k, coef, gradient, context)
    return _Balanced.apply(logits, real, task_types, state.number, state, rows)
