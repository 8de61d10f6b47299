"""A shrunk adapter trained back towards the one that it was made from, both on one model.

    loss = cross entropy + a T^2 KL(before || after),   logits divided by T in the KL,   a = 0.2, T = 2

That is MC-SMoE's (arXiv:2310.01334, its release's settings); its authors lose 10 to 20 F1 on SQuAD without a recovery.
The teacher is the adapter as it was: the same frozen model, asked once more.
"""

import tempfile
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainingArguments

from moe_peft.callbacks import install
from moe_peft.errors import refuse
from moe_peft.merge import Batch
from moe_peft.shrinking import ROUTED, SHRUNK, active


KD_WEIGHT, TEMPERATURE = 0.2, 2.0


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The module's loss, a mean over tokens; logits `[N, V]`, labels `[N]`."""
    student, teacher = student.float(), teacher.float()
    log_p, log_q = (teacher / TEMPERATURE).log_softmax(-1), (student / TEMPERATURE).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return F.cross_entropy(student, labels) + KD_WEIGHT * TEMPERATURE**2 * kl


class _Distilling(Trainer):
    """transformers' trainer with the module's loss; the model's active adapter learns from `teacher`."""

    teacher = ROUTED

    def compute_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        labels = inputs["labels"][:, 1:]
        wanted, given = labels != -100, {key: value for key, value in inputs.items() if key != "labels"}
        model.eval()
        with torch.no_grad(), active(model, self.teacher):
            teacher = model(**given).logits[:, :-1][wanted]
        model.train()
        return distillation_loss(model(**given).logits[:, :-1][wanted], teacher, labels[wanted])


def recover(
    model: PeftModel,
    batches: list[Batch],
    steps: int,
    learning_rate: float = 2e-4,
    teacher: str = ROUTED,
    student: str = SHRUNK,
) -> list[float]:
    """Train `student` for some steps on the batches, one batch a step in random order; nothing else of the model moves.

    AdamW, the rate rising over a tenth of the steps and falling to 0, gradients clipped to norm 1. Balance terms of
    the adapter's config take part.

    Args:
        batches: for `model(**batch)`, with `labels`.

    Returns:
        the losses, one for each tenth of the steps.

    Raises:
        ValueError: without steps, or without text.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise refuse("steps", steps, "a whole number of at least 1", "A few hundred are common.")
    if not batches or not any(bool((batch["labels"][:, 1:] != -100).any()) for batch in batches):
        raise ValueError("There is no text with labels to recover on. Give rows with an answer.")
    batches = [batch for batch in batches if bool((batch["labels"][:, 1:] != -100).any())]
    install()
    with active(model, student), tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            learning_rate=learning_rate,
            warmup_steps=max(1, steps // 10),
            lr_scheduler_type="linear",
            weight_decay=0.0,
            per_device_train_batch_size=1,
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = _Distilling(model, arguments, train_dataset=batches, data_collator=lambda rows: rows[0])
        trainer.remove_callback(PrinterCallback)
        trainer.teacher = teacher
        trainer.train()
        model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
