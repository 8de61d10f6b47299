"""What the routers of one model need to know: which tokens are real, what the samples are, and to what scale they train.

Padding is read from the attention mask that the attention module of the same layer receives. A hook on the attention
module (not on the decoder layer) is replayed when a checkpointed layer is recomputed, so two forward passes before one
backward pass do not see each other's masks.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from moe_peft.errors import refuse
from moe_peft.masks import real_from_mask
from moe_peft.passes import OfGradient, OfThread, kept_by_pass, kept_by_thread
from moe_peft.prompts import (
    cache_of,
    check_one_sample_per_row,
    is_packed,
    leading_prompt,
    no_prompt,
    no_single_prompt,
    past_of,
    pooled,
)
from moe_peft.row_types import check_types, no_task_types, one_per_row


_live: "WeakSet[RoutingContext]" = WeakSet()

_OURS = ("task_types", "prompt_mask", "routing_embeddings", "routing_pool")
"""Arguments that travel through the model's layers to the attention for us, and are taken out there."""


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


def set_step(model: nn.Module, step: int | None) -> None:
    """Say which optimizer step a loop of your own is at, for `schedule_steps`. `MoeCallback` does so under a trainer.

    Args:
        model: with routed layers.
        step: from 0; None is the end of every schedule, which is also where inference always is.
    """
    for context in contexts_in(model):
        context.step = step


@contextmanager
def task_types(model: nn.Module, types: Tensor | list[int]) -> Iterator[None]:
    """Every pass within is about samples of these types: for `generate`, which takes no `task_types` of its own.

    Args:
        model: with routed layers.
        types: one whole number for each row of the batch; with beams, each counts for all beams of its row.
    """
    types = torch.as_tensor(types)
    contexts = contexts_in(model)
    before = [context.fixed_types for context in contexts]
    for context in contexts:
        context.fixed_types = types
    try:
        yield
    finally:
        for context, old in zip(contexts, before, strict=True):
            context.fixed_types = old


def contexts_in(model: nn.Module) -> list["RoutingContext"]:
    """The contexts of a model, one for each model that its routed layers belong to."""
    found = {
        id(c): c for module in model.modules() if isinstance(c := getattr(module, "context", None), RoutingContext)
    }
    return list(found.values())


