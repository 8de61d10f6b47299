"""Where a `RoutingContext` keeps what one pass knows: its padding, its prompts, its cache."""

import threading
from typing import Any

import torch


class OfThread(threading.local):
    """Of one pass without gradient, or of one call of the user's. Each thread has its own, so that two requests served side
    by side do not see each other's prompts."""

    rows = 0
    real = task_types = prompt = embeddings = pool = cache = decoding = None
    prompt_length = kept = None

    def forget(self) -> None:
        """What a pass knew."""
        self.real = self.task_types = self.prompt = self.embeddings = self.pool = self.cache = self.decoding = None
        self.rows = 0


class OfGradient:
    """Of one pass with gradient. It is no thread's: backward may recompute a layer on one that has seen no pass."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """What a pass knew."""
        self.real = self.task_types = self.prompt = self.embeddings = self.pool = self.cache = self.decoding = None
        self.rows = 0


def kept_by_pass(name: str) -> Any:
    """An attribute of a context that belongs to one pass."""

    def get(context: Any) -> Any:
        return getattr(context.with_gradient if torch.is_grad_enabled() else context.of_thread, name)

    def set_(context: Any, value: Any) -> None:
        setattr(context.with_gradient if torch.is_grad_enabled() else context.of_thread, name, value)

    return property(get, set_)


def kept_by_thread(name: str) -> Any:
    """An attribute of a context that belongs to one call of the user's, with gradient or without."""

    def set_(context: Any, value: Any) -> None:
        setattr(context.of_thread, name, value)

    return property(lambda context: getattr(context.of_thread, name), set_)
