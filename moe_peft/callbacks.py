"""The trainer's side of balancing: the right scale, loads averaged over ranks, router health in the log.

Nothing to set up: the first adapter that is to be trained puts an automatic `MoeCallback` among the callbacks that
every transformers `Trainer` starts with, and so every TRL trainer. It does nothing for models without routed layers.
Pass one yourself to change its settings; it then takes the automatic one's place.
"""

import sys
import warnings
from collections.abc import Iterator
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from moe_peft.context import RoutingContext
from moe_peft.errors import refuse
from moe_peft.loop import micro_batches, still_training
from moe_peft.tuners.base import MoeTunerLayer
from moe_peft.tuners.router import Router
from moe_peft.watch import (
    COLLAPSE_TOKENS,
    COLLAPSED,
    DEAD_SHARE,
    RouterWindow,
    average_loads,
    collapse,
    device_of,
    find_routers,
    move_biases,
    read_windows,
    unseen_domains,
)


class MoeCallback(TrainerCallback, ExportableState):
    """Keeps the balance loss to scale under a transformers or TRL trainer and reports on the routers.

    It adds to the log, in one host synchronisation per log line: `router/entropy` (mean over layers, as a share of
    log E), `router/max_load` (the busiest expert of any layer; 1 = even, E = it takes everything),
    `router/dead_experts` (over all layers) and `router/balance_loss` (mean over layers; 1 = even); and where tokens choose
    different numbers of experts, `router/active_experts` (per token, null ones left out; mean over layers). Layers are kept
    apart in `history`.

    The load that balancing is based on is averaged over the ranks after each step and saved in the checkpoint's
    `trainer_state.json`, so that a resumed run continues exactly.

    Args:
        adapter_dtype: of this package's adapters on a quantised base, which TRL casts to bfloat16, where a small
            update is lost to rounding. They are all cast, as FSDP2 wants one dtype; with FSDP and DeepSpeed nothing
            is. None leaves them as they are.

    Attributes:
        history: one dict per log line, `{"step": int, "load": {layer: [share, ...]}, "entropy": {layer: share}}`.
    """

    def __init__(self, adapter_dtype: torch.dtype | str | None = torch.float32) -> None:
        dtype = getattr(torch, adapter_dtype, "") if isinstance(adapter_dtype, str) else adapter_dtype
        if not isinstance(dtype, torch.dtype | None):
            raise refuse("adapter_dtype", adapter_dtype, "a torch dtype, its name or None", "Use torch.float32.")
        self.adapter_dtype = dtype
        self.history: list[dict[str, Any]] = []
        self._routers: dict[str, Router] = {}
        self._context: RoutingContext | None = None
        self._before_cast: list[tuple[nn.Parameter, torch.dtype]] = []
        self._gradients_checked = self._warned = False

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._take_charge(model)
        # The optimizer and DDP's buckets are made later, from the parameters as they are then.
        if model is not None and self._context is not None and self.adapter_dtype is not None and not _is_sharded():
            for parameter in _adapter_parameters(model, quantised_only=True):
                if parameter.dtype != self.adapter_dtype:
                    self._before_cast.append((parameter, parameter.dtype))
                    parameter.data = parameter.data.to(self.adapter_dtype)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._take_charge(model)
        self._before_cast.clear()  # from here on it is trained in this dtype
        self._gradients_checked = self._warned = False
        if model is None or self._context is None:
            return
        self._context.scale_balance(1.0, still_training())
        self._context.watching = True
        if getattr(args, "fp16", False) and _distributed_by() == "DEEPSPEED":
            warnings.warn(
                "DeepSpeed scales an fp16 loss inside its engine, where the balance loss cannot follow: next to it the "
                "balance loss all but vanishes. Train with `bf16=True`.",
                stacklevel=2,
            )
        loads = _saved_loads(state)
        # A checkpoint that was written without this callback has no entry, and the trainer would fail at its next save.
        _saved_states(state).setdefault(type(self).__name__, self.state())
        self._routers = find_routers(model)
        for name, router in self._routers.items():
            router.state.reset()
            router.state.step_counts = router.state.types_seen = None
            router.state.load = torch.tensor(loads[name], device=device_of(router)) if name in loads else None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._in_charge() and self._context is not None:
            scaler = getattr(kwargs.get("optimizer"), "scaler", None)
            scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
            passes = micro_batches(args, state, kwargs.get("train_dataloader"))
            self._context.scale_balance(scale / passes, still_training())
            self._context.step = state.global_step

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if self._gradients_checked or model is None or not self._in_charge() or _is_sharded():
            return
        self._gradients_checked = True
        trained = [parameter for parameter in _adapter_parameters(model) if parameter.requires_grad]
        if trained and all(parameter.grad is None for parameter in trained):
            raise RuntimeError(
                f"None of the {len(trained)} adapter parameters has a gradient after the first backward pass, so "
                "training would change nothing. Most often gradient checkpointing cut the graph: call "
                "`model.enable_input_require_grads()` before the trainer is made, or pass "
                "`gradient_checkpointing_kwargs={'use_reentrant': False}`. Otherwise the adapter is disabled or not "
                "the active one: call `model.set_adapter(...)`."
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._in_charge():
            average_loads(self._routers)
            move_biases(self._routers.values())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or self._context is None:  # evaluation logs too, and the end of training
            return
        # Callbacks that the user passes come after those that report to trackers. The automatic one comes before them
        # and writes on behalf of the other.
        (_in_charge_of(self._context) or self)._write(logs, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._in_charge() and self._context is not None:
            self._warn_of_unseen_domains()
            self._context.scale_balance(1.0)
            self._context.watching, self._context.step = False, None
            self._routers = {}

    def state(self) -> dict[str, Any]:
        """What the trainer saves in a checkpoint."""
        loads = {name: r.state.load.tolist() for name, r in self._routers.items() if r.state.load is not None}
        dtype = None if self.adapter_dtype is None else str(self.adapter_dtype).removeprefix("torch.")
        return {"args": {"adapter_dtype": dtype}, "attributes": {"loads": loads}}

    def _take_charge(self, model: nn.Module | None) -> None:
        """Find the model's context; of several callbacks on one model the last one called works, the others rest."""
        layers = [] if model is None else [m for m in model.modules() if isinstance(m, MoeTunerLayer)]
        self._context = layers[0].context if layers else None
        if self._context is None:
            return
        before = _in_charge_of(self._context)
        if isinstance(before, AutomaticMoeCallback) and before is not self:
            for parameter, dtype in before._before_cast:
                parameter.data = parameter.data.to(dtype)
            before._before_cast.clear()
        _IN_CHARGE[self._context] = ref(self)

    def _in_charge(self) -> bool:
        return self._context is not None and _in_charge_of(self._context) is self

    def _write(self, logs: dict[str, Any], state: TrainerState) -> None:
        """Put the window since the last call into the log and start a new one."""
        windows = read_windows(self._routers)
        if not windows:
            return
        for router in self._routers.values():
            router.state.reset()
        loads = {name: w.load for name, w in windows.items()}
        values = {
            "router/entropy": sum(w.entropy for w in windows.values()) / len(windows),
            "router/max_load": max(max(load) * len(load) for load in loads.values()),
            "router/dead_experts": sum(share * len(load) < DEAD_SHARE for load in loads.values() for share in load),
            "router/balance_loss": sum(w.balance for w in windows.values()) / len(windows),
        }
        active = [w.active for w in windows.values() if w.active is not None]
        if active:
            values["router/active_experts"] = sum(active) / len(active)
        logs.update(values)
        if state.log_history:  # the trainer copied `logs` before it called us
            state.log_history[-1].update(values)
        entropy = {name: w.entropy for name, w in windows.items()}
        self.history.append({"step": state.global_step, "load": loads, "entropy": entropy})
        self._warn_of_collapse(windows)

    def _warn_of_unseen_domains(self) -> None:
        met, missed = unseen_domains(self._routers)
        if missed:
            alone = (
                "one domain only, so that it learned to choose it for everything" if len(met) == 1 else "some domains"
            )
            warnings.warn(
                f"The gate was trained on samples of {alone}: {_listed(met)}; it saw none of {_listed(missed)}. Put "
                "samples of every domain into the data set, with their column `task_type`, and train the gate again.",
                stacklevel=2,
            )

    def _warn_of_collapse(self, windows: dict[str, RouterWindow]) -> None:
        collapsed = [
            name
            for name, w in windows.items()
            if w.tokens >= COLLAPSE_TOKENS * len(w.load) and collapse(w.load, self._routers[name].top_k) > COLLAPSED
        ]
        if not collapsed or self._warned:
            return
        self._warned = True
        worst = max(collapsed, key=lambda name: max(windows[name].load))
        router = self._routers[worst]
        load = ", ".join(f"{share:.2f}" for share in windows[worst].load)
        warnings.warn(
            f"{len(collapsed)} of {len(windows)} routers have collapsed: nearly all tokens visit the same "
            f"{min(router.top_k, len(windows[worst].load) - 1)} expert(s). Worst: {worst} with loads {load}. Raise "
            f"`router_aux_loss_coef` (now {router.coef:g}), lower the learning rate, or start the router smaller with "
            "`router_init_std` = 0.02.",
            stacklevel=2,
        )


def _listed(names: list[str], most: int = 6) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


class AutomaticMoeCallback(MoeCallback):
    """The one that is there without asking. A class of its own, for transformers warns of two of the same class."""


_IN_CHARGE: WeakKeyDictionary[RoutingContext, ref[MoeCallback]] = WeakKeyDictionary()


def _in_charge_of(context: RoutingContext) -> MoeCallback | None:
    found = _IN_CHARGE.get(context)
    return None if found is None else found()


def _saved_states(state: TrainerState) -> dict[str, Any]:
    return cast(dict[str, Any], state.stateful_callbacks)  # declared as the list that it is made from


def _saved_loads(state: TrainerState) -> dict[str, list[float]]:
    """The loads in the checkpoint that training resumes from, whichever of the callbacks saved them."""
    for entry in _saved_states(state).values():
        loads = entry.get("attributes", {}).get("loads") if isinstance(entry, dict) else None
        if loads:
            return loads
    return {}


def install(trainable: bool = True) -> None:
    """Add the automatic callback to those that every transformers `Trainer` starts with; again is harmless.

    Args:
        trainable: whether an adapter is there to be trained. Only then is `transformers.trainer` imported if it was
            not before (0.7 s); serving does without.
    """
    if trainable or "transformers.trainer" in sys.modules:
        from transformers import trainer

        defaults: list[Any] = trainer.DEFAULT_CALLBACKS
        if AutomaticMoeCallback not in defaults:
            defaults.append(AutomaticMoeCallback)


def _distributed_by() -> str:
    """What accelerate distributes training with: "FSDP", "DEEPSPEED", "MULTI_GPU", "NO" ..."""
    from accelerate.state import AcceleratorState, is_initialized

    return str(AcceleratorState().distributed_type.value) if is_initialized() else "NO"


def _is_sharded() -> bool:
    """Whether somebody else than the model holds the parameters."""
    return _distributed_by() in ("FSDP", "DEEPSPEED")


def _adapter_parameters(model: nn.Module, quantised_only: bool = False) -> Iterator[nn.Parameter]:
    for layer in model.modules():
        if isinstance(layer, MoeTunerLayer) and not (quantised_only and layer.quantization_backend is None):
            for container in layer.adapter_layer_names:
                yield from getattr(layer, container).parameters()
