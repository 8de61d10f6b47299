"""MoSA's consistency term: two passes that drew different parts should say the same (arXiv:2312.02923); THOR's for experts
drawn by lot is of the same form (arXiv:2110.04260), with the cross entropy of the second pass beside it.

    loss = cross entropy of the first pass + weight * (KL(p1 || p2) + KL(p2 || p1)) / 2,    each target detached

It costs a second forward and backward pass. The paper classifies images; here the divergence is a mean over the tokens
that have a label, as the cross entropy is.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe_peft.errors import refuse


def symmetric_kl(first: Tensor, second: Tensor) -> Tensor:
    """`[T]`: the mean of both divergences between the logits `[T, V]`; gradients reach each as prediction, not as target."""
    p, q = first.float().log_softmax(-1), second.float().log_softmax(-1)

    def divergence(predicted: Tensor, target: Tensor) -> Tensor:
        return (target.exp() * (target - predicted)).sum(-1)

    return (divergence(q, p.detach()) + divergence(p, q.detach())) / 2


def consistency_loss(
    first: Tensor, second: Tensor, labels: Tensor, weight: float = 1.0, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """The loss of a batch from the logits of two passes.

    Args:
        first, second: `[B, S, V]`.
        labels: `[B, S]`, -100 where there is none; shifted here, as transformers does.
        weight: of the divergence; 0 leaves the cross entropy of the first pass.
        num_items_in_batch: divide by it instead of by the number of labels, for gradient accumulation.
    """
    targets = labels[:, 1:].flatten()
    here = targets != -100
    first, second = (logits[:, :-1].flatten(0, 1)[here] for logits in (first, second))
    entropy = nn.functional.cross_entropy(first.float(), targets[here], reduction="none")
    total = (entropy + weight * symmetric_kl(first, second)).sum()
    count = here.sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


class ConsistencyLoss:
    """`compute_loss_func` for transformers' and TRL's unmodified trainers.

    >>> SFTTrainer(model, args, train_dataset=rows, compute_loss_func=ConsistencyLoss(model))  # doctest: +SKIP

    The trainer makes the first pass; this makes the second one, with the inputs that the model was last called with. In
    evaluation there is one pass and the plain cross entropy. (TRL calls the model once more, without gradient, for its
    metrics.)

    Args:
        model: the `PeftModel` that the trainer gets.
        weight: of the divergence, at least 0; 1 in the paper.

    Raises:
        ValueError: if the weight is negative.
    """

    def __init__(self, model: nn.Module, weight: float = 1.0) -> None:
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not weight >= 0:
            raise refuse("weight", weight, "a number of at least 0", "MoSA uses 1.")
        self.model, self.weight = model, weight
        self._inputs: dict[str, Any] = {}
        model.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():
            self._inputs = kwargs

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        first = outputs["logits"]
        if not (self.model.training and torch.is_grad_enabled()) or not self._inputs:
            return consistency_loss(first, first, labels, 0.0, num_items_in_batch)
        second = self.model(**self._inputs)["logits"]
        self._inputs = {}
        return consistency_loss(first, second, labels, self.weight, num_items_in_batch)
