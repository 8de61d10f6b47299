"""A new task for an adapter whose ranks choose themselves: what it has learned is frozen, and new ranks join it."""

from peft import PeftModel

from moe_peft.allocation import Allocation, parse
from moe_peft.errors import nearest, refuse
from moe_peft.rank_config import SELF, RankMoeConfig
from moe_peft.tuners.rank_moe import RankMoeLinear, RankMoeModel


def grow(model: PeftModel, r: Allocation, adapter_name: str = "default") -> None:
    """Freeze the ranks of a finished task and add `r` new ones to be trained on the next (MoRAM, arXiv:2506.21035).

    The LoRA scale of the finished ranks is folded into their B, so that freezing changes nothing. **Adding ranks does**,
    even though the new B is 0: their responses enter the norm and may win places among the `top_k`, so that outputs for
    earlier tasks move at once. The published method is the same.

    Call it between two trainings, and make the optimizer or trainer afterwards: the parameters are new objects. The
    ranks of all tasks are saved and loaded with the adapter; its config lists them in `frozen_r`.

    Args:
        model: with an adapter of `RankMoeConfig(routing="self_activated")`.
        r: new ranks, of the form of the config's `r`. At least `top_k` is not needed, as earlier ranks count.
        adapter_name: the adapter that grows.

    Raises:
        TypeError: if `model` is not a PEFT model.
        ValueError: another type or rule of adapter, an `r` that fits no layer, or an adapter that is being trained.
    """
    config = _growing_config(model, adapter_name)
    parse(r, "r")
    tuner = model.base_model
    layers = {
        name: layer
        for name, layer in tuner.model.named_modules()
        if isinstance(layer, RankMoeLinear) and layer.holds(adapter_name)
    }
    _refuse_while_training(list(layers.values()), adapter_name)
    ranks = {name: tuner._ranks(r, name) for name in layers}  # refuses before anything is changed
    config.frozen_r = [*(config.frozen_r or []), config.r]
    config.r, config.inference_mode = r, False
    for name, layer in layers.items():
        layer.grow(adapter_name, config, ranks[name])
    tuner.set_adapter(tuner.active_adapters)


def _growing_config(model: PeftModel, adapter_name: str) -> RankMoeConfig:
    """The adapter's config, if it is one that grows."""
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"`model` is a {type(model).__name__}, but must be a PEFT model that holds the adapter: "
            "`get_peft_model(model, RankMoeConfig(routing='self_activated'))`."
        )
    if adapter_name not in model.peft_config:
        known = list(model.peft_config)
        raise refuse("adapter_name", adapter_name, "an adapter of this model", nearest(str(adapter_name), known))
    config = model.peft_config[adapter_name]
    if not isinstance(config, RankMoeConfig) or not isinstance(model.base_model, RankMoeModel):
        raise ValueError(
            f"Adapter '{adapter_name}' is of type {type(config).__name__} and cannot grow: only ranks that choose "
            "themselves can be joined by others. Train a new adapter with `RankMoeConfig(routing='self_activated')`."
        )
    if config.routing != SELF:
        remedy = "A router has learned to choose among the ranks it knows: train with 'self_activated' from the start."
        raise refuse("routing", config.routing, f"{SELF!r} for an adapter that is to grow", remedy)
    return config


def _refuse_while_training(layers: list[RankMoeLinear], adapter_name: str) -> None:
    running = layers[0].context._running if layers else None
    if running is not None and running():
        raise ValueError(
            f"Adapter '{adapter_name}' cannot grow while a trainer runs: its optimizer holds the parameters that would be "
            "replaced. Call `moe_peft.grow` after `trainer.train()` has returned, and make a new trainer."
        )
    for layer in layers:
        if any(p.grad is not None for p in layer.experts(adapter_name).parameters()):
            raise ValueError(
                f"Adapter '{adapter_name}' cannot grow: its parameters hold gradients, so a step is under way whose "
                "optimizer would go on with the old ones. Finish it with `optimizer.zero_grad()`, grow, and make a new "
                "optimizer."
            )
