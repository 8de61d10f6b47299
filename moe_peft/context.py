"""What the routers of one model need to know: which tokens are real, what the samples are, and to what scale they train.

Padding is read from the attention mask that the attention module of the same layer receives. A hook on the attention
module (not on the decoder layer) is replayed when a checkpointed layer is recomputed, so two forward passes before one
backward pass do not see each other's masks.
"""

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from moe_peft.errors import refuse
from moe_peft.masks import real_from_mask


_live: "WeakSet[RoutingContext]" = WeakSet()


def set_aux_scale(scale: float, model: nn.Module | None = None) -> None:
    """Scale the balance gradients from now on, so that they match the loss of the training loop.

    Use 1 / gradient_accumulation_steps, times the scale of a GradScaler if there is one. A loop of your own calls it
    once it has its adapter. `MoeCallback` does the same at each step under any transformers or TRL trainer, and its
    scale ends with the trainer.

    Args:
        scale: 1.0 is what a model starts with.
        model: with routed layers; the others keep their scale. Default: every model that has such layers by now.
    """
    found = (getattr(module, "context", None) for module in model.modules()) if model else list(_live)
    for context in found:
        if isinstance(context, RoutingContext):
            context.scale_balance(scale)


def no_task_types() -> ValueError:
    """What to do where a balance loss needs the samples' task types and the batch has none."""
    return refuse(
        "balance",
        "localized",
        "'none' where the model is not told the samples' task types",
        "Add a column `task_type` to the data set (0 for world knowledge, 1 for other tasks) and wrap the trainer's "
        "collator: `trainer.data_collator = moe_peft.TaskTypeCollator(trainer.data_collator)`, with "
        "`remove_unused_columns=False`. A loop of your own calls `model(..., task_types=tensor)`, one number per row.",
    )


class RoutingContext:
    """What the routers of one model need to know.

    One object per model, shared by its routed layers. Its hooks are bound methods, so that `copy.deepcopy(model)` gives
    the copy's layers their own context.

    Attributes:
        real: `[B, S]` bool for the layer that runs now, or None when every token is real.
        task_types: `[B]` or None.
        recording: count in inference too (for the routing report).
        counted: `[B, S]` bool, the only positions that a recording counts; None counts every real one.
        watching: count in training even where no balance loss asks for it.
        scale: of every balance gradient; read in backward. See `scale_balance`.
    """

    def __init__(self) -> None:
        self.real: Tensor | None = None
        self.task_types: Tensor | None = None
        self.recording = False
        self.counted: Tensor | None = None
        self.watching = False
        self.scale = 1.0
        self._running: Callable[[], bool] | None = None
        self._names_of: dict[type[nn.Module], tuple[str, ...]] = {}
        _live.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to no trainer: what one has set on this model is not set on the copy."""
        fresh = {} if self._running is None else {"watching": False, "scale": 1.0, "_running": None}
        return {**self.__dict__, **fresh}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        _live.add(self)

    def scale_balance(self, scale: float, running: Callable[[], bool] | None = None) -> None:
        """Multiply every balance gradient of the model by `scale`.

        Args:
            scale: see `set_aux_scale`.
            running: whether the trainer that sets it still runs. Asked at each forward pass: a trainer that was stopped
                by an error takes nothing back, and the first pass outside it ends its scale and its watching. Not
                asked within a compiled model. Without it the scale stays until it is set again.
        """
        self.scale, self._running = scale, running

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
        if self._running is not None and not torch.compiler.is_compiling() and not self._running():
            self.scale_balance(1.0)
            self.watching = False

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
            raise no_task_types()
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
