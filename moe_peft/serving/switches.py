"""Experts switched off or forced, and domains chosen, for one request: our fields, as `moe_peft.routing_control` does it."""

import json
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
        raise RequestRefused(_in_a_request(str(error)), next(iter(fields.given))) from error
    _check_label(model, fields)


_IN_A_REQUEST = {
    "`disable`": "`disable_experts`",
    "`force`": "`force_experts`",
    "For the base model alone use `with model.disable_adapter()`.": "Leave at least one of them on.",
}
"""What `moe_peft.routing` says -> what that is to somebody who asks over HTTP."""


def _in_a_request(sentence: str) -> str:
    for said, meant in _IN_A_REQUEST.items():
        sentence = sentence.replace(said, meant)
    return sentence


def _check_label(model: Any, fields: ExpertFields) -> None:
    """Refuse a request that does not say its task type where nothing else chooses.

    Raises:
        RequestRefused: naming the field and what it may be.
    """
    for name in getattr(model, "active_adapters", ()) if fields.domain is None else ():
        config: Any = model.peft_config[name]
        if getattr(config, "routing", None) == "given":
            labels = getattr(config, "domains", None) or range(len(config.expert_groups or ()))
            raise RequestRefused(
                f"`domain` is missing, and this adapter's experts are chosen by it alone. Give one of "
                f'{", ".join(map(str, labels))} as a field of the request, as {{"domain": {json.dumps(labels[-1])}}}.',
                "domain",
            )
