"""Where a row's prompt ends, for routers that look at whole prompts, and what a prompt is pooled to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moe_peft.errors import refuse
from moe_peft.masks import real_from_mask


def no_prompt() -> ValueError:
    """What to do where routing by sequence cannot know where the prompt ends."""
    return refuse(
        "router_granularity",
        "sequence",
        "'token' where the model is not told which tokens are the prompt",
        "A router that looks at the answer while it learns would do otherwise in use. Pass `labels` with -100 on the "
        "prompt (TRL: `completion_only_loss=True`, or prompts and completions in separate columns), or a bool tensor "
        "`prompt_mask` of the shape of `input_ids`.",
    )


def no_single_prompt(allowed: str, remedy: str) -> ValueError:
    """What to do where rows cannot be routed as whole sequences because of what the batch holds."""
    return refuse("router_granularity", "sequence", f"'token' where {allowed}", remedy)


@contextmanager
def said_of(setting: str) -> Iterator[None]:
    """What is said of `router_granularity`, said of the field that a type has for it, as its user wrote it."""
    try:
        yield
    except ValueError as error:
        told = str(error)
        said = told.replace("`router_granularity` is 'sequence'", setting)
        if said == told:
            raise
        raise ValueError(said) from error


def pooled(embeddings: Tensor, prompt: Tensor | None, attention_mask: Any, past: int | None = None) -> Tensor:
    """Maximum and mean of the embeddings over the real tokens of each prompt, `[B, 2, d]`.

    Args:
        embeddings: `[B, S, d]`.
        prompt: `[B, S]` bool, or None where all of it is the prompt.
        attention_mask: as the model was given it, or None.
        past: see `real_from_mask`.
    """
    seen = real_from_mask(attention_mask, embeddings, past)
    if seen is None or seen.shape != embeddings.shape[:2]:
        seen = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
    if prompt is not None:
        seen = seen & prompt.to(seen.device).bool()
    seen = seen.unsqueeze(-1)
    largest = embeddings.masked_fill(~seen, float("-inf")).amax(1)
    largest = largest.masked_fill(~seen.any(1), 0.0)  # a row without a prompt, as in padding to a full batch
    mean = (embeddings * seen).sum(1) / seen.sum(1).clamp(min=1)
    return torch.stack((largest, mean), dim=1)


def leading_prompt(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """`[B, S]`, what stands before the first label. Not what is masked later on: an answer must not depend on what the
    user says after it.

    Raises:
        ValueError: if a row has none, for its router would see nothing.
    """
    prompt = (labels == -100).long().cumprod(1).bool()
    seen = prompt & attention_mask.bool() if _same_shape(attention_mask, prompt) else prompt
    if not torch.compiler.is_compiling() and not bool(seen.any(1).all()):
        remedy = (
            "Mask the prompt in `labels` with -100 (TRL: `completion_only_loss=True`), or pass a bool `prompt_mask`."
        )
        raise no_single_prompt("a row has no prompt before its first label", remedy)
    return prompt


def check_one_sample_per_row(given: dict[str, Any]) -> None:
    """Refuse packed and padding-free rows, whose samples would be routed by the prompt of the first."""
    if is_packed(given):
        remedy = "Turn packing and padding-free batches off."
        raise no_single_prompt("one row holds several samples, each with a prompt of its own", remedy)


def is_packed(given: dict[str, Any]) -> bool:
    """Whether a row of the model's arguments holds several samples. Not told within a compiled model."""
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    packed = given.get("cu_seq_lens_q") is not None
    if isinstance(positions, Tensor) and positions.dim() == 2 and not torch.compiler.is_compiling():
        starts = positions == 0
        real = real_from_mask(mask, positions.unsqueeze(-1), past_of(cache_of(given)))
        starts = starts & real if _same_shape(real, starts) else starts
        packed |= bool((starts.sum(1) > 1).any())
    return packed


def _same_shape(mask: Any, like: Tensor) -> bool:
    return isinstance(mask, Tensor) and mask.shape == like.shape


def cache_of(given: dict[str, Any]) -> Any:
    cache = given.get("past_key_values", given.get("past_key_value"))
    return cache if hasattr(cache, "get_seq_length") else None


def past_of(cache: Any, layer: int = 0) -> int | None:
    """How many positions the cache holds; None without one."""
    return None if cache is None else int(cache.get_seq_length(layer))
