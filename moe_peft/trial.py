"""One adapter, trained on one suite by TRL's own SFTTrainer and scored: the unit of the demo and of the yardstick.

Every method gets the same backbone, rows, order of rows (by seed), steps and batch; only the adapter's config and the
learning rate differ.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, TrainerCallback

from moe_peft.backbone import load_backbone, load_tokenizer
from moe_peft.collator import TaskTypeCollator
from moe_peft.pocket import Row, Suite, exact_match, knowledge_probe, per_domain


class TrialSettings(NamedTuple):
    """How a trial trains; the defaults are the yardstick's.

    Attributes:
        learning_rate: peak, after a linear warm-up over `warmup` of the steps; then linear decay to 0.
        steps, batch_size: optimiser steps, and rows per step.
        seed: of the adapter's start and the order of the rows.
        max_grad_norm: gradients are clipped to this norm.
        quantize: NF4 with double quantisation, as in QLoRA; else fp32.
    """

    learning_rate: float
    steps: int = 300
    batch_size: int = 32
    seed: int = 0
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    quantize: bool = True


class TrialResult(NamedTuple):
    """What a trial found.

    Attributes:
        score: share of the suite's test rows answered exactly, 0..1.
        by_domain: the same for each domain.
        knowledge: share of the backbone's pre-trained facts still answered exactly, 0..1.
        trainable: trained parameters.
        seconds: of process CPU time for training.
        losses: training loss, one per logging step.
    """

    score: float
    by_domain: dict[str, float]
    knowledge: float
    trainable: int
    seconds: float
    losses: list[float]


def load_pocket(quantize: bool = True) -> tuple[Any, Any]:
    """The pocket backbone and its tokenizer; NF4 with double quantisation by default."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_backbone("pocket", "4bit" if quantize else "none", device, dtype=torch.float32)
    return model, load_tokenizer("pocket")


def tokenized(rows: list[Row], tokenizer: Any, domains: Sequence[str] = ()) -> Any:
    """Rows as a dataset of `input_ids` and `labels`, loss on the answer and the end of text only; with `domains` also the
    place of the row's domain among them, as `task_type`."""
    from datasets import Dataset

    def encode(row: Row) -> dict[str, Any]:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        known = {"task_type": domains.index(row["domain"])} if domains else {}
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer, **known}

    return Dataset.from_list([encode(row) for row in rows])


def train_adapter(
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    config: PeftConfig,
    settings: TrialSettings,
    output_dir: Path,
    callbacks: list[TrainerCallback] | None = None,
    progress: bool = False,
) -> tuple[PeftModel, list[float]]:
    """Train with TRL's SFTTrainer, unmodified; returns the model and the training losses.

    Args:
        model: the backbone; it carries the adapter afterwards, its own weights as they were.
        rows: prompts and completions.
        config: any PEFT config.
        output_dir: for the trainer; no checkpoints are written.
    """
    torch.manual_seed(settings.seed)
    adapted = get_peft_model(model, config)
    return train_on(adapted, tokenizer, tokenized(rows, tokenizer), settings, output_dir, callbacks, progress)


def train_on(
    adapted: PeftModel,
    tokenizer: Any,
    dataset: Any,
    settings: TrialSettings,
    output_dir: Path,
    callbacks: list[TrainerCallback] | None = None,
    progress: bool = False,
) -> tuple[PeftModel, list[float]]:
    """`train_adapter` for a model that has its adapter, and rows that are tokenized. A column `task_type` reaches it."""
    from trl import SFTConfig, SFTTrainer

    typed = "task_type" in dataset.column_names
    arguments = SFTConfig(
        output_dir=str(output_dir),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(settings.warmup * settings.steps),
        max_grad_norm=settings.max_grad_norm,
        weight_decay=0.0,
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=max(1, settings.steps // 20),
        save_strategy="no",
        report_to="none",
        disable_tqdm=not progress,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=not typed,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(
        model=adapted,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    if typed:
        trainer.data_collator = TaskTypeCollator(trainer.data_collator, num_types=max(dataset["task_type"]) + 1)
    trainer.remove_callback(PrinterCallback)  # the losses are returned, not printed
    # TRL stores the adapters of a 4-bit model in bf16, where small steps are lost; every method here trains in fp32.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return cast(PeftModel, trainer.model), losses


def run_trial(
    suite: Suite,
    config: PeftConfig,
    settings: TrialSettings,
    output_dir: Path,
    inspect: Callable[[PeftModel, Any], None] | None = None,
) -> TrialResult:
    """Train on a suite and score it.

    Args:
        inspect: called with the trained model and tokenizer before they are let go.
    """
    model, tokenizer = load_pocket(settings.quantize)
    start = time.process_time()
    adapted, losses = train_adapter(model, tokenizer, suite.train, config, settings, output_dir)
    seconds = time.process_time() - start
    matches = exact_match(adapted, tokenizer, suite.test)
    known = exact_match(adapted, tokenizer, knowledge_probe())
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    if inspect is not None:
        inspect(adapted, tokenizer)
    return TrialResult(
        score=sum(matches) / len(matches),
        by_domain=per_domain(suite.test, matches),
        knowledge=sum(known) / len(known),
        trainable=trainable,
        seconds=seconds,
        losses=losses,
    )
