"""How the balance gradient reaches any trainer, and how padding reaches the router.

A balance loss cannot be returned: a wrapped linear keeps its return type, TRL computes its losses from other outputs,
and a value stashed on the module is lost under re-entrant checkpointing. So it is never formed in the forward pass at
all. `balanced` is the identity on the router's logits whose backward adds the loss's gradient to theirs. Backward runs
exactly once per micro-batch in every checkpointing mode, so the counting is done there too.

Padding is read from the attention mask that the attention module of the same layer receives. A hook on the attention
module (not on the decoder layer) is replayed when a checkpointed layer is recomputed, so two forward passes before one
backward pass do not see each other's masks.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from moe_peft.balance import LOAD_WINDOW, expert_counts, localized_loss, switch_gradient
from moe_peft.errors import refuse
from moe_peft.masks import real_from_mask
from moe_peft.routing import Routing, RoutingRule, dense_weights


_aux_scale = torch.ones((), dtype=torch.float64)  # a scalar of no dimension: products take the other factor's dtype


def set_aux_scale(scale: float) -> None:
    """Scale every balance gradient from now on, so that it matches the loss of the trainer.

    Use 1 / gradient_accumulation_steps, times the scale of a GradScaler if there is one. `MoeCallback` does this at
    each step under any transformers or TRL trainer; a loop of your own calls it once. A tensor holds the value, so that
    a compiled graph does not have to be built anew for each one.
    """
    _aux_scale.fill_(scale)


class RouterState:
    """What one router has seen: the load over the last micro-batches, and sums for the report.

    Plain tensors on the router's device, not buffers: DDP broadcasts buffers from rank 0, which would overwrite the
    other ranks' counts. Nothing here is saved with the adapter, and nothing is read on the host until asked for.

    Attributes:
        load: `[E]`, decaying counts of the slots that each expert got (window `LOAD_WINDOW` micro-batches), or None.
        counts, probability: `[E]`, sums over the tokens seen since `reset`, or None before any.
        entropy, tokens: scalars, likewise; entropy in nats, summed over tokens.
    """

    def __init__(self) -> None:
        self.load: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the sums for the report; the load that balancing uses stays."""
        self.counts: Tensor | None = None
        self.probability: Tensor | None = None
        self.entropy: Tensor | None = None
        self.tokens: Tensor | None = None

    @torch.no_grad()
    def observe(self, routing: Routing, real: Tensor | None) -> Tensor:
        """Add one micro-batch to the sums; returns its counts `[E]`."""
        log_probs = routing.router_logits.log_softmax(-1)
        probs = log_probs.exp()
        mask = probs.new_ones(probs.shape[0]) if real is None else real.to(probs.dtype)
        # Under a dense rule every expert is "chosen" by every token; its load is the weight that it gets.
        counts = mask @ dense_weights(routing) if routing.top_k_index is None else expert_counts(routing, real)
        entropy, tokens = -((probs * log_probs).sum(-1) * mask).sum(), mask.sum()
        self.counts = _sum(self.counts, counts)
        self.probability = _sum(self.probability, mask @ probs)
        self.entropy = _sum(self.entropy, entropy)
        self.tokens = _sum(self.tokens, tokens)
        return counts

    @torch.no_grad()
    def updated_load(self, counts: Tensor) -> Tensor:
        """Add one micro-batch to the decaying counts and return each expert's share, `[E]`, summing to 1."""
        if self.load is None or self.load.device != counts.device or self.load.shape != counts.shape:
            self.load = counts.clone()
        else:
            self.load = self.load * (1 - 1 / LOAD_WINDOW) + counts
        return self.load / self.load.sum().clamp(min=1)


def _sum(so_far: Tensor | None, new: Tensor) -> Tensor:
    """Started anew when the model has moved to another device."""
    return new if so_far is None or so_far.device != new.device else so_far + new


BalanceGradient = Callable[[RouterState, Routing, Tensor | None, Tensor | None, RoutingRule, int], Tensor]


def switch_step(
    state: RouterState, routing: Routing, real: Tensor | None, task_types: Tensor | None, rule: RoutingRule, top_k: int
) -> Tensor:
    """The gradient of the Switch loss over the window, `[T, E]`; the state's load takes up this micro-batch."""
    load = state.updated_load(expert_counts(routing, real))
    return switch_gradient(routing.router_logits, real, load)


def localized_step(delta: float, variant: str = "cv2") -> BalanceGradient:
    """LoRAMoE's constraint for a given delta; its gradient is taken by autograd from the definition."""

    def step(
        state: RouterState,
        routing: Routing,
        real: Tensor | None,
        task_types: Tensor | None,
        rule: RoutingRule,
        top_k: int,
    ) -> Tensor:
        if task_types is None:
            raise _no_task_types()
        with torch.enable_grad():
            logits = routing.router_logits.detach().requires_grad_()
            loss = localized_loss(rule(logits, top_k), task_types, delta, real, variant)
            return torch.autograd.grad(loss, logits)[0]

    return step


def _no_task_types() -> ValueError:
    return refuse(
        "balance",
        "localized",
        "'none' where the model is not told the samples' task types",
        "Add a column `task_type` to the data set (0 for world knowledge, 1 for other tasks) and wrap the trainer's "
        "collator: `trainer.data_collator = moe_peft.TaskTypeCollator(trainer.data_collator)`, with "
        "`remove_unused_columns=False`. A loop of your own calls `model(..., task_types=tensor)`, one number per row.",
    )


