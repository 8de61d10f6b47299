"""How well each LoRA of a bank does on a few labelled shots: reasoning perplexity and accuracy (Rocket, arXiv:2408.15915).

One LoRA is on the backbone at a time. A score is written down as soon as it is known, so that a run that was stopped goes
on where it was; a LoRA, shot or backbone that has changed is scored anew.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

from moe_peft.backbone import keep_trainable
from moe_peft.bank import BankEntry, Step, base_name
from moe_peft.data import training_rows
from moe_peft.errors import refuse
from moe_peft.loaded import collate, encode


IGNORED = -100
FINAL = "final_answer"
"""A column of the shots: what a right answer ends with, where `completion` reasons first."""

Scorer = Callable[[str, dict[str, Any]], float]
"""What the model wrote, and the row -> how right it is, 0..1."""


class Shot(NamedTuple):
    """One labelled example.

    Attributes:
        ids: of prompt and answer.
        labels: the same, with -100 on the prompt.
        row: as it was written, in TRL's format.
    """

    ids: list[int]
    labels: list[int]
    row: dict[str, Any]


class Score(NamedTuple):
    """What a LoRA does on the shots.

    Attributes:
        name: of the LoRA.
        perplexity: exp of the mean loss on the tokens of the answers, reasoning included; infinite for broken weights.
        accuracy: share of right answers, 0..1.
    """

    name: str
    perplexity: float
    accuracy: float


def read_shots(source: str, tokenizer: Any) -> list[Shot]:
    """Labelled examples in any format that `moe-peft train --dataset` reads, each with a prompt and an answer.

    Args:
        source: a file, folder or id; a slice of it goes behind a `#`. `completion` may hold the reasoning and then the
            answer; with a column `final_answer`, that is what counts as right at its end.
        tokenizer: of the backbone.

    Raises:
        ValueError: rows that cannot be read, or that have no prompt or no answer.
    """
    name, _, split = source.partition("#")
    split = split or "train"
    try:
        dataset = training_rows(name, split, tokenizer.chat_template is not None, keep=(FINAL,)).dataset
    except ValueError as error:
        if f"have no `{FINAL}`" not in str(error):
            raise
        dataset = training_rows(name, split, tokenizer.chat_template is not None).dataset
    shots = [Shot(*encode(row, tokenizer), row) for row in cast("Sequence[dict[str, Any]]", dataset)]
    for number, shot in enumerate(shots, start=1):
        if IGNORED not in shot.labels or all(label == IGNORED for label in shot.labels):
            raise ValueError(
                f"Row {number} of the shots '{source}' has no prompt apart from the answer (or no answer). Write shots as "
                "`prompt` and `completion`: only the answer is scored."
            )
    return shots


@torch.no_grad()
def perplexity_and_accuracy(
    model: nn.Module, shots: Sequence[Shot], tokenizer: Any, batch_size: int = 8
) -> tuple[float, float]:
    """Both from one pass: the loss on the answers, and whether the most likely token is right all along an answer.

    The latter is greedy generation and exact match (`generated_accuracy` is the definition): as long as every arg-max is
    right, generation walks along the answer; at the first that is wrong both have failed.

    Returns:
        exp(mean negative log-likelihood over all answer tokens of all shots), >= 1; and a share, 0..1.
    """
    loss, tokens, right = 0.0, 0, 0
    pad, end = _pad_id(tokenizer), tokenizer.eos_token_id
    for batch in _batches(shots, batch_size):
        inputs = collate([(shot.ids, shot.labels) for shot in batch], pad)
        inputs = {key: value.to(_device(model)) for key, value in inputs.items()}
        labels = inputs.pop("labels")[:, 1:]
        answers = labels != IGNORED
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        chosen, wanted = logits[answers].float(), labels[answers]  # [tokens of the answers, vocabulary]
        loss += float(F.cross_entropy(chosen, wanted, reduction="sum"))
        tokens += len(wanted)
        hit = torch.ones_like(answers)
        hit[answers] = chosen.argmax(-1) == wanted
        for found, shot in zip(hit.tolist(), batch, strict=True):
            right += all(found[: _end_of_answer(shot, end) - 1])
    mean = loss / tokens
    return (math.exp(min(mean, 700.0)) if math.isfinite(mean) else math.inf), right / len(shots)


@torch.no_grad()
def generated_accuracy(
    model: Any,
    shots: Sequence[Shot],
    tokenizer: Any,
    scorer: Scorer | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
) -> float:
    """The mean score of greedy answers to the prompts.

    Args:
        scorer: by default 1 for an answer whose tokens are the shot's, 0 for another; for rows with a `final_answer`,
            whether the text ends with it.
        max_new_tokens: by default as many as the longest answer has, twice that with a scorer or a `final_answer`.
    """
    total, pad, end = 0.0, _pad_id(tokenizer), tokenizer.eos_token_id
    free = scorer is not None or FINAL in shots[0].row
    for batch in _batches(shots, batch_size):
        prompts = [shot.ids[: _start_of_answer(shot)] for shot in batch]
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=_device(model))
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=_device(model))
        room = max(len(shot.ids) - _start_of_answer(shot) for shot in batch) * (2 if free else 1)
        said = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens or room,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=end,
        )[:, longest:].tolist()
        for answer, shot in zip(said, batch, strict=True):
            total += _right(answer, shot, tokenizer, scorer, end)
    return total / len(shots)


def _right(answer: list[int], shot: Shot, tokenizer: Any, scorer: Scorer | None, end: int) -> float:
    if scorer is None and FINAL not in shot.row:
        wanted = shot.ids[_start_of_answer(shot) : _end_of_answer(shot, end)]
        return float(answer[: len(wanted)] == wanted)
    text = tokenizer.decode(answer[: answer.index(end)] if end in answer else answer, skip_special_tokens=True)
    if scorer is None:
        return float(text.strip().endswith(str(shot.row[FINAL]).strip()))
    value = float(scorer(text, shot.row))
    if not 0 <= value <= 1:
        raise refuse("scorer", value, "a function whose result is from 0 to 1", "1 is a right answer.")
    return value


def score_bank(
    model: Any,
    tokenizer: Any,
    entries: Sequence[BankEntry],
    shots: Sequence[Shot],
    record: Path | None = None,
    scorer: Scorer | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    on_step: Step | None = None,
) -> list[Score]:
    """Score every LoRA on the shots, one at a time; the backbone is left as it was, bit for bit.

    Args:
        model: the backbone, without an adapter.
        record: a JSONL file that gets each score at once, and from which known ones are taken.
        scorer: how right a text is; see `generated_accuracy`. It is part of what makes a known score valid by its name.
        on_step: for a progress bar.

    Returns:
        In the order of `entries`.

    Raises:
        ValueError: if there are no shots, the model carries an adapter, or the record has a line that is no score.
    """
    if not shots:
        raise refuse("shots", 0, "at least one labelled example", "The paper takes 50.")
    if isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("The model carries an adapter. Give the backbone alone: `model.unload()`.")
    generated = scorer is not None or FINAL in shots[0].row
    task = _task(model, shots, scorer, max_new_tokens if generated else None)
    known = _known(record, task) if record is not None else {}
    scores = []
    for number, entry in enumerate(entries, start=1):
        if entry.fingerprint not in known:
            with _adapted(model, entry.folder) as adapted:
                perplexity, accuracy = perplexity_and_accuracy(adapted, shots, tokenizer, batch_size)
                if generated:
                    accuracy = generated_accuracy(adapted, shots, tokenizer, scorer, batch_size, max_new_tokens)
            known[entry.fingerprint] = perplexity, accuracy
            if record is not None:
                _write_down(record, entry, task, perplexity, accuracy)
        scores.append(Score(entry.name, *known[entry.fingerprint]))
        if on_step is not None:
            on_step(number, len(entries))
    return scores


@contextmanager
def _adapted(model: Any, folder: Path) -> Iterator[Any]:
    """The backbone with one LoRA, for inference; without it afterwards, whatever happens."""
    keep_trainable(model)  # a 4-bit backbone must not be repacked by a pass in evaluation mode
    flags = {module: module.training for module in model.modules()}
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    adapted = get_peft_model(model, config)  # first the layers, which `unload` removes also if the weights do not fit
    try:
        adapted.load_adapter(str(folder), "default", torch_device=str(_device(model)))
        yield adapted.eval()
    finally:
        adapted.unload()
        for module, training in flags.items():
            module.training = training


def _task(model: nn.Module, shots: Sequence[Shot], scorer: Scorer | None, max_new_tokens: int | None) -> str:
    """A fingerprint of what was asked of whom."""
    kinds = sorted({(str(p.dtype), type(p).__name__) for p in model.parameters()})
    name = None if scorer is None else getattr(scorer, "__qualname__", repr(scorer))
    finals = [shot.row.get(FINAL) for shot in shots]
    base = Path(base_name(model) or "").name
    asked = [base, kinds, [(s.ids, s.labels) for s in shots], finals, name, max_new_tokens]
    return hashlib.blake2b(json.dumps(asked, default=str).encode(), digest_size=16).hexdigest()


def _known(record: Path, task: str) -> dict[str, tuple[float, float]]:
    """fingerprint -> perplexity and accuracy. A last line without an end is what an interruption leaves."""
    if not record.is_file():
        return {}
    text = record.read_text(encoding="utf-8")
    known = {}
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            row = json.loads(line or "{}")
            if row and row["task"] == task:
                perplexity = math.inf if row["perplexity"] is None else float(row["perplexity"])
                known[row["fingerprint"]] = perplexity, float(row["accuracy"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Line {number} of {record} is no score: {line[:80]!r}. Remove the line (that LoRA is scored again) or "
                "name another output."
            ) from error
    return known


def _write_down(record: Path, entry: BankEntry, task: str, perplexity: float, accuracy: float) -> None:
    row = {
        "name": entry.name,
        "perplexity": perplexity if math.isfinite(perplexity) else None,
        "accuracy": accuracy,
        "fingerprint": entry.fingerprint,
        "task": task,
    }
    record.parent.mkdir(parents=True, exist_ok=True)
    with record.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # half a line, of a run that was killed
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write((json.dumps(row) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def _batches(shots: Sequence[Shot], size: int) -> Iterator[Sequence[Shot]]:
    for start in range(0, len(shots), size):
        yield shots[start : start + size]


def _start_of_answer(shot: Shot) -> int:
    return next(i for i, label in enumerate(shot.labels) if label != IGNORED)


def _end_of_answer(shot: Shot, end: int | None) -> int:
    """Behind the last end-of-text, where generation stops; a chat template may write more after it."""
    places = [i + 1 for i, label in enumerate(shot.labels) if label == end and label != IGNORED]
    return places[-1] if places else len(shot.ids)


def _pad_id(tokenizer: Any) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
