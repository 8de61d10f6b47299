"""Base, routed and merged model on the same tokens: loss, distance from the routed one, answers that are right."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_peft.merge import Batch


class Figures(NamedTuple):
    """One model on held-out text.

    Attributes:
        loss: mean negative log-likelihood of a token with a label, in nats.
        kl: mean KL(routed || this) in nats; 0 is no loss.
        top1: share of tokens whose most probable next token is the routed model's.
        score: share of the rows of the evaluation set answered exactly by greedy decoding; None where there is none.
    """

    loss: float
    kl: float
    top1: float
    score: float | None = None


class Sums:
    """`Figures` on the way, summed over tokens in fp64."""

    def __init__(self) -> None:
        self.values = torch.zeros(3, dtype=torch.float64)
        self.tokens = 0

    def add(self, log_probs: Tensor, routed: Tensor, labels: Tensor) -> None:
        """Log-probabilities of this model and of the routed one, `[N, V]`, and the labels `[N]`."""
        loss = F.nll_loss(log_probs, labels, reduction="sum")
        kl = (routed.exp() * (routed - log_probs)).sum()
        same = (log_probs.argmax(-1) == routed.argmax(-1)).sum()
        self.values += torch.stack([v.double().cpu() for v in (loss, kl, same)])
        self.tokens += labels.numel()

    def figures(self, score: float | None = None) -> Figures:
        if not self.tokens:
            raise ValueError("The held-out text holds no token with a label. Give rows with an answer.")
        loss, kl, top1 = (self.values / self.tokens).tolist()
        return Figures(loss, max(kl, 0.0), top1, score)  # rounding can take a KL of nothing below it


def labels_of(batch: Batch) -> Tensor:
    """`[B, S]`, -100 where no loss is wanted; without labels, every token that is not padding."""
    if batch.get("labels") is not None:
        return batch["labels"]
    mask = batch.get("attention_mask")
    return batch["input_ids"] if mask is None else batch["input_ids"].masked_fill(mask == 0, -100)


def real(batch: Batch) -> Tensor:
    """`[B, S]` bool: the tokens that are not padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def predicting(batch: Batch) -> Tensor:
    """`[B, S]` bool: the positions whose next token has a label."""
    wanted = labels_of(batch)[:, 1:] != -100
    return F.pad(wanted, (0, 1))


def wanted_log_probs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`(log-probabilities [N, V] in fp32, labels [N])` of the positions whose next token has a label."""
    labels = labels[:, 1:].to(logits.device)
    wanted = labels != -100
    return logits[:, :-1][wanted].float().log_softmax(-1), labels[wanted]


def right_rows(logits: Tensor, labels: Tensor) -> list[bool]:
    """For each row, whether greedy decoding of its prompt gives its answer: the arg-max is right all along it.

    At the first wrong one greedy decoding leaves the answer, and both have failed; so no token has to be generated.
    """
    labels = labels[:, 1:].to(logits.device)
    return ((logits[:, :-1].argmax(-1) == labels) | (labels == -100)).all(1).tolist()