class _Balanced(Function):
    """Identity on the logits; backward adds `coef * scale * gradient` and counts the micro-batch."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        real: Tensor | None,
        task_types: Tensor | None,
        rule: RoutingRule,
        top_k: int,
        coef: float,
        gradient: BalanceGradient | None,
        state: RouterState,
    ) -> Tensor:
        ctx.save_for_backward(logits, real, task_types)
        ctx.settings = (rule, top_k, coef, gradient, state)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, real, task_types = ctx.saved_tensors
        rule, top_k, coef, gradient, state = ctx.settings
        (grad,) = grads
        routing = rule(logits, top_k)
        state.observe(routing, real)
        if gradient is not None and coef:
            extra = gradient(state, routing, real, task_types, rule, top_k)
            grad = grad + extra * (coef * _aux_scale)
        return grad, None, None, None, None, None, None, None


@torch.compiler.disable  # its backward changes the state, which a graph may not; the rest of the layer is compiled
def balanced(
    logits: Tensor,
    state: RouterState,
    rule: RoutingRule,
    top_k: int,
    coef: float,
    gradient: BalanceGradient | None,
    real: Tensor | None,
    task_types: Tensor | None,
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
    """
    return _Balanced.apply(logits, real, task_types, rule, top_k, coef, gradient, state)


class RoutingContext:
    """What the routers of one model need to know about the batch: which tokens are real, and the samples' task types.

    One object per model, shared by its routed layers. Its hooks are bound methods, so that `copy.deepcopy(model)` gives
    the copy's layers their own context.

    Attributes:
        real: `[B, S]` bool for the layer that runs now, or None when every token is real.
        task_types: `[B]` or None.
        recording: count in inference too (for the routing report).
        counted: `[B, S]` bool, the only positions that a recording counts; None counts every real one.
        watching: count in training even where no balance loss asks for it.
    """

    def __init__(self) -> None:
        self.real: Tensor | None = None
        self.task_types: Tensor | None = None
        self.recording = False
        self.counted: Tensor | None = None
        self.watching = False
        self._names_of: dict[type[nn.Module], tuple[str, ...]] = {}

    def watch_attention(self, model: nn.Module) -> None:
        """Hook every attention module of `model` that takes an attention mask; hooks it has already are kept.

        In a hybrid model, layers before the first attention count padding as text.
        """
        if not any(getattr(hook, "__self__", None) is self for hook in model._forward_pre_hooks.values()):
            model.register_forward_pre_hook(self._before_model)
        for module in model.modules():
            if "Attention" not in type(module).__name__ or "attention_mask" not in self._names(module):
                continue
            hooked = any(getattr(hook, "__self__", None) is self for hook in module._forward_pre_hooks.values())
            if not hooked:
                module.register_forward_pre_hook(self._before_attention, with_kwargs=True)

    def _before_model(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # Layers before the first attention (hybrid models) must not see the mask of the batch before; they see none.
        self.real = self.task_types = None

    def release(self, model: nn.Module) -> None:
        """Take the hooks off again, for when the model gets its linear layers back."""
        for module in model.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if getattr(hook, "__self__", None) is self:
                    del module._forward_pre_hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)

    def real_tokens(self, tokens: int) -> Tensor | None:
        """The mask for an input of that many tokens, `[tokens]`; None when all are real."""
        real = None if self.real is None or self.real.numel() != tokens else self.real.reshape(-1)
        if self.counted is None or self.counted.numel() != tokens:
            return real
        counted = self.counted.reshape(-1)
        return counted if real is None else real & counted

    def required_task_types(self) -> Tensor:
        """The samples' task types, `[B]`.

        Raises:
            ValueError: if the model was not told.
        """
        if self.task_types is None:
            raise _no_task_types()
        return self.task_types

    def _names(self, module: nn.Module) -> tuple[str, ...]:
        """What the module's forward calls its arguments."""
        kind = type(module)  # FSDP2 gives modules a class of its own after they were hooked
        if kind not in self._names_of:
            self._names_of[kind] = tuple(inspect.signature(kind.forward).parameters)[1:]  # without self
        return self._names_of[kind]

    def _before_attention(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        task_types = kwargs.get("task_types")
        if "task_types" in kwargs:
            kwargs = {name: value for name, value in kwargs.items() if name != "task_types"}
        given = {**dict(zip(self._names(module), args, strict=False)), **kwargs}
        if given.get("key_value_states") is not None or given.get("encoder_hidden_states") is not None:
            return args, kwargs  # cross-attention: its mask is about another sequence
        states = given.get("hidden_states", args[0] if args else None)
        states = states if isinstance(states, Tensor) and states.dim() == 3 else None
        self.task_types = None if task_types is None else _one_per_row(task_types, states)
        watched = self.recording or (module.training and torch.is_grad_enabled())
        self.real = real_from_mask(given.get("attention_mask"), states) if watched else None
        return args, kwargs


def _one_per_row(task_types: Tensor, states: Tensor | None) -> Tensor:
    if task_types.dim() != 1 or (states is not None and task_types.shape[0] != states.shape[0]):
        rows = "one number per row" if states is None else f"{states.shape[0]} numbers, one per row of the batch"
        raise refuse(
            "task_types",
            list(task_types.shape),
            f"of the shape of {rows}",
            "With packing or padding-free batches one row holds several samples: turn both off, or set `balance` to "
            "'none'.",
        )
    return task_types
