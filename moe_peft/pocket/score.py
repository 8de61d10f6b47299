"""
Exact match of short greedy answers, for any causal language model of transformers or PEFT.

`exact_match` is the one to use: one forward per batch, teacher-forced. `exact_match_generated` is its definition, real
greedy generation with a cache. The two agree because the answer is compared as a whole: if every arg-max along the
right answer is right, greedy decoding walks along it; at the first one that is wrong, both have failed.

Prompt and completion are tokenized apart and joined. For a tokenizer of characters that is the same as tokenizing them
together; for one with merges it may not be, and the rows should then be split at a boundary that it respects.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch

from .world import Row


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_IGNORED = -100


@contextmanager
def _inference(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module has its own training flag back afterwards."""
    was_training = {module: module.training for module in model.modules()}
    for module in model.modules():
        # bitsandbytes on CPUs with AVX512-BF16 repacks the weights of a `Linear4bit` in place at its first forward in
        # evaluation mode; training it afterwards then silently loses gradients. Scoring must not change the model.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in was_training.items():
            module.training = training


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _pad(sequences: Sequence[list[int]], value: int, side: str) -> torch.Tensor:
    """`[len(sequences), longest]`, filled up with `value` on the left or on the right."""
    longest = max(map(len, sequences))
    filled = [
        [value] * (longest - len(s)) + s if side == "left" else s + [value] * (longest - len(s)) for s in sequences
    ]
    return torch.tensor(filled)


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    return cast(list[list[int]], tokenizer(texts, add_special_tokens=False)["input_ids"])


def _padding_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The padding token, or the end-of-text where there is none: masked out, it may be any token."""
    return cast(int, tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _answers(tokenizer: "PreTrainedTokenizerBase", rows: list[Row]) -> list[list[int]]:
    """The tokens a right answer consists of: the completion and the end-of-text."""
    end = cast(int, tokenizer.eos_token_id)
    return [ids + [end] for ids in _encode(tokenizer, [row["completion"] for row in rows])]


def exact_match(
    model: torch.nn.Module, tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row], batch_size: int = 256
) -> list[bool]:
    """
    Whether the greedy answer to each row's prompt is its completion followed by the end-of-text, in the order of `rows`.

    Measured by teacher forcing: the arg-max at every position of the answer must be the next token of the answer.
    """
    results: list[bool] = []
    with _inference(model):
        for start in range(0, len(rows), batch_size):
            results += _match_batch(model, tokenizer, list(rows[start : start + batch_size]))
    return results


def _match_batch(model: torch.nn.Module, tokenizer: "PreTrainedTokenizerBase", rows: list[Row]) -> list[bool]:
    prompts, answers = _encode(tokenizer, [row["prompt"] for row in rows]), _answers(tokenizer, rows)
    sequences = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    labels = [[_IGNORED] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]
    # The last token is never an input. The padding is on the right, where a causal model does not see it.
    input_ids = _pad([s[:-1] for s in sequences], _padding_id(tokenizer), "right").to(_device(model))
    attention_mask = _pad([[1] * (len(s) - 1) for s in sequences], 0, "right").to(_device(model))
    targets = _pad([label[1:] for label in labels], _IGNORED, "right").to(_device(model))
    # They say where the prompt ends, for gates that look at it and must not see the answer.
    known = _pad([label[:-1] for label in labels], _IGNORED, "right").to(_device(model))
    given = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": known}
    predicted = model(**given, use_cache=False).logits.argmax(-1)
    return ((predicted == targets) | (targets == _IGNORED)).all(dim=1).tolist()


def exact_match_generated(
    model: torch.nn.Module, tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row], batch_size: int = 256
) -> list[bool]:
    """What `exact_match` means, by cached greedy generation from left-padded prompts. Slower by the answer's length."""
    results: list[bool] = []
    with _inference(model):
        for start in range(0, len(rows), batch_size):
            results += _generate_batch(model, tokenizer, list(rows[start : start + batch_size]))
    return results


def _generate_batch(model: torch.nn.Module, tokenizer: "PreTrainedTokenizerBase", rows: list[Row]) -> list[bool]:
    prompts, answers = _encode(tokenizer, [row["prompt"] for row in rows]), _answers(tokenizer, rows)
    input_ids = _pad(prompts, _padding_id(tokenizer), "left").to(_device(model))
    generated = (
        cast(Any, model)
        .generate(
            input_ids=input_ids,
            attention_mask=_pad([[1] * len(prompt) for prompt in prompts], 0, "left").to(_device(model)),
            max_new_tokens=max(map(len, answers)),
            do_sample=False,
            pad_token_id=_padding_id(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
        )[:, input_ids.shape[1] :]
        .tolist()
    )
    return [said[: len(answer)] == answer for said, answer in zip(generated, answers, strict=True)]


def per_domain(rows: Sequence[Row], matches: Sequence[bool]) -> dict[str, float]:
    """The share of matches in each domain, between 0 and 1, in the order the domains first appear."""
    by_domain: dict[str, list[bool]] = defaultdict(list)
    for row, match in zip(rows, matches, strict=True):
        by_domain[row["domain"]].append(match)
    return {domain: sum(found) / len(found) for domain, found in by_domain.items()}