class RoutingContext:
    """What the routers of one model need to know.

    One object per model, shared by its routed layers. Its hooks are bound methods, so that `copy.deepcopy(model)` gives
    the copy's layers their own context.

    Attributes:
        real: `[B, S]` bool for the layer that runs now, or None when every token is real.
        task_types: `[B]` or `[B, S]`, or None.
        fixed_types: `[B]` for passes that bring no task types along; see `task_types`.
        rows: B of the batch that the layer works on, or 0 before any attention has seen it.
        step: of the optimizer, or None; see `set_step`.
        wants_prompt: some router routes whole sequences by their prompt.
        prompt: `[B, S]` bool, the tokens that such a router may look at; None is every real one.
        cache: of the generation that is going on, or None.
        decoding: the same, once the prompt has passed.
        pinned: for each such cache, what the routers decided on its prompt, by router.
        units: the layers that follow one router, by scope and place (`tuners.scopes`).
        embedding_width: d of the input embeddings, 0 where the model has none.
        wants_embeddings: some router looks at the model's input embeddings.
        embeddings: `[B, S, d]` for it.
        wants_pool: some gate looks at the prompt's embeddings, pooled.
        pool: `[B, 2, d]` for it, their maximum and their mean.
        recording: count in inference too (for the routing report).
        counted: `[B, S]` bool, the only positions that a recording counts; None counts every real one.
        wants_rows, packed: whether a balance may be by row; then, whether a row of this training pass holds several samples.
        watching: count in training even where no balance loss asks for it.
        kept: within one call of the user's, what layers keep from one token that is generated to the next, by layer; None
            outside, where weights may change.
        scale: of every balance gradient; read in backward. See `scale_balance`.
        controlled: of the class: somewhere a block of `routing_control` is open.
    """

    controlled = False

    real, task_types, rows = kept_by_pass("real"), kept_by_pass("task_types"), kept_by_pass("rows")
    prompt, embeddings, pool = kept_by_pass("prompt"), kept_by_pass("embeddings"), kept_by_pass("pool")
    cache, decoding = kept_by_pass("cache"), kept_by_pass("decoding")
    prompt_length, kept = kept_by_thread("prompt_length"), kept_by_thread("kept")

    def __init__(self) -> None:
        self.of_thread, self.with_gradient = OfThread(), OfGradient()
        self.fixed_types: Tensor | None = None
        self.wants_rows = self.packed = False
        self.step: int | None = None
        self.wants_prompt = self.wants_embeddings = self.wants_pool = False
        self.units: dict[tuple[str, str], Any] = {}
        self.embedding_width = 0
        self.pinned: WeakKeyDictionary[Any, dict[int, Tensor]] = WeakKeyDictionary()
        self.recording = False
        self.counted: Tensor | None = None
        self.watching = False
        self.scale = 1.0
        self._running: Callable[[], bool] | None = None
        self._names_of: dict[type[nn.Module], tuple[str, ...]] = {}
        _live.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to no trainer: what one has set on this model is not set on the copy."""
        fresh = {} if self._running is None else {"watching": False, "scale": 1.0, "_running": None, "step": None}
        passing = ("pinned", "of_thread", "with_gradient")  # of one pass, and not of a copy of the model
        return {**{name: value for name, value in self.__dict__.items() if name not in passing}, **fresh}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        self.of_thread, self.with_gradient = OfThread(), OfGradient()
        self.pinned = WeakKeyDictionary()
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
            model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
        self.embedding_width = getattr(embeddings, "embedding_dim", 0)
        for module in model.modules():
            if "Attention" not in type(module).__name__ or "attention_mask" not in self._names(module):
                continue
            hooked = any(getattr(hook, "__self__", None) is self for hook in module._forward_pre_hooks.values())
            if not hooked:
                module.register_forward_pre_hook(self._before_attention, with_kwargs=True)

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        # Layers before the first attention (hybrid models) must not see the mask of the batch before; they see none.
        # With re-entrant checkpointing the layers of a pass with gradient run without.
        for held in (self.of_thread, self.with_gradient) if torch.is_grad_enabled() else (self.of_thread,):
            held.forget()
        if self._running is not None and not torch.compiler.is_compiling() and not self._running():
            self.scale_balance(1.0)
            self.watching, self.step = False, None
        if not (self.wants_prompt or self.wants_embeddings or self.wants_rows):
            return args, kwargs
        given = {**dict(zip(self._names(module), args, strict=False)), **kwargs}
        self.packed = self.wants_rows and module.training and is_packed(given)
        return args, {**kwargs, **self._for_routers(module, given)}

    def _for_routers(self, module: nn.Module, given: dict[str, Any]) -> dict[str, Tensor]:
        """Arguments for the attention to hand over. As arguments they are replayed when a layer is recomputed."""
        extra: dict[str, Tensor] = {}
        if self.wants_prompt and self._routes_sequences(module):
            if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
                raise no_single_prompt("the prompt and the answer stand in an encoder and a decoder", "Use 'token'.")
            check_one_sample_per_row(given)
            prompt = self._prompt(module, given) if given.get("prompt_mask") is None else None
            if prompt is not None:
                extra["prompt_mask"] = prompt
        if self.wants_embeddings or self.wants_pool:
            embeddings, ids = given.get("inputs_embeds"), given.get("input_ids")
            if embeddings is None and ids is not None:
                embeddings = module.get_input_embeddings()(ids)  # type: ignore[operator]
            if embeddings is not None and self.wants_embeddings:
                extra["routing_embeddings"] = embeddings.detach()
            if embeddings is not None and self.wants_pool:
                prompt = extra.get("prompt_mask", given.get("prompt_mask"))
                past = past_of(cache_of(given))
                extra["routing_pool"] = pooled(embeddings.detach(), prompt, given.get("attention_mask"), past)
        return extra

    def _routes_sequences(self, module: nn.Module) -> bool:
        """Whether an adapter that looks at prompts is active, and not merely there or gone."""
        layers = (m for m in module.modules() if getattr(m, "context", None) is self)
        return any(layer.routes_sequences() for layer in layers)  # type: ignore[operator]

    def _prompt(self, module: nn.Module, given: dict[str, Any]) -> Tensor | None:
        ids = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        labels = given.get("labels")
        if labels is not None and labels.dim() == 1 and ids is not None:  # a class for each row, and all of it is read
            return torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
        if labels is not None:
            return leading_prompt(labels, given.get("attention_mask"))
        if module.training and torch.is_grad_enabled():
            raise no_prompt()
        if ids is None or self.prompt_length is None:
            return None
        if given.get("past_key_values") is None:
            self.prompt_length = self.prompt_length or ids.shape[1]  # 0 before the first pass of a call
        elif not self.prompt_length or past_of(cache_of(given)) != 0:
            return None
        elif ids.shape[1] < self.prompt_length:
            raise no_single_prompt("the prompt comes in pieces", "Leave `prefill_chunk_size` out.")
        # The first pass may bring the draft of an answer along (assisted decoding), which is no part of the prompt.
        columns = torch.arange(ids.shape[1], device=ids.device)
        return (columns < self.prompt_length).expand(ids.shape[0], -1)

    @contextmanager
    def one_call(self, prompt_length: int = 0) -> Iterator[None]:
        """One call of the user's: its first pass is the prompt, later ones without a cache repeat and extend it.

        Args:
            prompt_length: S of the prompts, where it is known; 0 is that of the first pass.
        """
        before = self.prompt_length, self.kept
        self.prompt_length, self.kept = prompt_length, {}
        try:
            yield
        finally:
            self.prompt_length, self.kept = before

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

    def prompt_tokens(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Which tokens a router of whole sequences looks at, `[rows, columns, 1]` of 0 and 1.

        Raises:
            ValueError: in training, if the prompt did not arrive.
        """
        seen = like.new_ones(rows, columns, 1)
        if self.real is not None and self.real.numel() == rows * columns:
            seen = seen * self.real.reshape(rows, columns, 1).to(seen.dtype)
        if self.prompt is not None and self.prompt.numel() == rows * columns:
            return seen * self.prompt.reshape(rows, columns, 1).to(seen.dtype)
        if like.requires_grad:
            raise no_prompt()
        return seen

    def pin(self, router: int, decided: Tensor) -> None:
        """Keep what a prompt has decided for the tokens that are generated after it."""
        if self.cache is not None:
            self.pinned.setdefault(self.cache, {})[router] = decided.detach()

    def required_embeddings(self, x: Tensor) -> Tensor:
        """The input embeddings of the tokens that `x [*, d_in]` is about, `[B, S, d]`.

        Raises:
            ValueError: if they did not arrive.
        """
        found = self.embeddings
        if found is None or found.numel() // found.shape[-1] != x.numel() // x.shape[-1]:
            raise refuse(
                "router_scope",
                "model",
                "another scope where the model does not hand its input embeddings on to its layers",
                "Use 'block', which needs nothing of the model.",
            )
        return found

    def required_pool(self) -> Tensor:
        """The prompts' embeddings, `[B, 2, d]`: their maximum and their mean.

        Raises:
            ValueError: if they did not arrive.
        """
        if self.pool is None:
            allowed = "another where the model does not hand its input embeddings on to its layers"
            raise refuse("gate", "sequence", allowed, "'token' needs nothing of the model.")
        return self.pool

    def required_task_types(self) -> Tensor:
        """The samples' task types, `[B]`.

        Raises:
            ValueError: if the model was not told, or told those of tokens.
        """
        if self.task_types is None:
            raise no_task_types()
        if self.task_types.dim() != 1:
            allowed = "of the shape of one number per row with `balance` = 'localized', which looks at whole samples"
            raise refuse("task_types", list(self.task_types.shape), allowed, "Give each row its type.")
        return self.task_types

    def types_of_tokens(self, tokens: int, count: int, rows: int = 0) -> Tensor:
        """The type of each token, `[tokens]`.

        Args:
            tokens: T.
            count: how many types there are.
            rows: of how many rows the tokens are, or 0 where it is not known.

        Raises:
            ValueError: if the model was not told, or of another number of rows, or of types that there are not.
        """
        types = self.task_types if self.task_types is not None else self.fixed_types
        if types is None:
            raise no_task_types("expert_groups", "given", "None")
        check_types(types, count)
        rows = rows or self.rows or len(types)
        if types.dim() == 1:  # one for each row, and with beams for each of the row's beams
            if rows % len(types) or tokens % rows:
                allowed = f"of the shape of {rows} numbers, one per row of the batch"
                raise refuse("task_types", list(types.shape), allowed, "Give each row its type.")
            types = types.repeat_interleave(tokens // len(types))
        return types.reshape(-1)

    @contextmanager
    def of_rows(self, rows: list[int], total: int) -> Iterator[None]:
        """What is known of each row, for a layer that works on some rows of the batch alone (`adapter_names`)."""
        names = ("real", "task_types", "fixed_types", "prompt", "embeddings", "pool", "rows")
        before = {name: getattr(self, name) for name in names}
        for name in names[:-1]:
            value = before[name]
            if value is not None and not total % len(value):
                value = value.repeat_interleave(total // len(value), 0)  # types of beams
                setattr(self, name, value[torch.tensor(rows, device=value.device)])
        self.rows = len(rows)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    def _names(self, module: nn.Module) -> tuple[str, ...]:
        """What the module's forward calls its arguments."""
        kind = type(module)  # FSDP2 gives modules a class of its own after they were hooked
        if kind not in self._names_of:
            self._names_of[kind] = tuple(inspect.signature(kind.forward).parameters)[1:]  # without self
        return self._names_of[kind]

    def _before_attention(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        ours = {name: kwargs[name] for name in _OURS if kwargs.get(name) is not None}
        if any(name in kwargs for name in _OURS):
            kwargs = {name: value for name, value in kwargs.items() if name not in _OURS}
        given = {**dict(zip(self._names(module), args, strict=False)), **kwargs}
        if given.get("key_value_states") is not None or given.get("encoder_hidden_states") is not None:
            return args, kwargs  # cross-attention: its mask is about another sequence
        states = given.get("hidden_states", args[0] if args else None)
        states = states if isinstance(states, Tensor) and states.dim() == 3 else None
        task_types = ours.get("task_types")
        self.task_types = None if task_types is None else one_per_row(task_types, states)
        self.rows = 0 if states is None else states.shape[0]
        self.prompt, self.embeddings = ours.get("prompt_mask"), ours.get("routing_embeddings")
        self.pool = ours.get("routing_pool")
        watched = self.recording or self.wants_prompt or (module.training and torch.is_grad_enabled())
        cache = cache_of(given) if watched else None
        past = past_of(cache, getattr(module, "layer_idx", None) or 0)
        if self.wants_prompt:
            self.cache, self.decoding = cache, cache if past else None
        self.real = real_from_mask(given.get("attention_mask"), states, past) if watched else None
        return args, kwargs
