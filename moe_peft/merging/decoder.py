"""A model taken one decoder layer at a time: what each is called with, its output for stored states, and the head.

What stands around the layers (embedding, masks, rotary angles, final norm, head) stays the family's own code: the model
is called as a whole with its layers stood in for, so that nothing of it is written here a second time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from moe_peft.attach import RoutingContext
from moe_peft.merge import Batch, Factors, on_device, routed_layers
from moe_peft.tuners.layer import MoeTunerLayer


HEAD_BYTES = 256 * 2**20
"""Logits held at once."""


class Call(NamedTuple):
    """What one decoder layer is called with beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Entered(NamedTuple):
    """One batch on its way: the first layer's input `[B, S, d]`, and each layer's call."""

    hidden: Tensor
    calls: list[Call]


class _Stopped(Exception):
    """The last layer was reached: the head is not wanted."""


class Decoder:
    """The stack of decoder layers in which all of an adapter's layers lie.

    Attributes:
        name: of the stack in the model, as a stock checkpoint spells it.
        blocks: its layers.
        adapted: for each of them, module name -> adapted layer.
        usage: linear -> mean weight of each of its experts, `[E]`, as the last fit found it.
    """

    def __init__(self, model: PeftModel, adapter_name: str = "default") -> None:
        """Find the stack.

        Raises:
            ValueError: if the adapter has layers outside of one stack (in a head, or in an encoder and a decoder).
        """
        self.model, self.adapter_name = model, adapter_name
        layers = routed_layers(model, adapter_name)
        self.context: RoutingContext = next(iter(layers.values())).context
        base = model.get_base_model()
        places = {name: _place(base, name) for name in layers}
        self.name = next((place[0] for place in places.values() if place is not None), "")
        outside = [name for name, place in places.items() if place is None or place[0] != self.name]
        if outside:
            raise ValueError(
                f"The adapter has a layer '{outside[0]}' outside of the stack of decoder layers, and merging goes layer by "
                "layer. Serve the adapter routed, or train it with `target_modules` within the layers."
            )
        self.blocks: nn.ModuleList = base.get_submodule(self.name)  # type: ignore[assignment]
        self.adapted: list[dict[str, MoeTunerLayer]] = [{} for _ in self.blocks]
        for name, layer in layers.items():
            self.adapted[places[name][1]][name] = layer  # type: ignore[index]
        self.usage: dict[str, Tensor] = {}
        self._returns_tuple: bool | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    def layer_name(self, index: int) -> str:
        return f"{self.name}.{index}"

    @torch.no_grad()
    def enter(self, batch: Batch) -> Entered:
        """Call the model up to its last layer, each of which only notes what it is called with."""
        hidden: list[Tensor] = []
        calls: list[Call] = []

        def note(index: int, states: Tensor, call: Call) -> Tensor:
            if not index:
                hidden.append(states)
            calls.append(call)
            if index == len(self.blocks) - 1:
                raise _Stopped
            return states

        self.look(batch)
        with self._stood_in(note):
            try:
                self._call(batch)
            except _Stopped:
                pass
        return Entered(hidden[0], calls)

    def look(self, batch: Batch) -> None:
        """See, once, whether a layer returns its states in a tuple, as some families' do; the first one has to be there."""
        if self._returns_tuple is not None:
            return

        def see(module: nn.Module, args: Any, output: Any) -> None:
            self._returns_tuple = isinstance(output, tuple)
            raise _Stopped

        handle = self.blocks[0].register_forward_hook(see)
        try:
            with torch.no_grad():
                self._call({key: value[:1] for key, value in batch.items()})
        except _Stopped:
            pass
        finally:
            handle.remove()

    @torch.no_grad()
    def step(self, index: int, hidden: Tensor, call: Call, counted: Tensor | None = None) -> Tensor:
        """The output of one layer for `hidden [B, S, d]`.

        Args:
            counted: `[B, S]`, the tokens that count where somebody watches.
        """
        self.context.real, self.context.counted = None, counted
        try:
            output = self.blocks[index](hidden, *call.args, **call.kwargs)
        finally:
            self.context.counted = None
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def logits(self, batch: Batch, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the batch and their logits `[b, S, V]`, from the last layer's output, a few rows at a time."""
        vocabulary = self.model.get_base_model().get_output_embeddings().weight.shape[0]
        rows = max(1, HEAD_BYTES // (4 * vocabulary * hidden.shape[1]))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)

            def put(index: int, states: Tensor, call: Call, part: slice = part) -> Tensor:
                return hidden[part] if index == len(self.blocks) - 1 else states

            with self._stood_in(put):
                logits = self._call({key: value[part] for key, value in batch.items()}).logits
            yield part, logits

    def _call(self, batch: Batch) -> Any:
        return self.model(**on_device(batch, self.model), use_cache=False)

    @contextmanager
    def _stood_in(self, stand_in: Any) -> Iterator[None]:
        """Every layer's forward replaced by `stand_in(index, hidden, call)`."""
        before = [block.__dict__.get("forward") for block in self.blocks]

        def forward(index: int) -> Any:
            def in_its_place(*args: Any, **kwargs: Any) -> Any:
                kwargs = dict(kwargs)
                hidden, *others = args if args else (kwargs.pop("hidden_states"),)
                output = stand_in(index, hidden, Call(tuple(others), kwargs))
                return (output,) if self._returns_tuple else output

            return in_its_place

        try:
            for index, block in enumerate(self.blocks):
                block.forward = forward(index)
            yield
        finally:
            for block, own in zip(self.blocks, before, strict=True):
                del block.__dict__["forward"]
                if own is not None:
                    block.forward = own

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inference, with padding and prompts known to whoever watches the layers."""
        was_training, was_recording = self.model.training, self.context.recording
        self.model.eval()
        self.context.recording = True
        try:
            yield
        finally:
            self.context.recording = was_recording
            self.context.real = None
            self.model.train(was_training)

    @contextmanager
    def without(self, index: int, factors: dict[str, Factors] | None = None) -> Iterator[None]:
        """One layer with its frozen linears alone or, with factors, with these in the adapter's place."""
        layers = self.adapted[index]
        before = {name: layer._disable_adapters for name, layer in layers.items()}
        handles = []
        try:
            for name, layer in layers.items():
                layer._disable_adapters = True
                if factors is not None:
                    handles.append(layer.register_forward_hook(_adding(factors[name])))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, layer in layers.items():
                layer._disable_adapters = before[name]


def _adding(f: Factors) -> Any:
    def after(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + (args[0].to(f.A.dtype) @ f.A.T @ f.B.T).to(output.dtype)

    return after


def _place(model: nn.Module, name: str) -> tuple[str, int] | None:
    """The first list of modules on the way to a layer, and the number in it."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[:end]), int(parts[end])
    return None
