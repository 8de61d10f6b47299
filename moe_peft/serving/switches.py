"""Experts switched off or forced, and domains chosen, for one request: our fields, as `moe_peft.routing_control` does it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from moe_peft.serving.requests import ExpertFields, RequestRefused


def expert_control(model: nn.Module, fields: ExpertFields) -> AbstractContextManager[Any]:
    """What a request's passes run under, on the thread that runs them.

    Args:
        model: with routed layers.
        fields: of the request; without any, nothing is done.

    Raises:
        RequestRefused: experts or a domain that the model does not have, or a version of this package that cannot switch
            them.
    """
    if not fields.given:
        return nullcontext()
    try:
        from moe_peft.routing_control import routing  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        name = next(iter(fields.given))
        raise RequestRefused(
            f"`{name}` is given, but this version of moe_peft cannot switch experts by request. Leave it out.", name
        ) from error
    disable, force = fields.disable_experts or (), fields.force_experts or ()
    return routing(model, disable=disable, force=force, domain=fields.domain)


def check_control(model: nn.Module, fields: ExpertFields) -> None:
    """Refuse what `expert_control` would, before anything is generated.

    Raises:
        RequestRefused: see `expert_control`.
    """
    try:
        with expert_control(model, fields):
            pass
    except RequestRefused:
        raise
    except (ValueError, TypeError) as error:
        raise RequestRefused(str(error), next(iter(fields.given))) from error
